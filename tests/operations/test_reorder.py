"""`reorder`: every rank of the output is the best approximation, and R computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers.models import tiny_llama, tiny_mixtral
from helpers.plain_peft import best, by_peft, distance, plain_adapter, updates
from helpers.single_files import read_ranks, read_updates
from safetensors.torch import save_file

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError, Nesting, NotFiniteError, export, reorder

R = 8
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (tiny_llama, {"lora_alpha": 20}),
    "patterns": (tiny_llama, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 2}}),
    "experts": (tiny_mixtral, EXPERTS),
}


def check_against_svd(result: Any, source_updates: dict[str, np.ndarray]) -> None:
    """Check errors and singular values against NumPy's SVD of the dense updates."""
    values = [np.linalg.svd(update, compute_uv=False) for update in source_updates.values()]
    total = sum(np.sum(s**2) for s in values)
    assert list(result.errors) == list(result.ranks)
    for rank, error in result.errors.items():
        missing = sum(np.sum(s[..., rank:] ** 2) for s in values)
        assert error == pytest.approx(np.sqrt(missing / total), rel=1e-5, abs=1e-6)
    largest = sorted(s[..., 0].max() for s in values)
    assert sorted(s[..., 0].max() for s in result.singular_values.values()) == pytest.approx(
        largest, rel=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_of_a_folder_is_the_best_approximation(tmp_path: Path, kind: str) -> None:
    base, options = KINDS[kind]
    plain_adapter(tmp_path / "plain", base(), **{"r": R, **options})
    result = reorder(tmp_path / "plain", tmp_path / "nested")
    assert result.path == tmp_path / "nested"
    assert result.ranks == (1, 2, 4, R)
    source_updates = updates(tmp_path / "plain", base)
    check_against_svd(result, source_updates)
    shapes = {values.shape for values in result.singular_values.values()}
    assert shapes == ({(R,), (3, R)} if kind == "experts" else {(R,)})

    nested = ml.open(tmp_path / "nested")
    assert (nested.order, nested.nested_ranks, nested.deploy) == ("svd", (1, 2, 4, R), "reordered")
    plain_logits = by_peft(tmp_path / "plain", base)
    assert distance(by_peft(tmp_path / "nested", base), plain_logits) < 1e-5
    export(tmp_path / "nested", tmp_path / "rank-3", 3)
    for name, update in updates(tmp_path / "rank-3", base).items():
        expected = best(source_updates[name], 3)
        np.testing.assert_allclose(update, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("fields", [{"order": "svd"}, {"deploy": "paper"}])
def test_the_order_of_the_source_does_not_count(tmp_path: Path, fields: dict[str, Any]) -> None:
    plain_adapter(tmp_path / "plain", r=R, target_modules=["q_proj", "v_proj"])
    lora = replace(ml.open(tmp_path / "plain"), **fields)
    lora = replace(lora, nesting=Nesting((2, R), "rank", 1.0))
    lora.nested().save(tmp_path / "source")
    result = reorder(tmp_path / "source", tmp_path / "nested")
    check_against_svd(result, updates(tmp_path / "plain"))
    nested = ml.open(tmp_path / "nested")
    assert (nested.order, nested.nested_ranks, nested.deploy) == ("svd", (2, R), "reordered")


def test_layers_of_a_single_file_keep_their_ranks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file, output = tmp_path / "lora.safetensors", tmp_path / "reordered.safetensors"
    tensors = {}
    for name, rank in (("a", 4), ("b", 2)):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, 6)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(5, rank)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, file)
    result = reorder(file, output)
    assert result.ranks == (1, 2, 4)
    source_updates = read_updates(file)
    check_against_svd(result, source_updates)
    assert read_ranks(output) == {"lora_unet_a": 4, "lora_unet_b": 2}
    for name, update in read_updates(output).items():
        np.testing.assert_allclose(update, source_updates[name], atol=1e-5)


def test_invalid_sources_and_outputs_are_rejected(tmp_path: Path) -> None:
    base, lora, file = (tmp_path / name for name in ("base", "lora", "lora.safetensors"))
    tiny_llama().save_pretrained(base)
    model = plain_adapter(lora, target_modules=["q_proj"])
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(lora)
    save_file({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2)}, file)
    for source, output, keyword in (
        (lora, tmp_path / "x.safetensors", "folder"),
        (lora, tmp_path / "x.gguf", "folder"),
        (file, tmp_path / "x", "single file"),
        (tmp_path / "missing", tmp_path / "x", "not found"),
        (lora, lora, "source"),
        (lora, base, "source"),
    ):
        with pytest.raises(MatryoshkaError, match=keyword):
            reorder(source, output, force=True)
    with pytest.raises(MatryoshkaError, match="exists"):
        reorder(file, tmp_path / "base" / "model.safetensors")
    tensors = {"a.lora_A.weight": torch.full((2, 3), torch.nan)}
    save_file({**tensors, "a.lora_B.weight": torch.ones(4, 2)}, file)
    with pytest.raises(NotFiniteError, match="NaN"):
        reorder(file, tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("*x*"))


OTHER_TYPES: dict[str, dict[str, Any]] = {
    "LoHa": {"r": 4},
    "LoKr": {"r": 4},
    "Miss": {"r": 4},
    "Vera": {"r": 4},
    "Gralora": {"r": 4},
    "FourierFT": {"n_frequency": 40},
    "C3A": {"block_size": 8},
    "RandLora": {"r": 4},
}


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_adapters_that_peft_converts_to_lora_can_be_reordered(tmp_path: Path, name: str) -> None:
    config = getattr(peft, f"{name}Config", None)
    if config is None or not hasattr(peft, "save_as_lora"):
        pytest.skip(f"this PEFT has no {name}, or no save_as_lora")
    model = peft.get_peft_model(
        tiny_llama(), config(target_modules=["q_proj", "o_proj"], **OTHER_TYPES[name])
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(MatryoshkaError, match="save_as_lora"):
        reorder(tmp_path / "source", tmp_path / "nested")
    peft.save_as_lora(tmp_path / "lora", model, rank=8)
    reorder(tmp_path / "lora", tmp_path / "nested")
    assert distance(by_peft(tmp_path / "nested"), by_peft(tmp_path / "lora")) < 1e-4
    export(tmp_path / "nested", tmp_path / "rank-2", rank=2)
    by_peft(tmp_path / "rank-2")
