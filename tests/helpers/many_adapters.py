"""A folder of many adapters in PEFT's format, some of which cannot be truncated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

NUM_ADAPTERS = 50
RANKS = (16, 24, 32, 48, 64)
DORA, BROKEN = "adapter-07", "adapter-23"
"""An adapter with magnitudes, and one whose weights end early."""


def save_many_adapters(
    folder: Path, layers: Mapping[str, tuple[int, int]], base_model: str
) -> dict[str, int]:
    """Write adapters of several ranks, and return the rank of each that can be truncated.

    Args:
        folder: A path that does not exist.
        layers: The numbers of inputs and outputs of each layer.
        base_model: The base model in their configs.
    """
    ranks: dict[str, int] = {}
    for number in range(NUM_ADAPTERS):
        name = f"adapter-{number:02}"
        ranks[name] = RANKS[number % len(RANKS)]
        save_adapter(
            folder / name, layers, ranks[name], base_model, use_dora=name == DORA, seed=number
        )
    weights = folder / BROKEN / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {name: rank for name, rank in ranks.items() if name not in (DORA, BROKEN)}


def save_adapter(
    folder: Path,
    layers: Mapping[str, tuple[int, int]],
    rank: int,
    base_model: str,
    *,
    use_dora: bool = False,
    seed: int = 0,
    **config_changes: Any,
) -> None:
    """Write an adapter whose updates have about the size of a layer's weights."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, (num_inputs, num_outputs) in layers.items():
        key = f"base_model.model.{name}"
        size = (rank * num_inputs) ** -0.5
        A = generator.normal(size=(rank, num_inputs), scale=size)
        B = generator.normal(size=(num_outputs, rank))
        tensors[f"{key}.lora_A.weight"] = A.astype(np.float32)
        tensors[f"{key}.lora_B.weight"] = B.astype(np.float32)
        if use_dora:
            tensors[f"{key}.lora_magnitude_vector"] = np.ones(num_outputs, dtype=np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "use_dora": use_dora,
        "inference_mode": True,
        **config_changes,
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
