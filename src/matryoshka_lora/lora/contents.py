"""The contents of a file: layers by kind and part of a pipeline, and other tensors by kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matryoshka_lora.lora.keys import PEFT_PREFIX, split_part
from matryoshka_lora.lora.layer import Layer

# kohya's and OneTrainer's names of parts; a text encoder may have a number.
_KOHYA_PART = re.compile(r"(?:lora|lycoris)_(?P<part>unet|transformer|prior|te)(?P<number>\d?)_")
# The tensors of a module by kind: the first one that a module has is its kind.
_KINDS = {
    "DoRA": r"dora_scale|(lora_)?mag\w+(\.\w+)*",
    "LoHa": r"hada_\w+",
    "LoKr": r"lokr_\w+",
    "OFT": r"oft_\w+",
    "LoRA with a third matrix": r"lora_mid(\.weight)?",
    "bias": r"(lora_[AB]\.)?bias",
    "difference": r"diff(_b)?",
    "norm": r"[wb]_norm",
    "embedding": r"emb_params|string_to_param(\..+)?",
    "LoRA with alpha 0": r"(lora(_linear_layer)?[._])?(down|up)(\.weight)?|lora_[AB](\.\w+)*",
}
_MODULE = re.compile(rf"(?P<module>.+?)\.(?P<tensor>{'|'.join(_KINDS.values())}|alpha)")


@dataclass(frozen=True)
class PartInfo:
    """The layers of a part of a pipeline.

    Attributes:
        layers: Their number.
        convolutions: How many of them are convolutions.
    """

    layers: int
    convolutions: int


def layers_by_part(layers: Iterable[Layer]) -> dict[str, PartInfo]:
    """Return how many layers each part of a pipeline has; ``""`` is the part of other names.

    The parts have the names of diffusers: ``unet``, ``transformer``, ``text_encoder``,
    ``text_encoder_2``, ...; or ``diffusion_model``, as in the names of a model's authors. kohya's
    files call a transformer ``unet`` too.
    """
    num_layers: Counter[str] = Counter()
    num_convolutions: Counter[str] = Counter()
    for layer in layers:
        part = _part_of(layer.name)
        num_layers[part] += 1
        num_convolutions[part] += len(layer.in_shape) > 1
    return {part: PartInfo(num_layers[part], num_convolutions[part]) for part in sorted(num_layers)}


def _part_of(name: str) -> str:
    match = _KOHYA_PART.match(name)
    if match is None:
        return split_part(name.removeprefix(PEFT_PREFIX))[0]
    if match["part"] != "te":
        return match["part"]
    is_first = match["number"] in ("", "1")
    return "text_encoder" if is_first else f"text_encoder_{match['number']}"


def modules_by_kind(keys: Iterable[str]) -> dict[str, int]:
    """Return how many modules have other tensors of a kind, such as ``"DoRA"`` or ``"norm"``.

    Args:
        keys: The keys of the tensors that are not factors of a layer.
    """
    tensors_by_module: dict[str, list[str]] = {}
    for key in keys:
        match = _MODULE.fullmatch(key)
        module, tensor = (match["module"], match["tensor"]) if match else (key, "")
        tensors_by_module.setdefault(module, []).append(tensor)
    return dict(Counter(_kind_of(tensors) for tensors in tensors_by_module.values()))


def _kind_of(tensors: Sequence[str]) -> str:
    for kind, pattern in _KINDS.items():
        if any(re.fullmatch(pattern, tensor) for tensor in tensors):
            return kind
    return "other"
