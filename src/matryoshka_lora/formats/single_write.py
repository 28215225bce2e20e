"""What a single LoRA file will be: keys, shapes, alphas and metadata in some style, known before any number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.config import AdapterConfig
from matryoshka_lora.formats.layout import Layer
from matryoshka_lora.formats.opened import Stored
from matryoshka_lora.formats.single import ADAPTER_METADATA, OURS, LoraFile
from matryoshka_lora.formats.streamed import file_size, write_stored
from matryoshka_lora.formats.styles import ORIGINAL, Keys, Style, has_style, module_of, part_of, written_keys

_HASHES = ("sshs_model_hash", "modelspec.hash_sha256")
"""The sha256 of all that follows the header, by kohya's and by Stability's name."""

_STALE = ("sshs_legacy_hash",)
"""Of a part of the header too, so that no file can hold its own."""


@dataclass(frozen=True)
class Plan:
    """A file to write.

    Attributes:
        source: What it is made of.
        layers: As they will be, with the keys, ranks and scales of the new file, in the order of writing.
        given: The layer of the source that each is made of.
        stored: All tensors but the factors, by their new keys; factors have a shape and a dtype here only.
        metadata: Of the new file, with the fields of `_finished` as long as they will be.
        style: None is the source's.
    """

    source: LoraFile
    layers: tuple[Layer, ...]
    given: tuple[Layer, ...]
    stored: Mapping[str, Stored]
    metadata: Mapping[str, str]
    style: Style | None

    @property
    def size(self) -> int:
        """How many bytes the file will have."""
        return file_size(self.stored, self.metadata)

    def write(
        self, file: Path, factors: Callable[[int], tuple[Tensor, Tensor]], error: Callable[[], tuple[float, float]]
    ) -> None:
        """Write it, one layer after the other.

        Args:
            file: That does not exist yet.
            factors: Gives A and B of a layer, as matrices, by its number in ``layers``.
            error: Called at the end: the share of the squared singular values that was kept, and the relative error.
        """
        numbers = {key: n for n, layer in enumerate(self.layers) for key in (layer.key_A, layer.key_B)}
        made: dict[str, Tensor] = {}

        def read(key: str) -> Tensor:
            if key not in numbers:
                return self.stored[key].read()
            if key not in made:
                layer = self.layers[numbers[key]]
                pair = layer.parameters(*factors(numbers[key]))
                made.update(zip((layer.key_A, layer.key_B), pair, strict=True))
            return made.pop(key)

        write_stored(file, self.stored, self.metadata, read, lambda found: _finished(self.metadata, found, *error()))


def plan(source: LoraFile, ranks: Mapping[str, int], style: Style | None, did: str) -> Plan:
    """The file that holds some ranks of another.

    Args:
        source: The other.
        ranks: Of each layer, by name; 0 leaves it out.
        style: None is the source's.
        did: What is done, for the metadata.

    Raises:
        MatryoshkaError: It cannot have this style.
    """
    given = [layer for layer in source.layers if ranks[layer.name]]
    # The order of writing: wide dtypes first.
    given.sort(key=lambda layer: -_dtype(source, layer).itemsize)
    keys = _keys(source, given, style)
    with_alpha = {layer.name for layer in given if style == "kohya" or (style is None and layer.name in source.alphas)}
    # One alpha for all layers: diffusers knows no other where ranks differ.
    alpha = max((ranks[name] for name in with_alpha), default=1)
    layers, stored = [], {}
    for layer in given:
        rank = ranks[layer.name]
        scale = alpha / rank if layer.name in with_alpha else 1.0
        new, pair = layer.at(rank, scale), keys[layer.name]
        new = replace(new, name=pair.name, key_A=pair.A, key_B=pair.B)
        layers.append(new)
        for key, shape in ((pair.A, new.shape_A), (pair.B, new.shape_B)):
            stored[key] = Stored(shape, _dtype(source, layer), _unread)
        if layer.name in with_alpha:
            own = f"{pair.name}.alpha" if style else source.alphas[layer.name]
            stored[own] = Stored(Size(()), torch.float32, partial(torch.tensor, float(alpha)))
    stored |= {key: source.stored[key] for key in source.others}
    modules = {} if style == "kohya" or with_alpha else _modules(source, given)
    names = [modules.get(layer.name, "") for layer in given]
    metadata = _metadata(source, layers, names, alpha if with_alpha else None, did, style == "peft")
    return Plan(source, tuple(layers), tuple(given), stored, metadata, style)


def adapter_config(plan: Plan) -> AdapterConfig:
    """PEFT's config of a file in its style."""
    inside = {part_of(module_of(_pair(layer)))[1]: layer for layer in plan.layers}
    return AdapterConfig(_lora_config(inside, {}, False))


def _finished(metadata: Mapping[str, str], found: str, kept: float, error: float) -> dict[str, str]:
    """The metadata with what is known when all tensors were written; it does not change its length.

    Args:
        metadata: Of `plan`.
        found: The sha256 of all tensors.
        kept: The share of the squared singular values, 0 to 1.
        error: The Frobenius norm of all that was lost, over that of the update.
    """
    hashes = {key: "0x" * key.startswith("modelspec") + found for key in _HASHES if key in metadata}
    ours = {**json.loads(metadata[OURS]), "kept": f"{kept:.6f}", "error": f"{error:.6e}"}
    return {**metadata, **hashes, OURS: json.dumps(ours)}


