"""Select the smallest rank whose metric is close enough to that of the best rank."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from matryoshka_lora.errors import MatryoshkaError, check_choice
from matryoshka_lora.evaluation.harness_results import metric_aurac
from matryoshka_lora.evaluation.results import Difference, Evaluation
from matryoshka_lora.units import format_size, parse_share, parse_size


@dataclass(frozen=True)
class Selection:
    """The selected rank, and the evidence for it.

    Attributes:
        rank: The selected rank.
        best_rank: The rank with the best value.
        task: The task that was used.
        bound: The worst value within the allowed distance of the best one; None if only the size
            was limited.
        is_significant: Whether the rank is within the bound by two standard errors. True if only
            the size was limited.
        num_questions_needed: Estimated number of questions needed for significance; None if it is
            already significant or the number is unknown.
        evaluation: The evaluation, with the metric that was used as the task's primary one.
    """

    rank: int
    best_rank: int
    task: str
    bound: float | None
    is_significant: bool
    num_questions_needed: int | None
    evaluation: Evaluation

    def differences(self) -> dict[int, Difference]:
        """Return how much better each other rank is than this one. Rank 0 is the base model."""
        differences: dict[int, Difference] = {}
        for rank in (0, *self.evaluation.ranks):
            difference = self.evaluation.difference(self.task, rank, self.rank)
            if rank != self.rank and difference is not None:
                differences[rank] = difference
        return differences


def select(
    evaluation: Evaluation | str | os.PathLike[str],
    within: float | str | None = None,
    max_bytes: int | str | None = None,
    *,
    task: str | None = None,
    metric: str | None = None,
) -> Selection:
    """Select the smallest rank that is close to the best one, and better than the base model.

    A rank is better than the base model if its value is. `Selection.differences` has the standard
    error of the difference.

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
    if metric is not None:
        evaluation = _with_primary_metric(evaluation, task, metric)

    sign = _sign(evaluation, task)
    # Higher is better for scores, also if lower is better for the metric.
    scores = {
        rank: sign * value for rank, value in evaluation.values(task).items() if value is not None
    }
    if not scores:
        raise MatryoshkaError(f"Task {task} has no value at any rank. Evaluate it again.")
    _check_not_all_zero(evaluation, task, scores)
    best_rank = _best_rank(scores)
    candidates = _better_than_base(evaluation, task, scores)
    candidates = {r: s for r, s in candidates.items() if evaluation.sizes[r] <= size_limit}
    bound: float | None = None
    if share is not None:
        lowest_score = scores[best_rank] - share * abs(scores[best_rank])
        # The tolerance admits a rank at the bound in spite of rounding.
        candidates = {r: s for r, s in candidates.items() if s > lowest_score - 1e-9}
        bound = sign * lowest_score
    if not candidates:
        best_size = format_size(evaluation.sizes[best_rank])
        raise MatryoshkaError(
            f"No rank meets the conditions. The best is rank {best_rank}, with "
            f"{sign * scores[best_rank]:.3f} and {best_size}. Pass a larger `within` or "
            "`max_bytes`."
        )
    if bound is None:
        return Selection(_best_rank(candidates), best_rank, task, None, True, None, evaluation)
    return _selection_within(evaluation, task, min(candidates), best_rank, bound)


def _with_primary_metric(evaluation: Evaluation, task: str, metric: str) -> Evaluation:
    """Return the evaluation with another primary metric of a task."""
    result = evaluation.tasks[task]
    keys = {key.removesuffix(",none"): key for key in result.metrics}
    check_choice("metric", metric, keys)
    key = keys[metric]
    result = replace(
        result,
        primary_metric=key,
        aurac_log2=metric_aurac(result.metrics[key], "log2"),
        aurac_linear=metric_aurac(result.metrics[key], "linear"),
    )
    return replace(evaluation, tasks={**evaluation.tasks, task: result})


