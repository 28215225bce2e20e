"""A LoRA as a value: its ranks, what it may overwrite, and a pipeline of verbs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.layers import SCALE, R, factors_of, make_layer, make_lora, update_of
from helpers.single_files import read_updates, save_random_lora
from safetensors.torch import load_file

import matryoshka_lora as ml
from matryoshka_lora import Lora, MatryoshkaError, Nesting, NotFiniteError

PAPER = {"nesting": Nesting((1, 2, R), scale=SCALE), "deploy": "paper"}


@pytest.mark.parametrize(
    ("fields", "ranks", "available_ranks"),
    [
        ({}, (1, 2, 4, R), range(1, R + 1)),
        ({"nesting": Nesting((2, R), scale=SCALE)}, (2, R), range(1, R + 1)),
        (PAPER, (1, 2, R), (1, 2, R)),
    ],
    ids=["plain", "nested", "paper"],
)
def test_available_ranks(
    fields: dict[str, Any], ranks: tuple[int, ...], available_ranks: Any
) -> None:
    lora = make_lora(make_layer(), **fields)
    assert (lora.max_rank, lora.ranks) == (R, {"a": R})
    assert lora.nested_ranks == lora.check_ranks(None) == ranks
    for rank in range(-1, R + 3):
        if rank in available_ranks:
            assert lora.check_ranks([rank]) == (lora.check_rank(rank),) == (rank,)
            assert lora.at_rank(np.int64(rank)).max_rank == rank  # type: ignore[arg-type]
        else:
            for action in (lora.check_rank, lora.truncate, lambda rank: lora.check_ranks([rank])):
                with pytest.raises(MatryoshkaError, match="rank"):
                    action(rank)


@pytest.mark.parametrize(
    "ranks", [[], [2, 1], [1, 1], [1, 7], ["2"], [2.5], [2.0], [True], [None]], ids=str
)
def test_ranks_that_are_not_available_are_rejected(ranks: Any) -> None:
    lora = make_lora(make_layer())
    with pytest.raises(MatryoshkaError, match="rank"):
        lora.check_ranks(ranks)
    if len(ranks) == 1 and not isinstance(ranks[0], int):
        with pytest.raises(MatryoshkaError, match="integer"):
            lora.check_rank(ranks[0])


def test_a_value_does_not_change() -> None:
    lora = make_lora(make_layer("model.a"), make_layer("model.bb"))
    before = [update_of(layer) for layer in lora.layers]
    lora.drop("*.bb").scale({"*": 2.0}).truncate(2).cast("bf16")
    assert [layer.name for layer in lora.layers] == ["model.a", "model.bb"]
    for layer, expected in zip(lora.layers, before, strict=True):
        np.testing.assert_array_equal(update_of(layer), expected)
    assert "2 layers" in repr(lora)


# A pipeline of verbs

SHAPES: dict[str, tuple[int, ...]] = {
    "lora_unet_double_blocks_0_img_attn_qkv": (24, 8),
    "lora_unet_double_blocks_0_img_attn_proj": (8, 8),
    "lora_unet_single_blocks_0_linear2": (8, 40),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (12, 8),
}


@pytest.mark.parametrize("options", [{"rank": 1}, {"error": "60%"}], ids=str)
def test_a_pipeline_is_export_and_the_dense_oracle(tmp_path: Path, options: Any) -> None:
    """Every verb but `pad`: each layer is the best matrix of its rank, of the scaled update."""
    source = tmp_path / "flux.safetensors"
    save_random_lora(source, SHAPES, has_alpha=True)
    factors = {"*linear2": -0.5, "*": 2.0}
    factors = dict(reversed(factors.items()))  # the last pattern counts
    lora = ml.open(source).drop("lora_te*").scale(factors).cast("bf16").convert("diffusers")
    result = lora.truncate(**options).save(tmp_path / "pipeline.safetensors")
    exported = ml.export(
        source,
        tmp_path / "export.safetensors",
        drop=["lora_te*"],
        scale=factors,
        dtype="bf16",
        key_format="diffusers",
        **options,
    )
    assert (result.ranks, result.errors, result.size) == (
        exported.ranks,
        exported.errors,
        exported.size_after,
    )
    pipeline, expected = load_file(result.path), load_file(exported.path)
    assert pipeline.keys() == expected.keys()
    assert {tensor.dtype for tensor in pipeline.values()} == {torch.bfloat16}
    for key, tensor in pipeline.items():
        assert torch.equal(tensor, expected[key])

    # The rows of Flux's fused queries, keys and values are three layers in diffusers.
    dense = read_updates(source)
    qkv = np.split(2.0 * dense["lora_unet_double_blocks_0_img_attn_qkv"], 3)
    block = "transformer.transformer_blocks.0.attn"
    sources = {f"{block}.to_{name}": rows for name, rows in zip("qkv", qkv, strict=True)}
    sources[f"{block}.to_out.0"] = 2.0 * dense["lora_unet_double_blocks_0_img_attn_proj"]
    sources["transformer.single_transformer_blocks.0.proj_out"] = (
        -0.5 * dense["lora_unet_single_blocks_0_linear2"]
    )
    written = read_updates(result.path)
    assert written.keys() == sources.keys()
    missing = total = 0.0
    for name, update in sources.items():
        best_error = float(oracle.best_errors(torch.from_numpy(update))[result.ranks[name]])
        error = float(np.linalg.norm(written[name] - update))
        assert error == pytest.approx(best_error, abs=1e-2 * np.linalg.norm(update))
        missing += best_error**2
        total += float(np.sum(update**2))
    assert result.errors[max(result.ranks.values())] == pytest.approx(
        (missing / total) ** 0.5, abs=1e-6
    )


def rescaled(lora: Lora) -> Lora:
    return lora.scale({"lora_te*": 0.1, "*linear2": -3.0})


CHAINS: dict[str, Callable[[Lora], Lora]] = {
    "twice": lambda lora: lora.truncate(2).truncate(1),
    "nested before": lambda lora: lora.reorder().truncate(1),
    "scaled after": lambda lora: rescaled(lora.truncate(1)),
    "scaled before": lambda lora: rescaled(lora).truncate(1),
    "cast after": lambda lora: lora.truncate(1).cast("fp32"),
    "padded after": lambda lora: lora.truncate(1).pad(4),
    "padded and cut": lambda lora: lora.truncate(1).pad(4).truncate(1),
    "reordered after": lambda lora: lora.truncate(1).reorder(),
    "dropped after": lambda lora: lora.truncate(1).drop("*qkv"),
    "converted after": lambda lora: lora.truncate(1).convert("diffusers"),
    "all": lambda lora: rescaled(lora.truncate(2).drop("*qkv")).convert("diffusers").truncate(1),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_the_error_of_a_chain_is_relative_to_the_first_update(tmp_path: Path, chain: str) -> None:
    source = tmp_path / "flux.safetensors"
    save_random_lora(source, SHAPES, has_alpha=True)
    result = CHAINS[chain](ml.open(source)).save(tmp_path / "output.safetensors")
    missing = total = 0.0
    for name, update in read_updates(source).items():
        if ("drop" in chain or chain == "all") and "qkv" in name:
            continue
        factor = 1.0
        if "scaled" in chain or chain == "all":
            factor = 0.1 if "te1" in name else -3.0 if "linear2" in name else 1.0
        best_error = float(oracle.best_errors(torch.from_numpy(update))[1])
        missing += (factor * best_error) ** 2
        total += float(np.sum((factor * update) ** 2))
    assert result.errors == {
        max(result.ranks.values()): pytest.approx((missing / total) ** 0.5, rel=1e-6)
    }


def test_a_nested_adapter_stays_nested(tmp_path: Path) -> None:
    """Through drop, scale and cast. The errors are those of the prefixes as they are."""
    layers = [make_layer(name) for name in ("model.a", "model.bb", "model.ccc")]
    nesting = Nesting((1, 3, R), scale=SCALE)
    lora = make_lora(*layers, nesting=nesting, order="svd")
    changed = lora.drop("*.bb").scale({"*.a": 0.5, "*.ccc": 3}).cast("bf16")
    assert (changed.nesting, changed.order) == (nesting, "svd")
    result = changed.save(tmp_path / "nested")
    assert [*result.errors] == [1, 3, R]
    reopened = ml.open(tmp_path / "nested")
    assert (reopened.nesting, reopened.order) == (nesting, "svd")
    for rank in (1, 3, R):
        missing = total = 0.0
        for layer, factor in ((layers[0], 0.5), (layers[2], 3.0)):
            A, B = factors_of(layer)
            update = factor * update_of(layer)
            missing += np.sum((update - factor * SCALE * B[:, :rank] @ A[:rank]) ** 2)
            total += np.sum(update**2)
        expected = (missing / total) ** 0.5
        assert result.errors[rank] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        written = ml.info(reopened).errors[rank]  # of the factors in bf16
        assert written == pytest.approx(expected, abs=1e-2)


def test_padding_ends_a_nesting() -> None:
    lora = make_lora(make_layer(), nesting=Nesting((1, R), scale=SCALE), order="svd")
    padded = lora.pad(R + 2)
    assert (padded.nesting, padded.order, padded.max_rank) == (None, None, R + 2)


def test_factors_that_are_too_large_for_their_dtype_are_not_written(tmp_path: Path) -> None:
    lora = make_lora(make_layer(size=1e12)).cast("fp16").scale({"a": 1e30})
    with pytest.raises(NotFiniteError, match="float16"):
        lora.save(tmp_path / "output")
    assert not (tmp_path / "output").exists()
    scaled = make_lora(make_layer(scale=1e12, dtype=np.float16))
    assert scaled.truncate(2).new_scale > 1e11  # fp16 can represent the factors then
    scaled.truncate(2).save(tmp_path / "output")


def test_a_function_of_factors_ends_the_order() -> None:
    lora = make_lora(make_layer("a"), nesting=Nesting((1, R), scale=SCALE), order="svd")
    reversed_components = lora.map(lambda factors: ml.Factors(factors.A[::-1], factors.B[:, ::-1]))
    assert (reversed_components.nesting, reversed_components.order) == (None, None)
    errors = replace(lora, nesting=None, order=None).squared_errors()["a"]
    np.testing.assert_allclose(reversed_components.squared_errors()["a"], errors, rtol=1e-6)


def test_ranks_are_for_a_ladder(tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="ladder"):
        make_lora(make_layer("a")).save(tmp_path / "x", ranks=[1])
