"""LoRAs of image models whose weights have the names of their makers, or are in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.layers import best_matrix
from helpers.single_files import read_updates
from safetensors.torch import load_file, save_file
from torch import Tensor

from matryoshka_lora import MatryoshkaError, extract

R = 4
TEXT_BLOCK = "text_model.encoder.layers.1"
OPEN_CLIP_BLOCK = "conditioner.embedders.1.model.transformer.resblocks.1"
CLIP_BLOCK = f"conditioner.embedders.0.transformer.{TEXT_BLOCK}"

# The layers of a model in the names of its file: their shapes, and the names of the LoRA's layers
# in both formats, with the slices of the rows that are theirs.
ALL = slice(None)
Names = dict[str, slice]
MODELS: dict[str, dict[str, tuple[tuple[int, int], Names, Names]]] = {
    "flux": {
        "double_blocks.0.img_attn.qkv": (
            (24, 8),
            {
                "transformer.transformer_blocks.0.attn.to_q": slice(0, 8),
                "transformer.transformer_blocks.0.attn.to_k": slice(8, 16),
                "transformer.transformer_blocks.0.attn.to_v": slice(16, 24),
            },
            {"lora_unet_double_blocks_0_img_attn_qkv": ALL},
        ),
        "vector_in.in_layer": (
            (10, 8),
            {"transformer.time_text_embed.text_embedder.linear_1": ALL},
            {"lora_unet_vector_in_in_layer": ALL},
        ),
    },
    "wan": {
        "blocks.0.self_attn.q": (
            (8, 8),
            {"transformer.blocks.0.attn1.to_q": ALL},
            {"lora_unet_blocks_0_self_attn_q": ALL},
        ),
        "time_embedding.0": (
            (10, 8),
            {"transformer.condition_embedder.time_embedder.linear_1": ALL},
            {"lora_unet_time_embedding_0": ALL},
        ),
    },
    "a model that ComfyUI has saved": {
        "model.diffusion_model.blocks.0.self_attn.q": (
            (8, 8),
            {"transformer.blocks.0.attn1.to_q": ALL},
            {"lora_unet_blocks_0_self_attn_q": ALL},
        ),
    },
    "qwen": {
        "transformer_blocks.0.attn.to_q": (
            (8, 8),
            {"transformer.transformer_blocks.0.attn.to_q": ALL},
            {"lora_unet_transformer_blocks_0_attn_to_q": ALL},
        ),
        "transformer_blocks.0.img_mlp.net.2": (
            (8, 32),
            {"transformer.transformer_blocks.0.img_mlp.net.2": ALL},
            {"lora_unet_transformer_blocks_0_img_mlp_net_2": ALL},
        ),
    },
    "flux in the names of diffusers": {
        "single_transformer_blocks.0.proj_out": (
            (8, 40),
            {"transformer.single_transformer_blocks.0.proj_out": ALL},
            {"lora_unet_single_blocks_0_linear2": ALL},
        ),
        "transformer_blocks.0.attn.to_out.0": (
            (8, 8),
            {"transformer.transformer_blocks.0.attn.to_out.0": ALL},
            {"lora_unet_double_blocks_0_img_attn_proj": ALL},
        ),
    },
    "sdxl": {
        "model.diffusion_model.input_blocks.4.1.proj_in": (
            (10, 8),
            {"unet.down_blocks.1.attentions.0.proj_in": ALL},
            {"lora_unet_input_blocks_4_1_proj_in": ALL},
        ),
        "model.diffusion_model.time_embed.0": (
            (10, 8),
            {"unet.time_embedding.linear_1": ALL},
            {"lora_unet_time_embed_0": ALL},
        ),
        f"{CLIP_BLOCK}.self_attn.v_proj": (
            (8, 8),
            {f"text_encoder.{TEXT_BLOCK}.self_attn.v_proj": ALL},
            {"lora_te1_text_model_encoder_layers_1_self_attn_v_proj": ALL},
        ),
        f"{OPEN_CLIP_BLOCK}.attn.out_proj": (
            (8, 8),
            {f"text_encoder_2.{TEXT_BLOCK}.self_attn.out_proj": ALL},
            {"lora_te2_text_model_encoder_layers_1_self_attn_out_proj": ALL},
        ),
        f"{OPEN_CLIP_BLOCK}.mlp.c_fc": (
            (10, 8),
            {f"text_encoder_2.{TEXT_BLOCK}.mlp.fc1": ALL},
            {"lora_te2_text_model_encoder_layers_1_mlp_fc1": ALL},
        ),
        f"{OPEN_CLIP_BLOCK}.mlp.c_proj": (
            (8, 10),
            {f"text_encoder_2.{TEXT_BLOCK}.mlp.fc2": ALL},
            {"lora_te2_text_model_encoder_layers_1_mlp_fc2": ALL},
        ),
    },
}


def save_models(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Write random weights before and after fine-tuning, and return the changes by key."""
    weights: list[dict[str, Tensor]] = []
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        weights.append({key: torch.randn(shape) for key, shape in shapes.items()})
        save_file(weights[-1], folder / f"{name}.safetensors")
    base, tuned = weights
    return {key: (tuned[key].double() - base[key].double()).numpy() for key in shapes}


