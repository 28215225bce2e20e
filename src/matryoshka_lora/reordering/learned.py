"""Learn the order of a reordered adapter's directions from data (``by="learned"``)."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from statistics import fmean

import torch

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.loaded import evaluation_mode
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.reordering.descent import gradients_at, learning, loss_at, teaches
from matryoshka_lora.reordering.model import AdapterInModel, Data, Factors, Part
from matryoshka_lora.reordering.order import OrderOptimizer
from matryoshka_lora.rules import stratified_ranks

STEPS = 40
"""Of the order, unless told otherwise."""

ROWS = 12
"""Of a step; two for each of the lower ranks of powers of two up to 64. Better new ones at each step: few rows that
come again are learned by heart, at the cost of the ranks between."""

JUDGED = 4
"""Steps whose rows are only looked at: on them the learned order must lose less than the one that it began from. The
rows of one step, which it was learned from, are too few: they have turned down orders that were better on new rows."""

LEARNING_RATE = 0.02
"""At R = 32. By trial on validation data: docs/reorder.md."""


def rate_at(rank: int, learning_rate: float = LEARNING_RATE) -> float:
    """The rate of an adapter of this R that moves directions as far as ``learning_rate`` does at R = 32.

    A direction becomes a sum over all R of them, and Adam moves every weight of it alike: so 32 / R times the rate. By
    trial at R = 4, 8 and 128 (docs/reorder.md); below 8 it is that of 8.
    """
    return learning_rate * 32 / max(rank, 8)


def check_ranks(nesting: Nesting) -> None:
    """Raises MatryoshkaError where there is no nested rank below R, so that nothing is to be learned."""
    if len(nesting.ranks) == 1:
        raise MatryoshkaError("an adapter with one nested rank has no order to learn: give it smaller ranks too")


def learn_order(
    adapter: AdapterInModel,
    data: Data,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    on_step: Callable[[int], object] = lambda rows: None,
) -> bool:
    """Order each layer's directions by what the loss of its prefixes says, beginning from the order that they have.

    The full-rank function stays as it is, to rounding; see `matryoshka_lora.reordering.order`. Each row of a step has a
    nested rank below R, every rank as often as the others; where rows are no longer rows (routed experts, bare
    parameters), a step has one. Dropout is off: an order is for what is deployed, and two orders can be compared only
    without that noise. If the learned order loses more than the one that it began from, on as many rows as `JUDGED`
    steps have, it is not kept, and a warning says so. These rows are held out, if the data have such; else they are no
    others' only where there are so many. Steps without a token to learn are passed over.

    Args:
        adapter: A reordered one. Frozen factors are frozen again afterwards.
        data: The rows.
        steps: How many, at least one; the learning rate falls to 0 over them.
        learning_rate: Of `OrderOptimizer` at R = 32; see `rate_at`.
        seed: Of the order of the rows, and of their ranks.
        on_step: Called with the number of rows of each step, after it.

    Returns:
        Whether it is kept.

    Raises:
        MatryoshkaError: There is no nested rank below R, or the loss is not finite. In the second case the order is
            the one that it began from.
    """
    check_ranks(adapter.state.nesting)
    *ranks, top = adapter.state.nesting.ranks
    start = adapter.factors()
    names = list(start)
    optimizer = OrderOptimizer(
        [start[name] for name in names], adapter.state.nesting.ranks, rate_at(top, learning_rate)
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer.adam, 1.0, 0.0, total_iters=steps)
    generator = random.Random(f"order {seed}")

    def with_ranks(parts: Sequence[Part]) -> Drawn:
        rows = sum(part.rows for part in parts)
        alike = [generator.choice(ranks)] * rows
        return parts, stratified_ranks(ranks, rows, generator) if adapter.keeps_rows else alike

    judging = data.held_out
    stream = data.steps((steps + (0 if judging else JUDGED)) * ROWS, ROWS, seed)
    with learning(adapter):
        for parts in islice(stream, steps):
            drawn = with_ranks(parts)
            if teaches(parts):
                gradients = gradients_at(adapter, *drawn)
                optimizer.step([gradients[name] for name in names])
                schedule.step()
                adapter.put_factors(dict(zip(names, optimizer.pairs, strict=True)))
            on_step(len(drawn[1]))
        looked_at = list(judging.steps(min(JUDGED * ROWS, len(judging)), ROWS, seed) if judging else stream)
        judged = [with_ranks(parts) for parts in list(filter(teaches, looked_at)) or looked_at]
        return _keep_the_better(adapter, start, dict(zip(names, optimizer.finished(), strict=True)), judged)


Drawn = tuple[Sequence[Part], Sequence[int]]
"""The rows of a step, and the rank of each."""


@torch.no_grad()
def _keep_the_better(adapter: AdapterInModel, start: Factors, learned: Factors, judged: Sequence[Drawn]) -> bool:
    def loss(factors: Factors) -> float:
        adapter.put_factors(factors)
        return fmean(loss_at(adapter, *drawn) for drawn in judged)

    with evaluation_mode(adapter.model):
        before, after = loss(start), loss(learned)
    if after <= before:
        return True
    adapter.put_factors(start)
    warnings.warn(
        f"the learned order is not kept: on rows that are only looked at it loses {after:.3f}, and the order that it "
        f"began from {before:.3f}. A lower learning rate may help",
        stacklevel=3,
    )
    return False
