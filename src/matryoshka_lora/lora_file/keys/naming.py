"""Recognise the model of a single file from the names of its layers, and name them differently."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.lora_file.keys.models import ALIASES, MODELS, TEXT_ENCODER_MODULES
from matryoshka_lora.lora_file.keys.modules import Model, Module, Names
from matryoshka_lora.lora_file.keys.names import PEFT_PREFIX
from matryoshka_lora.lora_file.lora import Layer

# What precedes the name of a module of the denoiser. The first that fits is taken.
_DENOISER_PREFIXES = (
    "lora_unet__",  # Wan Fun
    "lora_unet_",
    "lora_transformer_",  # OneTrainer
    "lycoris_",  # SimpleTuner
    "model.diffusion_model.",
    "diffusion_model.",
    "unet.",
    "transformer.",
    PEFT_PREFIX,
    "",
)
_AUTHORS_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_TEXT_ENCODER_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_TEXT_ENCODER = re.compile(r"lora_te\d?_|text_encoders?[_.]")
# The names of all known modules are shorter. Longer ones may hold numbers of thousands of digits.
_MAX_NAME_LENGTH = 200
# Old names of diffusers: attn1.processor.to_q_lora, mlp.fc1.lora_linear_layer.
_OLD_PARTS = re.compile(r"_processor(?=_)|_lora(_linear_layer)?$")
_OLD_CLIP_PROJECTION = re.compile(r"(?<=_self_attn_)to_(q|k|v|out)(_0)?$")


class Slot(NamedTuple):
    """The place of a layer in a model.

    Attributes:
        prefix: What precedes the module's name in the file.
        part: The part of a diffusers pipeline.
        module: The module.
        block: The index of its block, or "".
        parts: The parts of the module that the layer changes, as positions in `Module.diffusers`.
        names: Whose name it has, or None if both names are the same.
    """

    prefix: str
    part: str
    module: Module
    block: str
    parts: tuple[int, ...]
    names: Names | None


class Naming(NamedTuple):
    """A way to name the layers of a model.

    Attributes:
        prefixes: What precedes the name of a module, by the part of a diffusers pipeline.
        names: Whose names of the modules.
        separator: What stands for the dots of these names.
    """

    prefixes: Mapping[str, str]
    names: Names
    separator: str

    def targets(self, slot: Slot) -> dict[tuple[int, ...], str]:
        """Return the names that a layer gets, by the parts of the module that each is for.

        Raises:
            MatryoshkaError: The format has no name for it.
        """
        if slot.part not in self.prefixes:
            name = slot.module.diffusers[slot.parts[0]].replace("{}", slot.block)
            raise MatryoshkaError(
                f"The keys of this format cannot name {slot.part}.{name:.200}. Keep the keys as "
                "they are."
            )
        if self.names == "authors":
            every_part = tuple(range(len(slot.module.diffusers)))
            return {every_part: self._name(slot, slot.module.authors)}
        return {(part,): self._name(slot, slot.module.diffusers[part]) for part in slot.parts}

    def _name(self, slot: Slot, module_name: str) -> str:
        name = module_name.replace("{}", slot.block).replace(".", self.separator)
        return f"{self.prefixes[slot.part]}{name}"


class _Match(NamedTuple):
    """The module that a name without prefix and index stands for; see `Slot`."""

    module: Module
    parts: tuple[int, ...]
    names: Names | None


def is_text_encoder(name: str) -> bool:
    """Return whether a layer is for a text encoder, from its name."""
    return _TEXT_ENCODER.match(name) is not None


def find_slots(names: Iterable[str], model: Model) -> dict[str, Slot]:
    """Return the place in a model of each layer that it has, by the name of the layer."""
    slots: dict[str, Slot] = {}
    for name in names:
        slot = _find_slot(name, model)
        if slot is not None:
            slots[name] = slot
    return slots


def find_models(names: Sequence[str]) -> list[Model]:
    """Return the models that the layers of a file fit.

    Of these, only the models that have all text encoders of the file, if there are some.

    Args:
        names: The names of the layers.
    """
    text_names = [name for name in names if is_text_encoder(name)]
    image_names = [name for name in names if not is_text_encoder(name)] or names
    models = [model for model in MODELS if all(_find_slot(name, model) for name in image_names)]
    with_text_encoders = [
        model for model in models if all(_find_slot(name, model) for name in text_names)
    ]
    return with_text_encoders or models


def choose_model(
    models: Sequence[Model], layers: Sequence[Layer], namings: Sequence[Naming], file_name: str
) -> int:
    """Return the index of the model of a file, of those that its layers fit.

    Args:
        models: What `find_models` returned.
        layers: The layers.
        namings: How the layers will be named if they are for each of the models.
        file_name: The path of the file, for messages.

    Raises:
        MatryoshkaError: The new names depend on the model, and it is not clear which it is.
    """
    widths = {layer.A.shape[1] for layer in layers if not is_text_encoder(layer.name)}
    if sum(bool(model.widths & widths) for model in models) == 1:
        return next(index for index, model in enumerate(models) if model.widths & widths)
    if all(model.part == "unet" for model in models) or not widths:
        return 0
    layer_names = [layer.name for layer in layers]
    new_names = []
    for model, naming in zip(models, namings, strict=True):
        slots = find_slots(layer_names, model)
        new_names.append([naming.targets(slot) for slot in slots.values()])
    if all(names == new_names[0] for names in new_names):
        return 0
    raise MatryoshkaError(
        f"The layers of {file_name} exist in several models, {_join(models)}, which have different "
        "names in this format. Keep the keys as they are."
    )


def _join(models: Iterable[Model]) -> str:
    return " and ".join(model.name for model in models)


def kohya_naming(model: Model) -> Naming:
    """Return how kohya's scripts name the layers of a model."""
    prefixes = {model.part: "lora_unet_"}
    for prefix, part in model.text_encoders.items():
        if prefix.startswith("lora_te"):
            prefixes.setdefault(part, prefix)
    return Naming(prefixes, model.kohya_names, "_")


