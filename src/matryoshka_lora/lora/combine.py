"""Weighted sums of LoRAs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matryoshka_lora.errors import MatryoshkaError, printable, short
from matryoshka_lora.linalg.arrays import Array, Float64Array, common_dtype
from matryoshka_lora.linalg.factors import inner_products, weighted_sum
from matryoshka_lora.lora.convert import match_key_formats
from matryoshka_lora.lora.keys import WEIGHT_CHANGE, module_names
from matryoshka_lora.lora.layer import Factors, Layer, StoredTensor, sum_tensors
from matryoshka_lora.lora.metadata import combined_metadata
from matryoshka_lora.lora.transforms import TARGET_FIELDS
from matryoshka_lora.progress import progress_bar, single_threaded
from matryoshka_lora.registry import DORA_HINT

if TYPE_CHECKING:
    from matryoshka_lora.lora.lora import Lora

# The fields of PEFT's config that must be equal, so that the factors are for the same weights.
_COMMON_FIELDS = (
    "base_model_name_or_path",
    "revision",
    "fan_in_fan_out",
    "target_parameters",
    "layer_replication",
)


def combine(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """Return the weighted sum of LoRAs, ``w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ...``.

    Its factors are the concatenated ones, so the sum is exact, its rank is the sum of the ranks,
    and it has no order. A layer that a LoRA does not have counts as zero.

    Args:
        loras: LoRAs of one base model, all PEFT folders or all single files. The sum has the key
            format of the first one.
        weights: The weight of each, which may be negative. A LoRA of weight 0 is left out.

    Raises:
        MatryoshkaError: The LoRAs are not compatible, or all weights are 0.
    """
    loras = compatible(loras)
    loras = [lora for lora, weight in zip(loras, weights, strict=True) if weight != 0]
    weights = [weight for weight in weights if weight != 0]
    if not loras:
        raise MatryoshkaError("All `weights` are 0. Pass at least one other weight.")
    terms: dict[str, list[tuple[Lora, Layer, float]]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for layer in lora.layers:
            terms.setdefault(layer.name, []).append((lora, layer, weight))
    layers = tuple(
        sum_layers(
            [layer for _, layer, _ in terms[name]],
            [weight for _, _, weight in terms[name]],
            sources=[lora.name for lora, _, _ in terms[name]],
        )
        for name in sorted(terms)
    )
    for lora in loras:
        if lora.small is not None:
            warnings.warn(
                f"{lora.name} is combined as its rank {lora.max_rank}, without the trained ranks "
                f"up to {lora.small_rank}.",
                stacklevel=3,
            )
    # A name that is not UTF-8 has lone surrogates, which a header cannot hold.
    names = [printable(Path(lora.name).name) for lora in loras]
    parts = [f"{weight:g} x {name}" for weight, name in zip(weights, names, strict=True)]
    total = replace(
        loras[0],
        name=" + ".join(lora.name for lora in loras),
        layers=layers,
        files=tuple(file for lora in loras for file in lora.files),
        nesting=None,
        order=None,
        small=None,
        deploy="reordered",
        original_error=0.0,  # the sum is a new original
        scores=(),
        changes=(f"sum of {', '.join(parts)}",),
    )
    if total.container == "peft":
        return replace(total, config=_merge_configs([lora.config for lora in loras], layers))
    return replace(
        total,
        metadata=combined_metadata([lora.metadata for lora in loras]),
        other_tensors=_sum_weight_changes(loras, weights),
    )


def compatible(loras: Sequence[Lora]) -> list[Lora]:
    """Return LoRAs with the same names for the same modules, so that they can be added.

    Single files get the keys of the first one. Layers that are split or fused may get other ranks.

    Raises:
        MatryoshkaError: They are of different kinds or for different base models, or have tensors
            that cannot be added.
    """
    for lora, other in combinations_with_replacement(loras, 2):
        _check_compatible(lora, other)
    return match_key_formats(loras) if loras[0].container == "single" else list(loras)


def cosines(loras: Sequence[Lora]) -> Float64Array:
    """Return the cosine between the updates of each pair of LoRAs, over all layers.

    All factors are read. A LoRA without any update has the cosine 0.

    Args:
        loras: LoRAs that are `compatible`.

    Returns:
        Shape (n, n): 0 for unrelated updates, 1 for the same direction, negative for opposed ones.
    """
    layers = [{layer.name: layer for layer in lora.layers} for lora in loras]
    products = np.zeros((len(loras), len(loras)))
    with single_threaded():
        for name in progress_bar(sorted(set().union(*layers)), "comparing"):
            with_layer = [index for index in range(len(loras)) if name in layers[index]]
            factors: list[tuple[Array, Array]] = []
            for index in with_layer:
                A, B = layers[index][name].read()[:2]
                factors.append((layers[index][name].scale * A.astype(np.float64), B))
            products[np.ix_(with_layer, with_layer)] += inner_products(factors)
    norms = np.sqrt(np.diag(products))
    norms[norms == 0] = 1.0
    result: Float64Array = products / np.outer(norms, norms)
    return result


def sum_layers(
    layers: Sequence[Layer], weights: Sequence[float], *, sources: Sequence[str] = ()
) -> Layer:
    """Return a layer whose update is the weighted sum of the updates of some layers.

    It has the name and the keys of the first one. Messages name the sources, the file of each.
    """
    first = layers[0]
    shapes = {(layer.num_experts, layer.in_shape, layer.out_features) for layer in layers}
    if len(shapes) > 1:
        shapes_of_factors = [f"{list(layer.shape_A)}, {list(layer.shape_B)}" for layer in layers]
        if sources:
            named = zip(shapes_of_factors, sources, strict=True)
            shapes_of_factors = [f"{text} in {source}" for text, source in named]
        raise MatryoshkaError(
            f"The factors of {first.name} have different shapes: {'; '.join(shapes_of_factors)}. "
            "Pass LoRAs of one base model."
        )
    # A common scale is kept. So the sum is also right in programs that ignore a scale in the
    # metadata, such as ComfyUI.
    scales = {layer.scale for layer in layers}
    scale = scales.pop() if len(scales) == 1 else 1.0

    def read() -> Factors:
        factors = [layer.read()[:2] for layer in layers]
        scaled_weights = [
            weight * (layer.scale / scale) for layer, weight in zip(layers, weights, strict=True)
        ]
        return Factors(*weighted_sum(factors, scaled_weights))

    alpha = next((layer.keys.alpha for layer in layers if layer.keys.alpha), None)
    return replace(
        first,
        rank=sum(layer.rank for layer in layers),
        scale=scale,
        dtype=common_dtype(layer.dtype for layer in layers),
        read=read,
        read_svd=None,
        keys=first.keys._replace(alpha=alpha),
        kind="LoRA",
        has_new_factors=True,
    )


def _merge_configs(configs: Sequence[Mapping[str, Any]], layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the first config, changed so that its targets are all layers of the sum."""
    first = dict(configs[0])
    for config in configs:
        if any(config.get(field) != first.get(field) for field in TARGET_FIELDS):
            # The layers are listed by name instead. PEFT selects stacks of experts by
            # target_parameters.
            names = [layer.name for layer in layers if layer.num_experts == 1]
            return {**first, **dict.fromkeys(TARGET_FIELDS), "target_modules": names}
    return first


