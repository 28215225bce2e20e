"""Learn the order of a reordered adapter's directions from data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from matryoshka_lora.adapter.factors import as_matrices, as_parameters, assign, gathered, get_factors, get_parameters
from matryoshka_lora.adapter.nested import NestedAdapter
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.order import OrderOptimizer
from matryoshka_lora.rules import stratified_ranks

STEPS = 20
"""Batches that the order is learned from, unless told otherwise."""

LEARNING_RATE = 0.03
"""By trial on validation data: docs/study.md."""


def learn_order(
    adapter: NestedAdapter,
    batches: Iterable[tuple[int, Callable[[], Tensor]]],
    steps: int,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
) -> None:
    """Order each layer's directions by what the loss of its prefixes says, beginning from `NestedAdapter.reorder`.

    The full-rank function stays as it is, to rounding; see `matryoshka_lora.order`. Each row of a batch has a nested
    rank below R, every rank as often as the others; where rows are no longer rows (routed experts), a batch has one.

    Args:
        adapter: Raw or reordered; it is reordered first. Its factors must require gradients.
        batches: For each step, how many rows the batch has, and a function that computes its mean loss with the
            adapter's model in training mode.
        steps: How many batches are taken; the learning rate falls to 0 over them.
        learning_rate: Of `OrderOptimizer`.
        seed: Of the ranks.

    Raises:
        MatryoshkaError: There is no nested rank below R, or the loss is not finite. The order is then as it was.
    """
    ranks = adapter.nesting.ranks[:-1]
    if not ranks:
        raise MatryoshkaError("an adapter with one nested rank has no order to learn: give it smaller ranks too")
    if not adapter.reordered:
        adapter.reorder()
    modules = [module for _, module, _ in adapter._layers()]
    optimizer = OrderOptimizer([get_factors(module, adapter.name) for module in modules], learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer.adam, 1.0, 0.0, total_iters=steps)
    generator, training = random.Random(f"order {seed}"), adapter.model.training
    routed = any(".experts." in f".{name}." for name, _, _ in adapter._layers())
    adapter.model.train()
    adapter.model.zero_grad(set_to_none=True)
    try:
        for _, (rows, loss) in zip(range(steps), batches, strict=False):
            drawn = [generator.choice(ranks)] if routed else stratified_ranks(ranks, rows, generator)
            diagonal = torch.stack([adapter.state.mask(rank) * adapter.state.scale(rank) for rank in drawn])
            with adapter._standing(diagonal[0] if routed else diagonal, exact=False):
                value = loss()
                if not bool(value.isfinite()):
                    raise MatryoshkaError(f"the loss is {value.item()}: the model computes NaN or infinity")
                value.backward()  # type: ignore[no-untyped-call]
            optimizer.step([_gradients(module, adapter.name) for module in modules])
            schedule.step()
            _put(modules, adapter.name, optimizer.pairs)
            adapter.model.zero_grad(set_to_none=True)
    except BaseException:
        _put(modules, adapter.name, optimizer.start)
        raise
    finally:
        adapter.model.train(training)


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
