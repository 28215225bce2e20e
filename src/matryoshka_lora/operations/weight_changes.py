"""Sum the changes of weights that single files store in full.

LyCORIS and ComfyUI write ``NAME.diff`` and ``NAME.diff_b`` for the weight and the bias of a module,
and LyCORIS ``NAME.w_norm`` and ``NAME.b_norm`` for those of a norm. Programs add them to the model,
multiplied by the strength of the LoRA and not by an alpha.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.linalg.arrays import Array, common_dtype
from matryoshka_lora.lora_file.alphas import module_names
from matryoshka_lora.lora_file.lora import LoraFile
from matryoshka_lora.lora_file.safetensors_io import StoredTensor

_KEY = re.compile(r"(?P<module>.+)\.(?P<kind>diff|diff_b|w_norm|b_norm)")
_WEIGHT_KINDS = ("diff", "w_norm")


def is_weight_change(key: str, tensor: StoredTensor) -> bool:
    """Return whether a tensor is the change of a weight or a bias, stored in full."""
    return _KEY.fullmatch(key) is not None and tensor.widened().is_float


def sum_weight_changes(
    loras: Sequence[LoraFile], weights: Sequence[float]
) -> dict[str, StoredTensor]:
    """Return the weighted sum of the changes of each weight, by key. It is computed when read.

    Args:
        loras: Files whose other tensors are all changes of weights. A missing one counts as zero.
        weights: The weight of each file.

    Raises:
        MatryoshkaError: Shapes differ, or one weight is changed in two ways.
    """
    terms: dict[str, list[tuple[float, StoredTensor]]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for key, tensor in lora.other_tensors.items():
            terms.setdefault(key, []).append((weight, tensor.widened()))
    _check_kinds(loras, terms)
    return {key: _weighted_sum(key, terms[key]) for key in sorted(terms)}


def _check_kinds(loras: Sequence[LoraFile], keys: Iterable[str]) -> None:
    """Raise MatryoshkaError if one weight is changed in two ways. Programs would use only one."""
    kinds = {
        (module, "weight"): "factors"
        for lora in loras
        for layer in lora.layers
        for module in module_names(layer.name)
    }
    for key in keys:
        match = _KEY.fullmatch(key)
        assert match is not None  # `is_weight_change`
        parameter = "weight" if match["kind"] in _WEIGHT_KINDS else "bias"
        other_kind = kinds.setdefault((match["module"], parameter), match["kind"])
        if other_kind != match["kind"]:
            raise MatryoshkaError(
                f"{match['module'][:200]} has {other_kind} and {match['kind']}, of which programs "
                "use only one. Remove one of them from its file."
            )


def _weighted_sum(key: str, terms: Sequence[tuple[float, StoredTensor]]) -> StoredTensor:
    shapes = {tensor.shape for _, tensor in terms}
    if len(shapes) > 1:
        raise MatryoshkaError(
            f"{key[:200]} has different shapes: {', '.join(str(list(s)) for s in sorted(shapes))}. "
            "Pass LoRAs of one base model."
        )
    dtype = common_dtype(tensor.dtype for _, tensor in terms)

    def read() -> Array:
        total = np.zeros(terms[0][1].shape)
        for weight, tensor in terms:
            total += weight * tensor.read().astype(np.float64)
        with np.errstate(over="ignore"):
            result = total.astype(dtype)
        if not np.isfinite(result).all():
            raise NotFiniteError(f"The sum of {key[:200]} is NaN, or too large for {dtype}.")
        return result

    return StoredTensor(dtype, terms[0][1].shape, read)
