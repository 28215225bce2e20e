"""Read and write single-file LoRAs in the styles of kohya, diffusers and others.

kohya writes ``NAME.lora_down.weight``, ``NAME.lora_up.weight`` and ``NAME.alpha``, where the scale
is alpha / rank. diffusers writes ``NAME.lora_A.weight`` and ``NAME.lora_B.weight``, and an alpha,
if any, in the file's metadata. Files without an alpha have the scale 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.layers import AdapterFile, Layer, Plan, rank_and_scale
from matryoshka_lora.files.tensors import Stored, open_tensors

Style = Literal["kohya", "diffusers", "peft"]
_Configs = dict[str, dict[str, Any]]

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
_MORE = re.compile(r"(.+)\.(?:dora_scale|magnitude|lora_(?:mag\w+|mid|up|down|[AB])(?:\.[^.]+)*)")

_OTHER_METHODS = re.compile(r"dora_scale|magnitude|hada_|lokr_|lora_mid|lora_[AB]\.bias")
# Older keys, such as NAME.lora.down.weight, have their alpha and their magnitude beside NAME.
_OLD = re.compile(r"[._]lora(_linear_layer)?$")

# The parts of a pipeline, and the first word of kohya's names for them. The names of a model's own
# authors begin with diffusion_model.
_PARTS = {
    "unet": "lora_unet",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
    "diffusion_model": "lora_unet",
    **dict.fromkeys(("transformer", "transformer_2", "connectors", "text_conditioner", "prior")),
}


def open_single(file: Path) -> AdapterFile:
    """Open a LoRA in one file; MatryoshkaError if it is damaged or has no ranks."""
    if file.suffix.lower() != ".safetensors":
        why = "is no LoRA that can be read" if file.exists() else "does not exist"
        raise MatryoshkaError(f"{file} {why}: give PEFT's folder or a .safetensors file")
    stored, metadata = open_tensors(file)
    pairs = dict[str, tuple[str, str]]()
    for key in sorted(stored):
        for down, up in _ENDINGS:
            name = key.removesuffix(down)
            if name != key and name + up in stored:
                pairs[name] = (key, name + up)
    others = stored.keys() - {key for pair in pairs.values() for key in pair}
    whole = {found[1] for key in others if (found := _MORE.fullmatch(key))}
    configs = _configs(metadata, str(file))
    plain = sorted(each for each in pairs.items() if not {each[0], _OLD.sub("", each[0])} & whole)
    layers = [_layer(name, pair, stored, configs, str(file)) for name, pair in plain]
    if not layers or (whole and _tells(layers)):  # diffusers would get ranks of the others alone
        other = next((key for key in sorted(stored) if _OTHER_METHODS.search(key)), None)
        raise MatryoshkaError(
            f"{file} holds {other[:80]}, so it is a DoRA, LoHa or LoKr, or has biases, and has no "
            "ranks to choose: use it whole"
            if other
            else f"{file} holds no LoRA whose keys are known: they end in lora_A.weight, "
            f"lora_down.weight or down.weight, and not as {min(stored, default='')[:80]!r}"
        )
    used = {key for layer in layers for key in (layer.key_A, layer.key_B, layer.key_alpha)}
    kept = {key: stored[key] for key in sorted(stored.keys() - used)}
    return AdapterFile(str(file), tuple(layers), kept, {}, metadata, files=(file,))


def plan_single(adapter: AdapterFile, own: Mapping[str, int]) -> Plan:
    """Return a single file before it is computed; ``own`` is the rank of each layer.

    All layers with an alpha get the same, the largest rank: diffusers supports one where ranks
    differ. Without, the metadata keep each layer's scale, or else it is 1.
    """
    alpha, layers, others = max(own.values()), list[tuple[Layer, Layer]](), dict(adapter.others)
    tells = _CONFIGS in adapter.metadata and _tells(adapter.layers)
    for layer in adapter.layers:
        rank, scale = own[layer.name], layer.scale if tells else 1.0
        layers.append((layer, layer.at(rank, alpha / rank if layer.key_alpha else scale)))
        if layer.key_alpha:
            others[layer.key_alpha] = Stored.of(torch.tensor(float(alpha)))
    metadata = _metadata(adapter, [new for _, new in layers], alpha)
    return Plan(adapter, tuple(layers), others, metadata)


def in_style(adapter: AdapterFile, style: Style) -> AdapterFile:
    """Return a single file with the keys of another style; ``"peft"`` makes it PEFT's folder.

    Raises:
        MatryoshkaError: The style has no name for a layer, or its module's name is unknown.
    """
    if adapter.others:
        raise MatryoshkaError(f"{adapter.name} is more than pairs of factors: leave its style")
    unclear = [layer.name for layer in adapter.layers if not layer.key_A.endswith(_DIFFUSERS[0])]
    if unclear:
        raise MatryoshkaError(
            f"{unclear[0][:80]} cannot be renamed, as only keys that end in lora_A.weight say "
            "where the dots of a module's name are: leave out --style"
        )
    modules = [layer.name.removeprefix(_PEFT) for layer in adapter.layers]
    parts = {_part(module)[0] for module in modules}
    if style == "peft" and len(parts) > 1:
        raise MatryoshkaError(f"{adapter.name} is for several models: choose the style diffusers")
    endings, prefix = _KOHYA if style == "kohya" else _DIFFUSERS, _PEFT if style == "peft" else ""
    layers = list[Layer]()
    for layer, module in zip(adapter.layers, modules, strict=True):
        name = _name_in(style, module, parts)
        key_A, key_B = (f"{prefix}{name}{ending}" for ending in endings)
        alpha = f"{name}.alpha" if style == "kohya" else None
        layers.append(replace(layer, name=name, key_A=key_A, key_B=key_B, key_alpha=alpha))
    layers.sort(key=lambda layer: layer.name)
    config = {"peft_type": "LORA", "target_modules": [layer.name for layer in layers]}
    return replace(adapter, layers=tuple(layers), config=config if style == "peft" else {})


def _name_in(style: Style, module: str, parts: set[str]) -> str:
    """Return the name of a module in another style."""
    part, inside = _part(module)
    if style == "peft":
        return inside
    word = _PARTS.get(part) if style == "kohya" else part
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


def _layer(
    name: str, keys: tuple[str, str], stored: Mapping[str, Stored], configs: _Configs, where: str
) -> Layer:
    A, B = stored[keys[0]], stored[keys[1]]
    fits = A.is_factor and B.is_factor and len(A.shape) == len(B.shape) and A.shape[0] == B.shape[1]
    if not fits or max(B.shape[2:], default=1) != 1:
        raise MatryoshkaError(
            f"{where}: {name[:200]!r} has factors {A.dtype} {list(A.shape)} and {B.dtype} "
            f"{list(B.shape)}, which make no layer: save it again in fp32, bf16 or fp16"
        )
    key = f"{_OLD.sub('', name)}.alpha"
    rank, alpha, scale = A.shape[0], stored.get(key), 1.0
    part, inside = _part(name.removeprefix(_PEFT))
    if alpha is not None:
        values = alpha.read().double().flatten()
        scale = float(values[0]) / rank if len(values) == 1 else 0.0
    elif part in configs:
        _, scale = rank_and_scale(configs[part], inside, where)
    elif name.startswith(_PEFT):
        raise MatryoshkaError(
            f"{where} is PEFT's file of weights, and its scale stands in an adapter_config.json: "
            "give the folder that holds both"
        )
    if not 0 < scale < float("inf"):
        raise MatryoshkaError(f"{where}: the alpha of {name[:200]} is no positive number")
    return Layer(name, *keys, A, B, rank, scale, key_alpha=key if alpha else None)


def _configs(metadata: Mapping[str, str], where: str) -> _Configs:
    """Return the LoraConfig of each part of the pipeline, where the file has them."""
    parts: _Configs = {}
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


def _metadata(adapter: AdapterFile, layers: list[Layer], alpha: int) -> dict[str, str]:
    """Return the file's metadata with updated rank fields."""
    kept = {key: x for key, x in adapter.metadata.items() if key not in (*_HASHES, _CONFIGS)}
    if "ss_network_dim" in kept:
        alike = {layer.rank for layer in layers} == {alpha}
        kept["ss_network_dim"] = str(alpha) if alike else "Dynamic"  # as kohya's script says
        kept["ss_network_alpha"] = str(alpha)
    if _tells(layers):
        kept[_CONFIGS] = json.dumps(_lora_configs(adapter, layers), sort_keys=True)
    return {"format": "pt", **kept}


