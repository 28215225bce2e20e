"""Change an opened LoRA: leave out or scale layers, change the dtype, or add components.

Each function returns another LoRA. Its factors are computed when they are read, so one layer is in
memory at a time.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, get_args

import ml_dtypes
import numpy as np

from matryoshka_lora.errors import MatryoshkaError, check_choice
from matryoshka_lora.formats import DtypeName
from matryoshka_lora.linalg.arrays import Array
from matryoshka_lora.lora_file.lora import Layer, LoraFile, OutputPlan
from matryoshka_lora.lora_file.peft_folder import TARGET_FIELDS, PeftFolder
from matryoshka_lora.lora_file.safetensors_io import StoredTensor
from matryoshka_lora.lora_file.single_file import SingleFile
from matryoshka_lora.units import pluralize

_DTYPES: dict[DtypeName, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
}
# The end of a key of a single file, after the module's name: `.alpha`, `.lora_mid.weight`.
_KEY_END = re.compile(r"\.[^.]+(\.(weight|bias|default))*$")
# Where the largest element of a factor lies outside, fp16 overflows, or has few digits for it.
_FP16_RANGE = (2.0**-11, 2.0**15)


def matching_patterns(lora: LoraFile, patterns: Iterable[str]) -> list[str]:
    """Return the patterns that match a layer, or another tensor of a single file."""
    names = {layer.name for layer in lora.layers}
    if isinstance(lora, SingleFile):
        for key in lora.other_tensors:
            names |= _possible_names(key)
    return [pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)]


def drop_layers(lora: LoraFile, patterns: Iterable[str]) -> LoraFile:
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
    unused = set(patterns)
    layers: list[Layer] = []
    for layer in lora.layers:
        matching = [pattern for pattern in patterns if fnmatchcase(layer.name, pattern)]
        unused.difference_update(matching)
        if not matching:
            layers.append(layer)
    other_tensors = dict(lora.other_tensors)
    if isinstance(lora, SingleFile):
        dropped_names = {layer.name for layer in lora.layers} - {layer.name for layer in layers}
        for key in lora.other_tensors:
            names = _possible_names(key)
            matching = [
                pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)
            ]
            unused.difference_update(matching)
            if matching or dropped_names & names:
                del other_tensors[key]
    _check_patterns("drop", unused, lora)
    if not layers:
        raise MatryoshkaError(f"`drop` leaves no layer of {lora.name}. Pass narrower patterns.")
    num_dropped = len(lora.layers) - len(layers)
    changes = lora.changes
    if num_dropped:
        changes += (f"left out {pluralize(num_dropped, 'layer')} of {len(lora.layers)}",)
    dropped = replace(lora, layers=tuple(layers), other_tensors=other_tensors, changes=changes)
    if isinstance(dropped, PeftFolder):
        return replace(dropped, config=_config_of_layers(dropped))
    return dropped


def _possible_names(key: str) -> set[str]:
    """Return the names that the module of a tensor may have, and the key itself.

    In older keys, such as NAME.lora.down.weight, the layer's name ends in ``.lora``.
    """
    module = _KEY_END.sub("", key)
    return {key, module, f"{module}.lora", re.sub(r"[._]lora(_linear_layer)?$", "", module)}


def _check_patterns(parameter: str, unused: Iterable[str], lora: LoraFile) -> None:
    for pattern in sorted(unused):
        raise MatryoshkaError(
            f"`{parameter}`: {pattern!r:.80} matches no layer of {lora.name}. The name of a layer "
            f"is, e.g., {lora.layers[0].name[:200]}."
        )


def _config_of_layers(lora: PeftFolder) -> dict[str, Any]:
    """Return a config whose targets are the layers of an adapter, by their names."""
    if lora.config.get("target_parameters"):
        raise MatryoshkaError(
            f"{lora.name} has target_parameters, whose layers cannot be left out. Omit `drop`."
        )
    names = [layer.name for layer in lora.layers]
    return {**lora.config, **dict.fromkeys(TARGET_FIELDS), "target_modules": names}


def scale_layers(lora: LoraFile, factors: Mapping[str, float]) -> LoraFile:
    """Return a LoRA whose updates are multiplied by factors. Positive ones keep an order.

    Args:
        lora: The LoRA.
        factors: The factor by a pattern of layer names in the style of the shell. The last pattern
            that matches a layer counts. A layer with the factor 0 is left out.

    Raises:
        MatryoshkaError: A factor is not a finite number, a pattern matches nothing, or no layer is
            left.
    """
    for pattern, factor in factors.items():
        is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not is_number or not math.isfinite(factor):
            raise MatryoshkaError(
                f"`scale`: the factor of {pattern!r:.80} must be a number such as 0.5, got "
                f"{factor!r:.80}."
            )
    unused = set(factors)
    num_scaled: Counter[float] = Counter()
    dropped_names: list[str] = []
    layers: list[Layer] = []
    for layer in lora.layers:
        matching = [pattern for pattern in factors if fnmatchcase(layer.name, pattern)]
        unused.difference_update(matching)
        factor = factors[matching[-1]] if matching else 1.0
        if factor == 0:
            dropped_names.append(layer.name)
        elif factor != 1:
            num_scaled[factor] += 1
        layers.append(_scale_layer(layer, factor) if factor != 1 else layer)
    _check_patterns("scale", unused, lora)
    changes = lora.changes
    for factor, count in num_scaled.items():
        layers_scaled = f"{pluralize(count, 'layer')} of {len(layers)}"
        changes += (f"scaled {layers_scaled} (factor {factor:g})",)
    scaled = replace(lora, layers=tuple(layers), changes=changes)
    if not dropped_names:
        return scaled
    # A name is a pattern of itself but for its brackets.
    return drop_layers(scaled, [name.replace("[", "[[]") for name in dropped_names])


def _scale_layer(layer: Layer, factor: float) -> Layer:
    # Both factors are wide: a result of their SVD gets the dtype of A before that of the output.
    A = _map_tensor(layer.A, _widen)
    B = _map_tensor(layer.B, lambda array: _widen(array) * factor)
    read_svd = layer.read_svd
    if read_svd is None:
        return layer.with_factors(A, B)
    return replace(layer, A=A, B=B, read_svd=lambda: read_svd().scaled(factor))


def _map_tensor(tensor: StoredTensor, function: Callable[[Array], Array]) -> StoredTensor:
    """Return a tensor with the same declared dtype and shape whose values are computed."""
    return replace(tensor, read=lambda: function(tensor.read()))


def _widen(array: Array) -> Array:
    return array.astype(np.float64, copy=False)


def cast_factors(lora: LoraFile, dtype: DtypeName) -> LoraFile:
    """Return a LoRA whose factors are written in another dtype. Other tensors keep theirs.

    Elements that are too large for it are an error when the factors are written. For fp16, a power
    of two is moved from one factor of a layer to the other where the smaller one would lose digits.

    Raises:
        MatryoshkaError: The dtype is unknown.
    """
    check_choice("dtype", dtype, get_args(DtypeName))
    layers = [_cast_layer(layer, _DTYPES[dtype]) for layer in lora.layers]
    changes = (*lora.changes, f"stored the factors in {dtype}")
    return replace(lora, layers=tuple(layers), changes=changes)


def _cast_layer(layer: Layer, dtype: np.dtype[Any]) -> Layer:
    if dtype == layer.A.dtype == layer.B.dtype:
        return layer

    def read_A() -> Array:
        A = _widen(layer.A.read())
        return A * _fp16_shift(A, layer.B.read()) if dtype == np.float16 else A

    def read_B() -> Array:
        B = _widen(layer.B.read())
        return B / _fp16_shift(layer.A.read(), B) if dtype == np.float16 else B

    A = replace(layer.A, dtype=dtype, read=read_A)
    B = replace(layer.B, dtype=dtype, read=read_B)
    return replace(layer, A=A, B=B)


def _fp16_shift(A: Array, B: Array) -> float:
    """Return the power of two that A is multiplied by, and B divided by, so that fp16 holds both.

    It is 1 where fp16 holds them as they are.
    """
    largest_A, largest_B = float(np.abs(A).max()), float(np.abs(B).max())
    smallest, largest = _FP16_RANGE
    if not (0 < largest_A < math.inf and 0 < largest_B < math.inf):
        return 1.0
    if smallest <= min(largest_A, largest_B) and max(largest_A, largest_B) <= largest:
        return 1.0
    return float(2.0 ** round(math.log2(largest_B / largest_A) / 2))


def pad_layers(lora: LoraFile, rank: int) -> LoraFile:
    """Return a LoRA of a larger rank with the same update, to train on.

    The new rows of A are random, with the norm of the existing ones, and the new columns of B are
    zero. So the new components contribute nothing, and learn from the first step on.

    Args:
        lora: The LoRA.
        rank: The rank of every layer; at least the largest one.

    Raises:
        MatryoshkaError: The rank is too small.
    """
    if rank < lora.max_rank:
        raise MatryoshkaError(
            f"{lora.name} has rank {lora.max_rank}, and with `pad=True` the rank must not be "
            f"smaller, got {rank}. Omit `pad`."
        )
    layers = [_pad_layer(lora, layer, rank, seed) for seed, layer in enumerate(lora.layers)]
    return replace(
        lora,
        layers=tuple(layers),
        nesting=None,
        order=None,
        deploy="reordered",
        changes=(*lora.changes, f"padded to rank {rank}"),
    )


def _pad_layer(lora: LoraFile, layer: Layer, rank: int, seed: int) -> Layer:
    padded = layer.with_rank(rank, lora.scale_at(layer, layer.rank))

    def read_A() -> Array:
        A = layer.A.read()
        A = A.reshape(layer.num_experts, layer.rank, -1)
        random = np.random.default_rng(seed)
        row_norm = math.sqrt((_widen(A) ** 2).sum() / (layer.num_experts * layer.rank))
        # Factors of zeros get the norm of PEFT's initial A, Kaiming's with a = sqrt(5).
        row_norm = row_norm or 1 / math.sqrt(3)
        new_rows = random.standard_normal((layer.num_experts, rank - layer.rank, A.shape[2]))
        new_rows *= row_norm / math.sqrt(A.shape[2])
        A = np.concatenate([A, new_rows.astype(A.dtype)], axis=1)
        return A.reshape(padded.A.shape)

    def read_B() -> Array:
        B = layer.B.read()
        shape = (B.shape[0], (rank - layer.rank) * layer.num_experts, *B.shape[2:])
        return np.concatenate([B, np.zeros(shape, B.dtype)], axis=1)

    A, B = replace(padded.A, read=read_A), replace(padded.B, read=read_B)
    return padded.with_factors(A, B)


def plan_same_scales(lora: LoraFile) -> OutputPlan:
    """Return what an output with the same ranks and factors will hold.

    Unlike in `LoraFile.plan_unchanged`, each layer of a single file keeps its scale and alpha.
    Adapters of PEFT get one scale, and so does a file of which fp16 could not hold the factors.
    """
    plan = lora.plan_unchanged()
    if not isinstance(lora, SingleFile) or lora.output_scale != 1:
        return plan
    layers: list[tuple[Layer, Layer]] = []
    other_tensors = dict(plan.other_tensors)
    for old, new in plan.layers:
        if old.key_alpha is not None:
            alpha = np.array(old.scale * old.rank, dtype=np.float32)
            other_tensors[old.key_alpha] = StoredTensor.from_array(alpha)
            new = replace(new, scale=old.scale)
        layers.append((old, new))
    metadata = dict(plan.metadata)
    if "ss_network_alpha" in metadata:
        metadata["ss_network_alpha"] = _network_alpha([new for _, new in layers], lora)
    return replace(plan, layers=tuple(layers), other_tensors=other_tensors, metadata=metadata)


def _network_alpha(layers: Sequence[Layer], lora: SingleFile) -> str:
    """Return the alpha of all layers as kohya's metadata; unchanged where the layers differ."""
    alphas = {np.float32(layer.scale * layer.rank) for layer in layers}
    if len(alphas) > 1:
        return lora.metadata.get("ss_network_alpha", "Dynamic")
    return f"{float(alphas.pop()):.17g}"
