"""diffusers' own loaders read what is converted, on small models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import transformers.integrations.peft
from helpers.single_files import save_random_lora
from safetensors.torch import load_file, save_file
from torch import nn

from matryoshka_lora import combine, export
from matryoshka_lora.lora.keys import load_models
from research.blocks.shared import read

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers.loaders import lora_pipeline  # noqa: E402
from helpers.diffusers_models import SMALL_MODELS, small_flux, small_model  # noqa: E402

# transformers 5.24 requires for its text encoders a version of PEFT that is not released yet.
transformers.integrations.peft.MIN_PEFT_VERSION = "0.18.0"

pytestmark = pytest.mark.slow


class Model(NamedTuple):
    """A model with the loader of its pipeline.

    Attributes:
        mixin: The class of the loader.
        create: Creates the model.
        part: The part of the pipeline.
        read_prefix: The start of the keys of kohya's format that diffusers reads.
    """

    mixin: str
    create: Callable[[], nn.Module]
    part: str = "transformer"
    read_prefix: str | None = None


def create_sdxl(layers_per_block: int = 2) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16),
        layers_per_block=layers_per_block,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        transformer_layers_per_block=(1, 2, 3),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=36,
    )


def create_sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
        dual_attention_layers=(0,),
    )


def create_wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def create_qwen() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(8, 4, 4),
    )


def create_z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 4, 4],
        axes_lens=[16, 16, 16],
    )


def create_flux_2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4, 4),
    )


def create_lumina_2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        cap_feat_dim=12,
    )


MODELS = {
    "sdxl": Model("StableDiffusionXLLoraLoaderMixin", create_sdxl, "unet", "lora_unet_"),
    # diffusers reads the keys of kohya for KOALA, but not those of its embedder.
    "koala": Model(
        "StableDiffusionXLLoraLoaderMixin",
        partial(create_sdxl, layers_per_block=1),
        "unet",
        "lora_unet_up_blocks_",
    ),
    "sd3": Model("SD3LoraLoaderMixin", create_sd3),
    # diffusers splits the single blocks of Flux at the rows of the full model.
    "flux": Model(
        "FluxLoraLoaderMixin",
        partial(small_flux, num_layers=2, guidance_embeds=True),
        read_prefix="lora_unet_double_blocks_",
    ),
    "wan": Model("WanLoraLoaderMixin", create_wan, read_prefix="lora_unet_blocks_"),
    "qwen": Model("QwenImageLoraLoaderMixin", create_qwen, read_prefix="lora_unet_"),
    "z-image": Model("ZImageLoraLoaderMixin", create_z_image, read_prefix="lora_unet_layers_"),
    # diffusers reads the keys of kohya for Flux.2, but not those of its embedders.
    "flux.2": Model("Flux2LoraLoaderMixin", create_flux_2, read_prefix="lora_unet_double_blocks_"),
    "lumina-2": Model("Lumina2LoraLoaderMixin", create_lumina_2),
}
MIXINS = {
    "Wan": "WanLoraLoaderMixin",
    "HunyuanVideo": "HunyuanVideoLoraLoaderMixin",
    "LTX-Video": "LTXVideoLoraLoaderMixin",
    "LTX-2": "LTX2LoraLoaderMixin",
    "HiDream": "HiDreamImageLoraLoaderMixin",
    "Cosmos-Predict2": "CosmosLoraLoaderMixin",
    "Mochi": "Mochi1LoraLoaderMixin",
    "AuraFlow": "AuraFlowLoraLoaderMixin",
    "Krea 2": "Krea2LoraLoaderMixin",
}
MODELS["anima"] = Model("AnimaLoraLoaderMixin", partial(small_model, "Cosmos-Predict2"))
MODELS |= {name: Model(MIXINS[name], partial(small_model, name)) for name in SMALL_MODELS}


def load_updates(model: Model, file: Path) -> dict[str, np.ndarray]:
    """Return what diffusers adds to each weight when it has loaded a file."""
    mixin = getattr(diffusers.loaders, model.mixin)
    part = model.create()
    attributes: dict[str, Any] = {"components": {}, "hf_device_map": None, model.part: part}
    attributes |= dict.fromkeys(["text_encoder", "text_encoder_2", "text_encoder_3"])
    pipeline = type("Pipeline", (mixin,), attributes)()
    pipeline.load_lora_weights(str(file))
    updates: dict[str, np.ndarray] = {}
    for name, module in part.named_modules():
        if len(getattr(module, "lora_A", ())):
            (adapter,) = module.lora_A
            A = module.lora_A[adapter].weight.double().flatten(1)
            B = module.lora_B[adapter].weight.double().flatten(1)
            updates[name] = (B @ A * module.scaling[adapter]).detach().numpy()
    return updates


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    return {
        f"{model.part}.{name}": tuple(module.weight.shape)
        for name, module in model.create().named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    }


def assert_same(
    updates: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float
) -> None:
    assert updates.keys() == expected.keys()
    scale = max(np.abs(update).max() for update in expected.values())
    for name, update in updates.items():
        assert np.abs(update - expected[name]).max() < tolerance * scale, name


def test_the_table_of_families_has_the_loaders_of_diffusers() -> None:
    loaders = {name for name in dir(lora_pipeline) if name.endswith("LoraLoaderMixin")}
    families = read("research/families.json")
    assert loaders == {name for family in families for name in family["diffusers"]}
    assert {family["model"] for family in families} - {None} == {m.name for m in load_models()}


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_reads_what_was_converted_to_kohya_and_back(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    source, kohya, output = (tmp_path / f"{stem}.safetensors" for stem in ("source", "kohya", "o"))
    save_random_lora(source, shapes_of(model), has_alpha=False)
    export(source, kohya, key_format="kohya")
    export(kohya, output, key_format="diffusers")
    expected = load_updates(model, source)
    assert len(expected) > 10
    assert_same(load_updates(model, output), expected, tolerance=1e-6)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.read_prefix])
def test_diffusers_reads_the_keys_of_kohya(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    stems = ("source", "all", "kohya", "converted")
    source, all_layers, kohya, converted = (tmp_path / f"{stem}.safetensors" for stem in stems)
    save_random_lora(source, shapes_of(model), has_alpha=False)
    export(source, all_layers, key_format="kohya")
    tensors = load_file(all_layers)
    save_file({key: tensors[key] for key in tensors if key.startswith(model.read_prefix)}, kohya)
    export(kohya, converted, key_format="diffusers")
    expected = load_updates(model, converted)
    assert len(expected) > 10
    assert_same(load_updates(model, kohya), expected, tolerance=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_reads_the_sum_of_files_in_two_formats(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    stems = ("first", "second", "kohya", "sum")
    first, second, kohya, total = (tmp_path / f"{stem}.safetensors" for stem in stems)
    save_random_lora(first, shapes_of(model), has_alpha=False)
    save_random_lora(second, shapes_of(model), has_alpha=False, seed=1)
    export(second, kohya, key_format="kohya")
    combine([first, kohya], total, [0.8, -0.5], rank=8)
    second_updates = load_updates(model, second)
    expected = {
        layer: 0.8 * update - 0.5 * second_updates[layer]
        for layer, update in load_updates(model, first).items()
    }
    assert_same(load_updates(model, total), expected, tolerance=1e-5)
