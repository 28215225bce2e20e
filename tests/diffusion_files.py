"""LoRA files of tiny diffusion models, written by diffusers and PEFT themselves, and in kohya's style by its keys."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.integrations.peft
from conftest import randomize
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

diffusers = pytest.importorskip("diffusers", reason="files of diffusion models need diffusers")

from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin, WanLoraLoaderMixin  # noqa: E402
from diffusers.utils import convert_state_dict_to_diffusers  # noqa: E402

# transformers 5.24 asks its own text encoders for a PEFT that is not out yet; what it calls of PEFT is there.
transformers.integrations.peft.MIN_PEFT_VERSION = "0.18.0"

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.2"]
TEXT_TARGETS = ["q_proj", "v_proj", "out_proj", "fc1"]  # kohya's keys are known to diffusers by out_proj's
FLUX_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_out", "x_embedder"]

Entry = tuple[Tensor, Tensor, float]


def unet() -> Any:
    """A UNet of Stable Diffusion 1.5's kind, with random weights."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=16,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config).eval()


def flux() -> Any:
    """A transformer of Flux's kind, with random weights."""
    torch.manual_seed(2)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
    ).eval()


class Pipeline(StableDiffusionLoraLoaderMixin):
    """What diffusers' loader needs of a pipeline: its models."""

    components: dict[str, Any] = {}
    hf_device_map = None

    def __init__(self) -> None:
        self.unet, self.text_encoder = unet(), text_encoder()

    def outputs(self) -> Tensor:
        """Of both models, on fixed inputs."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            words = self.text_encoder(torch.arange(8)[None]).last_hidden_state
            image = torch.randn(1, 4, 8, 8, generator=generator)
            made = self.unet(image, 3, encoder_hidden_states=words).sample
        return torch.cat([words.flatten(), made.flatten()])


class FluxPipeline(FluxLoraLoaderMixin):
    components: dict[str, Any] = {}
    hf_device_map = None

    def __init__(self) -> None:
        self.transformer, self.text_encoder = flux(), None

    def outputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)

        def some(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        with torch.no_grad():
            made = self.transformer(
                hidden_states=some(1, 16, 4),
                encoder_hidden_states=some(1, 5, 12),
                pooled_projections=some(1, 12),
                timestep=torch.tensor([0.5]),
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(5, 3),
            ).sample
        return made.flatten()


class WanPipeline(WanLoraLoaderMixin):
    components: dict[str, Any] = {}
    hf_device_map = None

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.transformer = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )


def with_lora(model: Any, targets: list[str], seed: int, **config: Any) -> LoraConfig:
    """Give a model a random LoRA, by PEFT."""
    lora = LoraConfig(**{"r": 6, "lora_alpha": 6, "target_modules": targets, **config})
    model.add_adapter(lora)
    randomize(model, seed)
    return lora


def save_sd(folder: Path, old: bool = False, metadata: bool = False, **config: Any) -> tuple[Path, Tensor]:
    """A file as diffusers' training scripts write it for Stable Diffusion, and the outputs with the LoRA."""
    pipe = Pipeline()
    models, targets = [pipe.unet, pipe.text_encoder], [UNET_TARGETS, TEXT_TARGETS]
    if old:  # these keys exist for attention only, and the loader no longer reads those of a text encoder
        models, targets = [pipe.unet], [UNET_TARGETS[:4]]
    loras = [with_lora(model, own, 4, **config) for model, own in zip(models, targets, strict=True)]
    states = [get_peft_model_state_dict(model, adapter_name="default") for model in models]
    if old:
        states = [convert_state_dict_to_diffusers(state) for state in states]
    more = {}
    if metadata:
        names = ("unet_lora_adapter_metadata", "text_encoder_lora_adapter_metadata")
        more = {name: lora.to_dict() for name, lora in zip(names, loras, strict=True)}
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, *states, weight_name="lora.safetensors", **more)
    return folder / "lora.safetensors", pipe.outputs()


def save_flux(folder: Path, metadata: bool = True, **config: Any) -> tuple[Path, Tensor]:
    """A file as diffusers' training scripts write it for Flux, and the outputs with the LoRA."""
    pipe = FluxPipeline()
    lora = with_lora(pipe.transformer, FLUX_TARGETS, 6, **config)
    more = {"transformer_lora_adapter_metadata": lora.to_dict()} if metadata else {}
    state = get_peft_model_state_dict(pipe.transformer, adapter_name="default")
    FluxLoraLoaderMixin.save_lora_weights(folder, state, weight_name="lora.safetensors", **more)
    return folder / "lora.safetensors", pipe.outputs()


