"""What `info` says: the numbers are those of the files that `export` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import nested_llama, tiny_llama, tiny_mixtral
from safetensors.torch import save_file
from strangers import plain_adapter

from matryoshka_lora import Nesting, export, reorder
from matryoshka_lora.budget import show_bytes
from matryoshka_lora.info import describe, kind_of

R = 8


def folder(path: Path, **options: Any) -> Path:
    plain_adapter(path, r=R, **options)
    return path


def single(path: Path) -> Path:
    state = {}
    for name, rank in (("lora_unet_down_0_to_q", R), ("lora_unet_down_1_to_q", 3)):
        state[f"{name}.lora_down.weight"] = torch.randn(rank, 20)
        state[f"{name}.lora_up.weight"] = torch.randn(30, rank)
        state[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def nested(path: Path) -> Path:
    plain_adapter(path.with_name("plain"), r=R)
    reorder(path.with_name("plain"), path)
    return path


KINDS: dict[str, Any] = {
    "plain": folder,
    "nested": nested,
    "saved modules": lambda path: folder(path, modules_to_save=["lm_head"]),
    "ranks by layer": lambda path: folder(path, rank_pattern={"q_proj": 2}),
    "single": single,
}


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_errors_are_those_of_the_exports(tmp_path: Path, kind: str) -> None:
    source = KINDS[kind](tmp_path / "adapter")
    found = describe(source)
    lines = found.lines()
    wishes: dict[str, dict[str, Any]] = {"1": {"rank": 1}, "4": {"rank": 4}, str(R): {"rank": R}}
    wishes |= {f"--keep {keep}": {"keep": keep} for keep in ("99%", "90%")}
    for name, wish in wishes.items():
        out = tmp_path / f"out-{name.strip('%')}{source.suffix}"
        made = export(source, out, **wish)
        file = out if out.is_file() else out / "adapter_model.safetensors"
        assert made.after == file.stat().st_size
        row = next(line for line in lines if line.strip().startswith(f"{name} "))
        assert show_bytes(made.after) in row
        assert f"{100 * made.error:.1f} % (" in row
        if "rank" in wish:
            assert found.size(wish["rank"]) == made.after
            assert found.lost.error(wish["rank"]) == pytest.approx(made.error, abs=1e-6)
    assert show_bytes(file_size(source)) in "\n".join(lines)


def file_size(source: Path) -> int:
    file = source if source.is_file() else source / "adapter_model.safetensors"
    return file.stat().st_size


def test_modules_that_are_saved_whole_count_in_each_rank(tmp_path: Path) -> None:
    folder(tmp_path / "adapter", modules_to_save=["lm_head"])
    head = tiny_llama().lm_head.weight
    found = describe(tmp_path / "adapter")
    assert found.size(1) > head.numel() * head.element_size()
    assert "besides     1 tensors, such as base_model.model.lm_head.weight" in "\n".join(
        found.lines()
    )


@pytest.mark.parametrize("kind", ["plain", "svd", "paper", "experts"])
def test_what_it_is_called(tmp_path: Path, kind: str) -> None:
    if kind == "paper":
        nested_llama(Nesting((1, 2, R)), deploy="paper").save(tmp_path / "adapter")
    elif kind == "experts":
        targets = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
        plain_adapter(tmp_path / "adapter", tiny_mixtral(), **targets)
    elif kind == "svd":
        nested(tmp_path / "adapter")
    else:
        folder(tmp_path / "adapter")
    lines = describe(tmp_path / "adapter").lines()
    wanted = {
        "plain": "a plain LoRA adapter: `matryoshka reorder` makes it nested",
        "svd": "a nested LoRA adapter in the order 'svd', for any rank (trained: 1, 2, 4, 8)",
        "paper": "a nested LoRA adapter as the paper deploys it, for the ranks 1, 2, 8 alone",
        "experts": "a plain LoRA adapter: `matryoshka reorder` makes it nested",
    }
    assert lines[0] == f"{tmp_path / 'adapter'} is {wanted[kind]}"
    assert any("--keep" in line for line in lines) == (kind in ("plain", "svd"))


def test_kinds_of_layers() -> None:
    names = {
        "model.layers.0.self_attn.q_proj": "q_proj",
        "unet.down.0.to_out.0": "to_out",
        "lora_unet_down_blocks_0_attentions_1_proj_in": "proj_in",
    }
    assert {name: kind_of(name) for name in names} == names
