"""Select the smallest rank whose metric is close enough to that of the best rank."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from matryoshka_lora.errors import MatryoshkaError, check_choice
from matryoshka_lora.evaluation.results import Difference, Evaluation
from matryoshka_lora.text import join_lines
from matryoshka_lora.units import format_size, parse_share, parse_size, pluralize

# The maximum probability that a selection is called significant, and is not.
_MAX_FALSE_CLAIMS = 0.05


@dataclass(frozen=True, repr=False)
class Selection:
    """The selected rank, and the evidence for it.

    Attributes:
        rank: The selected rank.
        best_rank: The rank with the best value.
        task: The task that was used.
        within: The allowed distance as a share; None if only the size was limited.
        bound: The worst value within the allowed distance of the best one; None if only the size
            was limited.
        unresolved_ranks: The larger ranks that may be better by more than `within` of their value:
            the questions are too few to exclude it.
        num_questions_needed: Estimated number of questions that exclude it; None if there is
            nothing to exclude or the number is unknown.
        evaluation: The evaluation, with the metric that was used as the task's primary one.
    """

    rank: int
    best_rank: int
    task: str
    within: float | None
    bound: float | None
    unresolved_ranks: tuple[int, ...]
    num_questions_needed: int | None
    evaluation: Evaluation

    @property
    def is_significant(self) -> bool | None:
        """Whether no larger rank is better by more than `within`, with 95 % confidence.

        It counts that one of several ranks was selected. True for the largest rank. None if only
        the size was limited: then nothing is claimed.
        """
        return None if self.within is None else not self.unresolved_ranks

    def differences(self) -> dict[int, Difference]:
        """Return how much better each other rank is than this one. Rank 0 is the base model."""
        differences: dict[int, Difference] = {}
        for rank in (0, *self.evaluation.ranks):
            difference = self.evaluation.difference(self.task, rank, self.rank)
            if rank != self.rank and difference is not None:
                differences[rank] = difference
        return differences

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the evaluation as values that JSON can represent."""
        result = self.evaluation.tasks[self.task]
        return {
            "adapter": self.evaluation.settings["adapter"],
            "rank": self.rank,
            "best_rank": self.best_rank,
            "bytes": self.evaluation.sizes[self.rank],
            "task": self.task,
            "metric": result.metric_name,
            "num_questions": result.num_examples,
            "value": self.evaluation.values(self.task)[self.rank],
            "within": self.within,
            "bound": self.bound,
            "is_significant": self.is_significant,
            "unresolved_ranks": list(self.unresolved_ranks),
            "num_questions_needed": self.num_questions_needed,
            "differences_by_rank": {
                rank: difference._asdict() for rank, difference in self.differences().items()
            },
        }

    def __repr__(self) -> str:
        """Return the claim, the rank, and its differences from other ranks and the base model."""
        evaluation, task = self.evaluation, self.task
        result = evaluation.tasks[task]
        value = evaluation.values(task)[self.rank]
        size = format_size(evaluation.sizes[self.rank])
        summary = f"Rank {self.rank} ({size}): {result.metric_name} {value:.3f} on {task}"
        if self.bound is not None:
            summary += f", within the bound {self.bound:.3f}"
        lines: list[str] = []
        # First whether the rank is certain: the values alone may have selected it by chance.
        if self.within is not None and self.rank < evaluation.ranks[-1]:
            claim = f"better than rank {self.rank} by more than {100 * self.within:.4g}%"
            line = f"No larger rank is {claim} (95% confidence)."
            if self.unresolved_ranks:
                ranks = ", ".join(map(str, self.unresolved_ranks))
                line = f"Too few questions to exclude that a larger rank is {claim}: {ranks}."
                if self.num_questions_needed is not None:
                    line += f" About {self.num_questions_needed} would be enough."
                summary = f"By the values alone: {summary}"
            lines.append(line)
        lines.append(f"{summary}; {pluralize(result.num_examples, 'question')}")
        differences = self.differences()
        if differences:
            lines.append(f"Compared with rank {self.rank}, ± one standard error of the difference:")
        for rank, difference in differences.items():
            lines.append(f"  {f'rank {rank}' if rank else 'the base model'} is {difference}")
        for name, metric in result.metrics.items():
            if metric.higher_is_better and set(metric.values.values()) == {0}:
                lines.append(f"{name.removesuffix(',none')} is 0 at every rank.")
        return join_lines(lines)


