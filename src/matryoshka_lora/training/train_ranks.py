"""Briefly train every rank of an adapter after its training."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from statistics import fmean

import torch

from matryoshka_lora.errors import MatryoshkaError, check_integer
from matryoshka_lora.lora_file.results import TrainRanksResult
from matryoshka_lora.nn.nested_layers import NestedLayers
from matryoshka_lora.training.data import Batch, Split, TrainingData
from matryoshka_lora.training.prefix_steps import (
    EXAMPLES_PER_STEP,
    mean_loss,
    prefix_mask,
    train_prefixes,
    trainable_factors,
)

MAX_EXAMPLES = 3200
"""The default of ``max_examples`` if the number of examples seen in training is unknown."""
MAX_SHARE_OF_SEEN = 0.5
"""The default of ``max_examples``, as a share of the examples seen in training."""
MAX_VALIDATION_EXAMPLES = 64
SMALLEST_GAP = 0.02
"""In nats. If no rank is further behind rank R, nothing is trained."""
LARGEST_GAP = 1.25
"""In nats. At this gap the full budget of examples is used."""
LOSS_TOLERANCE = 1e-3
"""In nats. Smaller differences count as rounding."""
MAX_LOSS_INCREASE = 0.02
"""Maximum increase of the loss of rank R: in nats, or as a share of it, whichever is larger."""

logger = logging.getLogger(__name__)


def train_ranks(
    layers: NestedLayers, data: TrainingData, max_examples: int | None = None, seed: int = 0
) -> TrainRanksResult:
    """Train every rank from the smallest nested rank to R; rank R changes a little.

    Factors without an order are reordered by SVD first. Each step then trains one rank, drawn from
    all ranks between the smallest nested one and R; small ones come more often. See
    `train_prefixes`. The more the worst rank is behind rank R, the more examples are used.

    The trained factors are kept if the nested ranks have a lower validation loss than before on
    average, and rank R's rises by no more than `MAX_LOSS_INCREASE`. Otherwise the factors are those
    from before training, with a warning. If no rank is behind rank R, nothing is trained. If a
    Trainer has too few examples, nothing is trained either, with a warning.

    Args:
        layers: The layers of the adapter.
        data: From `read_training_data`.
        max_examples: Train on exactly this many examples. Defaults to as many as the worst rank
            needs: up to half the examples that the Trainer has seen, or 3200 if unknown.
        seed: Seed of the order of examples and ranks.

    Raises:
        MatryoshkaError: There is no nested rank below R, the adapter is merged, sharded or not
            active, max_examples is not positive, or there are too few examples and they are not a
            Trainer's. The adapter is unchanged.
        NotFiniteError: The loss or a gradient is not finite. The factors are as before training.
    """
    _check_arguments(layers, max_examples)
    ranks = layers.nesting.ranks
    limit = _default_max_examples(data) if max_examples is None else max_examples
    split = _split(data, limit, seed)
    if layers.order is None:
        layers.reorder()
    if split is None:
        return TrainRanksResult(None, False, 0, losses_before={}, losses_after=None)

    with trainable_factors(layers):
        losses_before = _validation_losses(layers, data, split.validation_batches)
        gap = max(losses_before.values()) - losses_before[ranks[-1]]
        if gap <= SMALLEST_GAP:
            _log_nothing_to_train(losses_before)
            return TrainRanksResult(None, False, 0, losses_before, losses_after=None)
        num_examples = limit
        if max_examples is None:
            num_examples = math.ceil(limit * min(1.0, gap / LARGEST_GAP))
        factors = layers.copy_factors()
        train_prefixes(layers, data, split.training_indices[:num_examples], seed)
        losses_after = _validation_losses(layers, data, split.validation_batches)
        _log_losses(losses_before, losses_after)
        kept = _is_better(losses_before, losses_after)
        if not kept:
            layers.write_factors(factors)
    if kept:
        layers.mark_ordered("trained")
    return TrainRanksResult(None, kept, num_examples, losses_before, losses_after)


def _check_arguments(layers: NestedLayers, max_examples: int | None) -> None:
    """Raise MatryoshkaError unless the ranks can be trained. Nothing is changed."""
    ranks = layers.nesting.ranks
    if len(ranks) == 1:
        raise MatryoshkaError(
            f"The only nested rank is {ranks[0]}, so there are no ranks to train. Nest the adapter "
            "with smaller ranks too, or reorder it."
        )
    if max_examples is not None:
        check_integer("max_examples", max_examples)
    layers.check_not_merged("train its ranks")
    layers.check_active()
    layers.check_not_sharded()


def _default_max_examples(data: TrainingData) -> int:
    if data.num_examples_seen is None:
        return MAX_EXAMPLES
    return max(EXAMPLES_PER_STEP, round(data.num_examples_seen * MAX_SHARE_OF_SEEN))


def _split(data: TrainingData, num_training: int, seed: int) -> Split | None:
    """Return the examples to train and to validate on, or None if a Trainer has too few."""
    try:
        with torch.random.fork_rng(devices=[]):  # a collator may draw random numbers
            return data.split(num_training, MAX_VALIDATION_EXAMPLES, seed)
    except MatryoshkaError as error:
        if not data.from_trainer:
            raise
        # A script that has trained for hours continues, and saves the adapter.
        warnings.warn(f"The ranks are not trained: {error}", stacklevel=3)
        return None


def _validation_losses(
    layers: NestedLayers, data: TrainingData, batches: Sequence[Batch]
) -> dict[int, float]:
    """Return the validation loss of each nested rank."""
    losses: dict[int, float] = {}
    with torch.no_grad():
        for rank in layers.nesting.ranks:
            q = prefix_mask(layers.nesting.max_rank, rank)
            losses[rank] = mean_loss(layers, data, batches, q)
    return losses


def _is_better(losses_before: dict[int, float], losses_after: dict[int, float]) -> bool:
    """Return whether to keep the trained factors, and warn of what became worse."""
    increases = {rank: losses_after[rank] - losses_before[rank] for rank in losses_before}
    max_rank = max(increases)
    mean_increase = fmean(increases.values())
    max_increase = MAX_LOSS_INCREASE * max(1.0, losses_before[max_rank])
    if mean_increase >= -LOSS_TOLERANCE or increases[max_rank] > max_increase:
        warnings.warn(
            "The trained ranks are not kept: training would change the mean validation loss of the "
            f"ranks by {mean_increase:+.3f}, and that of rank {max_rank} by "
            f"{increases[max_rank]:+.3f}.",
            stacklevel=3,
        )
        return False
    worse_ranks = [
        f"{rank} (by {increase:.3f})"
        for rank, increase in increases.items()
        if rank != max_rank and increase > LOSS_TOLERANCE
    ]
    if worse_ranks:
        warnings.warn(
            f"Ranks whose validation loss increased: {', '.join(worse_ranks)}.",
            stacklevel=3,
        )
    return True


def _log_nothing_to_train(losses: dict[int, float]) -> None:
    losses_by_rank = ", ".join(f"{rank}: {loss:.3f}" for rank, loss in losses.items())
    logger.info(
        "All ranks are within %s nats of rank %d (%s); nothing to train.",
        SMALLEST_GAP,
        max(losses),
        losses_by_rank,
    )


def _log_losses(losses_before: dict[int, float], losses_after: dict[int, float]) -> None:
    changes = ", ".join(
        f"rank {rank}: {losses_before[rank]:.3f} to {losses_after[rank]:.3f}"
        for rank in losses_before
    )
    logger.info("Validation losses: %s.", changes)
