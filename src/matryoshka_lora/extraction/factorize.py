"""Factorize the change of a weight by a randomized SVD, and measure the error of the factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka_lora.errors import NotFiniteError
from matryoshka_lora.extraction.model_diff import WeightPair
from matryoshka_lora.tensors import to_torch

# The rank that is tried first if a share is to be kept.
_FIRST_RANK_FOR_SHARE = 64
# Arguments of torch.svd_lowrank: columns beyond the rank, and power iterations.
_OVERSAMPLING = 32
_NUM_ITERATIONS = 4


@dataclass(frozen=True)
class Change:
    """What is known of the change D of one weight, and of its factors.

    Attributes:
        total: The squared Frobenius norm of D.
        residual: The squared norm of ``D - B A``, with the factors as they are written.
        rounding: The part of ``total`` that rounding to half precision is expected to be.
        singular_values: Those of ``B A``, decreasing.
    """

    total: float
    residual: float
    rounding: float
    singular_values: tuple[float, ...]


class RankLimits(NamedTuple):
    """The limits of each layer's rank: a maximum, and a share of the squared norm to keep."""

    max_rank: int | None
    share: float | None


def factorize_change(
    name: str, weight: WeightPair, limits: RankLimits
) -> tuple[Tensor, Tensor, Change]:
    """Factorize the change of one weight.

    Returns:
        A and B in the shapes that PEFT saves, float32, and the norms of the change.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    new = to_torch(weight.new.read()).to(device)
    old = to_torch(weight.old.read()).to(device)
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    D = (new.to(dtype) - old.to(dtype)).float()
    if not D.isfinite().all():
        raise NotFiniteError(f"The weights of {name} are NaN or infinite. Copy the models again.")
    matrix = D.T if weight.is_transposed else D.flatten(1)
    total = float(matrix.double().norm() ** 2)
    U, S, V = _truncated_svd(matrix, total, limits)
    rank = len(S)
    root = S.sqrt()
    A, B = root[:, None] * V.T, U * root
    product = B.to(new.dtype).float() @ A.to(new.dtype).float()
    residual = float((matrix - product).double().norm() ** 2)
    change = Change(total, residual, _expected_rounding(new), tuple(S.tolist()))
    if not weight.is_transposed:
        A = A.reshape(rank, *D.shape[1:])
        B = B.reshape(len(D), rank, *[1] * (D.ndim - 2))
    return A, B, change


def _truncated_svd(
    matrix: Tensor, squared_norm: float, limits: RankLimits
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V of the largest singular values: as many as the limits allow."""
    full_rank = min(matrix.shape)
    rank = min(limits.max_rank or _FIRST_RANK_FOR_SHARE, full_rank)
    U, S, V = _largest_singular_values(matrix, rank)
    if limits.share is not None:
        sufficient_rank = _sufficient_rank(S, squared_norm, limits.share)
        while limits.max_rank is None and sufficient_rank > rank and rank < full_rank:
            rank = min(2 * rank, full_rank)
            U, S, V = _largest_singular_values(matrix, rank)
            sufficient_rank = _sufficient_rank(S, squared_norm, limits.share)
        rank = min(rank, sufficient_rank)
    return U[:, :rank], S[:rank], V[:, :rank]


def _sufficient_rank(S: Tensor, squared_norm: float, share: float) -> int:
    """Return the smallest rank that keeps a share; above the number of values if none does."""
    missing = squared_norm - S.double().square().cumsum(0)
    return int((missing > (1 - share) * squared_norm).sum()) + 1


def _largest_singular_values(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V of the largest singular values, at least as many as the rank."""
    width = rank + _OVERSAMPLING
    if 2 * width > min(matrix.shape):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U, S, Vh.mH
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix, width, _NUM_ITERATIONS)
    return U, S, V


def _expected_rounding(weight: Tensor) -> float:
    """Return the expected squared norm of the rounding error of a weight in half precision."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    eps = torch.finfo(weight.dtype).eps
    # The numbers in [2^(e-1), 2^e) are multiples of eps 2^(e-1). The error of rounding to multiples
    # of h is uniformly distributed, with variance h^2 / 12.
    weight = weight[weight != 0].float()  # 0 is not rounded
    exponents = weight.frexp().exponent - 1
    steps = eps * torch.exp2(exponents.double())
    return float(steps.square().sum()) / 12
