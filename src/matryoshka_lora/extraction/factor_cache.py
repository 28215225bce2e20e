"""Factorize the changes of all layers, and keep the factors in a folder until all are there."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from matryoshka_lora.atomic import create_file
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.extraction.factorize import Change, RankLimits, factorize_change
from matryoshka_lora.extraction.model_diff import WeightPair
from matryoshka_lora.formats.safetensors_io import create_safetensors, open_safetensors
from matryoshka_lora.linalg.allocation import LayerSpectrum, ranks_for_error
from matryoshka_lora.lora.keys import PEFT_PREFIX
from matryoshka_lora.lora.layer import Layer, LayerKeys, TensorInfo
from matryoshka_lora.tensors import to_numpy

# The rank that is tried first if the error is limited.
_FIRST_RANK_FOR_ERROR = 64


class ChangedLayers:
    """The factors of the change of each layer.

    Args:
        weights: The weights before and after fine-tuning, by the name of the layer.
        folder: The folder of the factors, from `resumable_folder`.
    """

    def __init__(self, weights: Mapping[str, WeightPair], folder: Path) -> None:
        self._weights = weights
        self._folder = folder
        self._layers: dict[str, Layer] = {}
        self._changes: dict[str, Change] = {}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, as those of a PEFT folder."""
        return tuple(self._layers.values())

    @property
    def total(self) -> float:
        """The squared norm of the change of all layers."""
        return sum(change.total for change in self._changes.values())

    @property
    def residual(self) -> float:
        """The squared norm of what the factors of all layers miss of it."""
        return sum(change.residual for change in self._changes.values())

    @property
    def rounding(self) -> float:
        """The part of the total that rounding to half precision is expected to be."""
        return sum(change.rounding for change in self._changes.values())

    def factorize(self, limits: RankLimits) -> None:
        """Factorize the changes that are not in the folder."""
        self._factorize(dict.fromkeys(self._weights, limits))

    def factorize_for_error(self, max_error: float, max_rank: int | None) -> None:
        """Factorize until the factors have the ranks that `ranks_for_error` needs.

        A layer that may need further components is factorized again, at twice the rank.

        Args:
            max_error: The maximum relative error over all layers.
            max_rank: An upper bound of each rank, with which the error may be larger.
        """
        largest_ranks: dict[str, int] = {}
        ranks: dict[str, int] = {}
        for name, weight in self._weights.items():
            largest_ranks[name] = min(max_rank or weight.full_rank, weight.full_rank)
            ranks[name] = min(_FIRST_RANK_FOR_ERROR, largest_ranks[name])
        while ranks:
            self._factorize({name: RankLimits(rank, None) for name, rank in ranks.items()})
            spectra = {
                name: self._extended_spectrum(name, largest)
                for name, largest in largest_ranks.items()
            }
            residual = self.total - sum(sum(layer.squares) for layer in spectra.values())
            needed = ranks_for_error(spectra, max_error, self.total, max(residual, 0.0))
            ranks = {}
            for name, layer in self._layers.items():
                if needed[name] > layer.rank:
                    ranks[name] = min(2 * layer.rank, largest_ranks[name])

    def _extended_spectrum(self, name: str, largest_rank: int) -> LayerSpectrum:
        """Return the singular values of a layer, with the next ones as large as they may be.

        None is larger than the last one that is known, and their squares add up to the residual.
        """
        layer, change = self._layers[name], self._changes[name]
        values = list(change.singular_values)
        residual = change.residual
        while len(values) < largest_rank and residual > 0 and values[-1] > 0:
            values.append(min(values[-1], math.sqrt(residual)))
            residual -= values[-1] ** 2
        return LayerSpectrum(np.array(values), layer.parameters_per_rank, len(values))

    def _factorize(self, limits: Mapping[str, RankLimits]) -> None:
        num_bytes = sum(self._weights[name].new.nbytes for name in limits)
        indices = {name: index for index, name in enumerate(self._weights, start=1)}
        bar = tqdm(total=num_bytes, desc="extracting", unit="B", unit_scale=True, disable=None)
        with bar:
            for number, (name, limit) in enumerate(limits.items(), start=1):
                bar.set_postfix_str(f"layer {number} of {len(limits)}")
                weight = self._weights[name]
                file = self._folder / f"{indices[name]}.safetensors"
                if not file.exists() or _is_too_small(file, weight, limit):
                    A, B, change = factorize_change(name, weight, limit)
                    _write_factors(file, A, B, change)
                self._layers[name], self._changes[name] = _read_factors(file, name, weight)
                bar.update(weight.new.nbytes)


def _is_too_small(file: Path, weight: WeightPair, limit: RankLimits) -> bool:
    """Return whether the factors in a file have a smaller rank than is needed now."""
    if limit.share is not None or limit.max_rank is None:
        return False
    tensors, _ = open_safetensors(file)
    return tensors["A"].shape[0] < min(limit.max_rank, weight.full_rank)


def _write_factors(file: Path, A: Tensor, B: Tensor, change: Change) -> None:
    arrays = {"A": to_numpy(A), "B": to_numpy(B)}
    tensors = {key: TensorInfo(array.dtype, array.shape) for key, array in arrays.items()}
    metadata = {"change": json.dumps(asdict(change))}
    with (
        create_file(file, force=True) as temporary,
        create_safetensors(temporary, tensors, metadata) as writer,
    ):
        for key, array in arrays.items():
            writer.write(key, array)


def _read_factors(file: Path, name: str, weight: WeightPair) -> tuple[Layer, Change]:
    tensors, metadata = open_safetensors(file)
    key = f"{PEFT_PREFIX}{name}"
    keys = LayerKeys(f"{key}.lora_A.weight", f"{key}.lora_B.weight")
    layer = Layer.from_tensors(name, tensors["A"], tensors["B"], 1.0, keys, source=str(file))
    # The factors are float32 in the cache, and get the dtype of the weight in the output.
    layer = replace(layer, dtype=weight.new.dtype, has_new_factors=True)
    return layer, Change(**json.loads(metadata["change"]))


def file_state(file: Path) -> list[object]:
    """Return values that change when a file is changed."""
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


@contextmanager
def resumable_folder(output: Path, settings: list[object]) -> Iterator[Path]:
    """Yield a folder next to the output, which is deleted at the end unless there is an exception.

    A folder of the same settings is used again; the content of another one is deleted first. Only
    one process at a time uses it.
    """
    folder = output.absolute().with_name(f".{output.name}.extracting")
    folder.mkdir(parents=True, exist_ok=True)
    settings_file = folder / "settings.json"
    names = {file.name for file in folder.iterdir()} - {"lock"}
    if folder.is_symlink() or (names and settings_file.name not in names):
        raise MatryoshkaError(
            f"{folder} is not a folder of an interrupted extraction. Move it, or pass another path."
        )
    with _lock(folder / "lock", output):
        text = json.dumps(settings)
        if settings_file.is_file() and settings_file.read_text(encoding="utf-8") != text:
            for file in folder.glob("*.safetensors"):
                file.unlink()
        settings_file.write_text(text, encoding="utf-8")
        yield folder
        shutil.rmtree(folder, ignore_errors=True)  # Windows keeps the lock while it is held


@contextmanager
def _lock(file: Path, output: Path) -> Iterator[None]:
    """Hold a lock, which the operating system releases if the process is killed."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MatryoshkaError(
            f"Another process is extracting to {output}. Wait for it, or pass another path."
        ) from error
    try:
        yield
    finally:
        lock.release()
