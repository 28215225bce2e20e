"""Convert the keys of a single file to another format."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple, get_args

from matryoshka_lora.errors import MatryoshkaError, check_choice
from matryoshka_lora.formats import KeyFormat
from matryoshka_lora.lora_file.diffusers_metadata import CONFIGS_KEY
from matryoshka_lora.lora_file.keys.modules import Model, Module
from matryoshka_lora.lora_file.keys.names import (
    DIFFUSERS_SUFFIXES,
    KOHYA_SUFFIXES,
    ORIGINAL_PART,
    PEFT_PREFIX,
    FactorSuffixes,
    split_part,
)
from matryoshka_lora.lora_file.keys.naming import (
    Naming,
    Slot,
    choose_model,
    diffusers_naming,
    find_models,
    find_slots,
    kohya_naming,
)
from matryoshka_lora.lora_file.keys.parts import Piece, fuse_pieces, split_piece, swap_halves
from matryoshka_lora.lora_file.lora import Layer
from matryoshka_lora.lora_file.peft_folder import PeftFolder
from matryoshka_lora.lora_file.single_file import SingleFile

# The prefix of kohya's keys by the part of the pipeline, for models whose names are not known.
_KOHYA_PREFIXES = {
    "unet": "lora_unet",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
    ORIGINAL_PART: "lora_unet",
}


class KeyStyle(NamedTuple):
    """The keys of a layer, apart from its name.

    Attributes:
        suffixes: What follows the name.
        has_alpha: Whether the layer has an alpha tensor.
        prefix: What precedes the name.
    """

    suffixes: FactorSuffixes
    has_alpha: bool
    prefix: str = ""

    def apply(self, layer: Layer, name: str) -> Layer:
        """Return a layer with another name and the keys of this style."""
        return replace(
            layer,
            name=name,
            key_A=f"{self.prefix}{name}{self.suffixes.A}",
            key_B=f"{self.prefix}{name}{self.suffixes.B}",
            key_alpha=f"{name}.alpha" if self.has_alpha else None,
        )


_STYLES: dict[KeyFormat, KeyStyle] = {
    "kohya": KeyStyle(KOHYA_SUFFIXES, has_alpha=True),
    "diffusers": KeyStyle(DIFFUSERS_SUFFIXES, has_alpha=False),
    "peft": KeyStyle(DIFFUSERS_SUFFIXES, has_alpha=False, prefix=PEFT_PREFIX),
}


def convert_keys(lora: SingleFile, key_format: KeyFormat) -> SingleFile | PeftFolder:
    """Return a LoRA with the keys of another format. The updates stay the same.

    The names of the modules are converted where the model is known, see `models.MODELS`. A
    layer of a module that is several modules in the other format is split, and several layers are
    put together where they are one module. That is exact, but may change their ranks.

    Args:
        lora: The file. If its model is not known, its keys must hold the names of the modules, with
            dots.
        key_format: ``"kohya"``: ``lora_unet_NAME.lora_down.weight`` and an alpha, with underscores
            for the dots of the name, as kohya's scripts and ComfyUI name the module.
            ``"diffusers"``: ``unet.NAME.lora_A.weight``, or ``transformer.``, as diffusers names
            it. ``"peft"``: a folder with ``base_model.model.NAME.lora_A.weight`` and the same name.

    Raises:
        MatryoshkaError: The file has tensors that cannot be renamed, or the format has no name for
            a layer.
    """
    check_choice("key_format", key_format, get_args(KeyFormat))
    _check_other_tensors(lora)
    layers = _rename_known_model(lora, key_format)
    if layers is None:
        layers = _rename_unknown_model(lora, key_format)
    if key_format == "peft":
        return _to_peft_folder(lora, layers)
    return with_layers(lora, layers)


def has_key_format(lora: SingleFile, key_format: KeyFormat) -> bool:
    """Return whether a file has the keys of a format already."""
    return convert_keys(lora, key_format).layers == lora.layers


def with_layers(lora: SingleFile, layers: tuple[Layer, ...]) -> SingleFile:
    """Return a file with renamed layers."""
    metadata = dict(lora.metadata)
    if any(layer.key_alpha for layer in lora.layers):
        # The scale was in the alphas, which all programs read, and not in diffusers' metadata.
        metadata.pop(CONFIGS_KEY, None)
    return replace(lora, layers=layers, metadata=metadata)


def rename_layers(
    lora: SingleFile, model: Model, naming: Naming, style: KeyStyle
) -> tuple[Layer, ...]:
    """Return the layers of a file under other names, split and put together where that is needed.

    Args:
        lora: The file.
        model: Its model.
        naming: The names of the output.
        style: The keys of the output.

    Raises:
        MatryoshkaError: A layer cannot be named, or two layers are for the same module.
    """
    slots = find_slots([layer.name for layer in lora.layers], model)
    pieces: dict[str, list[Piece]] = {}
    modules: dict[str, Module] = {}
    for layer in lora.layers:
        if layer.name not in slots:
            raise MatryoshkaError(
                f"{layer.name:.200} cannot be renamed, because {model.name} has no module of this "
                "name. Keep the keys as they are."
            )
        slot = slots[layer.name]
        for piece, name in _renamed_pieces(layer, slot, naming):
            pieces.setdefault(name, []).append(piece)
            modules[name] = slot.module
    layers: list[Layer] = []
    for name, parts in sorted(pieces.items()):
        _check_no_part_twice(parts, name)
        layer = parts[0].layer
        if naming.names == "authors" and len(parts[0].parts) < len(modules[name].diffusers):
            layer = fuse_pieces(parts, modules[name])
        layers.append(style.apply(layer, name))
    return tuple(layers)


def _renamed_pieces(layer: Layer, slot: Slot, naming: Naming) -> list[tuple[Piece, str]]:
    """Return a layer, or the layers of its parts, with the name in another format."""
    changes_names = slot.names is not None and slot.names != naming.names
    has_two_halves = layer.B.shape[0] == 2 * layer.A.shape[1]
    if slot.module.swaps_halves and changes_names and has_two_halves:
        layer = swap_halves(layer)
    piece = Piece(layer, slot.parts)
    names = naming.targets(slot)
    if len(names) == 1:
        (name,) = names.values()
        return [(piece, name)]
    return [(part, names[part.parts]) for part in split_piece(piece, slot.module)]


def _check_no_part_twice(pieces: Sequence[Piece], name: str) -> None:
    parts = [part for piece in pieces for part in piece.parts]
    if len(set(parts)) < len(parts):
        raise MatryoshkaError(
            f"{pieces[0].layer.name:.120} and {pieces[-1].layer.name:.120} are for one module, "
            f"{name:.120}. Remove one of them from the file."
        )


def _rename_known_model(lora: SingleFile, key_format: KeyFormat) -> tuple[Layer, ...] | None:
    """Return the layers in a format; None if the model is not known."""
    models = find_models([layer.name for layer in lora.layers])
    if not models:
        return None
    if key_format == "kohya":
        namings = [kohya_naming(model) for model in models]
    else:
        namings = [diffusers_naming(model) for model in models]
    index = choose_model(models, lora.layers, namings, lora.name)
    model, naming = models[index], namings[index]
    if key_format == "peft":
        slots = find_slots([layer.name for layer in lora.layers], model)
        parts = {slot.part for slot in slots.values()}
        _check_one_part(lora, parts)
        naming = naming._replace(prefixes=dict.fromkeys(parts, ""))
    return rename_layers(lora, model, naming, _STYLES[key_format])


def _check_one_part(lora: SingleFile, parts: Set[str]) -> None:
    if len(parts) > 1:
        raise MatryoshkaError(
            f"{lora.name} is for several models of a pipeline, and a PEFT folder is for one. Pass "
            "`key_format='diffusers'`."
        )


def _check_other_tensors(lora: SingleFile) -> None:
    if lora.other_tensors:
        key = min(lora.other_tensors)
        raise MatryoshkaError(
            f"{lora.name} contains {key[:80]!r}, which is not a factor and cannot be renamed. "
            "Omit `key_format`."
        )


def _rename_unknown_model(lora: SingleFile, key_format: KeyFormat) -> tuple[Layer, ...]:
    """Return the layers of a file whose keys hold the names of the modules, with dots."""
    _check_names(lora)
    modules = [layer.name.removeprefix(PEFT_PREFIX) for layer in lora.layers]
    parts = {split_part(module)[0] for module in modules}
    if key_format == "peft":
        _check_one_part(lora, parts)
    style = _STYLES[key_format]
    renamed_layers = [
        style.apply(layer, _rename_module(module, key_format, parts))
        for layer, module in zip(lora.layers, modules, strict=True)
    ]
    layers = tuple(sorted(renamed_layers, key=lambda layer: layer.name))
    for layer, next_layer in pairwise(layers):
        if layer.name == next_layer.name:
            raise MatryoshkaError(
                f"{lora.name} has two layers that the {key_format} format names "
                f"{layer.name[:200]!r}, such as a.b_c and a_b.c. Omit `key_format`."
            )
    return layers


def _check_names(lora: SingleFile) -> None:
    for layer in lora.layers:
        # kohya's names have underscores for dots, so the module's name is unknown. Some programs
        # write kohya's suffixes after names with dots.
        has_kohya_suffix = layer.key_A.endswith(KOHYA_SUFFIXES.A) and "." in layer.name
        if not (has_kohya_suffix or layer.key_A.endswith(DIFFUSERS_SUFFIXES.A)):
            raise MatryoshkaError(
                f"{layer.name[:80]} cannot be renamed: it does not hold the name of the module "
                "with its dots, and is not a name of a model that is known. Omit `key_format`."
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
