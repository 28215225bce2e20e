"""Train each rank of an adapter by itself (``by="trained"``), one block of columns after another."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.factors import checksum, reorder_factors
from matryoshka_lora.reorder.descent import (
    Factors,
    check_ranks,
    descending,
    gradients_at,
    in_float32,
    loss_at,
    prefix,
)
from matryoshka_lora.reorder.rows import Batch, Rows

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter

SHARE, COUNT = 0.5, 3200
"""The rows to train on: a share of those that trained the adapter, or a number if none is known."""

ROWS = 8
"""The rows of a step. Many small steps teach a block more than few large ones."""

JUDGES = 64
"""The largest number of rows that judge."""

LEARNING_RATE = 1e-3
"""The rate of rank R, where the one that trained the adapter is not known."""

BLOCK_RATE, POWER = 0.5, 0.4
"""A block of w columns has ``BLOCK_RATE * (R / w) ** POWER`` times R's rate: few bear larger steps."""

RATIO = 0.6
"""The steps of a rank, as a share of those of the next smaller one."""

ROUNDING = 1e-3
"""Nats by which two losses of one function may differ."""

MOST_LOST = 0.02
"""What rank R may lose, in nats or as a share of its loss, whichever is more."""

SECONDS, KEY = 30.0, "matryoshka_trained"
"""The time between two writings of the checkpoint, and the key of its metadata."""