def _tells(layers: Sequence[Layer]) -> bool:
    """Return whether metadata tell the layers' ranks and alphas, as diffusers writes them."""
    known = {_part(layer.name)[0] for layer in layers} <= _PARTS.keys() - {"diffusion_model"}
    return known and all(x.key_A.endswith(_DIFFUSERS[0]) and not x.key_alpha for x in layers)


def _lora_configs(adapter: AdapterFile, layers: list[Layer]) -> dict[str, Any]:
    """Return the LoraConfigs that tell diffusers each layer's rank and alpha."""
    given = _configs(adapter.metadata, adapter.name)
    found = {f"{part}.{key}": x for part, own in given.items() if part for key, x in own.items()}
    parts = dict[str, dict[str, tuple[int, float]]]()
    for layer in layers:
        part, inside = _part(layer.name)
        # diffusers takes this part of CLIP's names away, in the keys alone
        own = parts.setdefault(part, {})
        own[inside.removeprefix("text_model.")] = layer.rank, layer.rank * layer.scale
    for part, own in parts.items():
        top, start = max(own.values()), "" if part.startswith("text_encoder") else "^"
        config = {**given.get(part, {}), "target_modules": sorted(own)}
        config |= {"r": top[0], "lora_alpha": top[1], "use_rslora": False}
        for at, pattern in enumerate(("rank_pattern", "alpha_pattern")):
            others = {name: pair[at] for name, pair in own.items() if pair != top}
            config[pattern] = {f"{start}{re.escape(name)}": x for name, x in others.items()}
        found |= {f"{part}.{key}": value for key, value in config.items()}
    return found
