"""A rank of an adapter as mlx-lm reads it: ``adapters.safetensors`` and a config of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.layers import Lost, OnLayer, Plan
from matryoshka_lora.files.peft import CONFIG_NAME, check_factors

# mlx-lm leaves out without a word what it does not find, so each model here is one that the tests
# compare.
_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
_IN_A_BLOCK = re.compile(r"model\.layers\.\d+\.(.+)")


def write_mlx(plan: Plan, folder: Path, base: Mapping[str, Any], on_layer: OnLayer = None) -> Lost:
    """Write a plan of `plan_rank` for mlx-lm, which knows one rank and scale for all layers.

    Args:
        plan: The rank, the same for all layers.
        folder: A new folder.
        base: ``config.json`` of the base model.
        on_layer: Called after each layer.

    Raises:
        MatryoshkaError: mlx-lm has no place for the base model or a layer.
    """
    check_factors(plan.adapter, "mlx-lm")
    found = {new.name: _IN_A_BLOCK.fullmatch(new.name) for _, new in plan.layers}
    strange = [f"layer {name}" for name, match in found.items() if match is None]
    if base.get("model_type") not in _MODELS:
        strange = [f"models of type {base.get('model_type')!r}"]
    if strange:
        raise MatryoshkaError(f"{strange[0]} cannot be exported to MLX: use --format merged")
    tensors, lost = {}, plan.new_lost()
    for layer, A, B in plan.each(lost, on_layer):
        tensors[f"{layer.name}.lora_a"] = A.mT.contiguous()
        tensors[f"{layer.name}.lora_b"] = B.mT.contiguous()
    keys = sorted({match[1] for match in found.values() if match})
    parameters = {"rank": plan.rank, "scale": plan.layers[0][1].scale, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": base["num_hidden_layers"]}
    save_file(tensors, folder / "adapters.safetensors")
    text = json.dumps({**config, "lora_parameters": parameters}, indent=2)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    return lost


def missing_rope(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that mlx-lm misses in a ``config.json`` that transformers 5 has written.

    transformers 5 writes ``rope_parameters``, by kind of layer in some models. mlx-lm reads fields
    at the top, and takes a base of 10000 without a word where there are none.
    """
    rope = base.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    fields = {
        "rope_theta": whole.get("rope_theta"),
        "rope_scaling": whole if whole.get("rope_type", "default") != "default" else None,
        "rope_local_base_freq": rope.get("sliding_attention", {}).get("rope_theta"),
    }
    return {key: value for key, value in fields.items() if value and not base.get(key)}
