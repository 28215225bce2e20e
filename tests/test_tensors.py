"""Tensors become arrays and back, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from matryoshka_lora.tensors import to_numpy, to_numpy_dtype, to_torch

DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
    torch.int64: np.int64,
    torch.bool: np.bool_,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2, 3, 4)])
def test_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 4).to(dtype)
    array = to_numpy(tensor)
    assert array.dtype == DTYPES[dtype] == to_numpy_dtype(dtype)
    np.testing.assert_array_equal(array.astype(np.float64), tensor.double().numpy())
    back = to_torch(array)
    assert back.dtype == dtype
    assert torch.equal(back.double(), tensor.double())


def test_a_parameter_and_a_transposed_tensor() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4).bfloat16())
    array = to_numpy(parameter.T)
    assert array.shape == (4, 3)
    np.testing.assert_array_equal(array.T.astype(np.float32), parameter.detach().float().numpy())
