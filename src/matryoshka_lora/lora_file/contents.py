"""Count what a LoRA contains: the kinds of its layers, and the parts of a pipeline."""

from __future__ import annotations

import re
from collections import Counter

from matryoshka_lora.lora_file.key_names import PEFT_PREFIX, split_part
from matryoshka_lora.lora_file.lora import LoraFile

# Before the names of modules with underscores, as kohya, OneTrainer and LyCORIS write them.
_PREFIX = re.compile(r"(lora_(prior_)?(unet|transformer|te\d?)|lycoris)(?=_)")


def count_kinds(lora: LoraFile) -> dict[str, int]:
    """Return the number of layers of each kind, such as ``"LoRA"`` or ``"LoKr convolution"``."""
    kinds: Counter[str] = Counter()
    for layer in lora.layers:
        is_convolution = len(layer.A.shape) > 2
        kinds[f"{layer.kind} convolution" if is_convolution else layer.kind] += 1
    return dict(sorted(kinds.items()))


def count_parts(lora: LoraFile) -> dict[str, int]:
    """Return the number of layers in each part of a pipeline, as the keys of the file name it.

    Examples are ``"lora_te1"``, ``"unet"`` and ``"diffusion_model"``. A name without a part is
    counted under ``""``.
    """
    parts: Counter[str] = Counter()
    for layer in lora.layers:
        prefix = _PREFIX.match(layer.name)
        parts[prefix[0] if prefix else split_part(layer.name.removeprefix(PEFT_PREFIX))[0]] += 1
    return dict(sorted(parts.items()))
