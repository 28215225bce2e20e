"""Paths in ComfyUI's folder of LoRAs, and the text that a node shows."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import folder_paths

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError
from matryoshka_lora.lora.keys import CONFIGS_KEY
from matryoshka_lora.units import format_size

SUFFIX = ".safetensors"
INPUTS = {"max_bytes": "number of megabytes", "weights": "weights", "rank": "rank"}
"""The inputs of the nodes by the parameters of the package, in the words of its errors."""


def lora_names() -> list[str]:
    """Return the names of the files that can be read, for a dropdown."""
    names = folder_paths.get_filename_list("loras")
    return [name for name in names if name.lower().endswith(SUFFIX)]


def source_path(name: str) -> Path:
    """Return the path of a file of the dropdown."""
    return Path(folder_paths.get_full_path_or_raise("loras", name))


def open_as_loaded(name: str) -> ml.Lora:
    """Return a file of the dropdown with the scales that ComfyUI's loaders apply.

    They read the alpha of a layer from a tensor, and ignore the one in diffusers' metadata.
    """
    lora = ml.open(source_path(name))
    layers = tuple(layer if layer.keys.alpha else _unscaled(layer) for layer in lora.layers)
    metadata = {key: value for key, value in lora.metadata.items() if key != CONFIGS_KEY}
    return replace(lora, layers=layers, metadata=metadata)


def _unscaled(layer: ml.Layer) -> ml.Layer:
    values = layer.weighted_values
    return replace(
        layer, scale=1.0, weighted_values=None if values is None else values / layer.scale
    )


def modification_times(names: Iterable[str]) -> tuple[int, ...]:
    """Return the modification times of files. ComfyUI runs the node again if they change."""
    paths = [folder_paths.get_full_path("loras", name) for name in names]
    return tuple(os.stat(path).st_mtime_ns for path in paths if path is not None)


def output_path(filename: str, overwrite: bool) -> Path:
    """Return the path of a new file in the first folder of LoRAs.

    Args:
        filename: Its name, which may contain folders, and variables such as ``%year%``.
        overwrite: Whether it may exist.

    Raises:
        MatryoshkaError: The path is outside of the folder, or exists already.
    """
    name = filename.strip()
    if name.lower().endswith(SUFFIX):
        name = name[: -len(SUFFIX)]
    if os.path.basename(name) in ("", ".", ".."):
        raise MatryoshkaError(f"{filename!r:.80} is not a filename. Enter one, such as small.")
    folder = os.path.abspath(folder_paths.get_folder_paths("loras")[0])
    try:
        parent, stem, *_ = folder_paths.get_save_image_path(name, folder)
    except Exception as error:  # ComfyUI raises no other type
        raise MatryoshkaError(
            f"{filename!r:.80} is outside of the folder of LoRAs. Enter a name without '..'."
        ) from error
    path = Path(parent) / f"{stem}{SUFFIX}"
    if path.exists() and not overwrite:
        raise MatryoshkaError(
            f"{path.name} already exists. Enter another filename, or turn on overwrite."
        )
    return path


def format_ranks(ranks: Mapping[str, int]) -> str:
    """Return "rank 8", or "rank 2 to 16" if the ranks of the layers differ."""
    low, high = min(ranks.values()), max(ranks.values())
    return f"rank {low}" if low == high else f"rank {low} to {high}"


def report_saved(path: Path, ranks: Mapping[str, int], errors: Mapping[int, float]) -> list[str]:
    """Return the lines that a node shows after it has saved a file.

    Args:
        path: The file.
        ranks: The rank of each layer.
        errors: The relative error by the rank. The one of the largest rank is shown.
    """
    size = format_size(path.stat().st_size)
    error = errors[max(errors)]
    name = path.relative_to(os.path.abspath(folder_paths.get_folder_paths("loras")[0]))
    return [f"Saved {name}", f"{format_ranks(ranks)}, {size}", f"error {error:.2%}"]


@contextmanager
def messages_in_page() -> Iterator[list[str]]:
    """Collect the warnings of the package, and name the inputs of the nodes in its errors.

    Yields:
        A list that has the warnings after the block.
    """

    def name_input(match: re.Match[str]) -> str:
        parameter = match[1].partition("=")[0]
        option = f"the option --{parameter.replace('_', '-')} of the command line"
        return INPUTS.get(parameter, option)

    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield notes
        except MatryoshkaError as error:
            error.args = (re.sub("`([^`]*)`", name_input, str(error)),)
            raise
    notes += [str(warning.message) for warning in caught]