def diffusers_naming(model: Model) -> Naming:
    """Return how diffusers names the layers of a model."""
    parts = {model.part, *model.text_encoders.values()}
    return Naming({part: f"{part}." for part in parts}, "diffusers", ".")


def naming_of(slots: Mapping[str, Slot], model: Model) -> Naming:
    """Return how a file names its layers, and how it would name those that it does not have.

    Args:
        slots: The places of its layers, from `find_slots`.
        model: The model.
    """
    has_dots = any("." in name for name in slots)
    default = diffusers_naming(model) if has_dots else kohya_naming(model)
    prefixes = {slot.part: slot.prefix for slot in slots.values()}
    image_slots = [slot for slot in slots.values() if slot.part == model.part]
    names = next((slot.names for slot in image_slots if slot.names), None)
    if names is None and image_slots:
        names = _usual_names(image_slots[0].prefix, model)
    return Naming({**default.prefixes, **prefixes}, names or default.names, default.separator)


def _usual_names(prefix: str, model: Model) -> Names:
    """Return whose names usually follow a prefix."""
    if prefix in _AUTHORS_PREFIXES:
        return "authors"
    if prefix.startswith("lora_unet_"):
        return model.kohya_names
    return "diffusers"


def _find_slot(name: str, model: Model) -> Slot | None:
    if is_text_encoder(name):
        return _find_text_encoder_slot(name, model)
    prefix = next(prefix for prefix in _DENOISER_PREFIXES if name.startswith(prefix))
    flat = _OLD_PARTS.sub("", name.removeprefix(prefix).replace(".", "_"))
    if flat.endswith("_to_out"):
        flat += "_0"
    for pattern, index in _patterns(flat):
        match = _denoiser_matches(model).get(pattern)
        if match and int(index or 0) < match.module.num_blocks:
            return Slot(prefix, model.part, match.module, index, match.parts, match.names)
    return None


def _find_text_encoder_slot(name: str, model: Model) -> Slot | None:
    parts = {f"{part}.": part for part in _TEXT_ENCODER_PARTS}
    parts = {**model.text_encoders, **parts}
    prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
    if prefix is None or parts[prefix] not in model.text_encoders.values():
        return None
    flat = _OLD_PARTS.sub("", name.removeprefix(prefix).replace(".", "_"))
    flat = _OLD_CLIP_PROJECTION.sub(r"\1_proj", flat)
    if flat.startswith("encoder_layers_"):  # as transformers 5 names them
        flat = f"text_model_{flat}"
    for pattern, index in _patterns(flat):
        match = _text_encoder_matches().get(pattern)
        if match:
            return Slot(prefix, parts[prefix], match.module, index, match.parts, match.names)
    return None


def _patterns(flat: str) -> list[tuple[str, str]]:
    """Return a name without any index, and with ``{}`` for each of its numbers and that number."""
    patterns = [(flat, "")]
    if len(flat) < _MAX_NAME_LENGTH:
        for number in re.finditer(r"[0-9]+", flat):
            patterns.append((f"{flat[: number.start()]}{{}}{flat[number.end() :]}", number[0]))
    return patterns


@cache
def _denoiser_matches(model: Model) -> dict[str, _Match]:
    return _build_matches(model.modules)


@cache
def _text_encoder_matches() -> dict[str, _Match]:
    return _build_matches(TEXT_ENCODER_MODULES)


def _build_matches(modules: Iterable[Module]) -> dict[str, _Match]:
    """Return what each name stands for, with underscores for dots and ``{}`` for the index."""
    matches: dict[str, _Match] = {}
    modules_by_name: dict[str, Module] = {}
    for module in modules:
        modules_by_name[module.authors] = module
        all_parts = tuple(range(len(module.diffusers)))
        names: Names | None = None
        if module.diffusers != (module.authors,):
            names = "authors"
            for part, name in enumerate(module.diffusers):
                matches[_flatten(name)] = _Match(module, (part,), "diffusers")
        matches[_flatten(module.authors)] = _Match(module, all_parts, names)
    for alias in ALIASES:
        if alias.authors in modules_by_name:
            module = modules_by_name[alias.authors]
            matches[_flatten(alias.name)] = _Match(module, alias.parts, "authors")
    return matches


def _flatten(name: str) -> str:
    return name.replace(".", "_")
