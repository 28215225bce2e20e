"""Split a layer of a fused module into the layers of its parts, and put parts together, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.linalg.arrays import Array, common_dtype
from matryoshka_lora.lora_file.keys.modules import Module
from matryoshka_lora.lora_file.lora import Layer
from matryoshka_lora.lora_file.safetensors_io import StoredTensor


class Piece(NamedTuple):
    """A layer that changes some parts of a module.

    Attributes:
        layer: The layer. The rows of its B are those of the parts, one after the other.
        parts: The parts, as positions in `Module.diffusers`.
    """

    layer: Layer
    parts: tuple[int, ...]


def split_piece(piece: Piece, module: Module) -> list[Piece]:
    """Return the layer of each part. Their updates are rows of the update of the fused layer.

    A part needs only the components whose columns in its rows of B are not zero: a fused layer that
    was put together from parts has separate components for each. A part that is not changed at all
    is left out, unless no part is.

    Raises:
        MatryoshkaError: The number of rows does not fit the module.
    """
    rows = _rows_of_parts(piece, module)
    layer = piece.layer
    B = layer.B.read()
    used = {part: np.flatnonzero((B[rows[part]] != 0).any(axis=0)) for part in piece.parts}
    changed_parts = [part for part in piece.parts if len(used[part])]
    if not changed_parts:
        changed_parts = list(piece.parts)
        used = dict.fromkeys(piece.parts, np.arange(layer.rank))
    return [Piece(_part_layer(layer, rows[part], used[part]), (part,)) for part in changed_parts]


def _part_layer(layer: Layer, rows: slice, components: Array) -> Layer:
    """Return a layer of some rows of B, with some of the components."""
    rank = len(components)
    part = layer.with_rank(rank, layer.scale)
    A = layer.A
    if rank < layer.rank:
        A = StoredTensor(A.dtype, part.A.shape, lambda: layer.A.read()[components])
    shape = (rows.stop - rows.start, rank)
    B = StoredTensor(layer.B.dtype, shape, lambda: layer.B.read()[rows][:, components])
    return part.with_factors(A, B)


def fuse_pieces(pieces: Sequence[Piece], module: Module) -> Layer:
    """Return the layer of the whole module. Parts without a layer are not changed.

    Parts with the same A keep their rank. Otherwise the rank is the sum of the ranks: A has all
    components, and B is block-diagonal.

    Args:
        pieces: Layers of different parts.
        module: The module.

    Raises:
        MatryoshkaError: The shapes do not fit each other or the module.
    """
    first = pieces[0].layer
    for piece in pieces:
        if piece.layer.A.shape[1:] != first.A.shape[1:]:
            raise MatryoshkaError(
                f"{piece.layer.name:.120} and {first.name:.120} are parts of one module, but have "
                f"inputs of different widths: {list(piece.layer.A.shape)} and "
                f"{list(first.A.shape)}. Save the file again."
            )
    rows = [_rows_of_parts(piece, module, is_inside_module=True) for piece in pieces]
    layers = [piece.layer for piece in pieces]
    scale = max(layer.scale for layer in layers)
    has_common_A = _have_common_A(layers)
    rank = first.rank if has_common_A else sum(layer.rank for layer in layers)
    width = first.A.shape[1]
    shape = (sum(module.sizes) * width, rank)

    def read_A() -> Array:
        return (
            first.A.read() if has_common_A else np.concatenate([layer.A.read() for layer in layers])
        )

    def read_B() -> Array:
        B = np.zeros(shape)
        start = 0
        for layer, rows_by_part in zip(layers, rows, strict=True):
            columns = slice(start, start + layer.rank)
            values = layer.B.read().astype(np.float64) * (layer.scale / scale)
            offset = 0
            for part_rows in rows_by_part.values():
                count = part_rows.stop - part_rows.start
                B[part_rows, columns] = values[offset : offset + count]
                offset += count
            start = start if has_common_A else columns.stop
        return B

    dtype = common_dtype([factor.dtype for layer in layers for factor in (layer.A, layer.B)])
    A = StoredTensor(dtype, (rank, width), read_A)
    B = StoredTensor(dtype, shape, read_B)
    return first.with_rank(rank, scale).with_factors(A, B)


def swap_halves(layer: Layer) -> Layer:
    """Return a layer whose update has the second half of the rows first."""

    def read() -> Array:
        B = layer.B.read()
        return np.roll(B, len(B) // 2, axis=0)

    return layer.with_factors(layer.A, replace(layer.B, read=read))


def _have_common_A(layers: Sequence[Layer]) -> bool:
    first = layers[0]
    if any(layer.A.shape != first.A.shape for layer in layers):
        return False
    A = first.A.read()
    return all(np.array_equal(A, layer.A.read()) for layer in layers[1:])


def _rows_of_parts(
    piece: Piece, module: Module, is_inside_module: bool = False
) -> Mapping[int, slice]:
    """Return the rows of each part of a piece.

    Args:
        piece: The piece.
        module: The module.
        is_inside_module: Whether the rows are those of the whole module, not of the piece.

    Raises:
        MatryoshkaError: The layer is a convolution, or has another number of rows.
    """
    A, B = piece.layer.A, piece.layer.B
    width = A.shape[1]
    num_rows = sum(module.sizes[part] for part in piece.parts) * width
    if len(A.shape) != 2 or B.shape[0] != num_rows:
        raise MatryoshkaError(
            f"{piece.layer.name:.200} has factors of the shapes {list(A.shape)} and "
            f"{list(B.shape)}, but {num_rows} rows of B were expected for its name. Keep "
            "the keys as they are."
        )
    parts = range(len(module.sizes)) if is_inside_module else piece.parts
    rows: dict[int, slice] = {}
    start = 0
    for part in parts:
        stop = start + module.sizes[part] * width
        if part in piece.parts:
            rows[part] = slice(start, stop)
        start = stop
    return rows
