"""Briefly train every rank of an adapter after its training."""

from __future__ import annotations

import logging
import math
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import gather, reduce
from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.errors import NotFiniteError
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.lora.results import TrainRanksResult
from matryoshka_lora.progress import training_bar
from matryoshka_lora.tensors import at_least_float32
from matryoshka_lora.training.data import Batch, Split, TrainingData, num_terms
from matryoshka_lora.training.factors import FactorMatrices, ModelFactors

_GOLDEN_RATIO = 0.6180339887  # its multiples modulo 1 fill the unit interval evenly
_BETAS = (0.9, 0.99)  # the later components have few steps, so the second must be small
_EPSILON = 1e-8
# Scales of the loss. The first keeps small gradients of float16 from underflow, and the second is
# used if large ones overflow. Powers of two do not change the digits of other dtypes.
_GRADIENT_SCALES = (2.0**10, 1.0)
_NUM_LOGS = 20  # entries of a Trainer's log with the losses of training
_FORWARDS_PER_STEP = 3  # the time of a forward and a backward, in forwards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hyperparameters:
    """How the ranks are trained, and when the trained factors are kept.

    Losses are in nats. The gain is the difference between the losses of the base model and of
    rank R.

    Attributes:
        max_examples: The number of examples if the number seen in training is unknown.
        share_of_seen: The number of examples, relative to the number seen in training.
        examples_per_step: The number of examples of a step, over all processes.
        learning_rate: The learning rate relative to the root mean square (RMS) of each component.
        reference_layers: With n layers above this number the rate is divided by
            ``sqrt(n / reference_layers)``, because the changes of the layers add up.
        warmup: The share of warmup steps; then the rate decays linearly to 0.
        tail_factor: The initial weight of the components beyond the trained rank.
        tail_steps: The share of the steps after which this weight is 0.
        max_rank_share: The share of the steps for rank R, which has no gap.
        final_max_rank_share: The share of the final steps for rank R. These steps are small, and
            lower the loss of rank R again.
        final_steps: The share of the final steps.
        max_measurements: The maximum number of times that the gaps are measured during training.
        min_steps_between_measurements: The minimum number of steps between two measurements.
        smallest_gap: The gap of a rank that is worth training, relative to the gain.
        max_loss_increase: The maximum increase of the loss of rank R, relative to the gain.
        max_tolerance: The maximum of both limits, in nats. The gain is large if the base model does
            not know where an answer ends, and a share of it would hide the gaps.
        num_standard_errors: Changes of fewer standard errors are ignored.
        rounding: Smaller gaps are ignored, in nats.
        validation_share: The number of validation examples, relative to ``max_examples``.
        min_validation_examples: The minimum number of validation examples.
        max_validation_examples: The maximum number of validation examples.
    """

    max_examples: int = 3200
    share_of_seen: float = 0.5
    examples_per_step: int = 8
    learning_rate: float = 0.05
    reference_layers: float = 14
    warmup: float = 0.05
    tail_factor: float = 0.5
    tail_steps: float = 0.5
    max_rank_share: float = 1 / 8
    final_max_rank_share: float = 1 / 3
    final_steps: float = 1 / 6
    max_measurements: int = 5
    min_steps_between_measurements: int = 64
    smallest_gap: float = 0.02
    max_loss_increase: float = 0.02
    max_tolerance: float = 0.05
    num_standard_errors: float = 1.0
    rounding: float = 1e-3
    validation_share: float = 1 / 32
    min_validation_examples: int = 32
    max_validation_examples: int = 64


