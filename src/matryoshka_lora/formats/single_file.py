"""Single-file LoRAs of image and video models, with the keys of kohya, diffusers and others.

kohya writes ``NAME.lora_down.weight``, ``NAME.lora_up.weight`` and ``NAME.alpha``, and the scale is
alpha / rank. diffusers writes ``NAME.lora_A.weight`` and ``NAME.lora_B.weight``, and the alpha,
if any, into the file's metadata. Without an alpha the scale is 1.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from matryoshka_lora.errors import MatryoshkaError, short
from matryoshka_lora.formats.lora_config import RanksAndScales
from matryoshka_lora.formats.lycoris import read_lycoris_layers
from matryoshka_lora.formats.safetensors_io import (
    NESTING_KEY,
    ORDER_KEY,
    lora_file_size,
    open_safetensors,
    pop_error,
    stored_checksum,
    weighted_values_record,
    with_weighted_values,
    write_lora_tensors,
)
from matryoshka_lora.linalg.factors import Checksum
from matryoshka_lora.lora.keys import (
    ALL_SUFFIXES,
    CONFIGS_KEY,
    PEFT_PREFIX,
    module_names,
    split_part,
    without_lora,
)
from matryoshka_lora.lora.layer import Layer, LayerKeys, StoredTensor, are_factors
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.metadata import (
    can_describe,
    read_configs,
    updated_metadata,
    without_lycoris,
)
from matryoshka_lora.lora.save import Written
from matryoshka_lora.nesting import is_valid_scale
from matryoshka_lora.registry import DORA_HINT, Target
from matryoshka_lora.units import pluralize

# The extra tensors of a layer: a magnitude (DoRA), a mid matrix, a bias of A.
_EXTRA_TENSOR = re.compile(
    r"(?P<module>.+)\.(dora_scale|magnitude|lora_(mag\w+|mid|up|down|[AB])(\.[^.]+)*)"
    r"(?<!\.lora_B\.bias)(?<!\.lora_up\.bias)"
)
_BIAS = re.compile(r"(?P<module>.+)\.lora_(B|up)\.bias")
_OTHER_METHODS = re.compile(
    r"dora_scale|magnitude|hada_|lokr_|oft_|lora_mid|lora_(A|B|up|down)\.bias"
)

Tensors = Mapping[str, StoredTensor]


# Reading


def read(file: Path, alpha: float | None = None) -> Lora:
    """Open a LoRA in one file. Its tensors are loaded lazily.

    Layers of LoHa and LoKr are opened as LoRA layers of their exact rank. Layers with a DoRA
    magnitude, a mid matrix or an alpha of 0 are copied unchanged: their tensors are in
    ``other_tensors``. So are layers with a bias, if an output would change their scale; otherwise
    only the bias is.

    Args:
        file: The file.
        alpha: The alpha of each layer, for a file that does not contain it.

    Raises:
        MatryoshkaError: The file does not exist, is damaged, or has no layers with a rank; or it
            contains an alpha, and one is passed.
    """
    if file.suffix.lower() != ".safetensors":
        if not file.exists():
            raise MatryoshkaError(f"File not found: {file}")
        raise MatryoshkaError(
            f"{file} is not a LoRA that can be read. Pass a folder that PEFT has saved, or a "
            "file with the suffix .safetensors; rename a file with the suffix .sft."
        )
    return from_tensors(*open_safetensors(file), file, alpha)


def from_tensors(
    tensors: Tensors, metadata: dict[str, str], file: Path, alpha: float | None = None
) -> Lora:
    """Return the LoRA of a file's tensors. See `read`."""
    original_error = pop_error(metadata)
    metadata.pop(NESTING_KEY, None)  # of a folder's weights, without their config
    order = metadata.pop(ORDER_KEY, None)
    pairs = _find_pairs(tensors, str(file))
    copied_modules = _find_modules(_EXTRA_TENSOR, tensors, pairs)
    names = [name for name in sorted(pairs) if not copied_modules & module_names(name)]
    scales = _Scales(tensors, metadata, alpha, str(file))
    lora_layers = _read_lora_layers(tensors, names, pairs, scales, str(file))
    if not (CONFIGS_KEY in metadata and can_describe(lora_layers)):
        # Biases are copied. PEFT multiplies them by the scale, and ComfyUI does not. So a layer is
        # kept whole if an output would change its scale.
        modules_with_bias = _find_modules(_BIAS, tensors, pairs)
        for layer in lora_layers:
            if layer.keys.alpha is not None or layer.scale != 1:
                copied_modules |= modules_with_bias & module_names(layer.name)
        lora_layers = [
            layer for layer in lora_layers if not copied_modules & module_names(layer.name)
        ]
    lycoris_layers, lycoris_keys = read_lycoris_layers(tensors, scales.of, str(file))
    layers = sorted([*lora_layers, *lycoris_layers], key=lambda layer: layer.name)
    for layer, next_layer in pairwise(layers):
        if layer.name == next_layer.name:
            raise MatryoshkaError(
                f"{file} has {layer.kind} and {next_layer.kind} for one module: "
                f"{short(layer.name)}. Remove one of them."
            )
    # diffusers would also apply the ranks in the metadata to the copied modules, and a passed alpha
    # applies to all layers.
    if not layers or (copied_modules and (can_describe(layers) or alpha is not None)):
        raise _no_layers_error(file, tensors)

    read_keys = lycoris_keys.union(*(layer.keys for layer in layers))
    other_tensors = {key: tensors[key] for key in sorted(tensors) if key not in read_keys}
    if lycoris_layers and not other_tensors:
        metadata = without_lycoris(metadata)
    lora = Lora(
        str(file),
        tuple(layers),
        other_tensors,
        metadata,
        container="single",
        files=(file,),
        original_error=original_error,
        notes=_describe_conversions(layers, tensors),
    )
    return lora if order is None else _with_order(lora, order, tensors)


