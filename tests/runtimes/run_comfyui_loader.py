"""Apply LoRA files to small models with ComfyUI's own loader, and save what they add.

It runs in the environment of ComfyUI, with its checkout in PYTHONPATH. The arguments are the path
of a JSON file and an output folder. The JSON has a list of jobs: the name of a model, and the LoRA
files with their strengths. ``N.safetensors`` has what the Nth job adds to each weight. Without
files, it has the shapes of the weights, as tensors of integers.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.argv, ARGUMENTS = [sys.argv[0], "--cpu"], sys.argv[1:]
sys.path.append(str(Path(__file__).parents[1]))

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.supported_models as supported  # noqa: E402
from helpers import comfyui_configs as configs  # noqa: E402
from helpers.comfyui_configs import FLUX, FLUX_2, QWEN, WAN  # noqa: E402

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_heads": 2,
    "use_spatial_transformer": True,
    "legacy": False,
}
# The class in ComfyUI's supported_models, and a small configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": (
        "SD15",
        {
            **UNET,
            "context_dim": 24,
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 1, 2, 2],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "transformer_depth_middle": 1,
        },
    ),
    "sdxl": (
        "SDXL",
        {
            **UNET,
            "model_channels": 64,  # the width of a head
            "context_dim": 24,
            "num_classes": "sequential",
            "adm_in_channels": 20,
            "use_linear_in_transformer": True,
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 1, 2],
            "transformer_depth": [0, 0, 2, 2, 3, 3],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
            "transformer_depth_middle": 3,
        },
    ),
    "koala": (
        "KOALA_1B",
        {
            **UNET,
            "model_channels": 64,
            "context_dim": 2048,  # tells it from Stable Diffusion
            "num_classes": "sequential",
            "adm_in_channels": 20,
            "use_linear_in_transformer": True,
            "num_res_blocks": [1, 1, 1],
            "channel_mult": [1, 1, 2],
            "transformer_depth": [0, 2, 6],
            "transformer_depth_output": [0, 0, 2, 2, 6, 6],
            "transformer_depth_middle": 6,
        },
    ),
    "sd3": (
        "SD3",
        {
            "in_channels": 4,
            "patch_size": 2,
            "depth": 2,
            "x_block_self_attn_layers": [0],
            "adm_in_channels": 20,
            "pos_embed_max_size": 8,
            "input_size": None,
            "qk_norm": "rms",
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 24, "out_features": 128},
            },
        },
    ),
    "flux": ("Flux", FLUX),
    "flux.2": ("Flux2", FLUX_2),
    "wan": ("WAN21_I2V", {**WAN, "model_type": "i2v", "in_dim": 36}),
    "qwen": ("QwenImage", QWEN),
    "wan-vace": (
        "WAN21_Vace",
        {**WAN, "model_type": "vace", "in_dim": 16, "vace_in_dim": 96, "vace_layers": 2},
    ),
    "chroma": ("Chroma", configs.CHROMA),
    "hunyuan-video": ("HunyuanVideo", configs.HUNYUAN_VIDEO),
    "hunyuan-video-1.5": ("HunyuanVideo15", configs.HUNYUAN_VIDEO_15),
    "ltx": ("LTXV", configs.LTX),
    "hidream": ("HiDream", configs.HIDREAM),
    "cosmos-predict-2": ("CosmosT2IPredict2", configs.COSMOS_PREDICT_2),
    "mochi": ("GenmoMochi", configs.MOCHI),
    "aura-flow": ("AuraFlow", configs.AURA_FLOW),
    "pixart": ("PixArtAlpha", configs.PIXART),
    "omnigen2": ("Omnigen2", configs.OMNIGEN_2),
    # The layers of Z-Image are those of Lumina 2 with as many keys as queries.
    "z-image": (
        "Lumina2",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 96,
            "ffn_dim_multiplier": 8 / 3,
            "cap_feat_dim": 24,
            "n_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 4,
            "qk_norm": True,
            "axes_dims": [8, 8, 8],
            "axes_lens": [8, 8, 8],
        },
    ),
    "lumina-2": (
        "Lumina2",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 192,
            "cap_feat_dim": 24,
            "n_layers": 2,
            "n_heads": 6,
            "n_kv_heads": 2,
            "qk_norm": True,
            "axes_dims": [16, 8, 8],
            "axes_lens": [8, 8, 8],
        },
    ),
}
TEXT_ENCODERS = {
    "sd15": ("clip_l",),
    "koala": ("clip_l", "clip_g"),
    "sdxl": ("clip_l", "clip_g"),
    "sd3": ("clip_l", "clip_g", "t5xxl"),
    "flux": ("clip_l", "t5xxl"),
}


class TextEncoders:
    """Weights with the names of text encoders in ComfyUI."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        for name in names:
            prefix = f"{name}.transformer."
            if name == "t5xxl":
                modules = {"encoder.block.0.layer.0.SelfAttention.q": (16, 16)}
            else:
                layer = "text_model.encoder.layers.1."
                modules = {f"{layer}self_attn.q_proj": (16, 16), f"{layer}mlp.fc1": (32, 16)}
            for module, shape in modules.items():
                self.weights[f"{prefix}{module}.weight"] = torch.zeros(shape, device="meta")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.weights


def build(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the targets of the keys of a LoRA, and the weights, of a model."""
    class_name, unet_config = MODELS[name]
    config = getattr(supported, class_name)(unet_config)
    model = config.get_model({}, "", device="meta")
    text_encoders = TextEncoders(TEXT_ENCODERS.get(name, ()))
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    key_map = comfy.lora.model_lora_keys_clip(text_encoders, key_map)
    return key_map, {**model.state_dict(), **text_encoders.state_dict()}


def add_file(
    updates: dict[str, torch.Tensor],
    file: str,
    strength: float,
    key_map: dict[str, Any],
    weights: dict[str, torch.Tensor],
) -> None:
    """Add what a LoRA file adds to the weights."""
    tensors = comfy.lora_convert.convert_lora(load_file(file))
    for key, patch in comfy.lora.load_lora(tensors, key_map).items():
        name, offset, function = key, None, None
        if isinstance(key, tuple):  # as in ModelPatcher.add_patches
            name, offset = key[:2]
            function = key[2] if len(key) > 2 else None
        weight = updates.setdefault(name, torch.zeros(weights[name].shape))
        patches = [(strength, patch, 1.0, offset, function)]
        updates[name] = comfy.lora.calculate_weight(patches, weight, name)


class RejectUnreadKeys(logging.Handler):
    """Make ComfyUI's warning of a key that it does not read an error."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and "lora" in record.getMessage():
            raise ValueError(record.getMessage())


def main() -> None:
    jobs = json.loads(Path(ARGUMENTS[0]).read_text())
    logging.getLogger().addHandler(RejectUnreadKeys())
    for number, (name, files) in enumerate(jobs):
        key_map, weights = build(name)
        updates: dict[str, torch.Tensor] = {}
        for file, strength in files:
            add_file(updates, file, strength, key_map, weights)
        if not files:
            for key, weight in weights.items():
                updates[key] = torch.tensor(weight.shape, dtype=torch.int64)
        save_file(
            {key: update.contiguous() for key, update in updates.items()},
            Path(ARGUMENTS[1]) / f"{number}.safetensors",
        )


if __name__ == "__main__":
    main()
