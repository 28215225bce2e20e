"""The arithmetic of the method: nested ranks, their scales, the diagonal P, and the training rules.

An adapter adds ``B diag(p) A x`` to a frozen layer, with ``A`` of shape ``(R, in)`` and ``B`` of
shape ``(out, R)``. The nested ranks are ``r_1 < ... < r_n = R``. The adapter of rank ``r`` is the
prefix ``scale_at(r) * B[:, :r] A[:r]``. This module imports no model code.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError

Scaling = Literal["none", "rank", "sqrt"]


@dataclass(frozen=True)
class Nesting:
    """Hold the ranks at which one adapter is trained, and the scale of each.

    The scale of the largest rank ``R`` is what PEFT multiplies ``B A`` with: ``lora_alpha / r``, or
    ``lora_alpha / sqrt(r)`` with ``use_rslora``. The scaling says what the smaller ranks have. The
    paper's settings (arXiv 2605.07850, alpha = 1) are ``scale=1`` for ``"none"``, ``1 / R`` for
    ``"rank"`` and ``1 / sqrt(R)`` for ``"sqrt"``.

    Args:
        ranks: Positive, strictly increasing integers; the last one, ``R``, is that of the factors.
        scaling: The scale of rank ``r``. ``"none"``: ``scale`` for all. ``"rank"``: ``scale * R /
            r``, which is LoRA's alpha / r (arXiv 2106.09685). ``"sqrt"``: ``scale * sqrt(R / r)``,
            which is rsLoRA's alpha / sqrt(r) (arXiv 2312.03732).
        scale: The scale of rank ``R``, a positive number.

    Raises:
        MatryoshkaError: The ranks, the scaling or the scale are not valid.
    """

    ranks: tuple[int, ...]
    scaling: Scaling = "none"
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", _checked_ranks(self.ranks))
        if self.scaling not in get_args(Scaling):
            names = ", ".join(map(repr, get_args(Scaling)))
            raise MatryoshkaError(f"scaling is {self.scaling!r}; write one of {names}")
        if not 0 < self.scale < math.inf:
            raise MatryoshkaError(f"scale is {self.scale!r}; write a positive number such as 1.0")
        object.__setattr__(self, "scale", float(self.scale))

    @classmethod
    def powers_of_two(cls, max_rank: int, scaling: Scaling = "none", scale: float = 1.0) -> Nesting:
        """Return the paper's default ranks: 1, 2, 4, ... and always ``max_rank`` at the end."""
        top = _checked_rank(max_rank)
        below = (2**k for k in range(top.bit_length()) if 2**k < top)
        return cls((*below, top), scaling, scale)

    @property
    def max_rank(self) -> int:
        """``R``, the rank of the factors."""
        return self.ranks[-1]

    def scale_at(self, rank: int) -> float:
        """Return ``s_r``, the factor before ``B[:, :r] A[:r]``, for any rank from 1 to ``R``."""
        share = self.max_rank / _checked_rank(rank, self.max_rank)
        return self.scale * {"none": 1.0, "rank": share, "sqrt": math.sqrt(share)}[self.scaling]

    def prefix(self, rank: int) -> Tensor:
        """Return the diagonal that deploys a rank: ``s_r`` on its first entries, 0 after.

        The shape is (R,), the dtype float64.
        """
        diagonal = torch.zeros(self.max_rank, dtype=torch.float64)
        diagonal[:rank] = self.scale_at(rank)
        return diagonal

    def diagonal(self) -> Tensor:
        """Return the paper's P (arXiv 2605.07850): ``p_i = sum of s_r over the nested r >= i``.

        P is the sum of all prefixes, so one forward with P trains them all at once. The shape is
        (R,), the dtype float64.
        """
        return torch.stack([self.prefix(rank) for rank in self.ranks]).sum(dim=0)


