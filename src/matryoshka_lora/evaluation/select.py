"""`select`: the smallest rank that is good enough."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from matryoshka_lora.budget import read_bytes, read_share, show_bytes
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.results import Evaluation, with_error


@dataclass(frozen=True)
class Choice:
    """Report the chosen rank and the evidence.

    Attributes:
        rank: The chosen one.
        best: The best rank of all.
        task: The task it was chosen by.
        bound: The worst value that is near enough to the best, where ``within`` is given.
        is_sure: Whether it is near enough with two standard errors more between it and the best.
        evaluation: What it was chosen from.
    """

    rank: int
    best: int
    task: str
    bound: float | None
    is_sure: bool
    evaluation: Evaluation

    def lines(self) -> list[str]:
        """Return the choice and its evidence, for people."""
        found = self.evaluation
        near = "" if self.bound is None else f"; {self.bound:.3f} is near enough"
        metric = found.tasks[self.task]["metric"].removesuffix(",none")
        told = f"{metric} {found.values(self.task)[self.rank]:.3f} on {self.task}{near}"
        told += f"; {found.tasks[self.task]['items']} questions"
        lines = [f"Rank {self.rank} ({show_bytes(found.bytes[self.rank])}): {told}"]
        for other in found.ranks:
            apart = found.difference(self.task, other, self.rank)
            if other != self.rank and apart is not None:
                is_sure = apart.error is None or abs(apart.value) > 2 * apart.error
                sure = "" if is_sure else "; they cannot be told apart"
                better = "better by" if apart.value > 0 else "worse by" if apart.value else "equal,"
                size = with_error(abs(apart.value), apart.error)
                lines.append(f"  rank {other} is {better} {size}{sure}")
        if not self.is_sure:
            lines.append("It may not be near enough: too few questions, or no known error.")
        return lines


def select(
    evaluation: Evaluation | str | os.PathLike[str],
    within: float | str | None = None,
    max_bytes: int | str | None = None,
    task: str | None = None,
    metric: str | None = None,
) -> Choice:
    """Choose the smallest rank that is good enough, and better than the base model.

    Args:
        evaluation: What `matryoshka_lora.evaluate` returned, or the folder that it wrote.
        within: How far below the best rank's value it may be, as a share of that value: ``0.01`` or
            ``"1%"``. None takes the best rank that is small enough.
        max_bytes: The most bytes of the exported adapter: ``50_000_000`` or ``"50MB"``.
        task: The task to choose by; may be None where there is only one.
        metric: The metric to choose by, such as ``"loss"``; None is the task's first one.

    Raises:
        MatryoshkaError: There is no such evaluation, task, metric or limit, or no rank meets it.
    """
    found = evaluation if isinstance(evaluation, Evaluation) else Evaluation.read(evaluation)
    task = found.task(task)
    if metric is not None:
        found = _by(found, task, metric)
    if within is None and max_bytes is None:
        raise MatryoshkaError("say what the rank must meet: --within 1% or --max-bytes 50MB")
    higher = found.metric(task)["higher_is_better"]
    values = {rank: value for rank, value in found.values(task).items() if value is not None}
    if higher is None or not values:
        why = "has no value" if not values else "does not say whether more is better"
        raise MatryoshkaError(
            f"task {task} {why}: write higher_is_better beside its metric, and evaluate again"
        )
    sign, limit = 1 if higher else -1, None if max_bytes is None else read_bytes(max_bytes)
    small = [rank for rank in values if limit is None or found.bytes[rank] <= limit]
    best = max(values, key=lambda rank: (sign * values[rank], -rank))
    top, bound = values[best], None
    base = found.metric(task)["value"].get(0)
    if base is not None and sign * (top - base) <= 0:
        raise MatryoshkaError(
            f"no rank is better than the base model on {task}, {top:.3f} and {base:.3f}: train "
            "longer, or ask questions that show what was learned, or name another --metric"
        )
    if base is not None:
        small = [rank for rank in small if sign * (values[rank] - base) > 0]
    if within is not None:
        if read_share(within) == 1:
            raise MatryoshkaError(f"--within {within} takes every rank: write a share such as 1%")
        bound = top - sign * read_share(within) * abs(top)
        small = [rank for rank in small if sign * (values[rank] - bound) > -1e-9]
    if not small:
        raise MatryoshkaError(
            f"no rank is good and small enough: the best is {best}, with {top:.3f} and "
            f"{show_bytes(found.bytes[best])}. Allow more bytes or a larger share"
        )
    if bound is None:
        rank = max(small, key=lambda rank: (sign * values[rank], -rank))
        return Choice(rank, best, task, bound, True, found)
    rank = min(small)
    lost = found.difference(task, best, rank)
    most = lost.value + 2 * lost.error if lost and lost.error is not None else float("inf")
    return Choice(rank, best, task, bound, rank == best or most <= abs(top - bound), found)


def _by(found: Evaluation, task: str, metric: str) -> Evaluation:
    """Return an evaluation with a metric as a task's first one."""
    keys = {key.removesuffix(",none"): key for key in found.tasks[task]["metrics"]}
    if metric not in keys:
        raise MatryoshkaError(f"{task} has no metric {metric!r}; it has {', '.join(keys)}")
    first = found.tasks[task] | {"metric": keys[metric]}
    return replace(found, tasks=found.tasks | {task: first})
