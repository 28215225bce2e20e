"""An opened adapter: what its files say, checked once, and its tensors, read when they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.files import SPECTRA_NAME, TRAINED_NAME, Mark, mark, one_state, read_text
from matryoshka_lora.formats.config import AdapterConfig, read_config
from matryoshka_lora.formats.directions import DIRECTIONS_NAME, read_directions
from matryoshka_lora.formats.layout import Layer, find_layers
from matryoshka_lora.formats.pieces import open_pieces, read_header, read_piece
from matryoshka_lora.formats.sidecar import SIDECAR_NAME, Sidecar, check_folder, has_sidecar, read_sidecar
from matryoshka_lora.formats.weights_hash import hash_first, hash_of_tensors, weights_hash
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.state import State

WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"

_PICKLE = "adapter_model.bin"
_MAX_INDEX_BYTES = 1 << 26
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
"""What safetensors calls the dtypes that an adapter may have; integers beside the factors only, as in a BatchNorm."""


class Stored(NamedTuple):
    """A tensor that is read when it is asked for; ``dtype`` is None where it is none that an adapter may have."""

    shape: Size
    dtype: torch.dtype | None
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class OpenedAdapter:
    """One adapter. Made by `open_adapter` and `from_memory`; `with_factors` makes another one of it.

    Whatever reads, changes or writes adapters takes this object and gives this object. One layer at a time is in
    memory, unless it was opened from there.

    Attributes:
        name: Its folder, or another name for messages.
        config: PEFT's.
        state: The nesting, if it is a nested adapter.
        layers: In the order of their names.
        others: The keys of tensors that are no factors.
        weights: The files with its tensors; none of an adapter from memory.
        stored: All tensors, by PEFT's keys.
    """

    name: str
    config: AdapterConfig
    state: State | None
    layers: tuple[Layer, ...]
    others: tuple[str, ...]
    weights: tuple[Path, ...]
    stored: Mapping[str, Stored]

    @property
    def size(self) -> int:
        """Bytes of all weight files, or of the tensors in memory."""
        if self.weights:
            return sum(file.stat().st_size for file in self.weights)
        kept = (tensor for tensor in self.stored.values() if tensor.dtype is not None)
        return sum(tensor.shape.numel() * tensor.dtype.itemsize for tensor in kept if tensor.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first layer's A."""
        dtype = self.stored[self.layers[0].key_A].dtype
        return torch.float32 if dtype is None else dtype

    def itemsize(self, layer: Layer) -> int:
        """Bytes of a number of a layer's A."""
        dtype = self.stored[layer.key_A].dtype
        return dtype.itemsize if dtype else 0

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(layer.rank for layer in self.layers)

    @property
    def is_directions(self) -> bool:
        """Whether its file is one of which a device reads only the ranks that it needs."""
        return (Path(self.name) / DIRECTIONS_NAME).is_file() and not (Path(self.name) / WEIGHTS_NAME).exists()

    @property
    def nested(self) -> State:
        """The nesting.

        Raises:
            MatryoshkaError: It is not a nested adapter.
        """
        if self.state is None:
            raise MatryoshkaError(
                f"{self.name} is not a nested adapter, for it has no {SIDECAR_NAME}: copy that too if it was left "
                "behind, or make it a nested one by `matryoshka reorder`"
            )
        return self.state

    def tensor(self, key: str) -> Tensor:
        """One tensor, in its own dtype.

        Raises:
            MatryoshkaError: It holds NaN or infinity, has a dtype that no adapter has, or cannot be read; or its file
                is not the one that was opened.
        """
        tensor = self.stored[key].read()
        _check_finite(key, tensor, self.name)
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, in PEFT's layout.

        Raises:
            MatryoshkaError: As `tensor`.
        """
        return {key: self.tensor(key) for key in self.stored}

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """A of shape (R, in) and B of shape (out, R) of one layer, with a leading dimension for experts."""
        return layer.matrices(self.tensor(layer.key_A), self.tensor(layer.key_B))

    def diagonal(self, layer: Layer) -> Tensor:
        """What stands between the factors of a layer in the full-rank function, shape (R,), float64."""
        if self.state is not None:
            return self.state.trained_diagonal()
        return torch.full((layer.rank,), layer.scale, dtype=torch.float64)

    def cast(self, dtype: torch.dtype) -> OpenedAdapter:
        """The same adapter with factors of another dtype."""
        return self.with_factors(self.factors, self.layers, self.config, self.state, dtype)

    def with_factors(
        self,
        factors: Callable[[Layer], tuple[Tensor, Tensor]],
        layers: Sequence[Layer],
        config: AdapterConfig,
        state: State | None = None,
        dtype: torch.dtype | None = None,
    ) -> OpenedAdapter:
        """An adapter with other factors, computed when they are read.

        Args:
            factors: A and B as matrices, of a layer of the result.
            layers: Of the result; a layer that is not among them is left out.
            config: Of the result.
            state: Of the result; None makes an ordinary adapter.
            dtype: Of the new factors; None keeps what they had.
        """
        stored = {key: self.stored[key] for key in self.others}
        for layer in layers:
            pair = _Pair(factors, layer)
            shapes = {layer.key_A: layer.shape_A, layer.key_B: layer.shape_B}
            for which, (key, shape) in enumerate(shapes.items()):
                own = dtype or self.stored[key].dtype
                stored[key] = Stored(shape, own, partial(pair.take, which, own))
        return replace(self, config=config, state=state, layers=tuple(layers), stored=stored)


class _Pair:
    """The two factors of a layer, computed together and kept until both were taken."""

    def __init__(self, factors: Callable[[Layer], tuple[Tensor, Tensor]], layer: Layer) -> None:
        self._factors, self._layer = factors, layer
        self._made: dict[int, Tensor] = {}

    def take(self, which: int, dtype: torch.dtype | None) -> Tensor:
        if which not in self._made:
            self._made = dict(enumerate(self._layer.parameters(*self._factors(self._layer))))
        return self._made.pop(which).to(dtype).contiguous()


def open_adapter(path: str | os.PathLike[str], max_rank: int | None = None, trained: bool = False) -> OpenedAdapter:
    """Open any LoRA adapter that PEFT or this package has written, in one file or in shards.

    Args:
        path: Its folder.
        max_rank: Of a reordered adapter: its first directions only, as a nested adapter of that rank.
        trained: Read the factors as they are trained, where they stand beside those that are deployed.

    Raises:
        MatryoshkaError: It is no LoRA adapter, a file is missing or damaged, or it is of a kind that has no nested
            ranks; or its nesting was written for other weights. The message gives the reason.
    """
    folder = check_folder(path)
    with one_state(folder):
        return _open(folder, max_rank, trained)


def _open(folder: Path, max_rank: int | None, trained: bool) -> OpenedAdapter:
    config = read_config(folder)
    sidecar = read_sidecar(folder, config) if has_sidecar(folder) else None
    state = sidecar.state if sidecar else None
    directions = folder / DIRECTIONS_NAME
    if trained and sidecar and os.path.lexists(folder / TRAINED_NAME):
        opened = _open_trained(folder, config, sidecar)
    elif directions.is_file() and not (folder / WEIGHTS_NAME).exists() and state is not None:
        rank = config.r if max_rank is None else max_rank
        shorter = _first(config, state, rank)
        tensors = read_directions(directions, config.r, rank)
        found = replace(from_memory(str(folder), *shorter, tensors), weights=(directions,))
        _check_weights(found, sidecar)
        return found
    else:
        opened = _from_files(folder, config, state, _weight_files(folder))
        _check_weights(opened, sidecar)
    return opened if max_rank is None else first_ranks(opened, max_rank)


def _open_trained(folder: Path, config: AdapterConfig, sidecar: Sidecar) -> OpenedAdapter:
    """The factors as they are trained, if the weights beside them are those that they were written with."""
    file = folder / TRAINED_NAME
    if sidecar.weights and any(os.path.lexists(folder / name) for name in (WEIGHTS_NAME, INDEX_NAME)):
        _check_weights(_from_files(folder, config, sidecar.state, _weight_files(folder)), sidecar)
    opened = _from_files(folder, config, replace(sidecar.state, reordered=None), [file])
    if sidecar.weights and hash_of_files(opened) != sidecar.trained:
        raise MatryoshkaError(
            f"{file} holds the factors of another training than {folder / SIDECAR_NAME} was written for: delete "
            f"{TRAINED_NAME} to train on from the weights beside it, or copy the adapter again"
        )
    return opened


def _check_weights(opened: OpenedAdapter, sidecar: Sidecar | None) -> None:
    """Raises MatryoshkaError if an adapter's nesting was written for other weights than it has."""
    if sidecar and sidecar.weights and hash_of_files(opened) != sidecar.weights:
        file = Path(opened.name) / SIDECAR_NAME
        raise MatryoshkaError(
            f"{file} was written for other weights than {opened.weights[0].name} has now, as where PEFT alone has "
            "trained the adapter on and saved it there: its lower ranks would be wrong. Delete "
            f"{SIDECAR_NAME}, {SPECTRA_NAME} and {TRAINED_NAME}, here or in a copy; then it is a plain LoRA adapter, "
            "and `matryoshka reorder` makes a nested one of it. Or copy the adapter again"
        )


