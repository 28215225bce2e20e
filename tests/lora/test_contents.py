"""What a file contains, from the names that trainers write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from matryoshka_lora import info
from matryoshka_lora.cli.file_results import format_info
from matryoshka_lora.lora.contents import modules_by_kind


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["lora_unet_a", "lora_unet_b", "lora_te_c"], {"unet": 2, "text_encoder": 1}),
        (["lora_te1_a", "lora_te2_b"], {"text_encoder": 1, "text_encoder_2": 1}),
        (["lora_transformer_a", "lora_te3_b"], {"text_encoder_3": 1, "transformer": 1}),
        (["unet.a", "text_encoder_2.b"], {"text_encoder_2": 1, "unet": 1}),
        (["base_model.model.transformer.a"], {"transformer": 1}),
        (["diffusion_model.blocks.0.q", "other.q"], {"": 1, "diffusion_model": 1}),
        (["lycoris_layers_0_q", "lora_unetwork"], {"": 2}),
    ],
)
def test_layers_are_counted_by_part(
    names: list[str], parts: dict[str, int], tmp_path: Path
) -> None:
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, 6)
        tensors[f"{name}.lora_up.weight"] = torch.randn(6, 2)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    result = info(tmp_path / "lora.safetensors")
    assert {name: part.layers for name, part in result.parts.items()} == parts


DOWN_UP = ("lora_down.weight", "lora_up.weight")
SUFFIXES = {
    "DoRA": (*DOWN_UP, "alpha", "dora_scale"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
    "LoKr": ("lokr_w1", "lokr_w2", "alpha"),
    "OFT": ("oft_blocks", "alpha"),
    "LoRA with a third matrix": (*DOWN_UP, "lora_mid.weight"),
    "bias": ("lora_B.bias",),
    "difference": ("diff", "diff_b"),
    "norm": ("w_norm", "b_norm"),
    "LoRA with alpha 0": (*DOWN_UP, "alpha"),
    "other": ("weight", "scale"),
}


# Parts of these names look like the suffixes of factors.
@pytest.mark.parametrize("prefix", ["lora_unet_", "unet.down.up_blocks.0.mag.norm", "lora_A.x"])
def test_other_tensors_are_counted_by_kind(prefix: str) -> None:
    keys: list[str] = []
    for number, (kind, suffixes) in enumerate(SUFFIXES.items(), start=1):
        for copy in range(number):
            module = f"{prefix}{number}_{copy}"
            keys += [f"{module}.{suffix}" for suffix in suffixes[: 1 if kind == "other" else 9]]
    expected = {kind: number for number, kind in enumerate(SUFFIXES, start=1)}
    assert modules_by_kind(keys) == expected


def test_old_and_pefts_keys_have_kinds_too() -> None:
    keys = ["unet.a.lora.down.weight", "unet.a.lora.up.weight", "unet.a.alpha"]
    keys += ["base_model.model.b.lora_magnitude_vector", "base_model.model.lm_head.weight"]
    assert modules_by_kind(keys) == {"LoRA with alpha 0": 1, "DoRA": 1, "other": 1}


def test_convolutions_alphas_and_dtypes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(
        {
            "lora_unet_a.lora_down.weight": torch.randn(4, 6).half(),
            "lora_unet_a.lora_up.weight": torch.randn(6, 4).half(),
            "lora_unet_a.alpha": torch.tensor(2.0),
            "lora_unet_b.lora_down.weight": torch.randn(2, 6, 3, 3),
            "lora_unet_b.lora_up.weight": torch.randn(6, 2, 1, 1),
            "lora_unet_b.alpha": torch.tensor(4.0),
        },
        file,
    )
    result = info(file)
    content = result.to_dict()
    assert content["parts"] == {"unet": {"layers": 2, "convolutions": 1}}
    assert content["layers_by_rank"] == {2: 1, 4: 1}
    assert (content["alphas"], content["scales"]) == ([2.0, 4.0], [0.5, 2.0])
    assert content["dtypes"] == ["float16", "float32"]
    text = format_info(result)
    assert "unet 2 (1 convolution), such as lora_unet_a" in text
    assert "2 to 4, depending on the layer" in text


def test_layers_are_counted_by_kind(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    tensors = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(4, 2)}
    for name in ("b", "c"):
        tensors[f"lycoris_{name}.lokr_w1"] = torch.ones(2, 2)
        tensors[f"lycoris_{name}.lokr_w2"] = torch.ones(2, 2)
    for name in ("w1_a", "w2_a", "w1_b", "w2_b"):
        tensors[f"diffusion_model.a.hada_{name}"] = torch.ones(2, 2)
    save_file(tensors, file)
    result = info(file)
    assert result.to_dict()["layers_by_kind"] == {"LoRA": 1, "LoKr": 2, "LoHa": 1}
    assert "LoKr 2" in format_info(result)
