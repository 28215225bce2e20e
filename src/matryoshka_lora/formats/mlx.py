"""A LoRA adapter as mlx-lm reads it: a folder with ``adapters.safetensors`` and a config of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.config import CONFIG_NAME
from matryoshka_lora.formats.layout import Layer
from matryoshka_lora.formats.opened import OpenedAdapter, from_memory

MLX_WEIGHTS_NAME = "adapters.safetensors"

# transformers' model_type, and the base of the rotary embedding that mlx-lm takes where config.json has none at its
# top; None where it reads transformers 5's rope_parameters. mlx-lm gives the layers of these the names that they have
# in transformers. It leaves out without a word what it does not find, so a model is listed here only if
# `make test-mlx` compares it.
MODELS: dict[str, float | None] = {
    **{"llama": 1e4, "mistral": 1e4, "qwen2": 1e6, "qwen3": None, "gemma": 1e4, "gemma2": 1e4, "gemma3_text": 1e6}
}
_LOCAL_BASE = 1e4  # of Gemma 3's sliding windows

_IN_A_BLOCK = re.compile(r"model\.layers\.\d+\.(.+)")


def write_mlx(adapter: OpenedAdapter, folder: Path, base: Any) -> None:
    """Convert an ordinary LoRA adapter to mlx-lm's files. mlx-lm knows one rank and one scale for all layers.

    Args:
        adapter: An ordinary one of one rank, such as `formats.write.cut` makes; with ranks by layer, a padded one.
        folder: Where to write.
        base: The transformers config of the base model.

    Raises:
        MatryoshkaError: The base model or a layer has no place in mlx-lm.
    """
    kind = getattr(base, "model_type", None)
    if kind not in MODELS:
        raise MatryoshkaError(
            f"models of type {kind!r} cannot be exported to MLX yet; those that can are {', '.join(MODELS)}. Export "
            "--format merged instead"
        )
    names = {_name_in_block(layer) for layer in adapter.layers}
    if adapter.others:
        raise MatryoshkaError(
            f"{adapter.name} also holds tensor {adapter.others[0]}, which is no factor: mlx-lm's adapters have no "
            "place for it. Export --format merged instead"
        )
    tensors: dict[str, Tensor] = {}
    for layer in adapter.layers:
        A, B = adapter.factors(layer)
        tensors[f"{layer.name}.lora_a"] = A.mT.contiguous()
        tensors[f"{layer.name}.lora_b"] = B.mT.contiguous()
    parameters = {"rank": adapter.config.r, "scale": adapter.config.scale, "dropout": 0.0, "keys": sorted(names)}
    config = {"fine_tune_type": "lora", "num_layers": base.num_hidden_layers, "lora_parameters": parameters}
    save_file(tensors, folder / MLX_WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")


def unread(config: Mapping[str, Any]) -> dict[str, Any]:
    """What mlx-lm would take otherwise than transformers, without a word, from the ``config.json`` of a base model.

    transformers 5 writes ``rope_parameters`` alone, where mlx-lm looks for fields at the top.

    Args:
        config: As it is in the file.

    Returns:
        Those fields, with the values that they should have.
    """
    rope, known = config.get("rope_parameters"), MODELS.get(config.get("model_type", ""))
    if not isinstance(rope, Mapping) or known is None:
        return {}
    whole = rope.get("full_attention", rope)
    fields: dict[str, tuple[Any, Any]] = {"rope_theta": (whole.get("rope_theta", known), known)}
    if "sliding_attention" in rope:
        fields["rope_local_base_freq"] = (rope["sliding_attention"].get("rope_theta", _LOCAL_BASE), _LOCAL_BASE)
    if whole.get("rope_type", "default") != "default":
        fields["rope_scaling"] = (dict(whole), None)
    return {name: wanted for name, (wanted, taken) in fields.items() if wanted != taken and not config.get(name)}


def read_mlx(folder: Path, written: OpenedAdapter) -> OpenedAdapter:
    """Read mlx-lm's files back, in PEFT's keys.

    Args:
        folder: Where they are.
        written: What they were made of, for its keys and its config.

    Returns:
        An adapter with the files' numbers and their scale.
    """
    found = load_file(folder / MLX_WEIGHTS_NAME)
    scale = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["lora_parameters"]["scale"]
    tensors = {}
    for layer in written.layers:
        tensors[layer.key_A] = found[f"{layer.name}.lora_a"].mT.contiguous()
        tensors[layer.key_B] = found[f"{layer.name}.lora_b"].mT.contiguous()
    return from_memory(str(folder), written.config.at(written.config.r, scale), None, tensors)


def _name_in_block(layer: Layer) -> str:
    """The layer's name inside its block, by which mlx-lm finds it in every block."""
    found = _IN_A_BLOCK.fullmatch(layer.name)
    linear = len(layer.shape_A) == len(layer.shape_B) == 2 and layer.key_A.endswith(".lora_A.weight")
    if found is None or not linear or layer.experts > 1:
        raise MatryoshkaError(
            f"layer {layer.name} cannot be exported to MLX: leave it out of target_modules, or export --format merged"
        )
    return found[1]
