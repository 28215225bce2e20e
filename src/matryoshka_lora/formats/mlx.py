"""Folders of mlx-lm: ``adapters.safetensors`` and mlx-lm's own ``adapter_config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from matryoshka_lora.errors import MatryoshkaError, short
from matryoshka_lora.formats.peft_folder import CONFIG_NAME, find_layers
from matryoshka_lora.formats.runtimes import name_in_block, read_base_config
from matryoshka_lora.formats.safetensors_io import (
    create_safetensors,
    error_metadata,
    open_safetensors,
    pop_error,
    read_json,
)
from matryoshka_lora.lora.keys import DIFFUSERS_SUFFIXES, PEFT_PREFIX
from matryoshka_lora.lora.layer import StoredTensor, TensorInfo
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.save import Written
from matryoshka_lora.lora.truncate import with_ranks
from matryoshka_lora.registry import Target

WEIGHTS_NAME = "adapters.safetensors"


def read(folder: Path, name: str) -> Lora:
    """Open a folder that mlx-lm has saved, as the LoRA of a PEFT folder."""
    config = read_json(folder / CONFIG_NAME)
    fine_tune_type = config.get("fine_tune_type", "lora")
    if fine_tune_type != "lora":
        raise MatryoshkaError(
            f"{name} has fine_tune_type={short(fine_tune_type)}, and only 'lora' can be truncated. "
            "Fuse it into the model with mlx_lm.fuse."
        )
    stored, metadata = open_safetensors(folder / WEIGHTS_NAME)
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        module, _, factor = key.rpartition(".")
        is_linear = len(tensor.shape) == 2 and "embed" not in module
        if factor not in ("lora_a", "lora_b") or not is_linear:
            raise MatryoshkaError(
                f"{name} contains {short(key)}, of shape {list(tensor.shape)}. Only factors of "
                "linear layers can be read. Fuse it into the model with mlx_lm.fuse."
            )
        suffix = DIFFUSERS_SUFFIXES.A if factor == "lora_a" else DIFFUSERS_SUFFIXES.B
        tensors[PEFT_PREFIX + module + suffix] = tensor.transposed()
    try:
        rank = config["lora_parameters"]["rank"]
        alpha = rank * config["lora_parameters"]["scale"]
    except (LookupError, TypeError) as error:
        raise MatryoshkaError(
            f"{name}: the {CONFIG_NAME} has no rank and scale in lora_parameters. Copy it again."
        ) from error
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        "lora_alpha": alpha,
    }
    layers, _ = find_layers(tensors, peft_config, name)
    peft_config["target_modules"] = [layer.name for layer in layers]
    return Lora(
        name,
        layers,
        config=peft_config,
        files=(folder / WEIGHTS_NAME,),
        original_error=pop_error(metadata),
    )


def write(lora: Lora, folder: Path, target: Target) -> Written:
    """Write ``adapters.safetensors`` and mlx-lm's own ``adapter_config.json`` into a folder.

    mlx-lm has one rank and one scale for all layers, so smaller layers are padded with zeros.

    Raises:
        MatryoshkaError: mlx-lm does not support the base model or a layer.
    """
    base_config = read_base_config(lora, target, "mlx-lm")
    rank = lora.max_rank
    scales = {layer.scale for layer in lora.layers}
    scale = scales.pop() if len(scales) == 1 else lora.new_scale
    layers = tuple(layer.with_scale(scale) for layer in lora.layers)
    # Ordered factors are padded, and not reordered.
    lora = replace(lora, layers=layers, order=lora.order or "svd")
    lora = with_ranks(lora, dict.fromkeys(lora.ranks, rank))
    tensors: dict[str, TensorInfo] = {}
    for layer in lora.layers:
        tensors[f"{layer.name}.lora_a"] = TensorInfo(layer.dtype, layer.shape_A[::-1])
        tensors[f"{layer.name}.lora_b"] = TensorInfo(layer.dtype, layer.shape_B[::-1])
    written = Written(lora.ranks)
    file = folder / WEIGHTS_NAME
    with create_safetensors(file, tensors, error_metadata()) as writer:
        for layer, factors in written.compute(lora):
            writer.write(f"{layer.name}.lora_a", factors.A.T)
            writer.write(f"{layer.name}.lora_b", factors.B.T)
        writer.metadata.update(error_metadata(written.original_error(lora)))
    config = {
        "fine_tune_type": "lora",
        "num_layers": base_config["num_hidden_layers"],
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted({name_in_block(layer.name) for layer in lora.layers}),
        },
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return written


def missing_rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that mlx-lm misses in a ``config.json`` that transformers 5 has written.

    transformers 5 writes ``rope_parameters``, in some models by the type of a layer. mlx-lm reads
    top-level fields, and silently falls back to a base of 10000.

    Args:
        config: The ``config.json`` of a model.

    Returns:
        The missing fields among ``rope_theta``, ``rope_scaling`` and ``rope_local_base_freq``.
    """
    rope = config.get("rope_parameters") or {}
    full_attention = rope.get("full_attention", rope)
    sliding_attention = rope.get("sliding_attention", {})
    is_scaled = full_attention.get("rope_type", "default") != "default"
    fields = {
        "rope_theta": full_attention.get("rope_theta"),
        "rope_scaling": full_attention if is_scaled else None,
        "rope_local_base_freq": sliding_attention.get("rope_theta"),
    }
    return {key: value for key, value in fields.items() if value and not config.get(key)}
