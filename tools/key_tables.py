"""Generate the names of the modules of image and video models, and check them with diffusers.

``python tools/key_tables.py`` writes ``src/matryoshka_lora/lora/models.json``. A new model is an
entry of `MODELS`, one of `CLASSES` for the check, and one of ``research/families.json`` for the
docs; then run this script and ``python -m research.pages``.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from matryoshka_lora.lora.keys import Alias, Model, Module

OUTPUT = Path(__file__).parents[1] / "src/matryoshka_lora/lora/models.json"

QKV = ("to_q", "to_k", "to_v")
ATTENTION = (*QKV, "to_out.0")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


# --- Rules ---


def rename(
    names: Mapping[str, str], authors: str = "", diffusers: str = "", num_blocks: int = 1
) -> list[Module]:
    """Return modules from the names of the authors and of diffusers inside a block.

    Args:
        names: The name in diffusers by the authors' name.
        authors: The authors' name of the block.
        diffusers: The name of the block in diffusers.
        num_blocks: The number of blocks.
    """
    return [
        Module(f"{authors}{authors_name}", (f"{diffusers}{name}",), num_blocks=num_blocks)
        for authors_name, name in names.items()
    ]


def same(names: Iterable[str], block: str = "", num_blocks: int = 1) -> list[Module]:
    """Return modules that have the same name for the authors and in diffusers."""
    return rename({name: name for name in names}, block, block, num_blocks)


def fused_qkv(authors: str, diffusers: str, names: Iterable[str], num_blocks: int) -> Module:
    """Return a fused projection to queries, keys and values."""
    splits = tuple(f"{diffusers}.{name}" for name in names)
    return Module(authors, splits, (1,) * len(splits), num_blocks=num_blocks)


CLIP_LAYER = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
T5_LAYER = [f"0.SelfAttention.{name}" for name in "qkvo"]
T5_LAYER += [f"1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")]
TEXT_ENCODER_MODULES = (
    *same(CLIP_LAYER, "text_model.encoder.layers.{}.", num_blocks=32),
    *same(T5_LAYER, "encoder.block.{}.layer.", num_blocks=24),
    *same(["text_projection"]),
)
"""The modules of CLIP and T5, with the names of transformers."""


def unet(down: tuple[int, ...], middle: int, num_layers: int = 2) -> list[Module]:
    """Return the modules of a UNet.

    Args:
        down: The number of transformer blocks in each attention of each down block. The up blocks
            have them in the reverse order.
        middle: The same for the middle block.
        num_layers: The number of layers in each down block. The up blocks have one more.
    """
    ends = {
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
    }
    modules = rename(ends)
    for block, depth in enumerate(down):
        for layer in range(num_layers):
            number = (num_layers + 1) * block + layer + 1
            modules += unet_layer(f"input_blocks.{number}", f"down_blocks.{block}", layer, depth)
        if block < len(down) - 1:
            downsampler = f"down_blocks.{block}.downsamplers.0.conv"
            number = (num_layers + 1) * (block + 1)
            modules += rename({f"input_blocks.{number}.0.op": downsampler})
    modules += unet_resnet("middle_block.0.", "mid_block.resnets.0.")
    modules += unet_attention("middle_block.1.", "mid_block.attentions.0.", middle)
    modules += unet_resnet("middle_block.2.", "mid_block.resnets.1.")
    for block, depth in enumerate(reversed(down)):
        for layer in range(num_layers + 1):
            number = (num_layers + 1) * block + layer
            modules += unet_layer(f"output_blocks.{number}", f"up_blocks.{block}", layer, depth)
        if block < len(down) - 1:
            upsampler = f"output_blocks.{number}.{2 if depth else 1}.conv"
            modules += rename({upsampler: f"up_blocks.{block}.upsamplers.0.conv"})
    return modules


def unet_layer(authors: str, diffusers: str, layer: int, depth: int) -> list[Module]:
    """Return a ResNet and the attention after it, if there is one."""
    modules = unet_resnet(f"{authors}.0.", f"{diffusers}.resnets.{layer}.")
    if depth:
        modules += unet_attention(f"{authors}.1.", f"{diffusers}.attentions.{layer}.", depth)
    return modules


def unet_resnet(authors: str, diffusers: str) -> list[Module]:
    """Return the modules of a ResNet."""
    names = {
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    return rename(names, authors, diffusers)


def unet_attention(authors: str, diffusers: str, depth: int) -> list[Module]:
    """Return the modules of an attention with some transformer blocks."""
    names = [f"attn{number}.{name}" for number in (1, 2) for name in ATTENTION]
    names += ["ff.net.0.proj", "ff.net.2"]
    block = "transformer_blocks.{}."
    modules = rename({name: name for name in ("proj_in", "proj_out")}, authors, diffusers)
    modules += rename(
        {name: name for name in names}, f"{authors}{block}", f"{diffusers}{block}", depth
    )
    return modules


def stable_diffusion_3() -> list[Module]:
    """Return the modules of Stable Diffusion 3 and 3.5."""
    num_blocks = 38
    authors, diffusers = "joint_blocks.{}.", "transformer_blocks.{}."
    block = {
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn2.proj": "attn2.to_out.0",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "x_block.adaLN_modulation.1": "norm1.linear",
        "context_block.attn.proj": "attn.to_add_out",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
    }
    ends = {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }
    attention = {
        "x_block.attn": ("attn", QKV),
        "x_block.attn2": ("attn2", QKV),
        "context_block.attn": ("attn", ADDED_QKV),
    }
    return [
        *rename(block, authors, diffusers, num_blocks),
        *(
            fused_qkv(f"{authors}{name}.qkv", f"{diffusers}{diffusers_name}", splits, num_blocks)
            for name, (diffusers_name, splits) in attention.items()
        ),
        # The last block has a shift and a scale only, in the other order.
        Module(
            f"{authors}context_block.adaLN_modulation.1",
            (f"{diffusers}norm1_context.linear",),
            swapped_ratio=2,
            num_blocks=num_blocks,
        ),
        *rename(ends),
        FINAL_MODULATION,
    ]


def flux_blocks(num_double: int, num_single: int) -> list[Module]:
    """Return the modules of the blocks of Flux, which HunyuanVideo has too."""
    double = {
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "img_mod.lin": "norm1.linear",
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "txt_mod.lin": "norm1_context.linear",
    }
    attention = "transformer_blocks.{}.attn"
    modules = [
        *rename(double, "double_blocks.{}.", "transformer_blocks.{}.", num_double),
        fused_qkv("double_blocks.{}.img_attn.qkv", attention, QKV, num_double),
        fused_qkv("double_blocks.{}.txt_attn.qkv", attention, ADDED_QKV, num_double),
    ]
    if num_single:
        single = "single_transformer_blocks.{}."
        splits = (*(f"{single}attn.{name}" for name in QKV), f"{single}proj_mlp")
        names = {"linear2": "proj_out", "modulation.lin": "norm.linear"}
        modules += [
            Module("single_blocks.{}.linear1", splits, (1, 1, 1, 4), num_blocks=num_single),
            *rename(names, "single_blocks.{}.", single, num_single),
        ]
    return modules


FINAL_MODULATION = Module("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped_ratio=2)


def embedder(authors: str, diffusers: str) -> dict[str, str]:
    """Return the names of an embedder of two layers in models like Flux."""
    return {
        f"{authors}.in_layer": f"{diffusers}.linear_1",
        f"{authors}.out_layer": f"{diffusers}.linear_2",
    }


def flux() -> list[Module]:
    """Return the modules of Flux."""
    ends = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        **embedder("time_in", "time_text_embed.timestep_embedder"),
        **embedder("vector_in", "time_text_embed.text_embedder"),
        **embedder("guidance_in", "time_text_embed.guidance_embedder"),
        "final_layer.linear": "proj_out",
    }
    return [*flux_blocks(19, 38), *rename(ends), FINAL_MODULATION]


def chroma_guidance() -> list[Module]:
    """Return the modules of Chroma that Flux does not have."""
    layer = {"in_layer": "linear_1", "out_layer": "linear_2"}
    guidance = "distilled_guidance_layer."
    block = f"{guidance}layers.{{}}."
    return [*rename(layer, block, block, 5), *same(["in_proj", "out_proj"], guidance)]


def flux_2() -> list[Module]:
    """Return the modules of Flux.2 and Flux.2 klein."""
    num_double_blocks, num_single_blocks = 8, 48
    double = {
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.linear_in",
        "img_mlp.2": "ff.linear_out",
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    }
    attention = "transformer_blocks.{}.attn"
    single = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
    ends = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        **embedder("time_in", "time_guidance_embed.timestep_embedder"),
        **embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "final_layer.linear": "proj_out",
    }
    return [
        *rename(double, "double_blocks.{}.", "transformer_blocks.{}.", num_double_blocks),
        fused_qkv("double_blocks.{}.img_attn.qkv", attention, QKV, num_double_blocks),
        fused_qkv("double_blocks.{}.txt_attn.qkv", attention, ADDED_QKV, num_double_blocks),
        *rename(single, "single_blocks.{}.", "single_transformer_blocks.{}.", num_single_blocks),
        *rename(ends),
        FINAL_MODULATION,
    ]


# The first ones are what is left of the names of xlabs without `processor` and a final `lora`.
FLUX_ALIASES = (
    Alias("double_blocks.{}.qkv_lora1", "double_blocks.{}.img_attn.qkv", (0, 1, 2)),
    Alias("double_blocks.{}.qkv_lora2", "double_blocks.{}.txt_attn.qkv", (0, 1, 2)),
    Alias("double_blocks.{}.proj_lora1", "double_blocks.{}.img_attn.proj", (0,)),
    Alias("double_blocks.{}.proj_lora2", "double_blocks.{}.txt_attn.proj", (0,)),
    Alias("single_blocks.{}.qkv", "single_blocks.{}.linear1", (0, 1, 2)),
    Alias("single_blocks.{}.proj", "single_blocks.{}.linear2", (0,)),
    Alias("single_blocks.{}.linear1_qkv", "single_blocks.{}.linear1", (0, 1, 2)),
)


def wan() -> list[Module]:
    """Return the modules of Wan 2.1 and 2.2, and of VACE."""
    block: dict[str, str] = {}
    for attention, name in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for letter, projection in zip("qkvo", ATTENTION, strict=True):
            block[f"{attention}.{letter}"] = f"{name}.{projection}"
    block |= {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    image = {"cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj"}
    ends = {
        "patch_embedding": "patch_embedding",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "head.head": "proj_out",
        "vace_patch_embedding": "vace_patch_embedding",
        "vace_blocks.0.before_proj": "vace_blocks.0.proj_in",
    }
    vace = {**block, "after_proj": "proj_out"}
    return [
        *rename({**block, **image}, "blocks.{}.", "blocks.{}.", num_blocks=40),
        *rename(vace, "vace_blocks.{}.", "vace_blocks.{}.", num_blocks=15),
        *rename(ends),
    ]


def hunyuan_video(num_double: int, num_single: int, ends: Mapping[str, str]) -> list[Module]:
    """Return the modules of a version of HunyuanVideo, with ComfyUI's names."""
    text, embed = "txt_in.", "context_embedder.time_text_embed."
    authors = f"{text}individual_token_refiner.blocks.{{}}."
    diffusers = "context_embedder.token_refiner.refiner_blocks.{}."
    refiner = {
        "adaLN_modulation.1": "norm_out.linear",
        "self_attn.proj": "attn.to_out.0",
        "mlp.0": "ff.net.0.proj",
        "mlp.2": "ff.net.2",
    }
    common = {
        "img_in.proj": "x_embedder.proj",
        f"{text}input_embedder": "context_embedder.proj_in",
        **embedder(f"{text}t_embedder", f"{embed}timestep_embedder"),
        **embedder(f"{text}c_embedder", f"{embed}text_embedder"),
        "final_layer.linear": "proj_out",
    }
    return [
        *flux_blocks(num_double, num_single),
        *rename(refiner, authors, diffusers, 2),
        fused_qkv(f"{authors}self_attn.qkv", f"{diffusers}attn", QKV, 2),
        *rename({**common, **ends}),
        FINAL_MODULATION,
    ]