def train_ranks(
    factors: ModelFactors,
    ranks: Sequence[int],
    data: TrainingData,
    max_examples: int | None = None,
    seed: int = 0,
    hyperparameters: Hyperparameters | None = None,
) -> TrainRanksResult:
    """Train every rank from the smallest nested rank to R; rank R changes a little.

    Each step trains one rank; ranks whose loss is further behind rank R's get more steps. See
    `train_prefixes`. Losses are measured relative to the gain of rank R: how much it lowers the
    loss of the base model.

    The trained factors are kept if the mean validation loss of the ranks below R has improved by
    more than its standard error, and the loss of rank R has not increased by more than its standard
    error above two percent of the gain, or above 0.05 nats if that is less. Otherwise the factors
    are restored, with a warning. If no rank is behind rank R by this share of the gain, nothing is
    trained.

    Without an evaluation set, training examples validate.

    A Trainer logs the training loss of each rank as ``train_ranks/rank_1_loss``, and its validation
    loss as ``train_ranks/rank_1_validation_loss``, at steps that continue its own.

    Every process of torch.distributed must call this function, each with all factors. Each
    computes a share of the losses and gradients.

    Args:
        factors: The factors, ordered by SVD or by an earlier training of the ranks.
        ranks: The nested ranks, increasing. The last one is R.
        data: From `read_training_data`.
        max_examples: The number of examples to train on. Defaults to half the examples that the
            Trainer has seen, or 3200 if unknown.
        seed: Seed of the order of examples and ranks.
        hyperparameters: Defaults to `Hyperparameters`.

    Raises:
        NoExamplesError: No validation example has a label. The factors are unchanged.
        NotFiniteError: The loss or a gradient is not finite. The factors are as before training.
    """
    options = hyperparameters or Hyperparameters()
    if max_examples is None:
        max_examples = options.max_examples
        if data.num_examples_seen is not None:
            num_examples = round(data.num_examples_seen * options.share_of_seen)
            max_examples = max(options.examples_per_step, num_examples)
    max_examples = _round_up_to_processes(max_examples)
    max_validation = round(options.validation_share * max_examples)
    max_validation = max(max_validation, options.min_validation_examples)
    max_validation = min(max_validation, options.max_validation_examples)
    with torch.random.fork_rng(devices=[]):  # a collator may draw random numbers
        split = data.split(max_examples, max_validation, seed)
    if not split.is_held_out:
        logger.warning(
            "There is no evaluation set, so the ranks are validated on training examples. Pass "
            "`eval_dataset` to the Trainer, or `eval_data`."
        )

    with trainable_factors(factors) as original_factors:
        start = time.perf_counter()
        before = validation_losses(factors, ranks, data, split.validation_batches)
        seconds_per_rank = (time.perf_counter() - start) / len(ranks)
        base_loss = validation_losses(factors, [0], data, split.validation_batches).mean(0)
        gain = max(0.0, base_loss - before.mean(ranks[-1]))
        smallest_gap = min(options.smallest_gap * gain, options.max_tolerance)
        smallest_gap = max(options.rounding, smallest_gap)
        if max(before.gaps().values()) <= smallest_gap:
            logger.info(
                "All ranks are as good as rank %d, within %.3f nats (%s): nothing to train.",
                ranks[-1],
                smallest_gap,
                ", ".join(f"{rank}: {loss:.3f}" for rank, loss in before.means().items()),
            )
            return TrainRanksResult(None, "nothing to train", {}, before.means(), None)
        _log_estimate(seconds_per_rank, len(ranks), max_examples, data, split, options)
        _log_validation(data, before, step=0)
        examples_by_rank = train_prefixes(
            factors,
            data,
            split.training_indices,
            before.gaps(),
            lambda: validation_losses(factors, ranks, data, split.gap_batches).gaps(),
            RankSchedule(seed),
            options,
        )
        after = validation_losses(factors, ranks, data, split.validation_batches)
        num_steps = math.ceil(max_examples / _round_up_to_processes(options.examples_per_step))
        _log_validation(data, after, num_steps)
        max_increase = min(options.max_loss_increase * gain, options.max_tolerance)
        is_better = _is_better(before, after, max_increase, options)
        if not is_better:
            factors.write(original_factors)
    return TrainRanksResult(
        None,
        "kept" if is_better else "not better",
        examples_by_rank,
        before.means(),
        after.means(),
    )


def _log_estimate(
    seconds_per_rank: float,
    num_ranks: int,
    num_examples: int,
    data: TrainingData,
    split: Split,
    options: Hyperparameters,
) -> None:
    """Log the examples, tokens and time of the training.

    Args:
        seconds_per_rank: The time of the validation of a rank.
        num_ranks: The number of nested ranks.
        num_examples: The number of examples to train on, repetitions included.
        data: The training data.
        split: The validation examples, about as long as the training examples.
        options: The number of measurements.
    """
    ratio = num_examples / split.num_validation
    forwards = _FORWARDS_PER_STEP * ratio
    num_steps = num_examples / options.examples_per_step
    num_measurements = num_steps // options.min_steps_between_measurements
    num_measurements = min(num_measurements, options.max_measurements)
    forwards += num_ranks * (1 + num_measurements / 2)  # a measurement takes half of the examples
    num_tokens = sum(
        batch["input_ids"].numel() for batch in split.validation_batches if "input_ids" in batch
    )
    logger.info(
        "Training the ranks on %d examples, %.1f passes over %d%s. Estimated time: %s.",
        num_examples,
        num_examples / len(data.examples),
        len(data.examples),
        f", about {ratio * num_tokens:,.0f} tokens" if num_tokens else "",
        tqdm.format_interval(forwards * seconds_per_rank),
    )


