"""PEFT's LoRA layers of an adapter, and their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from matryoshka_lora.lora.keys import PEFT_PREFIX
from matryoshka_lora.sharding import reshard
from matryoshka_lora.training.factors import ModelFactors


def lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the LoRA layers of an adapter with their names in the base model."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter in module.lora_A or adapter in module.lora_embedding_A:
            yield name.removeprefix(PEFT_PREFIX), module


def model_factors(model: nn.Module, layers: Mapping[str, LoraLayer], adapter: str) -> ModelFactors:
    """Return the factors of an adapter's layers, by the names of the layers.

    Raises:
        MatryoshkaError: FSDP 1 has flattened them.
    """
    reshard(model)
    parameters = {name: factor_parameters(layer, adapter) for name, layer in layers.items()}
    num_experts = {
        name: layer.num_experts
        for name, layer in layers.items()
        if getattr(layer, "num_experts", 1) > 1
    }
    factors = ModelFactors(model, parameters, num_experts)
    factors.check_shapes()
    return factors


def set_small_factors(module: LoraLayer, adapter: str, A: Tensor | None, B: Tensor | None) -> None:
    """Store the factors of the small adapter of a layer, in PEFT's own layout; None removes them.

    They are buffers, so they follow the layer to another device or dtype. They are not persistent,
    so PEFT's state dicts do not change.
    """
    for factor, values in zip("AB", (A, B), strict=True):
        module.register_buffer(f"small_{factor}_{adapter}", values, persistent=False)


def small_factors(module: LoraLayer, adapter: str) -> tuple[Any, Any]:
    """Return A and B of the small adapter of a layer, in PEFT's own layout, or two times None."""
    names = f"small_A_{adapter}", f"small_B_{adapter}"
    return getattr(module, names[0], None), getattr(module, names[1], None)


def factor_parameters(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the parameters A and B of an adapter in a LoRA layer, in PEFT's own layout."""
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight
