"""Write a safetensors file tensor after tensor: its header comes first, of shapes that are known before any number."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.opened import DTYPES, Stored

ALL_DTYPES = {
    **DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls the dtypes of tensors that are only copied; factors have those of `opened.DTYPES`."""

_NAMES = {dtype: name for name, dtype in ALL_DTYPES.items()}


def file_size(stored: Mapping[str, Stored], metadata: Mapping[str, str]) -> int:
    """How many bytes `write_stored` writes."""
    return len(_header(_ordered(stored), metadata)) + sum(_bytes(each) for each in stored.values())


def write_stored(
    file: Path,
    stored: Mapping[str, Stored],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
    finished: Callable[[str], Mapping[str, str]] | None = None,
) -> None:
    """Write tensors, each as it is read, so that few are in memory.

    Args:
        file: That does not exist yet.
        stored: The tensors, by key.
        metadata: Of the file.
        read: Gives the tensor of a key. Keys of one dtype come in the order of ``stored``; wide dtypes come first, so
            that each tensor is aligned.
        finished: Called at the end with the sha256 of all tensors' bytes; gives the final metadata, which is as long as
            the first was.
    """
    ordered = _ordered(stored)
    header, found = _header(ordered, metadata), hashlib.sha256()
    with open(file, "xb") as opened:
        opened.write(header)
        for key, each in ordered.items():
            tensor = read(key).detach().cpu().contiguous()
            if tensor.shape != each.shape or tensor.dtype != each.dtype:
                raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, and was to be {each}")
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            opened.write(data)
            if finished is not None:
                found.update(data)
            del tensor, data  # before the next one is read
        if finished is not None:
            again = _header(ordered, finished(found.hexdigest()))
            if len(again) != len(header):
                raise ValueError("the final metadata has another length")
            opened.seek(0)
            opened.write(again)


def _ordered(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    return dict(sorted(stored.items(), key=lambda item: -(item[1].dtype.itemsize if item[1].dtype else 0)))


def _bytes(each: Stored) -> int:
    return math.prod(each.shape) * (each.dtype.itemsize if each.dtype else 0)


def _header(stored: Mapping[str, Stored], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key, each in stored.items():
        if each.dtype is None:
            raise MatryoshkaError(f"{key} has a dtype that no adapter has. Save it again")
        begin, end = end, end + _bytes(each)
        header[key] = {"dtype": _NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
