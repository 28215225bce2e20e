"""A LoRA adapter as llama.cpp reads it: one GGUF file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import replace_file
from matryoshka_lora.formats.layout import Layer
from matryoshka_lora.formats.opened import OpenedAdapter, from_memory

GGUF_NAME = "adapter.gguf"
"""Of each rank of a ladder."""

# transformers' model_type: the architecture in gguf's words, and whether llama.cpp wants the rows of q and k in the
# order of its own rotary embedding, in which the two halves of a head alternate.
ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
    "gemma": ("GEMMA", False),
    "gemma2": ("GEMMA2", False),
    "gemma3_text": ("GEMMA3", False),
}


def write_gguf(adapter: OpenedAdapter, path: str | os.PathLike[str], base: Any) -> None:
    """Convert an ordinary LoRA adapter to GGUF, in float32, or float16 if its factors are.

    llama.cpp knows one alpha for all layers: where ranks or scales differ, B takes the difference.

    Args:
        adapter: An ordinary one, such as `formats.write.cut` makes.
        path: The file to write.
        base: The transformers config of the base model.

    Raises:
        MatryoshkaError: The architecture or a layer has no place in llama.cpp, or the file cannot be written.
    """
    gguf = _gguf()
    names = _gguf_names(adapter, base)
    if adapter.others:
        raise MatryoshkaError(
            f"{adapter.name} also holds tensor {adapter.others[0]}, which is no factor: llama.cpp's adapters have no "
            "place for it. Export --format merged instead"
        )
    with replace_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, _architecture(base)[0])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
        for layer in adapter.layers:
            A, B = adapter.factors(layer)
            # llama.cpp multiplies by alpha / rank of the tensor.
            B = _permuted(B.float() * (layer.scale * layer.rank / adapter.rank), layer.name, base)
            for suffix, factor in (("lora_a", A), ("lora_b", B)):
                dtype = np.float16 if A.dtype == torch.float16 else np.float32
                writer.add_tensor(f"{names[layer.name]}.{suffix}", factor.float().contiguous().numpy().astype(dtype))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf(path: str | os.PathLike[str], written: OpenedAdapter, base: Any) -> OpenedAdapter:
    """Read a GGUF adapter back, in PEFT's keys and the order of transformers' rows.

    Args:
        path: The file.
        written: What it was made of, for its keys and its config.
        base: The transformers config of the base model.

    Returns:
        An adapter with the file's numbers: llama.cpp divides the file's alpha by the rank of each tensor.
    """
    reader = _gguf().GGUFReader(path)
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    names = _gguf_names(written, base)
    tensors = {}
    for layer in written.layers:
        tensors[layer.key_A] = found[f"{names[layer.name]}.lora_a"].float()
        tensors[layer.key_B] = _permuted(found[f"{names[layer.name]}.lora_b"].float(), layer.name, base, back=True)
    config = written.config.changed(
        lora_alpha=alpha, use_rslora=False, alpha_pattern=dict.fromkeys(written.config["rank_pattern"] or (), alpha)
    )
    return from_memory(str(path), config, None, tensors)


def _gguf_names(adapter: OpenedAdapter, base: Any) -> dict[str, str]:
    """llama.cpp's name of each layer's weight."""
    gguf = _gguf()
    architecture, _ = _architecture(base)
    by_name = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(by_name[architecture], base.num_hidden_layers)
    return dict(_named(adapter.layers, known, architecture))


def _named(layers: tuple[Layer, ...], known: Any, architecture: str) -> Iterator[tuple[str, str]]:
    for layer in layers:
        name = known.get_name(f"{layer.name}.weight", try_suffixes=(".weight",))
        linear = len(layer.shape_A) == len(layer.shape_B) == 2 and layer.key_A.endswith(".lora_A.weight")
        if name is None or not linear or layer.experts > 1:
            raise MatryoshkaError(
                f"layer {layer.name} has no LoRA in llama.cpp's {architecture}: leave it out of target_modules, or "
                "export --format merged"
            )
        yield layer.name, name


def _architecture(base: Any) -> tuple[str, bool]:
    kind = getattr(base, "model_type", None)
    if kind not in ARCHITECTURES:
        raise MatryoshkaError(
            f"models of type {kind!r} cannot be exported to GGUF yet; those that can are {', '.join(ARCHITECTURES)}. "
            "Use llama.cpp's own convert_lora_to_gguf.py on --format peft"
        )
    name, permutes = ARCHITECTURES[kind]
    gguf = _gguf()
    return gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[name]], permutes


def _permuted(B: Tensor, layer: str, base: Any, back: bool = False) -> Tensor:
    """The rows of B of a q or k projection in llama.cpp's order: pairs of the two halves of each head."""
    last = layer.rpartition(".")[2]
    if last not in ("q_proj", "k_proj") or not _architecture(base)[1]:
        return B
    heads = base.num_attention_heads if last == "q_proj" else base.num_key_value_heads
    half = B.shape[0] // heads // 2
    shape = (heads, half, 2, -1) if back else (heads, 2, half, -1)
    return B.reshape(shape).swapaxes(1, 2).reshape(B.shape)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MatryoshkaError("GGUF files need a package: pip install gguf") from error
    return gguf


def check_extension(path: Path) -> None:
    """Raises MatryoshkaError unless a path is named like a GGUF file."""
    if path.suffix != ".gguf":
        raise MatryoshkaError(f"{path} is to be a file: give it a name that ends in .gguf")
