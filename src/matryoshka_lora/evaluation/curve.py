"""One adapter at every rank, and the numbers that sum the curve up."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.data.questions import Judge, Question
from matryoshka_lora.evaluation.scoring import Scores, score
from matryoshka_lora.metrics import aurac
from matryoshka_lora.nesting import Nesting

ACCURACY = "accuracy,none"
"""What the harness calls the accuracy of a built-in task."""

_PACKAGES = (
    "matryoshka-lora",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "lm_eval",
    "datasets",
    "reasoning-gym",
)


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
            "versions": versions(),
        }

    def deployed(
        self, name: str, adapter: Mapping[str, Any], sizes: Sequence[int], latencies: Sequence[float]
    ) -> dict[str, Any]:
        """One of the curves in the form of `matryoshka_lora.evaluation.results`, which ``matryoshka select`` reads.

        Args:
            name: Of the curve.
            adapter: What is said of the adapter that it belongs to.
            sizes: Bytes at each rank.
            latencies: Milliseconds for a token at each rank.
        """
        curve = self.curves[name]
        accuracy = {
            "higher_is_better": True,
            "value": list(curve.accuracy),
            "stderr": [_standard_error(scores.correct) for scores in curve.scores],
            "base": {"value": self.base.accuracy, "stderr": _standard_error(self.base.correct)},
        }
        loss = {
            "higher_is_better": False,
            "value": list(curve.loss),
            "stderr": [None for _ in curve.ranks],
            "base": {"value": self.base.loss, "stderr": None},
        }
        task = {
            "kind": "built-in",
            "items": self.items,
            "num_fewshot": 0,
            "metric": ACCURACY,
            "aurac": curve.aurac,
            "metrics": {ACCURACY: accuracy, "loss,none": loss},
        }
        return {
            "format": 2,
            "adapter": dict(adapter),
            "mode": "exact",
            "ranks": list(curve.ranks),
            "bytes": list(sizes),
            "latency_ms": list(latencies),
            "settings": {"num_fewshot": None, "limit": self.items, "split": self.split},
            "tasks": {self.task: task},
        }

    def examples(self, name: str, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """The lines of ``examples.jsonl`` beside `deployed`: each question with its answers, 0 is the base model."""
        curve = self.curves[name]
        by_rank = {"0": self.base, **{str(rank): s for rank, s in zip(curve.ranks, curve.scores, strict=True)}}
        return [
            {
                "task": self.task,
                "doc_id": number,
                "prompt": str(question.prompt),
                "target": str(question.completion),
                "answers": {rank: scores.answers[number] for rank, scores in by_rank.items()},
                "metrics": {ACCURACY: {rank: float(scores.correct[number]) for rank, scores in by_rank.items()}},
            }
            for number, question in enumerate(questions)
        ]


def evaluate_ranks(
    adapter: NestedAdapter,
    tokenizer: PreTrainedTokenizerBase,
    task: Judge,
    examples: Sequence[Question],
    ranks: Sequence[int] | None = None,
    batch_size: int | None = None,
    name: str | None = None,
) -> Curve:
    """Held-out loss and greedy accuracy of an adapter at each rank, all in one; shows its progress on stderr.

    Args:
        adapter: Its rank and mode are the same afterwards.
        tokenizer: The base model's.
        task: Judges the answers.
        examples: The questions.
        ranks: Strictly increasing; None means those of the nesting.
        batch_size: The most rows that generate together; None measures how many fit.
        name: What the adapter is called on the screen.

    Raises:
        MatryoshkaError: A rank cannot be chosen, or a loss is not finite; the message names the rank.
    """
    chosen = Nesting(adapter.nesting.ranks if ranks is None else ranks).ranks
    return Curve(chosen, tuple(_scored(adapter, tokenizer, task, examples, chosen, batch_size, name or adapter.name)))


def evaluate_base(
    adapter: NestedAdapter,
    tokenizer: PreTrainedTokenizerBase,
    task: Judge,
    examples: Sequence[Question],
    batch_size: int | None = None,
) -> Scores:
    """The scores of the base model without the adapter."""
    return _scored(adapter, tokenizer, task, examples, (0,), batch_size, "base model")[0]


def _scored(
    adapter: NestedAdapter,
    tokenizer: PreTrainedTokenizerBase,
    task: Judge,
    examples: Sequence[Question],
    ranks: Sequence[int],
    batch_size: int | None,
    name: str,
) -> list[Scores]:
    console = Console(stderr=True)
    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} answers"))
    # Where nobody watches, the lines that are printed for each rank are enough.
    options: dict[str, Any] = {"console": console, "transient": True, "disable": not console.is_terminal}
    with Progress(*columns, TimeRemainingColumn(), **options) as progress:
        bar = progress.add_task(name, total=2 * len(ranks) * len(examples))
        try:
            found = score(adapter, tokenizer, task, examples, ranks, batch_size, lambda: progress.advance(bar))
        except MatryoshkaError as error:
            raise MatryoshkaError(f"{name}, {error}") from error
    for rank, scores in zip(ranks, found, strict=True):
        what = f"{name}, rank {rank}" if rank else name
        console.print(
            f"  {what}: loss {scores.loss:.3f}, accuracy {scores.accuracy:.1%}", highlight=False, markup=False
        )
    return found


def _standard_error(correct: Sequence[bool]) -> float | None:
    """As the harness has it for a mean."""
    return stdev(map(float, correct)) / math.sqrt(len(correct)) if len(correct) > 1 else None


def versions() -> dict[str, str]:
    """Of Python and of the packages that answers and numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra that is not needed for every evaluation
            continue
    return found
