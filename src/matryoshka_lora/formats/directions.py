"""A file of which a device reads only the ranks that it needs.

PEFT stores B as (out, R): its first r columns lie all over the file, so reading them touches all of its pages. Here the
whole adapter is one matrix of shape (R, D), whose row i holds direction i of every layer: row i of A, then column i of
B, layer after layer. The first r rows are one stretch of the file, r / R of it, and they are the adapter of rank r.

It is not PEFT's format. `matryoshka_lora.load` reads it, and `matryoshka export` makes PEFT's of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Size, Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.layout import as_matrices, as_parameters, factor_keys
from matryoshka_lora.formats.pieces import open_pieces, read_header, read_piece

DIRECTIONS_NAME = "directions.safetensors"
_MATRIX = "directions"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_directions(folder: Path, tensors: Mapping[str, Tensor], rank: int) -> None:
    """Write the tensors of a reordered adapter of some rank as one matrix, largest directions first."""
    layout, rows, others = [], [], dict(tensors)
    for _, key_A, key_B in factor_keys(tensors):
        A, B = as_matrices(others.pop(key_A), others.pop(key_B), rank)
        rows += [A.movedim(-2, 0).reshape(rank, -1), B.movedim(-1, 0).reshape(rank, -1)]
        layout.append([key_A, list(tensors[key_A].shape), key_B, list(tensors[key_B].shape)])
    matrix = torch.cat(rows, dim=1)
    save_file({**others, _MATRIX: matrix}, folder / DIRECTIONS_NAME, {"layers": json.dumps(layout)})


def read_directions(file: Path, max_rank: int, rank: int) -> dict[str, Tensor]:
    """The tensors of the first ``rank`` directions in PEFT's layout; no other row of the matrix is touched.

    Raises:
        MatryoshkaError: The file is damaged, or holds no adapter of ``max_rank``.
    """
    again = "Copy or export the adapter again"
    try:
        with open_pieces(file) as opened:
            header, start = read_header(opened)
            layout = _layout(header.get("__metadata__", {}).get("layers", ""), max_rank)
            widths = [shape.numel() // max_rank for _, shape in layout]
            entry = header[_MATRIX]
            if entry["shape"] != [max_rank, sum(widths)]:
                raise ValueError(f"its matrix has shape {entry['shape']}, not {[max_rank, sum(widths)]}")
            dtype = _DTYPES[entry["dtype"]]
            begin, end = entry["data_offsets"]
            size, length = os.fstat(opened.fileno()).st_size, sum(widths) * dtype.itemsize
            if begin < 0 or end - begin != max_rank * length or start + end > size:
                raise ValueError(f"it has {size} bytes, and its header speaks of others")
            opened.seek(start + begin)
            rows = torch.frombuffer(bytearray(read_piece(opened, rank * length)), dtype=dtype).view(rank, -1)
        tensors = {}
        if header.keys() - {_MATRIX, "__metadata__"}:
            with safe_open(file, framework="pt") as others:
                tensors = {key: others.get_tensor(key) for key in others.keys() if key != _MATRIX}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MatryoshkaError(f"{file} is damaged or cut short: {error}. {again}") from error
    parts = iter(torch.split(rows, widths, dim=1))
    for (key_A, shape_A), (key_B, shape_B) in zip(layout[::2], layout[1::2], strict=True):
        experts = shape_A[0] // max_rank
        A, B = next(parts), next(parts)
        if experts > 1:
            A, B = A.reshape(rank, experts, -1).movedim(0, 1), B.reshape(rank, experts, -1).permute(1, 2, 0)
        else:
            B = B.T
        new = as_parameters(A, B, shape_A, shape_B)
        tensors[key_A], tensors[key_B] = (factor.contiguous() for factor in new)
    return tensors


def _layout(text: str, max_rank: int) -> list[tuple[str, Size]]:
    """A's and B's key and shape of each layer, one after the other."""
    found = [pair for entry in json.loads(text) for pair in _pairs(*entry)]
    for key, shape in found:
        rows = shape[1 if "lora_B" in key or "lora_embedding_B" in key else 0] if len(shape) > 1 else 0
        if rows < max_rank or rows % max_rank or not shape.numel():
            raise ValueError(f"tensor {key} of shape {list(shape)} has no rank {max_rank}")
    if not found or len({key for key, _ in found}) < len(found):
        raise ValueError("its layers are not told apart")
    return found


def _pairs(key_A: Any, shape_A: Any, key_B: Any, shape_B: Any) -> Iterator[tuple[str, Size]]:
    for key, shape in ((key_A, shape_A), (key_B, shape_B)):
        if not isinstance(key, str) or not all(type(n) is int and 0 < n < 1 << 40 for n in shape):
            raise ValueError(f"{key!r:.80} of shape {shape!r:.80} is no tensor")
        yield key, Size(shape)
