"""The metadata of single files: which fields an output keeps, and which are updated.

kohya's scripts write keys that begin with ``ss_`` and ``sshs_``; ``modelspec.`` is the Stable
Diffusion Model Specification. diffusers stores the LoraConfig of each part of a pipeline in
`CONFIGS_KEY`, where a field has the key ``PART.FIELD``, such as ``unet.rank_pattern``. If a file
has no alpha tensors, diffusers reads ranks and alphas from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.lora.keys import (
    CONFIGS_KEY,
    DIFFUSERS_PARTS,
    DIFFUSERS_SUFFIXES,
    split_part,
)
from matryoshka_lora.lora.layer import Layer

if TYPE_CHECKING:
    from matryoshka_lora.lora.lora import Lora

Configs = dict[str, dict[str, Any]]
"""The LoraConfig of each part of a pipeline."""

HASH_PREFIXES = {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"}
"""The fields that hold the SHA-256 of everything after the header, and the prefix of the value."""

_COMMENT_KEY = "ss_training_comment"
_NETWORK_ARGS_KEY = "ss_network_args"
# A hash of a part of the file, for an extension that is no longer maintained.
_LEGACY_HASH_KEY = "sshs_legacy_hash"
# The fields of a sum that `updated_metadata` computes from the output.
_UPDATED_KEYS = (
    CONFIGS_KEY,
    _NETWORK_ARGS_KEY,
    "ss_network_dim",
    "ss_network_alpha",
    *HASH_PREFIXES,
)
# The fields of a sum that list the values of all sources, and the separator of the values.
_SEPARATORS = {
    "modelspec.title": " + ",
    "modelspec.trigger_phrase": ", ",
    "modelspec.author": ", ",
    "modelspec.license": ", ",
}


# diffusers


def read_configs(metadata: Mapping[str, str], name: str) -> Configs:
    """Return the LoraConfig of each part; empty if the metadata has none."""
    configs: Configs = {}
    try:
        fields = json.loads(metadata.get(CONFIGS_KEY, "{}")).items()
    except (ValueError, AttributeError, RecursionError) as error:
        raise MatryoshkaError(
            f"{name}: the metadata {CONFIGS_KEY} is damaged. Save the file again."
        ) from error
    for key, value in fields:
        part, field = split_part(key)
        configs.setdefault(part, {})[field] = value
    return configs


def can_describe(layers: Sequence[Layer]) -> bool:
    """Return whether diffusers reads the ranks and alphas of these layers from the metadata.

    It does so if every key is in its own format and no layer has an alpha tensor.
    """
    for layer in layers:
        part, _ = split_part(layer.name)
        is_diffusers_key = part in DIFFUSERS_PARTS and layer.keys.A.endswith(DIFFUSERS_SUFFIXES.A)
        if not is_diffusers_key or layer.keys.alpha is not None:
            return False
    return True


def _updated_configs(configs: Configs, layers: Sequence[Layer], parts_with_biases: Set[str]) -> str:
    """Return configs with the ranks and alphas of layers, as the value of `CONFIGS_KEY`."""
    modules_by_part: dict[str, dict[str, tuple[int, float]]] = {}
    for layer in layers:
        part, module = split_part(layer.name)
        # diffusers removes this part of CLIP's names from keys, but not from patterns.
        module = module.removeprefix("text_model.")
        rank_and_alpha = (layer.rank, layer.rank * layer.scale)
        modules_by_part.setdefault(part, {})[module] = rank_and_alpha
    updated = {part: dict(fields) for part, fields in configs.items() if part}
    for part, modules in modules_by_part.items():
        default_rank, default_alpha = max(modules.values())
        rank_pattern: dict[str, int] = {}
        alpha_pattern: dict[str, float] = {}
        # The names of a text encoder may follow "text_model.", so the pattern is not anchored.
        anchor = "" if part.startswith("text_encoder") else "^"
        for module, (rank, alpha) in modules.items():
            if (rank, alpha) != (default_rank, default_alpha):
                pattern = f"{anchor}{re.escape(module)}"
                rank_pattern[pattern] = rank
                alpha_pattern[pattern] = alpha
        updated[part] = {
            **configs.get(part, {}),
            "target_modules": sorted(modules),
            "r": default_rank,
            "lora_alpha": default_alpha,
            "use_rslora": False,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
        }
        if part in parts_with_biases:
            updated[part]["lora_bias"] = True
    flat = {f"{part}.{key}": value for part in updated for key, value in updated[part].items()}
    return json.dumps(flat, sort_keys=True)


# kohya and modelspec


def updated_metadata(lora: Lora) -> dict[str, str]:
    """Return the metadata of an output, which has the metadata of its source."""
    metadata = lora.metadata
    updated = {"format": "pt", **metadata}
    updated.pop(_LEGACY_HASH_KEY, None)
    updated.pop(CONFIGS_KEY, None)
    for key in HASH_PREFIXES:
        if key in updated:
            # As long as the hash, which is known once the tensors have been written.
            updated[key] = HASH_PREFIXES[key] + "0" * 64
    updated.update(_rank_fields(lora))
    if any(key.startswith("ss_") for key in metadata):
        from matryoshka_lora import __version__

        changes = ", ".join(lora.changes) or "rewritten at the same rank"
        comment = f"{changes} by matryoshka-lora {__version__}"
        updated[_COMMENT_KEY] = "; ".join(filter(None, (metadata.get(_COMMENT_KEY), comment)))
    if can_describe(lora.layers):
        biases = [key for key in lora.other_tensors if key.endswith(".bias")]
        parts_with_biases = {split_part(key)[0] for key in biases}
        configs = read_configs(metadata, lora.name)
        updated[CONFIGS_KEY] = _updated_configs(configs, lora.layers, parts_with_biases)
    return updated


def without_lycoris(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file of LyCORIS whose layers become LoRA."""
    updated = {key: value for key, value in metadata.items() if key != _NETWORK_ARGS_KEY}
    if "ss_network_module" in metadata:
        updated["ss_network_module"] = "networks.lora"  # was lycoris.kohya
    return updated


