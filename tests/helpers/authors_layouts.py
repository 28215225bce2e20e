"""The layouts of small checkpoints of image and video models, as their authors name the modules."""

from __future__ import annotations

Layout = dict[str, tuple[int, ...]]
"""The shape of each weight of linear layers and convolutions, by the name of the module."""

H = 8  # the hidden size


def layout(model: str, hidden: int = H) -> Layout:
    """Return the layout of a model: sd15, sdxl, sd3, flux, wan, qwen or z-image."""
    return LAYOUTS[model](hidden)


def unet(down: tuple[int, ...], middle: int, h: int) -> Layout:
    shapes: Layout = {
        "input_blocks.0.0": (h, 4, 3, 3),
        "out.2": (4, h, 3, 3),
        "time_embed.0": (2 * h, h),
        "time_embed.2": (2 * h, 2 * h),
    }
    for block, depth in enumerate(down):
        for number in (3 * block + 1, 3 * block + 2):
            shapes |= unet_layer(f"input_blocks.{number}", depth, h)
        if block < len(down) - 1:
            shapes[f"input_blocks.{3 * block + 3}.0.op"] = (h, h, 3, 3)
    shapes |= resnet("middle_block.0", h)
    shapes |= unet_attention("middle_block.1", middle, h)
    shapes |= resnet("middle_block.2", h)
    for block, depth in enumerate(reversed(down)):
        for number in range(3 * block, 3 * block + 3):
            shapes |= unet_layer(f"output_blocks.{number}", depth, h)
        if block < len(down) - 1:
            position = 2 if depth else 1
            shapes[f"output_blocks.{3 * block + 2}.{position}.conv"] = (h, h, 3, 3)
    return shapes


def unet_layer(prefix: str, depth: int, h: int) -> Layout:
    shapes = resnet(f"{prefix}.0", h)
    return shapes | unet_attention(f"{prefix}.1", depth, h) if depth else shapes


def resnet(prefix: str, h: int) -> Layout:
    return {
        f"{prefix}.in_layers.2": (h, h, 3, 3),
        f"{prefix}.emb_layers.1": (h, 2 * h),
        f"{prefix}.out_layers.3": (h, h, 3, 3),
        f"{prefix}.skip_connection": (h, h, 1, 1),
    }


def unet_attention(prefix: str, depth: int, h: int) -> Layout:
    shapes: Layout = {f"{prefix}.proj_in": (h, h), f"{prefix}.proj_out": (h, h)}
    for index in range(depth):
        block = f"{prefix}.transformer_blocks.{index}"
        for attention, width in (("attn1", h), ("attn2", 3 * h)):
            shapes[f"{block}.{attention}.to_q"] = (h, h)
            shapes[f"{block}.{attention}.to_k"] = (h, width)
            shapes[f"{block}.{attention}.to_v"] = (h, width)
            shapes[f"{block}.{attention}.to_out.0"] = (h, h)
        shapes[f"{block}.ff.net.0.proj"] = (8 * h, h)
        shapes[f"{block}.ff.net.2"] = (h, 4 * h)
    return shapes


def sd15(h: int) -> Layout:
    return unet((1, 1, 1, 0), 1, h)


def sdxl(h: int) -> Layout:
    return {
        **unet((0, 2, 3), 3, h),
        "label_emb.0.0": (2 * h, 3 * h),
        "label_emb.0.2": (2 * h, 2 * h),
    }


