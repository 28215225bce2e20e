"""What lies beside an adapter's weights, and whether it is of this very adapter: singular values, an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import SPECTRA_NAME
from matryoshka_lora.formats.config import CONFIG_NAME
from matryoshka_lora.formats.opened import OpenedAdapter, hash_of_files
from matryoshka_lora.formats.sidecar import SIDECAR_NAME, as_json

Spectra = Mapping[str, Tensor]
"""Singular values by the layer's name, shape (R,) or (experts, R), float64, decreasing.

They are measured in the sense in which the adapter was reordered. ``learned`` and ``trained`` have no such
sense; their values are those of the SVD."""


_WEIGHTS = "weights"


def write_spectra(folder: Path, spectra: Spectra, weights: str) -> None:
    """Write them beside an adapter's weights, whose `weights_hash` they name."""
    values = {name: values.float().contiguous() for name, values in spectra.items()}
    save_file(values, folder / SPECTRA_NAME, {_WEIGHTS: weights})


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
            weights = (opened.metadata() or {}).get(_WEIGHTS)
            if names != {layer.name for layer in adapter.layers} or weights not in (None, hash_of_files(adapter)):
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


def share_kept(spectra: Spectra, rank: int) -> float:
    """The share of the sum of all squared singular values in the first ``rank`` directions, 0 to 1."""
    squares = [values**2 for values in spectra.values()]
    total = sum(float(s.sum()) for s in squares)
    return sum(float(s[..., :rank].sum()) for s in squares) / total if total else 1.0


def fingerprint(adapter: OpenedAdapter) -> str:
    """The hash of an adapter: in memory and in any file, and in any process, the same for the same adapter."""
    about = [adapter.config.scale, adapter.config.r, None if adapter.state is None else as_json(adapter.state)]
    found = sha256(json.dumps(about).encode())
    for key in sorted(adapter.stored):
        tensor = adapter.tensor(key).detach().cpu().contiguous()
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_measured(evaluation: Path, adapter: OpenedAdapter) -> None:
    """Raises MatryoshkaError if an ``evaluation.json`` is that of other weights than the adapter has.

    A file that does not say whose it is passes.
    """
    try:
        data = json.loads(evaluation.read_text(encoding="utf-8"))
        version, measured = data["format"], data["adapter"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if measured != (_hash_of_files(Path(adapter.name)) if version == 2 else fingerprint(adapter)):
        raise MatryoshkaError(
            f"{evaluation} was measured on other weights than {adapter.name} has now: evaluate it again, with --force"
        )


def _hash_of_files(folder: Path) -> str:
    """As version 0.1 had it."""
    found = sha256()
    descriptions = [folder / name for name in (CONFIG_NAME, SIDECAR_NAME)]
    for file in sorted((*folder.glob("*.safetensors"), *(file for file in descriptions if file.is_file()))):
        found.update(file.name.encode())
        found.update(file.read_bytes())
    return found.hexdigest()
