"""Types of NumPy arrays, and the floating dtypes of files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
DType = np.dtype[Any]

BFLOAT16: DType = np.dtype(ml_dtypes.bfloat16)
FLOATS: dict[str, DType] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
}
"""The floating dtypes of at least 16 bits by their names in safetensors."""
FLOATS8: dict[str, DType] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""The float8 dtypes by their names in safetensors."""


def common_dtype(dtypes: Iterable[DType]) -> DType:
    """Return the smallest dtype that represents all values of some floating dtypes."""
    unique = set(dtypes)
    if len(unique) == 1:
        return unique.pop()
    # NumPy has no common dtype of float16 and bfloat16.
    is_double = np.dtype(np.float64) in unique
    return np.dtype(np.float64 if is_double else np.float32)


def cast(array: Array, dtype: DType) -> Array:
    """Return an array in a dtype. Values that are too large become infinite, without a warning."""
    with np.errstate(over="ignore"):
        if array.dtype == np.float64 and dtype == BFLOAT16:
            # Directly, ml_dtypes takes ten times as long. The error is at most 2^-17 of a step
            # above half a step.
            array = array.astype(np.float32)
        return array.astype(dtype, copy=False)


def is_finite(array: Array) -> bool:
    """Return whether no value of a floating array is NaN, or infinite in float32.

    Norms of larger float64 values would be infinite.
    """
    if array.dtype.itemsize == 2:  # np.isfinite is slow for these
        exponent = np.array(np.inf, array.dtype).view(np.uint16)
        return bool(((array.view(np.uint16) & exponent) != exponent).all())
    return bool(np.isfinite(cast(array, np.dtype(np.float32))).all())


def transpose(matrices: Array) -> Array:
    """Return the transposes of matrices, (..., m, n) to (..., n, m). ``.mT`` needs NumPy 2."""
    return matrices.swapaxes(-1, -2)
