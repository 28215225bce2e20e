"""Any LoRA adapter's files, read one layer at a time: PEFT's, or a nested adapter's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from matryoshka_lora.adapter.attach import INITS_THAT_ASSUME_A_SCALE
from matryoshka_lora.formats.directions import DIRECTIONS_NAME
from matryoshka_lora.adapter.factors import as_matrices
from matryoshka_lora.adapter.reading import check_factors, check_finite, no_weights, read_adapter, read_config
from matryoshka_lora.formats.sidecar import SIDECAR_NAME
from matryoshka_lora.adapter.slicing import layer_name
from matryoshka_lora.adapter.state import NestedState
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import Mark, mark, one_state

INDEX_NAME = f"{SAFETENSORS_WEIGHTS_NAME}.index.json"
_MAX_INDEX_BYTES = 1 << 26
_AGAIN = "The file is damaged or not ours: copy the adapter again"


@dataclass(frozen=True)
class Layer:
    """One pair of factors in a file.

    Attributes:
        name: Its module's name in the base model.
        key_A: The key of A, which has shape ``shape_A`` in PEFT's layout.
        key_B: The key of B.
        rank: Of this layer.
        scale: What PEFT multiplies ``B A`` with.
        experts: How many pairs are stacked in it.
    """

    name: str
    key_A: str
    key_B: str
    shape_A: Size
    shape_B: Size
    rank: int
    scale: float
    experts: int = 1

    @property
    def width(self) -> int:
        """How many numbers one more rank adds: in + out, times the experts."""
        return (self.shape_A.numel() + self.shape_B.numel()) // self.rank


@dataclass(frozen=True)
class LoraFiles:
    """The files of one adapter; tensors are read when they are asked for.

    Attributes:
        folder: Where they are.
        config: PEFT's.
        state: The nesting, if it is a nested adapter.
        layers: In the order of their names.
        others: The keys of tensors that are no factors.
        weights: The files with its tensors.
    """

    folder: Path
    config: LoraConfig
    state: NestedState | None
    layers: tuple[Layer, ...]
    others: tuple[str, ...]
    weights: tuple[Path, ...]
    _files: Mapping[str, Path | Tensor]
    _marks: Mapping[Path, Mark]

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(file.stat().st_size for file in self.weights)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first layer's A."""
        return self.tensor(self.layers[0].key_A).dtype

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(layer.rank for layer in self.layers)

    def tensor(self, key: str) -> Tensor:
        """One tensor, in its own dtype.

        Raises:
            MatryoshkaError: It holds NaN or infinity, has a dtype that no adapter has, or cannot be read; or its file
                is not the one that was opened.
        """
        file = self._files[key]
        if isinstance(file, Tensor):
            return file
        with _explained(file), safe_open(file, framework="pt") as opened:
            if mark(file) != self._marks[file]:
                raise MatryoshkaError(f"{file} was replaced while it was read: begin again")
            tensor: Tensor = opened.get_tensor(key)
        check_finite({key: tensor}, str(file))
        return tensor

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """A of shape (R, in) and B of shape (out, R) of one layer, with a leading dimension for experts."""
        return as_matrices(self.tensor(layer.key_A), self.tensor(layer.key_B), layer.rank)


