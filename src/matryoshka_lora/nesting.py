"""The nested ranks of an adapter, their scales, and the diagonal P of the paper.

An adapter adds ``B diag(p) A x`` to a frozen layer, with ``A`` of shape ``(R, in)`` and ``B`` of
shape ``(out, R)``. The nested ranks are ``r_1 < ... < r_n = R``. In training, and with
``deploy="paper"``, the adapter of rank ``r`` is the prefix ``scale_at(r) * B[:, :r] A[:r]``.
Ordered factors have the scale of ``R`` at every rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from matryoshka_lora.errors import MatryoshkaError, check_choice, check_integer, short

Scaling = Literal["none", "rank", "sqrt"]
Order = Literal["svd", "weighted", "trained"]
Deploy = Literal["reordered", "paper"]


@dataclass(frozen=True)
class Nesting:
    """The ranks that an adapter is trained or reported at, and the scale of each.

    The scale of the largest rank ``R`` is what PEFT multiplies ``B A`` with: ``lora_alpha / r``, or
    ``lora_alpha / sqrt(r)`` with ``use_rslora``. `scaling` sets the scale of smaller ranks in
    training, and with ``deploy="paper"``; ordered factors have the scale of ``R`` at every rank.
    The paper's settings (arXiv 2605.07850, alpha = 1) are ``scale=1`` with ``"none"``, ``1 / R``
    with ``"rank"`` and ``1 / sqrt(R)`` with ``"sqrt"``.

    Args:
        ranks: Positive, strictly increasing integers. The last one, ``R``, is the factors' rank.
        scaling: The scale of rank ``r``. ``"none"``: ``scale`` at every rank. ``"rank"``:
            ``scale * R / r``, which is LoRA's alpha / r (arXiv 2106.09685). ``"sqrt"``:
            ``scale * sqrt(R / r)``, which is rsLoRA's alpha / sqrt(r) (arXiv 2312.03732).
        scale: The scale of rank ``R``, a positive number.

    Raises:
        MatryoshkaError: The ranks, the scaling or the scale are not valid.
    """

    ranks: tuple[int, ...]
    scaling: Scaling = "none"
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", check_ranks(self.ranks))
        check_choice("scaling", self.scaling, get_args(Scaling))
        if not is_valid_scale(self.scale):
            raise MatryoshkaError(f"`scale` must be a positive number, got {short(self.scale)}.")
        object.__setattr__(self, "scale", float(self.scale))

    @classmethod
    def powers_of_two(cls, max_rank: int, scaling: Scaling = "none", scale: float = 1.0) -> Nesting:
        """Return the paper's default ranks: 1, 2, 4, ... below ``max_rank``, and ``max_rank``."""
        max_rank = check_rank(max_rank)
        smaller_ranks = (2**k for k in range(max_rank.bit_length()) if 2**k < max_rank)
        return cls((*smaller_ranks, max_rank), scaling, scale)

    @property
    def max_rank(self) -> int:
        """``R``, the rank of the factors."""
        return self.ranks[-1]

    def scale_at(self, rank: int) -> float:
        """Return ``s_r``, the factor of ``B[:, :r] A[:r]``, for any rank from 1 to ``R``.

        It applies in training, and with ``deploy="paper"``; ordered factors have the scale of ``R``
        at every rank.
        """
        ratio = self.max_rank / check_rank(rank, self.max_rank)
        if self.scaling == "rank":
            return self.scale * ratio
        if self.scaling == "sqrt":
            return self.scale * math.sqrt(ratio)
        return self.scale

    def prefix(self, rank: int) -> NDArray[np.float64]:
        """Return the diagonal p of a rank: ``s_r`` on the first r entries, then 0.

        With it between B and A, a layer computes the prefix of rank r. The shape is (R,).
        """
        diagonal = np.zeros(self.max_rank)
        diagonal[:rank] = self.scale_at(rank)
        return diagonal

    def diagonal(self) -> NDArray[np.float64]:
        """Return the diagonal P of the paper (arXiv 2605.07850).

        ``p_i`` is the sum of ``s_r`` over the nested ranks ``r >= i``. P is the sum of the
        diagonals of all prefixes: one forward with P computes the sum of all nested adapters. The
        shape is (R,).
        """
        prefixes = np.stack([self.prefix(rank) for rank in self.ranks])
        diagonal: NDArray[np.float64] = prefixes.sum(axis=0)
        return diagonal


def is_valid_scale(scale: float) -> bool:
    """Return whether a scale is a positive number whose square float64 can represent."""
    return 1e-30 < scale < 1e30


def check_rank(rank: object, max_rank: int | None = None, min_rank: int = 1) -> int:
    """Return a rank as an int.

    Raises:
        MatryoshkaError: It is not an integer from ``min_rank`` to ``max_rank``.
    """
    return check_integer("rank", rank, min_rank, max_rank)


def check_ranks(ranks: Iterable[int]) -> tuple[int, ...]:
    """Return ranks as a tuple of ints.

    Raises:
        MatryoshkaError: There are none, they are not positive integers, or they are not strictly
            increasing.
    """
    if not isinstance(ranks, Iterable):
        raise MatryoshkaError(f"`ranks` must be a sequence such as (1, 2, 4), got {short(ranks)}.")
    values = [check_rank(rank) for rank in ranks]
    if not values:
        raise MatryoshkaError("`ranks` must not be empty.")
    if values != sorted(set(values)):
        raise MatryoshkaError(f"`ranks` must be strictly increasing, got {values}.")
    return tuple(values)
