"""A LoRA in one safetensors file, as image and video models have it: opened once, read tensor after tensor."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.files import Mark, mark
from matryoshka_lora.formats.config import CONFIG_NAME, AdapterConfig, check_config
from matryoshka_lora.formats.layout import Layer, check_name
from matryoshka_lora.formats.opened import DTYPES, OpenedAdapter, Stored
from matryoshka_lora.formats.streamed import ALL_DTYPES
from matryoshka_lora.formats.styles import (
    PEFT_PREFIX,
    PIPELINE_PARTS,
    Keys,
    alpha_names,
    beyond_pairs,
    find_pairs,
    module_of,
    part_of,
)

SUFFIX = ".safetensors"
ADAPTER_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the LoraConfig of each part of a pipeline."""

OURS = "matryoshka_lora"
"""Where this package says what it did."""

_MAX_RANK = 4096

_MAX_HEADER = 1 << 25
_AGAIN = "Copy or save the file again"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_OTHER_METHODS = ("hada_", "lokr_", "oft_", "glora_")


@dataclass(frozen=True)
class LoraFile(OpenedAdapter):
    """A single file. Made by `open_file`.

    Its layers have the file's own keys, and ranks and scales of their own. ``others`` are copied as they are.

    Attributes:
        metadata: Of the file.
        pairs: The keys of each layer, by its name.
        alphas: The keys of the layers' alphas, by the layer's name, where they have one.
        whole: Layers whose factors are among ``others``, since they are not all of the layer; and why.
        names: The dotted names of modules, by kohya's, where a model has said them.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)
    pairs: Mapping[str, Keys] = field(default_factory=dict)
    alphas: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def tensor(self, key: str) -> Tensor:
        """One tensor, in its own dtype.

        Raises:
            MatryoshkaError: It is a factor with NaN or infinity in it, or cannot be read.
        """
        tensor = self.stored[key].read()
        if key not in self.others and not bool(tensor.isfinite().all()):
            raise NotFiniteError(f"{self.name}: {key} holds NaN or infinity, so it would destroy every picture")
        return tensor

    def module(self, layer: Layer) -> str:
        """The dotted name of a layer's module; see `module_of`."""
        return self.names.get(layer.name) or module_of(self.pairs[layer.name])

    @property
    def done(self) -> dict[str, Any]:
        """What this package says that it did to make the file."""
        return _done(self.metadata)

    def is_convolution(self, layer: Layer) -> bool:
        """Whether its kernel is larger than one point."""
        return math.prod(layer.shape_A[2:]) > 1


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether an adapter is to be a single file and not PEFT's folder."""
    return os.path.isfile(path) or (not os.path.isdir(path) and os.fspath(path).endswith(SUFFIX))


def open_file(path: str | os.PathLike[str]) -> LoraFile:
    """Open a LoRA in one file, of kohya's, diffusers', PEFT's or the ``down``/``up`` style, or several of them.

    Raises:
        MatryoshkaError: It is no such file, is damaged, or holds nothing that has a rank.
    """
    file = Path(path)
    name = str(file)
    if file.suffix in _PICKLES:
        raise MatryoshkaError(
            f"{name} may be a pickle, which can run code when it is read: save it as {SUFFIX} with the program that "
            "made it"
        )
    stored, metadata = _read_header(file)
    if any(key.startswith(PEFT_PREFIX) for key in stored) and (file.parent / CONFIG_NAME).is_file():
        raise MatryoshkaError(
            f"{name} is a part of PEFT's adapter, whose scale stands in the {CONFIG_NAME} beside it: give {file.parent}"
        )
    whole: dict[str, str] = {}
    pairs, alphas = {}, {}
    found = find_pairs(stored, name)
    more = beyond_pairs(found, stored)
    for pair in found:
        if pair.name in more:
            whole[pair.name] = more[pair.name]
        else:
            pairs[pair.name] = pair
            if alpha := next((key for key in alpha_names(pair) if key in stored), None):
                alphas[pair.name] = alpha
    if not pairs:
        raise _without_pairs(name, whole, stored)
    configs = _configs(metadata, name)
    layers = [_layer(pair, stored, alphas.get(pair.name), configs, name) for pair in pairs.values()]
    used = {key for layer in layers for key in (layer.key_A, layer.key_B)} | set(alphas.values())
    return LoraFile(
        name=name,
        config=AdapterConfig({"peft_type": "LORA", "r": max(layer.rank for layer in layers)}),
        state=None,
        layers=tuple(sorted(layers, key=lambda layer: layer.name)),
        others=tuple(sorted(stored.keys() - used)),
        weights=(file,),
        stored={key: each for key, each in stored.items() if key not in alphas.values()},
        metadata=metadata,
        pairs=pairs,
        alphas=alphas,
        whole=whole,
    )


