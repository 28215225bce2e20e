"""Leave out or scale layers, change the dtype of the factors, or add components."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, get_args

import numpy as np

from matryoshka_lora.errors import MatryoshkaError, check_choice, short
from matryoshka_lora.linalg.arrays import FLOATS, Array, DType, Float64Array
from matryoshka_lora.linalg.factors import pad_end
from matryoshka_lora.lora.keys import ALL_SUFFIXES, PEFT_PREFIX, WEIGHT_CHANGE, without_lora
from matryoshka_lora.lora.layer import Factors, Layer, sum_tensors
from matryoshka_lora.nesting import check_rank
from matryoshka_lora.registry import DtypeName
from matryoshka_lora.units import pluralize

if TYPE_CHECKING:
    from matryoshka_lora.lora.lora import Lora

TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""The fields of PEFT's config that select the layers."""

_DTYPES: dict[DtypeName, DType] = {
    "fp32": FLOATS["F32"],
    "bf16": FLOATS["BF16"],
    "fp16": FLOATS["F16"],
}
# The end of a key of a single file, after the module's name: `.alpha`, `.lora_mid.weight`.
_KEY_END = re.compile(r"\.[^.]+(\.(weight|bias|default))*$")
# The tensors of a copied layer that are multiplied to scale its update, and the ones that are not.
_LINEAR_KEYS = (*(suffixes.B for suffixes in ALL_SUFFIXES), ".lora_B.bias", ".lora_up.bias")
_UNSCALED_KEYS = (
    *(suffixes.A for suffixes in ALL_SUFFIXES),
    ".lora_A.bias",
    ".lora_down.bias",
    ".lora_mid",
    ".lora_mid.weight",
    ".alpha",
)
# The range of the largest element of a factor. Above it fp16 may overflow, below it fp16 loses
# digits.
_FP16_RANGE = (2.0**-11, 2.0**15)


def matching_patterns(lora: Lora, patterns: Iterable[str]) -> list[str]:
    """Return the patterns that match a layer, or another tensor of a single file."""
    names = {layer.name for layer in lora.layers}
    if lora.container == "single":
        for key in lora.other_tensors:
            names |= _possible_names(key)
    return [pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)]