def _with_order(lora: Lora, record: str, tensors: Tensors) -> Lora:
    """Return a LoRA with the order of its metadata, if that still describes its factors."""
    try:
        saved = json.loads(record)
        values, scales, checksum = saved["weighted_values"], saved["scales"], saved["checksum"]
        layers = tuple(with_weighted_values(layer, values) for layer in lora.layers)
        # Weighted values are proportional to the scales.
        is_unchanged = stored_checksum(layers, tensors) == checksum and all(
            math.isclose(scales[layer.name], layer.scale, rel_tol=1e-5) for layer in layers
        )
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        is_unchanged = False
    if is_unchanged:
        return replace(lora, layers=layers, order="weighted")
    warnings.warn(
        f"{lora.name} has changed since it was reordered by weighted SVD, so its order is not "
        "used.",
        stacklevel=4,
    )
    return lora


def _find_pairs(tensors: Tensors, file_name: str) -> dict[str, LayerKeys]:
    """Return the keys of both factors by the name of their layer.

    Raises:
        MatryoshkaError: Two pairs have one name, so that they share its alpha.
    """
    pairs: dict[str, LayerKeys] = {}
    for key_A in sorted(tensors):
        for suffixes in ALL_SUFFIXES:
            name = key_A.removesuffix(suffixes.A)
            key_B = name + suffixes.B
            if name != key_A and key_B in tensors:
                if name in pairs:
                    raise MatryoshkaError(
                        f"{file_name} has two pairs of factors for one module: "
                        f"{short(pairs[name].A)} and {short(key_A)}. Remove one pair."
                    )
                pairs[name] = LayerKeys(key_A, key_B)
    return pairs


