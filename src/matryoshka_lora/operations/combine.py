"""Combine LoRAs: write one nested LoRA whose update is a weighted sum of theirs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from matryoshka_lora.errors import MatryoshkaError, check_list
from matryoshka_lora.linalg.arrays import Array, Float64Array, common_dtype
from matryoshka_lora.linalg.factors import inner_products, weighted_sum
from matryoshka_lora.lora_file.atomic import PathLike, check_output
from matryoshka_lora.lora_file.keys.matching import match_key_formats
from matryoshka_lora.lora_file.lora import Layer, LoraFile
from matryoshka_lora.lora_file.open import open_lora
from matryoshka_lora.lora_file.peft_folder import TARGET_FIELDS, PeftFolder
from matryoshka_lora.lora_file.safetensors_io import StoredTensor
from matryoshka_lora.lora_file.single_file import SingleFile
from matryoshka_lora.lora_file.single_file_metadata import combined_metadata
from matryoshka_lora.nesting import Nesting, check_rank, is_valid_scale
from matryoshka_lora.operations.output_format import check_same_kind
from matryoshka_lora.operations.weight_changes import is_weight_change, sum_weight_changes
from matryoshka_lora.progress import progress_bar, single_threaded

# The fields that change what a pair of factors means in the model.
_MEANING_FIELDS = (
    "base_model_name_or_path",
    "fan_in_fan_out",
    "target_parameters",
    "layer_replication",
)


@dataclass(frozen=True)
class CombineResult:
    """What `combine` wrote.

    Attributes:
        path: The folder or file.
        num_layers: The number of its layers.
        size: The size of its weights in bytes.
        rank: Its largest rank.
        exact_rank: The rank with which it would be the exact sum.
        errors: The relative error of each nested rank: the norm of what it misses over the norm of
            the sum.
        cosines: The cosine between the updates of each pair of sources, shape (sources, sources):
            0 if they change a model in unrelated ways, 1 if in the same way, negative if one undoes
            a part of the other. A source without any update has 0.
    """

    path: Path
    num_layers: int
    size: int
    rank: int
    exact_rank: int
    errors: dict[int, float]
    cosines: Float64Array


class _Term(NamedTuple):
    """A layer of a source, and the weight of the source in the sum."""

    lora: LoraFile
    layer: Layer
    weight: float


def combine(
    sources: Iterable[PathLike],
    output: PathLike,
    weights: Iterable[float] | Literal["mean"] | None = None,
    rank: int | Literal["sum"] | None = None,
    *,
    force: bool = False,
) -> CombineResult:
    """Write the weighted sum of LoRAs, ``w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ...``.

    The concatenated factors are the exact sum. They are reordered by QR and SVD, so rank r of the
    output is the best approximation of the sum (Eckart-Young), for every r from 1 to R. A missing
    layer counts as zero. One layer is in memory at a time.

    Args:
        sources: PEFT folders, or single ``.safetensors`` files, all for the same base model.
        output: The folder or file to write, of the same kind as the sources.
        weights: The weight of each source, which may be negative; or ``"mean"``, for 1 / n each.
            Defaults to 1 for all.
        rank: R, at most the sum of the ranks of the sources. ``"sum"`` is that rank, with which the
            output is the exact sum. Defaults to the largest rank of a source.
        force: Whether to overwrite the output.

    Raises:
        MatryoshkaError: A source cannot be read, the sources are not compatible, the rank is not
            available, or the output already exists.
        NotFiniteError: A factor is NaN or infinite.
    """
    sources = check_list("sources", sources)
    if not sources:
        raise MatryoshkaError("`sources` must not be empty.")
    source_weights = _check_weights(weights, len(sources))
    loras = [open_lora(source) for source in sources]
    files = [file for lora in loras for file in lora.sources]
    path = check_output(output, force, files, is_file=isinstance(loras[0], SingleFile))
    check_same_kind(loras[0], path)

    for lora, other in combinations_with_replacement(loras, 2):
        _check_compatible(lora, other)
    single_files = [lora for lora in loras if isinstance(lora, SingleFile)]
    if single_files:
        loras = [*match_key_formats(single_files)]
    total = _weighted_sum(loras, source_weights)
    ranks = [lora.max_rank for lora in loras]
    if rank is None:
        rank = _default_rank(loras)
    rank = sum(ranks) if rank == "sum" else check_rank(rank, max_rank=sum(ranks))
    nesting = Nesting.powers_of_two(rank, scale=total.output_scale)
    if isinstance(total, PeftFolder):
        total = replace(total, nesting=nesting)
        plan = total.plan_nested()
    else:
        plan = total.plan(min(rank, total.max_rank))
    written = plan.write(path, force)
    if not any(squared_errors[0] for squared_errors in written.squared_errors.values()):
        warnings.warn("The sum is zero: the weighted updates cancel.", stacklevel=2)
    return CombineResult(
        path,
        num_layers=len(total.layers),
        size=plan.file_size,
        rank=plan.rank,
        exact_rank=total.max_rank,
        errors=written.relative_errors(nesting.ranks),
        cosines=_cosines(loras),
    )


def _default_rank(loras: Sequence[LoraFile]) -> int:
    """Return the largest rank of a LoRA layer. That of LoKr may be as large as the layer."""
    ranks = [layer.rank for lora in loras for layer in lora.layers if layer.kind == "LoRA"]
    if not ranks:
        raise MatryoshkaError("LoHa and LoKr are combined as LoRA of a rank. Pass `rank`.")
    return max(ranks)


def _check_weights(
    weights: Iterable[float] | Literal["mean"] | None, num_sources: int
) -> list[float]:
    """Return the weight of each source."""
    if weights is None:
        return [1.0] * num_sources
    if isinstance(weights, str) and weights == "mean":
        return [1 / num_sources] * num_sources
    values = check_list("weights", weights)
    if len(values) != num_sources:
        raise MatryoshkaError(
            f"Got {len(values)} weights for {num_sources} sources. Pass one weight per source, "
            "such as 1,0.5 for two."
        )
    return [_check_weight(value) for value in values]


def _check_weight(weight: float) -> float:
    """Return a weight as a float, after checking that it may be a factor of a scale."""
    try:
        value = float(weight)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (value == 0 or is_valid_scale(abs(value))):
        raise MatryoshkaError(f"`weights` must be numbers such as 0.5 or -1, got {weight!r:.80}.")
    return value


def _weighted_sum(loras: Sequence[LoraFile], weights: Sequence[float]) -> LoraFile:
    """Return the sum as a LoRA without an order. Its factors are computed when they are read."""
    first = loras[0]
    terms: dict[str, list[_Term]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for layer in lora.layers:
            terms.setdefault(layer.name, []).append(_Term(lora, layer, weight))

    @lru_cache(maxsize=1)  # A and B of a layer are read one after the other
    def sum_factors(name: str) -> tuple[Array, Array]:
        factors = [term.lora.factors(term.layer) for term in terms[name]]
        scale_of_sum = _scale_of_sum(terms[name])
        scales = [term.weight * (term.layer.scale / scale_of_sum) for term in terms[name]]
        return weighted_sum(factors, scales)

    layers = tuple(_sum_layer(terms[name], sum_factors) for name in sorted(terms))
    _warn_if_wider(layers, terms)
    total = replace(
        first,
        name=" + ".join(lora.name for lora in loras),
        layers=layers,
        files=tuple(file for lora in loras for file in lora.files),
        nesting=None,
        order=None,
        deploy="reordered",
    )
    if isinstance(total, PeftFolder):
        configs = [lora.config for lora in loras if isinstance(lora, PeftFolder)]
        return replace(total, config=_merge_configs(configs, layers))
    metadata = combined_metadata(
        [lora.metadata for lora in loras], [Path(lora.name).name for lora in loras], weights
    )
    return replace(total, metadata=metadata, other_tensors=sum_weight_changes(loras, weights))


def _cosines(loras: Sequence[LoraFile]) -> Float64Array:
    """Return the cosine between the updates of each pair of LoRAs, over all layers."""
    layer_names = sorted({layer.name for lora in loras for layer in lora.layers})
    layers = [{layer.name: layer for layer in lora.layers} for lora in loras]
    products = np.zeros((len(loras), len(loras)))
    with single_threaded():
        for name in progress_bar(layer_names, "comparing"):
            with_layer = [index for index in range(len(loras)) if name in layers[index]]
            factors: list[tuple[Array, Array]] = []
            for index in with_layer:
                A, B = loras[index].factors(layers[index][name])
                factors.append((layers[index][name].scale * A.astype(np.float64), B))
            products[np.ix_(with_layer, with_layer)] += inner_products(factors)
    norms = np.sqrt(np.diag(products))
    norms[norms == 0] = 1.0
    cosines: Float64Array = products / np.outer(norms, norms)
    return cosines


def _scale_of_sum(terms: Sequence[_Term]) -> float:
    """Return the scale of all terms, or 1 if theirs differ.

    Programs that ignore a scale in the metadata, such as ComfyUI, then compute the sum of what they
    compute for the sources.
    """
    scales = {term.layer.scale for term in terms}
    return scales.pop() if len(scales) == 1 else 1.0


def _warn_if_wider(layers: Sequence[Layer], terms: Mapping[str, Sequence[_Term]]) -> None:
    """Warn if a layer has a dtype that no source has: fp32, of fp16 and bf16."""
    for layer in layers:
        factors = [factor for term in terms[layer.name] for factor in (term.layer.A, term.layer.B)]
        dtypes = sorted({str(factor.dtype) for factor in factors})
        if str(layer.A.dtype) not in dtypes:
            warnings.warn(
                f"The output is {layer.A.dtype}, because the sources are {' and '.join(dtypes)}. "
                "Convert them to one dtype for a smaller file.",
                stacklevel=4,
            )
            return


def _sum_layer(terms: Sequence[_Term], sum_factors: Callable[[str], tuple[Array, Array]]) -> Layer:
    """Return the layer whose update is the weighted sum of the updates of some layers.

    Args:
        terms: The layers, which have the same name.
        sum_factors: Returns A and B of the sum, as matrices, by the name of the layers.
    """
    first = terms[0].layer
    shapes = {_shape_without_rank(term.layer) for term in terms}
    if len(shapes) > 1:
        shapes_of_A = ", ".join(f"{list(term.layer.A.shape)} in {term.lora.name}" for term in terms)
        raise MatryoshkaError(
            f"The factors of {first.name} have different shapes: {shapes_of_A}. Pass LoRAs of one "
            "base model."
        )
    key_alpha = None
    for term in terms:
        key_alpha = key_alpha or term.layer.key_alpha
    rank = sum(term.layer.rank for term in terms)
    total = first.with_rank(rank, _scale_of_sum(terms))

    def read_A() -> Array:
        return total.from_matrices(*sum_factors(total.name))[0]

    def read_B() -> Array:
        return total.from_matrices(*sum_factors(total.name))[1]

    dtype = common_dtype([factor.dtype for _, layer, _ in terms for factor in (layer.A, layer.B)])
    A = StoredTensor(dtype, total.A.shape, read_A)
    B = StoredTensor(dtype, total.B.shape, read_B)
    return replace(total.with_factors(A, B), key_alpha=key_alpha)


def _shape_without_rank(layer: Layer) -> tuple[object, ...]:
    return layer.num_experts, layer.A.shape[1:], layer.B.shape[0], layer.B.shape[2:]


def _merge_configs(configs: Sequence[dict[str, Any]], layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the first config, changed so that its targets are all layers of the sum."""
    first = configs[0]
    for config in configs:
        if any(config.get(field) != first.get(field) for field in TARGET_FIELDS):
            # The layers are listed by name instead.
            # PEFT selects stacks of experts by target_parameters.
            names = [layer.name for layer in layers if layer.num_experts == 1]
            return {**first, **dict.fromkeys(TARGET_FIELDS), "target_modules": names}
    return first


