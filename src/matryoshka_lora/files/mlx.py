"""A rank of an adapter as mlx-lm reads it: ``adapters.safetensors`` and a config of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from safetensors.torch import save_file

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.layers import AdapterFile, Lost
from matryoshka_lora.files.output import PathLike, new_folder
from matryoshka_lora.files.peft import CONFIG_NAME, check_factors, plan_rank

# mlx-lm leaves out without a word what it does not find, so each model here is one that the tests
# compare.
_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
_IN_A_BLOCK = re.compile(r"model\.layers\.\d+\.(.+)")


def write_mlx(
    adapter: AdapterFile,
    path: PathLike,
    rank: int,
    base: Mapping[str, Any],
    force: bool = False,
    on_layer: Callable[[], object] | None = None,
) -> Lost:
    """Write a rank as a folder for mlx-lm, which knows one rank and one scale for all layers.

    Args:
        adapter: Any LoRA adapter.
        path: The folder to write.
        rank: The rank.
        base: ``config.json`` of the base model.
        force: Whether the folder that is there is replaced.
        on_layer: Called after each layer.

    Raises:
        MatryoshkaError: mlx-lm has no place for the base model or a layer.
    """
    check_factors(adapter, "mlx-lm")
    kind, plan = base.get("model_type"), plan_rank(adapter, rank)
    found = {layer.name: _IN_A_BLOCK.fullmatch(layer.name) for layer in adapter.layers}
    strange = next((name for name, match in found.items() if match is None), None)
    if kind not in _MODELS or strange:
        known = f"layer {strange}" if strange else f"models of type {kind!r}"
        raise MatryoshkaError(f"{known} cannot be exported to MLX: use --format merged")
    tensors, lost = {}, plan.new_lost()
    for layer, A, B in plan.each(lost, on_layer):
        tensors[f"{layer.name}.lora_a"] = A.mT.contiguous()
        tensors[f"{layer.name}.lora_b"] = B.mT.contiguous()
    keys = sorted({match[1] for match in found.values() if match})
    scale = plan.layers[0][1].scale
    config = {
        "fine_tune_type": "lora",
        "num_layers": base["num_hidden_layers"],
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
    with new_folder(path, force, adapter.source) as folder:
        save_file(tensors, folder / "adapters.safetensors")
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return lost


def missing_rope(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that mlx-lm misses in a ``config.json`` that transformers 5 has written.

    transformers 5 writes ``rope_parameters``, by kind of layer in some models. mlx-lm reads fields
    at the top, and takes a base of 10000 without a word where there are none.
    """
    rope = base.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    local = rope.get("sliding_attention", {})
    fields = {
        "rope_theta": whole.get("rope_theta"),
        "rope_scaling": whole if whole.get("rope_type", "default") != "default" else None,
        "rope_local_base_freq": local.get("rope_theta"),
    }
    return {key: value for key, value in fields.items() if value and not base.get(key)}
