"""Train each rank of an adapter by itself (``by="trained"``), a block of columns at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.factors import reorder_factors
from matryoshka_lora.reordering.rows import Batch, Rows

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter

SHARE, COUNT = 0.5, 3200  # of the rows that trained the adapter, or rows if these are not known
ROWS = 8  # of a step; many small steps teach a block more than few large ones
JUDGES = 64  # at most
LEARNING_RATE = 1e-3  # of rank R, where the one that trained the adapter is not known
BLOCK_RATE, POWER = 0.5, 0.4  # w columns have 0.5 (R / w)^0.4 times R's rate: few bear more
RATIO = 0.6  # of a rank's steps to those of the next smaller one
ROUNDING = 1e-3  # nats by which two losses of one function may differ
MOST_LOST = 0.02  # of rank R, in nats or as a share of its loss, whichever is more

Factors = dict[str, tuple[Tensor, Tensor]]  # A, shape (R, in), and B, shape (out, R), by layer


def train_ranks(
    adapter: NestedAdapter, rows: Rows, count: int | None = None, seed: int = 0
) -> bool:
    """Train each nested rank below R for some steps.

    Let D be a layer's update. The ranks are taken in rising order. The block of columns that a rank
    adds begins as the leading ones of what the earlier blocks leave of D. It alone is trained, in
    float32, by the loss of the prefix that ends with it. The last block is not trained: it is the
    leading directions of what is left, so rank R loses only the smallest ones.

    A block is reset if its held-out loss is higher than at its start. If the nested ranks do not
    lose less than before in the mean, or R loses more by `MOST_LOST`, the factors are those of the
    SVD again, with a warning.

    Args:
        adapter: One that is reordered by SVD.
        rows: The rows, from `matryoshka_lora.reordering.rows.read_data`.
        count: How many are trained on; None is half as many as trained the adapter, or 3200.
        seed: The seed of their order.

    Returns:
        Whether the adapter has the trained ranks.

    Raises:
        MatryoshkaError: There is no nested rank below R, or there are too few rows.
        NotFiniteError: The loss or a gradient is not finite. The factors are as before then.
    """
    *ranks, top = nested = adapter.nesting.ranks
    if not ranks:
        raise MatryoshkaError(
            f"{top} is the only nested rank, so data cannot order it: nest the adapter with "
            "smaller ranks too, or reorder it by 'svd'"
        )
    if count is None:
        count = COUNT if rows.seen is None else max(ROWS, round(rows.seen * SHARE))
    steps = -(-count // ROWS)
    run = _Run(adapter, rows, *rows.split(steps * ROWS, min(JUDGES, steps * ROWS), seed))
    with descending(adapter):
        before = {rank: run.held_out_loss(rank) for rank in nested}
        run.train(share_out(steps, ranks))
        more = {rank: run.held_out_loss(rank) - before[rank] for rank in nested}
        mean = fmean(more.values())
        kept = mean < -ROUNDING and more[top] <= MOST_LOST * max(before[top], 1.0)
        if not kept:
            adapter.put_factors(run.whole)
    worse = [f"{rank} (by {more[rank]:.3f})" for rank in ranks if more[rank] > ROUNDING]
    if not kept:
        text = (
            "the trained ranks are not kept: on rows that they were not trained on, their loss "
            f"would change by {mean:+.3f} in the mean, and that of rank {top} by {more[top]:+.3f}"
        )
        warnings.warn(text, stacklevel=3)
    elif worse:
        text = f"these trained ranks lose more than the SVD's: {', '.join(worse)}"
        warnings.warn(text, stacklevel=3)
    return kept


def share_out(steps: int, ranks: Sequence[int]) -> dict[int, range]:
    """Return the numbers of each rank's steps, `RATIO` times as many as of the one before."""
    ends = [sum(RATIO**number for number in range(end)) for end in range(len(ranks) + 1)]
    rounded = pairwise(round(steps * end / ends[-1]) for end in ends)
    return {rank: range(*two) for rank, two in zip(ranks, rounded, strict=True)}