def _log_validation(data: TrainingData, losses: ValidationLosses, step: int) -> None:
    if data.log is not None:
        means = losses.means().items()
        data.log({f"train_ranks/rank_{rank}_validation_loss": loss for rank, loss in means}, step)


@contextmanager
def trainable_factors(factors: ModelFactors) -> Iterator[FactorMatrices]:
    """Make only the factors trainable and disable dropout.

    At the end the modes, ``requires_grad`` and the random state of torch are as before, and no
    parameter has a gradient. After an exception the factors are also as before.

    Yields:
        A copy of the factors.
    """
    model = factors.model
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters()}
    cuda_devices = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda_devices), factors.restored_after_error() as original:
        try:
            for module, _ in modes:
                # Gradient checkpointing needs train mode. Layers that call dropout as a function,
                # with a probability of their own, must be in eval mode nevertheless.
                attributes = vars(module)
                has_checkpoints = attributes.get("gradient_checkpointing", False)
                module.training = bool(has_checkpoints and not attributes.get("dropout"))
            model.requires_grad_(False)
            for A, B in factors.parameters.values():
                A.requires_grad_()
                B.requires_grad_()
            yield original
        finally:
            model.zero_grad(set_to_none=True)
            for parameter, flag in requires_grad:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


# Validation


