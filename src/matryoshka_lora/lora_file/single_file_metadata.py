"""The metadata of single files: what stays true of an output, and what is renewed.

kohya's scripts write keys that begin with ``ss_`` and ``sshs_``; ``modelspec.`` is the Stable
Diffusion Model Specification. Hashes of the tensors are renewed when the file is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from matryoshka_lora.lora_file.diffusers_metadata import (
    CONFIGS_KEY,
    can_describe,
    read_configs,
    update_configs,
)
from matryoshka_lora.lora_file.keys.names import split_part
from matryoshka_lora.lora_file.lora import Layer
from matryoshka_lora.lora_file.safetensors_io import HASH_PREFIXES, hash_placeholder

_COMMENT_KEY = "ss_training_comment"
_TAGS_KEY = "ss_tag_frequency"
_NETWORK_ARGS_KEY = "ss_network_args"
# A hash of a part of the file, for an extension that is no longer maintained.
_LEGACY_HASH_KEY = "sshs_legacy_hash"
# The fields of a sum that are renewed for the output, whatever the sources hold.
_RENEWED_KEYS = (
    CONFIGS_KEY,
    _NETWORK_ARGS_KEY,
    "ss_network_dim",
    "ss_network_alpha",
    *HASH_PREFIXES,
)
# The fields of a sum that name all sources' values, and what is between them.
_SEPARATORS = {
    "modelspec.title": " + ",
    "modelspec.trigger_phrase": ", ",
    "modelspec.author": ", ",
    "modelspec.license": ", ",
}


def updated_metadata(
    metadata: Mapping[str, str],
    layers: Sequence[Layer],
    new_layers: Sequence[Layer],
    alpha: float,
    other_keys: Collection[str],
    file_name: str,
    changes: Sequence[str] = (),
) -> dict[str, str]:
    """Return the metadata of an output.

    Args:
        metadata: The metadata of the source.
        layers: The layers of the source.
        new_layers: The layers of the output.
        alpha: The alpha of the output's layers.
        other_keys: The keys of the source's tensors that are not factors.
        file_name: The path of the source, for messages.
        changes: What else was done; see `LoraFile.changes`.

    Raises:
        MatryoshkaError: The configs of diffusers in the metadata are damaged.
    """
    updated = {"format": "pt", **metadata}
    updated.pop(_LEGACY_HASH_KEY, None)
    updated.pop(CONFIGS_KEY, None)
    for key in HASH_PREFIXES:
        if key in updated:
            updated[key] = hash_placeholder(key)
    updated.update(_rank_fields(metadata, new_layers, alpha))
    is_converted = any(layer.kind != "LoRA" for layer in layers)
    if is_converted and not other_keys:
        updated.pop(_NETWORK_ARGS_KEY, None)  # the algorithm
        if "ss_network_module" in metadata:
            updated["ss_network_module"] = "networks.lora"  # was lycoris.kohya
    if any(key.startswith("ss_") for key in metadata):
        comments = (metadata.get(_COMMENT_KEY), _describe_changes(layers, new_layers, changes))
        updated[_COMMENT_KEY] = "; ".join(comment for comment in comments if comment)
    if can_describe(new_layers):
        parts_with_biases = {split_part(key)[0] for key in other_keys if key.endswith(".bias")}
        configs = read_configs(metadata, file_name)
        updated[CONFIGS_KEY] = update_configs(configs, new_layers, parts_with_biases)
    return updated


def _describe_changes(
    layers: Sequence[Layer], new_layers: Sequence[Layer], changes: Sequence[str]
) -> str:
    """Return what was done, as kohya's scripts write it into the training comment."""
    from matryoshka_lora import __version__

    old_ranks = {layer.name: layer.rank for layer in layers}
    new_ranks = {layer.name: layer.rank for layer in new_layers}
    descriptions = list(changes)
    if any(rank > old_ranks[name] for name, rank in new_ranks.items()):
        descriptions.append(f"resized to {_format_ranks(new_ranks.values())}")
    elif new_ranks != old_ranks:
        descriptions.append(f"truncated to {_format_ranks(new_ranks.values())}")
    elif not changes:
        descriptions.append("rewritten at the same rank")
    return f"{', '.join(descriptions)} by matryoshka-lora {__version__}"


