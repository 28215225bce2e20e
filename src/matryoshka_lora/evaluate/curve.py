"""One adapter at every rank, and the numbers that sum the curve up."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluate.questions import Judge, Question
from matryoshka_lora.evaluate.scoring import BATCH_SIZE, Scores, score
from matryoshka_lora.metrics import aurac
from matryoshka_lora.nesting import Nesting

_PACKAGES = ("matryoshka-lora", "torch", "transformers", "peft", "reasoning-gym")


@dataclass(frozen=True)
class Curve:
    """An adapter's scores at each of its ranks.

    Attributes:
        ranks: Strictly increasing.
        scores: One for each rank.
    """

    ranks: tuple[int, ...]
    scores: tuple[Scores, ...]

    def __post_init__(self) -> None:
        if len(Nesting(self.ranks).ranks) != len(self.scores):
            raise MatryoshkaError(f"{len(self.scores)} scores for {len(self.ranks)} ranks; give one for each rank")

    @property
    def loss(self) -> tuple[float, ...]:
        """Held-out loss at each rank, in nats per token."""
        return tuple(s.loss for s in self.scores)

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Accuracy at each rank, 0 to 1."""
        return tuple(s.accuracy for s in self.scores)

    @property
    def aurac(self) -> dict[str, float]:
        """The area under the rank-accuracy curve over both axes, 0 to 1; see `matryoshka_lora.metrics`."""
        return {"log2": aurac(self.accuracy, self.ranks), "linear": aurac(self.accuracy, self.ranks, axis="linear")}

    @property
    def mean_accuracy(self) -> float:
        """The plain mean over the ranks."""
        return fmean(self.accuracy)

    @property
    def full_accuracy(self) -> float:
        """Accuracy at the largest of the ranks."""
        return self.accuracy[-1]

    @property
    def worst_rank_gap(self) -> float:
        """How far the worst rank falls below the largest one; 0 where none does."""
        return max(self.full_accuracy - accuracy for accuracy in self.accuracy)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "ranks": list(self.ranks),
            "loss": list(self.loss),
            "accuracy": list(self.accuracy),
            "aurac": self.aurac,
            "mean": self.mean_accuracy,
            "worst_rank_gap": self.worst_rank_gap,
        }


@dataclass(frozen=True)
class Evaluation:
    """Curves that were measured on the same questions, beside the base model without adapter.

    Attributes:
        task: Its name, or a file's.
        split: Of the task.
        model: The base model's name.
        dtype: The base model's, ``"bfloat16"`` for example.
        base: The base model's scores.
        curves: By name; at first none.
    """

    task: str
    split: str
    model: str
    dtype: str
    base: Scores
    curves: dict[str, Curve] = field(default_factory=dict)

    @property
    def items(self) -> int:
        """How many questions."""
        return len(self.base.correct)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "task": self.task,
            "split": self.split,
            "items": self.items,
            "model": self.model,
            "dtype": self.dtype,
            "base": {"loss": self.base.loss, "accuracy": self.base.accuracy},
            "curves": {name: curve.to_dict() for name, curve in self.curves.items()},
            "versions": _versions(),
        }


def evaluate_ranks(
    adapter: NestedAdapter,
    tokenizer: PreTrainedTokenizerBase,
    task: Judge,
    examples: Sequence[Question],
    ranks: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    name: str | None = None,
) -> Curve:
    """Held-out loss and greedy accuracy of an adapter at each rank; shows its progress on stderr.

    Args:
        adapter: Its rank and mode are the same afterwards.
        tokenizer: The base model's.
        task: Judges the answers.
        examples: The questions.
        ranks: Strictly increasing; None means those of the nesting.
        batch_size: Questions that run together.
        name: What the adapter is called on the screen.

    Raises:
        MatryoshkaError: A rank cannot be chosen, or a loss is not finite; the message names the rank.
    """
    chosen = Nesting(adapter.nesting.ranks if ranks is None else ranks).ranks
    for rank in chosen:
        adapter.state.check_rank(rank)
    run = partial(score, adapter.model, tokenizer, task, examples, batch_size)
    before, found = adapter.rank, []
    try:
        with _progress(len(chosen) * len(examples)) as progress:
            for rank in chosen:
                adapter.set_rank(rank)
                found.append(_scored(progress, f"{name or adapter.name}, rank {rank}", run))
    finally:
        exact = {re.escape(layer): rank for layer, rank in before.items()} if isinstance(before, dict) else before
        adapter.set_rank(exact)
    return Curve(chosen, tuple(found))


def evaluate_base(
    adapter: NestedAdapter,
    tokenizer: PreTrainedTokenizerBase,
    task: Judge,
    examples: Sequence[Question],
    batch_size: int = BATCH_SIZE,
) -> Scores:
    """The scores of the base model without the adapter, which is switched off meanwhile."""
    with adapter.model.disable_adapter(), _progress(len(examples)) as progress:
        return _scored(progress, "base model", partial(score, adapter.model, tokenizer, task, examples, batch_size))


def _scored(progress: Progress, what: str, run: Callable[..., Scores]) -> Scores:
    bar = progress.task_ids[0]
    progress.update(bar, description=what)
    try:
        scores = run(on_batch=lambda rows: progress.advance(bar, rows))
    except MatryoshkaError as error:
        raise MatryoshkaError(f"{what}: {error}") from error
    progress.console.print(
        f"  {what}: loss {scores.loss:.3f}, accuracy {scores.accuracy:.1%}", highlight=False, markup=False
    )
    return scores


@contextmanager
def _progress(questions: int) -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} questions"))
    # Where nobody watches, the lines that are printed after each rank are enough.
    options: dict[str, Any] = {"console": console, "transient": True, "disable": not console.is_terminal}
    with Progress(*columns, TimeRemainingColumn(), **options) as progress:
        progress.add_task("", total=questions)
        yield progress


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # reasoning-gym, where a file is evaluated
            continue
    return found
