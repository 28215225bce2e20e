"""Results shared by file and in-memory operations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matryoshka_lora.errors import printable
from matryoshka_lora.linalg.arrays import Float64Array
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
    """

    path: Path | None
    ranks: tuple[int, ...]
    errors: dict[int, float]
    singular_values: dict[str, Float64Array]

    def __repr__(self) -> str:
        """Return the errors on one line."""
        errors = ", ".join(f"{rank}: {error:.1%}" for rank, error in self.errors.items())
        name = "The adapter" if self.path is None else str(self.path)
        return printable(f"{name} can be used at every rank. Relative errors {errors}")


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
    """

    path: Path | None
    outcome: Literal["kept", "not better", "nothing to train", "no examples"]
    small_rank: int
    examples_by_rank: dict[int, int]
    losses_before: dict[int, float]
    losses_after: dict[int, float]

    def __repr__(self) -> str:
        """Return the outcome, and a table of the validation losses."""
        lines = [
            {
                "kept": f"The ranks up to {self.small_rank} were trained on "
                f"{pluralize(self.num_examples, 'example')}. Larger ones are unchanged.",
                "not better": "Training did not improve the ranks, so the trained ones were not "
                "kept.",
                "nothing to train": "All ranks are as good as the largest one already, so nothing "
                "was trained.",
                "no examples": "The Trainer's examples cannot be used, so the ranks were not "
                "trained.",
            }[self.outcome]
        ]
        if self.losses_before:
            heading = "  rank  validation loss"
            lines.append(f"{heading}  after training" if self.losses_after else heading)
        for rank, loss in self.losses_before.items():
            is_trained = rank in self.losses_after
            after = f"  {self.losses_after[rank]:14.3f}" if is_trained else ""
            lines.append(f"{rank:6}  {loss:15.3f}{after}")
        return "\n".join(lines)

    @property
    def num_examples(self) -> int:
        """The number of examples that were trained on, repetitions included."""
        return sum(self.examples_by_rank.values())
