"""Select the smallest rank whose metric is close enough to that of the best rank."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from matryoshka_lora.errors import MatryoshkaError, check_choice
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

    The values are compared without their errors. `Selection.differences` has the standard error of
    each difference.

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
        chosen = result.metrics[keys[metric]]
        result = replace(
            result,
            primary_metric=keys[metric],
            aurac_log2=chosen.aurac("log2"),
            aurac_linear=chosen.aurac("linear"),
        )
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
    if bound is None:
        return Selection(_best_rank(candidates), best_rank, task, None, True, None, evaluation)

    rank = min(candidates)
    difference = evaluation.difference(task, best_rank, rank)
    is_significant = rank == best_rank
    num_questions_needed: int | None = None
    if not is_significant and difference is not None and difference.standard_error is not None:
        slack = scores[rank] - sign * bound
        is_significant = 2 * difference.standard_error <= slack
        if not is_significant and slack > 0:
            num_questions_needed = _num_questions_needed(
                result.num_examples, 2 * difference.standard_error / slack
            )
    return Selection(rank, best_rank, task, bound, is_significant, num_questions_needed, evaluation)


def _best_rank(scores: dict[int, float]) -> int:
    """Return the rank with the highest score; the smallest rank on ties."""
    return max(scores, key=lambda rank: (scores[rank], -rank))


def _num_questions_needed(num_questions: int, ratio: float) -> int | None:
    """Return how many questions reduce the standard error by a ratio, to two significant digits.

    Returns:
        The number, rounded up, or None if it is more than a million times ``num_questions``.
    """
    if ratio > 1000:
        return None
    # The standard error decreases with the square root of the number of questions.
    number = num_questions * ratio**2
    unit: int = 10 ** max(0, len(str(math.ceil(number))) - 2)
    return math.ceil(number / unit) * unit
