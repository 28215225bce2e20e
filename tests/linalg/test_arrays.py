"""Casts to the dtypes of files, and the check for values that are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ml_dtypes import finfo

from matryoshka_lora.linalg.arrays import BFLOAT16, cast, is_finite

DTYPES = [np.float16, BFLOAT16, np.float32, np.float64]


def test_a_cast_to_bfloat16_rounds_to_a_nearest_value() -> None:
    """Also in the middle of two values, where rounding to float32 first may decide."""
    generator = np.random.default_rng(0)
    array = generator.standard_normal(10_000) * 2.0 ** generator.integers(-20, 20, 10_000)
    step = 2.0 ** (np.floor(np.log2(np.abs(array))) - 7)
    array[:100] = np.floor(array[:100] / step[:100]) * step[:100] + step[:100] / 2
    array[:50] += 2.0**-20 * step[:50]
    actual = cast(array, BFLOAT16)
    assert actual.dtype == BFLOAT16
    assert (np.abs(actual.astype(np.float64) - array) <= (1 / 2 + 2.0**-17) * step).all()
    np.testing.assert_array_equal(actual[100:], array[100:].astype(BFLOAT16))
    assert np.isinf(cast(np.array([1e300]), BFLOAT16)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_finite(dtype: Any) -> None:
    largest = min(float(finfo(dtype).max), float(finfo(np.float32).max))
    finite = np.array([[0.0, -largest], [largest, 1e-7]]).astype(dtype)
    assert is_finite(finite)
    assert is_finite(finite.T)
    for value in (np.nan, np.inf, -np.inf):
        array = finite.copy()
        array[1, 0] = value
        assert not is_finite(array)
        assert not is_finite(array.T)
    assert not is_finite(np.array([1e300]))
