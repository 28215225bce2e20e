"""Optimizer steps, each of which trains one rank: a prefix of the factors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.errors import NotFiniteError
from matryoshka_lora.peft.fused import at_least_float32
from matryoshka_lora.peft.nested_layers import FactorMatrices, NestedLayers
from matryoshka_lora.training.data import Batch, TrainingData, num_terms
from matryoshka_lora.training.processes import (
    min_over_processes,
    process_index,
    round_up_to_processes,
    share_of_process,
    sum_over_processes,
)
from matryoshka_lora.training.schedule import RankSchedule, rank_shares, share_of_max_rank
from matryoshka_lora.training.validation import check_finite_loss, prefix_mask

EXAMPLES_PER_STEP = 8
LEARNING_RATE = 0.05
"""Learning rate relative to each component's root mean square (RMS)."""
REFERENCE_LAYERS = 14
"""Above this many layers the rate is divided by sqrt(n / 14), because the changes of the n layers
add up."""
WARMUP = 0.05
"""Share of warmup steps; then linear decay to 0."""
BETAS = (0.9, 0.99)
"""Adam's decay rates. The later components have few steps, so the second must be short."""
EPSILON = 1e-8
"""Adam's epsilon."""
TAIL_FACTOR = 0.5
"""Initial weight of the components beyond the prefix."""
TAIL_STEPS = 0.5
"""Share of the steps after which that weight is 0."""
MAX_MEASUREMENTS = 5
"""How often the gaps are measured during training."""
MIN_STEPS_BETWEEN_MEASUREMENTS = 64
GRADIENT_SCALES = (2.0**10, 1.0)
"""Scales of the loss. The first keeps small gradients of float16 from underflow, and the second is
used if large ones overflow. Powers of two do not change the digits of other dtypes."""


def train_prefixes(
    layers: NestedLayers,
    data: TrainingData,
    indices: Sequence[int],
    gaps: Mapping[int, float],
    measure_gaps: Callable[[], Mapping[int, float]],
    seed: int,
) -> dict[int, int]:
    """Train the factors on some examples.

    Each step trains one rank; see `rank_shares`. Of several processes, each computes the gradients
    of a share of its examples. A step at rank r descends the loss of the first r
    components, and changes no other. The later ones stay in the forward with a weight that falls
    from a half to 0, so that training begins near the loss of rank R. The learning rate is relative
    to the size of each component: large ones, which come first, move most.

    Call it within `trainable_factors`.

    Args:
        layers: The layers of an ordered adapter.
        data: The examples.
        indices: The indices of the examples to train on, in order.
        gaps: How much the loss of each nested rank exceeds that of rank R.
        measure_gaps: Returns them at a later step. It is called up to `MAX_MEASUREMENTS` times.
        seed: Seed of the rank schedule.

    Returns:
        The number of examples that each rank was trained on.

    Raises:
        NotFiniteError: The loss or a gradient is not finite.
    """
    max_rank = layers.nesting.max_rank
    examples_per_step = round_up_to_processes(EXAMPLES_PER_STEP)
    num_steps = math.ceil(len(indices) / examples_per_step)
    num_phases = MAX_MEASUREMENTS + 1
    steps_of_phase = max(MIN_STEPS_BETWEEN_MEASUREMENTS, math.ceil(num_steps / num_phases))
    schedule = RankSchedule(seed)
    optimizer = PrefixAdam(layers.copy_factors())
    base_rate = LEARNING_RATE * min(1.0, (REFERENCE_LAYERS / len(layers.layer_factors())) ** 0.5)
    num_examples: Counter[int] = Counter()
    is_shown = data.show_progress and process_index() == 0
    progress = tqdm(range(num_steps), "training ranks", disable=None if is_shown else True)
    for step in progress:
        if step > 0 and step % steps_of_phase == 0:
            gaps = measure_gaps()
        rank = schedule.next(rank_shares(gaps, share_of_max_rank(step, num_steps)))
        step_indices = indices[step * examples_per_step : (step + 1) * examples_per_step]
        num_examples[rank] += len(step_indices)
        q = prefix_mask(max_rank, rank)
        q[rank:] = TAIL_FACTOR * max(0.0, 1 - step / (TAIL_STEPS * num_steps))
        batches = data.batches(share_of_process(step_indices))
        # Batches without labels are omitted, perhaps not in all processes.
        num_batches = min_over_processes(len(batches), data.device)
        gradients = _gradients(layers, data, batches[:num_batches], q)
        warmup = min(1.0, (step + 1) / max(1.0, WARMUP * num_steps))
        optimizer.step(gradients, rank, base_rate * warmup * (1 - step / num_steps))
        layers.write_factors(optimizer.factors())
    return dict(sorted(num_examples.items()))


