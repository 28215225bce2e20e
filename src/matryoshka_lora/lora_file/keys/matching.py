"""Give single files the same key format, so that their layers can be added by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.linalg.arrays import Array
from matryoshka_lora.linalg.factors import rescale_factors
from matryoshka_lora.lora_file.keys.formats import KeyStyle, rename_layers, with_layers
from matryoshka_lora.lora_file.keys.modules import Model
from matryoshka_lora.lora_file.keys.names import DIFFUSERS_SUFFIXES, FactorSuffixes
from matryoshka_lora.lora_file.keys.naming import (
    Naming,
    Slot,
    choose_model,
    diffusers_naming,
    find_models,
    find_slots,
    is_text_encoder,
    naming_of,
)
from matryoshka_lora.lora_file.lora import Layer
from matryoshka_lora.lora_file.single_file import SingleFile

# Optional parts of the names of models that are not known: kohya's prefixes, and a level of CLIP.
_OPTIONAL_NAME_PARTS = re.compile(r"^lora_(te1?_)?|^text_encoder_(?!\d)|text_model_")
# Image models have two naming schemes, that of their authors and that of diffusers.
_AUTHORS_BLOCKS = "input_blocks|middle_block|output_blocks|double_blocks|single_blocks|joint_blocks"
_DIFFUSERS_BLOCKS = "down_blocks|mid_block|up_blocks|single_transformer_blocks|transformer_blocks"
_BLOCK = re.compile(rf"(?P<prefix>\D*?)({_AUTHORS_BLOCKS}|(?P<diffusers>{_DIFFUSERS_BLOCKS})|\d)")


def match_key_formats(loras: Sequence[SingleFile]) -> list[SingleFile]:
    """Return files whose layers have the same names if they are for the same modules.

    All get the keys of the first one, if they differ. If the keys of the first one are old ones
    that are not written, all get those of diffusers.

    Raises:
        MatryoshkaError: The files are for different models, or have different key formats and are
            for a model whose names are not known.
    """
    first = loras[0]
    models_by_file = [find_models(_layer_names(lora)) for lora in loras]
    for lora, models in zip(loras, models_by_file, strict=True):
        if models and models_by_file[0] and not set(models) & set(models_by_file[0]):
            raise MatryoshkaError(
                f"{lora.name} and {first.name} are for different models: {models[0].name}, and "
                f"{models_by_file[0][0].name}. Pass LoRAs of one base model."
            )
    common = [
        model for model in models_by_file[0] if all(model in models for models in models_by_file)
    ]
    if not common:
        for lora in loras[1:]:
            _check_layer_names(first, lora)
        return list(loras)
    namings = [naming_of(find_slots(_layer_names(first), model), model) for model in common]
    layers = [layer for lora in loras for layer in lora.layers]
    index = choose_model(common, layers, namings, " and ".join(lora.name for lora in loras))
    model, naming = common[index], namings[index]
    if _have_same_names(loras, model, naming):
        return list(loras)
    style = _style_of(first)
    if not _is_written(find_slots(_layer_names(first), model), naming):
        naming, style = diffusers_naming(model), KeyStyle(DIFFUSERS_SUFFIXES, has_alpha=False)
    return [_rename(lora, model, naming, style) for lora in loras]


def _rename(lora: SingleFile, model: Model, naming: Naming, style: KeyStyle) -> SingleFile:
    layers = rename_layers(lora, model, naming, style)
    if not style.has_alpha and any(layer.key_alpha for layer in lora.layers):
        # All programs read alphas, but some ignore the scales in diffusers' metadata.
        layers = tuple(_with_scale_in_factors(layer) for layer in layers)
    return with_layers(lora, layers)


def _with_scale_in_factors(layer: Layer) -> Layer:
    """Return a layer of the scale 1 with the same update."""

    def read(index: int) -> Array:
        return rescale_factors(layer.A.read(), layer.B.read(), layer.scale)[index]

    A = replace(layer.A, read=lambda: read(0))
    B = replace(layer.B, read=lambda: read(1))
    return replace(layer.with_factors(A, B), scale=1.0)


def _layer_names(lora: SingleFile) -> list[str]:
    return [layer.name for layer in lora.layers]


def _style_of(lora: SingleFile) -> KeyStyle:
    """Return the keys of the layers of a file, apart from their names."""
    layer = lora.layers[0]
    suffixes = FactorSuffixes(
        layer.key_A.removeprefix(layer.name), layer.key_B.removeprefix(layer.name)
    )
    return KeyStyle(suffixes, has_alpha=layer.key_alpha is not None)


def _is_written(slots: Mapping[str, Slot], naming: Naming) -> bool:
    """Return whether a naming gives each layer the name that it has."""
    return all(set(naming.targets(slot).values()) == {name} for name, slot in slots.items())


def _have_same_names(loras: Sequence[SingleFile], model: Model, naming: Naming) -> bool:
    """Return whether several files name the modules in the same way.

    Args:
        loras: The files.
        model: Their model.
        naming: The naming of the first one.
    """
    slots_by_file = [find_slots(_layer_names(lora), model) for lora in loras]
    if _is_written(slots_by_file[0], naming):
        return all(_is_written(slots, naming) for slots in slots_by_file)
    names_by_file = [_names_by_module(slots) for slots in slots_by_file]
    first = names_by_file[0]
    for names in names_by_file[1:]:
        shared = names.keys() & first.keys()
        if not shared or any(names[module] != first[module] for module in shared):
            return False
    return True


def _names_by_module(slots: Mapping[str, Slot]) -> dict[tuple[str, str, str], set[str]]:
    """Return the names of the layers of each module."""
    names: dict[tuple[str, str, str], set[str]] = {}
    for name, slot in slots.items():
        names.setdefault((slot.part, slot.module.authors, slot.block), set()).add(name)
    return names


def _check_layer_names(first: SingleFile, lora: SingleFile) -> None:
    """Raise MatryoshkaError unless two files name their layers in the same way."""
    first_names = {_canonical_name(name): name for name in _layer_names(first)}
    names = {_canonical_name(name): name for name in _layer_names(lora)}
    shared = names.keys() & first_names.keys()
    respelled = sorted(name for name in shared if names[name] != first_names[name])
    formats, first_formats = _key_formats(lora), _key_formats(first)
    has_two_formats = formats and first_formats and not formats.keys() & first_formats.keys()
    if shared and not respelled and not has_two_formats:
        return
    if respelled:
        examples = names[respelled[0]], first_names[respelled[0]]
    elif has_two_formats:
        examples = min(formats.values()), min(first_formats.values())
    else:
        examples = min(names.values()), min(first_names.values())
    raise MatryoshkaError(
        f"{lora.name} and {first.name} are for different models, or have different key formats: "
        f"{examples[0]!r:.80} and {examples[1]!r:.80}. Convert the one whose keys end in "
        "lora_A.weight to the format of the other: export it with `key_format`."
    )


def _canonical_name(name: str) -> str:
    return _OPTIONAL_NAME_PARTS.sub("", name.replace(".", "_"))


def _key_formats(lora: SingleFile) -> dict[tuple[str, bool], str]:
    """Return the key formats of the image model's blocks, and a layer of each.

    A format is what precedes the name of a block, such as ``lora_unet_``, and whether the block has
    the name that diffusers gives it.
    """
    formats: dict[tuple[str, bool], str] = {}
    for layer in lora.layers:
        name = layer.name.replace(".", "_")
        block = _BLOCK.match(name)
        if block and not is_text_encoder(name):
            formats.setdefault((block["prefix"], block["diffusers"] is not None), layer.name)
    return formats
