"""Converting the keys of single files to the formats of kohya, diffusers and PEFT."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.loras import layer_of, random_lora, single_file, updates
from helpers.single_files import kohya_name

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.linalg.factors import relative_error
from matryoshka_lora.lora.combine import combine
from matryoshka_lora.lora.convert import convert, match_key_formats
from matryoshka_lora.lora.keys import CONFIGS_KEY
from matryoshka_lora.lora.layer import StoredTensor
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.registry import KeyFormat

UNET_MODULES = ("unet.down_blocks.0.attn1.to_q", "unet.mid_block.attn1.to_out.0")
QKV = "diffusion_model.layers.0.attention.qkv"
SPLITS = [f"transformer.layers.0.attention.{name}" for name in ("to_k", "to_q", "to_v")]
FLUX_QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def lora_of(*names: str) -> Lora:
    return random_lora(dict.fromkeys(names, (6, 6)))


def names_of(lora: Lora) -> list[str]:
    return [layer.name for layer in lora.layers]


def assert_same_updates(lora: Lora, expected: dict[str, Any]) -> None:
    actual = updates(lora)
    assert actual.keys() == expected.keys()
    for name, update in expected.items():
        np.testing.assert_allclose(actual[name], update, atol=1e-12)


# --- Renaming ---


def test_kohya_has_the_same_updates() -> None:
    lora = lora_of(*UNET_MODULES)
    converted = convert(lora, "kohya")
    assert_same_updates(converted, {kohya_name(n): u for n, u in updates(lora).items()})
    keys = converted.layers[0].keys
    name = kohya_name(UNET_MODULES[0])
    assert keys == (f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha")


def test_the_same_format_changes_nothing() -> None:
    lora = lora_of(*UNET_MODULES)
    assert convert(lora, "diffusers") == lora
    unknown = random_lora({"lora_unet_a_b": (8, 8), "lora_te_c": (4, 8)}, "kohya", has_alpha=True)
    assert convert(unknown, "kohya") == unknown


def test_a_format_may_choose_alphas_that_are_new() -> None:
    """diffusers needs the same alpha in all layers of a file with alphas."""
    layers = convert(lora_of(*UNET_MODULES), "kohya").layers
    assert all(layer.has_new_factors for layer in layers)
    layers = convert(lora_of(*UNET_MODULES), "peft").layers
    assert not any(layer.has_new_factors for layer in layers)


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
    prefix: str, kohya_prefixes: dict[str, str]
) -> None:
    """transformers removed ``text_model.``, and ComfyUI knows only names that have it."""
    module = f"{prefix}encoder.layers.3.self_attn.q_proj"
    converted = convert(lora_of(*(f"{part}.{module}" for part in kohya_prefixes)), "kohya")
    ending = "text_model_encoder_layers_3_self_attn_q_proj"
    assert names_of(converted) == [f"{prefix}{ending}" for prefix in kohya_prefixes.values()]


@pytest.mark.parametrize("key_format", ["diffusers", "kohya"])
def test_names_with_dots_may_have_the_suffixes_of_kohya(key_format: KeyFormat) -> None:
    shapes = dict.fromkeys(UNET_MODULES, (6, 6))
    lora = random_lora(shapes, keys="kohya", has_alpha=True)
    converted = convert(lora, key_format)
    expected = updates(lora)
    if key_format == "kohya":
        expected = {kohya_name(name): update for name, update in expected.items()}
    assert_same_updates(converted, expected)


@pytest.mark.parametrize("key_format", ["diffusers", "peft"])
@pytest.mark.parametrize("module", ["unet.blocks.0.q", "transformer.blocks.0.q"])
def test_metadata_of_diffusers_does_not_override_alphas(module: str, key_format: KeyFormat) -> None:
    """Programs that read alphas may ignore that metadata."""
    layer = layer_of(module, np.ones((2, 6)), np.ones((6, 2)), "kohya", alpha=1.0)
    metadata = {CONFIGS_KEY: '{"transformer.r": 2}'}
    converted = convert(single_file([layer], metadata=metadata), key_format)
    assert (converted.metadata, converted.layers[0].keys.alpha) == ({}, None)
    np.testing.assert_array_equal([*updates(converted).values()], np.full((1, 6, 6), 1.0))


def test_metadata_without_alphas_is_kept() -> None:
    metadata = {CONFIGS_KEY: '{"unet.r": 2}', "title": "x"}
    lora = replace(lora_of(*UNET_MODULES), metadata=metadata)
    assert convert(lora, "kohya").metadata == metadata


def test_a_peft_folder_has_the_names_of_the_modules_as_targets() -> None:
    lora = random_lora({"transformer.to_q": (6, 6), "transformer.conv": (4, 3, 3, 3)})
    converted = convert(lora, "peft")
    assert converted.container == "peft"
    assert converted.config == {"peft_type": "LORA", "target_modules": ["conv", "to_q"]}
    key = "base_model.model.to_q.lora_A.weight"
    assert (converted.layers[1].keys.A, converted.layers[1].keys.alpha) == (key, None)
    assert converted.layers[0].shape_A[1:] == (3, 3, 3)
    with pytest.raises(MatryoshkaError, match="only single files"):
        convert(converted, "peft")
    with pytest.raises(MatryoshkaError, match="only single files"):
        match_key_formats([converted])


@pytest.mark.parametrize(
    "module", ["blocks.0.attn1.to_q", "layers.0.attention.to_q", "layers.0.attn.to_out.0"]
)
def test_a_folder_becomes_the_file_that_it_was(module: str) -> None:
    """Wan, Z-Image and Lumina 2, whose blocks have the names of other libraries."""
    lora = lora_of(f"transformer.{module}")
    assert names_of(convert(convert(lora, "peft"), "diffusers")) == names_of(lora)


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
        # ComfyUI's names are not diffusers' names.
        (["diffusion_model.a.q"], "diffusers", "not known"),
        (["diffusion_model.a.q"], "peft", "not known"),
        (["transformer.blocks.0.attn1.to_q", "transformer_2.blocks.0.attn1.to_k"], "kohya", "drop"),
    ],
)
def test_a_format_without_a_name_for_a_layer_is_refused(
    modules: list[str], key_format: Any, keyword: str
) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        convert(lora_of(*modules), key_format)


def test_keys_that_cannot_be_renamed_are_refused() -> None:
    lora = lora_of("unet.q")
    with pytest.raises(MatryoshkaError, match="dots"):
        convert(convert(lora, "kohya"), "diffusers")
    other_tensors = {"other": StoredTensor.from_array(np.ones(1))}
    with pytest.raises(MatryoshkaError, match="other"):
        convert(replace(lora, other_tensors=other_tensors), "kohya")


# --- Models with known names ---

BLOCK = "transformer.transformer_blocks.0"
ATTENTION = f"{BLOCK}.attn.to_q"


@pytest.mark.parametrize(
    ("shapes", "key_format", "keyword"),
    [
        ({ATTENTION: (6, 6)}, "kohya", "several models"),
        # Flux and Qwen-Image have this width.
        ({ATTENTION: (3072, 3072)}, "kohya", "several models"),
        ({f"{BLOCK}.attn1.to_q": (3072, 3072)}, "kohya", "Mochi and CogVideoX"),
        ({f"{BLOCK}.attn1.to_q": (2048, 2048)}, "kohya", "LTX-2 and Cosmos-Predict2"),
        ({f"{BLOCK}.attn1.to_q": (1920, 1920)}, "kohya", "cannot name"),
        ({"transformer.layers.0.attn.to_q": (6, 6)}, "kohya", "Lumina Image 2 and OmniGen2"),
        # The first up block of SDXL has three layers, and the one of KOALA two.
        (
            {"lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_q": (640, 640)},
            "diffusers",
            "KOALA and SDXL",
        ),
        # Flux.2 klein has this width, too.
        (
            {FLUX_QKV: (9216, 3072), "lora_unet_time_in_in_layer": (3072, 256)},
            "diffusers",
            "Flux and Flux.2",
        ),
        ({QKV: (12, 6)}, "diffusers", "rows"),
        ({QKV: (18, 6, 1, 1)}, "diffusers", "several models"),
        # Rows of Flux.2, whose MLP has a gate, with a name that only Flux has.
        (
            {
                "lora_unet_double_blocks_0_img_mlp_0": (36, 6),
                "lora_unet_double_blocks_0_img_mod_lin": (36, 6),
            },
            "diffusers",
            "not its shapes",
        ),
        (
            {QKV: (18, 6), "diffusion_model.layers.0.attention.to_q": (6, 6)},
            "diffusers",
            "one module",
        ),
        ({QKV: (18, 6), SPLITS[0]: (6, 6)}, "kohya", "one module"),
        ({SPLITS[0]: (6, 6), SPLITS[1]: (7, 7)}, "kohya", "widths"),
        ({SPLITS[0]: (5, 6)}, "kohya", "rows"),
        (
            {"lora_unet_double_blocks_0_img_mlp_0": (24, 6), "lora_te1_other": (6, 6)},
            "diffusers",
            "lora_te1_other",
        ),
        ({"lora_unet_double_blocks_60_img_mlp_0": (6, 6)}, "kohya", "dots"),
        (
            {"lora_unet_blocks_0_ffn_0": (6, 6), "lora_unet_blocks_0_self_attn_x": (6, 6)},
            "kohya",
            "dots",
        ),
        (
            {
                **{f"diffusion_model.blocks.{block}.ffn.0": (6, 6) for block in range(2)},
                "diffusion_model.face_encoder.out_proj": (6, 6),
            },
            "diffusers",
            r"Wan, and 1 other layer.*face_encoder",
        ),
    ],
)
def test_names_that_do_not_fit_a_model_are_refused(
    shapes: dict[str, tuple[int, ...]], key_format: KeyFormat, keyword: str
) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        convert(random_lora(shapes, keys="kohya"), key_format)


def test_the_width_of_the_inputs_tells_models_with_common_names_apart() -> None:
    converted = convert(random_lora({ATTENTION: (1536, 1536)}), "kohya")
    assert "Stable Diffusion 3" in converted.notes[0]
    (layer,) = converted.layers
    assert layer.name == "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert layer.shape_B == (3 * 1536, 2)


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        # The inputs from the prompt are half as wide in Cosmos-Predict2.
        ({f"{BLOCK}.attn2.to_k": (2048, 2048)}, "transformer_blocks_0_attn2_to_k"),
        ({f"{BLOCK}.attn2.to_k": (2048, 1024)}, "blocks_0_cross_attn_k_proj"),
        # The inputs and the rows of the MLP tell OmniGen2 from Lumina Image 2, also in few blocks.
        ({"transformer.layers.0.attn.to_q": (2520, 2520)}, "layers_0_attn_to_q"),
        ({"transformer.layers.0.attn.to_q": (2304, 2304)}, "layers_0_attention_qkv"),
        (
            {"transformer.layers.0.feed_forward.linear_1": (2048, 504)},
            "layers_0_feed_forward_linear_1",
        ),
        (
            {"transformer.layers.0.feed_forward.linear_1": (2016, 504)},
            "layers_0_feed_forward_w1",
        ),
        # CogVideoX has 42 blocks.
        ({"transformer.transformer_blocks.47.attn1.to_q": (3072, 3072)}, "blocks_47_attn_qkv_x"),
        # The last block of Mochi has another layer for the text.
        (
            {"transformer.transformer_blocks.47.norm1_context.linear_1": (1536, 3072)},
            "blocks_47_mod_y",
        ),
        # Wan 2.2 has two transformers, and ComfyUI a file for each.
        ({"transformer_2.blocks.3.attn1.to_q": (6, 6)}, "blocks_3_self_attn_q"),
        ({"transformer.vace_blocks.0.proj_in": (6, 6)}, "vace_blocks_0_before_proj"),
    ],
)
def test_the_names_in_files_of_newer_models(shapes: dict[str, tuple[int, int]], name: str) -> None:
    assert names_of(convert(random_lora(shapes), "kohya")) == [f"lora_unet_{name}"]


def test_names_of_hunyuan_video_that_comfyui_does_not_read() -> None:
    """musubi and diffusion-pipe write the names of the checkpoint."""
    shapes = {
        "lora_unet_double_blocks_19_img_mlp_fc1": (24, 6),
        "lora_unet_single_blocks_39_modulation_linear": (18, 6),
        "lora_unet_txt_in_individual_token_refiner_blocks_0_self_attn_qkv": (18, 6),
    }
    names = [
        "lora_unet_double_blocks_19_img_mlp_0",
        "lora_unet_single_blocks_39_modulation_lin",
        "lora_unet_txt_in_individual_token_refiner_blocks_0_self_attn_qkv",
    ]
    assert names_of(convert(random_lora(shapes, keys="kohya"), "kohya")) == names
    diffusion_pipe = random_lora({"transformer.single_blocks.39.modulation.linear": (18, 6)})
    assert names_of(convert(diffusion_pipe, "kohya")) == [names[1]]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("double_blocks.0.img_mlp.0", (24, 6), ["transformer_blocks.0.ff.net.0.proj"]),
        ("double_blocks.0.img_mlp.0", (36, 6), ["transformer_blocks.0.ff.linear_in"]),
        ("single_blocks.3.linear1", (54, 6), ["single_transformer_blocks.3.attn.to_qkv_mlp_proj"]),
        ("single_blocks.3.linear2", (6, 24), ["single_transformer_blocks.3.attn.to_out"]),
        ("layers.0.feed_forward.w1", (16, 6), ["layers.0.feed_forward.w1"]),
        ("layers.0.feed_forward.w1", (24, 6), ["layers.0.feed_forward.linear_1"]),
        (
            "layers.0.attention.qkv",
            (10, 6),
            [f"layers.0.attn.{name}" for name in ("to_k", "to_q", "to_v")],
        ),
        (
            "distilled_guidance_layer.layers.0.in_layer",
            (6, 6),
            ["distilled_guidance_layer.layers.0.linear_1"],
        ),
    ],
)
def test_the_rows_tell_models_with_the_same_names_apart(
    name: str, shape: tuple[int, int], expected: list[str]
) -> None:
    """A file of a single layer: Flux and Flux.2, Z-Image and Lumina Image 2, and Chroma."""
    converted = convert(random_lora({f"diffusion_model.{name}": shape}), "diffusers")
    assert names_of(converted) == [f"transformer.{name}" for name in expected]


def test_the_model_does_not_matter_where_its_names_stay() -> None:
    folder = convert(random_lora({ATTENTION: (6, 6)}), "peft")
    assert names_of(folder) == [ATTENTION.removeprefix("transformer.")]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_splits_keep_their_dtype_and_bits(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    A = rng.standard_normal((4, 6)).astype(dtype)
    B = rng.standard_normal((18, 4)).astype(dtype)
    converted = convert(single_file([layer_of(QKV, A, B)]), "diffusers")
    rows = {"to_q": B[:6], "to_k": B[6:12], "to_v": B[12:]}
    assert names_of(converted) == SPLITS
    for layer in converted.layers:
        factors = layer.read()
        assert (layer.dtype, layer.out_features) == (dtype, 6)
        np.testing.assert_array_equal(factors.A, A)
        np.testing.assert_array_equal(factors.B, rows[layer.name.rpartition(".")[2]])


def test_a_fused_layer_without_an_update_keeps_its_splits() -> None:
    layer = layer_of(QKV, np.ones((4, 6)), np.zeros((18, 4)))
    converted = convert(single_file([layer]), "diffusers")
    assert (names_of(converted), converted.max_rank) == (SPLITS, 4)


def test_splits_need_only_their_own_components() -> None:
    B = np.zeros((18, 3))
    B[:6, 0] = B[6:12, 1] = B[6:12, 2] = 1.0
    lora = single_file([layer_of(QKV, np.random.default_rng(0).standard_normal((3, 6)), B)])
    converted = convert(lora, "diffusers")
    assert converted.ranks == {SPLITS[0]: 2, SPLITS[1]: 1}  # to_v has no update
    dense = updates(lora)[QKV]
    assert_same_updates(converted, {SPLITS[0]: dense[6:12], SPLITS[1]: dense[:6]})


@pytest.mark.parametrize("has_common_A", [False, True])
def test_layers_of_different_scales_are_fused(has_common_A: bool) -> None:
    rng = np.random.default_rng(0)
    A = rng.standard_normal((2, 6))
    layers = [
        layer_of(
            name, A if has_common_A else A + number, rng.standard_normal((6, 2)), "kohya", alpha
        )
        for number, (name, alpha) in enumerate(zip(SPLITS, (1.0, 2.0, 6.0), strict=True))
    ]
    lora = single_file(layers)
    converted = convert(lora, "kohya")
    (layer,) = converted.layers
    assert layer.rank == (2 if has_common_A else 6)
    to_k, to_q, to_v = updates(lora).values()
    assert_same_updates(converted, {layer.name: np.concatenate([to_q, to_k, to_v])})


def test_the_dtype_of_a_fused_layer_represents_all_splits() -> None:
    factors = np.ones((2, 6)), np.ones((6, 2))
    dtypes = (np.float16, ml_dtypes.bfloat16)
    layers = [
        layer_of(name, *(factor.astype(dtype) for factor in factors))
        for name, dtype in zip(SPLITS, dtypes, strict=False)
    ]
    assert convert(single_file(layers), "kohya").layers[0].dtype == np.float32


def test_factors_that_are_not_finite_are_refused_where_the_ranks_depend_on_them() -> None:
    lora = single_file([layer_of(QKV, np.ones((2, 6)), np.full((18, 2), np.nan))])
    with pytest.raises(NotFiniteError):
        convert(lora, "diffusers")
    convert(lora, "kohya")


# --- Order and errors of a LoRA that was truncated before ---


def test_only_renamed_layers_keep_their_order() -> None:
    names = ["lora_unet_double_blocks_0_img_mlp_0", "lora_unet_single_blocks_0_modulation_lin"]
    shapes_by_name = {names[0]: (24, 6), names[1]: (18, 6)}
    renamed = random_lora(shapes_by_name, keys="kohya", has_alpha=True).truncate(2)
    assert convert(renamed, "diffusers").order == "svd"
    for shapes in ({FLUX_QKV: (18, 6)}, {"lora_unet_final_layer_adaLN_modulation_1": (12, 6)}):
        lora = random_lora({**shapes_by_name, **shapes}, keys="kohya").truncate(2)
        assert convert(lora, "diffusers").order is None


@pytest.mark.parametrize("key_format", ["diffusers", "kohya"])
def test_the_error_of_a_truncation_stays_the_same(key_format: KeyFormat) -> None:
    if key_format == "diffusers":
        shapes = {FLUX_QKV: (18, 6), "lora_unet_double_blocks_0_img_mlp_0": (24, 6)}
    else:
        shapes = dict.fromkeys(SPLITS, (6, 6))
    truncated = random_lora(shapes, keys="kohya", has_alpha=True).truncate(1)
    converted = convert(truncated, key_format)
    errors = []
    for lora in (truncated, converted):
        squared_errors = {layer.name: layer.read().squared_errors for layer in lora.layers}
        errors.append(relative_error(squared_errors, lora.ranks))
    assert errors[0] > 0.1
    assert errors[1] == pytest.approx(errors[0], rel=1e-9)


def test_layers_that_were_not_truncated_have_no_error() -> None:
    rng = np.random.default_rng(0)
    layers = [
        layer_of(name, rng.standard_normal((rank, 6)), rng.standard_normal((6, rank)))
        for name, rank in zip(SPLITS, (2, 1, 1), strict=True)
    ]
    truncated = single_file(layers).truncate(1)
    layers = [truncated.layers[0], *layers[1:]]
    squared_error = truncated.layers[0].read().squared_errors[1]
    (fused,) = convert(single_file(layers), "kohya").layers
    errors = fused.read().squared_errors
    norm = sum(np.linalg.norm(update) ** 2 for update in updates(single_file(layers)).values())
    np.testing.assert_allclose(errors[3], squared_error)
    np.testing.assert_allclose(errors[0], norm + squared_error)


# --- Files in several formats ---


def test_lora_files_of_one_format_stay_as_they_are() -> None:
    loras = [lora_of(*SPLITS), lora_of(SPLITS[0])]
    assert match_key_formats(loras) == loras


def test_all_get_the_names_of_the_first() -> None:
    diffusers = random_lora(dict.fromkeys(SPLITS, (6, 6)))
    kohya = random_lora({"lora_unet_layers_0_attention_qkv": (18, 6)}, "kohya", has_alpha=True)
    matched = match_key_formats([diffusers, kohya])
    assert matched[0] == diffusers
    assert names_of(matched[1]) == SPLITS
    # Some programs ignore the scales in diffusers' metadata.
    assert {layer.scale for layer in matched[1].layers} == {1.0}
    to_q, to_k, to_v = np.split(next(iter(updates(kohya).values())), 3)
    assert_same_updates(matched[1], dict(zip(SPLITS, (to_k, to_q, to_v), strict=True)))

    matched = match_key_formats([kohya, diffusers])
    assert matched[0] == kohya
    assert names_of(matched[1]) == names_of(kohya)
    assert matched[1].layers[0].keys.alpha == f"{names_of(kohya)[0]}.alpha"


def test_old_names_become_names_of_diffusers() -> None:
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    old = random_lora({f"{block}.processor.to_q_lora": (6, 6)}, "down and up")
    new = random_lora({f"{block}.to_q": (6, 6)})
    for matched in (match_key_formats([old, new]), match_key_formats([new, old])):
        assert [names_of(lora) for lora in matched] == [[f"{block}.to_q"]] * 2


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def with_tensors(lora: Lora, *keys: str) -> Lora:
    """Return a LoRA with the changes of some weights."""
    tensors = {key: StoredTensor.from_array(np.ones(6, np.float32)) for key in keys}
    return replace(lora, other_tensors=tensors)


def test_changes_of_weights_get_the_names_of_the_first() -> None:
    kohya = kohya_name(f"unet.{BLOCK}.attn1.to_q")
    first = random_lora({kohya: (6, 6)}, "kohya", has_alpha=True)
    to_k, other = f"unet.{BLOCK}.attn1.to_k", f"unet.{BLOCK}.attn1.to_out.0"
    second = random_lora({f"unet.{BLOCK}.attn1.to_q": (6, 6)})
    second = with_tensors(second, f"{to_k}.diff", f"{other}.diff_b")
    unknown = f"{kohya}_any.w_norm"  # of the first, whose names stay
    matched = match_key_formats([with_tensors(first, unknown), second])
    assert matched[0].other_tensors.keys() == {unknown}
    assert matched[1].other_tensors.keys() == {
        f"{kohya_name(to_k)}.diff",
        f"{kohya_name(other)}.diff_b",
    }
    total = combine(matched, [1, 1])
    assert total.other_tensors.keys() == {unknown, *matched[1].other_tensors}
    conflict = with_tensors(second, f"unet.{BLOCK}.attn1.to_q.diff")
    with pytest.raises(MatryoshkaError, match=r"factors and diff"):
        combine([first, conflict], [1, 1])


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        ([f"unet.{BLOCK}.attn1.to_q"], [kohya_name(f"unet.{BLOCK}.attn1.to_q")], "norm.w_norm"),
        (["lora_unet_layers_0_attention_qkv"], SPLITS, f"{SPLITS[0]}.diff"),
        (SPLITS, ["lora_unet_layers_0_attention_qkv"], "lora_unet_layers_0_attention_qkv.diff_b"),
    ],
    ids=["unknown", "fused", "split"],
)
def test_changes_that_cannot_be_renamed_are_refused(
    first: list[str], second: list[str], key: str
) -> None:
    loras = [
        random_lora({name: (18 if "qkv" in name else 6, 6) for name in names})
        for names in (first, second)
    ]
    match_key_formats(loras)
    with pytest.raises(MatryoshkaError, match=re.escape(key)):
        match_key_formats([loras[0], with_tensors(loras[1], key)])


@pytest.mark.parametrize(
    ("first", "second", "keyword"),
    [
        (["lora_unet_double_blocks_0_img_mlp_0"], ["lora_unet_blocks_0_ffn_0"], "different models"),
        (["unet.a.q"], ["lora_unet_a_q"], "key_format"),
        (["a.q"], ["b.q"], "key_format"),
        (["diffusion_model.blocks.0.x"], ["transformer.blocks.0.x"], "key_format"),
        # Kohya's names do not say which transformer they are for.
        (["lora_unet_blocks_0_ffn_0"], ["transformer_2.blocks.0.ffn.net.0.proj"], "transformer_2"),
    ],
)
def test_files_that_do_not_match_are_refused(
    first: list[str], second: list[str], keyword: str
) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        match_key_formats([lora_of(*first), lora_of(*second)])
