"""The folders and files that the commands of README and docs name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from helpers.authors_layouts import layout
from helpers.plain_peft import plain_adapter
from helpers.single_files import save_random_lora
from helpers.tiny_chat import save_tiny_chat

ROOT = Path(__file__).parents[2]
WIDTH = 64
"""The inputs and outputs of the layers of the image models."""

PEFT_FOLDERS = ("some-lora", "other-lora", "style-a", "style-b", "output", "loras/a", "loras/b")
SINGLE_FILES = {
    "lora.safetensors": "lora_unet_mid_block_attentions_0_proj_in",
    "a.safetensors": "lora_unet_mid_block_attentions_0_proj_in",
    "b.safetensors": "lora_unet_mid_block_attentions_0_proj_in",
    "sdxl-lora.safetensors": "lora_unet_input_blocks_4_1_proj_in",
    "flux-lora.safetensors": "lora_unet_double_blocks_0_img_attn_proj",
}
TEXT_ENCODER = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


def write_inputs(folder: Path) -> None:
    """Write small models, adapters, LoRA files, examples and a config.

    The adapters are of ``base-model``, a chat model that the configs name by its path.
    """
    write_examples(folder)
    write_language_models(folder)
    for number, name in enumerate(PEFT_FOLDERS):
        base = AutoModelForCausalLM.from_pretrained(folder / "base-model")
        plain_adapter(folder / name, base, r=8 + number)
    base = AutoModelForCausalLM.from_pretrained(folder / "base-model")
    plain_adapter(folder / "dora", base, use_dora=True)
    for number, (name, layer) in enumerate(SINGLE_FILES.items()):
        shapes = dict.fromkeys([layer, TEXT_ENCODER], (WIDTH, WIDTH))
        save_random_lora(folder / name, shapes, has_alpha=True, seed=number)
    write_lokr(folder / "lokr.safetensors")
    write_flux_models(folder)
    shutil.copytree(ROOT / "configs", folder / "configs")
    config = {"base_model": str(folder / "base-model"), "data": "my.jsonl", "max_steps": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def write_examples(folder: Path) -> None:
    """Write examples that a model learns in a few steps."""
    lines: list[str] = []
    for number in range(40):
        completion = " odd" if number % 2 else " even"
        lines.append(json.dumps({"prompt": f"{number} is", "completion": completion}) + "\n")
    (folder / "my.jsonl").write_text("".join(lines[:32]))
    (folder / "more.jsonl").write_text("".join(lines[32:36]))
    (folder / "held-out.jsonl").write_text("".join(lines[36:]))


def write_language_models(folder: Path) -> None:
    """Write a base model with its tokenizer, and the same with another weight."""
    save_tiny_chat(folder / "base-model")
    model = AutoModelForCausalLM.from_pretrained(folder / "base-model")
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.weight)
    model.save_pretrained(folder / "tuned-model")


def write_lokr(file: Path) -> None:
    """Write a LoKr of one layer."""
    layer = SINGLE_FILES["lora.safetensors"]
    generator = np.random.default_rng(0)
    matrices = {
        f"{layer}.lokr_w1": generator.standard_normal((4, 4), dtype=np.float32),
        f"{layer}.lokr_w2": generator.standard_normal((16, 16), dtype=np.float32),
    }
    save_file({**matrices, f"{layer}.alpha": np.array(1.0, dtype=np.float32)}, file)


def write_flux_models(folder: Path) -> None:
    """Write a checkpoint of Flux, the same with a change of rank 2 in one layer, and a DoRA."""
    generator = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}
    for name, shape in layout("flux").items():
        weights[f"{name}.weight"] = generator.standard_normal(shape, dtype=np.float32)
    save_file(weights, folder / "flux.safetensors")
    name = "double_blocks.0.img_attn.proj.weight"
    rows, inputs = weights[name].shape
    B = generator.standard_normal((rows, 2), dtype=np.float32)
    A = generator.standard_normal((2, inputs), dtype=np.float32)
    save_file({**weights, name: weights[name] + B @ A}, folder / "tuned.safetensors")
    layer = SINGLE_FILES["flux-lora.safetensors"]
    dora = {"lora_up.weight": B, "lora_down.weight": A, "dora_scale": np.abs(B[:, :1])}
    save_file({f"{layer}.{key}": value for key, value in dora.items()}, folder / "dora.safetensors")
