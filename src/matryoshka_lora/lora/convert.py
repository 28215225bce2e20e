"""Convert the keys of single files to the formats of kohya, diffusers and PEFT.

The names of the modules are converted where the model is known, see `keys.load_models`. A layer of
a fused module is split where the other format has several modules, and layers are fused where it
has one. That is exact, but may change the ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, get_args

import numpy as np

from matryoshka_lora.errors import MatryoshkaError, check_choice, short
from matryoshka_lora.linalg.arrays import Array, Float64Array, common_dtype
from matryoshka_lora.linalg.factors import truncation_errors
from matryoshka_lora.lora.contents import modules_by_kind
from matryoshka_lora.lora.keys import (
    CONFIGS_KEY,
    DIFFUSERS_SUFFIXES,
    KOHYA_SUFFIXES,
    ORIGINAL_PART,
    PEFT_PREFIX,
    WEIGHT_CHANGE,
    FactorSuffixes,
    LayerNames,
    Model,
    Module,
    TargetModule,
    find_models,
    find_module,
    find_modules,
    has_layer,
    is_text_encoder,
    load_models,
    names_in_file,
    names_in_format,
    split_part,
)
from matryoshka_lora.lora.layer import Factors, Layer, LayerKeys, StoredTensor
from matryoshka_lora.registry import KeyFormat
from matryoshka_lora.units import pluralize

if TYPE_CHECKING:
    from matryoshka_lora.lora.lora import Lora

# The kohya key prefix of each pipeline component, for models without a key table.
_KOHYA_PREFIXES = {
    "unet": "lora_unet",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
    ORIGINAL_PART: "lora_unet",
}
# The part of a pipeline that a model of diffusers is, by the name of its blocks.
_PARTS = {
    **dict.fromkeys(("down_blocks", "mid_block", "up_blocks"), "unet"),
    **dict.fromkeys(("transformer_blocks", "single_transformer_blocks"), "transformer"),
    **dict.fromkeys(("joint_transformer_blocks", "double_stream_blocks"), "transformer"),
    "single_stream_blocks": "transformer",
}
# Attention of Wan, Z-Image and Lumina 2. Models of other libraries have blocks and layers, too.
_ATTENTION = re.compile(r"blocks\.\d+\.attn[12]\.|layers\.\d+\.(attention|attn)\.to_")
# Optional parts of the names of models that are not known: kohya's prefixes, and a level of CLIP.
_OPTIONAL_NAME_PARTS = re.compile(r"^lora_(te1?_)?|^text_encoder_(?!\d)|text_model_")
# The names of blocks for a model's authors, and in diffusers.
_AUTHORS_BLOCKS = "input_blocks|middle_block|output_blocks|double_blocks|single_blocks|joint_blocks"
_DIFFUSERS_BLOCKS = "down_blocks|mid_block|up_blocks|single_transformer_blocks|transformer_blocks"
_BLOCK = re.compile(rf"(?P<prefix>\D*?)({_AUTHORS_BLOCKS}|(?P<diffusers>{_DIFFUSERS_BLOCKS})|\d)")


@dataclass(frozen=True)
class _KeyStyle:
    """The keys of a layer, apart from its name."""

    suffixes: FactorSuffixes
    has_alpha: bool
    prefix: str = ""

    def rename(self, layer: Layer, name: str) -> Layer:
        """Return a layer with another name, and with keys of this style."""
        keys = LayerKeys(
            f"{self.prefix}{name}{self.suffixes.A}",
            f"{self.prefix}{name}{self.suffixes.B}",
            f"{name}.alpha" if self.has_alpha else None,
        )
        return replace(layer, name=name, keys=keys)


_STYLES: dict[KeyFormat, _KeyStyle] = {
    "kohya": _KeyStyle(KOHYA_SUFFIXES, has_alpha=True),
    "diffusers": _KeyStyle(DIFFUSERS_SUFFIXES, has_alpha=False),
    "peft": _KeyStyle(DIFFUSERS_SUFFIXES, has_alpha=False, prefix=PEFT_PREFIX),
}


def convert(lora: Lora, key_format: KeyFormat) -> Lora:
    """Return a LoRA with the keys of another format. The updates and scales stay the same.

    Layers that are split or fused are read now, because their ranks depend on the factors. If there
    are some, the LoRA has no order.

    Args:
        lora: A LoRA of a single file, or of a PEFT folder for an image model. If its model is not
            known, its keys must hold the names of the modules, with dots.
        key_format: ``"kohya"``: ``lora_unet_NAME.lora_down.weight`` and an alpha, with underscores
            for the dots of the name, as kohya's scripts and ComfyUI name the module.
            ``"diffusers"``: ``unet.NAME.lora_A.weight``, or ``transformer.``, as diffusers names
            it. ``"peft"``: a PEFT folder with ``base_model.model.NAME.lora_A.weight`` and the same
            name.

    Raises:
        MatryoshkaError: The LoRA is a PEFT folder for another kind of model, it has tensors that
            cannot be renamed, or the format has no name for a layer.
        NotFiniteError: A factor of a layer that is split or fused is NaN or infinite.
    """
    check_choice("key_format", key_format, get_args(KeyFormat))
    if lora.container == "peft" and key_format != "peft":
        lora = _in_one_file(lora)
    _check_is_single_file(lora)
    if lora.other_tensors:
        kinds = modules_by_kind(lora.other_tensors)
        words = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise MatryoshkaError(
            f"{lora.name} contains tensors that are not factors and cannot be renamed: {words}, "
            f"such as {short(min(lora.other_tensors))}. Omit `key_format`, or leave them out with "
            "`drop`."
        )
    models = _find_models(lora)
    if models:
        candidates = {model: names_in_format(model, key_format) for model in models}
        model = _choose_model(candidates, _layer_names(lora), lora.name)
        names = candidates[model]
        parts = {target.part for target in find_modules(_layer_names(lora), model).values()}
        if len({names.prefixes.get(part, part) for part in parts}) < len(parts):
            _check_one_part(lora, parts)
        layers = _convert_layers(lora, model, names, _STYLES[key_format])
        if layers != lora.layers:
            model_names = " or ".join(model.name for model in models)
            note = f"The output has the layer names of {model_names}."
            lora = replace(lora, notes=(*lora.notes, note))
    else:
        _check_shapes(lora)
        layers = _rename_layers(lora, key_format)
    if key_format == "kohya" and layers != lora.layers:
        # The alphas are new. diffusers needs the same one in all layers, which the format chooses.
        layers = tuple(replace(layer, has_new_factors=True) for layer in layers)
    converted = _with_layers(lora, layers)
    if key_format != "peft":
        return converted
    config = {"peft_type": "LORA", "target_modules": [layer.name for layer in layers]}
    notes = converted.notes
    if set(converted.metadata) - {"format", CONFIGS_KEY}:
        notes += ("A PEFT folder has no place for the metadata of the file, such as its title.",)
    return replace(converted, container="peft", config=config, metadata={}, notes=notes)


def _check_shapes(lora: Lora) -> None:
    """Raise MatryoshkaError if a model has the names of all layers, but other shapes."""
    for model in find_models(_layer_names(lora)):
        for layer in lora.layers:
            if not has_layer(model, layer.name, lora.weight_shapes[layer.name]):
                raise MatryoshkaError(
                    f"{lora.name} has the names of {model.name}, but not its shapes: "
                    f"{short(layer.name)} has {layer.out_features} rows for {layer.in_shape[0]} "
                    "inputs. It belongs to a model that cannot be converted. Omit `key_format`."
                )


def part_of_pipeline(lora: Lora) -> str | None:
    """Return the part of a pipeline that a PEFT folder is for, or None for another kind of model.

    It is ``"unet"`` or ``"transformer"``.
    """
    if lora.container != "peft":
        return None
    names = [layer.name for layer in lora.layers]
    parts = {_PARTS.get(name.partition(".")[0]) for name in names}
    if any(_ATTENTION.match(name) for name in names):
        parts.add("transformer")
    parts.discard(None)  # a projection before the blocks may have any name
    return parts.pop() if len(parts) == 1 else None


def pipeline_key_format(lora: Lora) -> KeyFormat | None:
    """Return the key format in which diffusers and ComfyUI load a LoRA of a PEFT folder, or None.

    ComfyUI reads U-Nets with kohya's names, and some transformers with the names of diffusers.
    """
    formats: dict[str | None, KeyFormat] = {"unet": "kohya", "transformer": "diffusers"}
    return formats.get(part_of_pipeline(lora))


def _in_one_file(lora: Lora) -> Lora:
    """Return a LoRA of a PEFT folder as a file with the keys of diffusers.

    Raises:
        MatryoshkaError: It is not clear which part of a pipeline its layers are in.
    """
    part = part_of_pipeline(lora)
    if part is None:
        raise MatryoshkaError(
            f"{lora.name} is no adapter of an image model of diffusers: it has layers such as "
            f"{short(lora.layers[0].name)}. Export it as a folder: a path "
            "without .safetensors, and no `key_format`."
        )
    style = _STYLES["diffusers"]
    layers = tuple(style.rename(layer, f"{part}.{layer.name}") for layer in lora.layers)
    return replace(lora, layers=layers, container="single", config={}, metadata={"format": "pt"})


def match_key_formats(loras: Sequence[Lora]) -> list[Lora]:
    """Return LoRAs of single files that have the same names for the same modules.

    If the key formats differ, all get the keys of the first one. If the first one has an old format
    that is not written, all get the keys of diffusers.

    Raises:
        MatryoshkaError: A LoRA is a PEFT folder, or has a tensor that cannot be renamed. Or the
            LoRAs are for different models, or have different key formats for an unknown model.
        NotFiniteError: A factor of a layer that is split or fused is NaN or infinite.
    """
    for lora in loras:
        _check_is_single_file(lora)
    first = loras[0]
    models_by_lora = [_find_models(lora) for lora in loras]
    first_models = models_by_lora[0]
    for lora, models in zip(loras, models_by_lora, strict=True):
        if models and first_models and not set(models) & set(first_models):
            raise MatryoshkaError(
                f"{lora.name} and {first.name} are for different models: {models[0].name}, and "
                f"{first_models[0].name}. Pass LoRAs of one base model."
            )
    common = [model for model in first_models if all(model in models for models in models_by_lora)]
    if not common:
        for lora in loras[1:]:
            _check_same_names(first, lora)
        return list(loras)

    candidates = {
        model: names_in_file(find_modules(_layer_names(first), model), model) for model in common
    }
    layer_names = [name for lora in loras for name in _layer_names(lora)]
    model = _choose_model(candidates, layer_names, " and ".join(lora.name for lora in loras))
    names = candidates[model]
    targets_by_lora = [find_modules(_layer_names(lora), model) for lora in loras]
    if _have_same_names(targets_by_lora, names):
        return list(loras)
    layer = first.layers[0]
    suffixes = FactorSuffixes(
        layer.keys.A.removeprefix(layer.name), layer.keys.B.removeprefix(layer.name)
    )
    style = _KeyStyle(suffixes, has_alpha=layer.keys.alpha is not None)
    if not _are_written(targets_by_lora[0], names):
        names, style = names_in_format(model, "diffusers"), _STYLES["diffusers"]
    matched: list[Lora] = []
    for lora, targets in zip(loras, targets_by_lora, strict=True):
        if not _are_written(targets, names):
            lora = _rename_weight_changes(lora, model, names)
        new_layers = _convert_layers(lora, model, names, style)
        if not style.has_alpha and any(layer.keys.alpha for layer in lora.layers):
            # All programs read alphas, but some ignore the scales in diffusers' metadata.
            new_layers = tuple(layer.with_scale(1.0) for layer in new_layers)
        matched.append(_with_layers(lora, new_layers))
    return matched


def _rename_weight_changes(lora: Lora, model: Model, names: LayerNames) -> Lora:
    """Return a LoRA with other names of the changes of weights that are not factors.

    Raises:
        MatryoshkaError: The model has no module of a name, or the change is for a part of a module
            that has another form with these names.
    """
    renamed: dict[str, StoredTensor] = {}
    for key, tensor in lora.other_tensors.items():
        match = WEIGHT_CHANGE.fullmatch(key)
        target = find_module(match["module"], model) if match else None
        name = names.of(target).get(target.splits) if target else None
        has_other_rows = target and target.module.swapped_ratio and target.names != names.names
        if match is None or name is None or has_other_rows or f"{name}.{match['kind']}" in renamed:
            raise MatryoshkaError(
                f"{lora.name}: {short(key)} cannot be renamed to the key format of the first LoRA. "
                "Pass LoRAs in one key format, or remove this tensor from its file."
            )
        renamed[f"{name}.{match['kind']}"] = tensor
    return replace(lora, other_tensors=renamed)


def _layer_names(lora: Lora) -> list[str]:
    return [layer.name for layer in lora.layers]


def _find_models(lora: Lora) -> list[Model]:
    """Return the models that a LoRA may be for, by the names and the shapes of its layers."""
    return find_models(_layer_names(lora), lora.weight_shapes)


def _check_is_single_file(lora: Lora) -> None:
    if lora.container != "single":
        raise MatryoshkaError(
            f"{lora.name} is a PEFT folder; only single files have a key format. Omit `key_format`."
        )


def _check_one_part(lora: Lora, parts: Set[str]) -> None:
    if len(parts) > 1:
        raise MatryoshkaError(
            f"{lora.name} is for several models of a pipeline, {' and '.join(sorted(parts))}, and "
            "this format has the same names for them. Pass `key_format='diffusers'`, or leave out "
            "the layers of the others with `drop`."
        )


def _with_layers(lora: Lora, layers: tuple[Layer, ...]) -> Lora:
    """Return a LoRA with renamed, split or fused layers."""
    metadata = dict(lora.metadata)
    if any(layer.keys.alpha for layer in lora.layers):
        # The scale was in the alphas, which all programs read, and not in diffusers' metadata.
        metadata.pop(CONFIGS_KEY, None)
    factors = {layer.read for layer in lora.layers}
    is_renamed_only = all(layer.read in factors for layer in layers)
    order = lora.order if is_renamed_only else None
    return replace(lora, layers=layers, metadata=metadata, order=order)


def _choose_model(
    candidates: Mapping[Model, LayerNames], names: Sequence[str], lora_name: str
) -> Model:
    """Return the model that layers are for.

    Args:
        candidates: The models that `find_models` returned, and how the layers will be named if they
            are for that model.
        names: The names of the layers.
        lora_name: The path of the LoRA, for messages.

    Raises:
        MatryoshkaError: The new names depend on the model, and it is not clear which one it is.
    """
    models = list(candidates)
    # ComfyUI and diffusers read diffusers' names with underscores for every UNet.
    is_kohya_unet = models[0].part == "unet" and candidates[models[0]].separator == "_"
    if is_kohya_unet or all(is_text_encoder(name) for name in names):
        return models[0]
    new_names: list[list[dict[tuple[int, ...], str]]] = []
    for model, format_names in candidates.items():
        targets = find_modules(names, model).values() if model.part in format_names.prefixes else ()
        new_names.append([format_names.of(target) for target in targets])
    if len(models) == 1 or (new_names[0] and all(other == new_names[0] for other in new_names)):
        return models[0]
    raise MatryoshkaError(
        f"The layers of {lora_name} exist in several models, "
        f"{' and '.join(model.name for model in models)}, which have different names in this "
        "format. Keep the keys as they are."
    )


def _convert_layers(
    lora: Lora, model: Model, names: LayerNames, style: _KeyStyle
) -> tuple[Layer, ...]:
    """Return the layers with other names, split and fused where that is needed.

    Raises:
        MatryoshkaError: A layer cannot be named, or two layers are for the same module.
    """
    by_name: dict[str, list[tuple[Layer, TargetModule]]] = {}
    for layer in lora.layers:
        target = find_module(layer.name, model)
        if target is None:
            raise MatryoshkaError(
                f"{short(layer.name)} cannot be renamed, because {model.name} has no module of "
                "this name. Keep the keys as they are."
            )
        changes_names = target.names is not None and target.names != names.names
        ratio = layer.out_features / layer.in_shape[0]
        if changes_names and math.isclose(ratio, target.module.swapped_ratio, rel_tol=1e-3):
            layer = layer.map(
                lambda factors: factors._replace(B=np.roll(factors.B, len(factors.B) // 2, axis=0))
            )
        new_names = names.of(target)
        if len(new_names) == 1:
            (name,) = new_names.values()
            by_name.setdefault(name, []).append((layer, target))
        else:
            for part, split_target in split_layer(layer, target):
                by_name.setdefault(new_names[split_target.splits], []).append((part, split_target))

    layers: list[Layer] = []
    for name, members in sorted(by_name.items()):
        first, target = members[0]
        splits = [split for _, target in members for split in target.splits]
        if len(set(splits)) < len(splits):
            raise MatryoshkaError(
                f"{short(first.name)} and {short(members[-1][0].name)} are for one module, "
                f"{short(name)}. Remove one of them from the file."
            )
        if names.names == "authors" and len(target.splits) < len(target.module.diffusers):
            first = fuse_layers(members)
        layers.append(style.rename(first, name))
    return tuple(layers)


def split_layer(layer: Layer, target: TargetModule) -> list[tuple[Layer, TargetModule]]:
    """Return a layer for each split of a fused module.

    The update of a split is some rows of the update of the fused layer. So it needs only the
    components whose columns are not zero in its rows of B: a layer that was fused has separate
    components for each split. A split without an update is left out, unless no split has one.

    Args:
        layer: A layer with the rows of several splits. Its factors are read.
        target: Its module and the splits.

    Raises:
        MatryoshkaError: The number of rows does not fit the module.
        NotFiniteError: A factor is NaN or infinite.
    """
    _check_rows(layer, target)
    rows = _rows_of_splits(target.module, target.splits, width=layer.in_shape[0])
    B = layer.read().B
    used = {split: np.flatnonzero((B[rows[split]] != 0).any(axis=0)) for split in target.splits}
    changed = [split for split in target.splits if len(used[split])]
    if not changed:
        changed = list(target.splits)
        used = dict.fromkeys(target.splits, np.arange(layer.rank))
    return [
        (
            _take_rows(layer, rows[split], used[split], error_share=1 / len(changed)),
            target._replace(splits=(split,)),
        )
        for split in changed
    ]


def _take_rows(layer: Layer, rows: slice, components: Array, error_share: float) -> Layer:
    """Return a layer with some rows of B, and with some of the components."""
    rank = len(components)

    def cut(factors: Factors) -> Factors:
        A = factors.A if rank == layer.rank else factors.A[components]
        B = factors.B[rows][:, components]
        errors = factors.squared_errors
        if errors is not None:
            # Of a layer that was truncated before, only the error of all splits is known. Equal
            # shares have the right sum, which is the error of the LoRA.
            errors = error_share * np.delete(errors, slice(rank, layer.rank))
        return Factors(A, B, errors)

    return layer.map(cut, rank=rank, out_features=rows.stop - rows.start, kind="LoRA")


def fuse_layers(members: Sequence[tuple[Layer, TargetModule]]) -> Layer:
    """Return a layer of the whole fused module. The update of a split without a layer is zero.

    If all A are the same, the rank stays. Otherwise it is the sum of the ranks: A has all
    components, and B is block-diagonal.

    Args:
        members: Layers of different splits of the same module. Their factors are read.

    Raises:
        MatryoshkaError: The shapes do not fit each other or the module.
        NotFiniteError: A factor is NaN or infinite.
    """
    layers = [layer for layer, _ in members]
    targets = [target for _, target in members]
    first, module = layers[0], targets[0].module
    for layer in layers:
        if layer.in_shape != first.in_shape:
            raise MatryoshkaError(
                f"{short(layer.name)} and {short(first.name)} are parts of one module, but have "
                f"inputs of different widths: {list(layer.shape_A)} and {list(first.shape_A)}. "
                "Save the file again."
            )
    for layer, target in members:
        _check_rows(layer, target)
    width = first.in_shape[0]
    module_rows = _rows_of_splits(module, range(len(module.sizes)), width)
    num_rows = round(sum(module.sizes) * width)
    scale = max(layer.scale for layer in layers)
    first_A = first.read().A
    has_common_A = all(
        layer.rank == first.rank and np.array_equal(layer.read().A, first_A) for layer in layers[1:]
    )
    rank = first.rank if has_common_A else sum(layer.rank for layer in layers)

    def read() -> Factors:
        factors = [layer.read() for layer in layers]
        A = factors[0].A if has_common_A else np.concatenate([matrices.A for matrices in factors])
        B = np.zeros((num_rows, rank))
        start = 0
        for layer, target, matrices in zip(layers, targets, factors, strict=True):
            columns = slice(start, start + layer.rank)
            values = matrices.B.astype(np.float64) * (layer.scale / scale)
            for split, rows in _rows_of_splits(module, target.splits, width).items():
                B[module_rows[split], columns] = values[rows]
            start = start if has_common_A else columns.stop
        return Factors(A, B, _fused_errors(layers, factors, rank))

    return replace(
        first,
        rank=rank,
        scale=scale,
        out_features=num_rows,
        dtype=common_dtype(layer.dtype for layer in layers),
        read=read,
        kind="LoRA",
        read_svd=None,
        has_new_factors=any(layer.has_new_factors for layer in layers),
    )


def _fused_errors(
    layers: Sequence[Layer], factors: Sequence[Factors], rank: int
) -> Float64Array | None:
    """Return the squared errors of a fused layer, if a layer was truncated before.

    The errors of rank 0, the squared norm, and of the largest rank are exact. The ranks between
    them get the error of rank 0.
    """
    if all(matrices.squared_errors is None for matrices in factors):
        return None
    norm = error = 0.0
    for layer, matrices in zip(layers, factors, strict=True):
        squared_errors = matrices.squared_errors
        if squared_errors is None:
            squared_errors = truncation_errors(matrices.A, matrices.B, [layer.scale] * layer.rank)
        norm += squared_errors[0]
        error += squared_errors[layer.rank]
    errors = np.full(rank + 1, norm)
    errors[rank] = error
    return errors


def _check_rows(layer: Layer, target: TargetModule) -> None:
    """Raise MatryoshkaError if a layer is a convolution, or has another number of rows."""
    num_rows = round(sum(target.module.sizes[split] for split in target.splits) * layer.in_shape[0])
    if len(layer.in_shape) != 1 or layer.out_features != num_rows:
        raise MatryoshkaError(
            f"{short(layer.name)} has factors of the shapes {list(layer.shape_A)} and "
            f"{list(layer.shape_B)}, but {num_rows} rows of B were expected for its name. Keep "
            "the keys as they are."
        )


def _rows_of_splits(module: Module, splits: Sequence[int], width: int) -> dict[int, slice]:
    """Return the rows of each split in a matrix that has the rows of some splits in order."""
    rows: dict[int, slice] = {}
    start = 0
    for split in splits:
        stop = start + round(module.sizes[split] * width)
        rows[split] = slice(start, stop)
        start = stop
    return rows


def _rename_layers(lora: Lora, key_format: KeyFormat) -> tuple[Layer, ...]:
    """Return the layers of a model that is not known, from names of modules with dots.

    Layers with kohya's keys need no other names for kohya's format.
    """
    style = _STYLES[key_format]
    if key_format == "kohya" and all(
        "." not in layer.name and style.rename(layer, layer.name) == layer for layer in lora.layers
    ):
        return lora.layers
    for layer in lora.layers:
        # kohya's names have underscores for dots, so the module's name is unknown. Some programs
        # write kohya's suffixes after names with dots.
        has_kohya_suffix = layer.keys.A.endswith(KOHYA_SUFFIXES.A) and "." in layer.name
        if not (has_kohya_suffix or layer.keys.A.endswith(DIFFUSERS_SUFFIXES.A)):
            raise _unknown_names(
                lora,
                f"{short(layer.name)} cannot be renamed: it does not hold the name of the module "
                "with its dots, and is not a name of a model that is known.",
            )
    modules = [name.removeprefix(PEFT_PREFIX) for name in _layer_names(lora)]
    parts = {split_part(module)[0] for module in modules}
    if key_format == "peft":
        _check_one_part(lora, parts)
    if key_format != "kohya" and ORIGINAL_PART in parts:
        module = next(module for module in modules if split_part(module)[0] == ORIGINAL_PART)
        raise _unknown_names(
            lora,
            f"{short(module)} is the name that ComfyUI gives the module, and the names of "
            "this model in diffusers are not known.",
        )
    renamed = [
        style.rename(layer, _rename_module(module, key_format, parts))
        for layer, module in zip(lora.layers, modules, strict=True)
    ]
    renamed.sort(key=lambda layer: layer.name)
    for layer, next_layer in pairwise(renamed):
        if layer.name == next_layer.name:
            raise MatryoshkaError(
                f"{lora.name} has two layers that the {key_format} format names "
                f"{short(layer.name)}, such as a.b_c and a_b.c. Omit `key_format`."
            )
    return tuple(renamed)


def _unknown_names(lora: Lora, reason: str) -> MatryoshkaError:
    """Return the error for names that no model has. It says which model has most of them."""
    names = _layer_names(lora)
    shapes = lora.weight_shapes
    known = {
        model: {name for name in names if has_layer(model, name, shapes[name])}
        for model in load_models()
    }
    most = max(len(known_names) for known_names in known.values())
    if 2 * most <= len(names):
        return MatryoshkaError(
            f"{lora.name}: {reason} Omit `key_format`; all other options work for any model."
        )
    models = [model for model, known_names in known.items() if len(known_names) == most]
    others = [name for name in names if name not in known[models[0]]]
    return MatryoshkaError(
        f"{lora.name} has layers of {' or '.join(model.name for model in models)}, and "
        f"{pluralize(len(others), 'other layer')} whose names are not known, such as "
        f"{short(others[0])}. Leave them out with `drop`, or omit `key_format`."
    )


def _rename_module(module: str, key_format: KeyFormat, parts: Set[str]) -> str:
    """Return the name of the layer of a module.

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
        f"The {key_format} format cannot name {short(module)}: it must begin with a part of the "
        "pipeline that this format knows, such as unet. Omit `key_format`."
    )


