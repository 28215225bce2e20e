"""The keys of tensors in files: suffixes of factors, prefixes of models, and names of modules.

``models.json`` has the names of the modules of each image or video model whose names are known: the
authors' names in the original checkpoint, which kohya's scripts and ComfyUI use too, and diffusers'
names. ``tools/key_tables.py`` generates it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Literal, NamedTuple

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.registry import KeyFormat


class FactorSuffixes(NamedTuple):
    """The suffixes of the keys of A and B, after the name of a layer."""

    A: str
    B: str


KOHYA_SUFFIXES = FactorSuffixes(".lora_down.weight", ".lora_up.weight")
DIFFUSERS_SUFFIXES = FactorSuffixes(".lora_A.weight", ".lora_B.weight")
ALL_SUFFIXES = (
    KOHYA_SUFFIXES,
    DIFFUSERS_SUFFIXES,
    FactorSuffixes(".lora_A.default.weight", ".lora_B.default.weight"),
    FactorSuffixes(".lora_A", ".lora_B"),
    FactorSuffixes(".down.weight", ".up.weight"),
    FactorSuffixes(".down", ".up"),
)

# LyCORIS and ComfyUI write NAME.diff and NAME.diff_b for the change of a weight and a bias, and
# LyCORIS NAME.w_norm and NAME.b_norm for a norm. Programs add them to the model, multiplied by the
# strength of the LoRA and not by an alpha.
WEIGHT_CHANGE = re.compile(r"(?P<module>.+)\.(?P<kind>diff|diff_b|w_norm|b_norm)")
"""The keys of changes of weights that are not factors."""

CONFIGS_KEY = "lora_adapter_metadata"
"""The key of diffusers' LoraConfigs in the metadata of a file."""

PEFT_PREFIX = "base_model.model."
"""The start of every key that PEFT writes."""

DIFFUSERS_PARTS = frozenset(
    {
        "unet",
        "transformer",
        "transformer_2",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "connectors",
        "text_conditioner",
        "prior",
    }
)
"""The models of diffusers' pipelines that a LoRA may be for. Its keys begin with their names."""

ORIGINAL_PART = "diffusion_model"
"""The start of keys that name modules as the authors of an image model do."""


def split_part(module: str) -> tuple[str, str]:
    """Split a module's name into the part of the pipeline and the name inside that part.

    The part is empty if the name has none.
    """
    part, _, name = module.partition(".")
    if name and (part in DIFFUSERS_PARTS or part == ORIGINAL_PART):
        return part, name
    return "", module


ModuleNames = Literal["authors", "diffusers"]
"""The naming convention for the modules of a model."""