def _keys(source: LoraFile, layers: list[Layer], style: Style | None) -> dict[str, Keys]:
    if style is None or all(has_style(source.pairs[layer.name], style) for layer in layers):
        return {layer.name: source.pairs[layer.name] for layer in layers}
    if source.others:
        raise MatryoshkaError(
            f"{source.name} holds {source.others[0][:200]}, which is no pair of factors and may be called otherwise in "
            "another style: leave the style as it is"
        )
    modules = {layer.name: source.module(layer) for layer in layers}
    parts = {part_of(module)[0] for module in modules.values()}
    if style == "peft" and len(parts) > 1:
        raise MatryoshkaError(
            f"{source.name} has layers of {', '.join(sorted(part or 'no part' for part in parts))}, and PEFT's folder "
            "is for one model: choose the style diffusers"
        )
    keys = {name: written_keys(module, style, parts) for name, module in modules.items()}
    if len({pair.name for pair in keys.values()}) < len(keys):
        raise MatryoshkaError(
            f"two layers of {source.name} would have one name in the style {style}: leave it as it is"
        )
    return keys


def _modules(source: LoraFile, layers: list[Layer]) -> dict[str, str]:
    """The module of each layer, where all names say it."""
    try:
        return {layer.name: source.module(layer) for layer in layers}
    except MatryoshkaError:
        return {}


def _dtype(source: LoraFile, layer: Layer) -> torch.dtype:
    dtype = source.stored[layer.key_A].dtype
    assert dtype is not None
    return dtype


def _unread() -> Tensor:
    """In the place of a factor's numbers: `Plan.write` computes them."""
    raise AssertionError("a factor of a planned file is computed and not read")


def _pair(layer: Layer) -> Keys:
    return Keys(layer.name, layer.key_A, layer.key_B)


def _metadata(
    source: LoraFile, layers: list[Layer], modules: list[str], alpha: int | None, did: str, folder: bool
) -> dict[str, str]:
    kept = {key: value for key, value in source.metadata.items() if key not in (*_STALE, ADAPTER_METADATA)}
    linear, wide = ({x.rank for x in layers if source.is_convolution(x) is kind} for kind in (False, True))
    dims = _one(linear or wide)
    if "ss_network_dim" in kept or alpha:
        kept |= {"ss_network_dim": dims, "ss_network_alpha": str(alpha or dims)}
    if "ss_network_args" in kept:
        kept["ss_network_args"] = _network_args(kept["ss_network_args"], _one(wide), str(alpha or _one(wide)))
    inside: dict[str, dict[str, Layer]] = {}
    for module, layer in zip(modules, layers, strict=True):
        part, name = part_of(module)
        inside.setdefault(part, {})[name] = layer
    # diffusers looks for the metadata by its own names.
    known = all(part not in ("", ORIGINAL) for part in inside)
    differ = len({layer.rank for layer in layers}) > 1
    if all(modules) and not folder and (ADAPTER_METADATA in source.metadata or (differ and known)):
        configs: dict[str, Any] = {}
        for part, own in inside.items():
            before = f"{part}." if part else ""
            config = _lora_config(own, _given_config(source, part), len(layers) == len(source.layers))
            configs |= {f"{before}{key}": value for key, value in config.items()}
        kept[ADAPTER_METADATA] = json.dumps(configs, sort_keys=True)
    ours: dict[str, Any] = {"did": did, "largest_rank_before": source.rank, "kept": f"{1:.6f}", "error": f"{0:.6e}"}
    if folder:
        ours["part"] = next(iter(inside))
    hashes = {key: "0x" * key.startswith("modelspec") + "0" * 64 for key in _HASHES if key in kept}
    return {"format": "pt", **kept, **hashes, OURS: json.dumps(ours)}


def _one(ranks: set[int]) -> str:
    """As kohya's script writes it."""
    return str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic"


def _network_args(text: str, dim: str, alpha: str) -> str:
    try:
        args = json.loads(text)
        renewed = {key: value for key, value in (("conv_dim", dim), ("conv_alpha", alpha)) if key in args}
        return json.dumps({**args, **renewed})
    except (ValueError, TypeError, RecursionError):
        return text  # nothing that has a rank in it


def _given_config(source: LoraFile, part: str) -> dict[str, Any]:
    """The LoraConfig of a part in the source's metadata."""
    given = json.loads(source.metadata.get(ADAPTER_METADATA, "{}"))
    return {inside: value for key, value in given.items() for own, inside in [part_of(key)] if own == part}


def _lora_config(layers: Mapping[str, Layer], given: Mapping[str, Any], all_stay: bool) -> dict[str, Any]:
    """PEFT's LoraConfig by which each layer has its rank, and the scale 1.

    Args:
        layers: By the name in the model.
        given: The config before.
        all_stay: Whether no layer was left out.
    """
    top = max(layer.rank for layer in layers.values())
    own = {f"^{re.escape(name)}": layer.rank for name, layer in layers.items() if layer.rank != top}
    config = AdapterConfig({"peft_type": "LORA", **given}).at(top, 1.0)
    changes: dict[str, Any] = {"rank_pattern": own, "alpha_pattern": dict(own)}
    if not all_stay or not given.get("target_modules"):
        changes |= {"target_modules": sorted(layers), "layers_to_transform": None, "layers_pattern": None}
    return dict(config.changed(**changes).data)
