"""Single files, as image and video models have them, in the styles of kohya, diffusers and down/up.

kohya writes ``NAME.lora_down.weight``, ``NAME.lora_up.weight`` and ``NAME.alpha``, where the scale
is alpha / rank. diffusers writes ``NAME.lora_A.weight`` and ``NAME.lora_B.weight``, and an alpha,
if any, in the file's metadata. Files without an alpha have the scale 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.layers import AdapterFile, Layer, Lost, Plan, scale_of
from matryoshka_lora.files.output import PathLike, new_file
from matryoshka_lora.files.tensors import FLOATS, Stored, open_tensors

Style = Literal["kohya", "diffusers", "peft"]

SUFFIX = ".safetensors"
AS_GIVEN = "as given"
"""The order of factors that are only renamed."""

_CONFIGS = "lora_adapter_metadata"  # where diffusers keeps the LoraConfig of each part
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")  # of the old tensors
_PEFT = "base_model.model."
_KOHYA = (".lora_down.weight", ".lora_up.weight")
_DIFFUSERS = (".lora_A.weight", ".lora_B.weight")
_ENDINGS = (
    _KOHYA,
    _DIFFUSERS,
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".down.weight", ".up.weight"),
    (".down", ".up"),
)
# What old versions of diffusers put between a module and `.down.weight`.
_BETWEEN = re.compile(r"(\.lora_linear_layer|\.lora|_lora)$")
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


class _Pair(NamedTuple):
    name: str
    A: str
    B: str


def open_single(file: Path) -> AdapterFile:
    """Open a LoRA in one file.

    Raises:
        MatryoshkaError: It is none, it is damaged, or it holds nothing that has ranks.
    """
    if file.suffix != SUFFIX:
        why = "may be a pickle, which can run code" if file.exists() else "does not exist"
        raise MatryoshkaError(f"{file} {why}: give PEFT's folder of an adapter, or a {SUFFIX} file")
    stored, metadata = open_tensors(file)
    pairs = _find_pairs(stored, str(file))
    factors = {key for pair in pairs for key in pair[1:]}
    more = [_MORE.fullmatch(key) for key in stored.keys() - factors]
    whole = {found[1] for found in more if found}
    configs, layers = _configs(metadata, str(file)), []
    for pair in pairs:
        if _BETWEEN.sub("", pair.name) not in whole:
            layers.append(_layer(pair, stored, configs, str(file)))
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
    on_layer: Callable[[], object] | None = None,
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
    alpha = max(ranks.values())
    layers = []
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
        pair = _written_pair(modules[layer.name], style, parts)
        stored[pair.A], stored[pair.B] = adapter.stored[layer.key_A], adapter.stored[layer.key_B]
        alpha = f"{pair.name}.alpha" if style == "kohya" else None
        name = pair.name.removeprefix(_PEFT) if style == "peft" else pair.name
        layers.append(replace(layer, name=name, key_A=pair.A, key_B=pair.B, key_alpha=alpha))
    layers.sort(key=lambda layer: layer.name)
    targets = sorted(layer.name for layer in layers)
    config = {"peft_type": "LORA", "target_modules": targets} if style == "peft" else {}
    return replace(adapter, layers=tuple(layers), stored=stored, config=config)


def _find_pairs(keys: Iterable[str], where: str) -> list[_Pair]:
    found = dict[str, _Pair]()
    for key in sorted(keys):
        ending = next((pair for pair in _ENDINGS if key.endswith(pair)), None)
        if ending is not None:
            name = key.removesuffix(ending[0]).removesuffix(ending[1])
            pair = _Pair(name, name + ending[0], name + ending[1])
            if not {pair.A, pair.B} <= set(keys) or found.setdefault(name, pair) != pair:
                raise MatryoshkaError(f"{where}: {key[:200]!r} is no half of a pair: copy it again")
    return [found[name] for name in sorted(found)]


def _layer(
    pair: _Pair, stored: Mapping[str, Stored], configs: dict[str, dict[str, Any]], where: str
) -> Layer:
    A, B = stored[pair.A], stored[pair.B]
    rank = A.shape[0] if A.shape else 0
    fits = 1 < len(A.shape) == len(B.shape) and B.shape[1] == rank and 0 not in A.shape + B.shape
    if not fits or max(B.shape[2:], default=1) != 1 or not {A.dtype, B.dtype} <= FLOATS.keys():
        raise MatryoshkaError(
            f"{where}: {pair.name[:200]!r} has factors {A.dtype} {list(A.shape)} and {B.dtype} "
            f"{list(B.shape)}, which make no layer: save it again in fp32, bf16 or fp16"
        )
    spelled = (f"{pair.name}.alpha", f"{_BETWEEN.sub('', pair.name)}.alpha")
    key = next((key for key in spelled if key in stored), None)
    scale = 1.0
    if configs:
        part, inside = _part(pair.name.removeprefix(_PEFT))
        if not {"r", "lora_alpha"} <= configs.get(part, {}).keys():
            raise MatryoshkaError(
                f"{where}: its {_CONFIGS} has no lora_alpha for {pair.name[:200]}"
            )
        scale = scale_of(configs[part], inside, rank)
    elif key is not None:
        alpha = stored[key].read().double().flatten()
        scale = float(alpha[0]) / rank if len(alpha) == 1 else 0.0
    elif pair.name.startswith(_PEFT):
        raise MatryoshkaError(
            f"{where} is PEFT's file of weights, and its scale stands in an adapter_config.json: "
            "give the folder that holds both"
        )
    if not 0 < scale < float("inf"):
        raise MatryoshkaError(f"{where}: the alpha of {pair.name[:200]} is no positive number")
    return Layer(pair.name, pair.A, pair.B, A.shape, B.shape, rank, scale, key_alpha=key)


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
    if not adapter.is_single:
        mapping = adapter.config.get("auto_mapping") or {}
        library, kind = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
        is_text = kind in ("CLIPTextModel", "T5EncoderModel")
        part = "text_encoder" if is_text else "unet" if "UNet" in kind else "transformer"
        if is_text or library.startswith("diffusers."):
            return f"{part}.{layer.name}"
        raise MatryoshkaError(
            f"{adapter.name} is not known to be for an image model: name a folder as the output"
        )
    name = layer.name.removeprefix(_PEFT)
    if re.match(r"lora_\w+$", name):
        raise MatryoshkaError(
            f"{name[:80]} is a name of kohya's, which does not say where its dots were: leave the "
            "style as it is, which diffusers and ComfyUI read too"
        )
    short = _BETWEEN.sub("", name).replace(".processor.", ".")
    return f"{short}.0" if short != name and short.endswith(".to_out") else short


def _written_pair(module: str, style: Style, parts: set[str]) -> _Pair:
    part, inside = _part(module)
    if style == "kohya":
        word = _PARTS.get(part or "unet")
        if word is None:
            raise MatryoshkaError(f"kohya has no name for the part {part}: choose diffusers")
        if part == "text_encoder" and "text_encoder_2" in parts:
            word = "lora_te1"
        # transformers has dropped the first part of CLIP's names, and ComfyUI wants it.
        if part.startswith("text_encoder") and inside.startswith("encoder.layers."):
            inside = f"text_model.{inside}"
        name = f"{word}_{inside.replace('.', '_')}"
        return _Pair(name, name + _KOHYA[0], name + _KOHYA[1])
    if style == "diffusers" and not part:
        raise MatryoshkaError(
            f"{module[:200]} does not say which part of a pipeline it is for, and diffusers would "
            "not find it: leave the style as it is"
        )
    name = _PEFT + inside if style == "peft" else module
    return _Pair(name, name + _DIFFUSERS[0], name + _DIFFUSERS[1])


def _metadata(adapter: AdapterFile, layers: list[Layer], alpha: int) -> dict[str, str]:
    kept = {key: x for key, x in adapter.metadata.items() if key not in (*_HASHES, _CONFIGS)}
    wide = [layer for layer in layers if layer.is_convolution]
    dims = {layer.rank for layer in layers if not layer.is_convolution} or {x.rank for x in wide}
    has_alpha = any(layer.key_alpha for layer in layers)
    if "ss_network_dim" in kept or has_alpha:
        kept |= {"ss_network_dim": _one(dims), "ss_network_alpha": str(alpha)}
    try:
        args = json.loads(kept.get("ss_network_args", "{}"))
        if "conv_dim" in args:
            renewed = {"conv_dim": _one({x.rank for x in wide}), "conv_alpha": str(alpha)}
            kept["ss_network_args"] = json.dumps({**args, **renewed})
    except (ValueError, TypeError):
        pass  # somebody's own words
    if not has_alpha and adapter.is_single and not layers[0].name.startswith("lora_"):
        modules = {_module(adapter, layer): layer for layer in layers}
        if {_part(module)[0] for module in modules} <= _PARTS.keys() - {"diffusion_model"}:
            kept[_CONFIGS] = json.dumps(_lora_configs(adapter, modules), sort_keys=True)
    return {"format": "pt", **kept}


def _one(ranks: set[int]) -> str:
    """Return one rank, or the word that kohya's script writes for several."""
    return str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic"


def _lora_configs(adapter: AdapterFile, modules: Mapping[str, Layer]) -> dict[str, Any]:
    """Return the LoraConfigs by which diffusers gives each layer its rank, and the scale 1."""
    found, given = dict[str, Any](), _configs(adapter.metadata, adapter.name)
    for part in sorted({_part(module)[0] for module in modules}):
        own = {_part(m)[1]: x.rank for m, x in modules.items() if _part(m)[0] == part}
        top = max(own.values())
        pattern = {f"^{re.escape(name)}": rank for name, rank in own.items() if rank != top}
        config = {"target_modules": sorted(own), **given.get(part, {})}
        config |= {"r": top, "lora_alpha": top, "use_rslora": False}
        config |= {"rank_pattern": pattern, "alpha_pattern": pattern}
        found |= {f"{part}.{key}": value for key, value in config.items()}
    return found
