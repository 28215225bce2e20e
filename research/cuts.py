"""Deploy a trained adapter of the study at each rank."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from matryoshka_lora import NestedAdapter
from research.training import AnswerTrainer, Trained

Cut = Callable[[Trained], Iterator[tuple[NestedAdapter, int]]]
"""Makes the adapter of each nested rank in turn, and says at which rank it is to be used."""

SHARES = {"trained": 0.5, "trained-1": 1.0, "squeezed-in-turn": 0.5, "squeezed": 0.5}
"""The rows that ranks are trained on by themselves, as a share of those of training."""

SQUEEZE_POWER = 0.4
"""LoRA-Squeeze trains on at rank r with (R / r) to this power times the rate of R."""


def learning_rows(cut: str, train_rows: int) -> int:
    """Return the rows of the gradient steps that a cut takes after a training of so many rows."""
    return round(SHARES.get(cut, 0) * train_rows)


def _prefix(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    """Take the first columns at the scale of their rank: the paper's deployment, or truncation."""
    adapter = trained.adapter()
    for rank in trained.ranks:
        yield adapter, rank


def _reordered(cut: str, trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    adapter, args = trained.adapter(), trained.trainer.args
    if cut == "svd" or len(trained.ranks) == 1:  # one rank alone has no order
        adapter.reorder()
    else:
        rows = learning_rows(cut, args.max_steps * args.per_device_train_batch_size)
        adapter.reorder("trained", trained.trainer, rows=rows, seed=args.seed)
    adapter.model.eval()
    for rank in trained.ranks:
        yield adapter, rank


def _squeezed(trained: Trained, rows: int | None = None) -> Iterator[tuple[NestedAdapter, int]]:
    """Cut by SVD to a rank and train on at it, from one rank to the next smaller one.

    This is In-Squeeze of LoRA-Squeeze (arXiv 2602.10993), with a file for each rank.
    """
    *ranks, top = trained.ranks
    adapter = trained.adapter()
    adapter.reorder()
    squeezed = {top: adapter.factors()}
    args = trained.trainer.args
    rows = rows or args.per_device_train_batch_size
    steps_of_run = args.max_steps * args.per_device_train_batch_size // rows
    for rank, steps in reversed(squeeze_steps(ranks, steps_of_run).items()):
        if rank != ranks[-1]:
            adapter.reorder()
        kept = {name: _first(pair, rank) for name, pair in adapter.factors().items()}
        adapter.put_factors(kept)  # what is zero stays so when trained on
        _train_on(adapter, trained.trainer, steps, rows, rank, top)
        squeezed[rank] = adapter.factors()
    for rank in trained.ranks:
        adapter.put_factors(squeezed[rank])
        adapter.set_rank(top)
        yield adapter, top  # what the rank leaves out is zero


def squeeze_steps(ranks: Sequence[int], steps: int) -> dict[int, int]:
    """Return the steps of each rank below R: at twice the rank half as many."""
    parts = [1 / rank for rank in ranks]
    whole = SHARES["squeezed-in-turn"] * steps / sum(parts)
    return {rank: max(1, round(whole * part)) for rank, part in zip(ranks, parts, strict=True)}


def _first(pair: tuple[Any, Any], rank: int) -> tuple[Any, Any]:
    A, B = pair
    on = torch.arange(len(A)) < rank
    return A * on[:, None], B * on


def _train_on(
    adapter: NestedAdapter, by: AnswerTrainer, steps: int, rows: int, rank: int, top: int
) -> None:
    rate = by.args.learning_rate * (top / rank) ** SQUEEZE_POWER
    with tempfile.TemporaryDirectory() as folder:
        changes = {"output_dir": folder, "max_steps": steps, "learning_rate": rate}
        changes |= {"per_device_train_batch_size": rows}
        trainer = AnswerTrainer(
            model=adapter.model,
            args=replace(by.args, **changes, seed=by.args.seed + rank),
            train_dataset=by.train_dataset,
            processing_class=by.processing_class,
        )
        trainer.train()
    adapter.model.eval()


MAKERS: dict[str, Cut] = {
    "prefix": _prefix,
    **{cut: partial(_reordered, cut) for cut in ("svd", "trained", "trained-1")},
    "squeezed-in-turn": _squeezed,
    "squeezed": partial(_squeezed, rows=16),
}
"""By the names of `research.study.CUTS`."""

SAME_AT_ALL_RANKS = tuple(cut for cut in MAKERS if not cut.startswith("squeezed"))
"""The cuts that make one adapter for all ranks, so that these can be asked together."""