def _check_compatible(first: LoraFile, lora: LoraFile) -> None:
    """Raise MatryoshkaError unless two LoRAs can be added."""
    if isinstance(first, PeftFolder) and isinstance(lora, PeftFolder):
        _check_configs(first, lora)
        _check_other_tensors(first, lora)
    elif isinstance(first, SingleFile) and isinstance(lora, SingleFile):
        for key, tensor in sorted({**first.other_tensors, **lora.other_tensors}.items()):
            if not is_weight_change(key, tensor):
                raise _other_tensor_error(first, lora, key)
    else:
        raise MatryoshkaError(
            f"{first.name} and {lora.name} are a folder and a single file. Convert the file to a "
            "folder with export and `key_format='peft'`."
        )


def _check_configs(first: PeftFolder, lora: PeftFolder) -> None:
    for field in _MEANING_FIELDS:
        # None, "" and an absent field mean the same.
        value, first_value = lora.config.get(field) or None, first.config.get(field) or None
        if value != first_value:
            raise MatryoshkaError(
                f"{lora.name} and {first.name} differ in {field}: {value!r:.80} and "
                f"{first_value!r:.80}. If they are equivalent, write the same value in both "
                "configs."
            )


def _check_other_tensors(first: PeftFolder, lora: PeftFolder) -> None:
    """Raise MatryoshkaError unless the tensors that are not factors are the same."""
    for key in sorted({*first.other_tensors, *lora.other_tensors}):
        tensor, first_tensor = lora.other_tensors.get(key), first.other_tensors.get(key)
        if tensor is None or first_tensor is None:
            raise _other_tensor_error(first, lora, key)
        same_dtype = tensor.dtype == first_tensor.dtype
        if not (same_dtype and np.array_equal(tensor.read(), first_tensor.read())):
            raise _other_tensor_error(first, lora, key)


def _other_tensor_error(first: LoraFile, lora: LoraFile, key: str) -> MatryoshkaError:
    return MatryoshkaError(
        f"{lora.name} and {first.name} cannot be added, because {key[:200]} is not a LoRA factor. "
        "Train without such tensors, or remove them from the files."
    )
