"""Which rank to deploy: the arithmetic of ``matryoshka select``. Nothing here reads a file or a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from matryoshka_lora.errors import MatryoshkaError


@dataclass(frozen=True)
class Measured:
    """One metric of one task at every rank; all sequences have one entry for each rank.

    Attributes:
        ranks: Increasing.
        metric: Its name.
        items: How many questions there were.
        values: The metric, or None where there is none.
        errors: Standard errors of the values, or None.
        bytes: Of the exported adapter.
        latency_ms: Of one generated token, or None where it was not measured.
        higher_is_better: Of the metric; None where its task does not say so.
        base: The metric of the base model without the adapter, or None where it was not measured.
        by_question: For each rank, the metric of every question, in the same order for all; may lack ranks.
    """

    ranks: Sequence[int]
    metric: str
    items: int
    values: Sequence[float | None]
    errors: Sequence[float | None]
    bytes: Sequence[int]
    latency_ms: Sequence[float] | None = None
    higher_is_better: bool | None = True
    base: float | None = None
    by_question: Mapping[int, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lists = [self.values, self.errors, self.bytes, *([self.latency_ms] if self.latency_ms is not None else [])]
        if not self.ranks or any(len(each) != len(self.ranks) for each in lists):
            raise MatryoshkaError(f"{self.metric} does not have one value for each of the ranks {list(self.ranks)}")

    def value(self, rank: int) -> float | None:
        """The metric at a rank."""
        return self.values[self.ranks.index(rank)]

    def difference(self, rank: int, other: int) -> Difference | None:
        """How much better ``rank`` is than ``other``; None where one of them has no value.

        The error is that of the mean of each question's own difference, where the questions' metrics are known and
        their mean is the metric. Otherwise the two values count as independent, which makes the error larger than it
        is when both ranks fail at the same questions.
        """
        first, second = self.value(rank), self.value(other)
        if first is None or second is None:
            return None
        better = (first - second) * (1 if self.higher_is_better else -1)
        if rank == other:
            return Difference(0.0, 0.0, True)
        if self._is_mean(rank) and self._is_mean(other):
            pairs = zip(self.by_question[rank], self.by_question[other], strict=True)
            differences = [a - b for a, b in pairs]
            error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
            return Difference(better, error, True)
        errors = [self.errors[self.ranks.index(each)] for each in (rank, other)]
        known = [error for error in errors if error is not None]
        return Difference(better, math.hypot(*known) if len(known) == 2 else None, False)

    def _is_mean(self, rank: int) -> bool:
        # Not so of a perplexity or an F1 of all questions together, nor beside another evaluation's examples.
        questions, value = self.by_question.get(rank), self.value(rank)
        if not questions or value is None or len(questions) != self.items:
            return False
        return math.isclose(fmean(questions), value, rel_tol=1e-6, abs_tol=1e-9)


@dataclass(frozen=True)
class Difference:
    """How much better one rank is than another, in the metric's unit.

    Attributes:
        value: Positive where it is better, whether the metric is to be high or low.
        error: The standard error, or None where it is unknown.
        paired: Whether the error is from each question's own difference.
    """

    value: float
    error: float | None
    paired: bool

    @property
    def is_sure(self) -> bool:
        """Whether it is larger than two standard errors: otherwise the ranks cannot be told apart."""
        return self.error is not None and abs(self.value) > 2 * self.error


@dataclass(frozen=True)
class Wish:
    """What a rank must meet; what is None does not matter.

    Attributes:
        within: The share of the best rank's value that may be lost: 0.01 for 1 %.
        max_bytes: Of the exported adapter.
        max_latency: In milliseconds for one generated token.
    """

    within: float | None = None
    max_bytes: int | None = None
    max_latency: float | None = None


@dataclass(frozen=True)
class Choice:
    """The rank that meets a wish, and what speaks for it.

    Attributes:
        wish: What it meets.
        rank: The chosen one.
        best: The best rank of all, whether or not it meets the wish.
        bound: The worst value that is within the wish, where one is given.
        differences: How much better the chosen rank is than each other one that has a value.
        is_sure: Whether the chosen rank is within the wish even if it is two standard errors worse, compared with the
            best one, than measured. True where no ``within`` is given.
    """

    wish: Wish
    rank: int
    best: int
    bound: float | None
    differences: Mapping[int, Difference]
    is_sure: bool

    @property
    def ties(self) -> list[int]:
        """The other ranks that cannot be told apart from the chosen one."""
        return [rank for rank, difference in self.differences.items() if not difference.is_sure]


def choose(measured: Measured, wish: Wish) -> Choice:
    """The smallest rank that meets a wish.

    Where nothing is said of the metric, the best rank of those that are small and fast enough, and the smallest of
    equals.

    Raises:
        MatryoshkaError: No rank meets the wish, what it is about was not measured, or nobody says which rank is better.
    """
    values = {r: v for r, v in zip(measured.ranks, measured.values, strict=True) if v is not None}
    if not values:
        raise MatryoshkaError(f"{measured.metric} has no value at any rank")
    if measured.higher_is_better is None:
        raise MatryoshkaError(
            f"the task does not say whether more of {measured.metric} is better: write higher_is_better beside the "
            "metric in its YAML file, and evaluate again"
        )
    sign = 1 if measured.higher_is_better else -1
    best = max(values, key=lambda rank: (sign * values[rank], -rank))
    affordable = [rank for rank in values if rank in _affordable(measured, wish)]
    bound = None if wish.within is None else values[best] - sign * wish.within * abs(values[best])
    if bound is None:
        meeting = [max(affordable, key=lambda rank: (sign * values[rank], -rank))] if affordable else []
    else:
        meeting = [rank for rank in affordable if sign * values[rank] >= sign * bound]
    if not meeting:
        raise MatryoshkaError(_what_is_out_of_reach(measured, wish, values, best, affordable))
    rank = min(meeting)
    differences = {other: measured.difference(rank, other) for other in values if other != rank}
    return Choice(
        wish,
        rank,
        best,
        bound,
        {other: d for other, d in differences.items() if d},
        _is_sure(measured, rank, best, bound),
    )


def _is_sure(measured: Measured, rank: int, best: int, bound: float | None) -> bool:
    found, top = measured.difference(rank, best), measured.value(best)
    if bound is None or rank == best:
        return True
    if found is None or found.error is None or top is None:
        return False
    return -found.value + 2 * found.error <= abs(top - bound)


def _affordable(measured: Measured, wish: Wish) -> list[int]:
    if wish.max_latency is not None and measured.latency_ms is None:
        raise MatryoshkaError("this evaluation has measured no latency; choose by --within or --max-bytes")
    latency = measured.latency_ms or [0.0] * len(measured.ranks)
    return [
        rank
        for rank, size, time in zip(measured.ranks, measured.bytes, latency, strict=True)
        if (wish.max_bytes is None or size <= wish.max_bytes) and (wish.max_latency is None or time <= wish.max_latency)
    ]


def _what_is_out_of_reach(
    measured: Measured, wish: Wish, values: Mapping[int, float], best: int, affordable: Sequence[int]
) -> str:
    if affordable:
        sign = 1 if measured.higher_is_better else -1
        nearest = max(affordable, key=lambda rank: sign * values[rank])
        return (
            f"no rank that is small and fast enough is within {100 * (wish.within or 0):g} % of the best, "
            f"{values[best]:.3f} at rank {best}; the best of them has {values[nearest]:.3f}, at rank {nearest}: "
            "allow more bytes, more time or a larger --within"
        )
    parts = []
    if wish.max_bytes is not None:
        parts.append(f"the smallest has {min(measured.bytes):,} bytes and {wish.max_bytes:,} are allowed")
    if wish.max_latency is not None and measured.latency_ms is not None:
        parts.append(f"the fastest takes {min(measured.latency_ms):.1f} ms and {wish.max_latency:g} are allowed")
    return f"no rank meets the wish: {'; '.join(parts)}"