@dataclass(frozen=True)
class ValidationLosses:
    """The losses of some ranks on the same batches, in nats per token.

    Attributes:
        weights: The share of each batch in the terms of the mean loss, shape (batches,).
        by_rank: The loss of each batch at each rank, shape (batches,).
    """

    weights: Float64Array
    by_rank: dict[int, Float64Array]

    def mean(self, rank: int) -> float:
        """Return the loss of a rank over all batches."""
        return float(self.weights @ self.by_rank[rank])

    def means(self) -> dict[int, float]:
        """Return the loss of each rank over all batches."""
        return {rank: self.mean(rank) for rank in self.by_rank}

    def gaps(self) -> dict[int, float]:
        """Return how much the loss of each rank exceeds the loss of rank R, at least 0."""
        max_rank_loss = self.mean(max(self.by_rank))
        return {rank: max(0.0, loss - max_rank_loss) for rank, loss in self.means().items()}

    def paired_change(self, after: ValidationLosses, ranks: Sequence[int]) -> PairedChange:
        """Return the change of the mean loss of some ranks, from batch to batch.

        Args:
            after: The losses on the same batches after training.
            ranks: Some of the ranks.
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


def validation_losses(
    factors: ModelFactors, ranks: Sequence[int], data: TrainingData, batches: Sequence[Batch]
) -> ValidationLosses:
    """Return the losses of some ranks. Rank 0 is the base model.

    Of several processes, each computes a share of the batches, and all return the same.

    Args:
        factors: The factors.
        ranks: The ranks, from 0 to R.
        data: Its ``loss`` computes the loss of a batch.
        batches: Validation batches, the same in each process.

    Raises:
        NotFiniteError: A loss is NaN or infinite.
    """
    num_terms_of_batches = _map_over_batches(num_terms, batches, data.device)
    losses: dict[int, Float64Array] = {}
    is_shown = data.show_progress and PartialState().is_main_process
    for rank in training_bar(ranks, "validating ranks", is_shown=is_shown, leave=False):
        q = (torch.arange(factors.max_rank) < rank).double()
        with torch.no_grad(), factors.masked(q):
            losses[rank] = _map_over_batches(
                lambda batch: data.loss(batch).item(), batches, data.device
            )
        _check_finite(float(losses[rank].sum()))
    return ValidationLosses(num_terms_of_batches / num_terms_of_batches.sum(), losses)


def _map_over_batches(
    function: Callable[[Batch], float], batches: Sequence[Batch], device: torch.device
) -> Float64Array:
    """Return the value of each batch, shape (batches,). Each process computes a share."""
    state = PartialState()
    values = torch.zeros(len(batches), dtype=torch.float64)
    last_index = len(batches) - 1
    for start in range(0, len(batches), state.num_processes):
        index = start + state.process_index
        # Without a batch of its own, a process computes the last one and ignores the value: the
        # function may communicate.
        value = function(batches[min(index, last_index)])
        if index <= last_index:
            values[index] = value
    return _sum_over_processes([values], device)[0].numpy()


def _is_better(
    before: ValidationLosses,
    after: ValidationLosses,
    max_increase: float,
    options: Hyperparameters,
) -> bool:
    """Return whether to keep the trained factors, and warn of ranks that became worse.

    Args:
        before: The losses before training.
        after: The losses after training.
        max_increase: The maximum increase of the loss of rank R, in nats, if it were measured
            without error.
        options: The other limits.
    """
    *smaller_ranks, max_rank = before.by_rank
    change = before.paired_change(after, smaller_ranks)
    max_rank_change = before.paired_change(after, [max_rank])
    is_significant = change.mean < -options.num_standard_errors * change.standard_error
    is_worse_at_max_rank = max_rank_change.mean > max_increase + max_rank_change.standard_error
    if not is_significant or is_worse_at_max_rank:
        warnings.warn(
            "The trained ranks are not kept: training would change the mean validation loss of the "
            f"ranks below {max_rank} by {change.mean:+.3f} ± {change.standard_error:.3f} (standard "
            f"error), and the loss of rank {max_rank} by {max_rank_change.mean:+.3f} ± "
            f"{max_rank_change.standard_error:.3f}.",
            stacklevel=4,
        )
        return False
    worse_ranks: list[str] = []
    for rank in before.by_rank:
        rank_change = before.paired_change(after, [rank])
        limit = options.num_standard_errors * rank_change.standard_error + options.rounding
        if rank_change.mean > limit:
            worse_ranks.append(f"{rank} (by {rank_change.mean:.3f})")
    if worse_ranks:
        warnings.warn(
            f"Ranks whose validation loss increased: {', '.join(worse_ranks)}.", stacklevel=4
        )
    return True


# Training


def train_prefixes(
    factors: ModelFactors,
    data: TrainingData,
    indices: Sequence[int],
    gaps: Mapping[int, float],
    measure_gaps: Callable[[], Mapping[int, float]],
    schedule: RankSchedule,
    options: Hyperparameters,
) -> dict[int, int]:
    """Train the factors on some examples.

    Each step trains one rank; see `rank_shares`. Of several processes, each computes the gradients
    of a share of its examples. A step at rank r descends the loss of the first r components, and
    changes no other. The later ones stay in the forward with a weight that falls from a half to 0,
    so that training begins near the loss of rank R. The learning rate is relative to the size of
    each component: large ones, which come first, move most.

    Call it within `trainable_factors`.

    Args:
        factors: The ordered factors.
        data: The examples.
        indices: The indices of the examples to train on, in order.
        gaps: How much the loss of each nested rank exceeds the loss of rank R.
        measure_gaps: Measures the gaps again at a later step.
        schedule: Chooses the rank of each step.
        options: The other hyperparameters.

    Returns:
        The number of examples that each rank was trained on.

    Raises:
        NotFiniteError: The loss or a gradient is not finite.
    """
    examples_per_step = _round_up_to_processes(options.examples_per_step)
    num_steps = math.ceil(len(indices) / examples_per_step)
    steps_of_phase = math.ceil(num_steps / (options.max_measurements + 1))
    steps_of_phase = max(options.min_steps_between_measurements, steps_of_phase)
    optimizer = PrefixAdam(factors.copy())
    layer_factor = min(1.0, (options.reference_layers / len(factors.parameters)) ** 0.5)
    steps_per_log = math.ceil(num_steps / _NUM_LOGS)
    losses: dict[int, list[float]] = {}
    num_examples: Counter[int] = Counter()
    state = PartialState()
    is_shown = data.show_progress and state.is_main_process
    progress = training_bar(range(num_steps), "training ranks", is_shown=is_shown)
    for step in progress:
        if step > 0 and step % steps_of_phase == 0:
            gaps = measure_gaps()
        is_final = step >= (1 - options.final_steps) * num_steps
        max_rank_share = options.final_max_rank_share if is_final else options.max_rank_share
        rank = schedule.next(rank_shares(gaps, max_rank_share))
        step_indices = indices[step * examples_per_step : (step + 1) * examples_per_step]
        num_examples[rank] += len(step_indices)
        batches = data.batches(step_indices[state.process_index :: state.num_processes])
        if state.num_processes > 1:
            # Batches without labels are omitted, perhaps not in all processes.
            num_batches = gather(torch.tensor([len(batches)], device=data.device)).min()
            batches = batches[: int(num_batches)]
        q = torch.ones(factors.max_rank, dtype=torch.float64)
        q[rank:] = options.tail_factor * max(0.0, 1 - step / (options.tail_steps * num_steps))
        with factors.masked(q):
            loss, gradients = loss_and_gradients(factors, rank, data, batches)
        warmup = min(1.0, (step + 1) / max(1.0, options.warmup * num_steps))
        decay = 1 - step / num_steps
        optimizer.step(gradients, options.learning_rate * layer_factor * warmup * decay)
        factors.write(optimizer.factors())
        losses.setdefault(rank, []).append(loss)
        progress.set_postfix(rank=rank, loss=f"{loss:.3f}", refresh=False)
        is_logged = (step + 1) % steps_per_log == 0 or step + 1 == num_steps
        if data.log is not None and is_logged:
            means = {rank: sum(values) / len(values) for rank, values in sorted(losses.items())}
            metrics = {f"train_ranks/rank_{rank}_loss": mean for rank, mean in means.items()}
            data.log(metrics, step + 1)
            losses.clear()
    return dict(sorted(num_examples.items()))


def loss_and_gradients(
    factors: ModelFactors, rank: int, data: TrainingData, batches: Sequence[Batch]
) -> tuple[float, FactorMatrices]:
    """Return the mean loss over the batches of all processes, and its gradients.

    Only the first components have one: the gradient of A has the shape (rank, in), and the gradient
    of B the shape (out, rank). The dtype is at least float32.
    """
    counts = [num_terms(batch) for batch in batches]
    (total_terms,) = _sum_over_processes([torch.tensor(sum(counts))], data.device)
    for scale in _GRADIENT_SCALES:
        factors.model.zero_grad(set_to_none=True)
        mean_loss = torch.zeros((), dtype=torch.float32)
        for batch, count in zip(batches, counts, strict=True):
            loss = data.loss(batch) * (count / total_terms.item())
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            mean_loss += loss.item()
        tensors = [mean_loss]
        for A, B in factors.parameters.values():
            for parameter, index in ((A, (slice(rank),)), (B, (slice(None), slice(rank)))):
                gradient = parameter.grad
                if gradient is None:  # the layer was not used
                    gradient = torch.zeros_like(parameter)
                tensors.append(at_least_float32(gradient.flatten(1)[index]) / scale)
        mean_loss, *tensors = _sum_over_processes(tensors, data.device)
        _check_finite(mean_loss.item())
        if torch.nn.utils.get_total_norm(tensors).isfinite():
            pairs = zip(tensors[::2], tensors[1::2], strict=True)
            return mean_loss.item(), dict(zip(factors.parameters, pairs, strict=True))
    raise NotFiniteError(
        "Gradients are NaN or infinite. Load the base model in bfloat16 or float32. Or reorder the "
        "adapter, which needs no gradients."
    )


class PrefixAdam:
    """Adam on the components of the factors: the rows of A and the columns of B.

    Adam moves each number by about its learning rate, so it works on components that are divided by
    their size, and the learning rate is a share of the size. Each component counts its own steps
    and has its own momentum, so a step at rank r leaves the later ones as they are. The optimizers
    of PyTorch would move them too.

    Args:
        factors: A, shape (R, in), and B, shape (out, R), of each layer.
    """

    def __init__(self, factors: FactorMatrices) -> None:
        self._components = {
            name: (_Components(A), _Components(B.T)) for name, (A, B) in factors.items()
        }

    def step(self, gradients: FactorMatrices, learning_rate: float) -> None:
        """Update the first components of all layers.

        Args:
            gradients: By layer, of A, shape (r, in), and of B, shape (out, r).
            learning_rate: The learning rate, relative to the size of each component.
        """
        for name, (A, B) in self._components.items():
            grad_A, grad_B = gradients[name]
            A.step(grad_A, learning_rate)
            B.step(grad_B.T, learning_rate)

    def factors(self) -> FactorMatrices:
        """Return A and B of each layer."""
        return {
            name: (A.values * A.sizes, (B.values * B.sizes).T)
            for name, (A, B) in self._components.items()
        }


class _Components:
    """The components of a factor as rows, divided by their sizes, and Adam's state."""

    def __init__(self, matrix: Tensor) -> None:
        values = at_least_float32(matrix)
        # The root mean square of each row, clamped from below, to divide by.
        sizes = values.square().mean(dim=1, keepdim=True).sqrt()
        self.sizes = sizes.clamp(min=max(1e-3 * float(sizes.max()), 1e-6))
        self.values = values / self.sizes
        self._first_moment = torch.zeros_like(values)
        self._second_moment = torch.zeros_like(values)
        self._num_steps = torch.zeros_like(self.sizes)

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """Update the first components, one for each row of the gradient."""
        rank = len(gradient)
        gradient = gradient * self.sizes[:rank]
        first_moment = self._first_moment[:rank].lerp_(gradient, 1 - _BETAS[0])
        second_moment = self._second_moment[:rank].lerp_(gradient.square(), 1 - _BETAS[1])
        num_steps = self._num_steps[:rank].add_(1)
        first_moment = first_moment / (1 - _BETAS[0] ** num_steps)
        second_moment = second_moment / (1 - _BETAS[1] ** num_steps)
        self.values[:rank] -= learning_rate * first_moment / (second_moment.sqrt() + _EPSILON)


