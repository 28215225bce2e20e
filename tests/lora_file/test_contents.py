"""The kinds and parts of the layers in a file."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.single_files import save_pairs
from safetensors.torch import save_file

from matryoshka_lora.lora_file.contents import count_kinds, count_parts
from matryoshka_lora.lora_file.open import open_lora


def test_kinds_and_parts_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    modules = ["unet.a", "text_encoder_2.a", "lora_te1_a", "lora_unet_a", "lora_unet_b", "a", "b.c"]
    tensors = save_pairs(file, *modules)
    tensors["unet.conv.lora_A.weight"] = torch.ones(2, 3, 3, 3)
    tensors["unet.conv.lora_B.weight"] = torch.ones(4, 2, 1, 1)
    tensors["lycoris_a.lokr_w1"] = torch.ones(2, 2)
    tensors["lycoris_a.lokr_w2"] = torch.ones(2, 2, 3, 3)
    for name in ("w1_a", "w2_a", "w1_b", "w2_b"):
        tensors[f"diffusion_model.a.hada_{name}"] = torch.ones(2, 2)
    save_file(tensors, file)
    lora = open_lora(file)
    assert count_kinds(lora) == {
        "LoHa": 1,
        "LoKr convolution": 1,
        "LoRA": 7,
        "LoRA convolution": 1,
    }
    assert count_parts(lora) == {
        "": 2,
        "diffusion_model": 1,
        "lora_te1": 1,
        "lora_unet": 2,
        "lycoris": 1,
        "text_encoder_2": 1,
        "unet": 2,
    }
