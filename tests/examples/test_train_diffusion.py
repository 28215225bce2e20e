"""The example for image models, on small pipelines with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.peft
from helpers.plain_peft import distance
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import matryoshka_lora as ml

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from helpers.diffusers_models import small_flux, small_unet  # noqa: E402

# transformers 5.24 requires for its text encoders a version of PEFT that is not released yet.
transformers.integrations.peft.MIN_PEFT_VERSION = "0.18.0"

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_diffusion.py"
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


def vae(latent_channels: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=16,
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


def flux(folder: Path) -> Any:
    text_encoder, tokenizer = clip(folder)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    vocabulary += [(letter, -2.0) for letter in LETTERS]
    t5 = T5Config(
        vocab_size=130, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2, is_gated_act=False
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(1),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=T5Tokenizer(vocab=vocabulary),
        transformer=small_flux(),
    )


@pytest.mark.parametrize("new_pipeline", [stable_diffusion, flux], ids=lambda f: f.__name__)
def test_every_rank_of_a_pipeline(tmp_path: Path, new_pipeline: Any) -> None:
    torch.manual_seed(0)
    new_pipeline(tmp_path).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number in range(3):
        color = (80 * number, 200 - 60 * number, 30)
        Image.new("RGB", (20, 16), color).save(tmp_path / "images" / f"{number}.png")
    words = "--model model --images images --output out --resolution 16 --rank 4 --steps 40 "
    command = [sys.executable, str(EXAMPLE), *words.split(), "--prompt", "a dog"]
    command += ["--learning-rate", "1e-2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "validation loss" in result.stdout
    assert ml.open(tmp_path / "out" / "adapter").max_rank == 4
    for rank in (1, 2, 4):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
        part = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
        pipeline.load_lora_weights(str(tmp_path / "out" / f"rank-{rank}.safetensors"))
        updates = {
            name: module.get_delta_weight("default_0")
            for name, module in part.named_modules()
            if hasattr(module, "get_delta_weight")
        }
        ml.export(tmp_path / "out" / "adapter", tmp_path / f"rank-{rank}", rank)
        layers = ml.open(tmp_path / f"rank-{rank}").layers
        assert updates.keys() == {layer.name for layer in layers}
        for layer in layers:
            factors = layer.read()
            expected = torch.tensor(layer.scale * factors.B @ factors.A)
            assert distance(updates[layer.name], expected) < 1e-5
