"""The adapters that ComfyUI applies to a weight, as layers of a LoRA."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import matryoshka_lora as ml
from matryoshka_lora.formats.lycoris import read_lycoris_layers
from matryoshka_lora.lora.layer import LayerKeys, StoredTensor
from matryoshka_lora.tensors import to_numpy, to_numpy_dtype

SOURCE = "the LoRAs on the model"

WEIGHTS = {
    "lora": "lora_up lora_down alpha lora_mid dora_scale reshape_weight",
    "loha": "hada_w1_a hada_w1_b alpha hada_w2_a hada_w2_b hada_t1 hada_t2 dora_scale",
    "lokr": "lokr_w1 lokr_w2 alpha lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b lokr_t2 dora_scale",
}
"""The names in a file of ``WeightAdapterBase.weights``, by the kind of adapter."""


def store_tensor(tensor: torch.Tensor) -> StoredTensor:
    """Return a tensor of any dtype and device as one that is copied to NumPy when it is read."""
    dtype = to_numpy_dtype(tensor.dtype)
    return StoredTensor(dtype, tuple(tensor.shape), lambda: to_numpy(tensor)).widened()


def read_adapter(key: str, name: str, adapter: Any) -> ml.Layer | None:
    """Return an adapter as a layer, or None if its alpha is 0.

    Args:
        key: The key of the weight, for messages.
        name: The name of the layer.
        adapter: A ``comfy.weight_adapter.WeightAdapterBase``.

    Raises:
        MatryoshkaError: The adapter is not a sum of products of factors.
        NotFiniteError: A factor is NaN or infinite. It is raised when the layer is read.
    """
    kind = getattr(adapter, "name", type(adapter).__name__)
    if kind not in WEIGHTS:
        raise ml.MatryoshkaError(
            f"The change of {key} has the kind {kind!r}, which cannot be saved as a LoRA. Remove "
            "its loader from the graph."
        )
    weights = dict(zip(WEIGHTS[kind].split(), adapter.weights, strict=True))
    alpha = weights.pop("alpha")
    if weights.pop("dora_scale") is not None:
        raise ml.MatryoshkaError(
            f"The change of {key} is DoRA, which depends on the weight and cannot be saved as a "
            "LoRA. Remove its loader from the graph, or convert the file with matryoshka extract."
        )
    if weights.pop("reshape_weight", None) is not None:
        raise ml.MatryoshkaError(
            f"The LoRA changes the shape of {key}, which a sum of LoRAs cannot. Remove its loader "
            "from the graph."
        )
    tensors = {
        weight: store_tensor(tensor) for weight, tensor in weights.items() if tensor is not None
    }

    def read_scale(_name: str, rank: int, _key_alpha: str | None) -> float:
        return 1.0 if alpha is None else float(alpha) / rank

    if kind != "lora":
        named_tensors = {f"{name}.{weight}": tensor for weight, tensor in tensors.items()}
        layers, _ = read_lycoris_layers(named_tensors, read_scale, SOURCE)
        return layers[0] if layers else None
    A, B = tensors["lora_down"], tensors["lora_up"]
    scale = read_scale(name, A.shape[0], None)
    if scale == 0:
        return None
    if "lora_mid" in tensors:
        A = _with_kernel(A, tensors["lora_mid"])
    layer = ml.Layer.from_tensors(name, A, B, 1.0, LayerKeys("", ""), source=SOURCE)

    def multiply(factors: ml.Factors) -> ml.Factors:
        return factors._replace(B=scale * factors.B.astype(np.float64))  # it may be negative

    return layer.map(multiply)


def _with_kernel(A: StoredTensor, mid: StoredTensor) -> StoredTensor:
    """Return A of LoCon, multiplied by the mid matrix, which has the kernel."""

    def read() -> np.ndarray:
        matrix = A.read().reshape(A.shape[0], -1).astype(np.float64)
        product: np.ndarray = np.einsum("rc...,ci->ri...", mid.read().astype(np.float64), matrix)
        return product

    return StoredTensor(A.dtype, (mid.shape[0], A.shape[1], *mid.shape[2:]), read)