def train_ranks(
    adapter: NestedAdapter,
    rows: Rows,
    count: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> bool:
    """Give each nested rank below R some steps of its own.

    Let D be a layer's update. The ranks are taken in rising order. The block of directions that a
    rank adds begins as the leading ones of what the earlier blocks leave of D. It alone is trained,
    in float32, by the loss of the prefix that ends with it. The last block is not trained: it is the
    leading directions of what is left, so rank R loses the smallest ones alone.

    A block that loses more than its start, on the rows that judge, goes back to it. If the nested
    ranks do not lose less than before in the mean, or R loses more by `MOST_LOST`, the factors are
    those of the SVD again, and a warning says so.

    Args:
        adapter: One that is reordered by SVD.
        rows: What `matryoshka_lora.reorder.rows.read_data` returns.
        count: The number of rows to train on; None is half of those that the Trainer has trained
            on, or 3200.
        seed: The seed of the rows' order.
        checkpoint: A file that keeps the state, twice a minute. The same call with it goes on from
            there, to the same bits.

    Returns:
        Whether the adapter has the trained ranks.

    Raises:
        MatryoshkaError: There is no nested rank below R, there are too few rows, or the file is no
            checkpoint.
        NotFiniteError: The loss or a gradient is not finite. The factors are as before then.
    """
    check_ranks(adapter)
    ranks = adapter.nesting.ranks
    if count is None:
        count = COUNT if rows.seen is None else max(ROWS, round(rows.seen * SHARE))
    steps = -(-count // ROWS)
    numbers, chosen = rows.split(steps * ROWS, min(JUDGES, steps * ROWS), seed)
    run = _Run(adapter, rows, numbers, rows.judging.batches(chosen))
    if checkpoint is not None:
        run.go_on_from(Path(checkpoint), rows.judging.fingerprint(chosen))
    with descending(adapter):
        before = run.losses(ranks)
        run.train(share_out(steps, ranks[:-1]))
        after = run.losses(ranks)
        mean = fmean(after.values()) - fmean(before.values())
        lost = after[ranks[-1]] - before[ranks[-1]]
        kept = mean < -ROUNDING and lost <= MOST_LOST * max(before[ranks[-1]], 1.0)
        if not kept:
            adapter.put_factors(run.whole)
    worse = [
        f"{r} (by {after[r] - before[r]:.3f})" for r in ranks if after[r] > before[r] + ROUNDING
    ]
    if not kept:
        warnings.warn(
            "the trained ranks are not kept: on rows that they were not trained on, the loss would "
            f"change by {mean:+.3f} in the mean of the nested ranks and by {lost:+.3f} at rank {ranks[-1]}",
            stacklevel=3,
        )
    elif worse:
        warnings.warn(
            f"trained ranks that lose more than the SVD's: {', '.join(worse)}", stacklevel=3
        )
    return kept


def share_out(steps: int, ranks: Sequence[int]) -> dict[int, int]:
    """Return the steps of each rank, whole numbers, each `RATIO` times those of the one before."""
    ends = [sum(RATIO**number for number in range(end)) for end in range(len(ranks) + 1)]
    rounded = [round(steps * end / ends[-1]) for end in ends]
    return {rank: end - begin for rank, (begin, end) in zip(ranks, pairwise(rounded), strict=True)}


class _Run:
    """One training of all blocks.

    Attributes:
        whole: The factors before, in float32 at least.
        now: The factors in training: the blocks that are done, then the one that is trained. The
            columns behind it take no part.
        done: The number of columns of the blocks that are done.
        step: The number of steps that are done.
        moments: Adam's state of the block in training.
    """

    def __init__(
        self, adapter: NestedAdapter, rows: Rows, numbers: Sequence[int], judges: Sequence[Batch]
    ) -> None:
        self.adapter, self.rows, self.numbers, self.judges = adapter, rows, numbers, judges
        self.rate = LEARNING_RATE if rows.rate is None else rows.rate
        factors = adapter.factors().items()
        self.whole = {name: (in_float32(A), in_float32(B)) for name, (A, B) in factors}
        self.now = {name: (A.clone(), B.clone()) for name, (A, B) in self.whole.items()}
        self.done, self.step, self.moments = 0, 0, dict[int, dict[str, Tensor]]()
        self.path: Path | None = None

    def losses(self, ranks: Iterable[int]) -> dict[int, float]:
        """Return the loss of some ranks on the rows that judge."""
        adapter, judging = self.adapter, self.rows.judging
        with torch.no_grad():
            return {r: loss_at(adapter, judging, self.judges, prefix(adapter, r)) for r in ranks}

    def train(self, shares: Mapping[int, int]) -> None:
        """Train every block that is not done, and fill up the last one."""
        end = 0
        steps = sum(shares.values())
        with tqdm(total=steps, initial=self.step, disable=self.rows.quiet or None) as bar:
            for low, rank in pairwise((0, *shares)):
                begin, end = end, end + shares[rank]
                if rank > self.done:
                    self._block(low, rank, range(begin, end), bar)
        self._put(self.done, self._rest(self.done, self.adapter.nesting.max_rank))

    def _block(self, low: int, rank: int, steps: range, bar: Any) -> None:
        """Train the columns from ``low`` to ``rank`` by the loss of the prefix of ``rank``."""
        start = self._rest(low, rank)
        if self.step == steps.start:
            self._put(low, start)
        block = {
            name: (A.requires_grad_(), B.requires_grad_()) for name, (A, B) in self._cut(low, rank)
        }
        factor = BLOCK_RATE * (self.adapter.nesting.max_rank / (rank - low)) ** POWER
        adam = torch.optim.Adam(
            [part for pair in block.values() for part in pair], self.rate * factor
        )
        adam.load_state_dict({**adam.state_dict(), "state": self.moments})
        bar.set_description(f"rank {rank}")
        for step in range(self.step, steps.stop):
            batches = self.rows.batches(self.numbers[step * ROWS : (step + 1) * ROWS])
            if batches:
                self._put(low, block)
                gradients, loss = gradients_at(
                    self.adapter, self.rows, batches, prefix(self.adapter, rank)
                )
                for name, (A, B) in block.items():
                    A.grad = gradients[name][0][low:rank]
                    B.grad = gradients[name][1][:, low:rank]
                (group,) = adam.param_groups
                group["lr"] = self.rate * factor * (steps.stop - step) / len(steps)
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)  # as the Trainer does
                adam.step()
                bar.set_postfix(loss=f"{loss:.3f}")
            self.step = step + 1
            self._put(low, block)
            self._save(adam.state_dict()["state"], SECONDS)
            bar.update()
        if steps:
            trained = self.losses([rank])
            self._put(low, start)
            if trained[rank] <= self.losses([rank])[rank]:
                self._put(low, block)
        # In the order of its own SVD, so that the ranks between two nested ones become good too.
        self._put(low, {name: reorder_factors(*pair)[:2] for name, pair in self._cut(low, rank)})
        self.done = rank
        self._save({}, 0.0)

    def _rest(self, low: int, rank: int) -> Factors:
        """Return the leading columns of what the first ``low`` columns leave of each update."""
        found = {}
        for name, (A, B) in self.whole.items():
            now_A, now_B = self.now[name]
            A, B, _ = reorder_factors(
                torch.cat([A, now_A[:low]]), torch.cat([B, -now_B[:, :low]], 1)
            )
            found[name] = (A[: rank - low], B[:, : rank - low])
        return found

    def _cut(self, low: int, rank: int) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Yield copies of a block of each layer."""
        for name, (A, B) in self.now.items():
            yield name, (A[low:rank].clone(), B[:, low:rank].clone())

    def _put(self, low: int, block: Factors) -> None:
        """Write a block behind the first ``low`` columns, and all factors into the adapter."""
        for name, (A, B) in block.items():
            self.now[name][0][low : low + len(A)] = A.detach()
            self.now[name][1][:, low : low + len(A)] = B.detach()
        self.adapter.put_factors(self.now)

    def go_on_from(self, path: Path, judges: str) -> None:
        """Take the state of a checkpoint if it is one of this run, and keep the state there.

        Raises:
            MatryoshkaError: The file is damaged, or no checkpoint of ``trained``.
        """
        factors = checksum(pair for _, pair in sorted(self.whole.items()))
        data = [self.rows.fingerprint(self.numbers), judges]
        settings = [self.adapter.nesting.ranks, len(self.numbers), self.rate]
        self.path, self.run, self.written = path, json.dumps([*data, factors, *settings]), 0.0
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                place = json.loads((file.metadata() or {})[KEY])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError) as error:
            raise MatryoshkaError(
                f"{path} is no checkpoint of 'trained' and would be replaced: give another path, or "
                "move the file away"
            ) from error
        if place["run"] != self.run:
            warnings.warn(
                f"{path} is of other rows, settings or factors: training begins anew and replaces it",
                stacklevel=3,
            )
            return
        self.done, self.step = place["done"], place["step"]
        for name, pair in self.now.items():
            for kind, factor in zip("AB", pair, strict=True):
                factor.copy_(tensors.pop(f"{kind}.{name}"))
        for key, value in tensors.items():
            number, name = key.split(".")
            self.moments.setdefault(int(number), {})[name] = value

    def _save(self, moments: Mapping[int, Mapping[str, Tensor]], seconds: float) -> None:
        """Replace the checkpoint, if there is one and its last writing is so many seconds ago."""
        self.moments = {}
        if self.path is None or time.monotonic() - self.written < seconds:
            return
        tensors = {
            f"{n}.{key}": value for n, state in moments.items() for key, value in state.items()
        }
        for name, (A, B) in self.now.items():
            tensors |= {f"A.{name}": A, f"B.{name}": B}
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        place = {"run": self.run, "done": self.done, "step": self.step}
        new = self.path.with_name(f"{self.path.name}.new")
        save_file(tensors, new, {KEY: json.dumps(place)})
        os.replace(new, self.path)
        self.written = time.monotonic()