def run(folder: Path, key_format: Any, rank: int = R) -> Any:
    models = folder / "base.safetensors", folder / "tuned.safetensors"
    return extract(*models, folder / "lora.safetensors", rank, key_format=key_format)


@pytest.mark.parametrize("key_format", ["diffusers", "kohya"])
@pytest.mark.parametrize("model", MODELS)
def test_the_layers_have_the_names_of_lora_files(
    tmp_path: Path, model: str, key_format: Any
) -> None:
    layers = MODELS[model]
    changes = save_models(
        tmp_path, {f"{key}.weight": shape for key, (shape, _, _) in layers.items()}
    )
    expected: dict[str, np.ndarray] = {}
    for key, (_, diffusers_names, kohya_names) in layers.items():
        update = best_matrix(changes[f"{key}.weight"], R)
        names = kohya_names if key_format == "kohya" else diffusers_names
        expected |= {name: update[rows] for name, rows in names.items()}
    run(tmp_path, key_format)
    actual = read_updates(tmp_path / "lora.safetensors")
    assert actual.keys() == expected.keys()
    for name, update in actual.items():
        np.testing.assert_allclose(update, expected[name], atol=1e-4)


@pytest.mark.parametrize("key_format", ["diffusers", "kohya"])
def test_a_folder_of_diffusers_is_recognised_by_its_class(tmp_path: Path, key_format: Any) -> None:
    shapes = {"mid.conv.weight": (8, 6, 3, 3), "mid.to_q.weight": (10, 6), "mid.norm.weight": (6,)}
    changes = save_models(tmp_path, shapes)
    folders = tmp_path / "unet", tmp_path / "tuned_unet"
    for folder, name in zip(folders, ("base", "tuned"), strict=True):
        folder.mkdir()
        file = folder / "diffusion_pytorch_model.safetensors"
        (tmp_path / f"{name}.safetensors").rename(file)
    (folders[0] / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    output = tmp_path / "lora.safetensors"
    result = extract(*folders, output, R, key_format=key_format)
    names = {"mid.conv": "unet.mid.conv", "mid.to_q": "unet.mid.to_q"}
    if key_format == "kohya":
        names = {"mid.conv": "lora_unet_mid_conv", "mid.to_q": "lora_unet_mid_to_q"}
    actual = read_updates(output)
    assert result.ranks == dict.fromkeys(actual, R)
    assert actual.keys() == {*names.values()}
    for module, name in names.items():
        change = changes[f"{module}.weight"]
        expected = best_matrix(change.reshape(len(change), -1), R)
        np.testing.assert_allclose(actual[name], expected, atol=1e-4)


def test_names_that_kohya_does_not_have_are_rejected(tmp_path: Path) -> None:
    save_models(tmp_path, {"transformer_blocks.0.attn9.to_q.weight": (8, 8)})
    with pytest.raises(MatryoshkaError, match="kohya"):
        run(tmp_path, "kohya")
    assert not list(tmp_path.glob(".*extracting"))  # before the factorization


def test_a_fused_projection_of_a_text_encoder_is_split(tmp_path: Path) -> None:
    key = f"{OPEN_CLIP_BLOCK}.attn.in_proj_weight"
    (change,) = save_models(tmp_path, {key: (24, 8)}).values()
    run(tmp_path, "kohya")
    actual = read_updates(tmp_path / "lora.safetensors")
    prefix = "lora_te2_text_model_encoder_layers_1_self_attn"
    expected = {
        f"{prefix}_{name}_proj": best_matrix(rows, R)
        for name, rows in zip("qkv", np.split(change, 3), strict=True)
    }
    assert actual.keys() == expected.keys()
    for name, update in actual.items():
        np.testing.assert_allclose(update, expected[name], atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"error": "1%"}, {"keep": "99%"}])
