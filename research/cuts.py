"""Deploy a trained adapter of the study at each rank."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from matryoshka_lora import NestedAdapter
from matryoshka_lora.reordering.trained import ENOUGH, JUDGES, ROWS
from research.training import AnswerTrainer, Trained, score

Cut = Callable[[Trained], Iterator[tuple[NestedAdapter, int]]]
"""Makes the adapter of each nested rank in turn, and says at which rank it is to be used."""

SQUEEZED = 0.5
"""The most rows that LoRA-Squeeze trains on, as a share of those of the run: as ``trained``."""

SQUEEZE_POWER = 0.2
"""LoRA-Squeeze trains on at rank r with (R / r) to this power times the rate of R."""


def _prefix(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    """Take the first columns at the scale of their rank: the paper's deployment, or truncation."""
    adapter = trained.adapter()
    for rank in trained.ranks:
        yield adapter, rank


def _kept(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    """Take the first columns with the entries of P that they were trained with."""
    adapter = trained.adapter()
    p = adapter.rule.draw(adapter.nesting, 0, 0) / adapter.nesting.scale
    for rank in trained.ranks:
        with adapter.override(p * (torch.arange(len(p)) < rank)):
            yield adapter, rank


def _reordered(cut: str, trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    adapter, trainer = trained.adapter(), trained.trainer
    if cut == "svd" or len(trained.ranks) == 1:  # one rank alone has no order
        adapter.reorder()
    else:
        adapter.reorder("trained", trainer, seed=trainer.args.seed)
    adapter.model.eval()
    for rank in trained.ranks:
        yield adapter, rank


def _squeezed(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    """Cut by SVD to a rank and train on at it, from one rank to the next smaller one.

    This is LoRA-Squeeze (arXiv 2602.10993) with training after each cut, and a file for each rank.
    As for ``trained``, a rank that is within `ENOUGH` nats of R needs no training. What training
    has made worse is kept: nothing judges it.
    """
    *ranks, top = trained.ranks
    adapter, trainer = trained.adapter(), trained.trainer
    adapter.reorder()
    squeezed, enough = {top: adapter.factors()}, _judged(adapter, trainer) + ENOUGH
    args = trainer.args
    steps = int(SQUEEZED * args.max_steps * args.per_device_train_batch_size) // ROWS
    for number, rank in reversed(list(enumerate(ranks, 1))):
        if rank != ranks[-1]:
            adapter.reorder()
        kept = {name: _first(pair, rank) for name, pair in adapter.factors().items()}
        adapter.put_factors(kept)  # what is zero stays so when trained on
        if _judged(adapter, trainer) > enough:
            part = last_part(ranks[:number], steps)
            _train_on(adapter, trainer, part, rank, top)
            steps -= part
        squeezed[rank] = adapter.factors()
    for rank in trained.ranks:
        adapter.put_factors(squeezed[rank])
        adapter.set_rank(top)
        yield adapter, top  # what the rank leaves out is zero


def _judged(adapter: NestedAdapter, trainer: AnswerTrainer) -> float:
    data: Any = trainer.eval_dataset
    return score(adapter.model, trainer, data.select(range(min(JUDGES, len(data)))))[0]


def last_part(ranks: Sequence[int], steps: int) -> int:
    """Return the steps of the largest of some ranks: twice as many are for half the rank."""
    return round(steps / ranks[-1] / sum(1 / rank for rank in ranks))


def _first(pair: tuple[Any, Any], rank: int) -> tuple[Any, Any]:
    A, B = pair
    on = torch.arange(len(A)) < rank
    return A * on[:, None], B * on


def _train_on(adapter: NestedAdapter, by: AnswerTrainer, steps: int, rank: int, top: int) -> None:
    rate = by.args.learning_rate * (top / rank) ** SQUEEZE_POWER
    with tempfile.TemporaryDirectory() as folder:
        changes = {"output_dir": folder, "max_steps": steps, "learning_rate": rate}
        changes |= {"per_device_train_batch_size": ROWS}
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
    "kept": _kept,
    **{cut: partial(_reordered, cut) for cut in ("svd", "trained")},
    "squeezed": _squeezed,
}
"""By the names of `research.study.CUTS`."""

SAME_AT_ALL_RANKS = tuple(cut for cut in MAKERS if not cut.startswith("squeezed"))
"""The cuts that make one adapter for all ranks, so that these can be asked together."""
