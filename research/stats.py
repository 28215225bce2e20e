"""What the curves of a study say: means over seeds with intervals, and differences of methods on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy import stats

from matryoshka_lora import MatryoshkaError, aurac
from research.recipes import EACH_RECIPES, RECIPES
from research.records import Result, Tried

Value = Callable[[Result], float | None]
"""A number of one curve; None where the curve has none."""

Pairs = dict[tuple[str, int], float]  # by task and seed


@dataclass(frozen=True)
class Estimate:
    """A mean of ``n`` values and half the width of its two-sided 95 % t interval, None for a single value."""

    mean: float
    half_width: float | None
    n: int

    @property
    def sign(self) -> int | None:
        """1 or -1 where the whole interval lies above or below zero, 0 where it holds zero, None without interval."""
        if self.half_width is None:
            return None
        return 0 if abs(self.mean) <= self.half_width else int(math.copysign(1, self.mean))


@dataclass(frozen=True)
class Comparison:
    """A method minus a rival over the pairs of both, its `sign_flip_p`, and that after `holm`; None without pairs."""

    rival: str
    difference: Estimate | None
    p: float | None
    holm: float | None


def aurac_log2(result: Result) -> float:
    """Area under the accuracy over ``log2(rank)``, a share; see `matryoshka_lora.aurac`."""
    return aurac(result.curve.accuracy, result.ranks)


def aurac_linear(result: Result) -> float:
    """The same over the rank itself."""
    return aurac(result.curve.accuracy, result.ranks, "linear")


def worst_rank_gap(result: Result) -> float:
    """Accuracy at the largest rank minus that at the worst one, a share."""
    return result.curve.accuracy[-1] - min(result.curve.accuracy)


def mean_loss(result: Result) -> float:
    """Mean of the loss over the ranks, nats per token."""
    return fmean(result.curve.loss)


def accuracy_at(rank: int | None = None) -> Value:
    """The accuracy at a rank, a share; at the largest one without ``rank``."""
    return lambda result: dict(zip(result.ranks, result.curve.accuracy, strict=True)).get(rank or result.ranks[-1])


def loss_at(rank: int | None = None) -> Value:
    """The loss at a rank, nats per token; at the largest one without ``rank``."""
    return lambda result: dict(zip(result.ranks, result.curve.loss, strict=True)).get(rank or result.ranks[-1])


def chosen_at(metrics: Mapping[str, str], rank: int) -> Value:
    """Of choices: the mean over tasks, by the metric of each, at a rank, a share; at rank 0 the base model's."""

    def mean_of(result: Result) -> float | None:
        ranks, parts = (0, *result.ranks), result.curve.parts
        if parts is None or rank not in ranks:
            return None
        return fmean(parts[task][metric][ranks.index(rank)] for task, metric in metrics.items())

    return mean_of


def values(results: Sequence[Result], method: str, value: Value, task: str | None = None) -> Pairs:
    """A method's values by task and seed, of one task or of all."""
    found = {(r.task, r.seed): value(r) for r in results if r.method == method and task in (None, r.task)}
    return {pair: number for pair, number in sorted(found.items()) if number is not None}


def differences(results: Sequence[Result], method: str, other: str, value: Value, task: str | None = None) -> Pairs:
    """One method's values minus another's, for each task and seed that both have."""
    mine, others = values(results, method, value, task), values(results, other, value, task)
    return {pair: mine[pair] - others[pair] for pair in mine if pair in others}


def estimate(numbers: Sequence[float]) -> Estimate | None:
    """Mean and 95 % interval of independent values, such as those of the seeds; None without any."""
    n = len(numbers)
    if n < 2:
        return Estimate(numbers[0], None, n) if numbers else None
    return Estimate(fmean(numbers), float(stats.t.ppf(0.975, n - 1)) * stdev(numbers) / math.sqrt(n), n)


def mean(
    results: Sequence[Result], method: str, value: Value, task: str | None = None, minus: str | None = None
) -> Estimate | None:
    """`estimate` of a method's values, or of what they are more than another method's; of one task or of all."""
    found = differences(results, method, minus, value, task) if minus else values(results, method, value, task)
    return estimate(list(found.values()))


