"""Read and write safetensors files one tensor at a time, so that few are in memory at once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from matryoshka_lora.errors import MatryoshkaError, short
from matryoshka_lora.linalg.arrays import FLOATS, FLOATS8, Array, DType
from matryoshka_lora.linalg.factors import Checksum
from matryoshka_lora.lora.layer import Layer, StoredTensor, TensorInfo
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.metadata import HASH_PREFIXES
from matryoshka_lora.lora.save import Written

_DTYPES: dict[str, DType] = {
    **FLOATS,
    **FLOATS8,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

NESTING_KEY = "matryoshka_lora"
"""The key of ranks, order and checksum of a nested adapter in the metadata."""

ORDER_KEY = "matryoshka_lora.order"
"""The key of the order ``"weighted"`` of a single file in the metadata, with the checksum."""

ERROR_KEY = "matryoshka_lora.error"
"""The key of `Lora.original_error` in the metadata of every LoRA that is written, also of 0."""


def open_safetensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a file by key, and its metadata. Only the header is read.

    Raises:
        MatryoshkaError: The file does not exist, safetensors rejects it, or a dtype is unknown.
    """
    try:
        if not file.is_file():  # opening a pipe would block
            raise FileNotFoundError
        with safe_open(file, "np") as validated:  # safetensors checks the header
            metadata = dict(validated.metadata() or {})
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return {key: _stored_tensor(file, header[key], 8 + length) for key in header}, metadata
    except (SafetensorError, OSError, KeyError) as error:
        raise _damaged_file_error(file, error) from error


def pop_error(metadata: dict[str, str]) -> float:
    """Remove the error against the original from metadata, and return it; 0 if there is none."""
    try:
        error = float(metadata.pop(ERROR_KEY, 0.0))
    except ValueError:
        return 0.0
    return error if 0 <= error < math.inf else 0.0


def error_metadata(error: float = 0.0) -> dict[str, str]:
    """Return the metadata of an error against the original. Its length is always the same."""
    return {ERROR_KEY: f"{min(error, 9.0):.6f}"}


