"""LoRAs of single files as values, in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from helpers.layers import Array, update_of
from helpers.single_files import SUFFIXES
from matryoshka_lora.lora.layer import Layer, LayerKeys, StoredTensor
from matryoshka_lora.lora.lora import Lora


def layer_of(
    name: str,
    A: Array,
    B: Array,
    keys: Literal["kohya", "diffusers", "down and up"] = "diffusers",
    alpha: float | None = None,
) -> Layer:
    """Return a layer of tensors as in a file: A (R, in, *kernel), B (out, R, 1, ...)."""
    suffix_A, suffix_B = SUFFIXES[keys]
    key_alpha = None if alpha is None else f"{name}.alpha"
    return Layer.from_tensors(
        name,
        StoredTensor.from_array(A),
        StoredTensor.from_array(B),
        scale=1.0 if alpha is None else alpha / len(A),
        keys=LayerKeys(f"{name}{suffix_A}", f"{name}{suffix_B}", key_alpha),
    )


def single_file(layers: Iterable[Layer], name: str = "lora.safetensors", **fields: Any) -> Lora:
    """Return a LoRA of a single file."""
    in_order = sorted(layers, key=lambda layer: layer.name)
    return Lora(name, tuple(in_order), container="single", **fields)


def random_lora(
    shapes: Mapping[str, tuple[int, ...]],
    keys: Literal["kohya", "diffusers", "down and up"] = "diffusers",
    has_alpha: bool = False,
    seed: int = 0,
) -> Lora:
    """Return a random LoRA of mixed ranks, in float32.

    Args:
        shapes: The shape of the weight of each layer, by the name of the layer.
        keys: The suffixes of the keys.
        has_alpha: Whether it has alphas.
        seed: The seed.
    """
    rng = np.random.default_rng(seed)
    layers: list[Layer] = []
    for number, (name, (rows, *inputs)) in enumerate(shapes.items()):
        rank = 2 + (number + seed) % 3
        A = rng.standard_normal((rank, *inputs), np.float32)
        B = rng.standard_normal((rows, rank, *[1] * (len(inputs) - 1)), np.float32)
        layers.append(layer_of(name, A, B, keys, alpha=1.0 + number % 4 if has_alpha else None))
    return single_file(layers, f"random {seed}.safetensors")


def updates(lora: Lora) -> dict[str, Array]:
    """Return the dense update of each layer, shape (out, in), float64. Kernels are flattened."""
    return {layer.name: update_of(layer) for layer in lora.layers}
