"""The names of the modules of Stable Diffusion 1 and 2 and of SDXL."""

from __future__ import annotations

from matryoshka_lora.lora_file.keys.modules import ATTENTION_PARTS, Model, Module, rename

_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TRANSFORMER_BLOCK = (
    *(f"attn{number}.{part}" for number in (1, 2) for part in ATTENTION_PARTS),
    "ff.net.0.proj",
    "ff.net.2",
)


def _unet(down: tuple[int, ...], middle: int, *extra: Module) -> tuple[Module, ...]:
    """Return the modules of a UNet with two layers in each block.

    Args:
        down: The number of transformer blocks in each attention of each down block. The up blocks
            have them in the reverse order.
        middle: The same for the middle block.
        extra: Further modules.
    """
    modules = [*extra]
    modules += rename(
        {
            "input_blocks.0.0": "conv_in",
            "out.2": "conv_out",
            "time_embed.0": "time_embedding.linear_1",
            "time_embed.2": "time_embedding.linear_2",
        }
    )
    for block, depth in enumerate(down):
        for layer in range(2):
            number = 3 * block + layer + 1
            modules += _unet_layer(f"input_blocks.{number}", f"down_blocks.{block}", layer, depth)
        if block < len(down) - 1:
            downsampler = f"down_blocks.{block}.downsamplers.0.conv"
            modules += rename({f"input_blocks.{3 * block + 3}.0.op": downsampler})
    modules += rename(_RESNET, "middle_block.0.", "mid_block.resnets.0.")
    modules += _unet_attention("middle_block.1.", "mid_block.attentions.0.", middle)
    modules += rename(_RESNET, "middle_block.2.", "mid_block.resnets.1.")
    for block, depth in enumerate(reversed(down)):
        for layer in range(3):
            number = 3 * block + layer
            modules += _unet_layer(f"output_blocks.{number}", f"up_blocks.{block}", layer, depth)
        if block < len(down) - 1:
            upsampler = f"output_blocks.{3 * block + 2}.{2 if depth else 1}.conv"
            modules += rename({upsampler: f"up_blocks.{block}.upsamplers.0.conv"})
    return tuple(modules)


def _unet_layer(authors: str, diffusers: str, layer: int, depth: int) -> tuple[Module, ...]:
    """Return a ResNet and the attention after it, if there is one."""
    resnet = rename(_RESNET, f"{authors}.0.", f"{diffusers}.resnets.{layer}.")
    if depth == 0:
        return resnet
    attention = _unet_attention(f"{authors}.1.", f"{diffusers}.attentions.{layer}.", depth)
    return (*resnet, *attention)


def _unet_attention(authors: str, diffusers: str, depth: int) -> tuple[Module, ...]:
    ends = {name: name for name in ("proj_in", "proj_out")}
    block = {f"transformer_blocks.{{}}.{name}" for name in _TRANSFORMER_BLOCK}
    return (
        *rename(ends, authors, diffusers),
        *rename({name: name for name in sorted(block)}, authors, diffusers, depth),
    )


STABLE_DIFFUSION = Model(
    "Stable Diffusion 1 and 2",
    "unet",
    _unet((1, 1, 1, 0), 1),
    {"lora_te_": "text_encoder", "text_encoders.clip_l.transformer.": "text_encoder"},
    frozenset({320, 768, 1024}),
    kohya_names="diffusers",
)
SDXL = Model(
    "SDXL",
    "unet",
    _unet(
        (0, 2, 10),
        10,
        *rename(
            {
                "label_emb.0.0": "add_embedding.linear_1",
                "label_emb.0.2": "add_embedding.linear_2",
            }
        ),
    ),
    {
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
    },
    frozenset({2048}),
)
