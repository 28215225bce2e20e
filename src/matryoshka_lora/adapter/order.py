"""Learn the order of a reordered adapter's directions from data."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from matryoshka_lora.adapter.factors import as_matrices, as_parameters, assign, gathered, get_factors, get_parameters
from matryoshka_lora.adapter.modes import evaluation_mode
from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.reordering.order import OrderOptimizer
from matryoshka_lora.rules import stratified_ranks

STEPS = 40
"""Of the order, unless told otherwise."""

ROWS = 12
"""Of a step; two for each of the lower ranks of powers of two up to 64. Better new ones at each step: few rows that
come again are learned by heart, at the cost of the ranks between."""

LEARNING_RATE = 0.02
"""At R = 32. By trial on validation data: benchmarks/order_choices.py, docs/reorder.md."""


def rate_at(rank: int, learning_rate: float = LEARNING_RATE) -> float:
    """The rate of an adapter of this R that moves directions as far as ``learning_rate`` does at R = 32.

    A direction becomes a sum over all R of them, and Adam moves every weight of it alike: so 32 / R times the rate. By
    trial at R = 4, 8 and 128 (docs/reorder.md); below 8 it is that of 8.
    """
    return learning_rate * 32 / max(rank, 8)


class Part(NamedTuple):
    """A part of the rows of a step, as many as fit into memory together.

    Attributes:
        rows: How many.
        weight: Of its loss in that of the step, in any unit: the number of its answers' tokens, for a mean over tokens.
        loss: Computes its mean loss.
    """

    rows: int
    weight: float
    loss: Callable[[], Tensor]


def learn_order(
    adapter: NestedAdapter,
    steps: Iterable[Sequence[Part]],
    count: int,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
) -> None:
    """Order each layer's directions by what the loss of its prefixes says, beginning from `NestedAdapter.reorder`.

    The full-rank function stays as it is, to rounding; see `matryoshka_lora.reordering.order`. Each row of a step has a nested
    rank below R, every rank as often as the others; where rows are no longer rows (routed experts, bare
    parameters), a step has one. Dropout is off: an order is for what is deployed, and two orders can be compared only
    without that noise. If the learned order loses more than the one that it began from, on the rows of the last step,
    it is not kept, and a warning says so.

    Args:
        adapter: Raw or reordered; it is reordered first. Frozen factors are frozen again afterwards.
        steps: The rows of each step, in parts.
        count: How many steps are taken, of at least so many; the learning rate falls to 0 over them.
        learning_rate: Of `OrderOptimizer` at R = 32; see `rate_at`.
        seed: Of the ranks.

    Raises:
        MatryoshkaError: There is no nested rank below R, or the loss is not finite. In the second case the
            order is then the one that it began from: the SVD's, or that of an adapter that was reordered before.
    """
    *ranks, _ = adapter.nesting.ranks
    if not ranks:
        raise MatryoshkaError("an adapter with one nested rank has no order to learn: give it smaller ranks too")
    if not adapter.reordered:
        adapter.reorder()
    last: tuple[Sequence[Part], Sequence[int]] = (), ()
    modules = [module for _, module, _ in adapter._layers()]
    factors = [get_factors(module, adapter.name) for module in modules]
    rate = rate_at(adapter.nesting.max_rank, learning_rate)
    optimizer = OrderOptimizer(factors, adapter.nesting.ranks, rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer.adam, 1.0, 0.0, total_iters=count)
    generator = random.Random(f"order {seed}")
    routed = any(".experts." in f".{name}." or isinstance(m, ParamWrapper) for name, m, _ in adapter._layers())
    frozen = [p for module in modules for p in get_parameters(module, adapter.name) if not p.requires_grad]
    adapter.model.zero_grad(set_to_none=True)
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        with _without_dropout(adapter.model):
            for number, parts in enumerate(steps):
                if number == count:
                    break
                rows = sum(part.rows for part in parts)
                drawn = [generator.choice(ranks)] * rows if routed else stratified_ranks(ranks, rows, generator)
                last = parts, drawn
                _each_loss(adapter, *last, routed, torch.Tensor.backward)
                optimizer.step([_gradients(module, adapter.name) for module in modules])
                schedule.step()
                _put(modules, adapter.name, optimizer.pairs)
                adapter.model.zero_grad(set_to_none=True)
        with torch.no_grad(), evaluation_mode(adapter.model):
            _put(modules, adapter.name, optimizer.start)
            before = _each_loss(adapter, *last, routed)
            _put(modules, adapter.name, optimizer.finished())
            after = _each_loss(adapter, *last, routed)
        if after > before:
            _put(modules, adapter.name, optimizer.start)
            warnings.warn(
                f"the learned order is not kept: on its last rows it loses {after:.3f}, and the order that it began "
                f"from {before:.3f}. A lower learning rate may help",
                stacklevel=2,
            )
    except BaseException:
        _put(modules, adapter.name, optimizer.start)
        raise
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode, but for the modules that learn, or save memory, in training."""
    with evaluation_mode(model):
        for module in model.modules():
            if isinstance(module, LoraLayer) or getattr(module, "gradient_checkpointing", False):
                module.training = True  # its own, not that of the modules in it
        yield


def _each_loss(
    adapter: NestedAdapter,
    parts: Sequence[Part],
    drawn: Sequence[int],
    routed: bool,
    use: Callable[[Tensor], object] = lambda loss: None,
) -> float:
    """The loss of a step whose rows have these ranks; ``use`` gets the share of each part while its ranks stand."""
    state, weight, total, begin = adapter.state, sum(part.weight for part in parts), 0.0, 0
    for part in parts:
        mine, begin = drawn[begin : begin + part.rows], begin + part.rows
        diagonal = torch.stack([state.mask(rank) * state.scale(rank) for rank in mine])
        with adapter._standing(diagonal[0] if routed else diagonal, exact=False):
            loss = part.loss() * (part.weight / weight)
            if not bool(loss.isfinite()):
                raise NotFiniteError(f"the loss is {loss.item()}: the model computes NaN or infinity")
            use(loss)
        total += loss.item()
    return total


def _gradients(module: Any, adapter: str) -> tuple[Tensor, Tensor]:
    A, B = get_parameters(module, adapter)
    grad_A, grad_B = (gathered(torch.zeros_like(f) if f.grad is None else f.grad) for f in (A, B))
    return as_matrices(grad_A, grad_B, module.r[adapter])


@torch.no_grad()
def _put(modules: list[Any], adapter: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
    for module, (A, B) in zip(modules, pairs, strict=True):
        parameters = get_parameters(module, adapter)
        new = as_parameters(A, B, parameters[0].shape, parameters[1].shape)
        for parameter, value in zip(parameters, new, strict=True):
            assign(parameter, value)