def rank_shares(gaps: Mapping[int, float], max_rank_share: float) -> dict[int, float]:
    """Return the share of the steps of each rank to train.

    A nested rank below R gets a share in proportion to the square root of its gap. The ranks
    between two nested ones are trained too, if the larger is at most twice the smaller: together
    they get as much as one nested rank whose gap is between theirs.

    Args:
        gaps: How much the loss of each nested rank exceeds the loss of rank R, at least 0.
        max_rank_share: The share of rank R.

    Returns:
        The shares of the ranks to train, in increasing order. Their sum is 1.
    """
    *smaller_ranks, max_rank = sorted(gaps)
    weights: dict[int, float] = {}
    for rank, next_rank in zip(smaller_ranks, [*smaller_ranks[1:], max_rank], strict=True):
        weights[rank] = math.sqrt(gaps[rank])
        if next_rank <= 2 * rank:
            for between in range(rank + 1, next_rank):
                position = math.log(between / rank) / math.log(next_rank / rank)
                gap = gaps[rank] * (1 - position) + gaps[next_rank] * position
                weights[between] = math.sqrt(gap) / (next_rank - rank - 1)
    total = sum(weights.values())
    if total == 0:
        return {max_rank: 1.0}
    shares = {rank: (1 - max_rank_share) * weight / total for rank, weight in weights.items()}
    shares[max_rank] = max_rank_share
    return shares


