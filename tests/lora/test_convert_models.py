"""Key formats of image and video models, compared with diffusers' converters of checkpoints.

These converters rename the modules of a checkpoint, and split and permute the rows of its weights.
The product of a weight and a random matrix has the same rows, so the converters are applied to the
products of a LoRA's updates.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.authors_layouts import LAYOUTS, Layout, layout
from helpers.loras import random_lora
from torch import Tensor, nn

from matryoshka_lora.lora.convert import convert, match_key_formats
from matryoshka_lora.lora.keys import load_models
from matryoshka_lora.lora.lora import Lora

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers.loaders import lora_conversion_utils, single_file_utils  # noqa: E402
from helpers.diffusers_models import SMALL_MODELS  # noqa: E402

UNET_CONFIG = {"layers_per_block": 2, "addition_embed_type": None}
KOALA = {
    "layers_per_block": 1,
    "block_out_channels": (8, 16, 24),
    "norm_num_groups": 4,
    "cross_attention_dim": 2048,  # tells it from Stable Diffusion
    "attention_head_dim": 4,
    "transformer_layers_per_block": (1, 2, 6),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 36,
}
# diffusers splits Flux at fixed rows.
HIDDEN_SIZES = {"flux": 3072}
CLASSES = {
    **SMALL_MODELS,
    "KOALA": ("UNet2DConditionModel", KOALA),
    "Flux.2": ("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}),
    "Lumina Image 2": ("Lumina2Transformer2DModel", {"num_layers": 1, "num_refiner_layers": 1}),
    "HunyuanVideo 1.5": ("HunyuanVideo15Transformer3DModel", {"num_layers": 1}),
}
MODELS = [*LAYOUTS, *CLASSES]
PARTS = dict.fromkeys(MODELS, "transformer") | dict.fromkeys(("sd15", "sdxl", "KOALA"), "unet")
# kohya's format has diffusers' names for them.
NAMED_AS_IN_DIFFUSERS = ("sd15", "KOALA")
# diffusers splits the single blocks of HunyuanVideo at the rows of the full model. The width tells
# LTX from PixArt.
WIDE_ARGUMENTS: dict[str, dict[str, int]] = {
    "LTX-Video": {"num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048},
    "HunyuanVideo": {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 1,
        "num_single_layers": 1,
    },
}
NUM_COLUMNS = 5


@cache
def model_layout(model: str) -> Layout:
    """Return the layout of a checkpoint of the authors."""
    if model in CLASSES:
        return layout_of_table(model)
    return layout(model, HIDDEN_SIZES.get(model, 8))


def layout_of_table(model: str) -> Layout:
    """Return the names of a table with the shapes of a model.

    A converter leaves wrong names as they are, or rejects them.
    """
    class_name, arguments = CLASSES[model]
    arguments = arguments | WIDE_ARGUMENTS.get(model, {})
    with torch.device("meta"):
        instance = getattr(diffusers, class_name)(**arguments)
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in instance.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    }
    (table,) = (table for table in load_models() if table.name == model)
    result: Layout = {}
    for module in table.modules:
        for block in range(module.num_blocks):
            names = [name.replace("{}", str(block)) for name in module.diffusers]
            if names[0] in shapes:
                rows = sum(shapes[name][0] for name in names)
                result[module.authors.replace("{}", str(block))] = (rows, *shapes[names[0]][1:])
    return result


def convert_checkpoint(model: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under diffusers' names of the modules.

    Args:
        model: The model.
        weights: The weight of each module of the layout, by its name. Weights that are left out are
            zero.
    """
    checkpoint: dict[str, Tensor] = {}
    for name, shape in model_layout(model).items():
        weight = weights.get(name, torch.zeros(shape[0], NUM_COLUMNS))
        checkpoint[f"{name}.weight"] = weight
        checkpoint[f"{name}.bias"] = torch.zeros(shape[0])
    converted = CONVERTERS[model](checkpoint)
    return {
        key.removesuffix(".weight"): weight
        for key, weight in converted.items()
        if key.endswith(".weight") and weight.ndim == 2
    }


def convert_unet(
    checkpoint: dict[str, Tensor], config: dict[str, Any] = UNET_CONFIG
) -> dict[str, Tensor]:
    if "label_emb.0.0.weight" in checkpoint:
        config = config | {"addition_embed_type": "text_time"}
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in checkpoint.items()}
    converted: dict[str, Tensor] = single_file_utils.convert_ldm_unet_checkpoint(prefixed, config)
    return converted


