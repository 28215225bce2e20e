"""Single files, as image and video models have them, in the styles of kohya, diffusers and others.

kohya writes ``NAME.lora_down.weight``, ``NAME.lora_up.weight`` and ``NAME.alpha``, where the scale
is alpha / rank. diffusers writes ``NAME.lora_A.weight`` and ``NAME.lora_B.weight``, and an alpha,
if any, in the file's metadata. Files without an alpha have the scale 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.layers import AdapterFile, Layer, Lost, OnLayer, Plan, rank_and_scale
from matryoshka_lora.files.output import PathLike, new_file
from matryoshka_lora.files.tensors import Stored, open_tensors

Style = Literal["kohya", "diffusers", "peft"]

AS_GIVEN = "as given"
"""The order of factors that are only renamed."""

_CONFIGS = "lora_adapter_metadata"  # where diffusers keeps the LoraConfig of each part
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")  # of the old tensors
_PEFT = "base_model.model."
_KOHYA = (".lora_down.weight", ".lora_up.weight")
_DIFFUSERS = (".lora_A.weight", ".lora_B.weight")
_ENDINGS = (
    *(_KOHYA, _DIFFUSERS, (".lora_A.default.weight", ".lora_B.default.weight")),
    *((".down.weight", ".up.weight"), (".down", ".up")),
)
# What makes a layer more than a pair of factors: a magnitude (DoRA), a third matrix, a bias.
_MORE = re.compile(r"(.+)\.(?:dora_scale|lora_(?:magnitude_vector|mid|up|down|[AB])(?:\.[^.]+)*)")

# The parts of a pipeline, and the first word of kohya's names for them. The names of a model's own
# authors begin with diffusion_model.
_PARTS = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
    "diffusion_model": "lora_unet",
    **dict.fromkeys(
        ("transformer_2", "transformer_ref", "connectors", "text_conditioner", "prior")
    ),
}


def open_single(file: Path) -> AdapterFile:
    """Open a LoRA in one file.

    Raises:
        MatryoshkaError: It is none, it is damaged, or it holds nothing that has ranks.
    """
    if file.suffix != ".safetensors":
        why = "may be a pickle, which can run code" if file.exists() else "does not exist"
        raise MatryoshkaError(f"{file} {why}: give PEFT's folder or a .safetensors file")
    stored, metadata = open_tensors(file)
    pairs = dict[str, tuple[str, str]]()
    for key in sorted(stored):
        ending = next((pair for pair in _ENDINGS if key.endswith(pair)), None)
        if ending is not None:
            name = key.removesuffix(ending[0]).removesuffix(ending[1])
            pair = (name + ending[0], name + ending[1])
            if not stored.keys() >= {*pair} or pairs.setdefault(name, pair) != pair:
                raise MatryoshkaError(f"{file}: {key[:200]!r} is no half of a pair: copy it again")
    others = stored.keys() - {key for pair in pairs.values() for key in pair}
    whole = {found[1] for key in others if (found := _MORE.fullmatch(key))}
    configs = _configs(metadata, str(file))
    plain = {name: pair for name, pair in pairs.items() if name not in whole}
    layers = [_layer(name, *plain[name], stored, configs, str(file)) for name in sorted(plain)]
    if not layers:
        raise MatryoshkaError(
            f"{file} holds no layer that is a pair of factors alone. DoRA, LoHa, LoKr and the like "
            "have no ranks to choose: use it whole"
        )
    alphas = {layer.key_alpha for layer in layers}
    kept = {key: each for key, each in stored.items() if key not in alphas}
    return AdapterFile(str(file), tuple(layers), kept, {}, metadata, files=(file,))


def write_single(
    adapter: AdapterFile,
    path: PathLike,
    ranks: Mapping[str, int],
    force: bool = False,
    on_layer: OnLayer = None,
) -> Lost:
    """Write a single file, where each layer has a rank of its own.

    Args:
        adapter: What `open_single` or `in_style` gives.
        path: The file to write.
        ranks: The rank of each layer by its name.
        force: Whether the file that is there is replaced.
        on_layer: Called after each layer.
    """
    with new_file(path, force, adapter.source) as file:
        return plan_single(adapter, ranks).write(file, on_layer)


def plan_single(adapter: AdapterFile, ranks: Mapping[str, int]) -> Plan:
    """Return the file of `write_single` before it is computed.

    All layers get one alpha, the largest rank: diffusers knows no other where ranks differ.
    """
    alpha, layers = max(ranks.values()), []
    others = {key: adapter.stored[key] for key in adapter.others}
    for layer in adapter.layers:
        rank = ranks[layer.name]
        layers.append((layer, layer.at(rank, alpha / rank if layer.key_alpha else 1.0)))
        if layer.key_alpha:
            others[layer.key_alpha] = Stored.of(torch.tensor(float(alpha)))
    metadata = _metadata(adapter, [new for _, new in layers], alpha)
    return Plan(adapter, tuple(layers), others, metadata)


def in_style(adapter: AdapterFile, style: Style) -> AdapterFile:
    """Return an adapter with the keys of another style; ``"peft"`` makes one for PEFT's folder.

    Raises:
        MatryoshkaError: The style has no name for a layer, or nothing says what its name is.
    """
    if adapter.others or not all(x.key_A.endswith(".weight") for x in adapter.layers):
        raise MatryoshkaError(f"{adapter.name} is more than pairs of factors: leave its style")
    modules = {layer.name: _module(adapter, layer) for layer in adapter.layers}
    parts = {_part(module)[0] for module in modules.values()}
    if style == "peft" and len(parts) > 1:
        raise MatryoshkaError(f"{adapter.name} is for several models: choose the style diffusers")
    layers, stored = [], dict[str, Stored]()
    for layer in adapter.layers:
        name = _name_in(style, modules[layer.name], parts)
        key_A, key_B = (name + ending for ending in (_KOHYA if style == "kohya" else _DIFFUSERS))
        stored[key_A], stored[key_B] = adapter.stored[layer.key_A], adapter.stored[layer.key_B]
        alpha, name = f"{name}.alpha" if style == "kohya" else None, name.removeprefix(_PEFT)
        layers.append(replace(layer, name=name, key_A=key_A, key_B=key_B, key_alpha=alpha))
    layers.sort(key=lambda layer: layer.name)
    config = {"peft_type": "LORA", "target_modules": [layer.name for layer in layers]}
    config = config if style == "peft" else {}
    return replace(adapter, layers=tuple(layers), stored=stored, config=config)


def _layer(
    name: str,
    key_A: str,
    key_B: str,
    stored: Mapping[str, Stored],
    configs: Mapping[str, dict[str, Any]],
    where: str,
) -> Layer:
    A, B = stored[key_A], stored[key_B]
    fits = A.is_factor and B.is_factor and len(A.shape) == len(B.shape) and A.shape[0] == B.shape[1]
    if not fits or max(B.shape[2:], default=1) != 1:
        raise MatryoshkaError(
            f"{where}: {name[:200]!r} has factors {A.dtype} {list(A.shape)} and {B.dtype} "
            f"{list(B.shape)}, which make no layer: save it again in fp32, bf16 or fp16"
        )
    rank, alpha, scale = A.shape[0], stored.get(f"{name}.alpha"), 1.0
    if configs:
        part, inside = _part(name.removeprefix(_PEFT))
        if not {"r", "lora_alpha"} <= configs.get(part, {}).keys():
            raise MatryoshkaError(f"{where}: its {_CONFIGS} has no lora_alpha for {name[:200]}")
        scale = rank_and_scale(configs[part], inside)[1]
    elif alpha is not None:
        values = alpha.read().double().flatten()
        scale = float(values[0]) / rank if len(values) == 1 else 0.0
    elif name.startswith(_PEFT):
        raise MatryoshkaError(
            f"{where} is PEFT's file of weights, and its scale stands in an adapter_config.json: "
            "give the folder that holds both"
        )
    if not 0 < scale < float("inf"):
        raise MatryoshkaError(f"{where}: the alpha of {name[:200]} is no positive number")
    key = f"{name}.alpha" if alpha else None
    return Layer(name, key_A, key_B, A.shape, B.shape, rank, scale, key_alpha=key)


def _configs(metadata: Mapping[str, str], where: str) -> dict[str, dict[str, Any]]:
    """Return the LoraConfig of each part of the pipeline, where the file has them."""
    parts = dict[str, dict[str, Any]]()
    try:
        for key, value in json.loads(metadata.get(_CONFIGS, "{}")).items():
            part, inside = _part(key)
            parts.setdefault(part, {})[inside] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise MatryoshkaError(f"{where}: its {_CONFIGS} is damaged. Save it again") from error
    return parts


def _part(module: str) -> tuple[str, str]:
    """Return the part of the pipeline, "" where a name says none, and the name inside it."""
    first, _, rest = module.partition(".")
    return (first, rest) if first in _PARTS and rest else ("", module)


def _module(adapter: AdapterFile, layer: Layer) -> str:
    """Return the dotted name of a layer's module, with its part of the pipeline."""
    if adapter.is_single:
        if layer.key_A.endswith(_DIFFUSERS[0]):
            return layer.name.removeprefix(_PEFT)
        raise MatryoshkaError(
            f"{layer.name[:80]} does not say where the dots of its module's name were: leave the "
            "style as it is, which diffusers and ComfyUI read too"
        )
    mapping = adapter.config.get("auto_mapping") or {}
    library, kind = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
    is_text = kind in ("CLIPTextModel", "T5EncoderModel")
    if not is_text and not library.startswith("diffusers."):
        raise MatryoshkaError(f"{adapter.name} is for no image model: name a folder as the output")
    part = "text_encoder" if is_text else "unet" if "UNet" in kind else "transformer"
    return f"{part}.{layer.name}"


