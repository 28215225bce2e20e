"""Train each rank of an adapter by itself (``by="trained"``), one block of directions after another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.models import evaluation_mode
from matryoshka_lora.reordering.descent import gradients_at, learning, loss_at
from matryoshka_lora.reordering.factors import reorder_factors
from matryoshka_lora.reordering.learned import check_ranks
from matryoshka_lora.reordering.model import AdapterInModel, Data, Factors, Part

STEPS = 400
"""Of all ranks together, where it is not known for how long the adapter was trained."""

SHARE = 0.5
"""Of the rows of training, where it is known for how long the adapter was trained."""

ROWS = 8
"""Of a step. Many small steps teach a block more than few large ones."""

JUDGED = 8
"""Steps whose rows are only looked at, to judge by."""

LEARNING_RATE = 1e-3
"""Of R, where it is not known with which rate the adapter was trained."""

BLOCK_RATE, POWER = 0.5, 0.4
"""A block of w directions takes ``BLOCK_RATE * (R / w) ** POWER`` times the rate of R: few bear larger steps."""

RATIO = 0.6
"""The steps of a rank, as a share of those of the next smaller one. Every block must make up for those below it, which
have left the span of the SVD: a share by what the SVD's ranks lack gives the larger ones too few."""

MAX_NORM = 1.0
"""Of a block's gradient, which is clipped to it as the Trainer does."""

ROUNDING = 1e-3
"""Nats by which two losses of the same function may differ."""


def train_ranks(
    adapter: AdapterInModel,
    data: Data,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    on_step: Callable[[int], object] = lambda rows: None,
) -> dict[int, int]:
    """Give each nested rank below R some steps of its own.

    Let D be a layer's update. The ranks are taken in rising order. The block of directions that a rank adds begins as
    the leading ones of what the earlier blocks leave of D, and is trained alone by the loss of the prefix that ends
    with it. So each prefix may leave the span of the factors that were trained, and later blocks make up for it. The
    last block is the leading directions of what is left: rank R loses only the smallest ones.

    A trained block that loses more than the one that it began from, on rows that are only looked at, is not kept. Where
    the ranks do not lose less than before in the mean, nothing is kept. A rank that alone loses more is named in a
    warning.

    Args:
        adapter: A reordered one. Frozen factors are frozen again afterwards.
        data: The rows.
        steps: Of all ranks together.
        learning_rate: That R was trained with; see `POWER`. A block's falls to 0 over its steps.
        seed: Of the order of the rows.
        on_step: Called after each step with the number of its rows.

    Returns:
        The steps that each rank below R got; none where nothing is kept.

    Raises:
        MatryoshkaError: There is no nested rank below R, or the loss is not finite. In the second case the factors are
            as they were before.
    """
    check_ranks(adapter.state.nesting)
    *ranks, top = adapter.state.nesting.ranks
    if steps < 1:
        raise MatryoshkaError(f"ranks cannot be trained in {steps} steps: take 1 or more, or reorder by 'svd'")
    stream = data.steps((steps + JUDGED) * ROWS, ROWS, seed)
    whole = adapter.factors()
    with learning(adapter):
        looked_at = [part for parts in islice(stream, JUDGED) for part in parts]
        before = _losses(adapter, looked_at, (*ranks, top))
        shares = share_out(steps, ranks)
        done = {name: (A[..., :0, :], B[..., :0]) for name, (A, B) in whole.items()}
        low = 0
        for rank in ranks:
            block: Factors = {name: _rest(whole[name], done[name], rank - low) for name in whole}
            rate = learning_rate * BLOCK_RATE * (top / (rank - low)) ** POWER
            if shares[rank]:
                batches = [next(stream) for _ in range(shares[rank])]
                block = _trained(adapter, whole, done, block, rank, batches, rate, looked_at, on_step)
            done = {name: _joined(done[name], _ordered(block[name])) for name in whole}
            low = rank
        last = {name: _rest(whole[name], done[name], top - low) for name in whole}
        adapter.put_factors({name: _joined(done[name], last[name]) for name in whole})
        after = _losses(adapter, looked_at, (*ranks, top))
        gains = {rank: before[rank] - after[rank] for rank in after}
        kept = fmean(gains.values()) > ROUNDING
        if not kept:
            adapter.put_factors(whole)
    worse = [str(rank) for rank, gain in gains.items() if gain < -ROUNDING]
    if not kept:
        warnings.warn(
            "the trained ranks are not kept: on rows that are only looked at they lose "
            f"{fmean(after.values()):.3f}, and those of the SVD {fmean(before.values()):.3f}",
            stacklevel=2,
        )
        return {}
    if worse:
        warnings.warn(f"trained ranks that lose more than those of the SVD: {', '.join(worse)}", stacklevel=2)
    return shares