def drop(lora: Lora, patterns: Iterable[str]) -> Lora:
    """Return a LoRA without some layers.

    The other tensors of a single file that belong to a module whose name matches are left out too.

    Args:
        lora: The LoRA.
        patterns: Patterns of layer names in the style of the shell, such as ``"lora_te*"``.

    Raises:
        MatryoshkaError: A pattern matches nothing, no layer is left, or PEFT's config cannot
            describe what is left.
    """
    patterns = list(patterns)
    _check_patterns("drop", patterns, lora)

    def matches(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return _without(lora, matches, "drop")


def _without(lora: Lora, is_dropped: Callable[[str], bool], parameter: str) -> Lora:
    """Return a LoRA without the layers of some names, and without the other tensors of these."""
    layers = tuple(layer for layer in lora.layers if not is_dropped(layer.name))
    if not layers:
        raise MatryoshkaError(
            f"`{parameter}` leaves no layer of {lora.name}. Pass narrower patterns."
        )
    other_tensors, config = lora.other_tensors, lora.config
    if lora.container == "single":
        other_tensors = {
            key: tensor
            for key, tensor in lora.other_tensors.items()
            if not any(map(is_dropped, _possible_names(key)))
        }
    elif lora.config.get("target_parameters"):
        raise MatryoshkaError(
            f"{lora.name} has target_parameters, whose layers cannot be left out. Omit "
            f"`{parameter}`."
        )
    else:
        targets = [layer.name for layer in layers]
        config = {**lora.config, **dict.fromkeys(TARGET_FIELDS), "target_modules": targets}
    changes = lora.changes
    num_dropped = len(lora.layers) - len(layers)
    if num_dropped:
        changes += (f"left out {pluralize(num_dropped, 'layer')} of {len(lora.layers)}",)
    return replace(lora, layers=layers, other_tensors=other_tensors, config=config, changes=changes)


def _possible_names(key: str) -> set[str]:
    """Return the names that the module of a tensor may have, and the key itself.

    In older keys, such as NAME.lora.down.weight, the layer's name ends in ``.lora``.
    """
    module = _KEY_END.sub("", key)
    return {key, module, f"{module}.lora", without_lora(module)}


def _check_patterns(parameter: str, patterns: Iterable[str], lora: Lora) -> None:
    for pattern in sorted(set(patterns).difference(matching_patterns(lora, patterns))):
        raise MatryoshkaError(
            f"`{parameter}`: {short(pattern)} matches no layer of {lora.name}. The name of a layer "
            f"is, e.g., {short(lora.layers[0].name)}."
        )


def scale(lora: Lora, factors: Mapping[str, float]) -> Lora:
    """Return a LoRA whose updates are multiplied by factors. Positive ones keep an order.

    The other tensors of a single file that are added to the model, such as ``lora_B.bias`` and
    ``diff_b``, are multiplied too.

    Args:
        lora: The LoRA.
        factors: The factor by a pattern of layer names in the style of the shell. The last pattern
            that matches a layer counts. A layer with the factor 0 is left out.

    Raises:
        MatryoshkaError: A factor is not a finite number, a pattern matches no layer, no layer is
            left, or a pattern matches a tensor that is not linear in the update: a magnitude of
            DoRA, a weight in full.
    """
    for pattern, factor in factors.items():
        is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not is_number or not math.isfinite(factor):
            raise MatryoshkaError(
                f"`scale`: the factor of {short(pattern)} must be a number such as 0.5, got "
                f"{short(factor)}."
            )
    _check_patterns("scale", factors, lora)

    def factor_of(*names: str) -> float:
        matching = [
            pattern for pattern in factors if any(fnmatchcase(name, pattern) for name in names)
        ]
        return factors[matching[-1]] if matching else 1.0

    other_tensors = dict(lora.other_tensors)
    for key, tensor in lora.other_tensors.items():
        if lora.container == "single":
            factor = factor_of(*_possible_names(key))
            is_linear = key.endswith(_LINEAR_KEYS) or WEIGHT_CHANGE.fullmatch(key) is not None
            if factor == 0 or key.endswith(_UNSCALED_KEYS):
                continue
        else:  # values, and not their changes
            name = key.removeprefix(PEFT_PREFIX)
            module = name.rpartition(".")[0].removesuffix(".base_layer")
            factor, is_linear = factor_of(name, module), False
        if factor != 1:
            if not is_linear:
                raise MatryoshkaError(
                    f"{lora.name}: `scale` matches {short(key)}, which is not a part of the update "
                    "that can be multiplied. Pass narrower patterns."
                )
            other_tensors[key] = sum_tensors(key, [(factor, tensor.widened())])
    num_scaled: Counter[float] = Counter()
    layers: list[Layer] = []
    for layer in lora.layers:
        factor = factor_of(layer.name)
        if factor not in (0, 1):
            num_scaled[factor] += 1
            layer = _scale_layer(layer, factor)
        layers.append(layer)
    changes = lora.changes
    for factor, count in num_scaled.items():
        scaled_layers = f"{pluralize(count, 'layer')} of {len(layers)}"
        changes += (f"scaled {scaled_layers} (factor {factor:g})",)
    scaled = replace(lora, layers=tuple(layers), other_tensors=other_tensors, changes=changes)
    names = {*lora.ranks}.union(*map(_possible_names, other_tensors))
    if any(factor_of(name) == 0 for name in names):
        return _without(scaled, lambda name: factor_of(name) == 0, "scale")
    return scaled


def _scale_layer(layer: Layer, factor: float) -> Layer:
    # B is multiplied, not the scale: diffusers needs the same alpha in all layers of a file.
    def multiply(factors: Factors) -> Factors:
        errors, values = factors.squared_errors, factors.singular_values
        return Factors(
            factors.A,
            _widen(factors.B) * factor,
            None if errors is None else errors * factor**2,
            None if values is None else values * abs(factor),
        )

    read_svd = layer.read_svd
    if read_svd is None:
        values = layer.weighted_values
        return layer.map(multiply, weighted_values=None if values is None else values * abs(factor))
    return layer.map(multiply, read_svd=lambda: read_svd().scaled(factor))


def cast(lora: Lora, dtype: DtypeName) -> Lora:
    """Return a LoRA whose factors are written in another dtype. Other tensors keep theirs.

    Elements that are too large for it are an error when the factors are written. For fp16, a power
    of two is moved from one factor of a layer to the other where the smaller one would lose digits.

    Raises:
        MatryoshkaError: The dtype is unknown.
    """
    check_choice("dtype", dtype, get_args(DtypeName))
    new_dtype = _DTYPES[dtype]
    layers: list[Layer] = []
    for layer in lora.layers:
        if layer.dtype != new_dtype:
            if dtype == "fp16":
                layer = layer.map(_balance_for_fp16, read_svd=layer.read_svd)
            layer = replace(layer, dtype=new_dtype)
        layers.append(layer)
    changes = (*lora.changes, f"stored the factors in {dtype}")
    return replace(lora, layers=tuple(layers), changes=changes)


def _balance_for_fp16(factors: Factors) -> Factors:
    """Move a power of two from one factor to the other where fp16 could not hold both."""
    A, B = _widen(factors.A), _widen(factors.B)
    largest_A, largest_B = float(np.abs(A).max()), float(np.abs(B).max())
    smallest, largest = _FP16_RANGE
    are_in_range = smallest <= min(largest_A, largest_B) and max(largest_A, largest_B) <= largest
    if are_in_range or not (0 < largest_A < math.inf and 0 < largest_B < math.inf):
        return factors._replace(A=A, B=B)
    shift = 2.0 ** round(math.log2(largest_B / largest_A) / 2)
    return factors._replace(A=A * shift, B=B / shift)


def _widen(array: Array) -> Float64Array:
    return array.astype(np.float64, copy=False)


def pad(lora: Lora, rank: int) -> Lora:
    """Return a LoRA of a larger rank with the same update, to train on.

    The new rows of A are random, with the norm of the existing ones, and the new columns of B are
    zero. So the new components contribute nothing, and learn from the first step on.

    Args:
        lora: The LoRA.
        rank: The rank of every layer; at least the largest one.

    Raises:
        MatryoshkaError: The rank is too small.
    """
    check_rank(rank)
    if rank < lora.max_rank:
        raise MatryoshkaError(
            f"{lora.name} has rank {lora.max_rank}, and padding must not make it smaller, got "
            f"{rank}. Pass a larger `rank`, or truncate instead."
        )
    # Layers of different scales would keep different alphas, which diffusers does not support.
    rescale = len({layer.scale for layer in lora.layers}) > 1
    layers = tuple(
        replace(padded, has_new_factors=padded.has_new_factors or rescale)
        for padded in (_pad_layer(layer, rank, seed) for seed, layer in enumerate(lora.layers))
    )
    changes = (*lora.changes, f"padded to rank {rank}")
    return replace(
        lora,
        layers=layers,
        nesting=None,
        order=None,
        small=None,
        deploy="reordered",
        scores=(),
        changes=changes,
    )


def _pad_layer(layer: Layer, rank: int, seed: int) -> Layer:
    missing = rank - layer.rank

    def add_components(factors: Factors) -> Factors:
        A, B = factors.A, factors.B
        row_norm = math.sqrt((_widen(A) ** 2).sum() / (layer.num_experts * layer.rank))
        # Factors of zeros get the norm of PEFT's initial A, Kaiming's with a = sqrt(5).
        row_norm = row_norm or 1 / math.sqrt(3)
        num_inputs = A.shape[-1]
        shape = (*A.shape[:-2], missing, num_inputs)
        rows = np.random.default_rng(seed).standard_normal(shape) * row_norm / math.sqrt(num_inputs)
        return Factors(
            np.concatenate([A, rows.astype(A.dtype)], axis=-2),
            pad_end(B, missing, axis=-1),
            factors.padded_errors(rank),
        )

    return layer.map(add_components, rank=rank, kind="LoRA")
