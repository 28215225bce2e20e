"""Write tiny random models with ComfyUI's own classes; run by ComfyUI's Python in its folder.

python comfyui_models.py FOLDER_OF_MODELS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def wan() -> Any:
    """Return a Wan model of 2 blocks, 128 wide."""
    from comfy.ldm.wan.model import WanModel
    from comfy.ops import manual_cast

    return WanModel(
        dim=128, ffn_dim=256, num_heads=1, num_layers=2, dtype=torch.float32, operations=manual_cast
    )


def sd3() -> Any:
    """Return a Stable Diffusion 3 model of 2 blocks, 128 wide."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
    from comfy.ops import manual_cast

    return OpenAISignatureMMDITWrapper(
        input_size=None,
        in_channels=16,
        depth=2,
        adm_in_channels=2048,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": 128},
        },
        pos_embed_max_size=16,
        num_patches=256,
        dtype=torch.float32,
        operations=manual_cast,
    )


def sd15() -> dict[str, Any]:
    """Return the parts of a checkpoint of Stable Diffusion 1.5 by the prefix of their keys.

    The U-Net has one block, and the autoencoder is the tiny one. CLIP has its size, 246 MB in fp16.
    """
    import comfy.sd1_clip
    from comfy.clip_model import CLIPTextModel
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import manual_cast
    from comfy.taesd.taesd import TAESD

    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[1],
        channel_mult=[1],
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=[1],
        transformer_depth_middle=1,
        transformer_depth_output=[1, 1],
        context_dim=768,
        legacy=False,
        operations=manual_cast,
    )
    config = Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json")
    clip = CLIPTextModel(json.loads(config.read_text()), torch.float32, "cpu", manual_cast)
    return {
        "model.diffusion_model.": unet,
        "cond_stage_model.transformer.": clip,
        "first_stage_model.": TAESD(),
    }


def main() -> None:
    """Write a file for each model."""
    sys.path.insert(0, ".")
    from comfy import cli_args

    cli_args.args.cpu = True
    folder = Path(sys.argv[1])
    for name, model in (("wan", wan()), ("sd3", sd3())):
        torch.manual_seed(0)
        tensors = {key: torch.randn_like(tensor) / 10 for key, tensor in model.state_dict().items()}
        save_file(tensors, folder / f"diffusion_models/{name}.safetensors")
    tensors = {}
    for prefix, part in sd15().items():
        for key, tensor in part.state_dict().items():
            if tensor.ndim > 1:  # as large as PyTorch's own, or pictures would be saturated
                tensor = torch.randn_like(tensor) / tensor[0].numel() ** 0.5
            elif tensor.ndim == 1:
                tensor = torch.full_like(tensor, key.endswith("weight"))  # 1 for norms
            tensors[prefix + key] = tensor.half()
    save_file(tensors, folder / "checkpoints/sd15.safetensors")


if __name__ == "__main__":
    main()
