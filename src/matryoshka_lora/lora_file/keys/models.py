"""The models whose names are known, their text encoders, and further spellings of names."""

from __future__ import annotations

from typing import NamedTuple

from matryoshka_lora.lora_file.keys.modules import same
from matryoshka_lora.lora_file.keys.transformer_names import (
    FLUX,
    QWEN_IMAGE,
    STABLE_DIFFUSION_3,
    WAN,
    Z_IMAGE,
)
from matryoshka_lora.lora_file.keys.unet_names import SDXL, STABLE_DIFFUSION

MODELS = (STABLE_DIFFUSION, SDXL, STABLE_DIFFUSION_3, FLUX, WAN, QWEN_IMAGE, Z_IMAGE)
"""The models whose names are known. Of UNets that are not distinguished, the first is taken."""


# --- Text encoders: CLIP and T5 ---

_CLIP_LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
_T5_LAYER = (
    *(f"0.SelfAttention.{name}" for name in "qkvo"),
    *(f"1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)
TEXT_ENCODER_MODULES = (
    *same(*(f"text_model.encoder.layers.{{}}.{name}" for name in _CLIP_LAYER), num_blocks=32),
    *same(*(f"encoder.block.{{}}.layer.{name}" for name in _T5_LAYER), num_blocks=24),
    *same("text_projection"),
)
"""The modules of text encoders, with the names of transformers."""


# --- Further spellings ---


class Alias(NamedTuple):
    """Another name of some parts of a module.

    Attributes:
        name: The name, with ``{}`` for an index.
        authors: The name of the module for the authors.
        parts: The parts, as positions in `Module.diffusers`.
    """

    name: str
    authors: str
    parts: tuple[int, ...]


# The first ones are what is left of the names of xlabs without `processor` and a final `lora`.
ALIASES = (
    Alias("double_blocks.{}.qkv_lora1", "double_blocks.{}.img_attn.qkv", (0, 1, 2)),
    Alias("double_blocks.{}.qkv_lora2", "double_blocks.{}.txt_attn.qkv", (0, 1, 2)),
    Alias("double_blocks.{}.proj_lora1", "double_blocks.{}.img_attn.proj", (0,)),
    Alias("double_blocks.{}.proj_lora2", "double_blocks.{}.txt_attn.proj", (0,)),
    Alias("single_blocks.{}.qkv", "single_blocks.{}.linear1", (0, 1, 2)),
    Alias("single_blocks.{}.proj", "single_blocks.{}.linear2", (0,)),
    Alias("single_blocks.{}.linear1_qkv", "single_blocks.{}.linear1", (0, 1, 2)),
)
"""Further names that are read, but not written."""
