"""Train an adapter at every rank (``by="trained"``): each step at another one."""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.fused import at_least_float32
from matryoshka_lora.reordering.data import Batch, Data

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter

SHARE, COUNT = 0.5, 3200  # of the rows that trained the adapter, or rows if these are not known
ROWS = 16  # of a step
JUDGES = 64  # at most
STEP = 0.05  # the learning rate of a column, as a share of the column's root mean square
LAYERS = 14  # with more, the rate falls with the root of their number, as their changes add up
WARMUP = 0.05  # of the steps; after it the rate falls to 0
POWER, TOP = 1.75, 1 / 8  # rank r comes in r^-1.75 of the steps, and R in 1 / 8 more
FADE, SPAN = 0.5, 0.5  # how much of the later columns remains, until half of the steps are done
ENOUGH, MUCH = 0.02, 1.25  # nats above R's loss at which a rank needs no row, and all rows
ROUNDING = 1e-3  # nats by which two losses of one function may differ
MOST_LOST = 0.02  # of rank R, in nats or as a share of its loss, whichever is more
GOLDEN = 0.6180339887  # its multiples modulo 1 fill the unit interval evenly


def train_ranks(
    adapter: NestedAdapter, data: Data, count: int | None = None, seed: int = 0
) -> bool:
    """Train an adapter for some steps, each at another rank.

    A step draws a rank r, small ones more often, and descends the loss of the first r columns. The
    later columns remain with a factor that fades from a half to 0, so that training begins near R's
    loss. Adam's rate is a share of each column's size: large columns, which come first, move most.
    Without a count, steps are in proportion to how far the worst rank is behind R; see `ENOUGH`.

    If the nested ranks do not lose less than before in the mean, or R loses more by `MOST_LOST`,
    the factors are as before again, with a warning.

    The adapter has an order. ``count`` rows are trained on; None is at most half as many as trained
    the adapter, or 3200. The seed orders rows and ranks. Returns whether the new factors are kept.

    Raises:
        MatryoshkaError: There is no nested rank below R; or the rows are too few, and no Trainer's.
        NotFiniteError: The loss or a gradient is not finite. The factors are as before then.
    """
    *ranks, top = adapter.nesting.ranks
    if not ranks:
        raise MatryoshkaError(
            f"{top} is the only nested rank, so data cannot order it: nest the adapter with "
            "smaller ranks too, or reorder it by 'svd'"
        )
    most = count or (COUNT if data.seen is None else max(ROWS, round(data.seen * SHARE)))
    by = adapter.order
    with descending(adapter) as start:
        try:
            numbers, judges = data.split(most, min(JUDGES, most), seed)
        except MatryoshkaError as error:
            if data.seen is None:
                raise
            # A script that has trained for hours goes on, and saves.
            warnings.warn(f"no rank is trained, and the order is {by}: {error}", stacklevel=3)
            return False
        before = _losses(adapter, data, judges)
        behind = max(before[rank] for rank in ranks) - before[top]
        if behind <= ENOUGH:
            text = f"no rank is {ENOUGH} nats behind {top}, so none is trained: the order is {by}"
            warnings.warn(text, stacklevel=3)
            return False
        needed = most if count else math.ceil(most * min(behind / MUCH, 1.0))
        _descend(adapter, data, numbers[:needed], seed)
        after = _losses(adapter, data, judges)
        if not data.quiet:
            told = ", ".join(f"rank {r} {before[r]:.3f} to {after[r]:.3f}" for r in after)
            tqdm.write(f"loss on held-out rows: {told}", file=sys.stderr)
        more = {rank: after[rank] - before[rank] for rank in after}
        mean = fmean(more.values())
        kept = mean < -ROUNDING and more[top] <= MOST_LOST * max(before[top], 1.0)
        if not kept:
            adapter.put_factors(start)
    worse = [f"{rank} (by {more[rank]:.3f})" for rank in ranks if more[rank] > ROUNDING]
    text = f"these trained ranks lose more than before: {', '.join(worse)}" if worse else ""
    if not kept:
        text = (
            f"the trained ranks are not kept, and the order stays {by}: on held-out rows, their "
            f"loss would change by {mean:+.3f} in the mean, and rank {top}'s by {more[top]:+.3f}"
        )
    if text:
        warnings.warn(text, stacklevel=3)
    return kept


