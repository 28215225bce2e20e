"""Read and write safetensors files tensor by tensor, so that few of them are in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OTHERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
_OTHERS |= {"BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_DTYPES = {name: getattr(torch, dtype) for name, dtype in (_FLOATS | _OTHERS).items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Stored(NamedTuple):
    """Describe a tensor that is read on use."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        """Return a tensor that is in memory already. It is read onto the CPU."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.cpu)

    @property
    def is_factor(self) -> bool:
        """Whether a factor may have this dtype and shape."""
        return _NAMES[self.dtype] in _FLOATS and len(self.shape) > 1 and 0 not in self.shape

    @property
    def size(self) -> int:
        """The bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_tensors(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return the tensors of a safetensors file by key, and its metadata. Only the header is read.

    Raises:
        MatryoshkaError: There is no such file, safetensors refuses it, or a dtype is unknown.
    """
    stored, read = dict[str, Stored](), _Reader(file)
    try:
        if not file.is_file():  # opening a pipe would block
            raise FileNotFoundError
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                head = opened.get_slice(key)
                dtype, shape = _DTYPES[head.get_dtype()], tuple(head.get_shape())
                stored[key] = Stored(dtype, shape, partial(read, key))
            return stored, dict(opened.metadata() or {})
    except (SafetensorError, OSError, KeyError) as error:
        raise _damaged(file, error) from error


class _Reader:
    """Read tensors of a file. It is reopened now and then: a long-lived mmap counts as memory."""

    def __init__(self, file: Path) -> None:
        self.file, self.left = file, 0

    def __call__(self, key: str) -> Tensor:
        if self.left == 0:
            self.opened: Any = safe_open(self.file, "pt")
            self.left = 32
        self.left -= 1
        tensor: Tensor = self.opened.get_tensor(key)
        return tensor


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; MatryoshkaError if there is none."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, reason: Exception) -> MatryoshkaError:
    if isinstance(reason, FileNotFoundError):
        return MatryoshkaError(f"there is no file {file}: is the path right?")
    if isinstance(reason, KeyError):
        return MatryoshkaError(f"{file} has tensors of type {reason}: save it in bf16 or fp32")
    return MatryoshkaError(f"{file} is damaged ({reason!s:.300}): copy it again")


@contextmanager
def new_tensors(
    file: Path, stored: Mapping[str, Stored], metadata: dict[str, str]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield a function that writes the tensors of ``stored`` to a new file, in any order.

    Until the end of the block, values of ``metadata`` may change, but not their length.
    """
    header, places = _header(stored, metadata)
    with open(file, "xb") as out:

        def put(key: str, tensor: Tensor) -> None:
            data = tensor.detach().to("cpu", stored[key].dtype).contiguous()
            out.seek(len(header) + places[key])
            out.write(data.reshape(-1).view(torch.uint8).numpy().data)

        yield put
        out.seek(0)
        out.write(_header(stored, metadata)[0])


def file_size(stored: Mapping[str, Stored], metadata: dict[str, str]) -> int:
    """Return how many bytes a file of these tensors has, header and all."""
    return len(_header(stored, metadata)[0]) + sum(each.size for each in stored.values())


def _header(stored: Mapping[str, Stored], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the header, and the place of each tensor after it."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    places, end = dict[str, int](), 0
    # Wide dtypes come first, so that each tensor is aligned to its own width.
    for key in sorted(stored, key=lambda key: (-stored[key].dtype.itemsize, key)):
        each = stored[key]
        places[key], end = end, end + each.size
        offsets = [places[key], end]
        shape = list(each.shape)
        header[key] = {"dtype": _NAMES[each.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places
