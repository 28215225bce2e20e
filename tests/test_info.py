"""What `info` says: the numbers are those of the files that `export` writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import nested_llama, tiny_llama, tiny_mixtral
from strangers import plain_adapter
from test_single import lora_file

from matryoshka_lora import Nesting, export, reorder
from matryoshka_lora.budget import show_bytes
from matryoshka_lora.info import describe

R = 8
PLAIN = "a plain LoRA adapter: `matryoshka reorder` makes it nested"


def folder(path: Path, base: Any = None, **options: Any) -> Path:
    plain_adapter(path, base, r=R, **options)
    return path


def single(path: Path) -> Path:
    return lora_file(path.with_suffix(".safetensors"), "kohya")


def nested(path: Path) -> Path:
    return reorder(folder(path.with_name("plain")), path)


def experts(path: Path) -> Path:
    targets = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    return folder(path, tiny_mixtral(), **targets)


def paper(path: Path) -> Path:
    nested_llama(Nesting((1, 4, R)), deploy="paper").save(path)
    return path


KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "plain": (folder, PLAIN),
    "nested": (
        nested,
        "a nested LoRA adapter in the order 'svd', for any rank (nested: 1, 2, 4, 8)",
    ),
    "paper": (paper, "a nested LoRA adapter as the paper deploys it, for the ranks 1, 4, 8 alone"),
    "experts": (experts, PLAIN),
    "saved modules": (lambda path: folder(path, modules_to_save=["lm_head"]), PLAIN),
    "ranks by layer": (lambda path: folder(path, rank_pattern={"q_proj": 2}), PLAIN),
    "single": (single, "a LoRA in one file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_the_exports_are(tmp_path: Path, kind: str) -> None:
    make, what = KINDS[kind]
    source = make(tmp_path / "adapter")
    found = describe(source)
    lines = found.lines()
    assert lines[0] == f"{source} is {what}"
    whole = source if source.is_file() else source / "adapter_model.safetensors"
    assert f"  file        {show_bytes(whole.stat().st_size)}, float32" in lines
    for rank in (1, 4, R):
        out = tmp_path / f"out-{rank}{source.suffix}"
        made = export(source, out, rank)
        file = out if out.is_file() else out / "adapter_model.safetensors"
        assert found.sizes[rank] == made.after == file.stat().st_size
        assert found.errors[rank] == pytest.approx(made.error, abs=1e-6)
        row = next(line for line in lines if line.strip().startswith(f"{rank} "))
        error, kept = 100 * made.error, 100 * (1 - made.error**2)
        assert f"{show_bytes(made.after)}   {error:4.1f} % ({kept:.1f} % of its square kept)" in row
    if kind == "saved modules":  # they are saved whole, so that they count in each rank
        assert found.sizes[1] > tiny_llama().lm_head.weight.numel() * 4
        (besides,) = (line for line in lines if "besides" in line)
        assert besides.startswith("  besides     base_model.model.lm_head.weight: ")
        assert besides.endswith("kB at every rank")
