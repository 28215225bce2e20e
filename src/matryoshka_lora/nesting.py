"""Nested ranks, their scales and the diagonal P: the arithmetic of the method, which knows no model.

Notation, as everywhere in this package: an adapter adds ``B diag(p) A x`` to a frozen layer, with ``A`` of shape
``(R, in)`` and ``B`` of shape ``(out, R)``. The nested ranks are ``r_1 < ... < r_n = R``. The adapter of rank ``r`` is
the prefix ``scale_at(r) * B[:, :r] A[:r]``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError

Scaling = Literal["none", "rank", "sqrt"]


@dataclass(frozen=True)
class Nesting:
    """The ranks at which one adapter can be deployed, and the scale of each.

    The scale of the largest rank ``R`` is what PEFT multiplies ``B A`` with: ``lora_alpha / r``, or
    ``lora_alpha / sqrt(r)`` with ``use_rslora``. The scaling says what the smaller ranks have. The paper's settings
    (arXiv 2605.07850, alpha = 1) are ``scale=1`` for ``"none"``, ``1 / R`` for ``"rank"``, ``1 / sqrt(R)`` for
    ``"sqrt"``.

    Args:
        ranks: Positive, strictly increasing integers; the last one is ``R``, the rank that is trained.
        scaling: The scale of rank ``r``. ``"none"``: ``scale``, the same for all. ``"rank"``: ``scale * R / r``, which
            is LoRA's alpha / r (arXiv 2106.09685). ``"sqrt"``: ``scale * sqrt(R / r)``, which is rsLoRA's
            alpha / sqrt(r) (arXiv 2312.03732).
        scale: The scale of rank ``R``, a positive number.

    Raises:
        MatryoshkaError: The ranks, the scaling or the scale make no nesting; the message says what to write instead.
    """

    ranks: tuple[int, ...]
    scaling: Scaling = "none"
    scale: float = 1.0

    def __init__(self, ranks: Iterable[int], scaling: Scaling = "none", scale: float = 1.0) -> None:
        object.__setattr__(self, "ranks", _checked_ranks(ranks))
        if scaling not in get_args(Scaling):
            raise MatryoshkaError(f"scaling is {scaling!r}; write one of {', '.join(map(repr, get_args(Scaling)))}")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale <= sys.float_info.max:
            raise MatryoshkaError(f"scale is {scale!r}; write a positive number, for example 1.0")
        object.__setattr__(self, "scaling", scaling)
        object.__setattr__(self, "scale", float(scale))

    @classmethod
    def powers_of_two(cls, max_rank: int, scaling: Scaling = "none", scale: float = 1.0) -> Nesting:
        """The paper's default ranks: 1, 2, 4, ... up to ``max_rank``, which is always the last one."""
        top = _checked_rank(max_rank)
        below = (2**k for k in range(top.bit_length()) if 2**k < top)
        return cls((*below, top), scaling, scale)

    @property
    def max_rank(self) -> int:
        """``R``, the rank of the trained factors."""
        return self.ranks[-1]

    def scale_at(self, rank: int) -> float:
        """``s_r``, the factor before ``B[:, :r] A[:r]``, for any rank from 1 to ``R``."""
        share = self.max_rank / _checked_rank(rank, self.max_rank)
        return self.scale * {"none": 1.0, "rank": share, "sqrt": math.sqrt(share)}[self.scaling]

    def is_like(self, other: Nesting) -> bool:
        """Whether another nesting is the same, up to the rounding that a config's ``lora_alpha`` brings."""
        ours, theirs = ((nesting.ranks, nesting.scaling) for nesting in (self, other))
        return ours == theirs and math.isclose(self.scale, other.scale, rel_tol=1e-12)

    def prefix(self, rank: int) -> Tensor:
        """The diagonal that deploys ``rank``: ``s_r`` on its first ``rank`` entries, 0 after. Shape (R,), float64."""
        scale = self.scale_at(rank)
        diagonal = torch.zeros(self.max_rank, dtype=torch.float64)
        diagonal[:rank] = scale
        return diagonal

    def diagonal(self) -> Tensor:
        """The paper's P (arXiv 2605.07850): ``p_i = sum of s_r over the nested r >= i``. Shape (R,), float64.

        It is the sum of all prefixes, so one forward with P trains them all at once.
        """
        return torch.stack([self.prefix(rank) for rank in self.ranks]).sum(dim=0)


def _checked_ranks(ranks: Iterable[int]) -> tuple[int, ...]:
    if isinstance(ranks, (str, bytes)) or not isinstance(ranks, Iterable):
        raise MatryoshkaError(f"ranks is {ranks!r}; write a list of integers, for example [1, 2, 4, 8]")
    given = tuple(ranks)
    if not given:
        raise MatryoshkaError("ranks is empty; write at least one, for example [8]")
    listed = tuple(_checked_rank(rank) for rank in given)
    increasing = sorted(set(listed))
    if list(listed) != increasing:
        raise MatryoshkaError(f"ranks must increase strictly; write {increasing} instead of {list(listed)}")
    return listed


def _checked_rank(rank: Any, max_rank: int | None = None) -> int:
    if isinstance(rank, bool) or not isinstance(rank, Integral):
        raise MatryoshkaError(f"rank {rank!r} is not an integer; write a whole number such as 4")
    checked = int(rank)  # NumPy's integers are not JSON
    if checked < 1:
        raise MatryoshkaError(f"rank {checked} is not positive; the smallest rank is 1")
    if max_rank is not None and checked > max_rank:
        raise MatryoshkaError(f"rank {checked} is above the largest rank {max_rank}; choose one from 1 to {max_rank}")
    return checked
