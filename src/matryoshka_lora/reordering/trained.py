"""Train each rank of an adapter by itself (``by="trained"``), one block of directions after another."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.loaded import evaluation_mode
from matryoshka_lora.reordering.checkpoint import Checkpoint, digest, flat, unflat
from matryoshka_lora.reordering.descent import gradients_at, learning, loss_at, teaches
from matryoshka_lora.reordering.factors import reorder_factors
from matryoshka_lora.reordering.learned import check_ranks
from matryoshka_lora.reordering.model import AdapterInModel, Data, Factors, Part

STEPS = 400
"""Of all ranks together, where it is not known for how long the adapter was trained."""

SHARE = 0.5
"""Of the rows of training, where it is known for how long the adapter was trained."""

ROWS = 8
"""Of a step. Many small steps teach a block more than few large ones."""

JUDGED_ROWS = 64
"""Rows that are only looked at, to judge by: so many, or as many as there are to train on."""

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

MOST_LOST = 0.02
"""What rank R may lose, as a share of its loss or in nats, whichever is more; else nothing is kept."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of a factor."""


def train_ranks(
    adapter: AdapterInModel,
    data: Data,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    on_step: Callable[[int], object] = lambda rows: None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> dict[int, int]:
    """Give each nested rank below R some steps of its own.

    Let D be a layer's update. The ranks are taken in rising order. The block of directions that a rank adds begins as
    the leading ones of what the earlier blocks leave of D, and is trained alone by the loss of the prefix that ends
    with it. So each prefix may leave the span of the factors that were trained, and later blocks make up for it. The
    last block is the leading directions of what is left: rank R loses only the smallest ones.

    A trained block that loses more than the one that it began from, on rows that are only looked at, is not kept. Where
    the ranks do not lose less than before in the mean, or R loses more by `MOST_LOST`, nothing is kept. A rank that
    alone loses more is named in a warning; ranks between the nested ones are not looked at. The rows that are looked at
    are held out, if the data have such; else `JUDGED_ROWS` are no others' only where there are so many. Steps without a
    token to learn are passed over.

    Args:
        adapter: A reordered one. Frozen factors are frozen again afterwards.
        data: The rows.
        steps: Of all ranks together.
        learning_rate: That R was trained with; see `POWER`. A block's falls to 0 over its steps.
        seed: Of the order of the rows.
        on_step: Called after each step with the number of its rows.
        checkpoint: A file that keeps what has been done, now and then. The same call with it goes on from there, to the
            same bits. None keeps nothing.

    Returns:
        The steps that each rank below R got; none where nothing is kept.

    Raises:
        MatryoshkaError: There is no nested rank below R, the loss is not finite, or the file cannot be read or written.
            Once training has begun, the factors are as they were before.
    """
    check_ranks(adapter.state.nesting)
    *ranks, top = adapter.state.nesting.ranks
    if steps < 1:
        raise MatryoshkaError(f"ranks cannot be trained in {steps} steps: take 1 or more, or reorder by 'svd'")
    judging = data.held_out or data
    judged = min(JUDGED_ROWS, steps * ROWS, len(judging))
    (looked_at,) = judging.steps(judged, judged, seed)
    # Of the same data, the same rows come first here, and are not trained on.
    passed = 0 if data.held_out else judged // ROWS
    stream = islice(data.steps((passed + steps) * ROWS, ROWS, seed), passed, None)
    whole = adapter.factors()
    with learning(adapter):
        before = _losses(adapter, looked_at, (*ranks, top))
        shares = share_out(steps, ranks)
        saved = None
        if checkpoint is not None:
            run = {"steps": steps, "rate": learning_rate, "seed": seed, "ranks": ranks, "factors": digest(whole)}
            # They tell other rows and another base model.
            run["losses"] = [round(loss, 3) for loss in before.values()]
            saved = Checkpoint(checkpoint, run)
        training = _Training(adapter, whole, looked_at, on_step, saved)
        done = training.blocks(ranks, shares, learning_rate, stream)
        last = {name: _rest(whole[name], done[name], top - ranks[-1]) for name in whole}
        adapter.put_factors({name: _joined(done[name], last[name]) for name in whole})
        after = _losses(adapter, looked_at, (*ranks, top))
        gains = {rank: before[rank] - after[rank] for rank in after}
        keeps_top = -gains[top] <= MOST_LOST * max(before[top], 1.0)
        kept = keeps_top and fmean(gains.values()) > ROUNDING
        if not kept:
            adapter.put_factors(whole)
    worse = [f"{rank} (by {-gain:.3f})" for rank, gain in gains.items() if gain < -ROUNDING]
    if not kept:
        lost = [fmean(found.values()) if keeps_top else found[top] for found in (after, before)]
        warnings.warn(
            f"the trained ranks are not kept: on rows that are only looked at {'they' if keeps_top else f'rank {top}'} "
            f"would lose {lost[0]:.3f}, and {'those' if keeps_top else 'that'} of the SVD {lost[1]:.3f}",
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


@dataclass
class _Training:
    """The training of one block after another.

    Attributes:
        adapter: In which they are trained.
        whole: Its factors before.
        looked_at: Rows to judge by.
        on_step: See `train_ranks`.
        checkpoint: Keeps ``done``, the blocks that are done, and of the one that is not ``block``, its moments, and
            ``step``, the number of its steps.
    """

    adapter: AdapterInModel
    whole: Factors
    looked_at: Sequence[Part]
    on_step: Callable[[int], object]
    checkpoint: Checkpoint | None

    def blocks(
        self, ranks: Sequence[int], shares: dict[int, int], rate: float, stream: Iterator[Sequence[Part]]
    ) -> Factors:
        """The blocks of all ranks, side by side; those of the file are not trained again."""
        before = {} if self.checkpoint is None else self.checkpoint.read()
        done: Factors = {name: (A[..., :0, :], B[..., :0]) for name, (A, B) in self.whole.items()}
        if before:
            done = unflat("done", before, self.whole)
        reached, low = next(iter(done.values()))[0].shape[-2], 0
        for rank in ranks:
            steps = islice(stream, shares[rank])
            if rank <= reached:
                self._pass_over(steps)
            else:
                block: Factors = {name: _rest(self.whole[name], done[name], rank - low) for name in self.whole}
                if shares[rank]:
                    width = rank - low
                    block_rate = rate * BLOCK_RATE * (self.adapter.state.nesting.max_rank / width) ** POWER
                    block = self._block(done, block, rank, steps, shares[rank], block_rate, before)
                done = {name: _joined(done[name], _ordered(block[name])) for name in self.whole}
                before = {}
                if self.checkpoint is not None:
                    self.checkpoint.write(flat("done", done))
            low = rank
        return done

    def _block(
        self,
        done: Factors,
        start: Factors,
        rank: int,
        steps: Iterator[Sequence[Part]],
        count: int,
        rate: float,
        before: dict[str, Tensor],
    ) -> Factors:
        """A block, trained by the loss of the prefix that ends with it; or ``start`` if that loses less."""
        begin = int(before["step"]) if "step" in before else 0
        values = unflat("block", before, start) if begin else start
        width = next(iter(start.values()))[0].shape[-2]
        block: Factors = {
            name: (A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_())
            for name, (A, B) in values.items()
        }
        learned = [factor for pair in block.values() for factor in pair]
        adam = torch.optim.Adam(learned, rate)
        if begin:
            _put_moments(adam, block, {name: unflat(name, before, start) for name in MOMENTS}, begin)
            self._pass_over(islice(steps, begin))
        for step, parts in enumerate(steps, start=begin):
            if not teaches(parts):
                self._pass_over(iter([parts]))
                continue
            adam.param_groups[0]["lr"] = rate * (1 - step / count)
            self._put(done, block)
            gradients = gradients_at(self.adapter, parts, [rank] * sum(part.rows for part in parts))
            for name, (A, B) in block.items():
                grad_A, grad_B = gradients[name]
                A.grad = grad_A[..., rank - width : rank, :].to(A)
                B.grad = grad_B[..., rank - width : rank].to(B)
            torch.nn.utils.clip_grad_norm_(learned, MAX_NORM)
            adam.step()
            if self.checkpoint is not None and self.checkpoint.is_due:
                moments = {name: _moments(adam, block, name) for name in MOMENTS}
                tensors = {"step": torch.tensor(step + 1)}
                for name, pairs in {"done": done, "block": block, **moments}.items():
                    tensors |= flat(name, pairs)
                self.checkpoint.write(tensors)
            self.on_step(sum(part.rows for part in parts))
        found: Factors = {name: (A.detach(), B.detach()) for name, (A, B) in block.items()}
        return found if self._loss(done, found, rank) <= self._loss(done, start, rank) else start

    def _pass_over(self, steps: Iterator[Sequence[Part]]) -> None:
        """Steps that were taken before a stop."""
        for parts in steps:
            self.on_step(sum(part.rows for part in parts))

    def _put(self, done: Factors, block: Factors) -> None:
        whole = self.whole
        self.adapter.put_factors({name: _filled(whole[name], _joined(done[name], block[name])) for name in whole})

    def _loss(self, done: Factors, block: Factors, rank: int) -> float:
        self._put(done, block)
        return _losses(self.adapter, self.looked_at, [rank])[rank]


def _moments(adam: torch.optim.Adam, block: Factors, name: str) -> Factors:
    return {layer: (adam.state[A][name], adam.state[B][name]) for layer, (A, B) in block.items()}


def _put_moments(adam: torch.optim.Adam, block: Factors, moments: dict[str, Factors], steps: int) -> None:
    for layer, pair in block.items():
        for number, factor in enumerate(pair):
            of_factor = {name: moments[name][layer][number] for name in MOMENTS}
            adam.state[factor] = {"step": torch.tensor(float(steps)), **of_factor}


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
