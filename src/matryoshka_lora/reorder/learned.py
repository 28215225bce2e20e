"""Learn the order of a reordered adapter's directions from data (``by="learned"``)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.factors import reorder_factors
from matryoshka_lora.nesting import Nesting, get_rule
from matryoshka_lora.reorder.descent import check_ranks, descending, gradients_at, loss_at, prefix
from matryoshka_lora.reorder.rows import Batch, Rows

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter

STEPS, ROWS = 40, 12
"""The steps where no number of rows is given, and the rows of a step."""

JUDGES = 48
"""The largest number of rows that judge; 12 have turned down orders that were better on others."""

LEARNING_RATE = 0.02
"""The rate at R = 32, chosen on validation data."""


def learn(adapter: NestedAdapter, rows: Rows, count: int | None = None, seed: int = 0) -> bool:
    """Order each layer's directions by the loss of its prefixes, from the order that they have.

    The full-rank function stays as it is, to rounding. Each row of a step has a nested rank below R,
    every rank as often as the others. Where a layer cannot give each row a rank, a step has one. If
    the nested ranks lose more in the mean, on the rows that judge, the first order is kept, and a
    warning says so.

    Args:
        adapter: One that is reordered by SVD.
        rows: What `matryoshka_lora.reorder.rows.read_data` returns.
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
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer.adam, 1.0, 0.0, total_iters=steps)
    with descending(adapter), tqdm(range(steps), "learned", disable=rows.quiet or None) as bar:
        before = _mean_loss(adapter, rows, judges)
        rule = "stratified" if _has_rows(adapter, rows, judges) else "dylora"
        for step in bar:
            batches = rows.batches(numbers[step * ROWS : (step + 1) * ROWS])
            if batches:
                q = _draw(adapter.nesting, rule, batches, seed, step)
                gradients, loss = gradients_at(adapter, rows, batches, q)
                optimizer.step(list(gradients.values()))
                schedule.step()
                adapter.put_factors(dict(zip(start, optimizer.pairs, strict=True)))
                bar.set_postfix(loss=f"{loss:.3f}")
        adapter.put_factors(dict(zip(start, optimizer.finished(), strict=True)))
        after = _mean_loss(adapter, rows, judges)
        if after > before:
            adapter.put_factors(start)
    if after > before:
        warnings.warn(
            f"the learned order is not kept: on rows that it was not learned from, the ranks below R "
            f"would lose {after:.3f} in the mean, and they lose {before:.3f} in the SVD's order",
            stacklevel=3,
        )
    return after <= before


def _mean_loss(adapter: NestedAdapter, rows: Rows, judges: Sequence[Batch]) -> float:
    """Return the mean loss of the nested ranks below R on the rows that judge."""
    ranks = adapter.nesting.ranks[:-1]
    with torch.no_grad():
        return fmean(loss_at(adapter, rows.judging, judges, prefix(adapter, r)) for r in ranks)


def _has_rows(adapter: NestedAdapter, rows: Rows, judges: Sequence[Batch]) -> bool:
    """Return whether every layer can give each row of a batch a rank of its own."""
    try:
        loss_at(
            adapter,
            rows.judging,
            judges[:1],
            prefix(adapter, 1).expand(len(judges[0]["labels"]), -1),
        )
    except NotFiniteError:
        raise
    except MatryoshkaError:
        return False
    return True


def _draw(nesting: Nesting, rule: str, batches: Sequence[Batch], seed: int, step: int) -> Tensor:
    """Return the q of ranks below R, shape (rows, R), or (R,) where all rows have one rank."""
    below = Nesting(nesting.ranks[:-1])
    q = get_rule(rule).draw(below, seed, step, sum(len(batch["labels"]) for batch in batches))
    return pad(q, (0, nesting.max_rank - below.max_rank))


class OrderOptimizer:
    """Move pairs of factors along ``A -> M A``, ``B -> B M^-1``, which never changes ``B A``.

    What M changes is every prefix, ``B M^-1 diag(1, ..., 1, 0, ..., 0) M A``. The SVD is one choice of
    M, the best in the Frobenius norm; this one descends the gradient of a loss of the prefixes.

    A step takes M to ``exp(D) M``, so M stays invertible. D follows the gradient
    ``dL/dA A^T - B^T dL/dB``, an R x R matrix, and Adam gives D its size. The directions between two
    nested ranks form a block. Mixing a block within itself changes no nested prefix, so the gradient
    there is rounding alone, which Adam would blow up: those entries of D stay zero.

    Args:
        pairs: A, shape (R, in), and B, shape (out, R), of each layer.
        ranks: The nested ranks, increasing; the last one is R.
        learning_rate: The size of a step of D's entries at R = 32. A direction becomes a sum over all
            R of them, so the rate falls with R; below R = 8 it is that of 8.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        ranks: Sequence[int],
        learning_rate: float = LEARNING_RATE,
    ) -> None:
        self.start, self.ranks = list(pairs), tuple(ranks)
        # The product is to stay the same, so float64; MPS has none.
        work = [torch.float32 if A.device.type == "mps" else torch.float64 for A, _ in pairs]
        self.M = [
            torch.eye(len(A), dtype=dtype, device=A.device)
            for (A, _), dtype in zip(pairs, work, strict=True)
        ]
        self.inverse = [M.clone() for M in self.M]
        top = self.ranks[-1]
        block = torch.searchsorted(torch.tensor(self.ranks), torch.arange(1, top + 1))
        self._moves = block[:, None] != block
        self._D = [torch.zeros_like(M).requires_grad_() for M in self.M]
        self.adam = torch.optim.Adam(self._D, learning_rate * 32 / max(top, 8), betas=(0.9, 0.99))

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The factors as they are now, in the dtypes that were given."""
        return [
            ((M @ A.to(M.dtype)).to(A.dtype), (B.to(M.dtype) @ inverse).to(B.dtype))
            for (A, B), M, inverse in zip(self.start, self.M, self.inverse, strict=True)
        ]

    @torch.no_grad()
    def step(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take a step down the gradients of the loss by A and B of each layer at `pairs`."""
        for D, (A, B), (grad_A, grad_B) in zip(self._D, self.pairs, gradients, strict=True):
            full = grad_A.to(D) @ A.to(D).T - B.to(D).T @ grad_B.to(D)
            D.grad = full * self._moves.to(D.device)
        self.adam.step()
        for number, D in enumerate(self._D):
            self.M[number] = torch.matrix_exp(D) @ self.M[number]
            self.inverse[number] = self.inverse[number] @ torch.matrix_exp(-D)
            D.zero_()

    def finished(self) -> list[tuple[Tensor, Tensor]]:
        """Return `pairs`, each block in its SVD's order, for the ranks between two nested ones."""
        found = []
        for A, B in self.pairs:
            edges = zip((0, *self.ranks), self.ranks, strict=False)
            blocks = [reorder_factors(A[low:high], B[:, low:high]) for low, high in edges]
            found.append(
                (torch.cat([a for a, _, _ in blocks]), torch.cat([b for _, b, _ in blocks], 1))
            )
        return found
