"""Conversion of LoRA layers to another rank from their factors, without the dense update.

``convert_module_to_lora`` has the signature of PEFT's ``_convert_module_to_lora``, and
``combine_adapters`` that of ``LoraModel._svd_generalized_task_arithmetic_weighted_adapter``.
``patch_peft`` replaces both in PEFT. The module needs PEFT and PyTorch only.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor

try:
    from peft.tuners.lora import conversion
except ImportError:  # before PEFT 0.19
    conversion = None


def factored_svd(B: Tensor, A: Tensor, min_rank: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of ``B @ A`` without forming the product.

    With B = Q_B R_B and A^T = Q_A R_A, the singular values of B A are those of R_B R_A^T, which has
    the size of the rank.

    Args:
        B: Of shape (out, r), float32 or float64.
        A: Of shape (r, in), of the same dtype.
        min_rank: The number of singular vectors that are needed. Those beyond r have the singular
            value zero, as in the SVD of the product.

    Returns:
        U of shape (out, k), S of shape (k,) and Vh of shape (k, in), where k is the largest of r
        and min_rank, and at most out and in. The columns of U and the rows of Vh are orthonormal.
    """
    num_missing = max(0, min_rank - A.shape[0])
    # QR of zero columns completes the orthonormal basis.
    B = torch.nn.functional.pad(B, (0, num_missing))
    A = torch.nn.functional.pad(A, (0, 0, 0, num_missing))
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.T


def has_factors(module: Any, adapter_name: str) -> bool:
    """Return whether a layer's update is ``scaling * lora_B @ lora_A``, and nothing else."""
    return (
        isinstance(module, lora.Linear)
        and adapter_name in module.lora_A
        and adapter_name not in module.lora_variant
    )


def scaled_factors(module: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return the factors of a layer's update as B, with the scaling, and A, in float32."""
    B = module.lora_B[adapter_name].weight.float() * module.scaling[adapter_name]
    return B, module.lora_A[adapter_name].weight.float()


@torch.no_grad()
def convert_module_to_lora(
    module: Any, rank: int | float, adapter_name: str = "default"
) -> tuple[Tensor, Tensor, int]:
    """Convert a layer's adapter to LoRA of another rank, from the factors where it has them.

    Args:
        module: A PEFT layer. Types without factors are converted by PEFT.
        rank: The new rank, or the share of the squared singular values to keep.
        adapter_name: The adapter.

    Returns:
        lora_A of shape (rank, in), lora_B of shape (out, rank), and the rank. The scaling is in
        lora_B.

    Raises:
        ValueError: If the rank is above the smaller side of the weight (raised by PEFT).
    """
    if not has_factors(module, adapter_name):
        return original_convert_module(module, rank, adapter_name)
    B, A = scaled_factors(module, adapter_name)
    if rank > min(B.shape[0], A.shape[1]):
        return original_convert_module(module, rank, adapter_name)
    min_rank = rank if isinstance(rank, int) else 0
    U, S, Vh = factored_svd(B, A, min_rank)
    new_rank = rank if isinstance(rank, int) else conversion._find_cutoff_index(S, threshold=rank)
    dtype = module.lora_B[adapter_name].weight.dtype
    lora_A = Vh[:new_rank].to(dtype).contiguous()
    lora_B = (U[:, :new_rank] * S[:new_rank]).to(dtype).contiguous()
    return lora_A, lora_B, new_rank


@torch.no_grad()
def combine_adapters(
    model: Any,
    combination_type: str,
    adapters: list[str],
    weights: list[float],
    new_rank: int,
    target: Any,
    target_lora_A: Tensor,
    target_lora_B: Tensor,
    density: float | None,
    majority_sign_method: str,
    clamp: float | None = None,
    full_matrices: bool = True,
    driver: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return lora_A and lora_B of a weighted sum of adapters, for ``combination_type="svd"``.

    The factors of the sum are the concatenated factors of the adapters. Other combination types,
    types of layers and a clamp are left to PEFT.
    """
    terms = [
        (name, weight)
        for name, weight in zip(adapters, weights, strict=True)
        if name in target.lora_A
    ]
    is_sum = combination_type == "svd" and clamp is None
    if not is_sum or not terms or not all(has_factors(target, name) for name, _ in terms):
        return original_combine(
            model,
            combination_type,
            adapters,
            weights,
            new_rank,
            target,
            target_lora_A,
            target_lora_B,
            density,
            majority_sign_method,
            clamp,
            full_matrices=full_matrices,
            driver=driver,
        )
    weighted_factors = []
    for name, weight in terms:
        B, A = scaled_factors(target, name)
        weighted_factors.append((weight * B, A))
    B = torch.cat([B for B, _ in weighted_factors], dim=1)
    A = torch.cat([A for _, A in weighted_factors])
    U, S, Vh = factored_svd(B, A, new_rank)
    lora_B = U[:, :new_rank] * S[:new_rank]
    return Vh[:new_rank].to(target_lora_A.dtype), lora_B.to(target_lora_B.dtype)


original_convert_module = conversion and conversion._convert_module_to_lora
original_combine = lora.LoraModel._svd_generalized_task_arithmetic_weighted_adapter


def patch_peft() -> None:
    """Replace both functions of PEFT, until the process ends."""
    if conversion:
        conversion._convert_module_to_lora = convert_module_to_lora
    lora.LoraModel._svd_generalized_task_arithmetic_weighted_adapter = combine_adapters
