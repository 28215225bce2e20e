"""A small adapter of the low ranks: they are its prefixes, and larger ranks are as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import NestedLayer, nested_layer, nested_llama, tiny_llama
from helpers.oracle import KINDS
from helpers.small_adapter import add_small_adapter
from peft import PeftModel
from torch import Tensor

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, load
from matryoshka_lora.training.factors import FactorMatrices

NESTING = Nesting((1, 2, 4, 8), "none", 0.7)
SMALL_RANK = 3
TOKENS = torch.arange(3, 60)[None]


def adapter_with_small(seed: int = 0) -> NestedAdapter:
    adapter = nested_llama(NESTING, "lora", seed=seed)
    adapter.reorder()
    add_small_adapter(adapter, SMALL_RANK)
    return adapter


@torch.no_grad()
def logits_at(adapter: NestedAdapter, rank: int) -> Tensor:
    adapter.set_rank(rank)
    logits: Tensor = adapter.model(input_ids=TOKENS).logits
    return logits


@torch.no_grad()
def plain_logits(folder: Path, **options: Any) -> Tensor:
    """The logits of PEFT alone."""
    model = PeftModel.from_pretrained(tiny_llama(), folder, **options).eval()
    logits: Tensor = model(input_ids=TOKENS).logits
    return logits


def expected(layer: NestedLayer, small: FactorMatrices, rank: int, x: Tensor) -> Tensor:
    """The oracle's output of a layer at a rank."""
    ((A, B),) = small.values()
    main_A, main_B = layer.factors
    if rank > SMALL_RANK:
        p = (torch.arange(8) < rank) * NESTING.scale
        return layer.kind.forward(layer.layer.get_base_layer(), main_A, main_B, p, x)
    p = (torch.arange(SMALL_RANK) < rank) * NESTING.scale
    return layer.kind.forward(layer.layer.get_base_layer(), A, B, p, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["forward", "merge", "rows"])
@torch.no_grad()
def test_low_ranks_are_prefixes_of_the_small_adapter(kind: str, way: str) -> None:
    """In the forward, merged into the weight, and in batches that mix both adapters."""
    layer = nested_layer(kind, NESTING, "lora")
    adapter = layer.adapter
    adapter.reorder()
    small = add_small_adapter(adapter, SMALL_RANK)
    x = layer.kind.batch(9)
    adapter.model.eval()
    if way == "rows":
        if kind == "Linear-2d-input":
            pytest.skip("inputs without a dimension of tokens have no rows")
        ranks = [0, 2, 8, 3, 1, 4, 2, 8, 0]
        with adapter.rows(ranks):
            actual = adapter.model(x)
        rows = [expected(layer, small, rank, x[j : j + 1]) for j, rank in enumerate(ranks)]
        torch.testing.assert_close(actual, torch.cat(rows))
        return
    for rank in range(9):
        adapter.set_rank(rank)
        outputs = expected(layer, small, rank, x)
        if way == "merge":
            adapter.model.merge_adapter()
        torch.testing.assert_close(adapter.model(x), outputs)
        if way == "merge":
            adapter.model.unmerge_adapter()


def test_a_batch_may_mix_ranks_of_both_adapters() -> None:
    """The fused operation and PEFT's own formula agree, and generate() has a rank for each row."""
    adapter = adapter_with_small()
    ranks = [1, 8, 3, 0, 4, 2]
    with torch.no_grad(), adapter.rows(ranks):
        actual = adapter.model(input_ids=TOKENS.repeat(6, 1)).logits
        generated = adapter.model.generate(
            input_ids=TOKENS[:, :5].repeat(6, 1), max_new_tokens=8, do_sample=False
        )
    for row, rank in enumerate(ranks):
        expected = logits_at(adapter, rank)
        torch.testing.assert_close(actual[row : row + 1], expected, rtol=0, atol=1e-4)
        alone = adapter.model.generate(input_ids=TOKENS[:, :5], max_new_tokens=8, do_sample=False)
        width = alone.shape[1]
        assert torch.equal(generated[row, :width], alone[0])


