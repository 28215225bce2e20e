"""Optimizer steps, each of which trains one rank: a prefix of the factors."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.errors import NotFiniteError
from matryoshka_lora.nn.fused import at_least_float32
from matryoshka_lora.nn.nested_layers import FactorMatrices, NestedLayers
from matryoshka_lora.training.data import IGNORED_LABEL, Batch, TrainingData

EXAMPLES_PER_STEP = 16
LEARNING_RATE = 0.05
"""Learning rate relative to each component's root mean square (RMS)."""
REFERENCE_LAYERS = 14
"""Above this many layers the rate is divided by sqrt(n / 14), because the changes of the n layers
add up."""
WARMUP = 0.05
"""Share of warmup steps; then linear decay to 0."""
RANK_EXPONENT = 1.75
"""Rank r gets a share of the steps in proportion to r ** -RANK_EXPONENT."""
MAX_RANK_SHARE = 1 / 8
"""Extra share of the steps for rank R."""
TAIL_FACTOR = 0.5
"""Initial weight of the components beyond the prefix."""
TAIL_STEPS = 0.5
"""Share of the steps after which that weight is 0."""
GRADIENT_SCALES = (2.0**10, 1.0)
"""Scales of the loss. The first keeps small gradients of float16 from underflow, and the second is
used if large ones overflow. Powers of two do not change the digits of other dtypes."""
_GOLDEN_RATIO = 0.6180339887  # its multiples modulo 1 fill the unit interval evenly


def train_prefixes(
    layers: NestedLayers, data: TrainingData, indices: Sequence[int], seed: int
) -> None:
    """Train the factors on some examples.

    Each step trains one rank, drawn from all ranks between the smallest nested one and R; small
    ones come more often. A step at rank r descends the loss of the first r components. The later
    ones stay in the forward with a weight that falls from a half to 0, so that training begins near
    the loss of rank R. The learning rate is relative to the size of each component: large ones,
    which come first, move most.

    Call it within `trainable_factors`.

    Args:
        layers: The layers of an ordered adapter.
        data: The examples.
        indices: The indices of the examples to train on, in order.
        seed: Seed of the rank schedule.

    Raises:
        NotFiniteError: The loss or a gradient is not finite.
    """
    nesting = layers.nesting
    num_steps = math.ceil(len(indices) / EXAMPLES_PER_STEP)
    phase = random.Random(seed).random()
    schedule = rank_schedule(num_steps, nesting.ranks[0], nesting.max_rank, phase)
    optimizer = _PrefixAdam(layers.copy_factors())
    base_rate = LEARNING_RATE * min(1.0, (REFERENCE_LAYERS / len(layers.layer_factors())) ** 0.5)
    progress = tqdm(schedule, "training ranks", disable=None if data.show_progress else True)
    for step, rank in enumerate(progress):
        start = step * EXAMPLES_PER_STEP
        batches = data.batches(indices[start : start + EXAMPLES_PER_STEP])
        q = prefix_mask(nesting.max_rank, rank)
        q[rank:] = TAIL_FACTOR * max(0.0, 1 - step / (TAIL_STEPS * num_steps))
        gradients = _gradients(layers, data, batches, q)
        warmup = min(1.0, (step + 1) / max(1.0, WARMUP * num_steps))
        optimizer.step(gradients, rank, base_rate * warmup * (1 - step / num_steps))
        layers.write_factors(optimizer.factors())


def rank_schedule(num_steps: int, min_rank: int, max_rank: int, phase: float = 0.0) -> list[int]:
    """Return the rank of each step.

    Each rank gets its share of the steps evenly over time: rank r in proportion to
    ``r ** -RANK_EXPONENT``, and the largest one `MAX_RANK_SHARE` more.

    Args:
        num_steps: The number of steps.
        min_rank: The smallest rank to train.
        max_rank: The largest rank to train.
        phase: Where the schedule begins, from 0 to 1.
    """
    weights = torch.arange(min_rank, max_rank + 1, dtype=torch.float64) ** -RANK_EXPONENT
    shares = (1 - MAX_RANK_SHARE) * weights / weights.sum()
    shares[-1] += MAX_RANK_SHARE
    points = (phase + _GOLDEN_RATIO * torch.arange(num_steps, dtype=torch.float64)) % 1
    offsets = torch.searchsorted(shares.cumsum(0), points, right=True)
    return [min(min_rank + int(offset), max_rank) for offset in offsets]