def _sign(evaluation: Evaluation, task: str) -> int:
    """Return 1 if higher values are better, and -1 if lower ones are."""
    higher_is_better = evaluation.metric(task).higher_is_better
    if higher_is_better is None:
        raise MatryoshkaError(
            f"Task {task} does not define whether higher values of "
            f"{evaluation.tasks[task].primary_metric} are better. Set higher_is_better in its "
            "metric_list, and evaluate again."
        )
    return 1 if higher_is_better else -1


def _best_rank(scores: Mapping[int, float]) -> int:
    """Return the rank with the highest score; the smallest rank on ties."""
    return max(scores, key=lambda rank: (scores[rank], -rank))


def _check_not_all_zero(evaluation: Evaluation, task: str, scores: Mapping[int, float]) -> None:
    """Raise MatryoshkaError if higher is better, and the metric is 0 at every rank."""
    if evaluation.metric(task).higher_is_better and not any(scores.values()):
        raise MatryoshkaError(
            f"{_metric_name(evaluation, task)} is 0 at every rank on {task}, so it cannot tell "
            f"which rank is good. {_with_loss(evaluation, task, 'Train longer')}"
        )


def _better_than_base(
    evaluation: Evaluation, task: str, scores: Mapping[int, float]
) -> dict[int, float]:
    """Return the ranks that are better than the base model, with their scores."""
    if evaluation.metric(task).values.get(0) is None:
        return dict(scores)
    better: dict[int, float] = {}
    for rank, score in scores.items():
        difference = evaluation.difference(task, rank, 0)
        if difference is not None and difference.value > 0:
            better[rank] = score
    if not better:
        values = evaluation.metric(task).values
        best_rank = _best_rank(scores)
        advice = _with_loss(
            evaluation, task, "Train longer, or evaluate on examples of what was trained"
        )
        raise MatryoshkaError(
            f"No rank is better than the base model: {_metric_name(evaluation, task)} on {task} is "
            f"{values[best_rank]:.3f} at the best rank, {best_rank}, and {values[0]:.3f} without "
            f"the adapter. {advice}"
        )
    return better


def _metric_name(evaluation: Evaluation, task: str) -> str:
    return evaluation.tasks[task].primary_metric.removesuffix(",none")


def _with_loss(evaluation: Evaluation, task: str, advice: str) -> str:
    """Return a sentence with advice, and with the loss, which needs no right answers."""
    result = evaluation.tasks[task]
    if "loss,none" in result.metrics and result.primary_metric != "loss,none":
        return f"{advice}, or pass `metric='loss'`."
    return f"{advice}."


def _selection_within(
    evaluation: Evaluation, task: str, rank: int, best_rank: int, bound: float
) -> Selection:
    """Return the selection of a rank within a bound, with its significance."""
    is_significant = rank == best_rank
    num_questions_needed: int | None = None
    difference = evaluation.difference(task, best_rank, rank)
    if not is_significant and difference is not None and difference.standard_error is not None:
        best_value = evaluation.values(task)[best_rank]
        assert best_value is not None
        slack = abs(best_value - bound) - difference.value
        is_significant = 2 * difference.standard_error <= slack
        if not is_significant:
            num_questions_needed = _num_questions_needed(evaluation, task, difference, slack)
    return Selection(rank, best_rank, task, bound, is_significant, num_questions_needed, evaluation)


def _num_questions_needed(
    evaluation: Evaluation, task: str, difference: Difference, distance: float
) -> int | None:
    """Return about how many questions make two standard errors as small as a distance.

    Returns:
        The number, or None if it is unknown or a million times that of the evaluation.
    """
    if difference.standard_error is None or distance <= 0:
        return None
    ratio = 2 * difference.standard_error / distance
    if ratio > 1000:
        return None
    # The standard error decreases with the square root of the number of questions.
    return _round_up(evaluation.tasks[task].num_examples * ratio**2)


def _round_up(number: float) -> int:
    """Return a number rounded up to two significant digits."""
    num_zeros = max(0, len(str(math.ceil(number))) - 2)
    unit: int = 10**num_zeros
    return math.ceil(number / unit) * unit