def _checked_ranks(ranks: Iterable[int]) -> tuple[int, ...]:
    listed = [_checked_rank(rank) for rank in ranks]
    increasing = sorted(set(listed)) or [8]
    if listed != increasing:
        raise MatryoshkaError(f"ranks are {listed}: they must increase, as {increasing} do")
    return tuple(listed)


def _checked_rank(rank: Any, max_rank: int | None = None) -> int:
    if not isinstance(rank, Integral):
        raise MatryoshkaError(f"rank {rank!r} is not an integer; write a whole number such as 4")
    checked = int(rank)  # NumPy's integers are not JSON
    if checked < 1:
        raise MatryoshkaError(f"rank {checked} is not positive; the smallest rank is 1")
    if max_rank is not None and checked > max_rank:
        raise MatryoshkaError(f"rank {checked} is too large: choose one from 1 to {max_rank}")
    return checked


@dataclass(frozen=True)
class Rule:
    """Choose the diagonal p between B and A at each optimizer step.

    Attributes:
        name: The name that users give.
        at_step: Returns p for a random generator and a number of rows: shape (R,) for the whole
            batch or (rows, R) for one diagonal per row, float64.
        fixed: p never changes, so the function at full rank is ``B diag(p) A``. Else it is
            ``s_R B A``.
        per_row: p differs between the rows of a batch.
        one_column: Only the last column of B and row of A inside the drawn prefix learn.
    """

    name: str
    at_step: Callable[[Nesting, random.Random, int], Tensor]
    fixed: bool = False
    per_row: bool = False
    one_column: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy the rule by its name."""
        return get_rule, (self.name,)

    def draw(self, nesting: Nesting, seed: int, step: int, rows: int | None = None) -> Tensor:
        """Return p for an optimizer step. The same arguments give the same p on every machine.

        Args:
            nesting: The nested ranks and their scales.
            seed: Any integer.
            step: The number of optimizer steps done so far, from 0.
            rows: The number of rows of a batch; a rule with one diagonal per row needs it.
        """
        if self.per_row and not rows:
            raise MatryoshkaError(f"rule {self.name!r} gives each row a rank: say how many, rows=")
        return self.at_step(nesting, random.Random(f"{seed}/{step}"), rows or 1)


def _stratified(nesting: Nesting, generator: random.Random, rows: int) -> Tensor:
    whole, rest = divmod(rows, len(nesting.ranks))
    drawn = [*nesting.ranks] * whole + generator.sample(nesting.ranks, rest)
    generator.shuffle(drawn)
    return torch.stack([nesting.prefix(rank) for rank in drawn])


def _any_rank(nesting: Nesting, generator: random.Random, _: int) -> Tensor:
    return nesting.prefix(generator.randint(1, nesting.max_rank))


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        # Plain LoRA at rank R.
        Rule("lora", lambda nesting, *_: nesting.prefix(nesting.max_rank), fixed=True),
        # The paper's P, the sum of all prefixes (arXiv 2605.07850).
        Rule("matryoshka", lambda nesting, *_: nesting.diagonal(), fixed=True),
        # One nested rank per step for the whole batch, as in the MatryoshkaLoRA paper.
        Rule(
            "dylora", lambda nesting, generator, _: nesting.prefix(generator.choice(nesting.ranks))
        ),
        # One rank of 1..R per step (DyLoRA, arXiv 2210.07558); frozen trains its last column.
        Rule("dylora-all", _any_rank),
        Rule("dylora-frozen", _any_rank, one_column=True),
        # Each row of the batch at a nested rank of its own, every rank as often.
        Rule("stratified", _stratified, per_row=True),
    )
}


def get_rule(name: str) -> Rule:
    """Return the rule of that name.

    Raises:
        MatryoshkaError: No rule has this name; the message lists the rules.
    """
    if name not in RULES:
        raise MatryoshkaError(f"there is no rule {name!r}; the rules are {', '.join(RULES)}")
    return RULES[name]