def _stored_tensor(file: Path, entry: Mapping[str, Any], start: int) -> StoredTensor:
    """Return the tensor of an entry of a file's header. The tensors begin at an offset."""
    if entry["dtype"] not in _DTYPES:
        raise MatryoshkaError(
            f"{file}: dtype {short(entry['dtype'])} is not supported. Save it in bf16 or fp32."
        )
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    offset = start + entry["data_offsets"][0]

    def read() -> Array:
        # Not a memory map: its pages would count as memory for as long as the file is open.
        return np.fromfile(file, dtype, math.prod(shape), offset=offset).reshape(shape)

    return StoredTensor(dtype, shape, read)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        MatryoshkaError: The file cannot be read, or holds no JSON object.
    """
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _damaged_file_error(file, error) from error


def _damaged_file_error(file: Path, error: Exception) -> MatryoshkaError:
    if isinstance(error, FileNotFoundError):
        return MatryoshkaError(f"File not found: {file}")
    return MatryoshkaError(f"{file} is damaged ({error}). Copy it again.")


class SafetensorsWriter:
    """Write the tensors of a new file in any order; see `create_safetensors`."""

    def __init__(
        self, stream: BufferedRandom, tensors: Mapping[str, TensorInfo], metadata: dict[str, str]
    ) -> None:
        self.metadata = metadata
        self._stream = stream
        self._tensors = tensors
        header, self._offsets = _build_header(tensors, metadata)
        self._header_size = len(header)

    def write(self, key: str, array: Array) -> None:
        """Write one tensor, cast to the dtype that was declared."""
        data = np.ascontiguousarray(array, dtype=self._tensors[key].dtype)
        self._stream.seek(self._header_size + self._offsets[key])
        self._stream.write(data.reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """Renew the hashes of the tensors in the metadata, and write the header.

        Values of ``metadata`` may have changed, but not their length.
        """
        keys = HASH_PREFIXES.keys() & self.metadata.keys()
        if keys:
            self._stream.seek(self._header_size)
            digest = hashlib.file_digest(self._stream, "sha256").hexdigest()
            for key in keys:
                self.metadata[key] = HASH_PREFIXES[key] + digest
        header, _ = _build_header(self._tensors, self.metadata)
        assert len(header) == self._header_size  # a longer one would overwrite tensors
        self._stream.seek(0)
        self._stream.write(header)


@contextmanager
def create_safetensors(
    file: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> Iterator[SafetensorsWriter]:
    """Create a file and yield its writer. The header is written at the end.

    Args:
        file: A path that does not exist.
        tensors: Dtype and shape of every tensor; they are not read.
        metadata: The file's metadata. Until the end, ``writer.metadata`` may be changed as long
            as the lengths stay the same. The hashes of `HASH_PREFIXES` are renewed.
    """
    with open(file, "x+b") as stream:
        writer = SafetensorsWriter(stream, tensors, dict(metadata))
        yield writer
        writer.finish()


def lora_file_size(lora: Lora) -> int:
    """Return the size in bytes of the file that `write_lora_tensors` writes."""
    tensors = _lora_tensors(lora)
    header, _ = _build_header(tensors, {**lora.metadata, **error_metadata()})
    return len(header) + sum(tensor.nbytes for tensor in tensors.values())


def _lora_tensors(lora: Lora) -> dict[str, TensorInfo]:
    """Return dtype and shape of all tensors of a LoRA by key."""
    tensors: dict[str, TensorInfo] = dict(lora.other_tensors)
    for layer in lora.layers:
        tensors[layer.keys.A] = TensorInfo(layer.dtype, layer.shape_A)
        tensors[layer.keys.B] = TensorInfo(layer.dtype, layer.shape_B)
    return tensors


def write_lora_tensors(lora: Lora, file: Path) -> Written:
    """Write the tensors and the metadata of a LoRA. One layer is in memory at a time.

    The metadata get the error against the original, and a nesting or an order the checksum of the
    factors.
    """
    written = Written(lora.ranks)
    checksum = Checksum()
    checksum_keys = {NESTING_KEY, ORDER_KEY} & lora.metadata.keys()
    metadata = {**lora.metadata, **error_metadata()}
    with create_safetensors(file, _lora_tensors(lora), metadata) as writer:
        for layer, factors in written.compute(lora):
            A, B = layer.to_tensors(factors)
            writer.write(layer.keys.A, A)
            writer.write(layer.keys.B, B)
            if checksum_keys:
                checksum.update(A, B)
        for key, tensor in lora.other_tensors.items():
            writer.write(key, tensor.read())
        for key in checksum_keys:
            record = json.loads(lora.metadata[key])
            record["checksum"] = checksum.hexdigest()
            writer.metadata[key] = json.dumps(record)
        writer.metadata.update(error_metadata(written.original_error(lora)))
    return written


def weighted_values_record(lora: Lora) -> dict[str, list[float]]:
    """Return the weighted values of the layers by name, for the metadata."""
    return {
        layer.name: [float(f"{value:.6g}") for value in layer.weighted_values]
        for layer in lora.layers
        if layer.weighted_values is not None
    }


def with_weighted_values(layer: Layer, record: Mapping[str, Any]) -> Layer:
    """Return a layer with its weighted values of `weighted_values_record`.

    Raises:
        LookupError, TypeError, ValueError: The record is damaged.
    """
    values = np.array(record[layer.name], np.float64)
    if values.shape != (layer.rank,) or not np.isfinite(values).all():
        raise ValueError
    return replace(layer, weighted_values=values)


def stored_checksum(layers: Sequence[Layer], tensors: Mapping[str, StoredTensor]) -> str:
    """Return the checksum of the factors in a file. All of them are read."""
    checksum = Checksum()
    for layer in layers:
        checksum.update(tensors[layer.keys.A].read(), tensors[layer.keys.B].read())
    return checksum.hexdigest()


def _build_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the header, and each tensor's offset after it."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offsets: dict[str, int] = {}
    end = 0
    # Wide dtypes come first, so that each tensor is aligned to its own width.
    for key in sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key)):
        tensor = tensors[key]
        offsets[key] = end
        end += tensor.nbytes
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offsets[key], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets
