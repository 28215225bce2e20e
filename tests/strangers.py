"""Adapters that know nothing of this package, and what plain PEFT makes of a model with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import LINEAR_LAYERS, randomize, tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

IDS = torch.arange(3, 27).reshape(2, 12)


def plain_adapter(folder: Path, base: Any = None, **changes: Any) -> Any:
    """Write an adapter with random factors; returns its model."""
    options = {"r": 8, "lora_alpha": 8, "target_modules": LINEAR_LAYERS, **changes}
    model = get_peft_model(tiny_llama() if base is None else base, LoraConfig(**options))
    randomize(model)
    model.save_pretrained(folder)
    return model.eval()


def forget_weights(folder: Path) -> None:
    """Let no file say what the weights are, as earlier versions wrote them, so that a test may change them."""
    file = folder / "nesting.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in said.items() if key not in ("weights", "trained")}))
    if (folder / "spectra.safetensors").is_file():
        save_file(load_file(folder / "spectra.safetensors"), folder / "spectra.safetensors")


def lora_file(file: Path, seed: int = 0, rank: int = 4) -> Path:
    """A LoRA of an image model in one file, with diffusers' keys and random factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in ("unet.mid_block.attn.to_q", "unet.up_blocks.0.proj_out"):
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 16, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(8, rank, generator=generator)
    save_file(tensors, file)
    return file


def output(model: Any) -> Tensor:
    """The logits of a few tokens."""
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


def deltas(model: Any) -> dict[str, Tensor]:
    """The dense delta of each layer, by PEFT itself."""
    with torch.no_grad():
        return {
            name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight")
        }
