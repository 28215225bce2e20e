"""All LoRAs that are applied to a model of ComfyUI, as one LoRA file.

``ModelPatcher.patches`` holds a list for each key of a weight. An entry is (strength, change,
strength of the model, offset, function). The offset (dim, start, length) selects a part of a fused
weight. The function reorders the rows of the change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.linalg.factors import singular_values, weighted_sum
from matryoshka_lora.lora_file.keys.names import DIFFUSERS_SUFFIXES
from matryoshka_lora.lora_file.lora import Layer
from matryoshka_lora.lora_file.safetensors_io import StoredTensor
from matryoshka_lora.lora_file.single_file import SingleFile
from matryoshka_lora.progress import progress_bar, single_threaded
from matryoshka_lora.tensors import to_numpy_dtype

from .adapters import Factors, adapter_factors, to_array

Patch = tuple[float, Any, float, tuple[int, int, int] | None, Callable[..., Any] | None]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes of a file."""


def collect_loras(model: Any, clip: Any, dtype: str) -> SingleFile:
    """Return the sum of all LoRAs on a model, and on its text encoders, as a LoRA in memory.

    The rank of a layer is that of the sum. ComfyUI reads the keys for every architecture.

    Args:
        model: A ``ModelPatcher``.
        clip: A ``CLIP``, or None.
        dtype: A key of `DTYPES`, or ``"auto"`` for the dtype of the LoRAs, and fp32 if they differ.

    Raises:
        MatryoshkaError: Nothing is applied to the model, or something that is not a LoRA.
    """
    layers: list[Layer] = []
    other_tensors: dict[str, StoredTensor] = {}
    parts = [(model, "")]
    if clip is not None:
        parts.append((clip.patcher, "text_encoders."))
    with single_threaded():
        for patcher, prefix in parts:
            weights = patcher.model_state_dict()
            for key in progress_bar(sorted(patcher.patches), "adding"):
                patches = [patch for patch in patcher.patches[key] if patch[0] != 0]
                if not patches:
                    continue
                name = prefix + key.removesuffix(".weight")
                if any(_is_dense(change) for _, change, *_ in patches):
                    other_tensors[_dense_key(prefix + key)] = _dense_sum(key, patches, dtype)
                else:
                    layers.append(_sum_layer(key, name, patches, weights[key].shape, dtype))
    if not layers:
        raise MatryoshkaError(
            "No LoRA is applied to the model. Connect the MODEL output of a LoRA loader."
        )
    layers.sort(key=lambda layer: layer.name)
    metadata = {"format": "pt"}
    return SingleFile("the LoRAs on the model", tuple(layers), other_tensors, metadata)


def _sum_layer(
    key: str, name: str, patches: Sequence[Patch], shape: Sequence[int], dtype: str
) -> Layer:
    """Return the sum of the changes of one weight. Its factors are computed again when read."""

    @lru_cache(maxsize=1)  # A and B are read one after the other
    def sum_factors() -> tuple[np.ndarray, np.ndarray]:
        factors = [_patch_factors(key, patch, shape) for patch in patches]
        if len({(change.A.shape[1], len(change.B)) for change in factors}) > 1:
            raise MatryoshkaError(
                f"The LoRAs on {key} have different shapes. Use LoRAs of this model only."
            )
        pairs = [(change.A, change.B) for change in factors]
        return weighted_sum(pairs, [change.scale for change in factors])

    A, B = sum_factors()
    rank = len(A)
    kernel = tuple(shape[1:])
    if len(shape) < 2 or np.prod(kernel) != A.shape[1]:
        kernel = (A.shape[1],)
    shape_of_A, shape_of_B = (rank, *kernel), (len(B), rank, *[1] * (len(kernel) - 1))
    numpy_dtype = to_numpy_dtype(_file_dtype(patches, dtype))
    sum_factors.cache_clear()
    return Layer(
        name,
        name + DIFFUSERS_SUFFIXES.A,
        name + DIFFUSERS_SUFFIXES.B,
        StoredTensor(numpy_dtype, shape_of_A, lambda: sum_factors()[0].reshape(shape_of_A)),
        StoredTensor(numpy_dtype, shape_of_B, lambda: sum_factors()[1].reshape(shape_of_B)),
        rank,
        scale=1.0,
        # Loaders that expect one alpha for all layers would compute other strengths without it.
        key_alpha=f"{name}.alpha",
    )