def save_kohya(file: Path, alpha: float = 4.0, dtype: torch.dtype = torch.float32, seed: int = 7) -> Path:
    """A file with kohya's keys for the tiny Stable Diffusion, with ranks by kind of layer and one alpha."""
    pipe, generator, state = Pipeline(), torch.Generator().manual_seed(seed), {}
    for first, model, targets in (("lora_unet", pipe.unet, UNET_TARGETS), ("lora_te", pipe.text_encoder, TEXT_TARGETS)):
        for name, module in model.named_modules():
            if not name.endswith(tuple(targets)) or not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            inside = name if first == "lora_unet" else f"text_model.{name.removeprefix('text_model.')}"
            key = f"{first}_{inside.replace('.', '_')}"
            wide = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
            rank = 4 if wide else 8
            shape = module.weight.shape
            A = torch.randn(rank, *shape[1:], generator=generator) * 0.3
            B = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * 0.3
            state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = A.to(dtype), B.to(dtype)
            state[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
    metadata = {
        "ss_network_dim": "8",
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps({"conv_dim": "4", "conv_alpha": str(alpha), "dropout": "0.1"}),
        "ss_training_comment": "a test",
        "sshs_model_hash": "0",
        "sshs_legacy_hash": "0",
    }
    save_file(state, file, metadata)
    return file


def save_wan(file: Path) -> Path:
    """A file with the names of Wan's authors, as ai-toolkit writes it: no alphas, no metadata."""
    generator, state = torch.Generator().manual_seed(8), {}
    attention = [f"{kind}_attn.{letter}" for kind in ("self", "cross") for letter in "qkvo"]
    for name, wide, tall in (*((name, 24, 24) for name in attention), ("ffn.0", 24, 32), ("ffn.2", 32, 24)):
        key, fall = f"diffusion_model.blocks.0.{name}", torch.logspace(0, -len(state) / 8, 6)
        state[f"{key}.lora_A.weight"] = torch.randn(6, wide, generator=generator) * fall[:, None]
        state[f"{key}.lora_B.weight"] = torch.randn(tall, 6, generator=generator)
    save_file(state, file)
    return file


def save_old_text(file: Path) -> Path:
    """A text encoder's attention by the names of diffusers 0.13 to 0.18."""
    generator, state = torch.Generator().manual_seed(9), {}
    for number in range(2):
        for name in ("to_q", "to_k", "to_v", "to_out"):
            key = f"text_encoder.text_model.encoder.layers.{number}.self_attn.{name}_lora"
            state[f"{key}.down.weight"] = torch.randn(3, 12, generator=generator)
            state[f"{key}.up.weight"] = torch.randn(12, 3, generator=generator)
    save_file(state, file)
    return file


def merged_outputs(pipe: Any, updates: dict[str, np.ndarray]) -> Tensor:
    """The outputs of a pipeline with dense updates added to its weights, whatever style their names have."""
    layers = {}
    for part in ("unet", "transformer", "text_encoder"):
        for name, module in (getattr(pipe, part, None) or nn.Module()).named_modules():
            layers[_letters(f"{part}.{name}")] = module
    for name, update in updates.items():
        weight = layers[_letters(name)].weight
        weight.data += torch.from_numpy(update).float().reshape(weight.shape)
    found: Tensor = pipe.outputs()
    return found


def _letters(name: str) -> str:
    """A name without what styles spell in their own ways."""
    name = re.sub(r"\.(lora|lora_linear_layer)$", "", name)
    for own, other in (("lora_unet_", "unet."), ("lora_te_", "text_encoder."), ("lora_transformer_", "transformer.")):
        name = name.replace(own, other)
    return re.sub(r"[._]|text_model", "", name.replace("to_out.lora", "to_out.0"))


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def deltas(file: Path) -> dict[str, np.ndarray]:
    """The dense updates by the pair's name, from the keys alone, as kohya's and new diffusers' readers scale them.

    The scale is alpha by rank where there is an alpha, and 1 where there is none.
    """
    state, found = load_file(file), {}
    endings = ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight"))
    for down, up in (*endings, (".down.weight", ".up.weight")):
        for key in state:
            if key.endswith(down):
                name = key.removesuffix(down)
                A, B = state[key].double().flatten(1).numpy(), state[name + up].double().flatten(1).numpy()
                alpha = float(state.get(f"{name}.alpha", torch.tensor(float(A.shape[0]))))
                found[name] = B @ A * alpha / A.shape[0]
    return found
