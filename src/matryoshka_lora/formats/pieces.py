"""Pieces of a safetensors file: what is asked for is read from the disk, and next to nothing beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

_MAX_HEADER = 1 << 26


@contextmanager
def open_pieces(file: Path) -> Iterator[FileIO]:
    """A file of which `read_header` and `read_piece` read parts."""
    with open(file, "rb", buffering=0) as opened:
        # Else the system reads ahead, up to megabytes that nobody asked for.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        yield opened


def read_header(file: FileIO) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins.

    Raises:
        ValueError: It is too long, no JSON, or cut short.
    """
    length = int.from_bytes(read_piece(file, 8), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"its header is to have {length} bytes")
    return json.loads(read_piece(file, length)), 8 + length


def read_piece(file: FileIO, count: int) -> bytes:
    """So many bytes from where the file stands.

    Raises:
        ValueError: It has fewer.
    """
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    if count:
        raise ValueError(f"{count} bytes are missing at its end")
    return b"".join(parts)
