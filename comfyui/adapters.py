"""The adapters that ComfyUI applies to a weight, as the factors of a LoRA.

The change of a weight is ``scale * B A``, with A of shape (R, in) and B of shape (out, R). Kernels
of convolutions are flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.linalg.kronecker import elementwise_product


class Factors(NamedTuple):
    """The factors of a change, float64, and its scale."""

    A: np.ndarray
    B: np.ndarray
    scale: float


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor of any dtype and device as float64."""
    return tensor.detach().to("cpu", torch.float64).numpy()


def adapter_factors(key: str, adapter: Any) -> Factors:
    """Return the factors of an adapter.

    Args:
        key: The key of the weight, for messages.
        adapter: A ``comfy.weight_adapter.WeightAdapterBase``.

    Raises:
        MatryoshkaError: The adapter is not a sum of products of factors.
    """
    kind = getattr(adapter, "name", type(adapter).__name__)
    if kind not in _READERS:
        raise MatryoshkaError(
            f"The change of {key} has the kind {kind!r}, which cannot be saved as a LoRA. Remove "
            "its loader from the graph."
        )
    return _READERS[kind](key, adapter.weights)


def _check_no_dora(key: str, dora_scale: Any) -> None:
    if dora_scale is not None:
        raise MatryoshkaError(
            f"The change of {key} is DoRA, which depends on the weight and cannot be saved as a "
            "LoRA. Remove its loader from the graph."
        )


def _lora_factors(key: str, weights: Sequence[Any]) -> Factors:
    up, down, alpha, mid, dora_scale, new_shape = weights
    _check_no_dora(key, dora_scale)
    if new_shape is not None:
        raise MatryoshkaError(
            f"The LoRA changes the shape of {key}, which a sum of LoRAs cannot. Remove its loader "
            "from the graph."
        )
    A, B = to_array(down), to_array(up)
    rank = len(A)
    if mid is not None:
        # LoCon: the kernel of the third factor, between the two others.
        A = np.einsum("rc...,ci->ri...", to_array(mid), A.reshape(rank, -1))
    scale = 1.0 if alpha is None else alpha / rank
    return Factors(A.reshape(len(A), -1), B.reshape(len(B), -1), scale)


def _loha_factors(key: str, weights: Sequence[Any]) -> Factors:
    B1, A1, alpha, B2, A2, kernel1, kernel2, dora_scale = weights
    _check_no_dora(key, dora_scale)
    if kernel1 is not None or kernel2 is not None:
        raise MatryoshkaError(
            f"The change of {key} is a LoHa of a convolution, which cannot be saved as a LoRA. "
            "Remove its loader from the graph."
        )
    A, B = elementwise_product(to_array(B1), to_array(A1), to_array(B2), to_array(A2))
    return Factors(A, B, 1.0 if alpha is None else alpha / len(A1))


def _lokr_factors(key: str, weights: Sequence[Any]) -> Factors:
    w1, w2, alpha, B1, A1, B2, A2, kernel, dora_scale = weights
    _check_no_dora(key, dora_scale)
    rank = None
    if w1 is None:
        rank = len(A1)
        first = to_array(A1), to_array(B1)
    else:
        first = _factorize(to_array(w1))
    if w2 is not None:
        second = _factorize(to_array(w2))
    elif kernel is None:
        rank = len(A2)
        second = to_array(A2), to_array(B2)
    else:
        rank = len(A2)
        A = np.einsum("ij...,jr->ir...", to_array(kernel), to_array(A2))
        second = A.reshape(len(A), -1), to_array(B2).T
    # The Kronecker product of two products is the product of the Kronecker products.
    A, B = np.kron(first[0], second[0]), np.kron(first[1], second[1])
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    return Factors(A, B, scale)


def _factorize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of a matrix, one of which is the identity."""
    matrix = matrix.reshape(len(matrix), -1)
    num_rows, num_columns = matrix.shape
    if num_rows <= num_columns:
        return matrix, np.eye(num_rows)
    return np.eye(num_columns), matrix


_READERS: dict[str, Callable[[str, Sequence[Any]], Factors]] = {
    "lora": _lora_factors,
    "loha": _loha_factors,
    "lokr": _lokr_factors,
}
