"""Train the prefixes of a small adapter, which serves the low ranks of a nested adapter."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate.state import PartialState
from accelerate.utils import gather, reduce
from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.lora.results import TrainRanksResult
from matryoshka_lora.progress import training_bar
from matryoshka_lora.tensors import at_least_float32, restored_modes
from matryoshka_lora.training.data import Batch, TrainingData, num_terms
from matryoshka_lora.training.factors import FactorMatrices, ModelFactors

_GOLDEN_RATIO = 0.6180339887  # its multiples modulo 1 fill the unit interval evenly
_BETAS = (0.9, 0.99)  # the later components have few steps, so the second must be small
# Scales of the loss. The first keeps small gradients of float16 from underflow, and the second is
# used if large ones overflow. Powers of two do not change the digits of other dtypes.
_GRADIENT_SCALES = (2.0**10, 1.0)
_NUM_LOGS = 20  # entries of a Trainer's log with the losses of training
_FORWARDS_PER_STEP = 3  # the time of a forward and a backward, in forwards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hyperparameters:
    """How the low ranks are trained.

    The unit of a loss is a nat. Of a loss of the user, it is the loss of the base model, so that a
    multiple of the loss has the same result.

    Attributes:
        max_examples: The number of examples if the number seen in training is unknown.
        share_of_seen: The number of examples, relative to the number seen in training.
        num_validation: The maximum number of validation examples.
        examples_per_step: The number of examples of a step, over all processes.
        learning_rate: The learning rate of rank 1, relative to the root mean square (RMS) of each
            component.
        rate_exponent: The learning rate of rank r is ``learning_rate * r ** -rate_exponent``.
        reference_layers: With n layers above this number the rate is divided by
            ``sqrt(n / reference_layers)``, because the changes of the layers add up.
        warmup: The share of warmup steps; then the rate decays linearly to 0.
        tail_factor: The initial weight of the components beyond the trained rank.
        tail_steps: The share of the steps after which this weight is 0.
        smallest_gap: The gap of a rank that is worth training, relative to the gain: the difference
            between the losses of the base model and of rank R.
        max_gap: The maximum of this gap, in nats; for a loss of the user, relative to that of rank
            R. The gain is large if the base model does not know where an answer ends, and a share
            of it would hide the gaps.
        min_gap: Its minimum, in units.
        epsilon: Adam's epsilon, in units.
    """

    max_examples: int = 3200
    share_of_seen: float = 0.5
    num_validation: int = 64
    examples_per_step: int = 8
    learning_rate: float = 0.1
    rate_exponent: float = 0.3
    reference_layers: float = 14
    warmup: float = 0.05
    tail_factor: float = 0.5
    tail_steps: float = 0.5
    smallest_gap: float = 0.02
    max_gap: float = 0.05
    min_gap: float = 1e-3
    epsilon: float = 1e-8


def train_ranks(
    factors: ModelFactors,
    ranks: Sequence[int],
    data: TrainingData,
    max_examples: int | float | None = None,
    seed: int = 0,
    hyperparameters: Hyperparameters | None = None,
) -> tuple[TrainRanksResult, FactorMatrices | None]:
    """Train a small adapter, whose prefixes are the low ranks. The factors stay as they are.

    It begins as the first k components, where k is the smallest nested rank that is about as good
    as rank R. Each step trains the prefix of one rank up to k; see `train_prefixes`. It is kept up
    to the largest nested rank for which neither this rank nor a smaller one has a larger validation
    loss than before.

    Without an evaluation set, training examples validate.

    A Trainer logs the training loss of each rank as ``train_ranks/rank_1_loss``, and its validation
    loss as ``train_ranks/rank_1_validation_loss``, at steps that continue its own.

    Every process of torch.distributed must call this function, each with all factors. Each
    computes a share of the losses and gradients.

    Args:
        factors: The ordered factors.
        ranks: The nested ranks, increasing. The last one is R.
        data: From `read_training_data`.
        max_examples: The number of examples to train on; a float is relative to the number that
            the Trainer has seen. Defaults to half of them, or 3200 if unknown.
        seed: Seed of the order of examples and ranks.
        hyperparameters: Defaults to `Hyperparameters`.

    Returns:
        The result; and A, shape (k, in), and B, shape (out, k), of each layer, or None if nothing
        was trained or kept.

    Raises:
        NoExamplesError: No validation example has a label.
        NotFiniteError: The loss or a gradient is not finite.
    """
    options = hyperparameters or Hyperparameters()
    num_examples = _num_examples(max_examples, data, options)
    with torch.random.fork_rng(devices=[]):  # a collator may draw random numbers
        split = data.split(num_examples, options.num_validation, seed)
    is_held_out = data.validation is not None
    if not is_held_out:
        logger.warning(
            "There is no evaluation set, so the ranks are validated on training examples. Pass "
            "`eval_data`, or `eval_dataset` to the Trainer."
        )
    with trainable_factors(factors):
        start = time.perf_counter()
        before = validation_losses(factors, (0, *ranks), data, split.validation_batches)
        seconds_per_rank = (time.perf_counter() - start) / len(before)
        *smaller_ranks, max_rank = ranks
        base_loss = before.pop(0)
        if data.has_custom_loss:
            unit = abs(base_loss) or 1.0
            options = replace(
                options,
                min_gap=unit * options.min_gap,
                max_gap=abs(before[max_rank]) * options.max_gap,
                epsilon=unit * options.epsilon,
            )
        gain = max(0.0, base_loss - before[max_rank])
        if gain == 0:
            hint = " Or `loss` ignores its argument `model`." if data.has_custom_loss else ""
            warnings.warn(
                f"The loss of rank {max_rank}, {before[max_rank]:.4g}, is not lower than that of "
                f"the base model, {base_loss:.4g}. Train the adapter longer.{hint}",
                stacklevel=3,
            )
        max_gap = max(options.min_gap, min(options.smallest_gap * gain, options.max_gap))
        behind = [rank for rank in smaller_ranks if before[rank] - before[max_rank] > max_gap]
        result = TrainRanksResult(
            None,
            "nothing to train",
            losses_before=before,
            is_held_out=is_held_out,
            base_loss=base_loss,
            max_gap=max_gap,
        )
        if not behind:
            logger.info(
                "All ranks are as good as rank %d, within %.3g (%s): nothing to train.",
                max_rank,
                max_gap,
                ", ".join(f"{rank}: {loss:.4g}" for rank, loss in before.items()),
            )
            return replace(result, seconds=time.perf_counter() - start), None
        # The first rank above all that are behind, or else the largest one below R.
        k = min([rank for rank in smaller_ranks if rank > behind[-1]], default=smaller_ranks[-1])
        low_ranks = [rank for rank in smaller_ranks if rank <= k]
        ratio = num_examples / split.num_validation
        expected_tokens = ratio * sum(map(_num_tokens, split.validation_batches))
        seconds = (_FORWARDS_PER_STEP * ratio + len(low_ranks)) * seconds_per_rank
        logger.info(
            "Training the ranks up to %d on %d examples, %.1f passes over %d%s. Estimated time: "
            "%s.",
            k,
            num_examples,
            num_examples / len(data.examples),
            len(data.examples),
            f", about {expected_tokens:,.0f} tokens" if expected_tokens else "",
            tqdm.format_interval(seconds),
        )
        _log_validation(data, before, step=0)
        num_steps = math.ceil(num_examples / _round_up_to_processes(options.examples_per_step))
        trained, examples_by_rank, num_tokens = train_prefixes(
            factors, range(ranks[0], k + 1), data, split.training_indices, seed, options
        )
        factors.write_prefix(trained)
        after = validation_losses(factors, low_ranks, data, split.validation_batches)
        _log_validation(data, after, num_steps)
    result = replace(
        result,
        outcome="not better",
        examples_by_rank=examples_by_rank,
        losses_after=after,
        num_tokens=num_tokens,
        seconds=time.perf_counter() - start,
    )
    for rank in low_ranks:
        if after[rank] > before[rank]:
            break
        result = replace(result, outcome="kept", small_rank=rank)
    if result.outcome == "not better":
        warnings.warn(
            "The trained ranks are not kept: training would change the validation loss of rank "
            f"{low_ranks[0]} from {before[low_ranks[0]]:.4g} to {after[low_ranks[0]]:.4g}.",
            stacklevel=3,
        )
        return result, None
    k = result.small_rank
    return result, {name: (A[:k], B[:, :k]) for name, (A, B) in trained.items()}


def _num_examples(
    max_examples: int | float | None, data: TrainingData, options: Hyperparameters
) -> int:
    """Return the number of examples to train on, a multiple of the number of processes."""
    if max_examples is None:
        max_examples = options.max_examples
        if data.num_examples_seen is not None:
            max_examples = options.share_of_seen
    if isinstance(max_examples, float):
        if data.num_examples_seen is None:
            raise MatryoshkaError(
                f"`max_examples={max_examples}` is relative to the number of examples that a "
                "Trainer has seen, and that is unknown. Pass a number of examples, such as "
                f"{options.max_examples}."
            )
        num_examples = round(data.num_examples_seen * max_examples)
        max_examples = max(options.examples_per_step, num_examples)
    return _round_up_to_processes(max_examples)


def _log_validation(data: TrainingData, losses: Mapping[int, float], step: int) -> None:
    if data.log is not None:
        metrics = {f"train_ranks/rank_{r}_validation_loss": loss for r, loss in losses.items()}
        data.log(metrics, step)


@contextmanager
def trainable_factors(factors: ModelFactors) -> Iterator[None]:
    """Return a context in which only the factors are trainable, without dropout.

    At the end the factors, the modes, ``requires_grad`` and the random state of torch are as
    before, and no parameter has a gradient.
    """
    model = factors.model
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = {parameter.device for parameter in model.parameters()}
    cuda_devices = [device for device in devices if device.type == "cuda"]
    random_state = torch.random.fork_rng(devices=cuda_devices)
    with restored_modes(model), random_state, factors.restored():
        try:
            for module in model.modules():
                # Gradient checkpointing needs train mode. Layers that call dropout as a function,
                # with a probability of their own, must be in eval mode nevertheless.
                attributes = vars(module)
                has_checkpoints = attributes.get("gradient_checkpointing", False)
                module.training = bool(has_checkpoints and not attributes.get("dropout"))
            model.requires_grad_(False)
            for A, B in factors.trained_parameters().values():
                A.requires_grad_()
                B.requires_grad_()
            yield
        finally:
            model.zero_grad(set_to_none=True)
            for parameter, flag in requires_grad:
                parameter.requires_grad_(flag)


def validation_losses(
    factors: ModelFactors, ranks: Sequence[int], data: TrainingData, batches: Sequence[Batch]
) -> dict[int, float]:
    """Return the loss of some prefixes of the factors, in nats per token.

    Of several processes, each computes a share of the batches, and all return the same.

    Args:
        ranks: The ranks, from 0 to R. Rank 0 is the base model.
        batches: Validation batches, the same in each process.

    Raises:
        NotFiniteError: A loss is NaN or infinite.
    """
    num_terms_of_batches = _map_over_batches(num_terms, batches, data.device)
    weights = num_terms_of_batches / num_terms_of_batches.sum()
    losses: dict[int, float] = {}
    is_shown = data.show_progress and PartialState().is_main_process
    for rank in training_bar(ranks, "validating ranks", is_shown=is_shown, leave=False):
        q = (torch.arange(factors.max_rank) < rank).double()
        with torch.no_grad(), factors.masked(q):
            losses_of_batches = _map_over_batches(
                lambda batch: data.loss(batch).item(), batches, data.device
            )
        losses[rank] = float(weights @ losses_of_batches)
        _check_finite(losses[rank])
    return losses


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


def train_prefixes(
    factors: ModelFactors,
    ranks: Sequence[int],
    data: TrainingData,
    indices: Sequence[int],
    seed: int,
    options: Hyperparameters,
) -> tuple[FactorMatrices, dict[int, int], int]:
    """Train prefixes of the factors on some examples.

    Each step trains one rank r, and a rank gets a share of the steps in proportion to 1 / r. A step
    descends the loss of the first r components, and changes no other. The later ones stay in the
    forward with a weight that falls from a half to 0, so that training begins near the loss of rank
    R. The learning rate is relative to the size of each component, and smaller for larger ranks.
    Of several processes, each computes the gradients of a share of a step's examples.

    Call it within `trainable_factors`, which restores the factors.

    Args:
        ranks: The ranks to train, increasing.
        indices: The indices of the examples to train on, in order.

    Returns:
        The trained components: A, shape (k, in), and B, shape (out, k), of each layer, in the dtype
        of the parameters, where k is the largest of the ranks; the number of examples that each
        rank was trained on; and the number of tokens of all of them.

    Raises:
        NotFiniteError: The loss or a gradient is not finite.
    """
    examples_per_step = _round_up_to_processes(options.examples_per_step)
    num_steps = math.ceil(len(indices) / examples_per_step)
    total = sum(1 / rank for rank in ranks)
    schedule = rank_schedule({rank: 1 / rank / total for rank in ranks}, seed)
    k = max(ranks)
    start = factors.copy(k)
    factors.write_prefix(start)
    optimizer = PrefixAdam(start, options.epsilon)
    layer_factor = min(1.0, (options.reference_layers / len(factors.parameters)) ** 0.5)
    steps_per_log = math.ceil(num_steps / _NUM_LOGS)
    losses: dict[int, list[float]] = {}
    num_examples: Counter[int] = Counter()
    num_tokens = 0
    state = PartialState()
    is_shown = data.show_progress and state.is_main_process
    progress = training_bar(range(num_steps), "training ranks", is_shown=is_shown)
    for step in progress:
        rank = next(schedule)
        step_indices = indices[step * examples_per_step : (step + 1) * examples_per_step]
        num_examples[rank] += len(step_indices)
        batches = data.batches(step_indices[state.process_index :: state.num_processes])
        if state.num_processes > 1:
            # Batches without labels are omitted, perhaps not in all processes.
            num_batches = gather(torch.tensor([len(batches)], device=data.device)).min()
            batches = batches[: int(num_batches)]
        num_tokens += sum(map(_num_tokens, batches))
        q = torch.ones(factors.max_rank, dtype=torch.float64)
        q[rank:] = options.tail_factor * max(0.0, 1 - step / (options.tail_steps * num_steps))
        with factors.masked(q):
            loss, gradients = loss_and_gradients(factors, rank, data, batches)
        warmup = min(1.0, (step + 1) / max(1.0, options.warmup * num_steps))
        decay = 1 - step / num_steps
        rate = options.learning_rate * rank**-options.rate_exponent * layer_factor
        optimizer.step(gradients, rate * warmup * decay)
        factors.write_prefix(optimizer.factors())
        losses.setdefault(rank, []).append(loss)
        progress.set_postfix(rank=rank, loss=f"{loss:.3f}", refresh=False)
        is_logged = (step + 1) % steps_per_log == 0 or step + 1 == num_steps
        if data.log is not None and is_logged:
            means = {rank: sum(values) / len(values) for rank, values in sorted(losses.items())}
            metrics = {f"train_ranks/rank_{rank}_loss": mean for rank, mean in means.items()}
            data.log(metrics, step + 1)
            losses.clear()
    (total_tokens,) = _sum_over_processes([torch.tensor(num_tokens)], data.device)
    return factors.copy(k), dict(sorted(num_examples.items())), int(total_tokens)


def _num_tokens(batch: Batch) -> int:
    """Return the number of tokens of a batch, without padding; 0 if it has none."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return 0
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return int(mask.count_nonzero())
    return int(ids.numel())