def from_folder(opened: OpenedAdapter) -> LoraFile:
    """An adapter in PEFT's layout as a single file, for another style.

    Raises:
        MatryoshkaError: Nothing says which part of a pipeline it is for, or it has layers that no such file has.
    """
    if opened.state is not None and not opened.state.deployed:
        raise MatryoshkaError(f"{opened.name} is as it was trained: reorder it first")
    if opened.others or any(layer.experts > 1 or not layer.key_A.endswith(".weight") for layer in opened.layers):
        raise MatryoshkaError(
            f"{opened.name} has more than factors of linear layers and convolutions: leave it to PEFT"
        )
    metadata = _read_header(opened.weights[0])[1] if len(opened.weights) == 1 else {}
    part = _part(metadata, opened.config)
    if not part:
        raise MatryoshkaError(
            f"{opened.name} does not say which part of a pipeline it is for: its {CONFIG_NAME} has no auto_mapping to "
            "a model of diffusers"
        )
    pairs, layers = {}, []
    for layer in opened.layers:
        name = f"{PEFT_PREFIX}{part}.{layer.name}"
        pairs[name] = Keys(name, layer.key_A, layer.key_B)
        layers.append(replace(layer, name=name))
    return LoraFile(
        name=opened.name,
        config=opened.config,
        state=None,
        layers=tuple(layers),
        others=(),
        weights=opened.weights,
        stored=opened.stored,
        metadata={key: value for key, value in metadata.items() if key != OURS},
        pairs=pairs,
    )


def _part(metadata: Mapping[str, str], config: AdapterConfig) -> str:
    """The part of a pipeline that a folder is for: what we wrote, or what the model's class says."""
    if (known := _done(metadata).get("part")) in PIPELINE_PARTS:
        return str(known)
    mapping = config["auto_mapping"] if isinstance(config["auto_mapping"], Mapping) else {}
    library, name = (str(mapping.get(key, "")) for key in ("parent_library", "base_model_class"))
    if library.startswith("diffusers."):
        return "unet" if "UNet" in name else "transformer" if "Transformer" in name else ""
    return "text_encoder" if name in ("CLIPTextModel", "T5EncoderModel") else ""


