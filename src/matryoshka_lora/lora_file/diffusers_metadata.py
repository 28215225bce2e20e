"""The metadata in which diffusers stores the LoraConfig of each part of a pipeline.

A field of a config has the key ``PART.FIELD``, such as ``unet.rank_pattern``. If a file has no
alpha tensors, diffusers reads ranks and alphas from here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.lora_file.keys.names import DIFFUSERS_PARTS, DIFFUSERS_SUFFIXES, split_part
from matryoshka_lora.lora_file.lora import Layer

CONFIGS_KEY = "lora_adapter_metadata"
"""The key of the configs in the file's metadata."""

Configs = dict[str, dict[str, Any]]
"""The LoraConfig of each part of a pipeline."""


class _RankAndAlpha(NamedTuple):
    rank: int
    alpha: float


def read_configs(metadata: Mapping[str, str], name: str) -> Configs:
    """Return the LoraConfig of each part; empty if the metadata has none.

    Args:
        metadata: The metadata of the file.
        name: The path of the file, for messages.

    Raises:
        MatryoshkaError: The configs are not a JSON object.
    """
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
        is_diffusers_key = part in DIFFUSERS_PARTS and layer.key_A.endswith(DIFFUSERS_SUFFIXES.A)
        if not is_diffusers_key or layer.key_alpha is not None:
            return False
    return True


def update_configs(
    configs: Configs, layers: Sequence[Layer], parts_with_biases: Set[str] = frozenset()
) -> str:
    """Return configs with the ranks and alphas of layers, as the value of `CONFIGS_KEY`.

    Args:
        configs: The configs of the source; their other fields are kept.
        layers: The layers of the output, which `can_describe` accepts.
        parts_with_biases: The parts in which a factor B has a bias.
    """
    modules_by_part: dict[str, dict[str, _RankAndAlpha]] = {}
    for layer in layers:
        part, module = split_part(layer.name)
        # diffusers removes this part of CLIP's names from keys, but not from patterns.
        module = module.removeprefix("text_model.")
        modules = modules_by_part.setdefault(part, {})
        modules[module] = _RankAndAlpha(layer.rank, layer.rank * layer.scale)
    updated = {part: fields for part, fields in configs.items() if part}
    for part, modules in modules_by_part.items():
        # The names of a text encoder may follow "text_model.", so the pattern is not anchored.
        anchor = "" if part.startswith("text_encoder") else "^"
        updated[part] = {**configs.get(part, {}), **_rank_fields(modules, anchor)}
        if part in parts_with_biases:
            updated[part]["lora_bias"] = True
    flat = {
        f"{part}.{field}": value
        for part, fields in updated.items()
        for field, value in fields.items()
    }
    return json.dumps(flat, sort_keys=True)


def _rank_fields(modules: Mapping[str, _RankAndAlpha], anchor: str) -> dict[str, Any]:
    """Return the fields of a LoraConfig that give the rank and alpha of each module."""
    default = max(modules.values())
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for module, size in modules.items():
        if size != default:
            pattern = f"{anchor}{re.escape(module)}"
            rank_pattern[pattern] = size.rank
            alpha_pattern[pattern] = size.alpha
    return {
        "target_modules": sorted(modules),
        "r": default.rank,
        "lora_alpha": default.alpha,
        "use_rslora": False,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