def _rank_fields(lora: Lora) -> dict[str, str]:
    """Return kohya's fields of rank and alpha that the metadata has, for the output's layers."""
    linear_layers: list[Layer] = []
    convolutions: list[Layer] = []
    for layer in lora.layers:
        is_linear = all(size == 1 for size in layer.in_shape[1:])  # kohya counts 1x1 kernels too
        (linear_layers if is_linear else convolutions).append(layer)
    fields: dict[str, str] = {}
    layers = list(lora.layers)
    arguments = _read_json(lora.metadata.get(_NETWORK_ARGS_KEY))
    if "conv_dim" in arguments:
        previous_alpha = arguments.pop("conv_alpha", None)
        del arguments["conv_dim"]
        if convolutions:
            layers = linear_layers or convolutions
            arguments["conv_dim"] = _dimension(convolutions)
            arguments["conv_alpha"] = _alpha(convolutions, previous_alpha)
        fields[_NETWORK_ARGS_KEY] = json.dumps(arguments)
    if "ss_network_dim" in lora.metadata:
        fields["ss_network_dim"] = _dimension(layers)
        fields["ss_network_alpha"] = _alpha(layers, lora.metadata.get("ss_network_alpha"))
    return fields


def _dimension(layers: Sequence[Layer]) -> str:
    """Return the rank of layers as kohya's scripts write it."""
    ranks = {layer.rank for layer in layers}
    return str(max(ranks)) if len(ranks) == 1 else "Dynamic"


def _alpha(layers: Sequence[Layer], previous: str | None) -> str:
    """Return the alpha of layers as kohya's scripts write it.

    Args:
        layers: The layers.
        previous: The value in the source. It is kept if the layers keep different alphas.
    """
    alphas = {np.float32(layer.scale * layer.rank) for layer in layers}
    keep_alphas = all(layer.keys.alpha and not layer.has_new_factors for layer in layers)
    if len(alphas) > 1 and keep_alphas:
        return previous or "Dynamic"
    return f"{float(max(alphas)):.17g}"


def _read_json(text: str | None) -> dict[str, Any]:
    """Return the object in a field of the metadata; empty if there is none."""
    # Any tool may have written the metadata.
    with suppress(ValueError, TypeError, RecursionError):
        return dict(json.loads(text or "{}"))
    return {}


# Sums


def combined_metadata(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the metadata of a weighted sum, before `updated_metadata` updates it.

    A field stays if the sources that have it agree. Titles, trigger phrases, authors and licenses
    are joined.
    """
    values_by_key: dict[str, list[str]] = {}
    for fields in metadata:
        for key, value in fields.items():
            values = values_by_key.setdefault(key, [])
            if value not in values:
                values.append(value)
    combined: dict[str, str] = {}
    for key, values in values_by_key.items():
        if len(values) == 1 or key in _UPDATED_KEYS:
            combined[key] = values[0]
        elif key in _SEPARATORS:
            combined[key] = _SEPARATORS[key].join(values)
    return combined
