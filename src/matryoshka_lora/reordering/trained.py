"""Train each rank of an adapter by itself (``by="trained"``), a block of columns at a time."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
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
from matryoshka_lora.reordering import descent
from matryoshka_lora.reordering.descent import Factors, in_float32
from matryoshka_lora.reordering.rows import Rows

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
SECONDS, KEY = 30.0, "matryoshka_trained"  # between two checkpoints, and their metadata's key


def train_ranks(
    adapter: NestedAdapter,
    rows: Rows,
    count: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> bool:
    """Train each nested rank below R for some steps.

    Let D be a layer's update. The ranks are taken in rising order. The block of columns that a rank
    adds begins as the leading ones of what the earlier blocks leave of D. It alone is trained, in
    float32, by the loss of the prefix that ends with it. The last block is not trained: it is the
    leading directions of what is left, so rank R loses only the smallest ones.

    A block is reset if its held-out loss is higher than at its start. If the nested
    ranks do not lose less than before in the mean, or R loses more by `MOST_LOST`, the factors are
    those of the SVD again, with a warning.

    Args and Raises: as `matryoshka_lora.reordering.learned.learn`, and
        count: None is half as many rows as trained the adapter, or 3200.
        checkpoint: A file for the state; the same call goes on from there, to the same bits. A file
            that is no checkpoint is a MatryoshkaError.

    Returns whether the adapter has the trained ranks.
    """
    descent.check_ranks(adapter)
    *ranks, top = adapter.nesting.ranks
    if count is None:
        count = COUNT if rows.seen is None else max(ROWS, round(rows.seen * SHARE))
    steps = -(-count // ROWS)
    run = _Run(adapter, rows, *rows.split(steps * ROWS, min(JUDGES, steps * ROWS), seed))
    if checkpoint is not None:
        run.go_on_from(Path(checkpoint))
    with descent.descending(adapter):
        before = run.losses([*ranks, top])
        run.train(share_out(steps, ranks))
        after = run.losses([*ranks, top])
        mean, lost = fmean(after.values()) - fmean(before.values()), after[top] - before[top]
        kept = mean < -ROUNDING and lost <= MOST_LOST * max(before[top], 1.0)
        if not kept:
            adapter.put_factors(run.whole)
    worse = [rank for rank in ranks if after[rank] > before[rank] + ROUNDING]
    text = ", ".join(f"{rank} (by {after[rank] - before[rank]:.3f})" for rank in worse)
    if not kept:
        text = (
            "the trained ranks are not kept: on rows that they were not trained on, their loss "
            f"would change by {mean:+.3f} in the mean, and that of rank {top} by {lost:+.3f}"
        )
    elif text:
        text = f"these trained ranks lose more than the SVD's: {text}"
    if text:
        warnings.warn(text, stacklevel=3)
    return kept


def share_out(steps: int, ranks: Sequence[int]) -> dict[int, int]:
    """Return the steps of each rank, whole numbers, each `RATIO` times those of the one before."""
    ends = [sum(RATIO**number for number in range(end)) for end in range(len(ranks) + 1)]
    rounded = [round(steps * end / ends[-1]) for end in ends]
    return {rank: end - begin for rank, (begin, end) in zip(ranks, pairwise(rounded), strict=True)}


class _Run:
    """Train one block after another.

    Attributes:
        whole: The factors at the start, in float32 at least.
        now: The factors in training: the blocks that are done, then the one that is trained. The
            later columns are unused.
        done: The number of columns of the blocks that are done.
        step: The number of steps that are done.
        moments: Adam's state of the block that the checkpoint was training.
    """

    def __init__(
        self, adapter: NestedAdapter, rows: Rows, numbers: Sequence[int], chosen: Sequence[int]
    ) -> None:
        self.adapter, self.rows, self.numbers, self.chosen = adapter, rows, numbers, chosen
        self.judges = rows.judging.batches(chosen)
        self.rate = LEARNING_RATE if rows.rate is None else rows.rate
        factors = adapter.factors().items()
        self.whole = {name: (in_float32(A), in_float32(B)) for name, (A, B) in factors}
        self.now = {name: (A.clone(), B.clone()) for name, (A, B) in self.whole.items()}
        self.done, self.step, self.moments = 0, 0, dict[int, dict[str, Tensor]]()
        self.path: Path | None = None

    def losses(self, ranks: Iterable[int]) -> dict[int, float]:
        """Return the loss of some ranks on the held-out rows."""
        with torch.no_grad():
            steps = {rank: [(batch, rank) for batch in self.judges] for rank in ranks}
            return {r: descent.loss_at(self.adapter, self.rows, step) for r, step in steps.items()}

    def train(self, shares: Mapping[int, int]) -> None:
        """Train every block that is not done, by its number of steps, and set the last block."""
        end, quiet = 0, self.rows.quiet or None
        with tqdm(total=sum(shares.values()), initial=self.step, disable=quiet) as bar:
            for low, rank in pairwise((0, *shares)):
                begin, end = end, end + shares[rank]
                if rank > self.done:
                    bar.set_description(f"rank {rank}")
                    start = self._rest(low, rank)
                    self._put(low, start if self.step == begin else {})
                    self._descend(low, rank, range(begin, end), bar)
                    loss, trained = self.losses([rank]), self._block(low, rank)
                    self._put(low, start)
                    if loss[rank] <= self.losses([rank])[rank]:
                        self._put(low, trained)
                    # Its own SVD's order, so that ranks between two nested ones become good too.
                    block = self._block(low, rank).items()
                    self._put(low, {name: reorder_factors(*pair)[:2] for name, pair in block})
                    self.done, self.moments = rank, {}
                    self._save({})
        self._put(self.done, self._rest(self.done, self.adapter.nesting.max_rank))

    def _descend(self, low: int, rank: int, steps: range, bar: Any) -> None:
        """Train the columns from ``low`` to ``rank`` by the loss of the prefix of ``rank``."""
        block = self._block(low, rank)
        rate = self.rate * BLOCK_RATE * (self.adapter.nesting.max_rank / (rank - low)) ** POWER
        factors = [factor.requires_grad_() for pair in block.values() for factor in pair]
        adam = torch.optim.Adam(factors, rate)
        adam.load_state_dict({**adam.state_dict(), "state": self.moments})
        for step in range(self.step, steps.stop):
            batches = self.rows.batches(self.numbers[step * ROWS : (step + 1) * ROWS])
            if batches:
                ranked = [(batch, rank) for batch in batches]
                found, loss = descent.gradients_at(self.adapter, self.rows, ranked)
                for name, (A, B) in block.items():
                    A.grad, B.grad = found[name][0][low:rank], found[name][1][:, low:rank]
                torch.nn.utils.clip_grad_norm_(factors, 1.0)  # as the Trainer does
                adam.param_groups[0]["lr"] = rate * (steps.stop - step) / len(steps)
                adam.step()
                self._put(low, block)
                bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()
            self.step = step + 1
            if self.path and time.monotonic() - self.written >= SECONDS:
                self._save(adam.state_dict()["state"])

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

    def go_on_from(self, path: Path) -> None:
        """Take the state from a checkpoint of this very run, and keep the state there from now on.

        Raises:
            MatryoshkaError: The file is damaged, or no checkpoint of ``trained``.
        """
        data = self.rows.fingerprint(self.numbers), self.rows.judging.fingerprint(self.chosen)
        factors = checksum(pair for _, pair in sorted(self.whole.items()))
        settings = self.adapter.nesting.ranks, len(self.numbers), self.rate
        self.path, self.run, self.written = path, json.dumps([data, factors, settings]), 0.0
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                place = json.loads((file.metadata() or {})[KEY])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError) as error:
            raise MatryoshkaError(
                f"{path} is no checkpoint of 'trained' and would be replaced: give another path, "
                "or move the file away"
            ) from error
        if place["run"] != self.run:
            text = f"{path} is of other rows, settings or factors: a new training replaces it"
            warnings.warn(text, stacklevel=4)
            return
        self.done, self.step = place["done"], place["step"]
        for name, (A, B) in self.now.items():
            A.copy_(tensors.pop(f"A.{name}"))
            B.copy_(tensors.pop(f"B.{name}"))
        for key, value in tensors.items():
            number, name = key.split(".")
            self.moments.setdefault(int(number), {})[name] = value

    def _save(self, moments: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Write the checkpoint atomically, if a path is set."""
        if self.path is None:
            return
        tensors = {
            f"{n}.{key}": value for n, state in moments.items() for key, value in state.items()
        }
        for name, (A, B) in self.now.items():
            tensors |= {f"A.{name}": A, f"B.{name}": B}
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        place = {"run": self.run, "done": self.done, "step": self.step}
        new = self.path.with_name(f"{self.path.name}.matryoshka-new")
        save_file(tensors, new, {KEY: json.dumps(place)})
        os.replace(new, self.path)
        self.written = time.monotonic()
