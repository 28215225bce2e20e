"""Converting the keys of single files to those of kohya, diffusers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plain_peft import best
from helpers.single_files import kohya_name, read_updates, save_pairs
from matryoshka_lora.lora_file.keys.formats import convert_keys
from matryoshka_lora.lora_file.single_file import open_single_file
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats import KeyFormat

UNET_MODULES = ("unet.down_blocks.0.attn1.to_q", "unet.mid_block.attn1.to_out.0")


def convert(source: Path, output: Path, key_format: KeyFormat) -> None:
    """Write a LoRA with other keys, without truncating it."""
    lora = convert_keys(open_single_file(source), key_format)
    lora.plan_unchanged().write(output)


def test_kohya_has_the_same_updates(tmp_path: Path) -> None:
    source = tmp_path / "lora.safetensors"
    output = tmp_path / "kohya.safetensors"
    save_pairs(source, *UNET_MODULES)
    convert(source, output, "kohya")
    updates = read_updates(output)
    expected = {kohya_name(name): update for name, update in read_updates(source).items()}
    assert updates.keys() == expected.keys()
    for name, update in expected.items():
        np.testing.assert_array_equal(updates[name], update)


def test_the_same_format_keeps_every_tensor(tmp_path: Path) -> None:
    source = tmp_path / "lora.safetensors"
    output = tmp_path / "output.safetensors"
    tensors = save_pairs(source, *UNET_MODULES)
    convert(source, output, "diffusers")
    written = load_file(output)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].equal(tensor)


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize(
    "kohya_prefixes",
    [
        {"text_encoder": "lora_te_"},
        {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    ],
    ids=["one encoder", "two encoders"],
)
def test_text_encoders_have_the_names_of_comfyui(
    tmp_path: Path, prefix: str, kohya_prefixes: dict[str, str]
) -> None:
    """transformers removed ``text_model.``, and ComfyUI knows only names that have it."""
    source = tmp_path / "lora.safetensors"
    output = tmp_path / "kohya.safetensors"
    module = f"{prefix}encoder.layers.3.self_attn.q_proj"
    save_pairs(source, *(f"{part}.{module}" for part in kohya_prefixes))
    convert(source, output, "kohya")
    names = {key.partition(".")[0] for key in load_file(output)}
    ending = "text_model_encoder_layers_3_self_attn_q_proj"
    assert names == {f"{kohya_prefix}{ending}" for kohya_prefix in kohya_prefixes.values()}


@pytest.mark.parametrize("alpha", [1e-4, 1e4])
def test_fp16_can_represent_factors_that_hold_the_alpha(tmp_path: Path, alpha: float) -> None:
    source, output = tmp_path / "lora.safetensors", tmp_path / "output.safetensors"
    tensors = {key: 0.01 * tensor.half() for key, tensor in save_pairs(source, "unet.q").items()}
    save_file({**tensors, "unet.q.alpha": torch.tensor(alpha)}, source)
    convert(source, output, "diffusers")
    expected = read_updates(source)["unet.q"]
    error = np.linalg.norm(read_updates(output)["unet.q"] - expected)
    assert error < 2e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("metadata", [{}, {"lora_adapter_metadata": '{"transformer.r": 2}'}])
@pytest.mark.parametrize("key_format", ["diffusers", "peft"])
@pytest.mark.parametrize("module", ["diffusion_model.blocks.0.q", "transformer.blocks.0.q"])
def test_an_alpha_becomes_part_of_the_factors(
    tmp_path: Path, module: str, key_format: KeyFormat, metadata: dict[str, str]
) -> None:
    """Programs that read alphas may ignore the metadata of diffusers."""
    source = tmp_path / "lora.safetensors"
    tensors = save_pairs(source, module)
    save_file({**tensors, f"{module}.alpha": torch.tensor(1.0)}, source, metadata)
    lora = convert_keys(open_single_file(source), key_format)
    (truncated,) = lora.plan(1).truncated_layers()
    layer = truncated.layer
    assert (layer.key_alpha, layer.scale) == (None, 1.0)
    expected = best(read_updates(source)[module], 1)
    np.testing.assert_allclose(layer.scale * truncated.B @ truncated.A, expected, atol=1e-5)


@pytest.mark.parametrize("key_format", ["diffusers", "kohya"])
def test_names_with_dots_may_have_the_suffixes_of_kohya(
    tmp_path: Path, key_format: KeyFormat
) -> None:
    source, output = tmp_path / "lora.safetensors", tmp_path / "output.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for module in UNET_MODULES:
        tensors[f"{module}.lora_down.weight"] = torch.randn(2, 6)
        tensors[f"{module}.lora_up.weight"] = torch.randn(6, 2)
        tensors[f"{module}.alpha"] = torch.tensor(3.0)
    save_file(tensors, source)
    convert(source, output, key_format)
    updates = read_updates(output)
    for name, update in read_updates(source).items():
        new_name = kohya_name(name) if key_format == "kohya" else name
        np.testing.assert_allclose(updates[new_name], update, atol=1e-5)
    suffix = "lora_down.weight" if key_format == "kohya" else "lora_A.weight"
    assert sum(key.endswith(suffix) for key in load_file(output)) == len(UNET_MODULES)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 6)
        self.conv = nn.Conv2d(3, 4, 3)


def test_peft_loads_the_folder(tmp_path: Path) -> None:
    source = tmp_path / "lora.safetensors"
    tensors = {
        "transformer.to_q.lora_A.weight": torch.randn(4, 6),
        "transformer.to_q.lora_B.weight": torch.randn(6, 4),
        "transformer.conv.lora_A.weight": torch.randn(2, 3, 3, 3),
        "transformer.conv.lora_B.weight": torch.randn(4, 2, 1, 1),
    }
    config = {
        "transformer.r": 4,
        "transformer.lora_alpha": 4,
        "transformer.rank_pattern": {"conv": 2},
        "transformer.alpha_pattern": {"conv": 6},
    }
    save_file(tensors, source, {"lora_adapter_metadata": json.dumps(config)})
    convert(source, tmp_path / "folder", "peft")
    model: Any = PeftModel.from_pretrained(Attention(), tmp_path / "folder")
    for name, rank, scale in (("to_q", 4, 1), ("conv", 2, 3)):
        layer = model.base_model.model.get_submodule(name)
        assert layer.r["default"] == rank
        update = layer.get_delta_weight("default").flatten(1).detach().numpy()
        expected = scale * read_updates(source)[f"transformer.{name}"]
        np.testing.assert_allclose(update, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("modules", "key_format", "keyword"),
    [
        (["blocks.0.q"], "diffusers", r"blocks\.0\.q"),
        (["prior.x"], "kohya", r"prior\.x"),
        (["transformer.x"], "kohya", r"transformer\.x"),
        (["unet.x", "text_encoder.x"], "peft", "several models"),
        (["unet.x"], "comfyui", "key_format"),
        (["unet.a.b_c", "unet.a_b.c"], "kohya", "two layers"),
        (["unet.x", "diffusion_model.x"], "kohya", "two layers"),
    ],
)
def test_a_format_without_a_name_for_a_layer_is_refused(
    tmp_path: Path, modules: list[str], key_format: Any, keyword: str
) -> None:
    save_pairs(tmp_path / "lora.safetensors", *modules)
    with pytest.raises(MatryoshkaError, match=keyword):
        convert_keys(open_single_file(tmp_path / "lora.safetensors"), key_format)


def test_keys_that_cannot_be_renamed_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "lora.safetensors"
    tensors = save_pairs(source, "unet.q")
    convert(source, tmp_path / "kohya.safetensors", "kohya")
    with pytest.raises(MatryoshkaError, match="dots"):
        convert_keys(open_single_file(tmp_path / "kohya.safetensors"), "diffusers")
    save_file({**tensors, "other": torch.ones(1)}, source)
    with pytest.raises(MatryoshkaError, match="other"):
        convert_keys(open_single_file(source), "kohya")


def save_layers(file: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """Write a LoRA of rank 2 whose weights have some shapes."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (rows, width) in shapes.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, width)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(tensors, file)


