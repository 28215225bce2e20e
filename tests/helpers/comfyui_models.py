"""Write tiny random models with ComfyUI's own classes; run by ComfyUI's Python in its folder.

python comfyui_models.py OUTPUT_FOLDER
"""

from __future__ import annotations

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


def main() -> None:
    """Write a file for each model."""
    sys.path.insert(0, ".")
    from comfy import cli_args

    cli_args.args.cpu = True
    for name, model in (("wan", wan()), ("sd3", sd3())):
        torch.manual_seed(0)
        tensors = {key: torch.randn_like(tensor) / 10 for key, tensor in model.state_dict().items()}
        save_file(tensors, Path(sys.argv[1]) / f"{name}.safetensors")


if __name__ == "__main__":
    main()
