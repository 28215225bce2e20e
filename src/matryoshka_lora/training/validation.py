"""The losses of the base model and of every nested rank on validation examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from matryoshka_lora.errors import NotFiniteError
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.peft.nested_layers import NestedLayers
from matryoshka_lora.training.data import Batch, TrainingData, num_terms
from matryoshka_lora.training.processes import (
    num_processes,
    process_index,
    sum_over_processes,
)


@dataclass(frozen=True)
class ValidationLosses:
    """The losses of each nested rank on the same batches, in nats per token.

    Attributes:
        weights: The share of each batch in the terms of the mean loss, shape (batches,).
        by_rank: The loss of each batch at each nested rank, shape (batches,).
    """

    weights: Float64Array
    by_rank: dict[int, Float64Array]

    def mean(self, rank: int) -> float:
        """Return the loss of a nested rank over all batches."""
        return float(self.weights @ self.by_rank[rank])

    def means(self) -> dict[int, float]:
        """Return the loss of each nested rank over all batches."""
        return {rank: self.mean(rank) for rank in self.by_rank}

    def gaps(self) -> dict[int, float]:
        """Return how much the loss of each nested rank exceeds that of rank R, at least 0."""
        max_rank_loss = self.mean(max(self.by_rank))
        return {rank: max(0.0, loss - max_rank_loss) for rank, loss in self.means().items()}

    def paired_change(self, after: ValidationLosses, ranks: Sequence[int]) -> PairedChange:
        """Return the change of the mean loss of some ranks, from batch to batch.

        Args:
            after: The losses on the same batches after training.
            ranks: Some of the nested ranks.
        """
        changes = [after.by_rank[rank] - self.by_rank[rank] for rank in ranks]
        change_by_batch = np.mean(changes, axis=0)
        mean = float(self.weights @ change_by_batch)
        num_batches = len(self.weights)
        if num_batches == 1:
            return PairedChange(mean, 0.0)
        variance = float(self.weights**2 @ (change_by_batch - mean) ** 2)
        return PairedChange(mean, math.sqrt(variance * num_batches / (num_batches - 1)))


@dataclass(frozen=True)
class PairedChange:
    """A mean difference of paired losses, in nats.

    Attributes:
        mean: After minus before.
        standard_error: Of the mean, from the spread of the batches. For one batch it is unknown,
            and 0, so that the mean alone decides.
    """

    mean: float
    standard_error: float


def prefix_mask(max_rank: int, rank: int) -> Tensor:
    """Return the diagonal of a rank: ones, then zeros, shape (max_rank,), float64.

    Rank 0 is the base model.
    """
    return (torch.arange(max_rank) < rank).double()


@torch.no_grad()
def validation_losses(
    layers: NestedLayers, data: TrainingData, batches: Sequence[Batch]
) -> ValidationLosses:
    """Return the losses of each nested rank.

    Of several processes, each computes a share of the batches, and all return the same.

    Args:
        layers: The nested layers of the model.
        data: Its ``loss`` computes the loss of a batch.
        batches: Validation batches, the same in each process.

    Raises:
        NotFiniteError: A loss is NaN or infinite.
    """
    losses = {rank: _losses(layers, data, batches, rank) for rank in layers.nesting.ranks}
    return ValidationLosses(_weights(data, batches), losses)


@torch.no_grad()
def base_loss(layers: NestedLayers, data: TrainingData, batches: Sequence[Batch]) -> float:
    """Return the mean loss of the base model. The arguments are those of `validation_losses`."""
    return float(_weights(data, batches) @ _losses(layers, data, batches, rank=0))


def _weights(data: TrainingData, batches: Sequence[Batch]) -> Float64Array:
    """Return the share of each batch in the terms of the mean loss, shape (batches,)."""
    weights = _map_over_batches(num_terms, batches, data.device)
    weights /= weights.sum()
    return weights


def _losses(
    layers: NestedLayers, data: TrainingData, batches: Sequence[Batch], rank: int
) -> Float64Array:
    """Return the loss of each batch at a rank, shape (batches,). Rank 0 is the base model."""
    with layers.use_diagonal(prefix_mask(layers.nesting.max_rank, rank)):
        losses = _map_over_batches(lambda batch: data.loss(batch).item(), batches, data.device)
    check_finite_loss(float(losses.sum()))
    return losses


def _map_over_batches(
    function: Callable[[Batch], float], batches: Sequence[Batch], device: torch.device
) -> Float64Array:
    """Return the value of each batch, shape (batches,)."""
    values = torch.zeros(len(batches), dtype=torch.float64)
    last_index = len(batches) - 1
    for start in range(0, len(batches), num_processes()):
        index = start + process_index()
        # Without a batch of its own, a process computes the last one and ignores the value: the
        # function may communicate.
        value = function(batches[min(index, last_index)])
        if index <= last_index:
            values[index] = value
    (values,) = sum_over_processes([values], device)
    return values.numpy()


def check_finite_loss(loss: float) -> None:
    """Raise NotFiniteError if a loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"The loss is {loss}. Training has diverged, or the dtype of the base model is too "
            "narrow: load it in bfloat16 or float32. Or reorder the adapter, which needs no loss."
        )
