"""Briefly train every rank of an adapter after its training."""

from __future__ import annotations

import logging
import warnings

import torch

from matryoshka_lora.errors import check_integer
from matryoshka_lora.lora.results import TrainRanksResult
from matryoshka_lora.peft.nested_layers import NestedLayers
from matryoshka_lora.training.data import Split, TrainingData
from matryoshka_lora.training.prefix_steps import (
    EXAMPLES_PER_STEP,
    train_prefixes,
    trainable_factors,
)
from matryoshka_lora.training.processes import round_up_to_processes
from matryoshka_lora.training.validation import (
    ValidationLosses,
    base_loss,
    validation_losses,
)

MAX_EXAMPLES = 3200
"""The default of ``max_examples`` if the number of examples seen in training is unknown."""
MAX_SHARE_OF_SEEN = 0.5
"""The default of ``max_examples``, as a share of the examples seen in training."""
SMALLEST_GAP = 0.02
"""Relative to the gain of rank R. If no rank is further behind rank R, nothing is trained."""
MAX_LOSS_INCREASE = 0.02
"""Maximum increase of the loss of rank R, relative to its gain."""
MAX_TOLERANCE = 0.05
"""In nats. Both shares of the gain are at most this: the gain of a base model that does not know
where an answer ends is large, and a share of it would hide what separates the ranks."""
NUM_STANDARD_ERRORS = 1.0
"""Changes of fewer standard errors do not count."""
ROUNDING = 1e-3
"""In nats. Smaller gaps do not count."""
MIN_VALIDATION_EXAMPLES = 32
MAX_VALIDATION_EXAMPLES = 64
VALIDATION_SHARE = 1 / 32
"""The number of validation examples, relative to ``max_examples``, between these two limits."""

logger = logging.getLogger(__name__)


def train_ranks(
    layers: NestedLayers, data: TrainingData, max_examples: int | None = None, seed: int = 0
) -> TrainRanksResult:
    """Train every rank from the smallest nested rank to R; rank R changes a little.

    Factors without an order are reordered by SVD first. Each step then trains one rank; ranks whose
    loss is further behind rank R's get more steps. See `train_prefixes`. Losses are measured
    relative to the gain of rank R: how much it lowers the loss of the base model.

    The trained factors are kept if the mean validation loss of the ranks below R has improved by
    more than its standard error, and rank R has not lost two percent of its gain, or 0.05 nats if
    that is less. Otherwise the factors are those from before training, with a warning. If no rank
    is behind rank R by as much, nothing is trained.

    Without an evaluation set, training examples validate.

    Of several processes of torch.distributed, each with all factors, every one must call this
    function. Each computes a share of the losses and gradients.

    Args:
        layers: The layers of the adapter.
        data: From `read_training_data`.
        max_examples: The number of examples to train on. Defaults to half the examples that the
            Trainer has seen, or 3200 if unknown.
        seed: Seed of the order of examples and ranks.

    Raises:
        MatryoshkaError: The adapter is merged, sharded or not active, max_examples is not positive,
            or no validation example has a label. The adapter is unchanged.
        NotFiniteError: The loss or a gradient is not finite. The factors are as before training.
    """
    _check_arguments(layers, max_examples)
    if len(layers.nesting.ranks) == 1:
        logger.info("Rank %d is the only nested rank; nothing to train.", layers.nesting.max_rank)
        if layers.order is None:
            layers.reorder()
        return TrainRanksResult(None, "nothing to train", {}, {}, None)
    num_examples = _default_num_examples(data) if max_examples is None else max_examples
    split = _split(data, round_up_to_processes(num_examples), seed)
    if layers.order is None:
        layers.reorder()
    batches = split.validation_batches

    def measure_gaps() -> dict[int, float]:
        return validation_losses(layers, data, split.gap_batches).gaps()

    with trainable_factors(layers):
        before = validation_losses(layers, data, batches)
        gain = base_loss(layers, data, batches) - before.mean(layers.nesting.max_rank)
        largest_gap = max(before.gaps().values())
        smallest_gap = max(ROUNDING, _share_of_gain(SMALLEST_GAP, gain))
        if largest_gap <= smallest_gap:
            _log_nothing_to_train(before, smallest_gap)
            return TrainRanksResult(None, "nothing to train", {}, before.means(), None)
        factors = layers.copy_factors()
        examples_by_rank = train_prefixes(
            layers, data, split.training_indices, before.gaps(), measure_gaps, seed
        )
        after = validation_losses(layers, data, batches)
        _log_losses(before, after)
        is_better = _is_better(before, after, _share_of_gain(MAX_LOSS_INCREASE, gain))
        if is_better:
            layers.mark_ordered("trained")
        else:
            layers.write_factors(factors)
    return TrainRanksResult(
        None,
        "kept" if is_better else "not better",
        examples_by_rank,
        before.means(),
        after.means(),
    )


