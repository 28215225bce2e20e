"""`info`: its sizes and errors are those of the outputs that `export` writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.loras import random_lora
from helpers.models import tiny_llama, tiny_mixtral
from helpers.plain_peft import plain_adapter
from helpers.single_files import save_pairs
from safetensors.torch import load_file, save_file

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError, Nesting, export, info, info_folder, reorder

R = 8
EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}


def save_plain(path: Path, base: Any = None, **options: Any) -> Path:
    plain_adapter(path, base, r=R, **options)
    return path


def save_nested(path: Path) -> Path:
    reorder(save_plain(path.with_name("plain")), path)
    return path


def save_nested_as(path: Path, **fields: Any) -> Path:
    """Save an adapter whose factors count as ordered in some way."""
    lora = ml.open(save_plain(path.with_name("plain")))
    nesting = Nesting((1, 4, R), "sqrt", 0.5)
    lora = replace(lora, nesting=nesting, **fields)
    lora.nested().save(path)
    return path


def save_single_file(path: Path) -> Path:
    torch.manual_seed(0)
    file = path.with_suffix(".safetensors")
    save_pairs(file, "unet.a", "unet.b")
    return file


KINDS: dict[str, Callable[[Path], Path]] = {
    "plain": save_plain,
    "nested": save_nested,
    "said to be ordered": lambda path: save_nested_as(path, order="svd"),
    "paper": lambda path: save_nested_as(path, deploy="paper"),
    "experts": lambda path: save_plain(path, tiny_mixtral(), **EXPERTS),
    "modules_to_save": lambda path: save_plain(path, modules_to_save=["lm_head"]),
    "ranks by layer": lambda path: save_plain(path, rank_pattern={"q_proj": 2}),
    "single file": save_single_file,
}


ORDERS = {"nested": "svd", "said to be ordered": "svd"}


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_errors_are_those_of_the_exports(tmp_path: Path, kind: str) -> None:
    source = KINDS[kind](tmp_path / "adapter")
    result = info(source)
    lora = result.lora
    assert lora.name == str(source)
    assert result.sizes.keys() == set(lora.nested_ranks)
    assert list(result.errors) == list(lora.available_ranks)
    assert lora.order == ORDERS.get(kind)
    for rank in lora.nested_ranks:
        exported = export(source, tmp_path / f"rank-{rank}{source.suffix}", rank)
        assert result.sizes[rank] == exported.size_after
        (error,) = exported.errors.values()
        assert result.errors[rank] == pytest.approx(error, abs=1e-6)
    assert result.errors[lora.max_rank] < 1e-6 < result.errors[1]
    if kind == "modules_to_save":  # they have the same size at every rank
        assert result.sizes[1] > tiny_llama().lm_head.weight.numel() * 4


@pytest.mark.parametrize("kind", ["plain", "nested", "paper", "ranks by layer", "single file"])
def test_layers_are_described_by_the_singular_values_of_their_updates(
    tmp_path: Path, kind: str
) -> None:
    source = KINDS[kind](tmp_path / "adapter")
    result = info(source, layers=True)
    assert result.layers.keys() == {layer.name for layer in result.lora.layers}
    for layer in result.lora.layers:
        A, B, *_ = layer.read()
        values = np.linalg.svd(layer.scale * (B @ A), compute_uv=False)
        kept = np.cumsum(values**2) / np.sum(values**2)
        described = result.layers[layer.name]
        assert described.rank == layer.rank
        assert described.rank_95 == np.argmax(kept >= 0.95) + 1
        assert described.rank_99 == np.argmax(kept >= 0.99) + 1
        assert described.stable_rank == pytest.approx(np.sum(values**2) / values[0] ** 2, rel=1e-5)
        assert described.largest_singular_value == pytest.approx(values[0], rel=1e-5)
    assert info(source).layers == {}


@pytest.mark.parametrize(
    ("metadata", "base_model", "trigger_words"),
    [
        ({}, None, ()),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl_base_v1-0", ()),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux-1-dev/lora", ()),
        ({"modelspec.trigger_phrase": "ohwx man"}, None, ("ohwx man",)),
        (
            {"ss_tag_frequency": '{"5_a": {" cat ": 3, "dog": 1}, "5_b": {"dog": 4}}'},
            None,
            ("dog", "cat"),
        ),
        ({"ss_tag_frequency": "[1]"}, None, ()),
        ({"ss_tag_frequency": "{"}, None, ()),
        ({"ss_tag_frequency": '{"5_a": {"cat": null}}'}, None, ()),
    ],
    ids=str,
)
def test_base_model_and_trigger_words_are_in_the_metadata(
    metadata: dict[str, str], base_model: str | None, trigger_words: Any, tmp_path: Path
) -> None:
    file = save_single_file(tmp_path / "lora")
    save_file(load_file(file), file, metadata)
    result = info(file)
    assert (result.base_model, result.trigger_words) == (base_model, trigger_words)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["lora_unet_a", "lora_unet_b", "lora_te_c"], {"unet": 2, "text_encoder": 1}),
        (["lora_te1_a", "lora_te2_b"], {"text_encoder": 1, "text_encoder_2": 1}),
        (["lora_transformer_a", "lora_te3_b"], {"text_encoder_3": 1, "transformer": 1}),
        (["unet.a", "text_encoder_2.b"], {"text_encoder_2": 1, "unet": 1}),
        (["diffusion_model.blocks.0.q", "other.q"], {"": 1, "diffusion_model": 1}),
        (["lycoris_layers_0_q", "lora_unetwork"], {"": 2}),
    ],
)
def test_layers_are_counted_by_part(names: list[str], parts: dict[str, int]) -> None:
    assert info(random_lora(dict.fromkeys(names, (6, 6)))).parts == parts


def test_a_folder_has_a_rank_at_which_each_lora_keeps_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    for rank in (4, 8):
        plain_adapter(folder / f"lora-{rank}", r=rank)
    save_single_file(folder / "single")
    (folder / "damaged.safetensors").write_bytes(b"x")
    result = info_folder(folder, layers=True)
    assert list(result.loras) == ["lora-4", "lora-8", "single.safetensors"]
    assert list(result.failed) == ["damaged.safetensors"]
    assert all(lora.layers for lora in result.loras.values())
    for max_error in (0.9, 0.6, 0.3):
        rank = result.common_rank(max_error)
        errors = [lora.errors.get(rank, 0.0) for lora in result.loras.values()]
        assert max(errors) <= max_error
        smaller = [lora.errors.get(rank - 1, 0.0) for lora in result.loras.values()]
        assert rank == 1 or max(smaller) > max_error
    for name in ("missing", "loras/lora-4"):
        with pytest.raises(MatryoshkaError, match="no LoRA"):
            info_folder(tmp_path / name)
