"""Single-file LoRAs of image models, written and read as other programs do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SUFFIXES = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "down and up": (".down.weight", ".up.weight"),
    "without weight": (".lora_A", ".lora_B"),  # Mochi
    "default": (".lora_A.default.weight", ".lora_B.default.weight"),  # DiffSynth
    "old": (".lora.down.weight", ".lora.up.weight"),  # the alpha's key has no ".lora"
}
"""The suffixes of A and B by the program that writes them."""

_KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}


def kohya_name(module: str) -> str:
    """Return kohya's name of a module of Stable Diffusion."""
    part, _, name = module.partition(".")
    return f"{_KOHYA_PREFIXES[part]}_{name.replace('.', '_')}"


def save_pairs(file: Path, *modules: str) -> dict[str, Tensor]:
    """Write and return a LoRA of rank 2 with the keys of diffusers."""
    tensors: dict[str, Tensor] = {}
    for module in modules:
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, 6)
        tensors[f"{module}.lora_B.weight"] = torch.randn(6, 2)
    save_file(tensors, file)
    return tensors


def save_random_lora(
    file: Path, shapes: Mapping[str, tuple[int, ...]], has_alpha: bool, seed: int = 0
) -> None:
    """Write a random LoRA of mixed ranks, in float32.

    Args:
        file: The file.
        shapes: The shape of the weight of each layer, by the name of the layer.
        has_alpha: Whether it has alphas, and the keys of kohya.
        seed: The seed.
    """
    torch.manual_seed(seed)
    suffix_A, suffix_B = SUFFIXES["kohya" if has_alpha else "diffusers"]
    tensors: dict[str, Tensor] = {}
    for number, (name, (rows, *inputs)) in enumerate(shapes.items()):
        rank = 2 + (number + seed) % 3
        kernel = [1] * (len(inputs) - 1)
        tensors[f"{name}{suffix_A}"] = torch.randn(rank, *inputs)
        tensors[f"{name}{suffix_B}"] = torch.randn(rows, rank, *kernel)
        if has_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(1.0 + number % 4)
    save_file(tensors, file)


def read_ranks(file: Path) -> dict[str, int]:
    """Return the rank of each module."""
    tensors = load_file(file)
    return {module: len(tensors[key_A]) for module, key_A, _ in _find_pairs(tensors)}


def read_updates(file: Path) -> dict[str, np.ndarray]:
    """Return the dense update of each module, scaled by alpha / rank."""
    tensors = load_file(file)
    updates: dict[str, np.ndarray] = {}
    for module, key_A, key_B in _find_pairs(tensors):
        A = tensors[key_A].double().flatten(1)
        B = tensors[key_B].double().flatten(1)
        alpha = float(tensors.get(f"{module}.alpha", len(A)))
        updates[module] = (B @ A * alpha / len(A)).numpy()
    return updates


def _find_pairs(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """Yield each module with the keys of its factors."""
    for key in tensors:
        pairs = [pair for pair in SUFFIXES.values() if key.endswith(pair[0])]
        if pairs:
            suffix_A, suffix_B = max(pairs, key=lambda pair: len(pair[0]))
            module = key.removesuffix(suffix_A)
            yield module, key, module + suffix_B
