"""The base models and layers that runtimes other than PEFT support."""

from __future__ import annotations

import re
from typing import Any

from matryoshka_lora.bundled_model import resolve_model_path
from matryoshka_lora.errors import MatryoshkaError, check_integer, short
from matryoshka_lora.formats.hub import local_path
from matryoshka_lora.formats.peft_folder import base_model_of
from matryoshka_lora.formats.safetensors_io import read_json
from matryoshka_lora.lora.keys import DIFFUSERS_SUFFIXES
from matryoshka_lora.lora.layer import Layer
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.registry import Target

# GGUF's name of the architecture, by the model_type in transformers. Add only models that the tests
# of the runtimes compare with PEFT: mlx-lm silently ignores keys that it does not know.
SUPPORTED_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}

_MODULE_IN_BLOCK = re.compile(r"model\.layers\.(?P<block>\d{1,9})\.(?P<module>.+)")


def name_in_block(layer_name: str) -> str:
    """Return a layer's name without its transformer block, such as ``self_attn.q_proj``."""
    return _MODULE_IN_BLOCK.sub(r"\g<module>", layer_name)


def read_base_config(lora: Lora, target: Target, runtime: str) -> dict[str, Any]:
    """Return the ``config.json`` of the base model of an output for a runtime.

    Raises:
        MatryoshkaError: The config cannot be read, or the runtime does not support the base model
            or a tensor of the LoRA.
    """
    base_model, revision = base_model_of(lora, target.base_model, target.base_revision)
    try:
        folder = local_path(resolve_model_path(base_model, revision), ("config.json",), revision)
        base_config = read_json(folder / "config.json")
    except MatryoshkaError as error:
        raise MatryoshkaError(
            f"Cannot read the config of the base model {base_model!r}. {error} Pass another "
            "`base_model`."
        ) from error
    model_type = str(base_config.get("model_type"))
    if model_type not in SUPPORTED_ARCHITECTURES:
        raise MatryoshkaError(
            f"{runtime} export does not support base models of type {short(model_type)}. Pass "
            "`format='merged'`."
        )
    num_blocks = check_integer("num_hidden_layers", base_config.get("num_hidden_layers"))
    unsupported = sorted(lora.other_tensors)
    unsupported += [
        layer.keys.A for layer in lora.layers if not _is_linear_in_block(layer, num_blocks)
    ]
    if unsupported:
        raise MatryoshkaError(
            f"{lora.name} contains {unsupported[0]}, which {runtime} cannot read with this base "
            "model. Pass another `base_model`, or `format='merged'`."
        )
    return base_config


def _is_linear_in_block(layer: Layer, num_blocks: int) -> bool:
    """Return whether a layer is a linear module of a transformer block that the model has."""
    match = _MODULE_IN_BLOCK.fullmatch(layer.name)
    return (
        match is not None
        and int(match["block"]) < num_blocks
        and layer.num_experts == 1
        and len(layer.in_shape) == 1
        and layer.keys.A.endswith(DIFFUSERS_SUFFIXES.A)
    )