def sd3(h: int) -> Layout:
    shapes: Layout = {
        "x_embedder.proj": (h, 4, 2, 2),
        "context_embedder": (h, 3 * h),
        "t_embedder.mlp.0": (h, 16),
        "t_embedder.mlp.2": (h, h),
        "y_embedder.mlp.0": (h, 5),
        "y_embedder.mlp.2": (h, h),
        "final_layer.linear": (16, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    for index in range(2):
        for stream in ("x_block", "context_block"):
            block = f"joint_blocks.{index}.{stream}"
            shapes[f"{block}.attn.qkv"] = (3 * h, h)
            is_last = stream == "context_block" and index == 1
            shapes[f"{block}.adaLN_modulation.1"] = (2 * h if is_last else 6 * h, h)
            if not is_last:
                shapes[f"{block}.attn.proj"] = (h, h)
                shapes[f"{block}.mlp.fc1"] = (4 * h, h)
                shapes[f"{block}.mlp.fc2"] = (h, 4 * h)
    shapes["joint_blocks.0.x_block.attn2.qkv"] = (3 * h, h)
    shapes["joint_blocks.0.x_block.attn2.proj"] = (h, h)
    return shapes


def flux(h: int) -> Layout:
    shapes: Layout = {
        "img_in": (h, 16),
        "txt_in": (h, 12),
        "final_layer.linear": (16, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    for embedder in ("time_in", "vector_in", "guidance_in"):
        shapes[f"{embedder}.in_layer"] = (h, 16)
        shapes[f"{embedder}.out_layer"] = (h, h)
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        shapes[f"{block}_attn.qkv"] = (3 * h, h)
        shapes[f"{block}_attn.proj"] = (h, h)
        shapes[f"{block}_mlp.0"] = (4 * h, h)
        shapes[f"{block}_mlp.2"] = (h, 4 * h)
        shapes[f"{block}_mod.lin"] = (6 * h, h)
    shapes["single_blocks.0.linear1"] = (7 * h, h)
    shapes["single_blocks.0.linear2"] = (h, 5 * h)
    shapes["single_blocks.0.modulation.lin"] = (3 * h, h)
    return shapes


def wan(h: int) -> Layout:
    shapes: Layout = {
        "patch_embedding": (h, 4, 1, 2, 2),
        "time_embedding.0": (h, 16),
        "time_embedding.2": (h, h),
        "time_projection.1": (6 * h, h),
        "text_embedding.0": (h, 12),
        "text_embedding.2": (h, h),
        "img_emb.proj.1": (20, 20),
        "img_emb.proj.3": (h, 20),
        "head.head": (16, h),
    }
    for index in range(2):
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                shapes[f"blocks.{index}.{attention}.{name}"] = (h, h)
        shapes[f"blocks.{index}.cross_attn.k_img"] = (h, h)
        shapes[f"blocks.{index}.cross_attn.v_img"] = (h, h)
        shapes[f"blocks.{index}.ffn.0"] = (4 * h, h)
        shapes[f"blocks.{index}.ffn.2"] = (h, 4 * h)
    return shapes


def qwen(h: int) -> Layout:
    shapes: Layout = {
        "img_in": (h, 16),
        "txt_in": (h, 12),
        "time_text_embed.timestep_embedder.linear_1": (h, 16),
        "time_text_embed.timestep_embedder.linear_2": (h, h),
        "norm_out.linear": (2 * h, h),
        "proj_out": (16, h),
    }
    for index in range(2):
        block = f"transformer_blocks.{index}"
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes[f"{block}.attn.{name}"] = (h, h)
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            shapes[f"{block}.attn.{name}"] = (h, h)
        for stream in ("img", "txt"):
            shapes[f"{block}.{stream}_mlp.net.0.proj"] = (4 * h, h)
            shapes[f"{block}.{stream}_mlp.net.2"] = (h, 4 * h)
            shapes[f"{block}.{stream}_mod.1"] = (6 * h, h)
    return shapes


def z_image(h: int) -> Layout:
    shapes: Layout = {
        "x_embedder": (h, 16),
        "t_embedder.mlp.0": (h, 16),
        "t_embedder.mlp.2": (h, h),
        "cap_embedder.1": (h, 12),
        "final_layer.linear": (16, h),
        "final_layer.adaLN_modulation.1": (h, h),
    }
    for block in ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.1"):
        shapes[f"{block}.attention.qkv"] = (3 * h, h)
        shapes[f"{block}.attention.out"] = (h, h)
        shapes[f"{block}.feed_forward.w1"] = (8 * h // 3, h)
        shapes[f"{block}.feed_forward.w2"] = (h, 8 * h // 3)
        shapes[f"{block}.feed_forward.w3"] = (8 * h // 3, h)
        if not block.startswith("context"):
            shapes[f"{block}.adaLN_modulation.0"] = (4 * h, h)
    return shapes


LAYOUTS = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "wan": wan,
    "qwen": qwen,
    "z-image": z_image,
}
"""The layout of each model, by the hidden size."""
