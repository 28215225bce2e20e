"""The error against the original, which the metadata of every LoRA file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.models import tiny_llama
from helpers.plain_peft import plain_adapter, updates
from helpers.single_files import read_updates, save_random_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import matryoshka_lora as ml
from matryoshka_lora import Lora, combine, export, export_folder, info, info_folder, reorder
from matryoshka_lora.formats.safetensors_io import ERROR_KEY

SHAPES = {"unet.a": (6, 8), "unet.b": (7, 6), "unet.c": (9, 5)}
CHAINS: dict[str, list[Callable[[Lora], Lora]]] = {
    "once": [lambda lora: lora.truncate(3)],
    "twice": [lambda lora: lora.truncate(3), lambda lora: lora.truncate(2)],
    "nested": [lambda lora: lora.truncate(3), Lora.reorder, lambda lora: lora.truncate(1)],
    "by error": [lambda lora: lora.truncate(error="30%"), lambda lora: lora.truncate(error="20%")],
    "not truncated": [Lora.reorder, lambda lora: lora.cast("fp32")],
}


def stored_error(path: Path) -> str:
    """Return the entry in the metadata of a file, or of the only file of a folder."""
    if path.is_dir():
        (path,) = path.glob("*.safetensors")
    with safe_open(path, "np") as file:
        error: str = file.metadata()[ERROR_KEY]
    return error


@pytest.mark.parametrize("container", ["peft", "single"])
@pytest.mark.parametrize("chain", CHAINS)
def test_an_output_of_an_output_has_the_error_against_the_original(
    container: str, chain: str, tmp_path: Path
) -> None:
    suffix = ".safetensors" if container == "single" else ""
    read = read_updates if suffix else updates
    source = path = tmp_path / f"lora{suffix}"
    if suffix:
        save_random_lora(source, SHAPES, has_alpha=True)
    else:
        plain_adapter(source, r=8, rank_pattern={"q_proj": 4})
    for number, verb in enumerate(CHAINS[chain]):
        lora = verb(ml.open(path))
        path = tmp_path / f"{number}{suffix}"
        assert lora.save(path).size == lora.file_size
    written = read(path)
    missing = total = 0.0
    for name, update in read(source).items():
        missing += float(np.sum((update - written[name]) ** 2))
        total += float(np.sum(update**2))
    error = stored_error(path)
    assert float(error) == pytest.approx((missing / total) ** 0.5, abs=2e-6)
    assert (float(error) == 0) == (chain == "not truncated")
    assert len(error) == len("0.123456")
    assert ml.open(path).original_error == float(error)


def test_every_format_of_lora_stores_the_error(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    plain_adapter(tmp_path / "lora", r=8)
    options = {"base_model": str(tmp_path / "base")}
    export(tmp_path / "lora", tmp_path / "mlx", 2, format="mlx", **options)
    export(tmp_path / "lora", tmp_path / "ladder", [2, 8], format="ladder")
    expected = export(tmp_path / "lora", tmp_path / "rank-2", 2).errors[2]
    for path in ("mlx", "rank-2", "ladder/lora@2"):
        assert float(stored_error(tmp_path / path)) == pytest.approx(expected, abs=1e-6)
    assert float(stored_error(tmp_path / "ladder" / "lora@8")) == 0


def test_a_sum_is_a_new_original(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "lora", r=8)
    export(tmp_path / "lora", tmp_path / "small", 1)
    assert ml.open(tmp_path / "small").original_error > 0.5
    combine([tmp_path / "small", tmp_path / "lora"], tmp_path / "sum", rank="sum")
    assert ml.open(tmp_path / "sum").original_error == 0
    assert ml.open(tmp_path / "small").map(lambda factors: factors).original_error == 0


def test_the_error_is_shown(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "lora", r=8)
    first = export(tmp_path / "lora", tmp_path / "first", 2)
    assert not any("original" in note for note in first.notes)
    second = export(tmp_path / "first", tmp_path / "second", 1)
    described = info(tmp_path / "second")
    text = f"{100 * described.lora.original_error:.1f}%"
    assert described.lora.original_error > first.errors[2]
    assert described.to_dict()["original_error"] == described.lora.original_error
    assert f"{text} against the original" in str(described)
    assert f"{text} against the original" in (tmp_path / "second" / "README.md").read_text()
    assert any(text in note for note in second.notes)
    reorder(tmp_path / "lora", tmp_path / "nested")
    for untruncated in ("lora", "nested"):
        assert "against the original" not in str(info(tmp_path / untruncated))
    assert "against the original" not in (tmp_path / "nested" / "README.md").read_text()


def test_large_errors_of_a_folder_are_marked(tmp_path: Path) -> None:
    """Of three adapters of rank 8, one loses most of its update at rank 2."""
    for number in range(3):
        folder = tmp_path / "loras" / f"lora-{number}"
        plain_adapter(folder, r=8)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        if number < 2:  # the last components are small
            for key in tensors:
                if "lora_A" in key:
                    tensors[key][2:] *= 0.1
        save_file(tensors, file)
    exported = export_folder(tmp_path / "loras", tmp_path / "small", 2)
    again = info_folder(tmp_path / "small")
    for text in (str(exported), str(again)):
        marked = [line.split()[-1] for line in text.splitlines() if "% *" in line]
        assert marked == ["lora-2"]
    assert "*" not in str(info_folder(tmp_path / "loras"))


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "x", ""])
def test_a_damaged_error_is_ignored(value: str, tmp_path: Path) -> None:
    plain_adapter(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(load_file(file), file, {ERROR_KEY: value})
    assert ml.open(tmp_path / "lora").original_error == 0
