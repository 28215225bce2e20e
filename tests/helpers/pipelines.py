"""Small pipelines of diffusers with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from helpers.diffusers_models import small_flux, small_unet
from helpers.models import randomize

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def clip(folder: Path) -> tuple[Any, Any]:
    """Return a text encoder with a tokenizer that has a token for each letter."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{x}</w>" for x in LETTERS)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.model_max_length = 8
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config), tokenizer


def vae(latent_channels: int, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=16,
        **options,
    )


def stable_diffusion(folder: Path) -> Any:
    text_encoder, tokenizer = clip(folder)
    return diffusers.StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=small_unet(),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def t5() -> tuple[Any, Any]:
    """Return a text encoder with a tokenizer that has a token for each letter."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    vocabulary += [(letter, -2.0) for letter in LETTERS]
    config = T5Config(
        vocab_size=130, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2, is_gated_act=False
    )
    return T5EncoderModel(config), T5Tokenizer(vocab=vocabulary)


def flux(folder: Path) -> Any:
    text_encoder, tokenizer = clip(folder)
    text_encoder_2, tokenizer_2 = t5()
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(1, shift_factor=0.1),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=small_flux(),
    )


def wan(folder: Path) -> Any:
    """Return a pipeline of videos."""
    text_encoder, tokenizer = t5()
    return diffusers.WanPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=12,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
    )


def save_lora(pipeline: Any, file: Path) -> None:
    """Write a random LoRA for a pipeline in memory, with the keys of diffusers."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "q_proj", "out_proj"],
        rank_pattern={"to_q": 2},
    )
    layers: dict[str, Any] = {}
    for part in ("unet", "transformer", "text_encoder"):
        model = getattr(pipeline, part, None)
        if model is not None and not (
            part == "text_encoder" and "transformer_lora_layers" in layers
        ):
            model.add_adapter(config)
            randomize(model)
            tensors = get_peft_model_state_dict(model, adapter_name="default")
            layers |= {
                f"{part}_lora_layers": tensors,
                f"{part}_lora_adapter_metadata": config.to_dict(),
            }
    pipeline.save_lora_weights(file.parent, weight_name=file.name, **layers)
