"""The names of the modules of Stable Diffusion 3, Flux, Wan, Qwen-Image and Z-Image."""

from __future__ import annotations

from matryoshka_lora.lora_file.keys.modules import (
    ADDED_QKV,
    ATTENTION_PARTS,
    QKV,
    Model,
    Module,
    fused_qkv,
    rename,
    same,
)

# --- Stable Diffusion 3 and 3.5 ---

_SD3_BLOCK = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_SD3_BLOCKS = 38
_SD3_JOINT = "joint_blocks.{}."
_SD3_TRANSFORMER = "transformer_blocks.{}."
STABLE_DIFFUSION_3 = Model(
    "Stable Diffusion 3",
    "transformer",
    (
        *rename(_SD3_BLOCK, _SD3_JOINT, _SD3_TRANSFORMER, _SD3_BLOCKS),
        fused_qkv(f"{_SD3_JOINT}x_block.attn.qkv", f"{_SD3_TRANSFORMER}attn", QKV, _SD3_BLOCKS),
        fused_qkv(f"{_SD3_JOINT}x_block.attn2.qkv", f"{_SD3_TRANSFORMER}attn2", QKV, _SD3_BLOCKS),
        fused_qkv(
            f"{_SD3_JOINT}context_block.attn.qkv",
            f"{_SD3_TRANSFORMER}attn",
            ADDED_QKV,
            _SD3_BLOCKS,
        ),
        # The last block has a shift and a scale only, in the other order.
        Module(
            f"{_SD3_JOINT}context_block.adaLN_modulation.1",
            (f"{_SD3_TRANSFORMER}norm1_context.linear",),
            swaps_halves=True,
            num_blocks=_SD3_BLOCKS,
        ),
        *rename(
            {
                "x_embedder.proj": "pos_embed.proj",
                "context_embedder": "context_embedder",
                "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
                "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
                "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
                "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
                "final_layer.linear": "proj_out",
            }
        ),
        Module("final_layer.adaLN_modulation.1", ("norm_out.linear",), swaps_halves=True),
    ),
    {
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "lora_te3_": "text_encoder_3",
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
        "text_encoders.t5xxl.transformer.": "text_encoder_3",
    },
    frozenset({1536, 2432}),
)


# --- Flux ---

_FLUX_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
_FLUX_DOUBLE_BLOCKS = 19
_FLUX_SINGLE_BLOCKS = 38
_FLUX_SINGLE = "single_transformer_blocks.{}."
FLUX = Model(
    "Flux",
    "transformer",
    (
        *rename(_FLUX_DOUBLE, "double_blocks.{}.", "transformer_blocks.{}.", _FLUX_DOUBLE_BLOCKS),
        fused_qkv("double_blocks.{}.img_attn.qkv", "transformer_blocks.{}.attn", QKV, 19),
        fused_qkv("double_blocks.{}.txt_attn.qkv", "transformer_blocks.{}.attn", ADDED_QKV, 19),
        Module(
            "single_blocks.{}.linear1",
            (*(f"{_FLUX_SINGLE}attn.{part}" for part in QKV), f"{_FLUX_SINGLE}proj_mlp"),
            (1, 1, 1, 4),
            num_blocks=_FLUX_SINGLE_BLOCKS,
        ),
        *rename(
            {"linear2": "proj_out", "modulation.lin": "norm.linear"},
            "single_blocks.{}.",
            _FLUX_SINGLE,
            _FLUX_SINGLE_BLOCKS,
        ),
        *rename(
            {
                "img_in": "x_embedder",
                "txt_in": "context_embedder",
                "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
                "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
                "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
                "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
                "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
                "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
                "final_layer.linear": "proj_out",
            }
        ),
        Module("final_layer.adaLN_modulation.1", ("norm_out.linear",), swaps_halves=True),
    ),
    {
        "lora_te1_": "text_encoder",
        "lora_te3_": "text_encoder_2",
        "lora_te2_": "text_encoder_2",
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.t5xxl.transformer.": "text_encoder_2",
    },
    frozenset({3072}),
)


# --- Wan 2.1 and 2.2 ---

_WAN_BLOCK = {
    **{
        f"self_attn.{name}": f"attn1.{part}"
        for name, part in zip("qkvo", ATTENTION_PARTS, strict=True)
    },
    **{
        f"cross_attn.{name}": f"attn2.{part}"
        for name, part in zip("qkvo", ATTENTION_PARTS, strict=True)
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
WAN = Model(
    "Wan",
    "transformer",
    (
        *rename(_WAN_BLOCK, "blocks.{}.", "blocks.{}.", num_blocks=40),
        *rename(
            {
                "patch_embedding": "patch_embedding",
                "time_embedding.0": "condition_embedder.time_embedder.linear_1",
                "time_embedding.2": "condition_embedder.time_embedder.linear_2",
                "time_projection.1": "condition_embedder.time_proj",
                "text_embedding.0": "condition_embedder.text_embedder.linear_1",
                "text_embedding.2": "condition_embedder.text_embedder.linear_2",
                "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
                "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
                "head.head": "proj_out",
            }
        ),
    ),
    {},
    frozenset({1536, 5120}),
)


# --- Qwen-Image, whose authors' names are those of diffusers ---

_QWEN_BLOCK = (
    *ATTENTION_PARTS,
    *ADDED_QKV,
    "to_add_out",
)
QWEN_IMAGE = Model(
    "Qwen-Image",
    "transformer",
    (
        *same(*(f"transformer_blocks.{{}}.attn.{name}" for name in _QWEN_BLOCK), num_blocks=60),
        *same(
            *(
                f"transformer_blocks.{{}}.{stream}_{name}"
                for stream in ("img", "txt")
                for name in ("mlp.net.0.proj", "mlp.net.2", "mod.1")
            ),
            num_blocks=60,
        ),
        *same(
            "img_in",
            "txt_in",
            "time_text_embed.timestep_embedder.linear_1",
            "time_text_embed.timestep_embedder.linear_2",
            "norm_out.linear",
            "proj_out",
        ),
    ),
    {},
    frozenset({3072}),
)


# --- Z-Image ---

_Z_IMAGE_STACKS = {"layers": 30, "noise_refiner": 2, "context_refiner": 2}


def _z_image_stack(stack: str, num_blocks: int) -> tuple[Module, ...]:
    block = f"{stack}.{{}}."
    names = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
    return (
        *same(*(f"{block}{name}" for name in names), num_blocks=num_blocks),
        *rename({"attention.out": "attention.to_out.0"}, block, block, num_blocks),
        fused_qkv(f"{block}attention.qkv", f"{block}attention", QKV, num_blocks),
    )


Z_IMAGE = Model(
    "Z-Image",
    "transformer",
    (
        *(
            module
            for stack, num_blocks in _Z_IMAGE_STACKS.items()
            for module in _z_image_stack(stack, num_blocks)
        ),
        *same("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"),
        *rename(
            {
                "x_embedder": "all_x_embedder.2-1",
                "final_layer.linear": "all_final_layer.2-1.linear",
                "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
            }
        ),
    ),
    {},
    frozenset({3840}),
)
