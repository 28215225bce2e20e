"""`select`: the smallest rank that is good enough."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from matryoshka_lora.budget import read_bytes, show_bytes
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluate.results import Difference, Evaluation, with_error


@dataclass(frozen=True)
class Choice:
    """A rank, and what speaks for it.

    Attributes:
        rank: The chosen one.
        best: The best rank of all.
        task: The task it was chosen by.
        value: The metric at the chosen rank.
        bound: The worst value that is near enough to the best one, where ``within`` is given.
        differences: How much better the chosen rank is than each other rank.
        is_sure: Whether the chosen rank is near enough even if its distance from the best one is two
            standard errors larger than measured.
        adapter: The adapter's path, as the evaluation knows it.
        size: The bytes of the exported adapter.
    """

    rank: int
    best: int
    task: str
    value: float
    bound: float | None
    differences: Mapping[int, Difference]
    is_sure: bool
    adapter: str
    size: int

    def lines(self) -> list[str]:
        """Return the choice and its evidence, for people."""
        bound = "" if self.bound is None else f"; {self.bound:.3f} is near enough"
        lines = [
            f"Rank {self.rank} ({show_bytes(self.size)}): {self.value:.3f} on {self.task}{bound}"
        ]
        for rank, found in self.differences.items():
            kind = "question by question" if found.paired else "as if both were independent"
            verdict = "" if found.is_sure else "; cannot be told apart from it"
            better = with_error(-found.value, found.error)
            lines.append(f"  rank {rank} is better by {better} ({kind}){verdict}")
        if not self.is_sure:
            lines.append("Too few questions to be sure that it is near enough to the best rank.")
        return lines


def select(
    evaluation: Evaluation | str | os.PathLike[str],
    within: float | str | None = None,
    max_bytes: int | str | None = None,
    task: str | None = None,
) -> Choice:
    """Choose the smallest rank that is good enough.

    Example::

        select("my-adapter-evaluation", within="1%").rank  # 4

    Args:
        evaluation: What `matryoshka_lora.evaluate` returned, or the folder that it wrote.
        within: How far below the best rank's value it may be, as a share of that value: ``0.01`` or
            ``"1%"``. None takes the best rank that is small enough.
        max_bytes: The most bytes of the exported adapter: ``50_000_000`` or ``"50MB"``.
        task: The task to choose by; may be None where there is only one.

    Raises:
        MatryoshkaError: There is no such evaluation or task, no wish, or no rank that meets it.
    """
    found = evaluation if isinstance(evaluation, Evaluation) else Evaluation.read(evaluation)
    task = found.task(task)
    if within is None and max_bytes is None:
        raise MatryoshkaError("say what the rank must meet: within, such as 1%, or max_bytes")
    share = None if within is None else _share(within)
    higher = found.metric(task)["higher_is_better"]
    if higher is None:
        raise MatryoshkaError(
            f"task {task} does not say whether more is better: write higher_is_better beside the "
            "metric in its YAML file, and evaluate again"
        )
    sign = 1 if higher else -1
    values = {rank: value for rank, value in found.values(task).items() if value is not None}
    if not values:
        raise MatryoshkaError(f"task {task} has no value at any rank")
    best = max(values, key=lambda rank: (sign * values[rank], -rank))
    most = None if max_bytes is None else read_bytes(max_bytes)
    small = [rank for rank in values if most is None or found.bytes[rank] <= most]
    if not small:
        least = show_bytes(min(found.bytes[rank] for rank in values))
        raise MatryoshkaError(f"no rank is small enough: the smallest has {least}")
    if share is None:
        rank, bound = max(small, key=lambda rank: (sign * values[rank], -rank)), None
    else:
        bound = values[best] - sign * share * abs(values[best])
        near = [rank for rank in small if sign * (values[rank] - bound) >= 0]
        if not near:
            raise MatryoshkaError(
                f"no rank that is small enough is within {100 * share:g} % of the best, "
                f"{values[best]:.3f} at rank {best}: allow more bytes or a larger share"
            )
        rank = min(near)
    others = {other: found.difference(task, rank, other) for other in values if other != rank}
    differences = {other: each for other, each in others.items() if each is not None}
    return Choice(
        rank,
        best,
        task,
        values[rank],
        bound,
        differences,
        _is_sure(bound, values[best], differences.get(best)),
        str(found.about.get("adapter")),
        found.bytes[rank],
    )


def _is_sure(bound: float | None, top: float, to_best: Difference | None) -> bool:
    if bound is None or to_best is None:
        return True
    return to_best.error is not None and -to_best.value + 2 * to_best.error <= abs(top - bound)


def _share(within: float | str) -> float:
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", str(within))
    share = float(found[1]) / (100 if found[2] else 1) if found else 2.0
    if share > 1:
        raise MatryoshkaError(f"within is {within!r}; write a share, such as 0.01 or 1%")
    return share