# The prefixes of the names of layers that are not for a text encoder. The first match counts.
_IMAGE_PREFIXES = (
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
_SECOND_TRANSFORMER = "transformer_2"
_AUTHORS_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_TEXT_ENCODER_PREFIXES = {
    f"{part}.": part for part in ("text_encoder", "text_encoder_2", "text_encoder_3")
}
_TEXT_ENCODER = re.compile(r"lora_te\d?_|text_encoders?[_.]")
# The names of all known modules are shorter. Longer ones may hold numbers of thousands of digits.
_MAX_NAME_LENGTH = 200
# Widths are rounded to multiples, such as 256.
_RATIO_TOLERANCE = 0.05
# OmniGen2 and Lumina Image 2 differ by 2 %.
_CLOSE_RATIO_TOLERANCE = 0.01
# Old names of diffusers: attn1.processor.to_q_lora, mlp.fc1.lora_linear_layer.
_OLD_ENDINGS = re.compile(r"_processor(?=_)|_lora(_linear_layer)?$")
_OLD_CLIP_PROJECTION = re.compile(r"(?<=_self_attn_)to_(q|k|v|out)(_0)?$")


@dataclass(frozen=True)
class Module:
    """A module of a model that a LoRA can target. ``{}`` in a name is the index of a block.

    A fused module is one module in the original checkpoint and several in diffusers, its splits:
    its weight is their weights, concatenated along dim 0.

    Attributes:
        authors: Its name in the original checkpoint.
        diffusers: Its name in diffusers; of a fused module, the names of its splits in order.
        sizes: The number of rows of each split, in multiples of the number of inputs.
        ratios: Of a module that is not fused, the possible numbers of rows in multiples of the
            number of inputs. Empty if they differ between the versions of the model.
        swapped_ratio: A weight with this number of rows, in multiples of the number of inputs, has
            its halves in the other order in diffusers, such as shift and scale. 0 for none.
        num_blocks: The number of blocks in the largest version of the model.
    """

    authors: str
    diffusers: tuple[str, ...]
    sizes: tuple[float, ...] = (1,)
    ratios: tuple[float, ...] = ()
    swapped_ratio: float = 0
    num_blocks: int = 1


class Alias(NamedTuple):
    """Another name of a module, or of some splits of a fused module. It is read, but not written.

    Attributes:
        name: The name, with ``{}`` for the index of a block.
        authors: The authors' name of the module.
        splits: The splits, as positions in `Module.diffusers`.
    """

    name: str
    authors: str
    splits: tuple[int, ...]


class TargetModule(NamedTuple):
    """The module that a layer targets, from the layer's name.

    Attributes:
        module: The module.
        splits: The splits that the layer has the rows of, as positions in `Module.diffusers`.
        names: The naming convention, or None if both conventions have the same name.
        prefix: The layer's name up to the name of the module.
        part: The part of a diffusers pipeline.
        block: The index of the block, or "".
    """

    module: Module
    splits: tuple[int, ...]
    names: ModuleNames | None
    prefix: str = ""
    part: str = ""
    block: str = ""


@dataclass(frozen=True, eq=False)
class Model:
    """A model whose names are known.

    Attributes:
        name: Its name, for messages.
        part: The part of a diffusers pipeline that it is, ``"unet"`` or ``"transformer"``.
        text_encoders: The part of a text encoder by kohya's and ComfyUI's prefixes.
        widths: Numbers of inputs in its blocks, which tell it from models with the same names.
        modules: Its modules.
        text_encoder_modules: The modules of the text encoders.
        aliases: Further names of its modules.
        kohya_names: The naming convention of kohya's scripts, or None if there is no such format.
    """

    name: str
    part: str
    text_encoders: Mapping[str, str]
    widths: frozenset[int]
    modules: tuple[Module, ...]
    text_encoder_modules: tuple[Module, ...]
    aliases: tuple[Alias, ...] = ()
    kohya_names: ModuleNames | None = "authors"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a pipeline that have its modules: Wan 2.2 has two transformers."""
        return (self.part, _SECOND_TRANSFORMER) if self.part == "transformer" else (self.part,)

    @cached_property
    def targets(self) -> dict[str, TargetModule]:
        """The modules by their names, with underscores for dots and ``{}`` for the index."""
        targets = _targets_by_name(self.modules)
        modules = {module.authors: module for module in self.modules}
        for alias in self.aliases:
            target = TargetModule(modules[alias.authors], alias.splits, "authors")
            targets[alias.name.replace(".", "_")] = target
        return targets

    @cached_property
    def text_encoder_targets(self) -> dict[str, TargetModule]:
        """The modules of the text encoders by their names, as in `targets`."""
        return _targets_by_name(self.text_encoder_modules)


def _targets_by_name(modules: Iterable[Module]) -> dict[str, TargetModule]:
    targets: dict[str, TargetModule] = {}
    for module in modules:
        names: ModuleNames | None = None
        if module.diffusers != (module.authors,):
            names = "authors"
            for split, name in enumerate(module.diffusers):
                targets[name.replace(".", "_")] = TargetModule(module, (split,), "diffusers")
        splits = tuple(range(len(module.diffusers)))
        targets[module.authors.replace(".", "_")] = TargetModule(module, splits, names)
    return targets


@cache
def load_models() -> tuple[Model, ...]:
    """Return the models of ``models.json``."""
    tables = json.loads(files(__package__).joinpath("models.json").read_text("utf-8"))
    text_encoder_modules = _load_modules(tables["text_encoder_modules"])
    models: list[Model] = []
    for entry in tables["models"]:
        aliases = [
            Alias(alias["name"], alias["authors"], tuple(alias["splits"]))
            for alias in entry["aliases"]
        ]
        model = Model(
            name=entry["name"],
            part=entry["part"],
            text_encoders=entry["text_encoders"],
            widths=frozenset(entry["widths"]),
            modules=_load_modules(entry["modules"]),
            text_encoder_modules=text_encoder_modules,
            aliases=tuple(aliases),
            kohya_names=entry["kohya_names"],
        )
        models.append(model)
    return tuple(models)


def _load_modules(entries: Iterable[Mapping[str, Any]]) -> tuple[Module, ...]:
    modules: list[Module] = []
    for entry in entries:
        module = Module(
            authors=entry["authors"],
            diffusers=tuple(entry.get("diffusers", [entry["authors"]])),
            sizes=tuple(entry.get("sizes", [1])),
            ratios=tuple(entry.get("ratios", [])),
            swapped_ratio=entry.get("swapped_ratio", 0),
            num_blocks=entry.get("num_blocks", 1),
        )
        modules.append(module)
    return tuple(modules)


def is_text_encoder(name: str) -> bool:
    """Return whether a layer is for a text encoder, from its name."""
    return _TEXT_ENCODER.match(name) is not None


def find_models(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> list[Model]:
    """Return the models that have a module for each layer of a file.

    If no model has the text encoders of the file, only its other layers count. Models that fit the
    shapes less well than others are left out: by their ratios, and then by their widths.

    Args:
        names: The names of the layers.
        shapes: The shape of each layer's weight by its name. Models with the same names, such as
            Flux and Flux.2, differ in their ratios of rows to inputs, or in their widths.
    """
    shapes = shapes or {}
    text_names = [name for name in names if is_text_encoder(name)]
    image_names = [name for name in names if not is_text_encoder(name)] or names
    models = [
        model
        for model in load_models()
        if all(has_layer(model, name, shapes.get(name)) for name in image_names)
    ]
    with_text_encoders = [
        model for model in models if all(find_module(name, model) for name in text_names)
    ]
    models = with_text_encoders or models
    with_close_ratios = [
        model
        for model in models
        if all(
            has_layer(model, name, shapes.get(name), _CLOSE_RATIO_TOLERANCE) for name in image_names
        )
    ]
    models = with_close_ratios or models
    return [model for model in models if _has_width(model, shapes)] or models


def _has_width(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a layer in a block of an image model has a width of the model."""
    for name, shape in shapes.items():
        target = None if is_text_encoder(name) else find_module(name, model)
        # Embedders of prompts have the width of a text encoder.
        if target and target.block and shape[1] in model.widths:
            return True
    return False


def has_layer(
    model: Model,
    name: str,
    shape: tuple[int, ...] | None,
    tolerance: float = _RATIO_TOLERANCE,
) -> bool:
    """Return whether a model has a module of this name, and with its ratio of rows to inputs."""
    target = find_module(name, model)
    if target is None or shape is None or len(shape) > 2:
        return target is not None
    module = target.module
    ratio = shape[0] / shape[1]
    expected = module.ratios
    if len(module.sizes) > 1:
        expected = (sum(module.sizes[split] for split in target.splits),)
    return not expected or any(math.isclose(ratio, value, rel_tol=tolerance) for value in expected)


def find_modules(names: Iterable[str], model: Model) -> dict[str, TargetModule]:
    """Return the modules of a model that layers target, by the names of the layers.

    Layers for which the model has no module are left out.
    """
    targets: dict[str, TargetModule] = {}
    for name in names:
        target = find_module(name, model)
        if target is not None:
            targets[name] = target
    return targets


def find_module(name: str, model: Model) -> TargetModule | None:
    """Return the module of a model that a layer targets, or None if the model does not have it.

    Args:
        name: The name of the layer, in any key format.
        model: The model.
    """
    is_for_text = is_text_encoder(name)
    if is_for_text:
        parts = {**model.text_encoders, **_TEXT_ENCODER_PREFIXES}
    else:
        parts = {f"{_SECOND_TRANSFORMER}.": _SECOND_TRANSFORMER}
        parts |= dict.fromkeys(_IMAGE_PREFIXES, model.part)
    prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
    if prefix is None or parts[prefix] not in {*model.parts, *model.text_encoders.values()}:
        return None
    targets = model.text_encoder_targets if is_for_text else model.targets
    for candidate, block in _candidates(name.removeprefix(prefix), is_for_text):
        target = targets.get(candidate)
        if target and (is_for_text or int(block or 0) < target.module.num_blocks):
            return target._replace(prefix=prefix, part=parts[prefix], block=block)
    return None


def _candidates(module_name: str, is_for_text: bool) -> list[tuple[str, str]]:
    """Return the keys of `Model.targets` that a name may have, with the index of the block.

    A number in the name may be the index, or not.
    """
    flat = _OLD_ENDINGS.sub("", module_name.replace(".", "_"))
    if is_for_text:
        flat = _OLD_CLIP_PROJECTION.sub(r"\1_proj", flat)
        if flat.startswith("encoder_layers_"):  # as transformers 5 names them
            flat = f"text_model_{flat}"
    names = [flat]
    if not is_for_text and flat.endswith("_to_out"):  # an old name, except of Flux.2
        names.append(f"{flat}_0")
    candidates: list[tuple[str, str]] = []
    for name in names:
        candidates.append((name, ""))
        if len(name) < _MAX_NAME_LENGTH:
            for number in re.finditer(r"[0-9]+", name):
                before, after = name[: number.start()], name[number.end() :]
                candidates.append((f"{before}{{}}{after}", number[0]))
    return candidates


class LayerNames(NamedTuple):
    """How a file names the layers of a model.

    Attributes:
        prefixes: The prefix of a module's name by the part of a diffusers pipeline.
        names: The naming convention for the modules.
        separator: The separator in the names of modules, a dot or an underscore.
    """

    prefixes: Mapping[str, str]
    names: ModuleNames
    separator: str

    def of(self, target: TargetModule) -> dict[tuple[int, ...], str]:
        """Return the name of the layer of a module.

        A layer of a fused module has several names if the splits have their own: the result has
        the name by the splits that it is for.

        Raises:
            MatryoshkaError: The file cannot name the part of the pipeline.
        """
        if target.part not in self.prefixes:
            name = target.module.diffusers[target.splits[0]].replace("{}", target.block)
            raise MatryoshkaError(
                f"The keys of this format cannot name {target.part}.{name}. Keep the keys as "
                "they are."
            )
        if self.names == "authors":
            every_split = tuple(range(len(target.module.diffusers)))
            module_names = {every_split: target.module.authors}
        else:
            module_names = {(split,): target.module.diffusers[split] for split in target.splits}
        layer_names: dict[tuple[int, ...], str] = {}
        for splits, module_name in module_names.items():
            name = module_name.replace("{}", target.block).replace(".", self.separator)
            layer_names[splits] = self.prefixes[target.part] + name
        return layer_names


def names_in_format(model: Model, key_format: KeyFormat) -> LayerNames:
    """Return how a key format names the layers of a model."""
    if key_format == "kohya":
        if model.kohya_names is None:
            return LayerNames({}, "diffusers", "_")
        prefixes = dict.fromkeys(model.parts, "lora_unet_")
        for prefix, part in model.text_encoders.items():
            if prefix.startswith("lora_te"):
                prefixes.setdefault(part, prefix)
        return LayerNames(prefixes, model.kohya_names, "_")
    parts = [*model.parts, *model.text_encoders.values()]
    if key_format == "peft":
        return LayerNames(dict.fromkeys(parts, ""), "diffusers", ".")
    return LayerNames({part: f"{part}." for part in parts}, "diffusers", ".")


def names_in_file(targets: Mapping[str, TargetModule], model: Model) -> LayerNames:
    """Return how a file names the layers of a model, also layers that it does not have.

    Args:
        targets: The modules by the names of the layers, from `find_modules`.
        model: The model.
    """
    has_dots = any("." in name for name in targets)
    default = names_in_format(model, "diffusers" if has_dots else "kohya")
    prefixes = dict(default.prefixes)
    own_prefixes = {target.part: target.prefix for target in targets.values()}
    if own_prefixes.get(model.part, f"{model.part}.") != f"{model.part}.":
        prefixes.pop(_SECOND_TRANSFORMER, None)  # only diffusers' names tell them apart
    prefixes |= own_prefixes
    image_targets = [target for target in targets.values() if target.part in model.parts]
    names = next((target.names for target in image_targets if target.names), None)
    if names is None and image_targets:
        # All names are common to both, so the prefix decides.
        prefix = image_targets[0].prefix
        if prefix in _AUTHORS_PREFIXES:
            names = "authors"
        elif prefix.startswith("lora_unet_"):
            names = model.kohya_names or "diffusers"
        else:
            names = "diffusers"
    return LayerNames(prefixes, names or default.names, default.separator)


def without_lora(name: str) -> str:
    """Return the module of a layer in older keys.

    There, as in NAME.lora.down.weight, the alpha and the magnitude follow NAME directly.
    """
    return re.sub(r"[._]lora(_linear_layer)?$", "", name)


def module_names(layer_name: str) -> set[str]:
    """Return the names of a layer's module: its own, and in older keys without ``.lora``."""
    return {layer_name, without_lora(layer_name)}