def _find_modules(
    pattern: re.Pattern[str], tensors: Tensors, pairs: Mapping[str, LayerKeys]
) -> set[str]:
    """Return the modules with tensors that are not factors and whose keys match a pattern."""
    factor_keys = {key for keys in pairs.values() for key in (keys.A, keys.B)}
    modules: set[str] = set()
    for key in tensors:
        match = pattern.fullmatch(key)
        if match and key not in factor_keys:
            modules.add(match["module"])
    return modules


def _find_alpha_keys(tensors: Tensors, layer_names: Set[str], file_name: str) -> dict[str, str]:
    """Return the key of the alpha by the name of its layer.

    Raises:
        MatryoshkaError: An alpha may belong to several layers, or a layer has several alphas.
    """
    names_by_module: dict[str, list[str]] = {}
    for name in sorted(layer_names):
        names_by_module.setdefault(without_lora(name), []).append(name)
    alpha_keys: dict[str, str] = {}
    for key in sorted(tensors):
        owner = key.removesuffix(".alpha")
        if owner == key:
            continue
        names = [owner]
        if owner not in layer_names:
            names = names_by_module.get(without_lora(owner), [])
        for name in names:
            if len(names) > 1 or name in alpha_keys:
                raise MatryoshkaError(
                    f"{file_name}: it is not clear which alpha belongs to which layer: "
                    f"{short(key)} is a second alpha of {short(name)}, or is for two layers. "
                    "Remove all but one."
                )
            alpha_keys[name] = key
    return alpha_keys


class _Scales:
    """The scales of layers: from alpha tensors, from diffusers' metadata, or a given alpha."""

    def __init__(
        self, tensors: Tensors, metadata: Mapping[str, str], alpha: float | None, file_name: str
    ) -> None:
        self._tensors = tensors
        self._alpha = alpha
        self._file_name = file_name
        configs = read_configs(metadata, file_name)
        self._configs = {
            part: RanksAndScales(config, file_name) for part, config in configs.items()
        }

    def of(self, name: str, rank: int, key_alpha: str | None) -> float:
        """Return the scale of a layer; it may be negative, or 0.

        Raises:
            MatryoshkaError: The scale is not known, or is no number.
        """
        part, module = split_part(name.removeprefix(PEFT_PREFIX))
        if self._alpha is not None and (key_alpha is not None or part in self._configs):
            raise MatryoshkaError(
                f"{self._file_name} contains the alpha of {short(name)}. Omit `alpha`."
            )
        scale = 1.0
        if key_alpha is not None:
            tensor = self._tensors[key_alpha]
            is_number = math.prod(tensor.shape) == 1
            scale = float(tensor.read().astype(np.float64).item()) / rank if is_number else math.nan
        elif part in self._configs:
            _, scale = self._configs[part].of(module)
        elif self._alpha is not None:
            scale = self._alpha / rank
        elif name.startswith(PEFT_PREFIX):
            raise MatryoshkaError(
                f"{self._file_name} is the weights file of a PEFT folder, and its scale is in the "
                "folder's adapter_config.json. Pass the folder that contains both, or export the "
                "file with the lora_alpha of that config as `alpha`."
            )
        if not (scale == 0 or is_valid_scale(abs(scale))):
            raise MatryoshkaError(
                f"{self._file_name}: the alpha of {short(name)} gives the scale {short(scale)}, "
                "which is not a number that can be used. Save the file again."
            )
        return scale


def _read_lora_layers(
    tensors: Tensors,
    names: Sequence[str],
    pairs: Mapping[str, LayerKeys],
    scales: _Scales,
    file_name: str,
) -> list[Layer]:
    """Return the layers of LoRA. An alpha of 0 switches a layer off, and it stays off."""
    alpha_keys = _find_alpha_keys(tensors, set(names), file_name)
    layers: list[Layer] = []
    for name in names:
        keys = pairs[name]._replace(alpha=alpha_keys.get(name))
        A, B = tensors[keys.A].widened(), tensors[keys.B].widened()
        if not are_factors(A, B):
            raise MatryoshkaError(
                f"{file_name}: the factors of {short(name)} do not fit each other: {A.dtype} "
                f"{list(A.shape)} and {B.dtype} {list(B.shape)}. Save the file again in fp32, bf16 "
                "or fp16."
            )
        scale = scales.of(name, A.shape[0], keys.alpha)
        if scale == 0:
            continue
        layer = Layer.from_tensors(name, A, B, abs(scale), keys, source=file_name)
        if scale < 0:
            layer = layer.map(lambda factors: factors._replace(B=-factors.B))
        layers.append(layer)
    return layers


