"""The factors of each kind of PEFT LoRA layer, seen as matrices."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from matryoshka_lora.formats.layout import as_matrices
from matryoshka_lora.unofficial import is_conv


def has_adapter(module: Any, adapter: str) -> bool:
    """Whether a module is a LoRA layer that holds this adapter."""
    return isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)


def get_parameters(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """The parameters that PEFT trains: A and B of one adapter, in PEFT's own layout."""
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight


def get_weight(module: Any) -> Tensor:
    """The frozen weight that an adapter of this layer changes."""
    weight: Tensor = module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight
    return weight


def get_factors(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A of shape (R, in) and B of shape (out, R); with a leading dimension for experts. Views where possible."""
    A, B = get_parameters(module, adapter)
    return as_matrices(gathered(A), gathered(B), module.r[adapter])


def get_gradients(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """The gradients of A and B in the shapes of `get_factors`; zeros where there are none."""
    A, B = (gathered(torch.zeros_like(f) if f.grad is None else f.grad) for f in get_parameters(module, adapter))
    return as_matrices(A, B, module.r[adapter])


def has_modules(module: Any, adapter: str) -> bool:
    """Whether A and B are modules of their own, which an input passes through."""
    return adapter in module.lora_A and not isinstance(module, ParamWrapper)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 has spread over the processes, all of which must ask; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assign(parameter: Tensor, value: Tensor) -> None:
    """Write a whole value, the same one in every process, into a parameter that may be spread over them."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def to_weight(module: LoraLayer, product: Tensor) -> Tensor:
    """``B A`` of shape (out, in), or (experts, out, in), in the layout of the base layer's weight."""
    if isinstance(module, LoraEmbedding):
        return product.T
    if is_conv(module):
        return product.reshape(module.get_base_layer().weight.shape)
    if isinstance(module, ParamWrapper) and product.ndim == 3:
        swapped = getattr(module, "_did_swap_in_out_features", False)  # PEFT 0.18 has no such layers
        return product if swapped else product.mT
    return product.T if getattr(module, "fan_in_fan_out", False) else product
