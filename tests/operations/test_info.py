"""`info`: its sizes and errors are those of the outputs that `export` writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_llama, tiny_mixtral
from helpers.plain_peft import plain_adapter
from helpers.single_files import save_pairs

from matryoshka_lora import Nesting, export, info, reorder
from matryoshka_lora.lora_file.peft_folder import open_peft_folder

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
    lora = open_peft_folder(save_plain(path.with_name("plain")))
    nesting = Nesting((1, 4, R), "sqrt", 0.5)
    lora = replace(lora, nesting=nesting, **fields)
    lora.plan_nested().write(path)
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
    "trained": lambda path: save_nested_as(path, order="trained"),
    "paper": lambda path: save_nested_as(path, deploy="paper"),
    "experts": lambda path: save_plain(path, tiny_mixtral(), **EXPERTS),
    "modules_to_save": lambda path: save_plain(path, modules_to_save=["lm_head"]),
    "ranks by layer": lambda path: save_plain(path, rank_pattern={"q_proj": 2}),
    "single file": save_single_file,
}


ORDERS = {"nested": "svd", "said to be ordered": "svd", "trained": "trained"}


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_errors_are_those_of_the_exports(tmp_path: Path, kind: str) -> None:
    source = KINDS[kind](tmp_path / "adapter")
    result = info(source)
    lora = result.lora
    assert lora.name == str(source)
    assert result.sizes.keys() == result.errors.keys() == set(lora.ranks)
    assert lora.order == ORDERS.get(kind)
    for rank in lora.ranks:
        exported = export(source, tmp_path / f"rank-{rank}{source.suffix}", rank)
        assert result.sizes[rank] == exported.size_after
        (error,) = exported.errors.values()
        assert result.errors[rank] == pytest.approx(error, abs=1e-6)
    assert result.errors[lora.max_rank] < 1e-6 < result.errors[1]
    if kind == "modules_to_save":  # they have the same size at every rank
        assert result.sizes[1] > tiny_llama().lm_head.weight.numel() * 4