def _check_arguments(layers: NestedLayers, max_examples: int | None) -> None:
    """Raise MatryoshkaError unless the ranks can be trained. Nothing is changed."""
    if max_examples is not None:
        check_integer("max_examples", max_examples)
    layers.check_not_merged("train its ranks")
    layers.check_only_active()
    layers.check_not_sharded()


def _default_num_examples(data: TrainingData) -> int:
    if data.num_examples_seen is None:
        return MAX_EXAMPLES
    return max(EXAMPLES_PER_STEP, round(data.num_examples_seen * MAX_SHARE_OF_SEEN))


def _split(data: TrainingData, num_training: int, seed: int) -> Split:
    num_validation = round(VALIDATION_SHARE * num_training)
    num_validation = min(max(num_validation, MIN_VALIDATION_EXAMPLES), MAX_VALIDATION_EXAMPLES)
    with torch.random.fork_rng(devices=[]):  # a collator may draw random numbers
        split = data.split(num_training, num_validation, seed)
    if not split.is_held_out:
        logger.warning(
            "There is no evaluation set, so the ranks are validated on training examples. Pass "
            "`eval_dataset` to the Trainer, or `eval_data`."
        )
    return split


def _share_of_gain(share: float, gain: float) -> float:
    """Return a share of the gain of rank R, from 0 to `MAX_TOLERANCE` nats."""
    return min(share * max(0.0, gain), MAX_TOLERANCE)


def _is_better(before: ValidationLosses, after: ValidationLosses, max_increase: float) -> bool:
    """Return whether to keep the trained factors, and warn of what became worse.

    Args:
        before: The losses before training.
        after: The losses after training.
        max_increase: The maximum increase of the loss of rank R, in nats, if it were measured
            without error.
    """
    *smaller_ranks, max_rank = before.by_rank
    change = before.paired_change(after, smaller_ranks)
    max_rank_change = before.paired_change(after, [max_rank])
    is_significant = change.mean < -NUM_STANDARD_ERRORS * change.standard_error
    is_worse_at_max_rank = max_rank_change.mean > max_increase + max_rank_change.standard_error
    if not is_significant or is_worse_at_max_rank:
        warnings.warn(
            "The trained ranks are not kept: training would change the mean validation loss of the "
            f"ranks below {max_rank} by {change.mean:+.3f} ± {change.standard_error:.3f} (standard "
            f"error), and that of rank {max_rank} by {max_rank_change.mean:+.3f} ± "
            f"{max_rank_change.standard_error:.3f}.",
            stacklevel=4,
        )
        return False
    worse_ranks: list[str] = []
    for rank in smaller_ranks:
        rank_change = before.paired_change(after, [rank])
        if rank_change.mean > NUM_STANDARD_ERRORS * rank_change.standard_error + ROUNDING:
            worse_ranks.append(f"{rank} (by {rank_change.mean:.3f})")
    if worse_ranks:
        warnings.warn(
            f"Ranks whose validation loss increased: {', '.join(worse_ranks)}.", stacklevel=4
        )
    return True


def _log_nothing_to_train(losses: ValidationLosses, smallest_gap: float) -> None:
    losses_by_rank = ", ".join(f"{rank}: {loss:.3f}" for rank, loss in losses.means().items())
    logger.info(
        "All ranks are as good as rank %d, within %.3f nats (%s): nothing to train.",
        max(losses.by_rank),
        smallest_gap,
        losses_by_rank,
    )


def _log_losses(before: ValidationLosses, after: ValidationLosses) -> None:
    changes = ", ".join(
        f"rank {rank}: {before.mean(rank):.3f} to {after.mean(rank):.3f}" for rank in before.by_rank
    )
    logger.info("Validation losses: %s.", changes)
