"""The singular values of a reordered adapter: what each direction of each layer is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from matryoshka_lora.formats.opened import LoraFiles
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import SPECTRA_NAME
from matryoshka_lora.reordering.factors import reorder_factors

Metric = Literal["frobenius", "activations", "loss", "learned"]


@dataclass(frozen=True)
class Spectra:
    """Singular values by layer.

    Attributes:
        metric: In which they are measured; see `matryoshka_lora.serving.reorder`. ``learned`` has no metric: the values
            are those of ``frobenius``, and say how much rank a layer needs, not what its prefixes keep.
        values: By the layer's name, shape (R,) or (experts, R), float64, decreasing.
    """

    metric: Metric
    values: Mapping[str, Tensor]


def write_spectra(folder: Path, spectra: Spectra) -> None:
    """Write them beside an adapter's weights."""
    values = {name: values.float().contiguous() for name, values in spectra.values.items()}
    save_file(values, folder / SPECTRA_NAME, {"metric": spectra.metric})


def read_spectra(adapter: LoraFiles) -> Spectra:
    """The singular values that reordering has left, or else those of the factors in the file.

    Raises:
        MatryoshkaError: The file is damaged, or belongs to another adapter.
    """
    file = adapter.folder / SPECTRA_NAME
    if not file.exists():
        return Spectra("frobenius", {layer.name: _measure(adapter, i) for i, layer in enumerate(adapter.layers)})
    again = f"Delete {file}, or reorder the adapter again"
    try:
        with safe_open(file, framework="pt") as opened:
            metric: Any = (opened.metadata() or {}).get("metric")
            names = set(opened.keys())
            if metric not in get_args(Metric) or names != {layer.name for layer in adapter.layers}:
                raise MatryoshkaError(f"{file} belongs to another adapter. {again}")
            values = {name: opened.get_tensor(name).double() for name in sorted(names)}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, MatryoshkaError):
            raise
        raise MatryoshkaError(f"{file} is damaged: {error}. {again}") from error
    for layer in adapter.layers:
        found = values[layer.name]
        shape = (layer.rank,) if layer.experts == 1 else (layer.experts, layer.rank)
        falling = bool((found.diff(dim=-1) <= 0).all()) and bool((found >= 0).all()) if found.shape == shape else False
        if not falling or not bool(found.isfinite().all()):
            raise MatryoshkaError(f"{file}: the values of layer {layer.name} are not those of this adapter. {again}")
    return Spectra(metric, values)


def _measure(adapter: LoraFiles, number: int) -> Tensor:
    layer = adapter.layers[number]
    A, B = adapter.factors(layer)
    if adapter.state is not None:
        rank = adapter.state.nesting.max_rank
        p = adapter.state.mask(rank) * adapter.state.scale(rank)
    else:
        p = torch.full((layer.rank,), layer.scale, dtype=torch.float64)
    return reorder_factors(A, B, p)[2]