def hash_of_files(adapter: OpenedAdapter) -> str:
    """The `weights_hash` of the weights in an adapter's files, of which little is read."""
    layers = {key: layer for layer in adapter.layers for key in (layer.key_A, layer.key_B)}
    if adapter.weights[0].name == DIRECTIONS_NAME:  # in memory, with so many of its rows as are read anyway
        return hash_of_tensors(adapter.layers, {key: adapter.stored[key].read() for key in layers})
    first: dict[str, str] = {}
    for file in adapter.weights:
        with _explained(file), open_pieces(_file(file)) as opened:
            header, start = read_header(opened)
            for key in layers.keys() & header.keys():
                dtype = DTYPES.get(header[key]["dtype"])
                if dtype is None:
                    adapter.tensor(key)  # raises the reason
                    continue
                count = layers[key].shape_A[1:].numel() if key == layers[key].key_A else 1
                opened.seek(start + header[key]["data_offsets"][0])
                numbers = torch.frombuffer(bytearray(read_piece(opened, count * dtype.itemsize)), dtype=dtype)
                first[key] = hash_first(layers[key], key, numbers[None])
    return weights_hash(adapter.layers, first)


def from_memory(name: str, config: AdapterConfig, state: State | None, tensors: Mapping[str, Tensor]) -> OpenedAdapter:
    """An adapter whose tensors are in memory, by PEFT's keys.

    Raises:
        MatryoshkaError: Config and tensors contradict each other.
    """
    stored = {key: Stored(tensor.shape, tensor.dtype, partial(_same, tensor)) for key, tensor in tensors.items()}
    return _opened(name, config, state, stored, ())


