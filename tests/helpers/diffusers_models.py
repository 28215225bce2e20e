"""Small models of diffusers. This module runs with any version of it, without this package."""

from __future__ import annotations

from typing import Any

import diffusers


def small_unet() -> Any:
    """Return a U-Net of Stable Diffusion."""
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def small_flux(num_layers: int = 1, guidance_embeds: bool = False) -> Any:
    """Return a transformer of Flux."""
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=num_layers,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )


SMALL_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Wan": (
        "WanVACETransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": 12,
            "freq_dim": 16,
            "ffn_dim": 64,
            "num_layers": 2,
            "vace_layers": [0, 1],
            "vace_in_channels": 8,
        },
    ),
    "HunyuanVideo": (
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 12,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
    ),
    "LTX-Video": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 12,
        },
    ),
    "LTX-2": (
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 12,
        },
    ),
    "HiDream": (
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 48,
            "num_attention_heads": 4,
            "caption_channels": [120, 120],
            "text_emb_dim": 12,
            "axes_dims_rope": (16, 16, 16),
            "max_resolution": (16, 16),
            "llama_layers": [0, 1],
        },
    ),
    "Cosmos-Predict2": (
        "CosmosTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 2,
            "text_embed_dim": 24,
            "adaln_lora_dim": 6,
            "max_size": (4, 8, 8),
            "extra_pos_embed_type": None,
        },
    ),
    # The last one of 48 blocks is different.
    "Mochi": (
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "pooled_projection_dim": 24,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
        },
    ),
    "AuraFlow": (
        "AuraFlowTransformer2DModel",
        {
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 48,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 96,
            "pos_embed_max_size": 16,
        },
    ),
    "Krea 2": (
        "Krea2Transformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 128,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 20,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 54,
            "axes_dims_rope": (4, 4, 4),
        },
    ),
}
"""The class and the arguments of small models with the ratios of the full models."""


def small_model(name: str) -> Any:
    """Return a model of `SMALL_MODELS`."""
    class_name, arguments = SMALL_MODELS[name]
    return getattr(diffusers, class_name)(**arguments)
