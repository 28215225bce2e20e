"""Key formats of image and video models, compared with diffusers' converters of checkpoints.

Those converters rename the modules of a checkpoint, and split and permute the rows of its weights.
A weight's product with a random matrix has the same rows, so the converters are applied to the
products of what a LoRA adds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.authors_layouts import LAYOUTS, Layout, layout
from helpers.single_files import read_ranks, save_random_lora
from safetensors.torch import load_file
from torch import Tensor

from matryoshka_lora import combine, export

pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers.loaders import single_file_utils

UNET_CONFIG = {"layers_per_block": 2, "addition_embed_type": None}
# diffusers splits Flux at fixed rows.
HIDDEN_SIZES = {"flux": 3072}
PARTS = dict.fromkeys(LAYOUTS, "transformer") | {"sd15": "unet", "sdxl": "unet"}
NUM_COLUMNS = 5
# UNets have hundreds of layers.
SLOW_UNETS = [
    pytest.param(model, marks=pytest.mark.slow) if PARTS[model] == "unet" else model
    for model in LAYOUTS
]


def model_layout(model: str) -> Layout:
    return layout(model, HIDDEN_SIZES.get(model, 8))


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


def convert_unet(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    config = UNET_CONFIG
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


CONVERTERS: dict[str, Any] = {
    "sd15": convert_unet,
    "sdxl": convert_unet,
    "sd3": convert_sd3,
    "flux": convert_flux,
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "qwen": dict,  # its authors have diffusers' names
    "z-image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
}


def right_factor(width: int) -> Tensor:
    """Return the matrix that the updates of a width are multiplied by."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(width, NUM_COLUMNS, generator=generator)


def read_products(file: Path) -> dict[str, Tensor]:
    """Return the product of each layer's update with the matrix of its width."""
    tensors = load_file(file)
    products: dict[str, Tensor] = {}
    for key, A in tensors.items():
        for suffix_A, suffix_B in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if key.endswith(f".{suffix_A}.weight"):
                name = key.removesuffix(f".{suffix_A}.weight")
                B = tensors[f"{name}.{suffix_B}.weight"].flatten(1)
                A = A.flatten(1)
                scale = float(tensors.get(f"{name}.alpha", len(A))) / len(A)
                products[name] = scale * B @ (A @ right_factor(A.shape[1]))
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


def expected_in_diffusers(model: str, file: Path) -> dict[str, Tensor]:
    """Return what a file in the kohya format adds, by diffusers' names of the layers."""
    converted = convert_checkpoint(model, in_authors_names(model, read_products(file)))
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


@pytest.mark.parametrize("model", LAYOUTS)
@pytest.mark.parametrize("is_subset", [False, True])
def test_kohya_becomes_diffusers(tmp_path: Path, model: str, is_subset: bool) -> None:
    source, output = tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"
    shapes = model_layout(model)
    save_random_lora(
        source, kohya_names(every_second(shapes) if is_subset else shapes), has_alpha=True
    )
    export(source, output, key_format="diffusers")
    assert_same(read_products(output), expected_in_diffusers(model, source))


@pytest.mark.parametrize("model", sorted(LAYOUTS.keys() - {"sd15"}))
@pytest.mark.parametrize("is_subset", [False, True])
def test_diffusers_becomes_kohya(tmp_path: Path, model: str, is_subset: bool) -> None:
    source, output = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    shapes = diffusers_shapes(model)
    save_random_lora(source, every_second(shapes, 1) if is_subset else shapes, has_alpha=False)
    export(source, output, key_format="kohya")
    assert_same(expected_in_diffusers(model, output), read_products(source))


def test_stable_diffusion_1_has_diffusers_names_in_both_formats(tmp_path: Path) -> None:
    """kohya's scripts train diffusers' UNet."""
    source, output = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    save_random_lora(source, diffusers_shapes("sd15"), has_alpha=False)
    export(source, output, key_format="kohya")
    expected = {
        name.replace("unet.", "lora_unet_").replace(".", "_"): product
        for name, product in read_products(source).items()
    }
    products = read_products(output)
    assert products.keys() == expected.keys()
    assert_same(products, expected)


@pytest.mark.parametrize("model", SLOW_UNETS)
def test_a_conversion_and_its_inverse_change_nothing(tmp_path: Path, model: str) -> None:
    """Fused layers whose parts share A, and those with separate components, keep their ranks."""
    source = tmp_path / "kohya.safetensors"
    save_random_lora(tmp_path / "first.safetensors", diffusers_shapes(model), has_alpha=False)
    export(tmp_path / "first.safetensors", source, key_format="kohya")
    export(source, tmp_path / "split.safetensors", key_format="diffusers")
    assert read_ranks(tmp_path / "split.safetensors") == read_ranks(tmp_path / "first.safetensors")
    export(tmp_path / "split.safetensors", tmp_path / "again.safetensors", key_format="kohya")
    assert read_ranks(tmp_path / "again.safetensors") == read_ranks(source)
    assert_same(read_products(tmp_path / "again.safetensors"), read_products(source))

    fused = tmp_path / "fused.safetensors"
    save_random_lora(fused, kohya_names(model_layout(model)), has_alpha=True)
    export(fused, tmp_path / "parts.safetensors", key_format="diffusers")
    export(tmp_path / "parts.safetensors", tmp_path / "fused-again.safetensors", key_format="kohya")
    if model != "sd15":  # its kohya format has diffusers' names
        assert read_ranks(tmp_path / "fused-again.safetensors") == read_ranks(fused)


@pytest.mark.parametrize("model", LAYOUTS)
@pytest.mark.parametrize("is_kohya_first", [False, True])
def test_files_in_two_formats_are_added(tmp_path: Path, model: str, is_kohya_first: bool) -> None:
    kohya, diffusers = tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"
    save_random_lora(kohya, kohya_names(every_second(model_layout(model))), has_alpha=True)
    save_random_lora(diffusers, diffusers_shapes(model), has_alpha=False, seed=1)
    sources, weights = [kohya, diffusers], [0.8, -0.5]
    if not is_kohya_first:
        sources, weights = sources[::-1], weights[::-1]
    output = tmp_path / "sum.safetensors"
    # Parts that are put together have the sum of their ranks.
    added = diffusers
    if is_kohya_first:
        added = tmp_path / "added.safetensors"
        export(diffusers, added, key_format="kohya")
    rank = sum(max(read_ranks(file).values()) for file in (kohya, added))
    combine(sources, output, weights, rank=rank)
    expected = {name: -0.5 * product for name, product in read_products(diffusers).items()}
    for name, product in expected_in_diffusers(model, kohya).items():
        expected[name] = expected.get(name, 0) + 0.8 * product
    products = read_products(output)
    if is_kohya_first:
        products = expected_in_diffusers(model, output)
    assert_same(products, expected, tolerance=1e-5)