class RankSchedule:
    """Draws ranks so that each gets its share of the steps evenly over time.

    Args:
        seed: Seed of where the schedule begins.
    """

    def __init__(self, seed: int) -> None:
        self._point = random.Random(seed).random()

    def next(self, shares: Mapping[int, float]) -> int:
        """Return the rank of the next step.

        Args:
            shares: The share of each rank; their sum is 1. They may change from step to step.
        """
        point = self._point
        self._point = math.fmod(point + _GOLDEN_RATIO, 1.0)
        for rank, share in shares.items():
            point -= share
            if point < 0:
                return rank
        return max(shares)  # the shares add up to less than 1 by rounding


# Processes


def _round_up_to_processes(number: int) -> int:
    """Return the smallest multiple of the number of processes that is not below a number.

    The loss of a Trainer may communicate, so each process must compute the same number of losses.
    """
    num_processes: int = PartialState().num_processes
    return math.ceil(number / num_processes) * num_processes


def _sum_over_processes(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return the sum of each tensor over all processes, bitwise equal in each process.

    Args:
        tensors: On any device, of the same shapes in each process.
        device: A device that the backend supports; NCCL needs a GPU.
    """
    if PartialState().num_processes == 1:
        return list(tensors)
    flat = torch.cat([tensor.to(device).flatten() for tensor in tensors])
    sums = torch.split(reduce(flat, "sum"), [tensor.numel() for tensor in tensors])
    pairs = zip(sums, tensors, strict=True)
    return [values.view(tensor.shape).to(tensor) for values, tensor in pairs]


def _check_finite(loss: float) -> None:
    """Raise NotFiniteError if a loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"The loss is {loss}. Training has diverged, or the dtype of the base model is too "
            "narrow: load it in bfloat16 or float32. Or reorder the adapter, which needs no loss."
        )
