"""Single-file LoRAs of image models, written and read as other programs do."""

from __future__ import annotations

from collections.abc import Iterator
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
