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
CHROMA: dict[str, Any] = {
    **{key: value for key, value in FLUX.items() if key not in ("vec_in_dim", "guidance_embed")},
    "image_model": "chroma",
    "in_dim": 16,
    "out_dim": 32,
    "hidden_dim": 40,
    "n_layers": 2,
}
HUNYUAN_VIDEO: dict[str, Any] = {
    **FLUX,
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "meanflow": False,
    "byt5": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
}
HUNYUAN_VIDEO_15: dict[str, Any] = {
    **HUNYUAN_VIDEO,
    "patch_size": [1, 1, 1],
    "vec_in_dim": None,
    "depth_single_blocks": 0,
    "byt5": True,
    "guidance_embed": False,
    "vision_in_dim": 12,
}
LTX: dict[str, Any] = {
    "image_model": "ltxv",
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "in_channels": 16,
}
HIDREAM: dict[str, Any] = {
    "image_model": "hidream",
    "attention_head_dim": 48,
    "num_attention_heads": 4,
    "axes_dims_rope": [16, 16, 16],
    "caption_channels": [120, 120],
    "max_resolution": [16, 16],
    "in_channels": 4,
    "out_channels": 4,
    "llama_layers": [0, 1],
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "num_layers": 1,
    "num_single_layers": 1,
    "patch_size": 2,
    "text_emb_dim": 20,
}
COSMOS_PREDICT_2: dict[str, Any] = {
    "image_model": "cosmos_predict2",
    "max_img_h": 24,
    "max_img_w": 24,
    "max_frames": 8,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 48,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 24,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 6,
    "num_blocks": 2,
    "num_heads": 2,
}
# The last one of 48 blocks is different.
MOCHI: dict[str, Any] = {
    "image_model": "mochi_preview",
    "depth": 48,
    "patch_size": 2,
    "num_heads": 4,
    "hidden_size_x": 192,
    "hidden_size_y": 96,
    "mlp_ratio_x": 4.0,
    "mlp_ratio_y": 4.0,
    "learn_sigma": False,
    "in_channels": 12,
    "t5_feat_dim": 24,
    "use_t5": True,
}
AURA_FLOW: dict[str, Any] = {
    "max_seq": 16,
    "n_double_layers": 2,
    "n_layers": 4,
    "n_heads": 2,
    "dim": 96,
    "cond_seq_dim": 24,
}
PIXART: dict[str, Any] = {
    "image_model": "pixart_alpha",
    "num_heads": 2,
    "patch_size": 2,
    "hidden_size": 48,
    "in_channels": 4,
    "depth": 2,
    "input_size": 16,
    "micro_condition": True,
    "caption_channels": 24,
}
# The rows of the MLP are rounded up, as in the full model.
OMNIGEN_2: dict[str, Any] = {
    "image_model": "omnigen2",
    "in_channels": 4,
    "hidden_size": 504,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 21,
    "num_kv_heads": 7,
    "multiple_of": 128,
    "axes_dim_rope": [8, 8, 8],
    "axes_lens": [8, 8, 8],
    "text_feat_dim": 24,
}