def hunyuan_video_1() -> list[Module]:
    """Return the modules of HunyuanVideo."""
    ends = {
        **embedder("time_in", "time_text_embed.timestep_embedder"),
        **embedder("vector_in", "time_text_embed.text_embedder"),
        **embedder("guidance_in", "time_text_embed.guidance_embedder"),
    }
    return hunyuan_video(20, 40, ends)


def hunyuan_video_1_5() -> list[Module]:
    """Return the modules of HunyuanVideo 1.5."""
    ends = embedder("time_in", "time_embed.timestep_embedder")
    ends |= {
        "vision_in.proj.1": "image_embedder.linear_1",
        "vision_in.proj.3": "image_embedder.linear_2",
    }
    ends |= {f"byt5_in.fc{number}": f"context_embedder_2.linear_{number}" for number in (1, 2, 3)}
    return hunyuan_video(54, 0, ends)


def hunyuan_video_aliases(modules: Iterable[Module]) -> tuple[Alias, ...]:
    """Return the names in the checkpoints of HunyuanVideo that ComfyUI renames."""
    renamed = {
        r"_mod\.lin$": "_mod.linear",
        r"\.modulation\.lin$": ".modulation.linear",
        r"mlp\.0$": "mlp.fc1",
        r"mlp\.2$": "mlp.fc2",
        r"c_embedder\.in_layer$": "c_embedder.linear_1",
        r"c_embedder\.out_layer$": "c_embedder.linear_2",
        r"(time_in|guidance_in|t_embedder)\.in_layer$": r"\1.mlp.0",
        r"(time_in|guidance_in|t_embedder)\.out_layer$": r"\1.mlp.2",
    }
    aliases: list[Alias] = []
    for module in modules:
        for pattern, replacement in renamed.items():
            name = re.sub(pattern, replacement, module.authors)
            if name != module.authors:
                aliases.append(Alias(name, module.authors, (0,)))
    return tuple(aliases)