def _first(config: AdapterConfig, state: State, rank: int) -> tuple[AdapterConfig, State]:
    """Config and nesting of the first ``rank`` directions of a reordered adapter, as an adapter of its own.

    Raises:
        MatryoshkaError: It is not reordered, or has no such rank.
    """
    if not state.reordered:
        raise MatryoshkaError(
            "only a reordered adapter can be read in part, as its prefixes need no other columns: use "
            "`matryoshka reorder` first"
        )
    state.check_rank(rank)
    rank, scale = int(rank), state.nesting.scale  # NumPy's integers are not JSON
    ranks = (*(r for r in state.nesting.ranks if r < rank), rank)
    return config.at(rank, scale), replace(state, nesting=Nesting(ranks, scale=scale))


def first_ranks(opened: OpenedAdapter, rank: int) -> OpenedAdapter:
    """The first ``rank`` directions of a reordered adapter, as a nested adapter of that rank.

    Raises:
        MatryoshkaError: It is not reordered, or has no such rank.
    """
    config, state = _first(opened.config, opened.nested, rank)
    whole = {layer.name: layer for layer in opened.layers}

    def factors(layer: Layer) -> tuple[Tensor, Tensor]:
        A, B = opened.factors(whole[layer.name])
        return A[..., :rank, :], B[..., :rank]

    return opened.with_factors(factors, [layer.at(rank, layer.scale) for layer in opened.layers], config, state)