@contextmanager
def trainable_factors(layers: NestedLayers) -> Iterator[None]:
    """Make only the factors trainable and disable dropout.

    At the end the modes, ``requires_grad`` and the random state of torch are as before, and no
    parameter has a gradient. After an exception the factors are as before, too.
    """
    model = layers.model
    factors = layers.copy_factors()
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters()}
    cuda_devices = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda_devices):
        try:
            for module, _ in modes:
                # Gradient checkpointing needs train mode. Layers that call dropout as a function,
                # with a probability of their own, must be in eval mode nevertheless.
                attributes = vars(module)
                has_checkpoints = attributes.get("gradient_checkpointing", False)
                module.training = bool(has_checkpoints and not attributes.get("dropout"))
            model.requires_grad_(False)
            for A, B in layers.layer_factors().values():
                A.requires_grad_()
                B.requires_grad_()
            yield
        except BaseException:  # KeyboardInterrupt, too
            layers.write_factors(factors)
            raise
        finally:
            model.zero_grad(set_to_none=True)
            for parameter, flag in requires_grad:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


def _gradients(
    layers: NestedLayers, data: TrainingData, batches: Sequence[Batch], q: Tensor
) -> FactorMatrices:
    """Return the gradients of the factors by layer, with their shapes, in float32 at least.

    They are of the mean loss over the batches of all processes.
    """
    counts = [num_terms(batch) for batch in batches]
    num_terms_of_process = torch.tensor(sum(counts))
    total_terms = sum_over_processes([num_terms_of_process], data.device)[0].item()
    for scale in GRADIENT_SCALES:
        layers.model.zero_grad(set_to_none=True)
        mean_loss = torch.zeros((), dtype=torch.float32)
        with layers.use_diagonal(q):
            for batch, count in zip(batches, counts, strict=True):
                loss = data.loss(batch) * (count / total_terms)
                (loss * scale).backward()  # type: ignore[no-untyped-call]
                mean_loss += loss.item()
        names: list[str] = []
        tensors: list[Tensor] = []
        for name, (A, B) in layers.layer_factors().items():
            names.append(name)
            tensors += [_gradient(A) / scale, _gradient(B) / scale]
        mean_loss, *tensors = sum_over_processes([mean_loss, *tensors], data.device)
        check_finite_loss(mean_loss.item())
        if torch.nn.utils.get_total_norm(tensors).isfinite():
            return dict(zip(names, zip(tensors[::2], tensors[1::2], strict=True), strict=True))
    raise NotFiniteError(
        "Gradients are NaN or infinite. Load the base model in bfloat16 or float32. Or reorder the "
        "adapter, which needs no gradients."
    )


def _gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient as a matrix; zeros if the layer was not used."""
    gradient = parameter.grad
    if gradient is None:
        gradient = torch.zeros_like(parameter)
    return at_least_float32(gradient.flatten(1))


class PrefixAdam:
    """Adam on the components of the factors: the rows of A and the columns of B.

    Adam moves each number by about its learning rate, so it works on components that are divided by
    their size, and the learning rate is a share of the size. Each component counts its own steps
    and has its own momentum, so a step at rank r leaves the later ones as they are. The optimizers
    of PyTorch would move them too.

    Args:
        factors: A and B of each layer.
    """

    def __init__(self, factors: FactorMatrices) -> None:
        self._names = list(factors)
        self._matrices: list[_ComponentMatrix] = []  # of A and of B, in turn
        for A, B in factors.values():
            self._matrices.append(_ComponentMatrix(A))
            self._matrices.append(_ComponentMatrix(B.T))

    def step(self, gradients: FactorMatrices, rank: int, learning_rate: float) -> None:
        """Update the first components, given the gradients of A and B by layer."""
        gradient_matrices: list[Tensor] = []
        for name in self._names:
            grad_A, grad_B = gradients[name]
            gradient_matrices += [grad_A, grad_B.T]
        for matrix, gradient in zip(self._matrices, gradient_matrices, strict=True):
            matrix.step(gradient[:rank], learning_rate)

    def factors(self) -> FactorMatrices:
        """Return A and B of each layer."""
        matrices = [matrix.components * matrix.sizes for matrix in self._matrices]
        pairs = zip(self._names, matrices[::2], matrices[1::2], strict=True)
        return {name: (A, B.T) for name, A, B in pairs}


class _ComponentMatrix:
    """The components of a factor as rows, divided by their sizes, and Adam's state."""

    def __init__(self, matrix: Tensor) -> None:
        components = at_least_float32(matrix)
        self.sizes = _component_sizes(components)
        self.components = components / self.sizes
        self._first_moment = torch.zeros_like(components)
        self._second_moment = torch.zeros_like(components)
        self._num_steps = torch.zeros_like(self.sizes)

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """Update as many of the first components as the gradient has rows."""
        rank = len(gradient)
        gradient = gradient * self.sizes[:rank]
        first_moment = self._first_moment[:rank].lerp_(gradient, 1 - BETAS[0])
        second_moment = self._second_moment[:rank].lerp_(gradient.square(), 1 - BETAS[1])
        num_steps = self._num_steps[:rank].add_(1)
        first_moment = first_moment / (1 - BETAS[0] ** num_steps)
        second_moment = second_moment / (1 - BETAS[1] ** num_steps)
        change = first_moment / (second_moment.sqrt() + EPSILON)
        self.components[:rank] -= learning_rate * change


def _component_sizes(components: Tensor) -> Tensor:
    """Return the root mean square of each row, shape (R, 1), clamped from below, to divide by."""
    sizes = components.square().mean(dim=1, keepdim=True).sqrt()
    return sizes.clamp(min=max(1e-3 * float(sizes.max()), 1e-6))
