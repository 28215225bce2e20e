"""Types of NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]


def common_dtype(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """Return the smallest dtype that represents all values of some floating dtypes."""
    unique = set(dtypes)
    if len(unique) == 1:
        return unique.pop()
    # NumPy has no common dtype of float16 and bfloat16.
    is_double = np.dtype(np.float64) in unique
    return np.dtype(np.float64 if is_double else np.float32)
