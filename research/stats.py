"""Means over seeds with intervals, and differences between methods on the same seeds."""

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
"""Returns a number of a curve, or None if the curve does not have it."""

Pairs = dict[tuple[str, int], float]
"""Numbers by task and seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean of the values.
        half_width: Half of the two-sided 95 % t interval. None for a single value.
        n: The number of values.
        low: The lowest value.
        high: The highest value.
    """

    mean: float
    half_width: float | None
    n: int
    low: float
    high: float

    def spread(self, unit: float = 1, digits: int = 3, sign: str = "") -> str:
        """Return the mean, the lowest and the highest value as a cell of a table."""
        mean, low, high = (
            _number(unit * value, digits, sign) for value in (self.mean, self.low, self.high)
        )
        return mean if low == high else f"{mean} ({low} to {high})"

    def text(self, unit: float = 1, digits: int = 3, sign: str = "") -> str:
        """Return the mean and its interval as a cell of a table; of two values, their range.

        Half of the t interval of two values is 6.4 times their distance.
        """
        if self.n == 2:
            low, high = (_number(unit * value, digits, sign) for value in (self.low, self.high))
            return low if low == high else f"{low} to {high}"
        mean = _number(unit * self.mean, digits, sign)
        return mean if self.half_width is None else f"{mean} ± {unit * self.half_width:.{digits}f}"


def _number(value: float, digits: int, sign: str) -> str:
    # Adding zero turns -0.0 into 0.0.
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def aurac_log2(result: Result) -> float:
    """Return the area under the accuracy over ``log2(rank)``; see `matryoshka_lora.aurac`."""
    return aurac(result.curve.accuracy, result.ranks)


def aurac_linear(result: Result) -> float:
    """Return the area under the accuracy over the rank; see `matryoshka_lora.aurac`."""
    return aurac(result.curve.accuracy, result.ranks, "linear")


def worst_rank_gap(result: Result) -> float:
    """Return the accuracy at the largest rank minus that at the worst one, a share."""
    return result.curve.accuracy[-1] - min(result.curve.accuracy)


def largest_fall(result: Result) -> float:
    """Return the largest fall of the accuracy from a rank to the next larger one."""
    accuracy = result.curve.accuracy
    return max(0.0, *(small - large for small, large in pairwise(accuracy)))


def mean_loss(result: Result) -> float:
    """Return the mean loss over the ranks, in nats per token."""
    return fmean(result.curve.loss)


def accuracy_at(rank: int) -> Value:
    """Return a function that returns the accuracy at a rank, a share."""

    def accuracy(result: Result) -> float | None:
        return dict(zip(result.ranks, result.curve.accuracy, strict=True)).get(rank)

    return accuracy


def loss_at(rank: int) -> Value:
    """Return a function that returns the loss at a rank, in nats per token."""

    def loss(result: Result) -> float | None:
        return dict(zip(result.ranks, result.curve.loss, strict=True)).get(rank)

    return loss


def choices_at(metrics: Mapping[str, str], rank: int) -> Value:
    """Return a function that returns the mean over tasks with choices.

    Args:
        metrics: The metric of each task.
        rank: The rank; 0 is the base model.
    """

    def mean_share(result: Result) -> float | None:
        ranks = (0, *result.ranks)
        parts = result.curve.parts
        if parts is None or rank not in ranks:
            return None
        index = ranks.index(rank)
        return fmean(parts[task][metric][index] for task, metric in metrics.items())

    return mean_share


def values(results: Sequence[Result], method: str, value: Value, task: str | None = None) -> Pairs:
    """Return the values of a method by task and seed, of a task or of all tasks."""
    pairs: Pairs = {}
    for result in sorted(results, key=lambda result: (result.task, result.seed)):
        if result.method == method and task in (None, result.task):
            number = value(result)
            if number is not None:
                pairs[result.task, result.seed] = number
    return pairs


def differences(
    results: Sequence[Result], method: str, other: str, value: Value, task: str | None = None
) -> Pairs:
    """Return the differences of two methods, for each common task and seed."""
    values_of_method = values(results, method, value, task)
    values_of_other = values(results, other, value, task)
    return {
        pair: number - values_of_other[pair]
        for pair, number in values_of_method.items()
        if pair in values_of_other
    }


def estimate(numbers: Sequence[float]) -> Estimate | None:
    """Return mean and 95 % interval of independent values; None without any."""
    n = len(numbers)
    if n == 0:
        return None
    half_width = None
    if n > 1:
        half_width = float(stats.t.ppf(0.975, n - 1)) * stdev(numbers) / math.sqrt(n)
    return Estimate(fmean(numbers), half_width, n, min(numbers), max(numbers))


def mean(
    results: Sequence[Result],
    method: str,
    value: Value,
    task: str | None = None,
    minus: str | None = None,
) -> Estimate | None:
    """Return the mean of the values of a method, or of their differences to another method."""
    if minus:
        return estimate(list(differences(results, method, minus, value, task).values()))
    return estimate(list(values(results, method, value, task).values()))


def ranking(results: Sequence[Result], task: str | None = None) -> list[str]:
    """Return the methods, best AURAC (log2) first: the mean over tasks of the mean over seeds.

    A method that lacks tasks comes later, and a method that lacks ranks last.
    """
    max_ranks = max((len(result.ranks) for result in results), default=0)
    sort_keys: dict[str, tuple[bool, int, float, str]] = {}
    for method in {result.method for result in results if task in (None, result.task)}:
        pairs = values(results, method, aurac_log2, task)
        tasks = sorted({name for name, _ in pairs})
        means = [fmean(v for pair, v in pairs.items() if pair[0] == name) for name in tasks]
        lacks_ranks = any(
            result.method == method and len(result.ranks) < max_ranks for result in results
        )
        sort_keys[method] = (lacks_ranks, -len(tasks), -fmean(means), method)
    return sorted(sort_keys, key=sort_keys.__getitem__)