def convert_sd3(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    checkpoint["pos_embed"] = torch.zeros(1)
    converter = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
    converted: dict[str, Tensor] = converter(checkpoint)
    return converted


def convert_flux(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    norms = ["single_blocks.0.norm"]
    norms += [f"double_blocks.0.{stream}_attn.norm" for stream in ("img", "txt")]
    for norm in norms:
        for name in ("query_norm", "key_norm"):
            checkpoint[f"{norm}.{name}.scale"] = torch.zeros(1)
    converter = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    converted: dict[str, Tensor] = converter(checkpoint)
    return converted


def convert_hunyuan_video(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert from ComfyUI's names, which it makes of the authors' names in this way."""
    renamed = {
        "txt_in.t_embedder.in_layer.": "txt_in.t_embedder.mlp.0.",
        "txt_in.t_embedder.out_layer.": "txt_in.t_embedder.mlp.2.",
        "txt_in.c_embedder.in_layer.": "txt_in.c_embedder.linear_1.",
        "txt_in.c_embedder.out_layer.": "txt_in.c_embedder.linear_2.",
        "time_in.in_layer.": "time_in.mlp.0.",
        "time_in.out_layer.": "time_in.mlp.2.",
        "guidance_in.in_layer.": "guidance_in.mlp.0.",
        "guidance_in.out_layer.": "guidance_in.mlp.2.",
        "_mod.lin.": "_mod.linear.",
        "attn.qkv.": "attn_qkv.",
        "attn.proj.": "attn_proj.",
        "mlp.0.": "mlp.fc1.",
        "mlp.2.": "mlp.fc2.",
        ".modulation.lin.": ".modulation.linear.",
    }
    authors: dict[str, Tensor] = {}
    for key, tensor in checkpoint.items():
        for comfyui_name, name in renamed.items():
            if comfyui_name in key:
                key = key.replace(comfyui_name, name)
                break
        authors[key] = tensor
    converter = single_file_utils.convert_hunyuan_video_transformer_to_diffusers
    converted: dict[str, Tensor] = converter(authors)
    return converted


def convert_hunyuan_video_1_5(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert as HunyuanVideo, which has other names of the embedders."""
    renamed = {
        "time_text_embed.": "time_embed.",
        "vision_in.proj.1.": "image_embedder.linear_1.",
        "vision_in.proj.3.": "image_embedder.linear_2.",
        "byt5_in.net.0.proj.": "context_embedder_2.linear_1.",
        "byt5_in.net.2.": "context_embedder_2.linear_2.",
        "byt5_in.fc3.": "context_embedder_2.linear_3.",
    }
    converted: dict[str, Tensor] = {}
    for key, tensor in convert_hunyuan_video(checkpoint).items():
        start = next((start for start in renamed if key.startswith(start)), "")
        converted[renamed.get(start, "") + key.removeprefix(start)] = tensor
    return converted


def convert_mochi(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    checkpoint["pos_frequencies"] = torch.zeros(1)
    for block in range(48):
        for name in ("q_norm_x", "k_norm_x", "q_norm_y", "k_norm_y"):
            checkpoint[f"blocks.{block}.attn.{name}.weight"] = torch.zeros(1)
    converter = single_file_utils.convert_mochi_transformer_checkpoint_to_diffusers
    converted: dict[str, Tensor] = converter(checkpoint)
    return converted


def convert_aura_flow(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    checkpoint["positional_encoding"] = torch.zeros(1)
    converter = single_file_utils.convert_auraflow_transformer_checkpoint_to_diffusers
    converted: dict[str, Tensor] = converter(checkpoint)
    return {key: tensor for key, tensor in converted.items() if tensor is not None}


def convert_ltx_2(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert with the names of diffusers' converter of LoRAs."""
    lora = {f"diffusion_model.{key}": tensor for key, tensor in checkpoint.items()}
    converter = lora_conversion_utils._convert_non_diffusers_ltx2_lora_to_diffusers
    return {key.removeprefix("transformer."): tensor for key, tensor in converter(lora).items()}


CONVERTERS: dict[str, Any] = {
    "sd15": convert_unet,
    "sdxl": convert_unet,
    "KOALA": partial(convert_unet, config=KOALA),
    "sd3": convert_sd3,
    "flux": convert_flux,
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "qwen": dict,  # its authors have diffusers' names
    "z-image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "Wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "Flux.2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    "Lumina Image 2": single_file_utils.convert_lumina2_to_diffusers,
    "HunyuanVideo": convert_hunyuan_video,
    "HunyuanVideo 1.5": convert_hunyuan_video_1_5,
    "LTX-Video": single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers,
    "LTX-2": convert_ltx_2,
    "HiDream": single_file_utils.convert_hidream_transformer_to_diffusers,
    "Cosmos-Predict2": single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers,
    "Mochi": convert_mochi,
    "AuraFlow": convert_aura_flow,
    "Krea 2": single_file_utils.convert_krea2_transformer_checkpoint_to_diffusers,
}


def right_factor(width: int) -> Tensor:
    """Return the matrix that the updates of a width are multiplied by."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(width, NUM_COLUMNS, generator=generator)


def products_of(lora: Lora) -> dict[str, Tensor]:
    """Return the product of each layer's update and the matrix of its width."""
    products: dict[str, Tensor] = {}
    for layer in lora.layers:
        A, B, *_ = layer.read()
        right = right_factor(A.shape[1]).double().numpy()
        product = layer.scale * B.astype(np.float64) @ (A @ right)
        products[layer.name] = torch.from_numpy(product).float()
    return products


def kohya_names(shapes: Layout) -> Layout:
    return {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in shapes.items()}


def assert_same(
    products: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6
) -> None:
    """Check two sets of products. A layer that is missing is zero."""
    scale = max(float(product.abs().max()) for product in expected.values())
    assert scale > 0
    for name in products.keys() | expected.keys():
        product, other = products.get(name), expected.get(name)
        if product is None or other is None:
            remaining = product if product is not None else other
            assert remaining is not None
            assert float(remaining.abs().max()) == 0, name
        else:
            error = float((product - other).abs().max())
            assert error < tolerance * scale, name


def in_authors_names(model: str, products: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return products of a file in the kohya format by the authors' names of the modules."""
    names = {next(iter(kohya_names({name: ()}))): name for name in model_layout(model)}
    return {names[name]: product for name, product in products.items()}


def expected_in_diffusers(model: str, lora: Lora) -> dict[str, Tensor]:
    """Return the products of a LoRA in the kohya format by diffusers' names of the layers."""
    converted = convert_checkpoint(model, in_authors_names(model, products_of(lora)))
    return {f"{PARTS[model]}.{name}": product for name, product in converted.items()}


def diffusers_shapes(model: str) -> Layout:
    """Return the shape of each weight by diffusers' name of the layer."""
    shapes = model_layout(model)
    # All elements of a weight are the number of the module, so the rows say which one it was.
    numbers = {
        name: torch.full((rows, NUM_COLUMNS), float(number))
        for number, (name, (rows, *_)) in enumerate(shapes.items())
    }
    inputs = [shape[1:] for shape in shapes.values()]
    return {
        f"{PARTS[model]}.{name}": (len(weight), *inputs[int(weight[0, 0])])
        for name, weight in convert_checkpoint(model, numbers).items()
    }


def every_second(shapes: Layout, start: int = 0) -> Layout:
    return dict(list(shapes.items())[start::2])


def kohya_lora(shapes: Layout) -> Lora:
    """Return a LoRA in the kohya format from the authors' names of the modules."""
    return random_lora(kohya_names(shapes), "kohya", has_alpha=True)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("is_subset", [False, True])
def test_kohya_becomes_diffusers(model: str, is_subset: bool) -> None:
    shapes = model_layout(model)
    source = kohya_lora(every_second(shapes) if is_subset else shapes)
    converted = convert(source, "diffusers")
    assert_same(products_of(converted), expected_in_diffusers(model, source))


@pytest.mark.parametrize("model", [name for name in MODELS if name not in NAMED_AS_IN_DIFFUSERS])
@pytest.mark.parametrize("is_subset", [False, True])
def test_diffusers_becomes_kohya(model: str, is_subset: bool) -> None:
    shapes = diffusers_shapes(model)
    source = random_lora(every_second(shapes, 1) if is_subset else shapes)
    converted = convert(source, "kohya")
    assert_same(expected_in_diffusers(model, converted), products_of(source))


@pytest.mark.parametrize("model", NAMED_AS_IN_DIFFUSERS)
def test_some_models_have_diffusers_names_in_both_formats(model: str) -> None:
    """For Stable Diffusion 1, kohya's scripts train diffusers' UNet."""
    source = random_lora(diffusers_shapes(model))
    expected = {
        name.replace("unet.", "lora_unet_").replace(".", "_"): product
        for name, product in products_of(source).items()
    }
    products = products_of(convert(source, "kohya"))
    assert products.keys() == expected.keys()
    assert_same(products, expected)


@pytest.mark.parametrize("model", MODELS)
def test_a_conversion_and_its_inverse_change_nothing(model: str) -> None:
    """Fused layers whose splits share A, and those with separate components, keep their ranks."""
    first = random_lora(diffusers_shapes(model))
    fused = convert(first, "kohya")
    split = convert(fused, "diffusers")
    assert split.ranks == first.ranks
    again = convert(split, "kohya")
    assert again.ranks == fused.ranks
    assert_same(products_of(again), products_of(fused))

    fused = kohya_lora(model_layout(model))
    again = convert(convert(fused, "diffusers"), "kohya")
    if model not in NAMED_AS_IN_DIFFUSERS:
        assert again.ranks == fused.ranks


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("is_kohya_first", [False, True])
def test_files_in_two_formats_get_the_same_names(model: str, is_kohya_first: bool) -> None:
    kohya = kohya_lora(every_second(model_layout(model)))
    diffusers = random_lora(diffusers_shapes(model), seed=1)
    expected = [expected_in_diffusers(model, kohya), products_of(diffusers)]
    if is_kohya_first:
        matched = match_key_formats([kohya, diffusers])
        actual = [expected_in_diffusers(model, lora) for lora in matched]
    else:
        matched = match_key_formats([diffusers, kohya])[::-1]
        actual = [products_of(lora) for lora in matched]
    for products, expected_products in zip(actual, expected, strict=True):
        assert_same(products, expected_products)
