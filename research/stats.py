"""Means over seeds with intervals, and differences of methods on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

from scipy import stats

from matryoshka_lora import aurac
from research.plan import Result

Value = Callable[[Result], float | None]
"""A number of one curve; None where the curve has none."""

Pairs = dict[tuple[str, int], float]
"""Numbers by task and seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean of ``n`` values, half its two-sided 95 % t interval, which one value lacks, and the
    lowest and the highest value."""

    mean: float
    half_width: float | None
    n: int
    low: float
    high: float

    def spread(self, unit: float = 1, digits: int = 3, sign: str = "") -> str:
        """Return the mean, the lowest and the highest value in a unit, as a cell of a table."""
        mean, low, high = (
            f"{round(unit * value, digits) + 0.0:{sign}.{digits}f}"
            for value in (self.mean, self.low, self.high)
        )
        return mean if low == high else f"{mean} ({low} to {high})"

    def text(self, unit: float = 1, digits: int = 3, sign: str = "") -> str:
        """Return the mean and its interval in a unit, as a cell of a table."""
        # Adding zero turns -0.0 into 0.0.
        mean = f"{round(unit * self.mean, digits) + 0.0:{sign}.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {unit * self.half_width:.{digits}f}"


def aurac_log2(result: Result) -> float:
    """Return the area under the accuracy over ``log2(rank)``, see `matryoshka_lora.aurac`."""
    return aurac(result.curve.accuracy, result.ranks)


def aurac_linear(result: Result) -> float:
    """Return the same over the rank itself."""
    return aurac(result.curve.accuracy, result.ranks, "linear")


def worst_rank_gap(result: Result) -> float:
    """Return the accuracy at the largest rank minus that at the worst one, a share."""
    return result.curve.accuracy[-1] - min(result.curve.accuracy)


def largest_fall(result: Result) -> float:
    """Return how far the accuracy falls at most from a rank to the next larger one."""
    accuracy = result.curve.accuracy
    return max(0.0, *(small - large for small, large in pairwise(accuracy)))


def mean_loss(result: Result) -> float:
    """Return the mean of the loss over the ranks, nats per token."""
    return fmean(result.curve.loss)


def accuracy_at(rank: int) -> Value:
    """Return what gives the accuracy at a rank, a share."""
    return lambda result: dict(zip(result.ranks, result.curve.accuracy, strict=True)).get(rank)


def loss_at(rank: int) -> Value:
    """Return what gives the loss at a rank, nats per token."""
    return lambda result: dict(zip(result.ranks, result.curve.loss, strict=True)).get(rank)


def chosen_at(metrics: Mapping[str, str], rank: int) -> Value:
    """Return what gives the mean over tasks with choices, each by its metric; 0 is the base."""

    def mean_of(result: Result) -> float | None:
        ranks, parts = (0, *result.ranks), result.curve.parts
        if parts is None or rank not in ranks:
            return None
        return fmean(parts[task][metric][ranks.index(rank)] for task, metric in metrics.items())

    return mean_of


def values(results: Sequence[Result], method: str, value: Value, task: str | None = None) -> Pairs:
    """Return a method's values by task and seed, of one task or of all."""
    mine = [r for r in results if r.method == method and task in (None, r.task)]
    found = {(result.task, result.seed): value(result) for result in mine}
    return {pair: number for pair, number in sorted(found.items()) if number is not None}


def differences(
    results: Sequence[Result], method: str, other: str, value: Value, task: str | None = None
) -> Pairs:
    """Return one method's values minus another's, for each task and seed that both have."""
    mine, others = (values(results, name, value, task) for name in (method, other))
    return {pair: mine[pair] - others[pair] for pair in mine if pair in others}


def estimate(numbers: Sequence[float]) -> Estimate | None:
    """Return mean and 95 % interval of independent values; None without any."""
    n = len(numbers)
    if n < 2:
        return Estimate(numbers[0], None, n, numbers[0], numbers[0]) if numbers else None
    half = float(stats.t.ppf(0.975, n - 1)) * stdev(numbers) / math.sqrt(n)
    return Estimate(fmean(numbers), half, n, min(numbers), max(numbers))


def mean(
    results: Sequence[Result],
    method: str,
    value: Value,
    task: str | None = None,
    minus: str | None = None,
) -> Estimate | None:
    """Return the estimate of a method's values, or of what they are more than another method's."""
    if minus:
        return estimate(list(differences(results, method, minus, value, task).values()))
    return estimate(list(values(results, method, value, task).values()))


def ranking(results: Sequence[Result], task: str | None = None) -> list[str]:
    """Return the methods, best AURAC (log2) first: the mean over tasks of the mean over seeds.

    A method that lacks tasks comes later, and one that lacks ranks last.
    """
    keys = {}
    most = max((len(result.ranks) for result in results), default=0)
    for method in {result.method for result in results if task in (None, result.task)}:
        found = values(results, method, aurac_log2, task)
        names = sorted({name for name, _ in found})
        means = [fmean(v for pair, v in found.items() if pair[0] == name) for name in names]
        lacking = any(r.method == method and len(r.ranks) < most for r in results)
        keys[method] = (lacking, -len(names), -fmean(means), method)
    return sorted(keys, key=keys.__getitem__)