def select(
    evaluation: Evaluation | str | os.PathLike[str],
    within: float | str | None = None,
    max_bytes: int | str | None = None,
    *,
    task: str | None = None,
    metric: str | None = None,
) -> Selection:
    """Select the smallest rank that is close to the best one, and better than the base model.

    The rank is selected by the values alone. `Selection.is_significant` says whether the questions
    are enough to claim that no larger rank is better by more than ``within``.

    Args:
        evaluation: The result of `matryoshka_lora.evaluate`, or the folder that it has written.
        within: The allowed distance from the best rank's value, as a share of that value:
            ``"1%"`` or ``0.01``. Without it, the best rank that is small enough is selected.
        max_bytes: The maximum size of the exported adapter: ``50_000_000`` or ``"50MB"``.
        task: The task to select by. Defaults to the only one.
        metric: The metric to select by, such as ``"loss"``. Defaults to the task's primary one.

    Raises:
        MatryoshkaError: An argument is not valid, no rank meets the conditions, or no rank is
            better than the base model.
    """
    if within is None and max_bytes is None:
        raise MatryoshkaError("Pass `within`, such as '1%', or `max_bytes`, such as '50MB'.")
    share = None if within is None else parse_share(within)
    size_limit = math.inf if max_bytes is None else parse_size(max_bytes)
    if not isinstance(evaluation, Evaluation):
        evaluation = Evaluation.read(evaluation)
    task = evaluation.task_name(task)
    result = evaluation.tasks[task]
    if metric is not None:
        keys = {key.removesuffix(",none"): key for key in result.metrics}
        check_choice("metric", metric, keys)
        result = replace(result, primary_metric=keys[metric])
        evaluation = replace(evaluation, tasks={**evaluation.tasks, task: result})

    name, higher_is_better = result.metric_name, evaluation.metric(task).higher_is_better
    if higher_is_better is None:
        raise MatryoshkaError(
            f"Task {task} does not define whether higher values of {name} are better. Set "
            "higher_is_better in its metric_list, and evaluate again."
        )
    # Higher scores are better, also if lower values of the metric are.
    sign = 1 if higher_is_better else -1
    values = evaluation.values(task)
    scores = {rank: sign * value for rank, value in values.items() if value is not None}
    if not scores:
        raise MatryoshkaError(f"Task {task} has no value at any rank. Evaluate it again.")
    has_loss = "loss,none" in result.metrics and name != "loss"
    or_loss = ", or pass `metric='loss'`." if has_loss else "."
    if higher_is_better and not any(scores.values()):
        raise MatryoshkaError(
            f"{name} is 0 at every rank on {task}, so it cannot tell which rank is good. Train "
            f"longer{or_loss}"
        )
    best_rank = _best_rank(scores)
    base_value = evaluation.metric(task).values.get(0)
    candidates = scores
    if base_value is not None:
        candidates = {r: score for r, score in scores.items() if score > sign * base_value}
        if not candidates:
            raise MatryoshkaError(
                f"No rank is better than the base model: {name} on {task} is "
                f"{values[best_rank]:.3f} at the best rank, {best_rank}, and {base_value:.3f} "
                "without the adapter. Train longer, or evaluate on examples of what was "
                f"trained{or_loss}"
            )
    candidates = {r: s for r, s in candidates.items() if evaluation.sizes[r] <= size_limit}
    bound: float | None = None
    if share is not None:
        lowest_score = scores[best_rank] - share * abs(scores[best_rank])
        # The tolerance admits a rank at the bound in spite of rounding.
        candidates = {r: s for r, s in candidates.items() if s > lowest_score - 1e-9}
        bound = sign * lowest_score
    if not candidates:
        raise MatryoshkaError(
            f"No rank meets the conditions. The best is rank {best_rank}, with "
            f"{values[best_rank]:.3f} and {format_size(evaluation.sizes[best_rank])}. Pass a "
            "larger `within` or `max_bytes`."
        )
    if share is None:
        rank = _best_rank(candidates)
        return Selection(rank, best_rank, task, None, None, (), None, evaluation)

    rank = min(candidates)
    larger_ranks = [larger for larger in evaluation.ranks if larger > rank]
    # Each rank but the largest may be selected by chance, so their probabilities add up. The claim
    # about one rank needs a test against each larger one, which makes it no more likely.
    num_tests = max(1, len(evaluation.ranks) - 1)
    num_errors = NormalDist().inv_cdf(1 - _MAX_FALSE_CLAIMS / num_tests)
    ratios = {
        larger: _ratio_of_questions(evaluation, task, rank, larger, share, num_errors)
        for larger in larger_ranks
    }
    unresolved = tuple(larger for larger, ratio in ratios.items() if ratio > 1)
    num_questions_needed: int | None = None
    if unresolved and max(ratios.values()) < 1e6:
        num_questions_needed = _round_up(result.num_examples * max(ratios.values()))
    return Selection(
        rank, best_rank, task, share, bound, unresolved, num_questions_needed, evaluation
    )


def _best_rank(scores: dict[int, float]) -> int:
    """Return the rank with the highest score; the smallest rank on ties."""
    return max(scores, key=lambda rank: (scores[rank], -rank))


def _ratio_of_questions(
    evaluation: Evaluation, task: str, rank: int, larger: int, share: float, num_errors: float
) -> float:
    """Return how many times as many questions exclude that a larger rank is better by a share.

    The slack of a question is how much better the rank is than the larger one with ``share`` less.
    The mean slack must be ``num_errors`` standard errors above 0. Two questions more, at which the
    larger rank alone is right, stand for the ones that were not asked: without them, a few
    questions on which the ranks agree would have no error at all.

    Args:
        share: The allowed distance, as a share of the larger rank's value.
        num_errors: The number of standard errors.

    Returns:
        At most 1 if the questions are enough; infinity if no number is known to be.
    """
    metric = evaluation.metric(task)
    value, larger_value = metric.values[rank], metric.values[larger]
    if value is None or larger_value is None:
        return math.inf
    sign = -1 if metric.higher_is_better is False else 1
    weight = sign * (1 - share if sign * larger_value > 0 else 1 + share)
    slack = sign * value - weight * larger_value
    if slack <= 0:
        return math.inf
    pairs = evaluation.paired_values(task, rank, larger)
    if pairs is None:
        errors = metric.standard_errors.get(rank), metric.standard_errors.get(larger)
        error = math.hypot(*(error or math.inf for error in errors))
        return (num_errors * error / slack) ** 2
    slacks = sign * pairs.values - weight * pairs.other_values
    unseen = pairs.unseen_difference
    spread = num_errors * float(np.append(slacks, [-unseen, -unseen]).std(ddof=1))
    # The sum of N slacks minus the two questions, N * slack - 2 * unseen, is spread * sqrt(N).
    root = (spread + math.sqrt(spread**2 + 8 * unseen * slack)) / (2 * slack)
    return root**2 / len(slacks)


def _round_up(number: float) -> int:
    """Return a number, rounded up to two significant digits."""
    unit: int = 10 ** max(0, len(str(math.ceil(number))) - 2)
    return math.ceil(number / unit) * unit
