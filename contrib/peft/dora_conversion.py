"""Conversion of DoRA layers to LoRA, with the magnitude.

``convert_module_to_lora`` has the signature of PEFT's ``_convert_module_to_lora``. ``patch_peft``
replaces it in PEFT. The module needs PEFT and PyTorch only.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

try:
    from peft.tuners.lora import conversion
except ImportError:  # before PEFT 0.19
    conversion = None


def is_dora(module: Any, adapter_name: str) -> bool:
    """Return whether an adapter of a linear layer has a magnitude."""
    return isinstance(module, lora.Linear) and adapter_name in module.lora_magnitude_vector


@torch.no_grad()
def dora_delta_weight(module: Any, adapter_name: str = "default") -> Tensor:
    """Return what DoRA adds to the weight: ``m * (W + s B A) / ||W + s B A|| - W``.

    Args:
        module: A linear layer of PEFT with a DoRA adapter.
        adapter_name: The adapter.

    Returns:
        A tensor of shape (out, in) in float32. Transpose it for a Conv1D.

    Raises:
        ValueError: If an adapter is merged. The weight is then no longer W.
    """
    if module.merged:
        raise ValueError(
            "A DoRA layer with merged adapters cannot be converted. Call unmerge_adapter first."
        )
    W = dequantize_module_weight(module.get_base_layer()).float()
    if module.fan_in_fan_out:
        W = W.T
    B = module.lora_B[adapter_name].weight.float()
    A = module.lora_A[adapter_name].weight.float()
    direction = W + module.scaling[adapter_name] * (B @ A)
    magnitude = module.lora_magnitude_vector[adapter_name].weight.float().view(-1, 1)
    return magnitude * direction / torch.linalg.norm(direction, dim=1, keepdim=True) - W


@torch.no_grad()
def convert_module_to_lora(
    module: Any, rank: int | float, adapter_name: str = "default"
) -> tuple[Tensor, Tensor, int]:
    """Convert a layer's adapter to LoRA, with its magnitude if it is DoRA.

    Args:
        module: A PEFT layer. Layers without a magnitude are converted by PEFT.
        rank: The new rank, or the share of the squared singular values to keep.
        adapter_name: The adapter.

    Returns:
        lora_A of shape (rank, in), lora_B of shape (out, rank), and the rank.

    Raises:
        ValueError: If an adapter is merged, or the rank is above the smaller side of the weight.
    """
    if not is_dora(module, adapter_name):
        return original_convert_module(module, rank, adapter_name)
    delta_weight = dora_delta_weight(module, adapter_name)
    if rank > min(delta_weight.shape):
        raise ValueError(
            f"The rank {rank} is above the smaller side of a weight of shape "
            f"{tuple(delta_weight.shape)}. Choose a lower rank."
        )
    U, S, Vh = torch.linalg.svd(delta_weight, full_matrices=False)
    new_rank = rank if isinstance(rank, int) else conversion._find_cutoff_index(S, threshold=rank)
    dtype = module.lora_B[adapter_name].weight.dtype
    lora_A = Vh[:new_rank].to(dtype).contiguous()
    lora_B = (U[:, :new_rank] * S[:new_rank]).to(dtype).contiguous()
    return lora_A, lora_B, new_rank


original_convert_module = conversion and conversion._convert_module_to_lora


def patch_peft() -> None:
    """Replace the function of PEFT, until the process ends."""
    conversion._convert_module_to_lora = convert_module_to_lora
