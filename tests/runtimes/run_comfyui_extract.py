"""Build tiny image models of ComfyUI's own classes, and apply LoRA files to them.

It runs in ComfyUI's environment: ``python run_comfyui_extract.py COMFYUI build KIND FOLDER`` writes
``base.safetensors`` and ``tuned.safetensors`` in the names of the model's makers, and
``... apply KIND FOLDER LORA`` prints what ComfyUI makes of a LoRA file, as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

COMFYUI, COMMAND, KIND, FOLDER, *FILES = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [COMFYUI, str(Path(__file__).parents[1])]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()  # the next imports read them

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import comfy.supported_models as supported  # noqa: E402
import torch  # noqa: E402
from helpers.comfyui_configs import FLUX, QWEN, WAN  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 12,
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flux": (supported.Flux, FLUX),
    "wan": (supported.WAN21_T2V, {**WAN, "model_type": "t2v"}),
    "qwen": (supported.QwenImage, QWEN),
    "sdxl": (
        supported.SDXL,
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [2, 2],
            "channel_mult": [1, 2],
            "transformer_depth": [0, 0, 1, 1],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [0, 0, 0, 1, 1, 1],
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "num_head_channels": 16,
            "num_heads": -1,
            "context_dim": 64,
            "adm_in_channels": 40,
            "num_classes": "sequential",
            "legacy": False,
        },
    ),
}


def build() -> tuple[Any, Any, Any]:
    """Return the configuration of a model, the model, and its text encoders or None."""
    config_class, unet_config = MODELS[KIND]
    config = config_class({**unet_config, "dtype": torch.float32})
    model = config.get_model({}, "", device="cpu")
    clip = None
    if KIND == "sdxl":
        options = {"clip_l_model_config": CLIP, "clip_g_model_config": CLIP}
        clip = comfy.sdxl_clip.SDXLClipModel("cpu", torch.float32, options)
    return config, model, clip


def randomize(module: Any, seed: int, *, all_weights: bool) -> None:
    """Add random numbers to the weights of linear layers and convolutions, or to all weights."""
    generator = torch.Generator().manual_seed(seed)
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    for name, part in sorted(module.named_modules()):
        if isinstance(part, layers) and "projection" not in name:
            part.weight.data = part.weight.data.clone()
    for name, parameter in sorted(module.named_parameters()):
        owner = module.get_submodule(name.rpartition(".")[0])
        is_layer = isinstance(owner, layers) and name.endswith(".weight")
        if all_weights:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        elif is_layer and "text_projection" not in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def checkpoint(config: Any, model: Any, clip: Any) -> dict[str, Any]:
    """Return the weights in the names of the model's makers."""
    weights = model.diffusion_model.state_dict()
    if clip is not None:
        weights = config.process_unet_state_dict_for_saving(weights)
        weights |= config.process_clip_state_dict_for_saving(clip.state_dict())
    return {key: tensor.clone().contiguous() for key, tensor in weights.items()}


def write_models(folder: Path) -> None:
    """Write a random model before and after a change of its layers."""
    config, model, clip = build()
    modules = [model.diffusion_model] + ([clip] if clip is not None else [])
    for name, all_weights in (("base", True), ("tuned", False)):
        with torch.no_grad():
            for seed, module in enumerate(modules):
                randomize(module, seed, all_weights=all_weights)
        save_file(checkpoint(config, model, clip), folder / f"{name}.safetensors")


def read_weights(config: Any, model: Any, clip: Any, file: Path) -> dict[str, Any]:
    """Return the weights of a file in the names that ComfyUI gives them."""
    tensors = load_file(file)
    if clip is None:
        return {f"diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    prefix = "model.diffusion_model."
    unet = {
        f"diffusion_model.{key.removeprefix(prefix)}": tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }
    return {**unet, **config.process_clip_state_dict(dict(tensors))}


class Unread(logging.Handler):
    """Counts the keys that ComfyUI says it has not read."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "not loaded" in record.getMessage()


def apply(folder: Path, file: Path) -> dict[str, Any]:
    """Return how far the base with a LoRA is from the tuned model, as ComfyUI computes it."""
    config, model, clip = build()
    base = read_weights(config, model, clip, folder / "base.safetensors")
    tuned = read_weights(config, model, clip, folder / "tuned.safetensors")
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip, key_map)
    handler = Unread()
    logging.getLogger().addHandler(handler)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(file)), key_map)
    actual = dict(base)
    for key, patch in patches.items():
        weight = base[key].clone()
        actual[key] = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight, key)
    changed = [key for key in base if not torch.equal(base[key], tuned[key])]
    worst = max(
        float((actual[key] - tuned[key]).norm() / (tuned[key] - base[key]).norm())
        for key in changed
    )
    return {
        "changed": len(changed),
        "patched": len(patches),
        "unread": handler.count,
        "distance": worst,
        "others": sum(not torch.equal(actual[k], tuned[k]) for k in base if k not in changed),
    }


if __name__ == "__main__":
    if COMMAND == "build":
        write_models(Path(FOLDER))
    else:
        print(json.dumps(apply(Path(FOLDER), Path(FILES[0]))))
