"""Write a LoRA for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from matryoshka_lora.atomic import CREATED_WITH
from matryoshka_lora.errors import MatryoshkaError, check_integer, optional_imports
from matryoshka_lora.formats.runtimes import SUPPORTED_ARCHITECTURES, read_base_config
from matryoshka_lora.linalg.arrays import Array, Float32Array
from matryoshka_lora.lora.layer import Layer
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.save import Written
from matryoshka_lora.registry import Target


def write(lora: Lora, file: Path, target: Target) -> Written:
    """Write one GGUF file in float32.

    llama.cpp multiplies ``B A`` with the file's alpha over the rank of the tensor. A file has one
    alpha, so the scales of the layers are multiplied into B.

    Raises:
        MatryoshkaError: llama.cpp does not support the base model or a layer.
    """
    with optional_imports():
        import gguf

    base_config = read_base_config(lora, target, "llama.cpp")
    architecture = SUPPORTED_ARCHITECTURES[base_config["model_type"]]
    tensor_names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[architecture.upper()], base_config["num_hidden_layers"]
    )
    names: dict[str, str] = {}
    num_heads: dict[str, int] = {}
    for layer in lora.layers:
        name = tensor_names.get_name(f"{layer.name}.weight", try_suffixes=(".weight",))
        if name is None:
            raise MatryoshkaError(
                f"llama.cpp has no name for {layer.name}, so it cannot be exported to GGUF."
            )
        names[layer.name] = name
        if architecture == "llama" and layer.name.endswith((".q_proj", ".k_proj")):
            num_heads[layer.name] = _count_heads(layer, base_config)
    alpha = float(lora.max_rank)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_description(CREATED_WITH)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    written = Written(lora.ranks)
    for layer, factors in written.compute(lora):
        scaled_B = factors.B.astype(np.float32) * (layer.scale * layer.rank / alpha)
        if layer.name in num_heads:
            scaled_B = _permute_heads(scaled_B, num_heads[layer.name])
        writer.add_tensor(f"{names[layer.name]}.lora_a", _checked_array(factors.A))
        writer.add_tensor(f"{names[layer.name]}.lora_b", _checked_array(scaled_B))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


class _CheckedArray(np.ndarray[Any, Any]):
    """An array that reports a full disk, which NumPy's ``tofile`` ignores."""

    def tofile(self, file: BinaryIO) -> None:  # type: ignore[override]
        """Write the elements into a file; gguf calls this."""
        file.write(self.data)


def _checked_array(array: Array) -> _CheckedArray:
    return np.ascontiguousarray(array, dtype=np.float32).view(_CheckedArray)


def _count_heads(layer: Layer, base_config: Mapping[str, Any]) -> int:
    """Return the number of heads of a query or key projection."""
    field = "num_attention_heads"
    if layer.name.endswith("k_proj") and base_config.get("num_key_value_heads") is not None:
        field = "num_key_value_heads"
    num_heads = check_integer(field, base_config.get(field))
    if layer.out_features % (2 * num_heads):
        raise MatryoshkaError(
            f"{layer.name} has {layer.out_features} outputs, but the base model has {field}="
            f"{num_heads}. Pass another `base_model`."
        )
    return num_heads


def _permute_heads(B: Float32Array, num_heads: int) -> Float32Array:
    """Reorder the rows of a query or key projection for llama.cpp's rotary embedding.

    transformers rotates row i of a head together with row i + head_dim / 2. llama.cpp's Llama
    rotates neighbours, so the two halves of each head alternate.
    """
    return B.reshape(num_heads, 2, -1, B.shape[1]).swapaxes(1, 2).reshape(B.shape)