def test_a_fused_layer_has_at_most_the_rank(tmp_path: Path, options: dict[str, str]) -> None:
    double = [f"transformer_blocks.0.attn.to_{name}.weight" for name in "qkv"]
    single = [f"single_transformer_blocks.0.attn.to_{name}.weight" for name in "qkv"]
    mlp = "single_transformer_blocks.0.proj_mlp.weight"
    changes = save_models(tmp_path, {**dict.fromkeys([*double, *single], (8, 8)), mlp: (32, 8)})
    models = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    output = tmp_path / "lora.safetensors"
    result = extract(*models, output, rank=4, key_format="kohya", **options)
    fused = {
        "lora_unet_double_blocks_0_img_attn_qkv": double,
        "lora_unet_single_blocks_0_linear1": [*single, mlp],
    }
    assert result.ranks == dict.fromkeys(fused, 4)
    updates = read_updates(output)
    change = np.concatenate([changes[key] for keys in fused.values() for key in keys])
    update = np.concatenate([updates[name] for name in fused])
    error = np.linalg.norm(change - update) / np.linalg.norm(change)
    assert result.errors[4] == pytest.approx(error, rel=1e-3)


def test_what_a_lora_cannot_name_is_listed(tmp_path: Path) -> None:
    shapes = {
        "model.diffusion_model.out.2.weight": (4, 8, 3, 3),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
        f"{OPEN_CLIP_BLOCK}.ln_1.weight": (8,),
        f"{OPEN_CLIP_BLOCK}.attn.in_proj_bias": (24,),
        "conditioner.embedders.1.model.text_projection": (8, 8),
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (9, 8),
    }
    save_models(tmp_path, shapes)
    result = run(tmp_path, "kohya")
    assert [*result.ranks] == ["lora_unet_conv_out"]
    assert len(result.unsaved_tensors) == 5
    assert result.unsaved_tensors["first_stage_model.decoder.conv_in.weight"] == 8 * 4 * 9 * 4


def test_the_tuned_model_may_have_the_prefix_of_a_checkpoint(tmp_path: Path) -> None:
    """The makers' file has none, and a program that saves the tuned model adds one."""
    key = "double_blocks.0.img_attn.qkv.weight"
    (change,) = save_models(tmp_path, {key: (24, 8)}).values()
    tuned = load_file(tmp_path / "tuned.safetensors")
    save_file({f"model.diffusion_model.{key}": tuned[key]}, tmp_path / "tuned.safetensors")
    run(tmp_path, "kohya")
    (update,) = read_updates(tmp_path / "lora.safetensors").values()
    np.testing.assert_allclose(update, best_matrix(change, R), atol=1e-4)


def test_an_unknown_model_is_rejected(tmp_path: Path) -> None:
    save_models(tmp_path, {"encoder.q_proj.weight": (10, 8)})
    with pytest.raises(MatryoshkaError, match="pipeline"):
        run(tmp_path, "kohya")


FLOAT8_KEY = "double_blocks.0.img_attn.qkv"


