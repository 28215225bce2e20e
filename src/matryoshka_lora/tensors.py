"""Tensors as NumPy arrays, the dtypes of computations, and the modes of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from matryoshka_lora.linalg.arrays import Array, DType

# Dtypes without a direct torch-NumPy conversion, reinterpreted as integers.
_EXTENSION_DTYPES = [
    (torch.bfloat16, np.dtype(ml_dtypes.bfloat16), torch.int16, np.dtype(np.int16)),
    (torch.float8_e4m3fn, np.dtype(ml_dtypes.float8_e4m3fn), torch.uint8, np.dtype(np.uint8)),
    (torch.float8_e5m2, np.dtype(ml_dtypes.float8_e5m2), torch.uint8, np.dtype(np.uint8)),
]


def to_numpy(tensor: Tensor) -> Array:
    """Return a tensor as an array of the same dtype.

    Args:
        tensor: Any shape, dtype and device.

    Returns:
        An array that shares memory with a CPU tensor. Dtypes that NumPy lacks are from
        ml_dtypes.
    """
    tensor = tensor.detach().cpu()
    for torch_dtype, numpy_dtype, torch_bits, _ in _EXTENSION_DTYPES:
        if tensor.dtype == torch_dtype:
            return tensor.view(torch_bits).numpy().view(numpy_dtype)
    return tensor.numpy()


def to_torch(array: Array) -> Tensor:
    """Return an array as a CPU tensor of the same dtype, which shares its memory."""
    for torch_dtype, numpy_dtype, _, numpy_bits in _EXTENSION_DTYPES:
        if array.dtype == numpy_dtype:
            return torch.from_numpy(array.view(numpy_bits)).view(torch_dtype)
    return torch.from_numpy(array)


def to_numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return NumPy's dtype for one of torch."""
    return to_numpy(torch.empty(0, dtype=dtype)).dtype


def to_torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's dtype for one of NumPy."""
    return to_torch(np.empty(0, dtype)).dtype


def at_least_float32(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Cast to `dtype` (default: its own), promoted to at least float32.

    A diagonal in half precision would scale whole columns wrongly.
    """
    return tensor.to(torch.promote_types(dtype or tensor.dtype, torch.float32))


def cpu_has_bf16() -> bool:
    """Return whether the CPU has instructions for bfloat16, which is very slow without them."""
    capabilities: Mapping[str, Any] = {}
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Restore the train or eval mode of each module at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