def _describe_conversions(layers: Sequence[Layer], tensors: Tensors) -> tuple[str, ...]:
    """Return a sentence for each kind of layer that an output holds in another form."""
    notes: list[str] = []
    for kind in ("LoHa", "LoKr"):
        count = sum(layer.kind == kind for layer in layers)
        if count:
            notes.append(f"{pluralize(count, f'{kind} layer')} became LoRA.")
    if any(tensors[layer.keys.A].is_float8 for layer in layers if layer.keys.A in tensors):
        notes.append("The float8 factors became bf16.")
    return tuple(notes)


def _no_layers_error(file: Path, tensors: Tensors) -> MatryoshkaError:
    copied = [key for key in sorted(tensors) if _OTHER_METHODS.search(key)]
    if copied:
        is_dora = any(re.search("dora_scale|magnitude", key) for key in copied)
        return MatryoshkaError(
            f"{file} contains {short(copied[0])}. DoRA, OFT, and layers with a mid matrix or with "
            "an alpha and a bias cannot be truncated. "
            + (DORA_HINT if is_dora else "Use the file as it is.")
        )
    first_key = min(tensors, default="")
    return MatryoshkaError(
        f"{file} contains no LoRA: keys must end in lora_A.weight, lora_down.weight or "
        f"down.weight, got {short(first_key)}."
    )


# Writing


def write(lora: Lora, file: Path, target: Target) -> Written:
    """Write a LoRA in one file."""
    return write_lora_tensors(_prepare(lora), file)


def file_size(lora: Lora) -> int:
    """Return the size in bytes of the file that `write` writes."""
    return lora_file_size(_prepare(lora))


def _prepare(lora: Lora) -> Lora:
    """Return a LoRA with scales that the file can hold, and with its alphas and metadata.

    New factors get the same alpha in all layers with an alpha tensor: diffusers supports only one
    if ranks differ. Other factors keep their alphas. Without alpha tensors, the scale is stored in
    the metadata, if diffusers reads it there; otherwise it is 1.
    """
    # Prefixes of ordered factors have other ranks, too.
    has_new_factors = lora.order is not None or any(layer.has_new_factors for layer in lora.layers)
    common_alpha = lora.max_rank * lora.new_scale
    metadata_holds_scales = CONFIGS_KEY in lora.metadata and can_describe(lora.layers)
    other_tensors = dict(lora.other_tensors)
    layers: list[Layer] = []
    for layer in lora.layers:
        key_alpha = layer.keys.alpha
        if key_alpha is not None:
            if has_new_factors:
                layer = layer.with_scale(common_alpha / layer.rank)
            alpha = np.array(layer.scale * layer.rank, dtype=np.float32)
            other_tensors[key_alpha] = StoredTensor.from_array(alpha)
        elif not metadata_holds_scales:
            layer = layer.with_scale(1.0)
        layers.append(layer)
    lora = replace(lora, layers=tuple(layers), other_tensors=other_tensors)
    metadata = updated_metadata(lora)
    if lora.order == "weighted":
        order = {
            "scales": {layer.name: layer.scale for layer in lora.layers},
            "weighted_values": weighted_values_record(lora),
            # A placeholder of equal length, which is replaced once the factors are written.
            "checksum": Checksum().hexdigest(),
        }
        metadata[ORDER_KEY] = json.dumps(order)
    return replace(lora, metadata=metadata)
