"""Each verb on files with the names that trainers write: trainer x model x verb.

The table says which modules of diffusers a layer is for. The expected updates are the rows of the
dense update of the source.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers.plain_peft import best
from helpers.single_files import SUFFIXES, read_ranks, read_updates, save_random_lora
from safetensors.torch import load_file, save_file

from matryoshka_lora import combine, export, info
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.registry import KeyFormat

Updates = dict[str, np.ndarray]
WIDTH = 8


class File(NamedTuple):
    """The names of a trainer.

    Attributes:
        suffixes: The key of `SUFFIXES`.
        has_alpha: Whether it writes alphas.
        layers: The names of the modules in diffusers that a layer is for, by its name.
    """

    suffixes: str
    has_alpha: bool
    layers: dict[str, tuple[str, ...]]


def attention(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names or ("to_q", "to_k", "to_v"))


def with_same_names(prefix: str, part: str, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return layers whose names are those of diffusers after a prefix, with dots."""
    return {f"{prefix}{name}": (f"{part}.{name}",) for name in names}


def with_underscores(prefix: str, part: str, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return layers whose names are those of diffusers after a prefix, with underscores."""
    return {f"{prefix}{name.replace('.', '_')}": (f"{part}.{name}",) for name in names}


SD15_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SD15 = (f"{SD15_BLOCK}.attn1.to_q", f"{SD15_BLOCK}.attn1.to_out.0", f"{SD15_BLOCK}.ff.net.0.proj")
SDXL_BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
SDXL = (f"{SDXL_BLOCK}.attn1.to_q", f"{SDXL_BLOCK}.attn2.to_v", "add_embedding.linear_1")
SD3_BLOCK = "transformer_blocks.0"
SD3 = (f"{SD3_BLOCK}.attn.to_q", f"{SD3_BLOCK}.attn.to_v", f"{SD3_BLOCK}.attn2.to_out.0")
FLUX = (
    "transformer_blocks.3.attn.to_q",
    "transformer_blocks.3.attn.to_v",
    "transformer_blocks.3.attn.to_out.0",
    "transformer_blocks.3.attn.add_k_proj",
    "transformer_blocks.3.ff_context.net.0.proj",
    "single_transformer_blocks.37.attn.to_q",
    "single_transformer_blocks.37.proj_mlp",
)
WAN = ("blocks.1.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj")
QWEN = (
    "transformer_blocks.59.attn.to_q",
    "transformer_blocks.59.attn.add_q_proj",
    "transformer_blocks.59.img_mlp.net.2",
)
Z_IMAGE = (
    "layers.29.attention.to_q",
    "layers.29.attention.to_v",
    "layers.29.attention.to_out.0",
    "layers.29.feed_forward.w1",
)
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
FLUX_IN_AUTHORS_NAMES = {
    "double_blocks.3.img_attn.qkv": attention("transformer.transformer_blocks.3.attn"),
    "double_blocks.3.img_attn.proj": ("transformer.transformer_blocks.3.attn.to_out.0",),
    "single_blocks.37.linear1": (
        *attention("transformer.single_transformer_blocks.37.attn"),
        "transformer.single_transformer_blocks.37.proj_mlp",
    ),
}
WAN_IN_AUTHORS_NAMES = {
    "blocks.1.self_attn.q": ("transformer.blocks.1.attn1.to_q",),
    "blocks.1.cross_attn.o": ("transformer.blocks.1.attn2.to_out.0",),
    "blocks.1.ffn.2": ("transformer.blocks.1.ffn.net.2",),
}


def after(prefix: str, layers: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {f"{prefix}{name}": targets for name, targets in layers.items()}


def flat(prefix: str, layers: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {f"{prefix}{name.replace('.', '_')}": targets for name, targets in layers.items()}


FILES: dict[str, File] = {
    "kohya-sd15": File(
        "kohya",
        True,
        with_underscores("lora_unet_", "unet", SD15)
        | with_underscores("lora_te_", "text_encoder", (CLIP,)),
    ),
    "kohya-sdxl": File(
        "kohya",
        True,
        {
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (f"unet.{SDXL[0]}",),
            "lora_unet_output_blocks_5_2_conv": ("unet.up_blocks.1.upsamplers.0.conv",),
            "lora_unet_label_emb_0_0": ("unet.add_embedding.linear_1",),
        }
        | with_underscores("lora_te1_", "text_encoder", (CLIP,))
        | with_underscores("lora_te2_", "text_encoder_2", (CLIP,)),
    ),
    "kohya-sd3": File(
        "kohya",
        True,
        {
            "lora_unet_joint_blocks_0_x_block_attn_qkv": attention(f"transformer.{SD3_BLOCK}.attn"),
            "lora_unet_joint_blocks_0_context_block_attn_qkv": attention(
                f"transformer.{SD3_BLOCK}.attn", "add_q_proj", "add_k_proj", "add_v_proj"
            ),
            "lora_unet_joint_blocks_0_x_block_mlp_fc1": (f"transformer.{SD3_BLOCK}.ff.net.0.proj",),
        }
        | with_underscores("lora_te3_", "text_encoder_3", (T5,)),
    ),
    "kohya-flux": File(
        "kohya",
        True,
        flat("lora_unet_", FLUX_IN_AUTHORS_NAMES)
        | with_underscores("lora_te1_", "text_encoder", (CLIP,))
        | with_underscores("lora_te3_", "text_encoder_2", (T5,)),
    ),
    "musubi-wan": File("kohya", True, flat("lora_unet_", WAN_IN_AUTHORS_NAMES)),
    "musubi-qwen": File("kohya", True, with_underscores("lora_unet_", "transformer", QWEN)),
    "musubi-z-image": File("kohya", True, with_underscores("lora_unet_", "transformer", Z_IMAGE)),
    "onetrainer-sdxl": File("kohya", True, with_underscores("lora_unet_", "unet", SDXL)),
    "onetrainer-sd3": File(
        "kohya", True, with_underscores("lora_transformer_", "transformer", SD3)
    ),
    "onetrainer-flux": File(
        "kohya",
        True,
        with_underscores("lora_transformer_", "transformer", FLUX)
        | with_underscores("lora_te2_", "text_encoder_2", (T5,)),
    ),
    "ai-toolkit-flux": File(
        "diffusers", False, with_same_names("transformer.", "transformer", FLUX)
    ),
    "ai-toolkit-wan": File("diffusers", False, after("diffusion_model.", WAN_IN_AUTHORS_NAMES)),
    "ai-toolkit-qwen": File(
        "diffusers", False, with_same_names("diffusion_model.", "transformer", QWEN)
    ),
    "ai-toolkit-z-image": File(
        "diffusers", False, with_same_names("diffusion_model.", "transformer", Z_IMAGE)
    ),
    "simpletuner-flux": File("kohya", True, with_underscores("lycoris_", "transformer", FLUX)),
    "simpletuner-sd3": File(
        "diffusers", False, with_same_names("transformer.", "transformer", SD3)
    ),
    "diffsynth-wan": File("default", False, WAN_IN_AUTHORS_NAMES),
    "diffsynth-qwen": File("default", False, with_same_names("", "transformer", QWEN)),
    "diffusers-sd15": File(
        "diffusers",
        False,
        with_same_names("unet.", "unet", SD15)
        | {f"text_encoder.{CLIP}": (f"text_encoder.{CLIP}",)},
    ),
    "diffusers-sdxl": File("diffusers", False, with_same_names("unet.", "unet", SDXL)),
    "old-diffusers-sd15": File(
        "down and up",
        False,
        {
            f"unet.{SD15_BLOCK}.attn1.processor.to_q_lora": (f"unet.{SD15[0]}",),
            f"unet.{SD15_BLOCK}.attn1.processor.to_out_lora": (f"unet.{SD15[1]}",),
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora": (
                f"text_encoder.{CLIP}",
            ),
        },
    ),
    "diffusers-sd3": File("diffusers", False, with_same_names("transformer.", "transformer", SD3)),
    "diffusers-flux": File(
        "diffusers", False, with_same_names("transformer.", "transformer", FLUX)
    ),
    "diffusers-wan": File("diffusers", False, with_same_names("transformer.", "transformer", WAN)),
    "diffusers-qwen": File(
        "diffusers", False, with_same_names("transformer.", "transformer", QWEN)
    ),
    "diffusers-z-image": File(
        "diffusers", False, with_same_names("transformer.", "transformer", Z_IMAGE)
    ),
    "comfyui-flux": File("kohya", False, after("diffusion_model.", FLUX_IN_AUTHORS_NAMES)),
    "comfyui-z-image": File(
        "kohya",
        False,
        {
            "diffusion_model.layers.29.attention.qkv": attention("transformer.layers.29.attention"),
            "diffusion_model.layers.29.attention.out": (
                "transformer.layers.29.attention.to_out.0",
            ),
        },
    ),
    "xlabs-flux": File(
        "down and up",
        False,
        {
            "double_blocks.3.processor.qkv_lora1": attention(
                "transformer.transformer_blocks.3.attn"
            ),
            "double_blocks.3.processor.proj_lora2": (
                "transformer.transformer_blocks.3.attn.to_add_out",
            ),
            "single_blocks.37.processor.qkv_lora": attention(
                "transformer.single_transformer_blocks.37.attn"
            ),
            "single_blocks.37.processor.proj_lora": (
                "transformer.single_transformer_blocks.37.proj_out",
            ),
        },
    ),
}

all_files = pytest.mark.parametrize("name", FILES)


RATIOS = {
    "proj_mlp": 4.0,
    "single_transformer_blocks.37.proj_out": 1 / 5,
    "ff.net.0.proj": 4.0,
    "ff_context.net.0.proj": 4.0,
    "mlp.net.2": 1 / 4,
    "feed_forward.w1": 8 / 3,
}
"""The rows of modules in multiples of their inputs, where they are not 1."""


def shape_of(module: str) -> tuple[int, int]:
    ratio = next((value for name, value in RATIOS.items() if module.endswith(name)), 1.0)
    return round(max(1.0, ratio) * WIDTH), round(WIDTH / min(1.0, ratio))


def num_rows(module: str) -> int:
    return shape_of(module)[0]


@pytest.fixture
def source(name: str, tmp_path: Path) -> Path:
    """A file with the names of a trainer, mixed ranks and mixed alphas."""
    file = FILES[name]
    path = tmp_path / "source.safetensors"
    shapes = {
        layer: (sum(map(num_rows, modules)), shape_of(modules[0])[1])
        for layer, modules in file.layers.items()
    }
    save_random_lora(path, shapes, has_alpha=file.has_alpha)
    written = SUFFIXES["kohya" if file.has_alpha else "diffusers"]
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(path).items():
        for old, new in zip(written, SUFFIXES[file.suffixes], strict=True):
            if key.endswith(old):
                key = key.removesuffix(old) + new
                break
        tensors[key] = tensor
    save_file(tensors, path)
    return path


def updates_in_diffusers(name: str, updates: Updates) -> Updates:
    """Return the updates of a trainer's file by the names of diffusers."""
    split: Updates = {}
    for layer, modules in FILES[name].layers.items():
        start = 0
        for module in modules:
            split[module] = updates[layer][start : start + num_rows(module)]
            start += num_rows(module)
    return split


def convert(source: Path, key_format: KeyFormat) -> Path:
    """Return a file with the keys of a format."""
    output = source.with_name(f"{source.stem}-{key_format}.safetensors")
    export(source, output, key_format=key_format)
    return output


def assert_same(updates: Updates, expected: Updates, tolerance: float = 1e-6) -> None:
    """Check updates. Layers that are missing are zero."""
    scale = max(np.abs(update).max() for update in expected.values())
    for layer in updates.keys() | expected.keys():
        difference = np.abs(updates.get(layer, 0.0) - expected.get(layer, 0.0))
        assert difference.max() < tolerance * scale, layer


@all_files
def test_info(source: Path, name: str) -> None:
    missing = total = 0.0
    for update in read_updates(source).values():
        total += float((update**2).sum())
        missing += float(((update - best(update, 1)) ** 2).sum())
    assert info(source).errors[1] == pytest.approx((missing / total) ** 0.5, abs=1e-6)


@all_files
def test_export(source: Path, name: str) -> None:
    output = source.with_name("rank-1.safetensors")
    export(source, output, 1)
    assert set(read_ranks(output).values()) == {1}
    expected = {layer: best(update, 1) for layer, update in read_updates(source).items()}
    assert_same(read_updates(output), expected, tolerance=1e-5)


@all_files
def test_convert_to_diffusers(source: Path, name: str) -> None:
    updates = read_updates(convert(source, "diffusers"))
    expected = updates_in_diffusers(name, read_updates(source))
    assert updates.keys() == expected.keys()
    assert_same(updates, expected)


@all_files
def test_convert_to_kohya(source: Path, name: str) -> None:
    kohya = convert(source, "kohya")
    assert all(layer.startswith(("lora_unet_", "lora_te")) for layer in read_updates(kohya))
    expected = updates_in_diffusers(name, read_updates(source))
    assert_same(read_updates(convert(kohya, "diffusers")), expected)


@all_files
def test_combine(source: Path, name: str) -> None:
    expected = updates_in_diffusers(name, read_updates(source))
    other = source.with_name("other.safetensors")
    shapes = {layer: update.shape for layer, update in expected.items()}
    save_random_lora(other, shapes, has_alpha=False, seed=1)
    output = source.with_name("sum.safetensors")
    with pytest.raises(MatryoshkaError, match="at most") as error:
        combine([source, other], output, [0.8, -0.5], rank=1000)
    exact_rank = int(str(error.value).split("at most ")[1].split(",")[0])
    combine([source, other], output, [0.8, -0.5], exact_rank)
    other_updates = read_updates(other)
    total = {layer: 0.8 * expected[layer] - 0.5 * other_updates[layer] for layer in expected}
    assert_same(read_updates(convert(output, "diffusers")), total, tolerance=1e-5)


MODEL_NAMES = {
    "sd15": "Stable Diffusion 1 and 2",
    "sdxl": "SDXL",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
    "wan": "Wan 2.1, 2.2",
    "qwen": "Qwen-Image",
    "z-image": "Z-Image",
}


def test_the_documentation_names_the_trainers_of_this_table() -> None:
    trainers_by_model: dict[str, set[str]] = {model: set() for model in MODEL_NAMES.values()}
    for name in FILES:
        model = next(key for key in MODEL_NAMES if name.endswith(f"-{key}"))
        trainer = name.removesuffix(f"-{model}").replace("old-", "old ")
        trainers_by_model[MODEL_NAMES[model]].add(trainer)
    page = (Path(__file__).parents[2] / "docs/shrink.md").read_text(encoding="utf-8")
    documented: dict[str, set[str]] = {}
    for line in page.splitlines():
        model, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if model in trainers_by_model:
            documented[model] = {trainer.lower() for trainer in cells[0].split(", ")}
    assert documented == trainers_by_model
