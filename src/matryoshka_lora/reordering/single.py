"""Cut one layer to a rank, and say what was lost; and its singular values alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka_lora.reordering.factors import is_dead, reorder_factors


class CutLayer(NamedTuple):
    """The factors of a layer's best matrix of some rank.

    Attributes:
        A: Shape (r, in).
        B: Shape (out, r).
        size: The squared Frobenius norm of the update as it was given.
        kept: The sum of the r largest squared singular values.
        error: The squared Frobenius norm of the difference of the update as given and as it is in A and B, rounded.
        values: The singular values of the update as given, where they were computed.
    """

    A: Tensor
    B: Tensor
    size: float
    kept: float
    error: float
    values: Tensor | None


def cut_layer(A: Tensor, B: Tensor, scale: float, rank: int, new_scale: float) -> CutLayer:
    """The closest matrix of a rank, as factors with a new scale in the dtype of the given ones.

    Args:
        A: Shape (R, in).
        B: Shape (out, R).
        scale: Of ``B A`` as given.
        rank: From 1 to R.
        new_scale: Of the result.
    """
    wide, tall = A.double(), B.double() * scale
    new_A, new_B, values = reorder_factors(wide, tall, scale=new_scale)
    squares = values**2
    size, kept = float(squares.sum()), float(squares[:rank].sum())
    return _measured(wide, tall, new_A[:rank], new_B[:, :rank], A.dtype, new_scale, size, kept, values)


def rescale_layer(A: Tensor, B: Tensor, scale: float, new_scale: float) -> CutLayer:
    """The same factors in the same order with another scale; exact where the two differ by a power of two."""
    wide, tall = A.double(), B.double() * scale
    size = _inner(wide, tall, wide, tall)
    return _measured(wide, tall, wide, tall / new_scale, A.dtype, new_scale, size, size)


def singular_values(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Those of ``scale * B A``, shape (R,), float64, decreasing, as `reorder_factors` has them; no factor is made."""
    rank = A.shape[0]
    r_in, r_out = (torch.linalg.qr(wide.double(), mode="r").R for wide in (A.mT, B))
    values = torch.linalg.svdvals(r_out @ r_in.mT)
    values = torch.where(is_dead(values, rank), 0.0, values * scale)
    return torch.nn.functional.pad(values, (0, rank - len(values)))


def _measured(
    A: Tensor,
    B: Tensor,
    new_A: Tensor,
    new_B: Tensor,
    dtype: torch.dtype,
    scale: float,
    size: float,
    kept: float,
    values: Tensor | None = None,
) -> CutLayer:
    made_A, made_B = new_A.to(dtype).contiguous(), new_B.to(dtype).contiguous()
    found_A, found_B = made_A.double(), made_B.double() * scale
    error = size - 2 * _inner(A, B, found_A, found_B) + _inner(found_A, found_B, found_A, found_B)
    # What is left of a difference of equal numbers is no error.
    return CutLayer(made_A, made_B, size, kept, error if not error < size * 1e-15 else 0.0, values)


def _inner(A: Tensor, B: Tensor, other_A: Tensor, other_B: Tensor) -> float:
    """The inner product of two matrices ``B A``, of which neither is formed."""
    return float(((B.mT @ other_B) * (A @ other_A.mT)).sum())
