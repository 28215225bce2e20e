"""Check that a runtime other than PEFT supports a LoRA and its base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from matryoshka_lora.errors import MatryoshkaError, check_integer, short
from matryoshka_lora.lora.keys import DIFFUSERS_SUFFIXES
from matryoshka_lora.lora.layer import Layer
from matryoshka_lora.lora.lora import Lora

# The architecture in gguf's terms by the model_type of transformers. Add only what the tests of
# the runtimes compare with PEFT: mlx-lm silently ignores keys that it does not know.
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


def check_runtime(lora: Lora, base_config: Mapping[str, Any], runtime: str) -> None:
    """Raise MatryoshkaError unless a runtime supports the base model and every tensor.

    Args:
        lora: The output.
        base_config: The ``config.json`` of the base model.
        runtime: The name of the runtime, for messages.
    """
    model_type = str(base_config.get("model_type"))
    if model_type not in SUPPORTED_ARCHITECTURES:
        raise MatryoshkaError(
            f"{runtime} export does not support base models of type {short(model_type)}. Pass "
            "`format='merged'`."
        )
    num_blocks = check_integer("num_hidden_layers", base_config.get("num_hidden_layers"))
    unsupported = ""
    if lora.other_tensors:
        unsupported = min(lora.other_tensors)
    else:
        for layer in lora.layers:
            if not _is_linear_in_block(layer, num_blocks):
                unsupported = layer.keys.A
                break
    if unsupported:
        raise MatryoshkaError(
            f"{lora.name} contains {unsupported}, which {runtime} cannot read with this base "
            "model. Pass another `base_model`, or `format='merged'`."
        )


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
