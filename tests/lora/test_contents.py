"""The contents of a file, from the names that trainers write."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.loras import random_lora

from matryoshka_lora.lora.contents import (
    PartInfo,
    layers_by_part,
    modules_by_kind,
)


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
def test_layers_are_counted_by_part(names: list[str], parts: dict[str, int]) -> None:
    lora = random_lora(dict.fromkeys(names, (6, 6)))
    assert layers_by_part(lora.layers) == {name: PartInfo(n, 0) for name, n in parts.items()}


def test_convolutions_and_kinds_are_counted() -> None:
    lora = random_lora({"lora_unet_a": (6, 6), "lora_unet_b": (6, 6, 3, 3)})
    layers = [lora.layers[0], replace(lora.layers[1], kind="LoKr")]
    assert layers_by_part(layers) == {"unet": PartInfo(layers=2, convolutions=1)}


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


def test_kinds_of_old_keys_and_of_pefts_keys() -> None:
    keys = ["unet.a.lora.down.weight", "unet.a.lora.up.weight", "unet.a.alpha"]
    keys += ["base_model.model.b.lora_magnitude_vector", "base_model.model.lm_head.weight"]
    assert modules_by_kind(keys) == {"LoRA with alpha 0": 1, "DoRA": 1, "other": 1}
