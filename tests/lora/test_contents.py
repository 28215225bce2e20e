"""The kinds of tensors that are not factors, from the names that trainers write."""

from __future__ import annotations

import pytest

from matryoshka_lora.lora.contents import modules_by_kind

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