def save_float8(
    file: Path, weight: Tensor, dtype: torch.dtype, scale_name: str, scale: float
) -> Tensor:
    """Write a weight in float8, and return it as PyTorch and the scale give it."""
    numbers = (weight / scale).to(dtype)
    tensors = {
        f"{FLOAT8_KEY}.weight": numbers,
        "double_blocks.0.img_attn.proj.weight": torch.ones(8, 8).to(dtype),
    }
    if scale_name:
        tensors[f"{FLOAT8_KEY}.{scale_name}"] = torch.tensor(scale)
        tensors[f"{FLOAT8_KEY}.scale_input"] = torch.tensor(float(weight[0, 0]))
        tensors["scaled_fp8"] = torch.zeros(0).to(dtype)
    save_file(tensors, file)
    return numbers.double() * scale


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize(
    ("scale_name", "scale"),
    [("", 1.0), ("scale_weight", 0.003), ("weight_scale", 0.25), ("weight_scale_inv", 0.003)],
)
def test_float8_weights_are_multiplied_by_their_scale(
    tmp_path: Path, dtype: torch.dtype, scale_name: str, scale: float
) -> None:
    torch.manual_seed(0)
    # Larger numbers divided by the smallest scale are no numbers of float8.
    old, change = 0.3 * torch.randn(24, 8), 0.3 * torch.randn(24, 8)
    base = save_float8(tmp_path / "base.safetensors", old, dtype, scale_name, scale)
    tuned = save_float8(tmp_path / "tuned.safetensors", old + change, dtype, "", 1.0)
    result = run(tmp_path, "kohya")
    assert not result.unsaved_tensors
    output = tmp_path / "lora.safetensors"
    assert load_file(output)["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].dtype == (
        torch.bfloat16
    )
    (update,) = read_updates(output).values()
    expected = best_matrix((tuned - base).numpy(), R)
    assert np.linalg.norm(update - expected) < 0.01 * np.linalg.norm(expected)
    error = np.linalg.norm(update - (tuned - base).numpy()) / float((tuned - base).norm())
    assert result.errors[R] == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("float8_model", ["base", "tuned"])
@pytest.mark.parametrize(("scale_name", "scale"), [("", 1.0), ("scale_weight", 0.0003)])
def test_rounding_to_float8_is_reported_and_is_no_change_of_a_layer(
    tmp_path: Path, float8_model: str, scale_name: str, scale: float
) -> None:
    """Small weights without a scale are subnormal numbers."""
    torch.manual_seed(0)
    weights = {"base": 0.02 * torch.randn(120, 120)}
    weights["tuned"] = weights["base"] + 0.002 * torch.randn(120, 120)
    kept = 0.02 * torch.randn(50, 40).bfloat16()
    rounded = torch.empty(0)
    for name, weight in weights.items():
        tensors = {"blocks.0.self_attn.q.weight": weight, "blocks.0.self_attn.k.weight": kept}
        if name == float8_model:
            for key, tensor in [*tensors.items()]:
                tensors[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
                if scale_name:
                    tensors[key.replace("weight", scale_name)] = torch.tensor(scale)
            rounded = tensors["blocks.0.self_attn.q.weight"].float() * scale - weight
        save_file(tensors, tmp_path / f"{name}.safetensors")
    result = run(tmp_path, "kohya")
    assert [*result.ranks] == ["lora_unet_blocks_0_self_attn_q"]
    change = weights["tuned"] - weights["base"]
    change = change + rounded if float8_model == "tuned" else change - rounded
    expected = float(rounded.square().sum() / change.square().sum())
    assert result.rounding_share == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("scale_name", "scales", "dtype"),
    [
        ("weight_scale_inv", torch.ones(1, 2), torch.float8_e4m3fn),
        ("weight_scale", torch.ones(24, 1), torch.float8_e4m3fn),
        ("scale_weight", torch.ones(1), torch.bfloat16),
    ],
    ids=["blocks", "rows", "bfloat16"],
)
def test_other_scales_are_rejected(
    tmp_path: Path, scale_name: str, scales: Tensor, dtype: torch.dtype
) -> None:
    weight = torch.randn(24, 8)
    tensors = {f"{FLOAT8_KEY}.weight": weight.to(dtype), f"{FLOAT8_KEY}.{scale_name}": scales}
    save_file(tensors, tmp_path / "base.safetensors")
    save_file({f"{FLOAT8_KEY}.weight": weight + 1}, tmp_path / "tuned.safetensors")
    with pytest.raises(MatryoshkaError, match=scale_name):
        run(tmp_path, "kohya")