def sign_flip_p(numbers: Sequence[float]) -> float | None:
    """How often flipped signs bring the mean of the differences as far from zero as it is; None without any.

    A two-sided permutation test, exact up to 16 differences, else by 99 999 draws from a fixed seed. It takes each sign
    for a fair coin if the methods are equal, also across tasks, and so says nothing of tasks that are not there. Of n
    differences, no p is below 2 ** (1 - n).
    """
    if len(numbers) < 2:  # which scipy refuses; either sign of a single one is as far from zero
        return 1.0 if numbers else None
    options = {"permutation_type": "samples", "n_resamples": 99_999, "batch": 10_000, "rng": np.random.default_rng(0)}
    scaled = np.asarray(numbers, float) / (max(map(abs, numbers)) or 1)
    # Accuracies are multiples of 1 / items: means that are equal shall not differ by rounding.
    test = stats.permutation_test([scaled], lambda x, axis: np.mean(x, axis=axis).round(12), **options)
    return float(test.pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction of several p, in their order.

    Raises:
        MatryoshkaError: One is not between 0 and 1.
    """
    if not all(0 <= p <= 1 for p in ps):
        raise MatryoshkaError(f"not all of these are p, from 0 to 1: {list(ps)}")
    corrected, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = largest
    return corrected


def compare(results: Sequence[Result], method: str, rivals: Sequence[str], value: Value) -> list[Comparison]:
    """A method against each rival, pooled over the tasks.

    Raises:
        MatryoshkaError: A name is not in the results, is there twice, or is both method and rival.
    """
    known = {result.method for result in results}
    for name in (method, *rivals):
        if name not in known:
            raise MatryoshkaError(f"the study has no method {name!r}; it has {', '.join(sorted(known))}")
    if len({method, *rivals}) != 1 + len(rivals):
        raise MatryoshkaError(f"{method} against {', '.join(rivals)} names a method twice; name each once")
    pairs = [list(differences(results, method, rival, value).values()) for rival in rivals]
    ps = [sign_flip_p(numbers) for numbers in pairs]
    corrected = iter(holm([p for p in ps if p is not None]))
    return [
        Comparison(rival, estimate(numbers), p, None if p is None else next(corrected))
        for rival, numbers, p in zip(rivals, pairs, ps, strict=True)
    ]


def ranking(results: Sequence[Result], task: str | None = None) -> list[str]:
    """The methods, best AURAC (log2) first: the mean over tasks of the mean over seeds; fewer tasks come later."""
    keys = {}
    for method in {result.method for result in results if task in (None, result.task)}:
        found = values(results, method, aurac_log2, task)
        names = {name for name, _ in found}
        means = [fmean(number for pair, number in found.items() if pair[0] == name) for name in sorted(names)]
        keys[method] = (-len(names), -fmean(means), method)
    return sorted(keys, key=keys.__getitem__)


def best(results: Sequence[Result]) -> str | None:
    """The first of `ranking` that has every task and trains once for all ranks, if there is one."""
    done, tasks = {(result.method, result.task) for result in results}, {result.task for result in results}
    return next(
        (m for m in ranking(results) if m not in EACH_RECIPES and all((m, task) in done for task in tasks)), None
    )


def nominate(results: Sequence[Result], tried: Sequence[Tried]) -> str | None:
    """The method to test, chosen on validation data: the lowest geometric mean over the tasks of `Tried.loss`.

    Of those that `best` may take whose learning rate is known on every task of the results, without the recipes that
    train for longer than the study says: these are there to show what the tokens of a cut would do in training, and
    how long to train is not what a method is asked.
    """
    tasks = {result.task for result in results}
    longer = {name for name, recipe in RECIPES.items() if recipe.length != 1}
    means = {}
    for method in {result.method for result in results} - set(EACH_RECIPES):
        if method.partition("/")[0] in longer:
            continue
        losses = {one.task: one.loss for one in tried if one.method == method}
        if tasks <= losses.keys() and all(math.isfinite(losses[task]) for task in tasks):
            means[method] = fmean(math.log(max(losses[task], 1e-9)) for task in tasks)
    return min(sorted(means), key=means.__getitem__, default=None)