def _name_in(style: Style, module: str, parts: set[str]) -> str:
    """Return the name of a module in another style."""
    part, inside = _part(module)
    if style == "peft":
        return _PEFT + inside
    word = _PARTS.get(part or "unet") if style == "kohya" else part
    if not word:
        raise MatryoshkaError(
            f"{style} has no name for {module[:200]}, which must say a part of a pipeline that it "
            "knows: leave the style as it is"
        )
    if style == "diffusers":
        return module
    if part == "text_encoder" and "text_encoder_2" in parts:
        word = "lora_te1"
    # transformers has dropped the first part of CLIP's names, and ComfyUI wants it.
    if part.startswith("text_encoder") and inside.startswith("encoder.layers."):
        inside = f"text_model.{inside}"
    return f"{word}_{inside.replace('.', '_')}"


def _metadata(adapter: AdapterFile, layers: list[Layer], alpha: int) -> dict[str, str]:
    """Return the metadata of a file, in which what speaks of ranks is renewed."""

    def one(ranks: set[int]) -> str:
        return str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic"  # as kohya's script says

    kept = {key: x for key, x in adapter.metadata.items() if key not in (*_HASHES, _CONFIGS)}
    wide = {layer.rank for layer in layers if layer.is_convolution}
    dims = {layer.rank for layer in layers if not layer.is_convolution} or wide
    has_alpha = any(layer.key_alpha for layer in layers)
    if "ss_network_dim" in kept or has_alpha:
        kept |= {"ss_network_dim": one(dims), "ss_network_alpha": str(alpha)}
    if "conv_dim" in kept.get("ss_network_args", ""):
        args = json.loads(kept["ss_network_args"])
        args |= {"conv_dim": one(wide), "conv_alpha": str(alpha)}
        kept["ss_network_args"] = json.dumps(args)
    known = {_part(layer.name)[0] for layer in layers} <= _PARTS.keys() - {"diffusion_model"}
    if known and not has_alpha and all(x.key_A.endswith(_DIFFUSERS[0]) for x in layers):
        kept[_CONFIGS] = json.dumps(_lora_configs(adapter, layers), sort_keys=True)
    return {"format": "pt", **kept}


def _lora_configs(adapter: AdapterFile, layers: list[Layer]) -> dict[str, Any]:
    """Return the LoraConfigs by which diffusers gives each layer its rank, and the scale 1."""
    found, given = dict[str, Any](), _configs(adapter.metadata, adapter.name)
    ranks = dict[str, dict[str, int]]()
    for layer in layers:
        part, inside = _part(layer.name)
        ranks.setdefault(part, {})[inside] = layer.rank
    for part, own in ranks.items():
        top = max(own.values())
        pattern = {f"^{re.escape(name)}": rank for name, rank in own.items() if rank != top}
        config = {"target_modules": sorted(own), **given.get(part, {})}
        config |= {"r": top, "lora_alpha": top, "use_rslora": False}
        config |= {"rank_pattern": pattern, "alpha_pattern": pattern}
        found |= {f"{part}.{key}": value for key, value in config.items()}
    return found
