"""Results shared by file and in-memory operations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matryoshka_lora.algebra.arrays import Float64Array


@dataclass(frozen=True)
class ReorderResult:
    """The result of `reorder` and of `NestedAdapter.reorder`.

    Attributes:
        path: The output, or None for a model in memory.
        ranks: The nested ranks.
        errors: The relative error of each nested rank: the Frobenius norm of what it misses over
            the norm of the update, over all layers.
        singular_values: The singular values of each layer's update by the layer's name, shape
            (R,), or (experts, R), decreasing.
    """

    path: Path | None
    ranks: tuple[int, ...]
    errors: dict[int, float]
    singular_values: dict[str, Float64Array]


@dataclass(frozen=True)
class TrainRanksResult:
    """The result of `train_ranks` and of `NestedAdapter.train_ranks`.

    Attributes:
        path: The output, or None for a model in memory.
        kept: Whether the trained factors were kept. Otherwise the factors are those from before
            training: the trained ones are not better (``losses_after`` is not None), no rank needed
            training (it is None), or a Trainer has too few examples (``losses_before`` is empty).
        num_examples: The number of examples that were trained on, repetitions included.
        losses_before: The validation loss of each nested rank before training, in nats per token.
        losses_after: The same after training, or None if nothing was trained.
    """

    path: Path | None
    kept: bool
    num_examples: int
    losses_before: dict[int, float]
    losses_after: dict[int, float] | None