def _format_ranks(ranks: Collection[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def _rank_fields(
    metadata: Mapping[str, str], layers: Sequence[Layer], alpha: float
) -> dict[str, str]:
    """Return kohya's fields of rank and alpha that the metadata has, for the output's layers."""
    fields: dict[str, str] = {}
    linear_layers: list[Layer] = []
    convolutions: list[Layer] = []
    for layer in layers:
        is_linear = all(size == 1 for size in layer.A.shape[2:])  # kohya counts 1x1 kernels too
        (linear_layers if is_linear else convolutions).append(layer)
    arguments = _read_json(metadata.get(_NETWORK_ARGS_KEY))
    if "conv_dim" in arguments and convolutions and linear_layers:
        arguments["conv_dim"] = _dimension(convolutions)
        arguments["conv_alpha"] = f"{alpha:.17g}"
        fields[_NETWORK_ARGS_KEY] = json.dumps(arguments)
        layers = linear_layers
    if "ss_network_dim" in metadata:
        fields["ss_network_dim"] = _dimension(layers)
        fields["ss_network_alpha"] = f"{alpha:.17g}"
    return fields


def _dimension(layers: Sequence[Layer]) -> str:
    """Return the rank of layers as kohya's scripts write it."""
    ranks = {layer.rank for layer in layers}
    return str(max(ranks)) if len(ranks) == 1 else "Dynamic"


def _read_json(text: str | None) -> dict[str, Any]:
    """Return the object in a field of the metadata; empty if there is none."""
    # Any tool may have written the metadata.
    with suppress(ValueError, TypeError, RecursionError):
        return dict(json.loads(text or "{}"))
    return {}


def combined_metadata(
    metadata: Sequence[Mapping[str, str]], names: Sequence[str], weights: Sequence[float]
) -> dict[str, str]:
    """Return the metadata of a weighted sum, before `updated_metadata` renews it.

    A field stays if the sources that have it agree. Titles, trigger phrases, authors and licenses
    are joined, and the frequencies of tags are added.

    Args:
        metadata: The metadata of each source.
        names: The name of each source, which the training comment shows.
        weights: The weight of each source.
    """
    values_by_key: dict[str, list[str]] = {}
    for fields in metadata:
        for key, value in fields.items():
            values = values_by_key.setdefault(key, [])
            if value not in values:
                values.append(value)
    combined: dict[str, str] = {}
    for key, values in values_by_key.items():
        if len(values) == 1 or key in _RENEWED_KEYS:
            combined[key] = values[0]
        elif key in _SEPARATORS:
            combined[key] = _SEPARATORS[key].join(values)
    if any(key.startswith("ss_") for key in values_by_key):
        terms = [f"{weight:g} x {name}" for name, weight in zip(names, weights, strict=True)]
        combined[_COMMENT_KEY] = f"sum of {', '.join(terms)}"
    if _TAGS_KEY in values_by_key:
        combined[_TAGS_KEY] = json.dumps(_sum_tags(metadata))
    return combined


def _sum_tags(metadata: Sequence[Mapping[str, str]]) -> dict[str, Counter[str]]:
    """Return how often each tag was in the training images of all sources, by their folder."""
    tags_by_folder: dict[str, Counter[str]] = {}
    for fields in metadata:
        for folder, tags in _read_json(fields.get(_TAGS_KEY)).items():
            with suppress(ValueError, TypeError, AttributeError, OverflowError):
                counts = Counter({tag: int(count) for tag, count in tags.items()})
                tags_by_folder.setdefault(folder, Counter()).update(counts)
    return tags_by_folder
