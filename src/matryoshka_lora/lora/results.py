"""Results shared by file and in-memory operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.text import format_percent, join_lines
from matryoshka_lora.units import pluralize


@dataclass(frozen=True)
class ReorderResult:
    """The result of `reorder` and of `NestedAdapter.reorder`.

    Attributes:
        path: The output, or None for a model in memory.
        ranks: The nested ranks.
        errors: The relative error of each nested rank: the Frobenius norm of the difference over
            the norm of the update, over all layers.
        singular_values: The singular values of each layer's update by the layer's name, shape
            (R,), or (experts, R), decreasing.
        weighted_errors: If examples or pictures have weighted the order, the weighted error of each
            nested rank: the root of the share of the squared weighted values that the rank leaves
            out.
        notes: Remarks for the user, one sentence each.
    """

    path: Path | None
    ranks: tuple[int, ...]
    errors: dict[int, float]
    singular_values: dict[str, Float64Array]
    weighted_errors: dict[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return the errors, a line for each kind, and the notes."""
        name = "The adapter" if self.path is None else str(self.path)
        lines = [f"{name} can be used at every rank. Relative errors {_format(self.errors)}"]
        if self.weighted_errors:
            lines.append(f"Weighted errors {_format(self.weighted_errors)}")
        return join_lines([*lines, *self.notes])


def _format(errors: dict[int, float]) -> str:
    return ", ".join(f"{rank}: {format_percent(error)}" for rank, error in errors.items())


@dataclass(frozen=True)
class Scores:
    """A metric of an evaluation by rank, for a model card. Rank 0 is the base model.

    Attributes:
        task: The name of the task.
        metric: The name of the metric.
        num_questions: The number of questions of the task.
        dtype: The dtype of the base model.
        values: The value of each rank.
        standard_errors: Its standard error over the questions; None if it is unknown.
    """

    task: str
    metric: str
    num_questions: int
    dtype: str
    values: Mapping[int, float]
    standard_errors: Mapping[int, float | None]


@dataclass(frozen=True)
class TrainRanksResult:
    """The result of `train_ranks` and of `NestedAdapter.train_ranks`.

    Attributes:
        path: The output, or None for a model in memory.
        outcome: ``"kept"``: the ranks up to ``small_rank`` were trained. ``"not better"``: the
            trained ranks were not kept. ``"nothing to train"``: no nested rank is behind rank R, or
            there is no smaller one. ``"no examples"``: the examples of the Trainer cannot be used.
        small_rank: The rank of the small adapter that was kept, or 0.
        examples_by_rank: The number of examples that each rank was trained on, repetitions
            included.
        losses_before: The validation loss of each nested rank before training, in nats per token;
            empty without examples.
        losses_after: The validation loss after training, of each nested rank that was trained, even
            if it was not kept.
        num_tokens: The number of tokens that were trained on, without padding; 0 if the examples
            have none.
        seconds: The time of training and validation.
        is_held_out: Whether the validation examples are an evaluation set, and no training
            examples.
        base_loss: The validation loss of the base model; None without examples.
        max_gap: The threshold: a rank is behind rank R if its validation loss is larger by more
            than this; None without examples.
    """

    path: Path | None
    outcome: Literal["kept", "not better", "nothing to train", "no examples"]
    small_rank: int = 0
    examples_by_rank: dict[int, int] = field(default_factory=dict)
    losses_before: dict[int, float] = field(default_factory=dict)
    losses_after: dict[int, float] = field(default_factory=dict)
    num_tokens: int = 0
    seconds: float = 0.0
    is_held_out: bool = True
    base_loss: float | None = None
    max_gap: float | None = None

    def __repr__(self) -> str:
        """Return the outcome with the losses that decided, and a table of the validation losses."""
        tokens = f"{self.num_tokens:,} tokens, " if self.num_tokens else ""
        price = f"{pluralize(self.num_examples, 'example')} ({tokens}{self.seconds:.0f} s)"
        nothing_to_train = "There is only one nested rank, so nothing was trained."
        if self.max_gap is not None:
            max_rank = max(self.losses_before)
            nothing_to_train = (
                "Nothing was trained: the validation loss of no rank is above that of rank "
                f"{max_rank} by more than the threshold, {self.max_gap:.3g}. The ranks can be used "
                "as `reorder` made them."
            )
        lines = [
            {
                "kept": f"The ranks up to {self.small_rank} were trained on {price}. Larger "
                "ones are unchanged.",
                "not better": f"The ranks were trained on {price}, but are not kept. They can be "
                "used as `reorder` made them.",
                "nothing to train": nothing_to_train,
                "no examples": "The Trainer's examples cannot be used, so the ranks were not "
                "trained.",
            }[self.outcome]
        ]
        # A rank is kept if neither its loss nor that of a smaller rank rises.
        worse_rank = next((rank for rank in self.losses_after if rank > self.small_rank), None)
        if worse_rank is not None:
            before = self.losses_before[worse_rank]
            rise = self.losses_after[worse_rank] - before
            lines.append(
                f"Rank {worse_rank} was not kept: training raised its validation loss by "
                f"{rise:.2g}, from {before:.4g}."
            )
        if self.losses_before:
            heading = "  rank  validation loss"
            lines.append(f"{heading}  after training" if self.losses_after else heading)
        if self.base_loss is not None:
            lines.append(f"{'base':>6}  {self.base_loss:15.3f}")
        for rank, loss in self.losses_before.items():
            is_trained = rank in self.losses_after
            after = f"  {self.losses_after[rank]:14.3f}" if is_trained else ""
            lines.append(f"{rank:6}  {loss:15.3f}{after}")
        max_rank = max(self.losses_before, default=0)
        losses = [self.losses_after[rank] for rank in self.losses_after if rank <= self.small_rank]
        if losses and min(losses) < self.losses_before[max_rank]:
            lines.append(
                f"  A trained rank is better than rank {max_rank}, because it has seen more "
                f"examples. Train longer to improve rank {max_rank}."
            )
        if self.losses_before and not self.is_held_out:
            lines.append("  validation: on training examples, as there is no evaluation set")
        return "\n".join(lines)

    @property
    def num_examples(self) -> int:
        """The number of examples that were trained on, repetitions included."""
        return sum(self.examples_by_rank.values())