def prefix_mask(max_rank: int, rank: int) -> Tensor:
    """Return the diagonal of a rank: ones, then zeros, shape (max_rank,), float64."""
    return (torch.arange(max_rank) < rank).double()


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


def mean_loss(
    layers: NestedLayers,
    data: TrainingData,
    batches: Sequence[Batch],
    q: Tensor,
    gradient_scale: float | None = None,
) -> float:
    """Return the mean loss of the tokens with labels, in nats.

    Args:
        layers: The nested layers of the model.
        data: Its ``loss`` computes the loss of a batch.
        batches: The batches.
        q: The diagonal between B and A, shape (R,).
        gradient_scale: If it is not None, the gradients of the loss times this scale are added to
            those of the factors.

    Raises:
        NotFiniteError: The loss is NaN or infinite.
    """
    num_labels = [int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches]
    total = 0.0
    with layers.use_diagonal(q.double()):
        for batch, count in zip(batches, num_labels, strict=True):
            loss = data.loss(batch) * (count / sum(num_labels))
            if gradient_scale is not None:
                (loss * gradient_scale).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
    if not math.isfinite(total):
        raise NotFiniteError(
            f"The loss is {total}. Training has diverged, or the dtype of the base model is too "
            "narrow: load it in bfloat16 or float32. Or reorder the adapter, which needs no loss."
        )
    return total


def _gradients(
    layers: NestedLayers, data: TrainingData, batches: Sequence[Batch], q: Tensor
) -> FactorMatrices:
    """Return the gradients of the factors by layer, with their shapes, in float32 at least."""
    for scale in GRADIENT_SCALES:
        layers.model.zero_grad(set_to_none=True)
        mean_loss(layers, data, batches, q, scale)
        gradients: FactorMatrices = {}
        for name, (A, B) in layers.layer_factors().items():
            gradients[name] = (_gradient(A) / scale, _gradient(B) / scale)
        tensors = [gradient for pair in gradients.values() for gradient in pair]
        if torch.nn.utils.get_total_norm(tensors).isfinite():
            return gradients
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


class _PrefixAdam:
    """Adam on the components of the factors: the rows of A and the columns of B.

    Adam moves each number by about its learning rate, so it works on components that are divided by
    their size, and the learning rate is a share of the size.
    """

    def __init__(self, factors: FactorMatrices) -> None:
        self._names = list(factors)
        self._sizes: list[Tensor] = []  # shape (R, 1)
        self._components: list[Tensor] = []  # shape (R, in) and (R, out), in turn
        for A, B in factors.values():
            for matrix in (A, B.T):
                components = at_least_float32(matrix)
                size = _component_sizes(components)
                self._sizes.append(size)
                self._components.append((components / size).contiguous())
        self._optimizer = torch.optim.Adam(self._components)

    def step(self, gradients: FactorMatrices, rank: int, learning_rate: float) -> None:
        """Update the components, given the gradients of A and B by layer.

        Only the first r components have gradients. Adam's momentum still moves the later ones.
        """
        index = 0
        for name in self._names:
            grad_A, grad_B = gradients[name]
            for gradient in (grad_A, grad_B.T):
                scaled_gradient = gradient * self._sizes[index]
                scaled_gradient[rank:] = 0
                self._components[index].grad = scaled_gradient.contiguous()
                index += 1
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()

    def factors(self) -> FactorMatrices:
        """Return A and B of each layer."""
        matrices = [
            components * size
            for components, size in zip(self._components, self._sizes, strict=True)
        ]
        pairs = zip(self._names, matrices[::2], matrices[1::2], strict=True)
        return {name: (A, B.T) for name, A, B in pairs}


def _component_sizes(components: Tensor) -> Tensor:
    """Return the root mean square of each row, shape (R, 1), clamped from below, to divide by."""
    sizes = components.square().mean(dim=1, keepdim=True).sqrt()
    return sizes.clamp(min=max(1e-3 * float(sizes.max()), 1e-6))