@contextmanager
def descending(adapter: NestedAdapter) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Give gradients to the factors alone, and switch dropout off; yield copies of the factors.

    At the end modes, ``requires_grad`` and torch's random state are as before, and no parameter
    has a gradient. After an error, a KeyboardInterrupt included, the factors are as before too.
    """
    model, start = adapter.model, adapter.factors()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter, _ in flags if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            # Checkpointing needs train mode. All else is in eval mode, as are layers that drop out.
            for module, _ in modes:
                own = vars(module)
                module.training = bool(own.get("gradient_checkpointing") and not own.get("dropout"))
            model.requires_grad_(False)
            for pair in adapter.parameters().values():
                for parameter in pair:
                    parameter.requires_grad_()
            yield start
        except BaseException:
            adapter.put_factors(start)
            raise
        finally:
            model.zero_grad(set_to_none=True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, training in modes:
                module.training = training


def _descend(adapter: NestedAdapter, data: Data, numbers: Sequence[int], seed: int) -> None:
    """Train the factors on some rows, in `descending`."""
    least, top = adapter.nesting.ranks[0], adapter.nesting.max_rank
    steps, columns = -(-len(numbers) // ROWS), torch.arange(top)
    drawn = ranks_of_steps(steps, least, top, random.Random(seed).random())
    # Adam moves each number by its rate, so numbers of size 1 move in proportion to the columns.
    sizes, units = dict[str, tuple[Tensor, Tensor]](), dict[str, tuple[Tensor, Tensor]]()
    for name, (A, B) in adapter.factors().items():
        sizes[name] = _size(A, 1), _size(B, 0)
        a, b = (at_least_float32(x) / size for x, size in zip((A, B), sizes[name], strict=True))
        units[name] = a.requires_grad_(), b.requires_grad_()
    adam = torch.optim.Adam([unit for pair in units.values() for unit in pair])
    rate = STEP * min(1.0, (LAYERS / len(units)) ** 0.5)
    for step, rank in enumerate(tqdm(drawn, "training ranks", disable=data.quiet or None)):
        batches = data.batches(numbers[step * ROWS : (step + 1) * ROWS])
        q = torch.where(columns < rank, 1.0, FADE * max(0.0, 1 - step / (SPAN * steps)))
        trained = columns < rank  # the later columns are in the forward alone
        for name, (dA, dB) in _gradients(adapter, data, batches, q).items():
            a, b = units[name]
            a.grad = dA * sizes[name][0] * trained.to(dA)[:, None]
            b.grad = dB * sizes[name][1] * trained.to(dB)
        warm = min((step + 1) / max(1.0, WARMUP * steps), 1.0)
        adam.param_groups[0]["lr"] = rate * warm * (1 - step / steps)
        adam.step()
        adapter.put_factors({n: (a * sizes[n][0], b * sizes[n][1]) for n, (a, b) in units.items()})


def ranks_of_steps(steps: int, least: int, top: int, phase: float = 0.0) -> list[int]:
    """Return a rank for each step: r comes as often as ``r ** -POWER``, and ``top`` more often."""
    weights = torch.arange(least, top + 1, dtype=torch.float64) ** -POWER
    shares = (1 - TOP) * weights / weights.sum()
    shares[-1] += TOP
    places = (phase + GOLDEN * torch.arange(steps, dtype=torch.float64)) % 1
    found = torch.searchsorted(shares.cumsum(0), places, right=True)
    return [min(least + int(each), top) for each in found]


def _losses(adapter: NestedAdapter, data: Data, judges: Sequence[Batch]) -> dict[int, float]:
    """Return the loss of each nested rank on the rows that judge."""
    columns = torch.arange(adapter.nesting.max_rank)
    with torch.no_grad():
        return {r: _loss(adapter, data, judges, columns < r) for r in adapter.nesting.ranks}


def _loss(
    adapter: NestedAdapter,
    data: Data,
    batches: Sequence[Batch],
    q: Tensor,
    scale: float | None = None,
) -> float:
    """Return the mean loss with a diagonal q, in nats, of the tokens with labels.

    With a scale, the gradients of so many times the loss are added to those of the factors.
    """
    weights = [int((batch["labels"] != -100).sum()) for batch in batches]
    total = 0.0
    with adapter.override(q.double()):
        for batch, weight in zip(batches, weights, strict=True):
            loss = data.loss(batch) * (weight / sum(weights))
            if scale is not None:
                (loss * scale).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
    if not math.isfinite(total):
        raise NotFiniteError(
            f"the loss is {total}: training diverged, or the base model's dtype is too narrow. "
            "Load it in bfloat16 or float32, or reorder by 'svd', which needs no loss"
        )
    return total


def _gradients(
    adapter: NestedAdapter, data: Data, batches: Sequence[Batch], q: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the loss's gradients by the factors of each layer, in float32 at least."""

    def gradient(parameter: Tensor, scale: float) -> Tensor:
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return at_least_float32(found.flatten(1)) / scale

    # The first scale lifts small gradients over float16's underflow, the second serves where large
    # ones overflow. Powers of two do not change the digits of other dtypes.
    for scale in (2.0**10, 1.0):
        adapter.model.zero_grad(set_to_none=True)
        _loss(adapter, data, batches, q, scale)
        pairs = adapter.parameters().items()
        found = {name: (gradient(A, scale), gradient(B, scale)) for name, (A, B) in pairs}
        every = [one for pair in found.values() for one in pair]
        if torch.nn.utils.get_total_norm(every).isfinite():
            return found
    raise NotFiniteError(
        "gradients are NaN or infinite: load the base model in bfloat16 or float32, or reorder by "
        "'svd', which needs none"
    )


def _size(factor: Tensor, dim: int) -> Tensor:
    """Return the root mean square of each column of the update's factor, along the other dim."""
    size = at_least_float32(factor).square().mean(dim, keepdim=True).sqrt()
    return size.clamp(min=max(1e-3 * float(size.max()), 1e-6))  # no division by 0
