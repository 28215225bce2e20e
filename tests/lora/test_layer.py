"""A layer in memory: its factors in a file's layout, and factors that are not finite."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.layers import make_layer, update_of

from matryoshka_lora import NotFiniteError
from matryoshka_lora.linalg.arrays import BFLOAT16, FLOATS8
from matryoshka_lora.lora.layer import Layer, LayerKeys, StoredTensor

KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "convolution": {"in_shape": (4, 3, 2)},
    "experts": {"num_experts": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_a_file_become_matrices_and_back(kind: str) -> None:
    """PEFT stacks the rows of A expert by expert, and interleaves the columns of B."""
    rank, num_experts = 2, KINDS[kind].get("num_experts", 1)
    in_shape = KINDS[kind].get("in_shape", (5,))
    A = np.arange(rank * num_experts * np.prod(in_shape), dtype=np.float32)
    A = A.reshape(rank * num_experts, *in_shape)
    B = np.arange(7.0 * rank * num_experts, dtype=np.float32)
    B = B.reshape(7, rank * num_experts, *[1] * (len(in_shape) - 1))
    tensors = StoredTensor.from_array(A), StoredTensor.from_array(B)
    layer = Layer.from_tensors("a", *tensors, 1.0, LayerKeys("A", "B"), num_experts)
    assert (layer.rank, layer.shape_A, layer.shape_B) == (rank, A.shape, B.shape)
    assert layer.parameters_per_rank == (A.size + B.size) / rank
    factors = layer.read()
    flat_A, flat_B = A.reshape(len(A), -1), B.reshape(7, -1)
    for expert in range(num_experts):
        expert_A = factors.A[expert] if num_experts > 1 else factors.A
        expert_B = factors.B[expert] if num_experts > 1 else factors.B
        np.testing.assert_array_equal(expert_A, flat_A[expert * rank : (expert + 1) * rank])
        np.testing.assert_array_equal(expert_B, flat_B[:, expert::num_experts])
    for tensor, expected in zip(layer.to_tensors(factors), (A, B), strict=True):
        np.testing.assert_array_equal(tensor, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_singular_values_and_another_scale(kind: str) -> None:
    layer = make_layer(**KINDS[kind])
    update = update_of(layer)
    expected = np.linalg.svd(update, compute_uv=False)[..., : layer.rank]
    np.testing.assert_allclose(layer.singular_values(), expected, atol=1e-6)
    rescaled = layer.with_scale(2.0)
    assert rescaled.scale == 2.0
    np.testing.assert_allclose(update_of(rescaled), update, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_factors_that_are_not_finite_are_rejected(value: float, dtype: Any) -> None:
    layer = make_layer("model.layer", dtype=dtype, first=value)
    for action in (layer.read, layer.singular_values):
        with pytest.raises(NotFiniteError, match=r"model\.layer"):
            action()


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        (BFLOAT16, (3, 4), True),
        (np.float64, (3, 4, 1, 1), True),
        (FLOATS8["F8_E4M3"], (3, 4), False),
        (np.int32, (3, 4), False),
        (np.float32, (3,), False),
        (np.float32, (0, 4), False),
    ],
)
def test_is_factor(dtype: Any, shape: tuple[int, ...], expected: bool) -> None:
    assert StoredTensor.from_array(np.zeros(shape, dtype)).is_factor == expected


def test_float8_is_widened_without_rounding() -> None:
    array = np.array([1.5, -448.0], FLOATS8["F8_E4M3"])
    widened = StoredTensor.from_array(array).widened()
    assert widened.dtype == widened.read().dtype == BFLOAT16
    np.testing.assert_array_equal(widened.read().astype(float), array.astype(float))
