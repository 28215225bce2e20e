"""A rank of an adapter as llama.cpp reads it: one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.layers import Layer, Lost, OnLayer, Plan
from matryoshka_lora.files.peft import check_factors

# transformers' model_type: the architecture in gguf's words, and whether llama.cpp wants the rows
# of q and k in the order of its own rotary embedding, where the two halves of a head alternate.
_ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
    "gemma": ("GEMMA", False),
    "gemma2": ("GEMMA2", False),
    "gemma3_text": ("GEMMA3", False),
}


def write_gguf(plan: Plan, file: Path, base: dict[str, Any], on_layer: OnLayer = None) -> Lost:
    """Write a plan of `plan_rank` as a GGUF file in float32.

    llama.cpp multiplies ``B A`` with the file's alpha over the rank of the tensor. It knows one
    alpha, so that B takes what differs between layers.

    Args:
        plan: The rank.
        file: A file that does not exist yet.
        base: ``config.json`` of the base model.
        on_layer: Called after each layer.

    Raises:
        MatryoshkaError: llama.cpp has no place for the base model or a layer.
    """
    try:
        import gguf
    except ImportError as error:
        raise MatryoshkaError("GGUF files need a package: pip install gguf") from error
    kind = base.get("model_type")
    if kind not in _ARCHITECTURES:
        raise MatryoshkaError(
            f"models of type {kind!r} cannot be exported to GGUF: use llama.cpp's "
            "convert_lora_to_gguf.py on --format peft"
        )
    check_factors(plan.adapter, "llama.cpp")
    architecture, permuted = _ARCHITECTURES[kind]
    number, lost = gguf.MODEL_ARCH[architecture], plan.new_lost()
    names = gguf.get_tensor_name_map(number, base["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[number])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(plan.rank))
    for layer, A, B in plan.each(lost, on_layer):
        name = names.get_name(f"{layer.name}.weight", try_suffixes=(".weight",))
        if name is None:
            raise MatryoshkaError(f"llama.cpp has no LoRA for {layer.name}: use --format merged")
        B = B.float() * (layer.scale * layer.rank / plan.rank)
        B = _permuted(B, layer, base) if permuted else B
        writer.add_tensor(f"{name}.lora_a", A.float().contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", B.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return lost


def _permuted(B: Tensor, layer: Layer, base: dict[str, Any]) -> Tensor:
    """Return the rows of a q or k projection as pairs of the two halves of each head."""
    last, heads = layer.name.rpartition(".")[2], base["num_attention_heads"]
    if last not in ("q_proj", "k_proj"):
        return B
    if last == "k_proj":
        heads = base.get("num_key_value_heads") or heads
    return B.reshape(heads, 2, len(B) // heads // 2, -1).swapaxes(1, 2).reshape(B.shape)