def loss_and_gradients(
    factors: ModelFactors, rank: int, data: TrainingData, batches: Sequence[Batch]
) -> tuple[float, FactorMatrices]:
    """Return the mean loss over the batches of all processes, and its gradients.

    Only the first components have one: the gradient of A has the shape (rank, in), and the gradient
    of B the shape (out, rank). The dtype is at least float32.
    """
    trained = factors.trained_parameters()
    counts = [num_terms(batch) for batch in batches]
    (total_terms,) = _sum_over_processes([torch.tensor(sum(counts))], data.device)
    for scale in _GRADIENT_SCALES:
        for A, B in trained.values():
            A.grad = B.grad = None
        mean_loss = torch.zeros((), dtype=torch.float32)
        for batch, count in zip(batches, counts, strict=True):
            loss = data.loss(batch) * (count / total_terms.item())
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            mean_loss += loss.item()
        gradients = factors.gradients(rank).values()
        scaled = [at_least_float32(gradient) / scale for pair in gradients for gradient in pair]
        tensors = [mean_loss, *scaled]
        mean_loss, *tensors = _sum_over_processes(tensors, data.device)
        _check_finite(mean_loss.item())
        if torch.nn.utils.get_total_norm(tensors).isfinite():
            pairs = zip(tensors[::2], tensors[1::2], strict=True)
            return mean_loss.item(), dict(zip(trained, pairs, strict=True))
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
        epsilon: What is added to the root of the second moment of a gradient, to divide by it.
    """

    def __init__(self, factors: FactorMatrices, epsilon: float) -> None:
        self._epsilon = epsilon
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
            A.step(grad_A, learning_rate, self._epsilon)
            B.step(grad_B.T, learning_rate, self._epsilon)

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

    def step(self, gradient: Tensor, learning_rate: float, epsilon: float) -> None:
        """Update the first components, one for each row of the gradient."""
        rank = len(gradient)
        gradient = gradient * self.sizes[:rank]
        first_moment = self._first_moment[:rank].lerp_(gradient, 1 - _BETAS[0])
        second_moment = self._second_moment[:rank].lerp_(gradient.square(), 1 - _BETAS[1])
        num_steps = self._num_steps[:rank].add_(1)
        first_moment = first_moment / (1 - _BETAS[0] ** num_steps)
        second_moment = second_moment / (1 - _BETAS[1] ** num_steps)
        self.values[:rank] -= learning_rate * first_moment / (second_moment.sqrt() + epsilon)


def rank_schedule(shares: Mapping[int, float], seed: int) -> Iterator[int]:
    """Yield ranks indefinitely, so that each gets its share of the steps evenly over time.

    Args:
        shares: The share of each rank; their sum is 1.
        seed: Seed of where the schedule begins.
    """
    ranks, limits = list(shares), list(itertools.accumulate(shares.values()))
    limits[-1] = 1.0  # rounding may leave the sum below it
    point = random.Random(seed).random()
    while True:
        yield ranks[bisect.bisect(limits, point)]
        point = math.fmod(point + _GOLDEN_RATIO, 1.0)


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