def _are_written(targets: Mapping[str, TargetModule], names: LayerNames) -> bool:
    """Return whether each layer has the name that it would be given."""
    return all(set(names.of(target).values()) == {name} for name, target in targets.items())


def _have_same_names(
    targets_by_lora: Sequence[Mapping[str, TargetModule]], names: LayerNames
) -> bool:
    """Return whether LoRAs name the modules in the same way.

    Args:
        targets_by_lora: The modules of each LoRA, by the names of its layers.
        names: How the first one names its layers.
    """
    if _are_written(targets_by_lora[0], names):
        return all(_are_written(targets, names) for targets in targets_by_lora)
    names_by_module: list[dict[tuple[str, str, str], set[str]]] = []
    for targets in targets_by_lora:
        layer_names: dict[tuple[str, str, str], set[str]] = {}
        for name, target in targets.items():
            key = (target.part, target.module.authors, target.block)
            layer_names.setdefault(key, set()).add(name)
        names_by_module.append(layer_names)
    first = names_by_module[0]
    for layer_names in names_by_module[1:]:
        shared = layer_names.keys() & first.keys()
        if not shared or any(layer_names[module] != first[module] for module in shared):
            return False
    return True


def _check_same_names(first: Lora, lora: Lora) -> None:
    """Raise MatryoshkaError unless two LoRAs for an unknown model name their layers alike."""
    first_names = {_canonical_name(name): name for name in _layer_names(first)}
    names = {_canonical_name(name): name for name in _layer_names(lora)}
    shared = names.keys() & first_names.keys()
    respelled = sorted(name for name in shared if names[name] != first_names[name])
    formats, first_formats = _block_formats(lora), _block_formats(first)
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
        f"{short(examples[0])} and {short(examples[1])}. Convert the one whose keys end in "
        "lora_A.weight to the format of the other: export it with `key_format`."
    )


def _canonical_name(name: str) -> str:
    return _OPTIONAL_NAME_PARTS.sub("", name.replace(".", "_"))


def _block_formats(lora: Lora) -> dict[tuple[str, bool], str]:
    """Return the formats of the names of an image model's blocks, with a layer of each.

    A format is the text before the name of a block, such as ``lora_unet_``, and whether the block
    has the name that diffusers gives it.
    """
    formats: dict[tuple[str, bool], str] = {}
    for layer in lora.layers:
        name = layer.name.replace(".", "_")
        block = _BLOCK.match(name)
        if block and not is_text_encoder(name):
            formats.setdefault((block["prefix"], block["diffusers"] is not None), layer.name)
    return formats