def ranks_of_sum(lora: SingleFile, max_rank: int | None) -> dict[str, int]:
    """Return the smallest rank of each layer that is exact, or a maximum where it is smaller."""
    ranks: dict[str, int] = {}
    with single_threaded():
        for layer in progress_bar(lora.layers, "ranks"):
            rank = max(1, int(np.count_nonzero(singular_values(*lora.factors(layer)))))
            ranks[layer.name] = rank if max_rank is None else min(rank, max_rank)
    return ranks


def _patch_factors(key: str, patch: Patch, shape: Sequence[int]) -> Factors:
    """Return the factors of an entry of a list of patches, for the whole weight."""
    strength, adapter, strength_of_model, offset, function = patch
    _check_strength(key, strength_of_model)
    A, B, scale = adapter_factors(key, adapter)
    if function is not None:
        B = _reorder_rows(key, function, A, B)
    if offset is not None:
        dim, start, length = offset
        A_or_B, axis = (B, 0) if dim == 0 else (A, 1)
        if dim > 1 or A_or_B.shape[axis] != length:
            raise MatryoshkaError(
                f"The LoRA on a part of {key} has another shape than this part. Use LoRAs of this "
                "model only."
            )
        widths = [(0, 0), (0, 0)]
        widths[axis] = (start, shape[dim] - start - length)
        padded = np.pad(A_or_B, widths)
        A, B = (A, padded) if dim == 0 else (padded, B)
    return Factors(A, B, strength * scale)


def _reorder_rows(
    key: str, function: Callable[..., Any], A: np.ndarray, B: np.ndarray
) -> np.ndarray:
    """Return B after a function of the change ``B A`` that is a function of its rows."""
    new_B = function(torch.from_numpy(B)).numpy()
    change = function(torch.from_numpy(B @ A)).numpy()
    if not np.allclose(new_B @ A, change, rtol=1e-9, atol=1e-9 * np.abs(change).max()):
        raise MatryoshkaError(
            f"ComfyUI transforms the LoRA on {key} in a way that cannot be saved. Remove its "
            "loader from the graph."
        )
    return new_B


def _check_strength(key: str, strength_of_model: float) -> None:
    if strength_of_model != 1:
        raise MatryoshkaError(
            f"{key} belongs to a merge of models, not only to LoRAs. Connect the model before the "
            "merge."
        )


def _is_dense(change: Any) -> bool:
    return isinstance(change, (tuple, list))


def _dense_key(key: str) -> str:
    """Return the key of a dense change of a weight or bias, as ComfyUI reads it."""
    if key.endswith(".bias"):
        return f"{key.removesuffix('.bias')}.diff_b"
    return f"{key.removesuffix('.weight')}.diff"


def _dense_sum(key: str, patches: Sequence[Patch], dtype: str) -> StoredTensor:
    """Return the sum of dense changes of one weight, such as a bias or the scale of a norm."""
    total: np.ndarray | None = None
    tensors: list[torch.Tensor] = []
    for strength, change, strength_of_model, offset, function in patches:
        _check_strength(key, strength_of_model)
        tensor = _dense_tensor(change)
        if tensor is None or offset is not None or function is not None:
            kind = change[0] if _is_dense(change) else getattr(change, "name", "unknown")
            raise MatryoshkaError(
                f"The change of {key} has the kind {str(kind)!r:.40}, which cannot be added to the "
                "others. Remove its loader from the graph."
            )
        term = strength * to_array(tensor)
        total = term if total is None else total + term
        tensors.append(tensor)
    assert total is not None
    return StoredTensor.from_array(total.astype(to_numpy_dtype(_dtype_of(tensors, dtype))))


def _dense_tensor(change: Any) -> torch.Tensor | None:
    """Return the tensor of a ``("diff", (tensor,))``, or None for another change."""
    if not isinstance(change, tuple) or len(change) != 2 or change[0] != "diff":
        return None
    tensor, *options = change[1]
    return None if options else tensor


def _file_dtype(patches: Sequence[Patch], dtype: str) -> torch.dtype:
    tensors = [
        weight
        for _, adapter, *_ in patches
        for weight in adapter.weights
        if isinstance(weight, torch.Tensor)
    ]
    return _dtype_of(tensors, dtype)


def _dtype_of(tensors: Sequence[torch.Tensor], dtype: str) -> torch.dtype:
    """Return the dtype of a sum: the requested one, or that of all terms."""
    if dtype != "auto":
        return DTYPES[dtype]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16}:
        return dtypes.pop()
    return torch.float32
