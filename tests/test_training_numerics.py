"""What training mode computes, in half precision and on the device that a model was moved to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import lora_config, nest_as, nested_layer, randomize, tiny_llama
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from matryoshka_lora import NestedAdapter, Nesting
from matryoshka_lora.rules import RULES

NESTING = Nesting([1, 2, 4, 8], "sqrt", 2.0 / 8**0.5)
IDS = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(0))


def half_precision_llama(rule: str, **lora: Any) -> NestedAdapter:
    """bf16 beside fp32 factors, as training has it; in training mode."""
    model = get_peft_model(tiny_llama().bfloat16(), lora_config(NESTING, **lora))
    randomize(model)
    adapter = nest_as(model, NESTING, rule)
    adapter.draw(0, rows=3)
    adapter.model.train()
    return adapter


@pytest.mark.parametrize("rule", ["matryoshka", "lora", "dylora", "dylora-frozen", "stratified"])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_mode_has_the_same_bits_with_and_without_gradients(rule: str, autocast: bool) -> None:
    """The ratio of new to old log-probabilities is then exactly 1 before the first step, as with plain PEFT."""
    adapter = half_precision_llama(rule)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with_gradients = adapter.model(IDS).logits
        assert with_gradients.requires_grad
        with torch.no_grad():
            assert torch.equal(adapter.model(IDS).logits, with_gradients)
        adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
        assert torch.equal(adapter.model(IDS).logits, with_gradients)


def test_the_same_bits_with_reentrant_checkpointing() -> None:
    """It computes the loss without gradients and recomputes with them."""
    adapter = half_precision_llama("matryoshka")
    with_gradients = adapter.model(IDS).logits
    adapter.model.enable_input_require_grads()
    adapter.model.gradient_checkpointing_enable({"use_reentrant": True})
    assert torch.equal(adapter.model(IDS).logits, with_gradients)


@pytest.mark.parametrize(("rule", "training"), [("matryoshka", True), ("stratified", True), ("matryoshka", False)])
def test_autocast_does_not_round_p(rule: str, training: bool) -> None:
    """Each product is rounded to bf16, up or down by chance; a rounded p would be wrong for its whole column."""
    nesting = Nesting([1, 3, 4], "rank", 1.0)  # p is 19/3, 7/3, 7/3, 1
    nested = nested_layer("Linear", nesting, rule, "reordered", dtype=torch.float32)
    base = nested.layer.get_base_layer()
    A, B = nested.factors
    with torch.no_grad():
        base.weight.zero_()
        base.bias.zero_()
        A.copy_(torch.eye(*A.shape))  # output i of a token is p_i times its input i
        B.copy_(torch.eye(*B.shape))
    nested.adapter.draw(0, rows=3)
    nested.adapter.model.train(training)
    p = RULES[rule].draw(nesting, 0, 0, 3).diagonal
    assert (p.bfloat16() / p - 1)[p != 0].abs().max() > 1.4e-3
    x = torch.randn(3, 4000, A.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nested.layer(x).float()[..., :4]
    x = x[..., :4]
    found = (x * y).sum(dim=1) / x.square().sum(dim=1)
    torch.testing.assert_close(found.double(), p.expand_as(found), rtol=4e-4, atol=0)


class Scalars(TorchDispatchMode):
    """Counts products of a tensor in half precision and one without dimensions, which a GPU rounds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mul.Tensor and isinstance(args[1], torch.Tensor):
            self.count += args[0].dtype == torch.bfloat16 and args[0].ndim > 0 and args[1].ndim == 0
        return func(*args, **(kwargs or {}))


def test_autocast_does_not_round_the_scale_of_a_rank() -> None:
    """No CPU does: the test is of what a GPU would be given."""
    nested = nested_layer("Linear", NESTING, "matryoshka", "paper", dtype=torch.float32)
    nested.adapter.model.eval()
    nested.adapter.set_rank(2)
    with torch.autocast("cpu", dtype=torch.bfloat16), Scalars() as scalars:
        nested.layer(nested.kind.batch(3).float())
    assert scalars.count == 0


class Copies(TorchDispatchMode):
    """Counts the tensors that are copied to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.count += 1
        return result


@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv2d"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rule", ["matryoshka", "dylora-frozen"])
def test_gates_follow_a_model_to_its_device(kind: str, training: bool, rule: str) -> None:
    """They are copied once; a copy in each forward is slow, and cannot be in a CUDA graph."""
    nested = nested_layer(kind, NESTING, rule, "paper", dtype=torch.float32)
    nested.adapter.draw(0)
    nested.adapter.model.train(training).to("meta")
    x = nested.kind.batch(2).to("meta")
    with Copies() as first:
        nested.layer(x.float() if x.is_floating_point() else x)
    assert first.count > 0
    for change in (lambda: None, lambda: nested.adapter.set_rank(2), lambda: nested.adapter.draw(1)):
        change()
        with Copies() as later:
            assert nested.layer(x.float() if x.is_floating_point() else x).is_meta
        assert later.count == 0