LTX_BLOCK = [f"attn{number}.{name}" for number in (1, 2) for name in ATTENTION]
LTX_BLOCK += ["ff.net.0.proj", "ff.net.2"]


def modulation(authors: str, diffusers: str) -> dict[str, str]:
    """Return the names of a modulation by the time in LTX."""
    names = ["emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear"]
    return {f"{authors}.{name}": f"{diffusers}.{name}" for name in names}


def ltx() -> list[Module]:
    """Return the modules of LTX-Video."""
    return [
        *same(LTX_BLOCK, "transformer_blocks.{}.", num_blocks=48),
        *same(["caption_projection.linear_1", "caption_projection.linear_2", "proj_out"]),
        *rename({"patchify_proj": "proj_in", **modulation("adaln_single", "time_embed")}),
    ]


def ltx_2() -> list[Module]:
    """Return the modules of LTX-2."""
    audio = [f"audio_{name}" for name in LTX_BLOCK]
    audio += [
        f"{way}_attn.{name}" for way in ("audio_to_video", "video_to_audio") for name in ATTENTION
    ]
    ends = {
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        **modulation("adaln_single", "time_embed"),
        **modulation("audio_adaln_single", "audio_time_embed"),
        **modulation("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
        **modulation("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
        **modulation("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
        **modulation("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    }
    projections = [f"caption_projection.linear_{number}" for number in (1, 2)] + ["proj_out"]
    return [
        *same([*LTX_BLOCK, *audio], "transformer_blocks.{}.", num_blocks=48),
        *same([*projections, *(f"audio_{name}" for name in projections)]),
        *rename(ends),
    ]


def hidream() -> list[Module]:
    """Return the modules of HiDream, whose authors' names are diffusers' names."""
    linears = ("w1", "w2", "w3")
    block = [f"attn1.{name}" for name in (*QKV, "to_out")] + ["adaLN_modulation.1"]
    block += [f"ff_i.shared_experts.{name}" for name in linears]
    block += [f"ff_i.experts.{expert}.{name}" for expert in range(4) for name in linears]
    text = [f"attn1.{name}_t" for name in (*QKV, "to_out")] + [f"ff_t.{name}" for name in linears]
    ends = [f"t_embedder.timestep_embedder.linear_{number}" for number in (1, 2)]
    ends += [f"p_embedder.pooled_embedder.linear_{number}" for number in (1, 2)]
    ends += ["x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    return [
        *same([*block, *text], "double_stream_blocks.{}.block.", num_blocks=16),
        *same(block, "single_stream_blocks.{}.block.", num_blocks=32),
        *same(["linear"], "caption_projection.{}.", num_blocks=49),
        *same(ends),
    ]


def cosmos_predict_2() -> list[Module]:
    """Return the modules of Cosmos-Predict2 and 2.5, and of Anima."""
    block = {"mlp.layer1": "ff.net.0.proj", "mlp.layer2": "ff.net.2"}
    for attention, name in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        authors = ("q_proj", "k_proj", "v_proj", "output_proj")
        for projection, diffusers in zip(authors, ATTENTION, strict=True):
            block[f"{attention}.{projection}"] = f"{name}.{diffusers}"
    for position, name in enumerate(("self_attn", "cross_attn", "mlp"), start=1):
        for number in (1, 2):
            block[f"adaln_modulation_{name}.{number}"] = f"norm{position}.linear_{number}"
    ends = {
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "crossattn_proj.0": "crossattn_proj.0",
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.adaln_modulation.2": "norm_out.linear_2",
        "final_layer.linear": "proj_out",
    }
    return [*rename(block, "blocks.{}.", "transformer_blocks.{}.", num_blocks=36), *rename(ends)]


def mochi() -> list[Module]:
    """Return the modules of Mochi. Its last block has no output for the text."""
    num_blocks, last = 48, 47
    authors, diffusers = "blocks.{}.", "transformer_blocks.{}."
    block = {"mod_x": "norm1.linear", "attn.proj_x": "attn1.to_out.0", "mlp_x.w2": "ff.net.2"}
    text = {
        "mod_y": "norm1_context.linear",
        "attn.proj_y": "attn1.to_add_out",
        "mlp_y.w2": "ff_context.net.2",
    }
    ends = {
        f"blocks.{last}.mod_y": f"transformer_blocks.{last}.norm1_context.linear_1",
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        **{
            f"t5_y_embedder.{name}": f"time_embed.pooler.{name}"
            for name in ("to_kv", "to_q", "to_out")
        },
        "t5_yproj": "time_embed.caption_proj",
        "final_layer.linear": "proj_out",
    }
    text_qkv = tuple(f"{diffusers}attn1.{name}" for name in ADDED_QKV)
    modules = [
        *rename(block, authors, diffusers, num_blocks),
        *rename(text, authors, diffusers, last),
        fused_qkv(f"{authors}attn.qkv_x", f"{diffusers}attn1", QKV, num_blocks),
        # The text is half as wide as the attention.
        Module(f"{authors}attn.qkv_y", text_qkv, (2, 2, 2), num_blocks=num_blocks),
    ]
    # The gate of an MLP is the second half in diffusers.
    for name, diffusers_name, count in (
        ("x", "ff", num_blocks),
        ("y", "ff_context", last),
    ):
        splits = (f"{diffusers}{diffusers_name}.net.0.proj",)
        modules.append(
            Module(f"{authors}mlp_{name}.w1", splits, swapped_ratio=16 / 3, num_blocks=count)
        )
    return [
        *modules,
        *rename(ends),
        Module("final_layer.mod", ("norm_out.linear",), swapped_ratio=2),
    ]


def aura_flow() -> list[Module]:
    """Return the modules of AuraFlow."""
    names = dict(zip("qkvo", ATTENTION, strict=True))
    text_names = dict(zip("qkvo", (*ADDED_QKV, "to_add_out"), strict=True))
    mlp = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
    double = {
        **{f"attn.w2{letter}": f"attn.{name}" for letter, name in names.items()},
        **{f"attn.w1{letter}": f"attn.{name}" for letter, name in text_names.items()},
        **{f"mlpX.{authors}": f"ff.{name}" for authors, name in mlp.items()},
        **{f"mlpC.{authors}": f"ff_context.{name}" for authors, name in mlp.items()},
        "modX.1": "norm1.linear",
        "modC.1": "norm1_context.linear",
    }
    single = {
        **{f"attn.w1{letter}": f"attn.{name}" for letter, name in names.items()},
        **{f"mlp.{authors}": f"ff.{name}" for authors, name in mlp.items()},
        "modCX.1": "norm1.linear",
    }
    ends = {
        "init_x_linear": "pos_embed.proj",
        "cond_seq_linear": "context_embedder",
        "t_embedder.mlp.0": "time_step_proj.linear_1",
        "t_embedder.mlp.2": "time_step_proj.linear_2",
        "final_linear": "proj_out",
    }
    return [
        *rename(double, "double_layers.{}.", "joint_transformer_blocks.{}.", 4),
        *rename(single, "single_layers.{}.", "single_transformer_blocks.{}.", 32),
        *rename(ends),
        Module("modF.1", ("norm_out.linear",), swapped_ratio=2),
    ]


def pixart() -> list[Module]:
    """Return the modules of PixArt-alpha and PixArt-sigma."""
    num_blocks = 28
    authors, diffusers = "blocks.{}.", "transformer_blocks.{}."
    block = {
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.proj": "attn2.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    }
    ends = {
        "x_embedder.proj": "pos_embed.proj",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
    }
    for name, embedding in (("t", "timestep"), ("csize", "resolution"), ("ar", "aspect_ratio")):
        prefix = f"adaln_single.emb.{embedding}_embedder.linear_"
        ends |= {f"{name}_embedder.mlp.0": f"{prefix}1", f"{name}_embedder.mlp.2": f"{prefix}2"}
    return [
        *rename(block, authors, diffusers, num_blocks),
        fused_qkv(f"{authors}attn.qkv", f"{diffusers}attn1", QKV, num_blocks),
        fused_qkv(f"{authors}cross_attn.kv_linear", f"{diffusers}attn2", QKV[1:], num_blocks),
        *rename(ends),
    ]


def krea_2() -> list[Module]:
    """Return the modules of Krea 2."""
    block = {
        f"attn.w{letter}": f"attn.{name}" for letter, name in zip("qkvo", ATTENTION, strict=True)
    }
    block |= {
        "attn.gate": "attn.to_gate",
        **{f"mlp.{name}": f"ff.{name}" for name in ("gate", "up", "down")},
    }
    ends = {
        "first": "img_in",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
        "last.linear": "final_layer.linear",
    }
    modules = rename(block, "blocks.{}.", "transformer_blocks.{}.", 28)
    for stack in ("layerwise_blocks.{}.", "refiner_blocks.{}."):
        modules += rename(block, f"txtfusion.{stack}", f"text_fusion.{stack}", 2)
    return [*modules, *rename(ends)]


def qwen_image() -> list[Module]:
    """Return the modules of Qwen-Image, whose authors' names are diffusers' names."""
    block = [f"attn.{name}" for name in (*ATTENTION, *ADDED_QKV, "to_add_out")]
    for stream in ("img", "txt"):
        block += [f"{stream}_{name}" for name in ("mlp.net.0.proj", "mlp.net.2", "mod.1")]
    ends = ["img_in", "txt_in", "norm_out.linear", "proj_out"]
    ends += [f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)]
    return [*same(block, "transformer_blocks.{}.", num_blocks=60), *same(ends)]


def z_image() -> list[Module]:
    """Return the modules of Z-Image."""
    modules: list[Module] = []
    for stack, num_blocks in {"layers": 30, "noise_refiner": 2, "context_refiner": 2}.items():
        block = f"{stack}.{{}}."
        names = [f"feed_forward.w{number}" for number in (1, 2, 3)] + ["adaLN_modulation.0"]
        modules += same(names, block, num_blocks)
        modules += rename({"attention.out": "attention.to_out.0"}, block, block, num_blocks)
        modules.append(fused_qkv(f"{block}attention.qkv", f"{block}attention", QKV, num_blocks))
    modules += same(["cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"])
    ends = {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    }
    return [*modules, *rename(ends)]


def lumina_2() -> list[Module]:
    """Return the modules of Lumina Image 2."""
    modules: list[Module] = []
    for stack, num_blocks in {"layers": 26, "noise_refiner": 2, "context_refiner": 2}.items():
        block = f"{stack}.{{}}."
        names = {f"feed_forward.w{number}": f"feed_forward.linear_{number}" for number in (1, 2, 3)}
        names["attention.out"] = "attn.to_out.0"
        if stack != "context_refiner":
            names["adaLN_modulation.1"] = "norm1.linear"
        modules += rename(names, block, block, num_blocks)
        splits = tuple(f"{block}attn.{name}" for name in QKV)
        # A key and a value for three queries.
        sizes = (1.0, 1 / 3, 1 / 3)
        modules.append(Module(f"{block}attention.qkv", splits, sizes, num_blocks=num_blocks))
    ends = {
        "x_embedder": "x_embedder",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
    }
    return [*modules, *rename(ends)]


def omnigen_2() -> list[Module]:
    """Return the modules of OmniGen2, whose authors use diffusers' names of Lumina Image 2."""
    modules: list[Module] = []
    stacks = {"layers": 32, "noise_refiner": 2, "ref_image_refiner": 2, "context_refiner": 2}
    for stack, num_blocks in stacks.items():
        names = [f"attn.{name}" for name in ATTENTION]
        names += [f"feed_forward.linear_{number}" for number in (1, 2, 3)]
        if stack != "context_refiner":
            names.append("norm1.linear")
        modules += same(names, f"{stack}.{{}}.", num_blocks)
    ends = ["x_embedder", "ref_image_patch_embedder", "norm_out.linear_1", "norm_out.linear_2"]
    ends += [f"time_caption_embed.timestep_embedder.linear_{number}" for number in (1, 2)]
    return [*modules, *same([*ends, "time_caption_embed.caption_embedder.1"])]


# The attention layers of the next three models have the names of models above, and often the width.
# Without their tables, LoRAs of them would be taken for LoRAs of those.


def cog_video_x() -> list[Module]:
    """Return the modules of CogVideoX, with diffusers' names."""
    block = [f"attn1.{name}" for name in ATTENTION] + ["ff.net.0.proj", "ff.net.2"]
    ends = ["patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out"]
    ends += ["time_embedding.linear_1", "time_embedding.linear_2"]
    return [
        *same([*block, "norm1.linear", "norm2.linear"], "transformer_blocks.{}.", 42),
        *same(ends),
    ]


def cog_view_4() -> list[Module]:
    """Return the modules of CogView4, with diffusers' names."""
    block = [f"attn1.{name}" for name in ATTENTION] + ["ff.net.0.proj", "ff.net.2", "norm1.linear"]
    ends = ["patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out"]
    for embedder_name in ("timestep", "condition"):
        prefix = f"time_condition_embed.{embedder_name}_embedder.linear_"
        ends += [f"{prefix}1", f"{prefix}2"]
    return [*same(block, "transformer_blocks.{}.", 28), *same(ends)]


def sana() -> list[Module]:
    """Return the modules of Sana, with diffusers' names."""
    block = [f"attn{number}.{name}" for number in (1, 2) for name in ATTENTION]
    block += [f"ff.conv_{name}" for name in ("inverted", "depth", "point")]
    ends = ["patch_embed.proj", "caption_projection.linear_1", "caption_projection.linear_2"]
    ends += [*modulation("time_embed", "time_embed"), "proj_out"]
    return [*same(block, "transformer_blocks.{}.", 28), *same(ends)]


def text_encoders(*names: str, **kohya_prefixes: str) -> dict[str, str]:
    """Return the parts of text encoders by kohya's and ComfyUI's prefixes.

    Args:
        names: ComfyUI's names of the parts ``text_encoder``, ``text_encoder_2``, ...
        kohya_prefixes: The part by kohya's prefix, without the final underscore.
    """
    prefixes = {f"{prefix}_": part for prefix, part in kohya_prefixes.items()}
    for number, name in enumerate(names, start=1):
        part = "text_encoder" if number == 1 else f"text_encoder_{number}"
        prefixes[f"text_encoders.{name}.transformer."] = part
    return prefixes


def model(
    name: str,
    part: str,
    modules: Iterable[Module],
    text_encoder_parts: Mapping[str, str],
    widths: Iterable[int],
    **options: Any,
) -> Model:
    """Return a model; see `Model`."""
    return Model(
        name,
        part,
        text_encoder_parts,
        frozenset(widths),
        tuple(modules),
        TEXT_ENCODER_MODULES,
        **options,
    )


SDXL_EMBEDDING = {
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
SDXL_TEXT_ENCODERS = text_encoders(
    "clip_l", "clip_g", lora_te1="text_encoder", lora_te2="text_encoder_2"
)
MODELS = (
    model(
        "Stable Diffusion 1 and 2",
        "unet",
        unet((1, 1, 1, 0), 1),
        text_encoders("clip_l", lora_te="text_encoder"),
        widths=(320, 768, 1024),
        kohya_names="diffusers",
    ),
    # Before SDXL: diffusers' names are right for both, so they are for layers that both have.
    model(
        "KOALA",
        "unet",
        [*rename(SDXL_EMBEDDING), *unet((0, 2, 6), 6, num_layers=1)],
        SDXL_TEXT_ENCODERS,
        widths=(2048,),
        kohya_names="diffusers",
    ),
    model(
        "SDXL",
        "unet",
        [*rename(SDXL_EMBEDDING), *unet((0, 2, 10), 10)],
        SDXL_TEXT_ENCODERS,
        widths=(2048,),
    ),
    model(
        "Stable Diffusion 3",
        "transformer",
        stable_diffusion_3(),
        text_encoders(
            "clip_l",
            "clip_g",
            "t5xxl",
            lora_te1="text_encoder",
            lora_te2="text_encoder_2",
            lora_te3="text_encoder_3",
        ),
        widths=(1536, 2432),
    ),
    model(
        "Flux",
        "transformer",
        [*flux(), *chroma_guidance()],
        # The first prefix of a part is the one that is written.
        text_encoders(
            "clip_l",
            "t5xxl",
            lora_te1="text_encoder",
            lora_te3="text_encoder_2",
            lora_te2="text_encoder_2",
        ),
        widths=(3072,),
        aliases=FLUX_ALIASES,
    ),
    model("Wan", "transformer", wan(), {}, widths=(1536, 3072, 5120)),
    model("Qwen-Image", "transformer", qwen_image(), {}, widths=(3072,)),
    model("Z-Image", "transformer", z_image(), {}, widths=(3840,)),
    model("Flux.2", "transformer", flux_2(), {}, widths=(3072, 4096, 6144)),
    model("Lumina Image 2", "transformer", lumina_2(), {}, widths=(2304,)),
    model("OmniGen2", "transformer", omnigen_2(), {}, widths=(2520,)),
    model(
        "HunyuanVideo",
        "transformer",
        hunyuan_video_1(),
        {},
        widths=(3072,),
        aliases=hunyuan_video_aliases(hunyuan_video_1()),
    ),
    model(
        "HunyuanVideo 1.5",
        "transformer",
        hunyuan_video_1_5(),
        {},
        widths=(2048,),
        aliases=hunyuan_video_aliases(hunyuan_video_1_5()),
    ),
    model("LTX-Video", "transformer", ltx(), {}, widths=(2048, 4096)),
    model("LTX-2", "transformer", ltx_2(), {}, widths=(2048, 4096)),
    model("HiDream", "transformer", hidream(), {}, widths=(2560,)),
    model("Cosmos-Predict2", "transformer", cosmos_predict_2(), {}, widths=(1024, 2048, 5120)),
    model("Mochi", "transformer", mochi(), {}, widths=(3072,)),
    model("AuraFlow", "transformer", aura_flow(), {}, widths=(3072,)),
    model("PixArt", "transformer", pixart(), {}, widths=(1152,)),
    model("Krea 2", "transformer", krea_2(), {}, widths=(2560, 6144)),
    model("CogVideoX", "transformer", cog_video_x(), {}, widths=(1920, 3072), kohya_names=None),
    model("CogView4", "transformer", cog_view_4(), {}, widths=(4096,), kohya_names=None),
    model("Sana", "transformer", sana(), {}, widths=(1152, 2240), kohya_names=None),
)
"""The models whose names are known, the UNets in the order in which they name kohya's layers."""


# --- The JSON file ---


def to_json() -> str:
    """Return the content of the JSON file, with one line for each module."""
    models: list[str] = []
    for model in MODELS:
        fields = {
            "name": json.dumps(model.name),
            "part": json.dumps(model.part),
            "kohya_names": json.dumps(model.kohya_names),
            "widths": json.dumps(sorted(model.widths)),
            "text_encoders": json.dumps(dict(model.text_encoders)),
            "aliases": one_per_line([alias._asdict() for alias in model.aliases]),
            "modules": one_per_line(
                [module_fields(module, ratios(model, module)) for module in model.modules]
            ),
        }
        lines = ",\n".join(f'  "{name}": {value}' for name, value in fields.items())
        models.append(f"{{\n{lines}\n}}")
    text_encoder_modules = one_per_line([module_fields(module) for module in TEXT_ENCODER_MODULES])
    all_models = ",\n".join(models)
    return (
        f'{{\n"text_encoder_modules": {text_encoder_modules},\n"models": [\n{all_models}\n]\n}}\n'
    )


def one_per_line(entries: list[dict[str, Any]]) -> str:
    """Return a list of objects as JSON, with one line for each."""
    return "[" + ",".join(f"\n    {json.dumps(entry)}" for entry in entries) + "]"


def module_fields(module: Module, ratios: Sequence[float] = ()) -> dict[str, Any]:
    """Return the fields of a module that differ from their defaults."""
    fields: dict[str, Any] = {"authors": module.authors}
    if module.diffusers != (module.authors,):
        fields["diffusers"] = module.diffusers
    if len(module.sizes) > 1:
        fields["sizes"] = module.sizes
    if ratios:
        fields["ratios"] = ratios
    if module.swapped_ratio:
        fields["swapped_ratio"] = module.swapped_ratio
    if module.num_blocks > 1:
        fields["num_blocks"] = module.num_blocks
    return fields


# --- The check ---

SDXL_CONFIG = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
KOALA_CONFIG = {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 6)}
OMNIGEN_2_CONFIG = {
    "hidden_size": 2520,
    "num_layers": 32,
    "num_attention_heads": 21,
    "num_kv_heads": 7,
}
CLASSES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "Stable Diffusion 1 and 2": [("UNet2DConditionModel", {"cross_attention_dim": 768})],
    "KOALA": [("UNet2DConditionModel", {**SDXL_CONFIG, **KOALA_CONFIG})],
    "SDXL": [("UNet2DConditionModel", SDXL_CONFIG)],
    # 3.5 large has the largest number of blocks, and 3.5 medium has the second attention.
    "Stable Diffusion 3": [
        (
            "SD3Transformer2DModel",
            {"num_layers": 38, "dual_attention_layers": tuple(range(13))},
        )
    ],
    "Flux": [
        ("FluxTransformer2DModel", {"guidance_embeds": True}),
        ("ChromaTransformer2DModel", {}),
    ],
    # The first one with the modules for the image in image-to-video.
    "Wan": [
        ("WanTransformer3DModel", {"image_dim": 1280, "added_kv_proj_dim": 5120}),
        ("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960}),
        ("WanVACETransformer3DModel", {"num_layers": 15, "vace_layers": tuple(range(15))}),
        (
            "WanVACETransformer3DModel",
            {"num_layers": 15, "vace_layers": [0], "num_attention_heads": 12, "ffn_dim": 8960},
        ),
    ],
    "Qwen-Image": [("QwenImageTransformer2DModel", {})],
    "Z-Image": [("ZImageTransformer2DModel", {})],
    "Flux.2": [("Flux2Transformer2DModel", {})],
    "Lumina Image 2": [("Lumina2Transformer2DModel", {})],
    # It has no class, but the blocks of Lumina Image 2.
    "OmniGen2": [("Lumina2Transformer2DModel", OMNIGEN_2_CONFIG)],
    "HunyuanVideo": [("HunyuanVideoTransformer3DModel", {})],
    "HunyuanVideo 1.5": [("HunyuanVideo15Transformer3DModel", {})],
    "LTX-Video": [
        ("LTXVideoTransformer3DModel", {}),
        (
            "LTXVideoTransformer3DModel",
            {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
        ),
    ],
    "LTX-2": [("LTX2VideoTransformer3DModel", {})],
    "HiDream": [
        (
            "HiDreamImageTransformer2DModel",
            {
                "patch_size": 2,
                "num_layers": 16,
                "num_single_layers": 32,
                "num_attention_heads": 20,
                "caption_channels": [4096, 4096],
                "num_routed_experts": 4,
                "axes_dims_rope": (64, 32, 32),
                "max_resolution": (128, 128),
                "llama_layers": range(48),
            },
        )
    ],
    # The second one is 2.5.
    "Cosmos-Predict2": [
        ("CosmosTransformer3DModel", {"num_attention_heads": 40, "num_layers": 36}),
        (
            "CosmosTransformer3DModel",
            {"num_attention_heads": 16, "use_crossattn_projection": True},
        ),
    ],
    "Mochi": [("MochiTransformer3DModel", {})],
    "AuraFlow": [("AuraFlowTransformer2DModel", {})],
    "PixArt": [("PixArtTransformer2DModel", {"sample_size": 128, "caption_channels": 4096})],
    "Krea 2": [("Krea2Transformer2DModel", {})],
    "CogVideoX": [
        ("CogVideoXTransformer3DModel", {}),
        ("CogVideoXTransformer3DModel", {"num_attention_heads": 48, "num_layers": 42}),
    ],
    "CogView4": [("CogView4Transformer2DModel", {"num_attention_heads": 64, "num_layers": 28})],
    "Sana": [
        ("SanaTransformer2DModel", {}),
        ("SanaTransformer2DModel", {"num_attention_heads": 36, "num_layers": 28}),
    ],
}
"""The classes of each model in diffusers, and the arguments of versions of different shapes."""

# The table has a shortcut for each ResNet, and an adaLN for each stack. diffusers has a shortcut
# where the number of channels changes, and no adaLN in the context refiner. Only OmniGen2 has
# modules for reference images.
NOT_IN_DIFFUSERS = re.compile(
    r".*\.conv_shortcut|context_refiner\.{}\.adaLN_modulation\.0|ref_image_.*"
)


@dataclass(frozen=True)
class Check:
    """The differences of a model's table from a model of diffusers.

    Attributes:
        unknown: Names of the table that the model has in no block.
        wrong_sizes: Splits of fused modules that have another number of rows.
        missing: Linear layers and convolutions that the table does not have.
    """

    unknown: list[str] = field(default_factory=list)
    wrong_sizes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def check_diffusers(model: Model) -> Check:
    """Compare the names of a model with its classes in diffusers."""
    shapes: dict[str, torch.Size] = {}
    for version in versions(model):
        shapes |= version
    return compare(model.modules, shapes)


@cache
def versions(model: Model) -> list[dict[str, torch.Size]]:
    """Return the shapes of the weights of the versions of a model, which needs no weights."""
    import diffusers

    shapes: list[dict[str, torch.Size]] = []
    for class_name, arguments in CLASSES.get(model.name, []):
        with torch.device("meta"):
            shapes.append(weight_shapes(getattr(diffusers, class_name)(**arguments)))
    return shapes


def ratios(model: Model, module: Module) -> list[float]:
    """Return the possible ratios of rows to inputs of a module in a block of a transformer.

    They are empty for a fused module, which has `Module.sizes`, and if versions of the model
    differ.
    """
    if model.part == "unet" or module.num_blocks == 1 or len(module.diffusers) > 1:
        return []
    (name,) = module.diffusers
    by_version: list[set[float]] = []
    other_inputs: list[int] = []
    for shapes in versions(model):
        names = [name.replace("{}", str(block)) for block in range(module.num_blocks)]
        found = [shapes[name] for name in names if name in shapes]
        if not found:
            continue
        # The width of an embedding of the time or of a prompt does not follow the model's width.
        width = Counter(shape[1] for shape in shapes.values()).most_common(1)[0][0]
        other_inputs += {shape[1] for shape in found if shape[1] % width}
        by_version.append({round(shape[0] / shape[1], 6) for shape in found})
    # Versions of different widths may read the same embedding.
    has_one_embedding = len(other_inputs) > 1 and len(set(other_inputs)) == 1
    if other_inputs and not has_one_embedding:
        return []
    if not has_one_embedding and any(values != by_version[0] for values in by_version):
        return []
    return sorted(set().union(*by_version))


def check_text_encoders() -> Check:
    """Compare the names of text encoders with CLIP and T5 of transformers."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    with torch.device("meta"):
        clip = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=32))
        t5 = T5EncoderModel(T5Config(num_layers=24, feed_forward_proj="gated-gelu"))
    shapes: dict[str, torch.Size] = {}
    for name, shape in {**weight_shapes(clip), **weight_shapes(t5)}.items():
        # transformers 5 dropped this part of CLIP's names.
        name = f"text_model.{name}" if name.startswith("encoder.layers.") else name
        shapes[name] = shape
    return compare(TEXT_ENCODER_MODULES, shapes)


def weight_shapes(instance: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of the weights of linear layers and convolutions by their names."""
    return {
        name: module.weight.shape
        for name, module in instance.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))
    }


def compare(modules: Iterable[Module], shapes: Mapping[str, torch.Size]) -> Check:
    """Compare a table with the shapes of weights."""
    check = Check()
    known: set[str] = set()
    for module in modules:
        for name, size in zip(module.diffusers, module.sizes, strict=True):
            names = [name.replace("{}", str(block)) for block in range(module.num_blocks)]
            names = [name for name in names if name in shapes]
            if not names and not NOT_IN_DIFFUSERS.fullmatch(name):
                check.unknown.append(name)
            known.update(names)
            if len(module.sizes) > 1:
                check.wrong_sizes.extend(
                    name for name in names if shapes[name][0] != round(size * shapes[name][1])
                )
    missing = {re.sub(r"(?<=\.)\d+(?=\.)", "{}", name) for name in shapes.keys() - known}
    check.missing.extend(sorted(missing))
    return check


def main() -> None:
    # A model without a class in diffusers cannot be checked.
    checks = {model.name: check_diffusers(model) for model in MODELS if model.name in CLASSES}
    checks["text encoders"] = check_text_encoders()
    for name, check in checks.items():
        print(f"{name}: not in the table: {', '.join(check.missing) or 'nothing'}")
    wrong = {name: check for name, check in checks.items() if check.unknown or check.wrong_sizes}
    if wrong:
        sys.exit(f"Wrong names or sizes: {wrong}")
    OUTPUT.write_text(to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
