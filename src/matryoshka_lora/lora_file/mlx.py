"""Write a LoRA for mlx-lm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from matryoshka_lora.lora_file.lora import OutputPlan, WrittenOutput
from matryoshka_lora.lora_file.peft_folder import CONFIG_NAME
from matryoshka_lora.lora_file.runtimes import check_runtime, name_in_block
from matryoshka_lora.lora_file.safetensors_io import StoredTensor, create_safetensors


def write_mlx(plan: OutputPlan, folder: Path, base_config: Mapping[str, Any]) -> WrittenOutput:
    """Write ``adapters.safetensors`` and mlx-lm's own ``adapter_config.json`` into a folder.

    Args:
        plan: The output, of a PEFT folder. All layers must have the same rank and scale.
        folder: An existing folder.
        base_config: The ``config.json`` of the base model.

    Raises:
        MatryoshkaError: mlx-lm does not support the base model or a layer.
    """
    check_runtime(plan, base_config, "mlx-lm")
    new_layers = [new for _, new in plan.layers]
    tensors: dict[str, StoredTensor] = {}
    for layer in new_layers:
        tensors[f"{layer.name}.lora_a"] = _transposed(layer.A)
        tensors[f"{layer.name}.lora_b"] = _transposed(layer.B)
    written = WrittenOutput(plan.ranks)
    with create_safetensors(folder / "adapters.safetensors", tensors, {}) as writer:
        for truncated in plan.truncated_layers():
            writer.write(f"{truncated.layer.name}.lora_a", truncated.A.T)
            writer.write(f"{truncated.layer.name}.lora_b", truncated.B.T)
            written.add(truncated)
    config = {
        "fine_tune_type": "lora",
        "num_layers": base_config["num_hidden_layers"],
        "lora_parameters": {
            "rank": plan.rank,
            "scale": new_layers[0].scale,
            "dropout": 0.0,
            "keys": sorted({name_in_block(layer.name) for layer in new_layers}),
        },
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return written


def _transposed(tensor: StoredTensor) -> StoredTensor:
    return replace(tensor, shape=tensor.shape[::-1])


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
