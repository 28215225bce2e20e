"""Convert the keys of a single file, from those of diffusers to another format."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

from matryoshka_lora.errors import MatryoshkaError, check_choice
from matryoshka_lora.formats import KeyFormat
from matryoshka_lora.lora_file.diffusers_metadata import CONFIGS_KEY
from matryoshka_lora.lora_file.key_names import (
    DIFFUSERS_SUFFIXES,
    KOHYA_SUFFIXES,
    ORIGINAL_PART,
    PEFT_PREFIX,
    split_part,
)
from matryoshka_lora.lora_file.lora import Layer
from matryoshka_lora.lora_file.peft_folder import PeftFolder
from matryoshka_lora.lora_file.single_file import SingleFile

# The prefix of kohya's keys by the part of the pipeline.
_KOHYA_PREFIXES = {
    "unet": "lora_unet",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
    ORIGINAL_PART: "lora_unet",
}


def convert_keys(lora: SingleFile, key_format: KeyFormat) -> SingleFile | PeftFolder:
    """Return a LoRA with the keys of another format. The factors stay the same.

    Args:
        lora: A file whose keys hold the names of the modules, with dots.
        key_format: ``"kohya"``: ``lora_unet_NAME.lora_down.weight`` and an alpha, with underscores
            for the dots of the name. ``"diffusers"``: ``unet.NAME.lora_A.weight``. ``"peft"``: a
            folder with ``base_model.model.NAME.lora_A.weight``.

    Raises:
        MatryoshkaError: The file has tensors that cannot be renamed, or the format has no name for
            a layer.
    """
    check_choice("key_format", key_format, get_args(KeyFormat))
    _check_keys(lora)
    modules = [layer.name.removeprefix(PEFT_PREFIX) for layer in lora.layers]
    parts = {split_part(module)[0] for module in modules}
    if key_format == "peft" and len(parts) > 1:
        raise MatryoshkaError(
            f"{lora.name} is for several models of a pipeline, and a PEFT folder is for one. Pass "
            "`key_format='diffusers'`."
        )
    renamed_layers = [
        _rename_layer(layer, _rename_module(module, key_format, parts), key_format)
        for layer, module in zip(lora.layers, modules, strict=True)
    ]
    layers = tuple(sorted(renamed_layers, key=lambda layer: layer.name))
    for layer, next_layer in pairwise(layers):
        if layer.name == next_layer.name:
            raise MatryoshkaError(
                f"{lora.name} has two layers that the {key_format} format names "
                f"{layer.name[:200]!r}, such as a.b_c and a_b.c. Omit `key_format`."
            )
    if key_format == "peft":
        return _to_peft_folder(lora, layers)
    metadata = dict(lora.metadata)
    if any(layer.key_alpha for layer in lora.layers):
        # The scale was in the alphas, which all programs read, and not in diffusers' metadata.
        metadata.pop(CONFIGS_KEY, None)
    return replace(lora, layers=layers, metadata=metadata)


def _check_keys(lora: SingleFile) -> None:
    if lora.other_tensors:
        key = min(lora.other_tensors)
        raise MatryoshkaError(
            f"{lora.name} contains {key[:80]!r}, which is not a factor and cannot be renamed. "
            "Omit `key_format`."
        )
    for layer in lora.layers:
        # kohya's names have underscores for dots, so the module's name is unknown. Some programs
        # write kohya's suffixes after names with dots.
        has_kohya_suffix = layer.key_A.endswith(KOHYA_SUFFIXES.A) and "." in layer.name
        if not (has_kohya_suffix or layer.key_A.endswith(DIFFUSERS_SUFFIXES.A)):
            raise MatryoshkaError(
                f"{layer.name[:80]} cannot be renamed, because it does not hold the name of the "
                "module with its dots. Omit `key_format`."
            )


def _rename_module(module: str, key_format: KeyFormat, parts: Set[str]) -> str:
    """Return the name of a layer in a key format.

    Args:
        module: The module's name, which begins with the part of the pipeline.
        key_format: The format.
        parts: All parts that the file has layers of.
    """
    part, name = split_part(module)
    if key_format == "peft":
        return name
    if key_format == "diffusers" and part:
        return module
    if key_format == "kohya" and part in _KOHYA_PREFIXES:
        prefix = _KOHYA_PREFIXES[part]
        if part == "text_encoder" and "text_encoder_2" in parts:
            prefix = "lora_te1"
        # transformers dropped the `text_model.` prefix that ComfyUI expects.
        if part.startswith("text_encoder") and name.startswith("encoder.layers."):
            name = f"text_model.{name}"
        return f"{prefix}_{name.replace('.', '_')}"
    raise MatryoshkaError(
        f"The {key_format} format cannot name {module[:200]}: it must begin with a part of the "
        "pipeline that this format knows, such as unet. Omit `key_format`."
    )


def _rename_layer(layer: Layer, name: str, key_format: KeyFormat) -> Layer:
    prefix = PEFT_PREFIX if key_format == "peft" else ""
    suffixes = DIFFUSERS_SUFFIXES
    key_alpha = None
    if key_format == "kohya":
        suffixes = KOHYA_SUFFIXES
        key_alpha = f"{name}.alpha"
    return replace(
        layer,
        name=name,
        key_A=f"{prefix}{name}{suffixes.A}",
        key_B=f"{prefix}{name}{suffixes.B}",
        key_alpha=key_alpha,
    )


def _to_peft_folder(lora: SingleFile, layers: tuple[Layer, ...]) -> PeftFolder:
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "target_modules": [layer.name for layer in layers],
    }
    return PeftFolder(
        name=lora.name,
        layers=layers,
        other_tensors={},
        files=lora.files,
        order=lora.order,
        config=config,
    )
