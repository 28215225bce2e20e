"""Write one rank of an adapter for llama.cpp and mlx-lm."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.layers import Layer, Plan
from matryoshka_lora.files.peft import CONFIG_NAME

# transformers' model_type: the architecture in gguf's words. The tests compare each of them, since
# mlx-lm silently skips unknown keys.
_ARCHITECTURES = {name: name for name in ("llama", "qwen2", "qwen3", "gemma", "gemma2")}
_ARCHITECTURES |= {"mistral": "llama", "gemma3_text": "gemma3"}
_IN_A_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def write_gguf(plan: Plan, file: Path, base: Mapping[str, Any]) -> None:
    """Write a plan of `plan_rank` for llama.cpp: one GGUF file in float32.

    llama.cpp multiplies ``B A`` with the file's alpha over the rank of the tensor. A file has one
    alpha, so B takes the layers' differences. ``base`` is the base model's ``config.json``.

    Raises:
        MatryoshkaError: llama.cpp does not support the base model or a layer.
    """
    import gguf

    _check(plan, base, "llama.cpp")
    architecture = _ARCHITECTURES[base["model_type"]]
    number = next(x for x, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, base["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(plan.rank))
    for layer, A, B in plan.each():
        name = names.get_name(f"{layer.name}.weight", try_suffixes=(".weight",))
        B = B.float() * (layer.scale * layer.rank / plan.rank)
        B = _permuted(B, layer, base) if architecture == "llama" else B
        writer.add_tensor(f"{name}.lora_a", A.float().contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", B.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(B: Tensor, layer: Layer, base: Mapping[str, Any]) -> Tensor:
    """Return the rows of a q or k projection as pairs of the two halves of each head.

    llama.cpp's Llama expects this order.
    """
    last, heads = layer.name.rpartition(".")[2], base["num_attention_heads"]
    if last not in ("q_proj", "k_proj"):
        return B
    if last == "k_proj":
        heads = base.get("num_key_value_heads") or heads
    if len(B) % (2 * heads):
        raise MatryoshkaError(f"{layer.name} does not fit the base model: give it with --model")
    return B.reshape(heads, 2, len(B) // heads // 2, -1).swapaxes(1, 2).reshape(B.shape)


def write_mlx(plan: Plan, folder: Path, base: Mapping[str, Any]) -> None:
    """Write a plan of `plan_rank` for mlx-lm: ``adapters.safetensors`` and a config of its own.

    All layers must have the same rank and scale. Raises: as `write_gguf`.
    """
    _check(plan, base, "mlx-lm")
    tensors = {}
    for layer, A, B in plan.each():
        tensors[f"{layer.name}.lora_a"] = A.mT.contiguous()
        tensors[f"{layer.name}.lora_b"] = B.mT.contiguous()
    keys = sorted({_IN_A_BLOCK.sub(r"\2", new.name) for _, new in plan.layers})
    parameters = {"rank": plan.rank, "scale": plan.layers[0][1].scale, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": base["num_hidden_layers"]}
    save_file(tensors, folder / "adapters.safetensors")
    text = json.dumps({**config, "lora_parameters": parameters}, indent=2)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def missing_rope(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that mlx-lm misses in a ``config.json`` that transformers 5 has written.

    transformers 5 writes ``rope_parameters``, by kind of layer in some models. mlx-lm reads fields
    at the top, and silently falls back to a base of 10000.
    """
    rope = base.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    fields = {
        "rope_theta": whole.get("rope_theta"),
        "rope_scaling": whole if whole.get("rope_type", "default") != "default" else None,
        "rope_local_base_freq": rope.get("sliding_attention", {}).get("rope_theta"),
    }
    return {key: value for key, value in fields.items() if value and not base.get(key)}


def _check(plan: Plan, base: Mapping[str, Any], reader: str) -> None:
    """Raise MatryoshkaError unless the reader supports the base model and every layer."""
    strange = [*plan.adapter.others]
    for _, x in plan.layers:
        is_linear = x.experts == 1 and len(x.A.shape) == 2 and x.key_A.endswith(".lora_A.weight")
        block = _IN_A_BLOCK.fullmatch(x.name)
        if not (is_linear and block and int(block[1]) < base.get("num_hidden_layers", 0)):
            strange.append(x.key_A)
    if base.get("model_type") not in _ARCHITECTURES:
        strange = [f"a LoRA for models of type {base.get('model_type')!r}"]
    if strange:
        raise MatryoshkaError(
            f"{plan.adapter.name} holds {strange[0]}, which {reader} cannot read with this base "
            "model: give another one with --model, or use --format merged"
        )
