"""Read and write safetensors files one tensor at a time, so that few are in memory at once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.linalg.arrays import Array

_FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_FLOATS8: dict[str, np.dtype[Any]] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPES: dict[str, np.dtype[Any]] = {
    **_FLOATS,
    **_FLOATS8,
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

HASH_PREFIXES = {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"}
"""The metadata that hold the SHA-256 of everything after the header, and what precedes it."""


def hash_placeholder(key: str) -> str:
    """Return a value of the same length as the hash that the metadata will hold."""
    return HASH_PREFIXES[key] + "0" * 64


@dataclass(frozen=True)
class StoredTensor:
    """A lazily read tensor.

    Attributes:
        dtype: Its dtype; bfloat16 and float8 are those of ml_dtypes.
        shape: Its shape.
        read: Returns the tensor as an array.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], Array]

    @classmethod
    def from_array(cls, array: Array) -> StoredTensor:
        """Return a tensor that is in memory already."""
        return cls(array.dtype, array.shape, lambda: array)

    @property
    def is_float8(self) -> bool:
        """Whether the dtype is a float8."""
        return self.dtype in _FLOATS8.values()

    def widened(self) -> StoredTensor:
        """Return a float8 tensor as bfloat16, which represents it exactly, and others unchanged.

        New factors are not rounded to float8: that adds an error of 4 to 7 %.
        """
        if not self.is_float8:
            return self
        dtype = _FLOATS["BF16"]
        return StoredTensor(dtype, self.shape, lambda: self.read().astype(dtype))

    def negated(self) -> StoredTensor:
        """Return the tensor with the other sign."""
        return StoredTensor(self.dtype, self.shape, lambda: -self.read())

    @property
    def is_float(self) -> bool:
        """Whether the dtype is a floating one of at least 16 bits."""
        return self.dtype in _FLOATS.values()

    @property
    def is_factor(self) -> bool:
        """Whether a LoRA factor may have this dtype and shape."""
        return self.is_float and len(self.shape) > 1 and 0 not in self.shape

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def are_factors(A: StoredTensor, B: StoredTensor) -> bool:
    """Return whether two tensors may be the factors of one linear layer or convolution."""
    return (
        A.is_factor
        and B.is_factor
        and len(A.shape) == len(B.shape)
        and A.shape[0] == B.shape[1]
        and all(size == 1 for size in B.shape[2:])
    )


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
        header, start = _read_header(file)
        tensors: dict[str, StoredTensor] = {}
        for key, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise MatryoshkaError(
                    f"{file}: dtype {entry['dtype']!r:.80} is not supported. Save it in bf16 or "
                    "fp32."
                )
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            offset = start + entry["data_offsets"][0]
            tensors[key] = StoredTensor(dtype, shape, _reader(file, dtype, shape, offset))
        return tensors, metadata
    except (SafetensorError, OSError, KeyError) as error:
        raise _damaged_file_error(file, error) from error


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header's entry of each tensor, and the offset of the tensors."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _reader(
    file: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int
) -> Callable[[], Array]:
    def read() -> Array:
        # Not a memory map: its pages would count as memory for as long as the file is open.
        count = math.prod(shape)
        return np.fromfile(file, dtype, count, offset=offset).reshape(shape)

    return read


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
    return MatryoshkaError(f"{file} is damaged ({error!s:.300}). Copy it again.")


class SafetensorsWriter:
    """Write the tensors of a new file in any order; see `create_safetensors`."""

    def __init__(
        self, stream: BufferedRandom, tensors: Mapping[str, StoredTensor], metadata: dict[str, str]
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

    def update_hashes(self) -> None:
        """Renew the hashes of the tensors that the metadata hold, after all have been written."""
        keys = HASH_PREFIXES.keys() & self.metadata.keys()
        if keys:
            self._stream.seek(self._header_size)
            digest = hashlib.file_digest(self._stream, "sha256").hexdigest()
            for key in keys:
                self.metadata[key] = HASH_PREFIXES[key] + digest

    def write_header(self) -> None:
        """Write the header. Values of ``metadata`` may have changed, but not their length."""
        header, _ = _build_header(self._tensors, self.metadata)
        self._stream.seek(0)
        self._stream.write(header)


@contextmanager
def create_safetensors(
    file: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> Iterator[SafetensorsWriter]:
    """Create a file and yield its writer. The header is written at the end.

    Args:
        file: A path that does not exist.
        tensors: Dtype and shape of every tensor; they are not read.
        metadata: The file's metadata. Until the end, ``writer.metadata`` may be changed as long
            as the lengths stay the same. Hashes, which begin as `hash_placeholder`, are renewed.
    """
    with open(file, "x+b") as stream:
        writer = SafetensorsWriter(stream, tensors, dict(metadata))
        yield writer
        writer.update_hashes()
        writer.write_header()


def safetensors_size(tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> int:
    """Return the size in bytes of a file of these tensors, header included."""
    header, _ = _build_header(tensors, metadata)
    return len(header) + sum(tensor.nbytes for tensor in tensors.values())


def _build_header(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
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