def _check_compatible(first: Lora, lora: Lora) -> None:
    """Raise MatryoshkaError unless two LoRAs can be added."""
    if first.container != lora.container:
        raise MatryoshkaError(
            f"{first.name} and {lora.name} are a folder and a single file. Convert the file to a "
            "folder with export and `key_format='peft'`."
        )
    for field in _COMMON_FIELDS:
        # None, "" and an absent field mean the same.
        value, first_value = lora.config.get(field) or None, first.config.get(field) or None
        if value != first_value:
            raise MatryoshkaError(
                f"{lora.name} and {first.name} differ in {field}: {short(value)} and "
                f"{short(first_value)}. If they are equivalent, write the same value in both "
                "configs."
            )
    for key in sorted({*first.other_tensors, *lora.other_tensors}):
        tensor, first_tensor = lora.other_tensors.get(key), first.other_tensors.get(key)
        if lora.container == "single":
            tensors = [tensor for tensor in (tensor, first_tensor) if tensor is not None]
            can_add = WEIGHT_CHANGE.fullmatch(key) is not None and all(
                tensor.widened().is_float for tensor in tensors
            )
        else:
            can_add = (
                tensor is not None
                and first_tensor is not None
                and tensor.dtype == first_tensor.dtype
                and np.array_equal(tensor.read(), first_tensor.read())
            )
        if not can_add:
            hint = "Train without such tensors, or remove them from the files."
            if key.endswith(".dora_scale"):
                hint = f"It is DoRA. {DORA_HINT}"
            raise MatryoshkaError(
                f"{lora.name} and {first.name} cannot be added, because {short(key)} is not a LoRA "
                f"factor. {hint}"
            )


def _sum_weight_changes(loras: Sequence[Lora], weights: Sequence[float]) -> dict[str, StoredTensor]:
    """Return the weighted sum of the changes of each weight, by key. It is computed when read.

    Raises:
        MatryoshkaError: Shapes differ, or one weight is changed in two ways, of which programs
            would use only one.
    """
    terms: dict[str, list[tuple[float, StoredTensor]]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for key, tensor in lora.other_tensors.items():
            terms.setdefault(key, []).append((weight, tensor.widened()))
    layer_names = {layer.name for lora in loras for layer in lora.layers}
    kinds = {(module, "weight"): "factors" for name in layer_names for module in module_names(name)}
    sums: dict[str, StoredTensor] = {}
    for key in sorted(terms):
        match = WEIGHT_CHANGE.fullmatch(key)
        assert match is not None  # `_check_compatible`
        parameter = "weight" if match["kind"] in ("diff", "w_norm") else "bias"
        other_kind = kinds.setdefault((match["module"], parameter), match["kind"])
        if other_kind != match["kind"]:
            raise MatryoshkaError(
                f"{short(match['module'])} has {other_kind} and {match['kind']}, of which programs "
                "use only one. Remove one of them from its file."
            )
        sums[key] = sum_tensors(key, terms[key])
    return sums
