"""contrib/peft: conversion of DoRA to LoRA, against DoRA's own forward and merging."""

from __future__ import annotations

import copy
from typing import Any

import dora_conversion
import peft
import pytest
import torch
from helpers import models
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

needs_conversion = pytest.mark.skipif(
    dora_conversion.conversion is None, reason="this PEFT has no convert_to_lora"
)
TOKENS = torch.arange(20)[None]


def randomize(model: nn.Module) -> None:
    """Fill the factors, and change the magnitudes by a tenth, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.1 * noise)
            elif "lora_" in name:
                parameter.copy_(0.1 * noise)


def dora_llama() -> tuple[Any, peft.PeftModel]:
    """Return a base model whose weights have 64 rows or columns at least, and DoRA on a copy."""
    base_model = models.tiny_llama(num_key_value_heads=4)
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=models.LINEAR_LAYERS)
    model = peft.get_peft_model(copy.deepcopy(base_model), config).eval()
    randomize(model)
    return base_model, model


@torch.inference_mode()
def relative_error(base_model: Any, model: Any, rank: int | float) -> float:
    """Return how far the converted adapter is from DoRA, as a share of what DoRA changes."""
    base = base_model(TOKENS).logits
    expected = model(TOKENS).logits
    config, state_dict = peft.convert_to_lora(model, rank=rank)
    converted = peft.get_peft_model(copy.deepcopy(base_model), config).eval()
    peft.set_peft_model_state_dict(converted, state_dict)
    logits = converted(TOKENS).logits
    return float(torch.linalg.norm(logits - expected) / torch.linalg.norm(expected - base))


@needs_conversion
@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter")
def test_full_rank_gives_dora_s_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    base_model, model = dora_llama()
    # The factors alone: PEFT's function.
    assert relative_error(base_model, model, rank=64) > 0.1
    name = "_convert_module_to_lora"
    monkeypatch.setattr(dora_conversion.conversion, name, dora_conversion.original_convert_module)
    dora_conversion.patch_peft()
    assert relative_error(base_model, model, rank=64) < 1e-5
    assert relative_error(base_model, model, rank=1.0) < 1e-3


class Layers(nn.Module):
    """A linear layer and its transposed kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 12)
        self.conv1d = Conv1D(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.conv1d(x)


def dora_layer(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, use_dora=True, target_modules=[name], fan_in_fan_out=name == "conv1d", **changes
    )
    model = peft.get_peft_model(Layers(), config)
    randomize(model)
    return getattr(model.base_model.model, name)


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_the_delta_weight_is_what_merging_adds(name: str) -> None:
    module = dora_layer(name, lora_alpha=9, use_rslora=True)
    delta_weight = dora_conversion.dora_delta_weight(module)
    before = module.get_base_layer().weight.detach().clone()
    module.merge()
    added = module.get_base_layer().weight.detach() - before
    if name == "conv1d":
        added = added.T
    assert delta_weight.shape == (12, 20)
    torch.testing.assert_close(delta_weight, added, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_a_rank_keeps_the_largest_components(name: str) -> None:
    module = dora_layer(name)
    lora_A, lora_B, rank = dora_conversion.convert_module_to_lora(module, 5)
    assert rank == 5
    assert lora_A.shape == (5, 20)
    assert lora_B.shape == (12, 5)
    delta_weight = dora_conversion.dora_delta_weight(module).double()
    rest = torch.linalg.norm(delta_weight - lora_B.double() @ lora_A.double())
    expected = torch.linalg.norm(torch.linalg.svdvals(delta_weight)[5:])
    torch.testing.assert_close(rest, expected, rtol=1e-4, atol=1e-6)


def test_merged_layers_are_an_error() -> None:
    module = dora_layer("linear")
    module.merge()
    with pytest.raises(ValueError, match="merged"):
        dora_conversion.dora_delta_weight(module)


def test_a_rank_above_the_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match="13"):
        dora_conversion.convert_module_to_lora(dora_layer("linear"), 13)


@needs_conversion
def test_layers_without_a_magnitude_are_converted_by_peft() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=["linear"], init_lora_weights=False)
    module = peft.get_peft_model(Layers(), config).base_model.model.linear
    expected = dora_conversion.original_convert_module(module, 2)
    lora_A, lora_B, _ = dora_conversion.convert_module_to_lora(module, 2)
    torch.testing.assert_close(lora_A, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(lora_B, expected[1], rtol=0, atol=0)
