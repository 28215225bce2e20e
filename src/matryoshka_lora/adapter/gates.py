"""Set what stands between the factors of all layers of an adapter at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from matryoshka_lora.adapter.factors import get_parameters, has_adapter
from matryoshka_lora.adapter.gate import Gate
from matryoshka_lora.adapter.variant import NestedVariant
from matryoshka_lora.errors import MatryoshkaError


def lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """The LoRA layers that hold an adapter, nested or not, by their names in the base model."""
    for name, module in model.named_modules():
        if has_adapter(module, adapter):
            yield name.removeprefix("base_model.model."), module


def nested_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any, NestedVariant]]:
    """The layers that hold a nested adapter, each with what stands between its factors."""
    for name, module in lora_layers(model, adapter):
        variant = module.lora_variant.get(adapter)
        if isinstance(variant, NestedVariant):
            yield name, module, variant


def checked_layers(model: nn.Module, adapter: str) -> list[tuple[str, Any, NestedVariant]]:
    """All layers of a nested adapter, as `nested_layers`.

    Raises:
        MatryoshkaError: There is none, or PEFT has made the adapter anew in one of them.
    """
    nested = list(nested_layers(model, adapter))
    if not nested:
        raise MatryoshkaError(f"the model has no nested adapter {adapter!r}: call nest() or load() first")
    plain = {name for name, _ in lora_layers(model, adapter)} - {name for name, _, _ in nested}
    if plain:
        raise MatryoshkaError(
            f"PEFT has made adapter {adapter!r} anew in layer {min(plain)} after it was nested: call nest() again"
        )
    return nested


def gated(
    model: nn.Module,
    adapter: str,
    diagonal: Tensor,
    allow_fewer: bool = False,
    exact: bool = True,
    learn: Tensor | None = None,
) -> list[tuple[NestedVariant, Gate]]:
    """Every layer's variant with a gate where its factors are now: a Trainer moves the model after `nest`."""
    made: dict[torch.device, Gate] = {}
    found = []
    for _, module, variant in nested_layers(model, adapter):
        device = get_parameters(module, adapter)[0].device
        if device not in made:
            made[device] = Gate.on(device, diagonal, None, allow_fewer, exact, learn)
        found.append((variant, made[device]))
    return found


def draw(model: nn.Module, adapter: str, step: int, rows: int | None = None, share: tuple[int, int] = (0, 1)) -> None:
    """Apply the rule's draw for an optimizer step; see `matryoshka_lora.NestedAdapter.draw`."""
    index, count = share
    state = next(nested_layers(model, adapter))[2].state
    drawn = state.draw(step, None if rows is None else rows * count)
    diagonal = drawn.diagonal
    if diagonal.ndim > 1 and rows is not None:
        diagonal = diagonal[index * rows : (index + 1) * rows]
    for variant, gate in gated(model, adapter, diagonal, allow_fewer=True, learn=drawn.learn):
        variant.begin_step(gate)


def begin(model: nn.Module, adapter: str) -> None:
    """Apply an adapter's state: its rank in eval mode and, where it is fixed, its diagonal in training."""
    for _, _, variant in nested_layers(model, adapter):
        variant.set_rank(variant.rank)
        state = variant.state
    if not state.draws:
        draw(model, adapter, step=0)
