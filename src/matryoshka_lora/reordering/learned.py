"""Learn the order of a reordered adapter's directions from data (``by="learned"``)."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.factors import reorder_factors
from matryoshka_lora.reordering.descent import Step, check_ranks, descending, gradients_at, loss_at
from matryoshka_lora.reordering.rows import Batch, Rows

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter

STEPS, ROWS = 40, 12  # the steps, where no number of rows is given, and the rows of a step
JUDGES = 48  # at most; with 12, good orders were rejected
LEARNING_RATE = 0.02  # at R = 32, chosen on validation data


def learn(adapter: NestedAdapter, rows: Rows, count: int | None = None, seed: int = 0) -> bool:
    """Order each layer's directions by the loss of its prefixes, from the order that they have.

    The full-rank function stays as it is, to rounding. Each row of a step has a nested rank below
    R, every rank as often as the others. If these ranks lose more in the mean on the held-out
    rows, the first order stays, with a warning.

    Args:
        adapter: One that is reordered by SVD.
        rows: The rows, from `matryoshka_lora.reordering.rows.read_data`.
        count: The number of rows to learn from; None is 480.
        seed: The seed of the rows' order and of their ranks.

    Returns:
        Whether the adapter has the learned order.

    Raises:
        MatryoshkaError: There is no nested rank below R, or there are too few rows.
        NotFiniteError: The loss or a gradient is not finite. The factors are as before then.
    """
    check_ranks(adapter)
    steps = STEPS if count is None else -(-count // ROWS)
    numbers, chosen = rows.split(steps * ROWS, JUDGES, seed)
    judges, start = rows.judging.batches(chosen), adapter.factors()
    optimizer = OrderOptimizer(list(start.values()), adapter.nesting.ranks)
    generator = random.Random(seed)
    with descending(adapter), tqdm(range(steps), "learned", disable=rows.quiet or None) as bar:
        before = _mean_loss(adapter, rows, judges)
        for number in bar:
            of_step = numbers[number * ROWS : (number + 1) * ROWS]
            step = _with_ranks(rows, of_step, adapter.nesting.ranks[:-1], generator)
            if step:
                gradients, loss = gradients_at(adapter, rows, step)
                optimizer.step(list(gradients.values()), 1 - number / steps)
                adapter.put_factors(dict(zip(start, optimizer.pairs, strict=True)))
                bar.set_postfix(loss=f"{loss:.3f}")
        adapter.put_factors(dict(zip(start, optimizer.finished(), strict=True)))
        after = _mean_loss(adapter, rows, judges)
        if after > before:
            adapter.put_factors(start)
            warnings.warn(
                "the learned order is not kept: on rows that it was not learned from, the ranks "
                f"below R would lose {after:.3f} in the mean, and they lose {before:.3f} now",
                stacklevel=3,
            )
    return after <= before


def _with_ranks(
    rows: Rows, numbers: Sequence[int], ranks: Sequence[int], generator: random.Random
) -> Step:
    """Return rows in batches of one rank, every rank as often as the others."""
    whole, rest = divmod(len(numbers), len(ranks))
    drawn = sorted([*ranks] * whole + generator.sample(ranks, rest))
    groups = [[n for n, rank in zip(numbers, drawn, strict=True) if rank == r] for r in ranks]
    return [(b, r) for group, r in zip(groups, ranks, strict=True) for b in rows.batches(group)]


def _mean_loss(adapter: NestedAdapter, rows: Rows, judges: Sequence[Batch]) -> float:
    ranks = adapter.nesting.ranks[:-1]
    with torch.no_grad():
        return fmean(loss_at(adapter, rows, [(b, rank) for b in judges]) for rank in ranks)


class OrderOptimizer:
    """Move pairs of factors along ``A -> M A``, ``B -> B M^-1``, which never changes ``B A``.

    What M changes is every prefix, ``B M^-1 diag(1, ..., 1, 0, ..., 0) M A``. The SVD is one choice
    of M, the best in the Frobenius norm; this one descends the gradient of a loss of the prefixes.

    A step is ``M = exp(D)``, which is invertible. D follows the gradient ``dL/dA A^T - B^T dL/dB``,
    an R x R matrix, and Adam gives D its size. The directions between two nested ranks form a
    block. Mixing a block within itself changes no nested prefix, so the gradient there is rounding
    alone, which Adam would blow up: those entries of D stay zero.

    Args:
        pairs: A, shape (R, in), and B, shape (out, R), of each layer.
        ranks: The nested ranks, increasing; the last one is R.
        rate: The size of a step of D's entries at R = 32. A direction becomes a sum over all R of
            them, so the rate falls with R; below R = 8 it is that of 8.

    Attributes:
        pairs: The factors as they are now, in float64, so that the product stays the same.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        ranks: Sequence[int],
        rate: float = LEARNING_RATE,
    ) -> None:
        wide = [torch.float32 if A.device.type == "mps" else torch.float64 for A, _ in pairs]
        self.pairs = [(A.to(w), B.to(w)) for (A, B), w in zip(pairs, wide, strict=True)]
        self.ranks, top = tuple(ranks), ranks[-1]
        block = torch.searchsorted(torch.tensor(self.ranks), torch.arange(1, top + 1))
        self.moves = block[:, None] != block
        self.D = [A.new_zeros(top, top).requires_grad_() for A, _ in self.pairs]
        self.rate = rate * 32 / max(top, 8)
        self.adam = torch.optim.Adam(self.D, self.rate, betas=(0.9, 0.99))

    @torch.no_grad()
    def step(self, gradients: Sequence[tuple[Tensor, Tensor]], share: float = 1.0) -> None:
        """Take a step down the gradients of the loss by `pairs`, at a share of the rate."""
        for D, (A, B), (grad_A, grad_B) in zip(self.D, self.pairs, gradients, strict=True):
            D.grad = (grad_A.to(D) @ A.T - B.T @ grad_B.to(D)) * self.moves.to(D.device)
        self.adam.param_groups[0]["lr"] = self.rate * share
        self.adam.step()
        for number, (D, (A, B)) in enumerate(zip(self.D, self.pairs, strict=True)):
            self.pairs[number] = (torch.matrix_exp(D) @ A, B @ torch.matrix_exp(-D))
            D.zero_()

    def finished(self) -> list[tuple[Tensor, Tensor]]:
        """Return `pairs`, each block in its SVD's order, for the ranks between two nested ones."""
        found = []
        for A, B in self.pairs:
            cuts = pairwise((0, *self.ranks))
            blocks = [reorder_factors(A[low:high], B[:, low:high])[:2] for low, high in cuts]
            new_A, new_B = zip(*blocks, strict=True)
            found.append((torch.cat(new_A), torch.cat(new_B, dim=1)))
        return found
