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
