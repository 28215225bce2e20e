"""The singular values of a reordered adapter: what each direction of each layer is worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import SPECTRA_NAME
from matryoshka_lora.formats.opened import OpenedAdapter

Spectra = Mapping[str, Tensor]
"""Singular values by the layer's name, shape (R,) or (experts, R), float64, decreasing.

They are measured in the sense in which the adapter was reordered. An order that was learned has no such sense; its
values are those of the SVD."""


def write_spectra(folder: Path, spectra: Spectra) -> None:
    """Write them beside an adapter's weights."""
    save_file({name: values.float().contiguous() for name, values in spectra.items()}, folder / SPECTRA_NAME)


def read_spectra(adapter: OpenedAdapter) -> Spectra | None:
    """The singular values that reordering has left beside an adapter's weights; None where there are none.

    Raises:
        MatryoshkaError: The file is damaged, or belongs to another adapter.
    """
    file = Path(adapter.name) / SPECTRA_NAME
    if not file.is_file():
        return None
    again = f"Delete {file}, or reorder the adapter again"
    try:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            if names != {layer.name for layer in adapter.layers}:
                raise MatryoshkaError(f"{file} belongs to another adapter. {again}")
            spectra = {name: opened.get_tensor(name).double() for name in sorted(names)}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, MatryoshkaError):
            raise
        raise MatryoshkaError(f"{file} is damaged: {error}. {again}") from error
    for layer in adapter.layers:
        values = spectra[layer.name]
        shape = (layer.rank,) if layer.experts == 1 else (layer.experts, layer.rank)
        fits = values.shape == shape and bool(values.isfinite().all()) and bool((values >= 0).all())
        if not fits or not bool((values.diff(dim=-1) <= 0).all()):
            raise MatryoshkaError(f"{file}: the values of layer {layer.name} are not those of this adapter. {again}")
    return spectra