def test_a_saved_adapter_has_the_same_ranks(tmp_path: Path) -> None:
    """PEFT alone reads rank R, and the small adapter as a subfolder; R is as before to the bit."""
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    before = {rank: logits_at(adapter, rank) for rank in range(SMALL_RANK + 1, 9)}
    add_small_adapter(adapter, SMALL_RANK)
    for rank, logits in before.items():
        assert torch.equal(logits_at(adapter, rank), logits)
    adapter.save(tmp_path / "nested")
    assert torch.equal(plain_logits(tmp_path / "nested"), before[8])
    torch.testing.assert_close(
        plain_logits(tmp_path / "nested", subfolder="small"), logits_at(adapter, SMALL_RANK)
    )
    loaded = load(tiny_llama(), tmp_path / "nested")
    assert (loaded.small_rank, loaded.order, loaded.ranks) == (SMALL_RANK, "svd", adapter.ranks)
    assert f"up to {SMALL_RANK} trained" in repr(loaded)
    for rank in range(9):
        assert torch.equal(logits_at(loaded, rank), logits_at(adapter, rank))
    loaded.save(tmp_path / "again")
    for name in ("adapter_model.safetensors", "small/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "nested" / name).read_bytes()


@pytest.mark.parametrize("rank", [1, 2, SMALL_RANK, SMALL_RANK + 1, 8])
def test_an_exported_rank_is_the_rank_that_was_set(tmp_path: Path, rank: int) -> None:
    """From memory, from the folder, and as a step of a ladder."""
    adapter = adapter_with_small()
    adapter.save(tmp_path / "nested")
    adapter.export(tmp_path / "from-memory", rank)
    ml.export(tmp_path / "nested", tmp_path / "from-folder", rank)
    ml.export(tmp_path / "nested", tmp_path / "ladder", [rank], "ladder")
    for folder in ("from-memory", "from-folder", f"ladder/nested@{rank}"):
        torch.testing.assert_close(plain_logits(tmp_path / folder), logits_at(adapter, rank))


def train_further(adapter: NestedAdapter) -> None:
    adapter.model.train()
    parameters = [factor for pair in adapter.layer_factors().values() for factor in pair]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    adapter.model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:.*changed since its ranks were trained")
@pytest.mark.parametrize("change", [train_further, NestedAdapter.reorder])
def test_the_small_adapter_is_left_out_once_the_factors_change(
    tmp_path: Path, change: Callable[[NestedAdapter], Any]
) -> None:
    adapter = adapter_with_small()
    change(adapter)
    assert adapter.small_rank == 0
    adapter.save(tmp_path / "nested")
    assert not (tmp_path / "nested" / "small").exists()
    assert ml.open(tmp_path / "nested").small is None


def test_a_change_after_the_training_of_ranks_is_a_warning(tmp_path: Path) -> None:
    adapter = adapter_with_small()
    adapter.set_rank(2)
    train_further(adapter)
    with pytest.raises(MatryoshkaError, match="changed"):
        adapter.model.eval()(input_ids=TOKENS)
    with pytest.warns(UserWarning, match="Train them again"):
        adapter.save(tmp_path / "nested")


def test_the_small_adapter_follows_the_model_to_another_dtype() -> None:
    adapter = adapter_with_small()
    expected = logits_at(adapter, 2).double()
    other = NestedAdapter(copy.deepcopy(adapter.model).double())
    torch.testing.assert_close(logits_at(other, 2), expected, rtol=1e-3, atol=1e-3)


def test_the_state_dict_of_peft_is_plain_lora() -> None:
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    keys = set(adapter.model.state_dict())
    add_small_adapter(adapter, SMALL_RANK)
    assert set(adapter.model.state_dict()) == keys


def test_peft_converts_only_rank_R() -> None:
    """PEFT's conversion to LoRA reads A and B, which are those of rank R."""
    adapter = adapter_with_small()
    (variant, *_) = [layer.lora_variant["default"] for layer in adapter.layers.values()]
    for rank in (1, SMALL_RANK, 4, 8):
        adapter.set_rank(rank)
        assert variant.supports_lora_conversion() == (rank == 8)


# LoRAs in files


def delta(layer: Any) -> Any:
    A, B, *_ = layer.read()
    return layer.scale * B.astype(np.float64) @ A.astype(np.float64)


@pytest.mark.parametrize("rank", [1, 2, SMALL_RANK])
def test_errors_of_low_ranks_are_relative_to_the_whole_adapter(tmp_path: Path, rank: int) -> None:
    adapter_with_small().save(tmp_path / "nested")
    lora = ml.open(tmp_path / "nested")
    updates = {layer.name: delta(layer) for layer in lora.layers}
    missing = [updates[layer.name] - delta(layer) for layer in lora.at_rank(rank).layers]
    expected = np.sqrt(
        sum((difference**2).sum() for difference in missing)
        / sum((update**2).sum() for update in updates.values())
    )
    info = ml.info(lora)
    assert info.errors[rank] == pytest.approx(expected)
    result = ml.export(tmp_path / "nested", tmp_path / "exported", rank)
    assert result.errors == pytest.approx({rank: expected})
    assert ml.open(tmp_path / "exported").original_error == 0  # it is no truncation
    ladder = ml.export(tmp_path / "nested", tmp_path / "ladder", [rank, 6], "ladder")
    assert ladder.errors == pytest.approx({rank: expected, 6: info.errors[6]})
    saved = lora.nested().save(tmp_path / "again")
    assert saved.errors == pytest.approx({r: info.errors[r] for r in (1, 2, 4, 8)})
    assert "trained" in repr(result)
    rows = {line.split()[0]: line for line in repr(ladder).splitlines() if line.strip()}
    assert rows[str(rank)].endswith("trained")
    assert rows["6"].endswith("%")
    assert f"up to {SMALL_RANK} trained" in repr(info)


@pytest.mark.parametrize(
    "verb",
    [
        lambda lora: lora.drop("*q_proj"),
        lambda lora: lora.scale({"*": 0.5, "*v_proj": -2.0}),
        lambda lora: lora.cast("bf16"),
    ],
    ids=["drop", "scale", "cast"],
)
def test_verbs_change_both_adapters(tmp_path: Path, verb: Callable[[Any], Any]) -> None:
    """Truncation and a verb can be exchanged, and so can a verb and saving."""
    adapter_with_small().save(tmp_path / "nested")
    lora = ml.open(tmp_path / "nested")
    verb(lora).save(tmp_path / "changed")
    for rank in (2, 6):
        first, *others = [
            [delta(layer) for layer in changed.layers]
            for changed in (
                verb(lora.at_rank(rank)),
                verb(lora).at_rank(rank),
                ml.open(tmp_path / "changed").at_rank(rank),
            )
        ]
        for other in others:
            for update, expected in zip(other, first, strict=True):
                np.testing.assert_allclose(
                    update, expected, rtol=0, atol=0.02 * abs(expected).max()
                )


@pytest.mark.parametrize(
    ("verb", "keyword"),
    [
        (lambda folder, output: ml.reorder(folder, output), "without the trained ranks"),
        (lambda folder, output: ml.combine([folder], output), "without the trained ranks"),
    ],
    ids=["reorder", "combine"],
)
def test_losing_the_trained_ranks_is_a_warning(
    tmp_path: Path, verb: Callable[[Path, Path], Any], keyword: str
) -> None:
    adapter_with_small().save(tmp_path / "nested")
    with pytest.warns(UserWarning, match=keyword):
        verb(tmp_path / "nested", tmp_path / "output")
    assert ml.open(tmp_path / "output").small is None


def test_a_folder_without_its_small_adapter_is_an_error(tmp_path: Path) -> None:
    adapter_with_small().save(tmp_path / "nested")
    (tmp_path / "nested" / "small").rename(tmp_path / "elsewhere")
    with pytest.raises(MatryoshkaError, match="whole folder"):
        ml.open(tmp_path / "nested")


def test_a_small_adapter_of_another_adapter_is_an_error(tmp_path: Path) -> None:
    adapter_with_small().save(tmp_path / "nested")
    nested_llama(NESTING, "lora").save(tmp_path / "other")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "other" / name).rename(tmp_path / "nested" / "small" / name)
    with pytest.raises(MatryoshkaError, match="whole folder"):
        ml.open(tmp_path / "nested")