@contextmanager
def descending(adapter: NestedAdapter) -> Iterator[None]:
    """Give gradients to the factors alone, and switch dropout off, until the context ends.

    Then modes, ``requires_grad`` and torch's random state are as before, and no parameter has a
    gradient. After an error, a KeyboardInterrupt included, the factors are as before too.
    """
    model, start = adapter.model, adapter.factors()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter, _ in flags if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            # Checkpointing works in train mode only; submodules stay in eval mode.
            for module, _ in modes:
                module.training = bool(vars(module).get("gradient_checkpointing"))
            model.requires_grad_(False)
            for pair in adapter.parameters().values():
                for parameter in pair:
                    parameter.requires_grad_()
            yield
        except BaseException:
            adapter.put_factors(start)
            raise
        finally:
            model.zero_grad(set_to_none=True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, training in modes:
                module.training = training


class _Run:
    """Train one block after another, in `descending`.

    Attributes:
        whole: The factors at the start, in float32 at least.
        now: The factors in training: the blocks that are done, then the one that is trained. The
            later columns are unused.
    """

    def __init__(
        self, adapter: NestedAdapter, rows: Rows, numbers: Sequence[int], judges: Sequence[Batch]
    ) -> None:
        self.adapter, self.rows, self.numbers, self.judges = adapter, rows, numbers, judges
        self.rate = LEARNING_RATE if rows.rate is None else rows.rate
        factors = adapter.factors().items()
        self.whole = {name: (_in_float32(A), _in_float32(B)) for name, (A, B) in factors}
        self.now = {name: (A.clone(), B.clone()) for name, (A, B) in self.whole.items()}

    def train(self, shares: Mapping[int, range]) -> None:
        """Train the block of every rank by its steps, and set the last block."""
        with tqdm(total=sum(map(len, shares.values())), disable=self.rows.quiet or None) as bar:
            for low, rank in pairwise((0, *shares)):
                bar.set_description(f"rank {rank}")
                start = self._rest(low, rank)
                self._put(low, start)
                loss = self.held_out_loss(rank)
                self._descend(low, rank, shares[rank], bar)
                if self.held_out_loss(rank) > loss:
                    self._put(low, start)
                # Its own SVD's order, so that ranks between two nested ones become good too.
                block = self._block(low, rank).items()
                self._put(low, {name: reorder_factors(*pair)[:2] for name, pair in block})
        self._put(rank, self._rest(rank, self.adapter.nesting.max_rank))

    def _descend(self, low: int, rank: int, steps: range, bar: Any) -> None:
        """Train the columns from ``low`` to ``rank`` by the loss of the prefix of ``rank``."""
        block = self._block(low, rank)
        rate = self.rate * BLOCK_RATE * (self.adapter.nesting.max_rank / (rank - low)) ** POWER
        factors = [factor.requires_grad_() for pair in block.values() for factor in pair]
        adam = torch.optim.Adam(factors, rate)
        for step in steps:
            batches = self.rows.batches(self.numbers[step * ROWS : (step + 1) * ROWS])
            if batches:
                found, loss = self._gradients(batches, rank)
                for name, (A, B) in block.items():
                    A.grad, B.grad = found[name][0][low:rank], found[name][1][:, low:rank]
                torch.nn.utils.clip_grad_norm_(factors, 1.0)  # as the Trainer does
                adam.param_groups[0]["lr"] = rate * (steps.stop - step) / len(steps)
                adam.step()
                self._put(low, block)
                bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()

    @torch.no_grad()
    def held_out_loss(self, rank: int) -> float:
        """Return the loss of a rank on the rows that judge."""
        return self._loss(self.judges, rank)

    def _loss(self, batches: Sequence[Batch], rank: int, scale: float | None = None) -> float:
        """Return the mean loss at a rank, in nats, of the tokens with labels.

        With a scale, the gradients of so many times the loss are added to those of the factors.
        """
        weights = [int((batch["labels"] != -100).sum()) for batch in batches]
        total, q = 0.0, torch.arange(self.adapter.nesting.max_rank) < rank
        with self.adapter.standing(q.double()):
            for batch, weight in zip(batches, weights, strict=True):
                loss = self.rows.loss(batch) * (weight / sum(weights))
                if scale is not None:
                    (loss * scale).backward()  # type: ignore[no-untyped-call]
                total += loss.item()
        if not math.isfinite(total):
            raise NotFiniteError(
                f"the loss is {total}: training diverged, or the base model's dtype is too narrow. "
                "Load it in bfloat16 or float32, or reorder by 'svd', which needs no loss"
            )
        return total

    def _gradients(self, batches: Sequence[Batch], rank: int) -> tuple[Factors, float]:
        """Return the loss's gradients by all factors, in float32 at least, and the loss."""

        def gradient(parameter: Tensor, scale: float) -> Tensor:
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            return _in_float32(found.flatten(1)) / scale

        # The first scale lifts small gradients over float16's underflow, the second serves where
        # large ones overflow. Powers of two do not change the digits of other dtypes.
        for scale in (2.0**10, 1.0):
            self.adapter.model.zero_grad(set_to_none=True)
            loss, pairs = self._loss(batches, rank, scale), self.adapter.parameters()
            found = {n: (gradient(A, scale), gradient(B, scale)) for n, (A, B) in pairs.items()}
            every = [one for pair in found.values() for one in pair]
            if torch.nn.utils.get_total_norm(every).isfinite():
                return found, loss
        raise NotFiniteError(
            "gradients are NaN or infinite: load the base model in bfloat16 or float32, or reorder "
            "by 'svd', which needs none"
        )

    def _rest(self, low: int, rank: int) -> Factors:
        """Return the leading columns of what the first ``low`` columns leave of each update."""
        found = {}
        for name, (A, B) in self.whole.items():
            done_A, done_B = self.now[name][0][:low], self.now[name][1][:, :low]
            A, B, _ = reorder_factors(torch.cat([A, done_A]), torch.cat([B, -done_B], dim=1))
            found[name] = (A[: rank - low], B[:, : rank - low])
        return found

    def _block(self, low: int, rank: int) -> Factors:
        """Return copies of the columns from ``low`` to ``rank``."""
        now = self.now.items()
        return {name: (A[low:rank].clone(), B[:, low:rank].clone()) for name, (A, B) in now}

    def _put(self, low: int, block: Factors) -> None:
        """Write a block behind the first ``low`` columns, and all factors into the adapter."""
        for name, (A, B) in block.items():
            self.now[name][0][low : low + len(A)] = A.detach()
            self.now[name][1][:, low : low + len(A)] = B.detach()
        self.adapter.put_factors(self.now)


def _in_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or float64 unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
