"""Training through the fused operation is training through PEFT's own layers, on the real model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import randomize
from peft import LoraConfig, get_peft_model
from torch import Tensor

from matryoshka_lora import nest
from matryoshka_lora.adapter.layers import NestedLinear
from matryoshka_lora.models import load_model

IDS = torch.randint(100, 40000, (2, 24), generator=torch.Generator().manual_seed(0))


def with_lora(base: Any, nested: bool) -> Any:
    base = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=32, lora_alpha=32, target_modules="all-linear"))
    if nested:
        nest(model, rule="lora")
        assert sum(isinstance(module, NestedLinear) for module in model.modules()) == 7 * len(base.model.layers)
    return model.train()


def gradients(model: Any, seed: int) -> Tensor:
    model.zero_grad()
    randomize(model, seed, size=0.02)
    ids = torch.randint(100, 40000, (2, 24), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids, use_cache=False).loss.backward()
    factors = [p.grad.double().flatten() for name, p in model.named_parameters() if ".lora_" in name]
    return torch.cat(factors)


@pytest.mark.slow
def test_bf16_gradients_are_no_further_from_fp64_than_pefts() -> None:
    """The roundings of 30 layers make an error of 5 to 12 % for either, by chance: so the mean of some draws."""
    base = load_model(dtype=torch.bfloat16)
    models = [with_lora(base, nested=True), with_lora(base, nested=False)]
    oracle = with_lora(base.double(), nested=False).double()
    errors = []
    for seed in range(4):
        exact = gradients(oracle, seed)
        errors.append([float((gradients(model, seed) - exact).norm() / exact.norm()) for model in models])
    ours, theirs = torch.tensor(errors).mean(dim=0).tolist()
    print("relative error of the gradients, ours and PEFT's, by draw:", errors)
    print(f"mean: ours {ours:.3f}, PEFT's {theirs:.3f}")
    assert 0 < ours < 1.15 * theirs


@pytest.mark.slow
def test_fp32_training_has_pefts_losses() -> None:
    base = load_model(dtype=torch.float32)
    base.model.layers = base.model.layers[:4]
    runs = []
    for nested in (True, False):
        torch.manual_seed(0)
        model = with_lora(base, nested)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        losses = []
        for _ in range(8):
            loss = model(IDS, labels=IDS, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(losses)
    ours, theirs = runs
    assert theirs[-1] < theirs[0] - 1  # it does learn
    assert ours == pytest.approx(theirs, abs=1e-5)
