"""Read and write safetensors files tensor by tensor, so that few of them are in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What safetensors calls the dtypes that factors may have."""

_DTYPES = FLOATS | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """A tensor with its dtype, as safetensors calls it, that is read when it is needed."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        """Return a tensor that is in memory already."""
        name = next(name for name, dtype in _DTYPES.items() if dtype == tensor.dtype)
        return cls(name, tuple(tensor.shape), lambda: tensor)

    @property
    def size(self) -> int:
        """The bytes of the tensor."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def open_tensors(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return the tensors of a safetensors file by key, and its metadata. Only the header is read.

    Raises:
        MatryoshkaError: There is no such file, safetensors refuses it, or a dtype is unknown.
    """
    try:
        if not file.is_file():  # a pipe would be waited for
            raise FileNotFoundError("there is no such file")
        with safe_open(file, "pt") as opened:
            heads = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            stored = {
                key: Stored(head.get_dtype(), tuple(head.get_shape()), partial(_read, file, key))
                for key, head in heads.items()
            }
            metadata = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    unknown = {each.dtype for each in stored.values()} - _DTYPES.keys()
    if unknown:
        raise _damaged(file, f"the dtype {unknown.pop()} is unknown here")
    return stored, metadata


def _read(file: Path, key: str) -> Tensor:
    # Opened for each tensor, so that no mapping of the whole file counts as memory in use.
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(key)  # type: ignore[no-any-return]
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def read_json(file: Path) -> dict[str, object]:
    """Return the object in a JSON file.

    Raises:
        MatryoshkaError: There is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, error) from error
    return found


def _damaged(file: Path, reason: object) -> MatryoshkaError:
    return MatryoshkaError(f"{file} is missing or damaged ({reason!s:.300}): copy it again")


class TensorWriter:
    """Write a safetensors file whose tensors come one after the other, in any order.

    Args:
        file: A file that does not exist yet.
        stored: Dtypes and shapes of all tensors.
        metadata: Written again at exit, when values may have changed but not their length.
    """

    def __init__(self, file: Path, stored: Mapping[str, Stored], metadata: dict[str, str]) -> None:
        self.metadata, self._stored = metadata, stored
        header, self._places = _header(stored, metadata)
        self._start = len(header)
        self._file = open(file, "xb")  # noqa: SIM115 - __exit__ closes it

    def __enter__(self) -> TensorWriter:
        return self

    def put(self, key: str, tensor: Tensor) -> None:
        """Write one tensor to its place."""
        data = tensor.detach().to("cpu", _DTYPES[self._stored[key].dtype]).contiguous()
        self._file.seek(self._start + self._places[key])
        self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._file.write(_header(self._stored, self.metadata)[0])


def file_size(stored: Mapping[str, Stored], metadata: dict[str, str]) -> int:
    """Return how many bytes a file of these tensors has, header and all."""
    return len(_header(stored, metadata)[0]) + sum(each.size for each in stored.values())


def _header(stored: Mapping[str, Stored], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the header, and the place of each tensor after it."""
    header: dict[str, object] = {"__metadata__": metadata}
    places, end = dict[str, int](), 0
    # Wide dtypes come first, so that each tensor is aligned to its own width.
    for key in sorted(stored, key=lambda key: (-_DTYPES[stored[key].dtype].itemsize, key)):
        each = stored[key]
        places[key], end = end, end + each.size
        offsets = [places[key], end]
        header[key] = {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places
