"""Reorder an opened adapter by SVD: no model is needed, only its factors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from matryoshka_lora.formats.beside import Spectra, read_spectra
from matryoshka_lora.formats.layout import Layer
from matryoshka_lora.formats.opened import OpenedAdapter
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.reordering.factors import reorder_factors
from matryoshka_lora.rules import get_rule
from matryoshka_lora.state import State


def reorder_opened(
    adapter: OpenedAdapter, on_layer: Callable[[], object] | None = None, dtype: torch.dtype | None = None
) -> tuple[OpenedAdapter, dict[str, Tensor]]:
    """The same full-rank function, with each layer's factors replaced by their SVD.

    Args:
        adapter: Any LoRA adapter: nested or not, with one rank or with ranks by layer.
        on_layer: Called when a layer was computed.
        dtype: Of the new factors; None keeps what they had.

    Returns:
        A nested adapter of the largest rank that a layer has, computed layer by layer as it is read; and the singular
        values of each layer's update, which are complete when all layers were read.
    """
    state = adapter.state
    if state is None:
        state = State(Nesting.powers_of_two(adapter.rank), get_rule("lora"))
    state = replace(state, deploy="reordered", reordered="svd", spectra=None)
    rank, scale = state.nesting.max_rank, state.nesting.scale
    whole = {layer.name: layer for layer in adapter.layers}
    spectra: dict[str, Tensor] = {}

    def factors(layer: Layer) -> tuple[Tensor, Tensor]:
        given = whole[layer.name]
        A, B = adapter.factors(given)
        missing = rank - given.rank
        A, B, p = pad(A, (0, 0, 0, missing)), pad(B, (0, missing)), pad(adapter.diagonal(given), (0, missing))
        A, B, spectra[layer.name] = reorder_factors(A, B, p, scale)
        if on_layer is not None:
            on_layer()
        return A, B

    layers = [layer.at(rank, scale) for layer in adapter.layers]
    return adapter.with_factors(factors, layers, adapter.config.at(rank, scale), state, dtype), spectra


def deployed(adapter: OpenedAdapter) -> tuple[OpenedAdapter, Spectra | None]:
    """An adapter as it is saved or exported: what is still as it was trained is reordered by SVD, with a warning.

    Returns:
        The adapter itself, with the singular values that its state knows; or a reordered one with those of
        `reorder_opened`.
    """
    if adapter.nested.deployed:
        return adapter, adapter.nested.spectra
    warnings.warn(
        f"{adapter.name} was not reordered after training: what is written is reordered by SVD, so that every rank is "
        "good. The adapter itself stays as it was trained",
        stacklevel=2,
    )
    return reorder_opened(adapter)


def spectra_of(adapter: OpenedAdapter) -> Spectra:
    """The singular values that reordering has left beside an adapter's weights, or else those of its factors.

    Raises:
        MatryoshkaError: As `read_spectra`, or a factor cannot be read.
    """
    found = read_spectra(adapter)
    if found is None:
        computed, found = reorder_opened(adapter)
        for layer in computed.layers:
            computed.factors(layer)
    return found


def is_in_order(adapter: OpenedAdapter) -> bool:
    """Whether the values of `spectra_of` say what the first directions of each layer keep.

    They are not in that order after ``learned`` and ``trained``, nor in the paper's deployment; and after
    ``activations`` and ``loss`` it is not known where their values were not kept.
    """
    state = adapter.state
    if state is None or not state.deployed:
        return True  # it is reordered by SVD on the way
    by = state.reordered
    return by == "svd" or (by in ("activations", "loss") and read_spectra(adapter) is not None)