ATTENTION = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("shapes", "key_format", "keyword"),
    [
        ({ATTENTION: (6, 6)}, "kohya", "several models"),
        # Flux and Qwen-Image have this width.
        ({ATTENTION: (3072, 3072)}, "kohya", "several models"),
        # Lumina 2 has fewer keys than queries.
        ({"diffusion_model.layers.0.attention.qkv": (10, 6)}, "diffusers", "rows"),
        (
            {
                "diffusion_model.layers.0.attention.qkv": (18, 6),
                "diffusion_model.layers.0.attention.to_q": (6, 6),
            },
            "diffusers",
            "one module",
        ),
        (
            {
                "diffusion_model.layers.0.attention.qkv": (18, 6),
                "transformer.layers.0.attention.to_q": (6, 6),
            },
            "kohya",
            "one module",
        ),
        (
            {
                "transformer.layers.0.attention.to_q": (6, 6),
                "transformer.layers.0.attention.to_k": (7, 7),
            },
            "kohya",
            "widths",
        ),
        ({"transformer.layers.0.attention.to_q": (5, 6)}, "kohya", "rows"),
        (
            {"lora_unet_double_blocks_0_img_mlp_0": (6, 6), "lora_te1_other": (6, 6)},
            "diffusers",
            "lora_te1_other",
        ),
        ({"lora_unet_double_blocks_19_img_mlp_0": (6, 6)}, "kohya", "dots"),
        # int() has a limit on the number of digits.
        ({f"lora_unet_double_blocks_{'1' * 5000}_img_mlp_0": (6, 6)}, "kohya", "dots"),
        (
            {"lora_unet_blocks_0_ffn_0": (6, 6), "lora_unet_blocks_0_self_attn_x": (6, 6)},
            "kohya",
            "dots",
        ),
    ],
)
def test_names_that_do_not_fit_a_model_are_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, int]], key_format: KeyFormat, keyword: str
) -> None:
    save_layers(tmp_path / "lora.safetensors", shapes)
    # Not as names with dots.
    tensors = {
        key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for key, tensor in load_file(tmp_path / "lora.safetensors").items()
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(MatryoshkaError, match=keyword):
        convert_keys(open_single_file(tmp_path / "lora.safetensors"), key_format)


def test_the_width_of_the_inputs_tells_models_with_common_names_apart(tmp_path: Path) -> None:
    save_layers(tmp_path / "lora.safetensors", {ATTENTION: (1536, 1536)})
    lora = convert_keys(open_single_file(tmp_path / "lora.safetensors"), "kohya")
    (layer,) = lora.layers
    assert layer.name == "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert layer.B.shape == (3 * 1536, 2)


def test_the_model_does_not_matter_where_its_names_stay(tmp_path: Path) -> None:
    save_layers(tmp_path / "lora.safetensors", {ATTENTION: (6, 6)})
    folder = convert_keys(open_single_file(tmp_path / "lora.safetensors"), "peft")
    assert [layer.name for layer in folder.layers] == [ATTENTION.removeprefix("transformer.")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_of_parts_keep_their_dtype_and_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    source, output = tmp_path / "source.safetensors", tmp_path / "output.safetensors"
    A, B = torch.randn(4, 6).to(dtype), torch.randn(18, 4).to(dtype)
    name = "diffusion_model.layers.0.attention.qkv"
    save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, source)
    convert(source, output, "diffusers")
    tensors = load_file(output)
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        name = f"transformer.layers.0.attention.{part}"
        assert tensors[f"{name}.lora_A.weight"].equal(A)
        assert tensors[f"{name}.lora_B.weight"].equal(B[6 * number : 6 * number + 6])


def test_a_fused_layer_without_any_change_keeps_its_parts(tmp_path: Path) -> None:
    source, output = tmp_path / "source.safetensors", tmp_path / "output.safetensors"
    name = "diffusion_model.layers.0.attention.qkv"
    A, B = torch.randn(4, 6), torch.zeros(18, 4)
    save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, source)
    convert(source, output, "diffusers")
    assert len(load_file(output)) == 6
