"""Models that write no text, or not only: every rank of an adapter on them against plain PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_checks import PARTS, Case, Inputs, check
from peft import LoraConfig, get_peft_model
from tiny_architectures import CONTEXT
from tiny_chat import tiny_tokenizer
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from matryoshka_lora import MatryoshkaError, nest
from matryoshka_lora.engine.engine import Engine

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {"image_size": 16, "patch_size": 8}
TEXTS = {"vocab_size": 96, "max_position_embeddings": CONTEXT}
LARGE = {"initializer_range": 0.2}  # for the answers to depend on the adapter


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZES, **TEXTS, **LARGE, num_labels=5))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**SIZES, **IMAGES, **LARGE, num_labels=5))


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=96, **sizes, decoder_start_token_id=0, is_gated_act=True))


def clip() -> nn.Module:
    parts = {"text_config": {**SIZES, **TEXTS, "eos_token_id": 2}, "vision_config": {**SIZES, **IMAGES}}
    return CLIPModel(CLIPConfig(**parts, projection_dim=16, initializer_factor=5.0))


def whisper() -> nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    lengths = {"max_source_positions": 20, "max_target_positions": CONTEXT, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = WhisperConfig(vocab_size=96, **sizes, **heads, **lengths, **tokens, init_std=0.2)
    return WhisperForConditionalGeneration(config)


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="the UNet needs diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(4, 95, (rows, length), generator=torch.Generator().manual_seed(rows + length))


UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_shortcut", "proj_in", "time_emb_proj"]
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Inputs, str]] = {
    "bert": (bert, "all-linear", lambda rows, length: {"input_ids": ids(rows, length)}, "logits"),
    "t5": (
        t5,
        "all-linear",
        lambda rows, length: {"input_ids": ids(rows, length), "decoder_input_ids": ids(rows, length)},
        "logits",
    ),
    "vit": (vit, "all-linear", lambda rows, length: {"pixel_values": numbers(rows, 3, 16, 16)}, "logits"),
    "clip-image": (
        clip,
        "all-linear",
        lambda rows, length: {"input_ids": ids(rows, length), "pixel_values": numbers(rows, 3, 16, 16)},
        "image_embeds",
    ),
    "clip-text": (
        clip,
        "all-linear",
        lambda rows, length: {"input_ids": ids(rows, length), "pixel_values": numbers(rows, 3, 16, 16)},
        "text_embeds",
    ),
    "whisper": (
        whisper,
        "all-linear",
        lambda rows, length: {"input_features": numbers(rows, 8, 40), "decoder_input_ids": ids(rows, length)},
        "logits",
    ),
    "unet": (
        unet,
        UNET_LAYERS,
        lambda rows, length: {
            "sample": numbers(rows, 3, 8, 8),
            "timestep": torch.full((rows,), 7),
            "encoder_hidden_states": numbers(rows, 5, 12),
        },
        "sample",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_is_plain_pefts(name: str, tmp_path: Path) -> None:
    build, targets, inputs, output = MODELS[name]
    torch.manual_seed(0)
    case = Case(build().double().eval(), {"target_modules": targets}, tmp_path, inputs, output)
    report = check(case)
    found = {part: verdict.state for part, verdict in report.parts.items()}
    assert found == dict.fromkeys(("nest", "train", *PARTS), "right"), report.parts
    assert report.layers > 10


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_evaluates_language_models_only(name: str) -> None:
    build, targets, _, _ = MODELS[name]
    adapter = nest(get_peft_model(build().eval(), LoraConfig(r=2, target_modules=targets)))
    with pytest.raises(MatryoshkaError, match=r"is no causal language model of transformers.*by set_rank"):
        Engine(adapter, tiny_tokenizer())
