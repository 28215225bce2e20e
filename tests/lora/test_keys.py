"""The names of modules: the tables, compared with diffusers, and their recognition."""

from __future__ import annotations

import pytest
from helpers.authors_layouts import layout

from matryoshka_lora.lora.keys import Model, find_models, find_module, load_models
from tools import key_tables

pytest.importorskip("diffusers", reason="diffusers is not installed")

MODELS = {model.name: model for model in load_models()}
SD3, FLUX, QWEN = MODELS["Stable Diffusion 3"], MODELS["Flux"], MODELS["Qwen-Image"]
FLUX_2, HUNYUAN, KREA = MODELS["Flux.2"], MODELS["HunyuanVideo"], MODELS["Krea 2"]
HUNYUAN_15 = MODELS["HunyuanVideo 1.5"]


# --- The tables ---


@pytest.mark.slow
def test_the_script_generates_the_tables() -> None:
    """After a change of its rules, run `python tools/key_tables.py`."""
    assert key_tables.OUTPUT.read_text("utf-8") == key_tables.to_json()


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_has_the_modules_of_the_tables_and_no_other(name: str) -> None:
    assert key_tables.check_diffusers(MODELS[name]) == key_tables.Check()


def test_transformers_has_the_modules_of_text_encoders_and_no_other() -> None:
    assert key_tables.check_text_encoders() == key_tables.Check()


def test_the_check_finds_wrong_names_sizes_and_missing_modules() -> None:
    shapes = {"blocks.0.q": (6, 6), "blocks.0.k": (3, 6), "blocks.1.q": (6, 6), "other": (6, 6)}
    modules = [
        key_tables.fused_qkv("blocks.{}.qk", "blocks.{}", ("q", "k"), num_blocks=1),
        *key_tables.same(["wrong"]),
    ]
    check = key_tables.compare(modules, shapes)
    assert check == key_tables.Check(["wrong"], ["blocks.0.k"], ["blocks.{}.q", "other"])


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_a_name_is_the_name_of_one_module(model: Model) -> None:
    names = [module.authors for module in model.modules]
    for module in model.modules:
        assert len(module.sizes) == len(module.diffusers)
        names += [name for name in module.diffusers if name != module.authors]
    names = [name.replace(".", "_") for name in names]
    assert len(set(names)) == len(names)


# --- Recognition ---


@pytest.mark.parametrize(
    ("layout_name", "model"),
    [
        ("sd15", "Stable Diffusion 1 and 2"),
        ("sdxl", "SDXL"),
        ("sd3", "Stable Diffusion 3"),
        ("flux", "Flux"),
        ("wan", "Wan"),
        ("qwen", "Qwen-Image"),
        ("z-image", "Z-Image"),
    ],
)
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_a_file_of_all_modules_fits_one_model(layout_name: str, model: str, prefix: str) -> None:
    names = list(layout(layout_name))
    if prefix.endswith("_"):
        names = [name.replace(".", "_") for name in names]
    assert find_models([f"{prefix}{name}" for name in names]) == [MODELS[model]]


@pytest.mark.parametrize(
    ("names", "models"),
    [
        (
            ["transformer.transformer_blocks.0.attn.to_q"],
            [SD3, FLUX, QWEN, FLUX_2, HUNYUAN, HUNYUAN_15, KREA],
        ),
        # Flux has 19 of these blocks.
        (
            ["transformer.transformer_blocks.19.attn.to_q"],
            [SD3, QWEN, HUNYUAN, HUNYUAN_15, KREA],
        ),
        (["transformer.transformer_blocks.0.attn.to_gate"], [KREA]),
        (["transformer.transformer_blocks.0.attn.to_q", "lora_te3_text_projection"], [SD3, FLUX]),
        (["lora_unet_double_blocks_0_img_mod_lin", "text_encoder_2.text_projection"], [FLUX]),
        # The image's layers decide if no model has the text encoders.
        (
            ["lora_unet_single_blocks_0_modulation_lin", "text_encoder_3.text_projection"],
            [FLUX, HUNYUAN],
        ),
        (["text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"], [SD3]),
        (["unet.x"], []),
        (["lora_te1_other"], []),
    ],
)
def test_the_models_that_fit(names: list[str], models: list[Model]) -> None:
    assert find_models(names) == models


TO_Q = "double_blocks.{}.img_attn.qkv"


@pytest.mark.parametrize(
    ("name", "authors", "splits", "block", "part"),
    [
        ("transformer.transformer_blocks.3.attn.to_q", TO_Q, (0,), "3", "transformer"),
        ("lora_unet_double_blocks_3_img_attn_qkv", TO_Q, (0, 1, 2), "3", "transformer"),
        # Wan Fun, OneTrainer, SimpleTuner
        ("lora_unet__double_blocks_3_img_attn_qkv", TO_Q, (0, 1, 2), "3", "transformer"),
        ("lora_transformer_transformer_blocks_3_attn_to_k", TO_Q, (1,), "3", "transformer"),
        ("lycoris_transformer_blocks_3_attn_to_v", TO_Q, (2,), "3", "transformer"),
        ("model.diffusion_model.double_blocks.3.img_attn.qkv", TO_Q, (0, 1, 2), "3", "transformer"),
        ("base_model.model.transformer_blocks.3.attn.to_q", TO_Q, (0,), "3", "transformer"),
        # xlabs
        ("double_blocks.3.processor.qkv_lora1", TO_Q, (0, 1, 2), "3", "transformer"),
        # Old names of diffusers
        (
            "transformer.transformer_blocks.3.attn.processor.to_q_lora",
            TO_Q,
            (0,),
            "3",
            "transformer",
        ),
        (
            "text_encoder.text_model.encoder.layers.7.self_attn.to_q_lora",
            "text_model.encoder.layers.{}.self_attn.q_proj",
            (0,),
            "7",
            "text_encoder",
        ),
        # transformers 5
        (
            "text_encoder.encoder.layers.7.mlp.fc1",
            "text_model.encoder.layers.{}.mlp.fc1",
            (0,),
            "7",
            "text_encoder",
        ),
        (
            "text_encoders.t5xxl.transformer.text_projection",
            "text_projection",
            (0,),
            "",
            "text_encoder_2",
        ),
        ("lora_te3_text_projection", "text_projection", (0,), "", "text_encoder_2"),
    ],
)
def test_the_module_of_a_layer(
    name: str, authors: str, splits: tuple[int, ...], block: str, part: str
) -> None:
    target = find_module(name, FLUX)
    assert target is not None
    assert (target.module.authors, target.splits, target.block, target.part) == (
        authors,
        splits,
        block,
        part,
    )


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_double_blocks_19_img_mlp_0",
        # int() has a limit on the number of digits.
        f"lora_unet_double_blocks_{'1' * 5000}_img_mlp_0",
        "lora_te1_other",
        "text_encoder_3.text_projection",
    ],
)
def test_modules_that_flux_does_not_have(name: str) -> None:
    assert find_module(name, FLUX) is None
