"""Reorder an adapter in a model: one verb, and by what."""

from __future__ import annotations

import os

from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.reordering.factors import reorder_factors
from matryoshka_lora.reordering.learned import ROWS, STEPS, check_ranks, learn_order
from matryoshka_lora.reordering.model import AdapterInModel, Data, check_by
from matryoshka_lora.reordering.moments import ROWS as MOMENT_ROWS
from matryoshka_lora.reordering.moments import reweigh
from matryoshka_lora.reordering.trained import LEARNING_RATE, SHARE, train_ranks
from matryoshka_lora.reordering.trained import ROWS as TRAINED_ROWS
from matryoshka_lora.reordering.trained import STEPS as TRAINED_STEPS
from matryoshka_lora.state import By


def reorder(
    adapter: AdapterInModel,
    by: By = "svd",
    data: Data | None = None,
    rows: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> dict[str, Tensor]:
    """See `matryoshka_lora.NestedAdapter.reorder`."""
    check_by(by, data is not None, rows)
    if checkpoint is not None and by != "trained":
        raise MatryoshkaError(f"by={by!r} has no checkpoint, as it takes little time: leave it out")
    if by in ("learned", "trained"):
        check_ranks(adapter.state.nesting)
    spectra, kept = _by_svd(adapter), True
    if data is not None:
        wanted = row_count(by, data, rows)
        # None hides the bar where nobody watches.
        with tqdm(total=wanted, desc=f"reordering by {by}", unit=" rows", disable=data.quiet or None) as bar:
            if by == "learned":
                kept = learn_order(adapter, data, -(-wanted // ROWS), seed=seed, on_step=bar.update)
            elif by == "trained":
                rate = LEARNING_RATE if data.rate is None else data.rate
                steps = -(-wanted // TRAINED_ROWS)
                kept = bool(train_ranks(adapter, data, steps, rate, seed, bar.update, checkpoint))
                spectra = _spectra(adapter)
            else:
                spectra = reweigh(adapter, data, by == "loss", wanted, seed, bar.update)
    if kept:
        adapter.set_reordered(by, spectra)
    return spectra


def row_count(by: By, data: Data, rows: int | None = None) -> int:
    """How many rows are used, where ``rows`` says nothing: as many as help, by trial (docs/reorder.md)."""
    if rows is not None:
        return rows
    if by == "trained":
        return TRAINED_ROWS * TRAINED_STEPS if data.seen is None else max(TRAINED_ROWS, round(data.seen * SHARE))
    return STEPS * ROWS if by == "learned" else min(MOMENT_ROWS, len(data))


def _spectra(adapter: AdapterInModel) -> dict[str, Tensor]:
    scale, found = adapter.state.nesting.scale, adapter.factors().items()
    return {name: reorder_factors(A * scale, B)[2] for name, (A, B) in found}


def _by_svd(adapter: AdapterInModel) -> dict[str, Tensor]:
    state, before = adapter.state, adapter.factors()
    for name, pair in before.items():
        if not all(bool(factor.isfinite().all()) for factor in pair):
            raise NotFiniteError(f"layer {name} holds NaN or infinity: training diverged; lower the learning rate")
    p, spectra = state.trained_diagonal(), {}
    for name, pair in before.items():
        A, B, spectra[name] = reorder_factors(*pair, p, state.nesting.scale)
        adapter.put_factors({name: (A, B)})
    adapter.set_reordered("svd", spectra)
    return spectra