def _done(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(OURS, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    try:
        if not file.is_file():  # a pipe would be waited for
            raise FileNotFoundError("there is no such file")
        known, size = mark(file), file.stat().st_size
        with open(file, "rb") as begun:
            length = int.from_bytes(begun.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError("it is no safetensors file, or not the whole of one")
            text = begun.read(length)
        with safe_open(file, framework="pt"):
            pass  # safetensors has checked dtypes, shapes and offsets, so that they may be used below
        header = json.loads(text)
        if mark(file) != known:
            raise ValueError("it was replaced while it was read")
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError, RecursionError) as error:
        raise MatryoshkaError(f"{file} is missing or damaged: {error!s:.300}. {_AGAIN}") from error
    metadata, stored = header.pop("__metadata__", None) or {}, {}
    for key, entry in header.items():
        if (dtype := ALL_DTYPES.get(entry["dtype"])) is None:
            raise MatryoshkaError(f"{file}: {key[:80]!r} has dtype {entry['dtype']}, which cannot be copied here")
        shape, begin = Size(entry["shape"]), 8 + length + entry["data_offsets"][0]
        stored[key] = Stored(shape, dtype, partial(_read, file, known, begin, shape, dtype))
    return stored, metadata


def _read(file: Path, known: Mark, begin: int, shape: Size, dtype: torch.dtype) -> Tensor:
    """No mapping of the file into memory: its pages would count as ours for as long as it is open."""
    data = bytearray(shape.numel() * dtype.itemsize)
    try:
        with open(file, "rb", buffering=0) as opened:
            if mark(file) != known:
                raise ValueError("it was replaced while it was read")
            opened.seek(begin)
            view, done = memoryview(data), 0
            while done < len(data):
                count = opened.readinto(view[done:])
                if not count:
                    raise ValueError("it was cut short")
                done += count
    except (OSError, ValueError) as error:
        raise MatryoshkaError(f"{file} cannot be read: {error}. {_AGAIN}") from error
    return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def _layer(
    pair: Keys, stored: Mapping[str, Stored], alpha: str | None, configs: Mapping[str, AdapterConfig], where: str
) -> Layer:
    check_name(pair.name, where)
    shape_A, shape_B = stored[pair.A].shape, stored[pair.B].shape
    rank = shape_A[0] if shape_A else 0
    fits = len(shape_A) == len(shape_B) >= 2 and shape_B[1] == rank and all(shape_A) and all(shape_B)
    if not fits or math.prod(shape_B[2:]) != 1 or len(shape_A) > 5:
        raise MatryoshkaError(
            f"{where}: the factors of {pair.name} have shapes {list(shape_A)} and {list(shape_B)}, which are not those "
            f"of one rank. {_AGAIN}"
        )
    if rank > _MAX_RANK:
        raise MatryoshkaError(f"{where}: {pair.name} has rank {rank}, and {_MAX_RANK} is the largest that is read")
    for key in (pair.A, pair.B):
        dtype = stored[key].dtype
        if dtype is None or dtype not in DTYPES.values() or not dtype.is_floating_point:
            raise MatryoshkaError(f"{where}: {key} has dtype {dtype}: save the file in fp32, bf16 or fp16")
    if stored[pair.A].dtype != stored[pair.B].dtype:
        raise MatryoshkaError(f"{where}: the factors of {pair.name} have two dtypes: save the file in one")
    scale = _scale(pair, rank, alpha and stored[alpha], configs, where)
    return Layer(pair.name, pair.A, pair.B, shape_A, shape_B, rank, scale)


def _scale(
    pair: Keys, rank: int, alpha: Stored | str | None, configs: Mapping[str, AdapterConfig], where: str
) -> float:
    """What the factors are multiplied with: alpha by rank, or what the config of diffusers says, or 1."""
    found = []
    if isinstance(alpha, Stored):
        if alpha.shape.numel() != 1 or alpha.dtype in (None, torch.bool):
            raise MatryoshkaError(
                f"{where}: the alpha of {pair.name} is no number: its shape is {list(alpha.shape)} and its dtype "
                f"{alpha.dtype}. {_AGAIN}"
            )
        value = float(alpha.read().double().reshape(()))
        if not 0 < value <= sys.float_info.max:
            raise MatryoshkaError(f"{where}: the alpha of {pair.name} is {value:g}, no positive number. {_AGAIN}")
        found.append(value / rank)
    if configs:
        part, inside = part_of(module_of(pair))
        if part not in configs:
            raise MatryoshkaError(f"{where}: its {ADAPTER_METADATA} says nothing of {pair.name}. {_AGAIN}")
        if configs[part].rank_of(inside) != rank:
            raise MatryoshkaError(
                f"{where}: {pair.name} has rank {rank}, and its {ADAPTER_METADATA} says {configs[part].rank_of(inside)}"
                f". {_AGAIN}"
            )
        found.append(configs[part].scale_of(inside))
    if len(found) == 2 and not math.isclose(*found, rel_tol=1e-2):
        raise MatryoshkaError(
            f"{where}: the alpha of {pair.name} and its {ADAPTER_METADATA} give it two scales, {found[0]:g} and "
            f"{found[1]:g}. Save the file again with one of them"
        )
    return found[0] if found else 1.0


def _configs(metadata: Mapping[str, str], where: str) -> dict[str, AdapterConfig]:
    """The LoraConfig of each part of the pipeline, where the file has them."""
    if ADAPTER_METADATA not in metadata:
        return {}
    parts: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(metadata[ADAPTER_METADATA]).items():
            part, inside = part_of(key)
            parts.setdefault(part, {})[inside] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise MatryoshkaError(f"{where}: its {ADAPTER_METADATA} is damaged: {error!s:.200}. {_AGAIN}") from error
    for part, data in parts.items():
        if not data.keys() >= {"r", "lora_alpha"}:  # PEFT's defaults would be taken, and the scale be wrong
            whose = part or f"{next(iter(data))[:80]!r}, which names no part of a pipeline that is known here"
            raise MatryoshkaError(f"{where}: its {ADAPTER_METADATA} has no r and lora_alpha for {whose}. {_AGAIN}")
    return {
        part: check_config({"peft_type": "LORA", **data}, f"{where}, {ADAPTER_METADATA}")
        for part, data in parts.items()
    }


def _without_pairs(name: str, whole: Mapping[str, str], stored: Mapping[str, Stored]) -> MatryoshkaError:
    if whole:
        first = next(iter(whole.values()))
        return MatryoshkaError(
            f"every layer of {name} is more than two factors, as {first[:200]} says (DoRA has a magnitude, LoCon may "
            "have a third matrix), so that it has no ranks to choose: merge it into its model with the program that "
            "made it"
        )
    other = next((key for key in stored if any(word in key for word in _OTHER_METHODS)), None)
    if other is not None:
        return MatryoshkaError(
            f"{name} is no LoRA: {other[:200]} belongs to another method (LoHa, LoKr, OFT), which has no ranks to "
            "choose"
        )
    return MatryoshkaError(f"{name} holds no LoRA: no two of its {len(stored)} tensors are a pair of factors")
