"""Layers in memory with random factors, and their dense updates."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from matryoshka_lora import Layer, Lora
from matryoshka_lora.lora.layer import LayerKeys, StoredTensor

Array = NDArray[Any]

R = 6
SCALE = 0.75


def make_layer(
    name: str = "a",
    rank: int = R,
    in_shape: tuple[int, ...] = (9,),
    out_size: int = 8,
    num_experts: int = 1,
    scale: float = SCALE,
    dtype: Any = np.float32,
    size: float = 1.0,
    first: float | None = None,
) -> Layer:
    """Return a layer of random factors, in PEFT's layout.

    Args:
        name: Its name, on which the factors depend.
        rank: Its rank.
        in_shape: The shape of A without the rank.
        out_size: The rows of B.
        num_experts: The number of stacked pairs.
        scale: The scale.
        dtype: The dtype of the factors.
        size: The standard deviation of B.
        first: The first element of B, if it is not random.
    """
    generator = np.random.default_rng(len(name) + rank)
    rows = rank * num_experts
    trailing_ones = (1,) * (len(in_shape) - 1)  # B of a convolution has a 1 x 1 kernel
    A = generator.normal(size=(rows, *in_shape)).astype(dtype)
    B = (size * generator.normal(size=(out_size, rows, *trailing_ones))).astype(dtype)
    if first is not None:
        B.flat[0] = first
    key = f"base_model.model.{name}"
    keys = LayerKeys(f"{key}.lora_A.weight", f"{key}.lora_B.weight")
    stored_A, stored_B = StoredTensor.from_array(A), StoredTensor.from_array(B)
    return Layer.from_tensors(name, stored_A, stored_B, scale, keys, num_experts)


def make_lora(*layers: Layer, **fields: Any) -> Lora:
    """Return an adapter in memory."""
    return Lora("adapter", layers, config={"peft_type": "LORA"}, **fields)


def factors_of(layer: Layer) -> tuple[Array, Array]:
    """Return A (..., R, in) and B (..., out, R) in float64."""
    A, B, *_ = layer.read()
    return A.astype(np.float64), B.astype(np.float64)


def update_of(layer: Layer) -> Array:
    """Return the dense update, (..., out, in), in float64."""
    A, B = factors_of(layer)
    update: Array = layer.scale * B @ A
    return update


def best_matrix(update: Array, rank: int) -> Array:
    """Return the best approximation of a rank, of each matrix of a stack, by NumPy's SVD."""
    u, s, vh = np.linalg.svd(update, full_matrices=False)
    result: Array = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    return result