def share_out(steps: int, ranks: Sequence[int]) -> dict[int, int]:
    """Share steps among ranks, in whole numbers: each gets `RATIO` times those of the one before."""
    ends = [sum(RATIO**number for number in range(end)) for end in range(len(ranks) + 1)]
    rounded = [round(steps * end / ends[-1]) for end in ends]
    return {rank: end - begin for rank, begin, end in zip(ranks, rounded, rounded[1:], strict=False)}


def _losses(adapter: AdapterInModel, parts: Sequence[Part], ranks: Sequence[int]) -> dict[int, float]:
    rows = sum(part.rows for part in parts)
    with torch.no_grad(), evaluation_mode(adapter.model):
        return {rank: loss_at(adapter, parts, [rank] * rows) for rank in ranks}


def _trained(
    adapter: AdapterInModel,
    whole: Factors,
    done: Factors,
    start: Factors,
    rank: int,
    batches: Sequence[Sequence[Part]],
    learning_rate: float,
    looked_at: Sequence[Part],
    on_step: Callable[[int], object],
) -> Factors:
    """A block of directions, trained by the loss of the prefix that ends with it; or ``start`` if that loses less."""
    names = list(whole)
    width = start[names[0]][0].shape[-2]
    block = {name: tuple(factor.detach().clone().requires_grad_() for factor in start[name]) for name in names}
    adam = torch.optim.Adam([factor for name in names for factor in block[name]], learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=len(batches))

    def put(pairs: Factors) -> None:
        adapter.put_factors({name: _filled(whole[name], _joined(done[name], pairs[name])) for name in names})

    def loss(pairs: Factors) -> float:
        put(pairs)
        return _losses(adapter, looked_at, [rank])[rank]

    for parts in batches:
        put(block)  # type: ignore[arg-type]
        gradients = gradients_at(adapter, parts, [rank] * sum(part.rows for part in parts))
        for name in names:
            grad_A, grad_B = gradients[name]
            A, B = block[name]
            A.grad, B.grad = grad_A[..., rank - width : rank, :].to(A), grad_B[..., rank - width : rank].to(B)
        torch.nn.utils.clip_grad_norm_([factor for name in names for factor in block[name]], MAX_NORM)
        adam.step()
        schedule.step()
        on_step(sum(part.rows for part in parts))
    found: Factors = {name: (block[name][0].detach(), block[name][1].detach()) for name in names}
    return found if loss(found) <= loss(start) else start


def _rest(whole: tuple[Tensor, Tensor], done: tuple[Tensor, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """The leading directions of what the blocks that are done leave of a layer's update."""
    A, B, _ = reorder_factors(torch.cat([whole[0], done[0]], dim=-2), torch.cat([whole[1], -done[1]], dim=-1))
    return A[..., :width, :], B[..., :width]


def _ordered(block: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A block in the order of its own SVD, so that the ranks between two nested ones become good too."""
    A, B, _ = reorder_factors(*block)
    return A, B


def _joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([first[0], second[0].detach()], dim=-2), torch.cat([first[1], second[1].detach()], dim=-1)


def _filled(whole: tuple[Tensor, Tensor], prefix: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The prefix in factors of full rank; what stands behind it takes no part at its rank."""
    rank = prefix[0].shape[-2]
    return torch.cat([prefix[0], whole[0][..., rank:, :]], dim=-2), torch.cat([prefix[1], whole[1][..., rank:]], dim=-1)
