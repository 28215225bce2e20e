"""Small configurations of ComfyUI's models. This module runs in ComfyUI's environment."""

from __future__ import annotations

from typing import Any

FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 4,
    "out_channels": 4,
    "vec_in_dim": 20,
    "context_in_dim": 24,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
FLUX_2: dict[str, Any] = {
    **FLUX,
    "image_model": "flux2",
    "vec_in_dim": None,
    "axes_dim": [4, 4, 4, 4],
    "mlp_ratio": 3.0,
    "patch_size": 1,
    "qkv_bias": False,
    "ops_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
}
WAN: dict[str, Any] = {
    "image_model": "wan2.1",
    "dim": 48,
    "ffn_dim": 96,
    "num_heads": 2,
    "num_layers": 2,
    "text_dim": 24,
    "freq_dim": 16,
}
QWEN: dict[str, Any] = {
    "image_model": "qwen_image",
    "in_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