def _from_files(folder: Path, config: AdapterConfig, state: State | None, files: Sequence[Path]) -> OpenedAdapter:
    stored: dict[str, Stored] = {}
    for file in files:
        with _explained(file), safe_open(_file(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                if key in stored:
                    raise MatryoshkaError(f"{folder} holds tensor {key} twice. Copy the adapter again")
                head = opened.get_slice(key)
                stored[key] = Stored(
                    Size(head.get_shape()), DTYPES.get(head.get_dtype()), partial(_read, file, key, mark(file))
                )
    return _opened(str(folder), config, state, stored, tuple(files))


def _file(path: Path) -> Path:
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError("there is no such file")
    return path


def _read(file: Path, key: str, known: Mark) -> Tensor:
    with _explained(file), safe_open(file, framework="pt") as opened:
        if mark(file) != known:
            raise MatryoshkaError(f"{file} was replaced while it was read: begin again")
        tensor: Tensor = opened.get_tensor(key)
    return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _opened(
    name: str, config: AdapterConfig, state: State | None, stored: Mapping[str, Stored], weights: tuple[Path, ...]
) -> OpenedAdapter:
    layers = find_layers({key: each.shape for key, each in stored.items()}, config, name)
    factors = {key for layer in layers for key in (layer.key_A, layer.key_B)}
    return OpenedAdapter(name, config, state, layers, tuple(sorted(stored.keys() - factors)), weights, stored)


def _check_finite(key: str, tensor: Tensor, where: str) -> None:
    """Raises MatryoshkaError, with ``where`` in it, if a tensor has another dtype than adapters have, or holds NaN."""
    if tensor.dtype not in DTYPES.values() or (".lora_" in key and not tensor.is_floating_point()):
        raise MatryoshkaError(
            f"{where}: {key} has dtype {tensor.dtype}; an adapter is written in fp32, bf16 or fp16. Save it again"
        )
    if not tensor.float().isfinite().all():
        raise NotFiniteError(
            f"{where}: {key} holds NaN or infinity, so it would destroy every answer. If training diverged, train "
            "again with a lower learning rate"
        )


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if whole.is_file():
        return [whole]
    if index.is_file():
        return _shards(index)
    pickled = f" ({_PICKLE} is a pickle, which can run code when it is read)" * (folder / _PICKLE).exists()
    raise MatryoshkaError(f"{folder} holds no {WEIGHTS_NAME}{pickled}: copy or save the adapter again")


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(read_text(index, _MAX_INDEX_BYTES))["weight_map"].values())
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MatryoshkaError(f"{index} cannot be read: {error!r:.200}. Copy the adapter again") from error
    for name in sorted(names):
        # Nothing outside the adapter's own folder is read in its name.
        if Path(name).name != name or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            raise MatryoshkaError(f"{index} names {name[:80]!r}, which is no file beside it. Copy the adapter again")
    return [index.parent / name for name in sorted(names)]


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except MatryoshkaError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise MatryoshkaError(f"{file} is damaged or cut short: {error}. Copy the adapter again") from error