def open_adapter(path: str | PathLike[str]) -> LoraFiles:
    """Open any LoRA adapter that PEFT has written, nested or not, in one file or in shards.

    Raises:
        MatryoshkaError: It is no LoRA adapter, a file is missing or damaged, or it is of a kind that has no nested
            ranks; the message gives the reason.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MatryoshkaError(f"{path} is no directory: give the directory that holds adapter_config.json")
    with one_state(folder):
        return _open(folder)


def _open(folder: Path) -> LoraFiles:
    # A nested adapter obeys stricter rules.
    state: NestedState | None = None
    tensors: dict[str, Tensor] = {}
    if (folder / SIDECAR_NAME).exists():
        state, _, tensors = read_adapter(folder)
    config = read_config(folder)
    if type(config) is not LoraConfig:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise MatryoshkaError(f"{folder} is an adapter of type {kind}: only LoRA adapters can be nested; use LoRA")
    _check_kind(config, folder)
    shapes: dict[str, Size] = {}
    files: dict[str, Path | Tensor] = {}
    if (folder / DIRECTIONS_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).exists():
        paths = [folder / DIRECTIONS_NAME]
        files.update(tensors)
        shapes.update({key: tensor.shape for key, tensor in tensors.items()})
    else:
        paths = _weight_files(folder)
    for file in paths if not files else ():
        with _explained(file), safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                if key in files:
                    raise MatryoshkaError(f"{folder} holds tensor {key} twice. {_AGAIN}")
                files[key], shapes[key] = file, Size(opened.get_slice(key).get_shape())
    layers = tuple(sorted(_layers(shapes, config, folder), key=lambda layer: layer.name))
    factors = {key for layer in layers for key in (layer.key_A, layer.key_B)}
    others = tuple(sorted(key for key in shapes if key not in factors))
    marks = {file: mark(file) for file in paths}
    return LoraFiles(folder, config, state, layers, others, tuple(paths), files, marks)


def _check_kind(config: LoraConfig, folder: Path) -> None:
    init = str(config.init_lora_weights)
    if init.startswith(INITS_THAT_ASSUME_A_SCALE):
        raise MatryoshkaError(
            f"{folder} was trained with init_lora_weights={init!r}, which also changed the base model: save it in PEFT "
            "with path_initial_model_for_weight_conversion, which makes a plain LoRA adapter of it"
        )
    if config.lora_bias:
        raise MatryoshkaError(f"{folder} has lora_bias=True, a bias that belongs to no rank: leave it out")
    if getattr(config, "layer_replication", None):
        raise MatryoshkaError(f"{folder} uses layer_replication: replicate the layers in the base model, leave it out")
    numbers = [config.r, *config.rank_pattern.values()]
    if any(type(rank) is not int or rank < 1 for rank in numbers):
        raise MatryoshkaError(f"{folder}: its config gives a rank that is no positive integer. {_AGAIN}")
    alphas = [config.lora_alpha, *config.alpha_pattern.values()]
    if any(type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha <= 0 for alpha in alphas):
        raise MatryoshkaError(f"{folder}: its config gives a lora_alpha that is no positive number. {_AGAIN}")
    if config.target_parameters and (config.rank_pattern or config.alpha_pattern):
        raise MatryoshkaError(
            f"{folder} has target_parameters with ranks or scales of their own, which is not supported: leave "
            "rank_pattern and alpha_pattern out"
        )


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / SAFETENSORS_WEIGHTS_NAME, folder / INDEX_NAME
    if whole.is_file():
        return [whole]
    if index.is_file():
        return _shards(index)
    raise no_weights(folder)


def _shards(index: Path) -> list[Path]:
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"it has {index.stat().st_size} bytes")
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MatryoshkaError(f"{index} cannot be read: {error!r:.200}. Copy the adapter again") from error
    for name in sorted(names):
        # Nothing outside the adapter's own folder is read in its name.
        if Path(name).name != name or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            raise MatryoshkaError(f"{index} names {name[:80]!r}, which is no file beside it. Copy the adapter again")
    return [index.parent / name for name in sorted(names)]


def _layers(shapes: Mapping[str, Size], config: LoraConfig, folder: Path) -> Iterator[Layer]:
    def rank_of(name: str) -> int:
        return int(config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r))

    for module, key_A, key_B in check_factors(shapes, rank_of, config, str(folder)):
        name = layer_name(module)
        rank = rank_of(name)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        yield Layer(name, key_A, key_B, shapes[key_A], shapes[key_B], rank, scale, shapes[key_A][0] // rank)


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except MatryoshkaError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise MatryoshkaError(f"{file} is damaged or cut short: {error}. Copy the adapter again") from error
