"""examples/space: its numbers, its downloads, and hostile uploads."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import tiny_llama
from helpers.plain_peft import best, distance, logits, plain_adapter
from helpers.single_files import read_updates
from peft import PeftModel
from safetensors.torch import save_file

from matryoshka_lora import export

gr = pytest.importorskip("gradio")
sys.path.append(str(Path(__file__).parents[2] / "examples/space"))
import app  # noqa: E402

pytestmark = pytest.mark.slow
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def save_kohya_lora(file: Path) -> Path:
    """Write a LoRA with two layers of ranks 8 and 3, and an alpha of 6."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, rank in (("lora_unet_first", 8), ("lora_unet_second", 3)):
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 12, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(16, rank, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(6.0)
    save_file(tensors, file)
    return file


def peft_files(folder: Path) -> list[str]:
    return [str(folder / WEIGHTS_NAME), str(folder / CONFIG_NAME)]


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, **fields}))


class Exploit:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.folder),))


def test_errors_sizes_and_ranks_of_layers(tmp_path: Path) -> None:
    file = save_kohya_lora(tmp_path / "lora.safetensors")
    curve, layers = app.measure(str(file))
    updates = read_updates(file)
    total = sum(np.linalg.norm(update) ** 2 for update in updates.values())
    assert [row["rank"] for row in curve] == list(range(1, 9))
    for row in curve:
        rank = row["rank"]
        dropped = sum(np.linalg.norm(u - best(u, rank)) ** 2 for u in updates.values())
        assert row["error in %"] == pytest.approx(100 * (dropped / total) ** 0.5, abs=0.01)
        export(file, tmp_path / "small.safetensors", rank=rank, force=True)
        size = (tmp_path / "small.safetensors").stat().st_size
        assert row["MB"] == pytest.approx(size / 1e6, abs=0.001)
    for row in layers:
        squares = np.linalg.svd(updates[row["layer"]], compute_uv=False) ** 2
        kept = squares.cumsum() / squares.sum()
        assert row["for 95%"] == int((kept < 0.95 - 1e-9).sum()) + 1


def test_the_download_is_the_export_and_is_deleted_afterwards(tmp_path: Path) -> None:
    file = save_kohya_lora(tmp_path / "lora.safetensors")
    outputs = app.shrink([str(file)], app.BY_RANK, "2")
    text, download = next(outputs)
    assert "rank 2" in text
    assert str(Path(download).parent) not in text
    export(file, tmp_path / "expected.safetensors", rank=2)
    expected = read_updates(tmp_path / "expected.safetensors")
    for name, update in read_updates(Path(download)).items():
        np.testing.assert_array_equal(update, expected[name])
    assert next(outputs, None) is None
    assert not Path(download).parent.exists()


def test_the_two_files_of_peft_become_a_folder_that_peft_loads(tmp_path: Path) -> None:
    expected = logits(plain_adapter(tmp_path / "lora"))
    outputs = app.shrink(peft_files(tmp_path / "lora"), app.BY_ERROR, "0.01%")
    zipfile.ZipFile(next(outputs)[1]).extractall(tmp_path / "small")
    model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "small"))
    assert distance(logits(model), expected) < 1e-3


@pytest.mark.parametrize("kind", ["pickle", "nested JSON", "no rank"])
def test_a_hostile_file_gets_one_error_without_a_path(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    plain_adapter(folder, target_modules=["q_proj"])
    if kind == "pickle":
        (folder / WEIGHTS_NAME).write_bytes(pickle.dumps(Exploit(tmp_path / "exploited")))
    elif kind == "nested JSON":
        (folder / CONFIG_NAME).write_text("[" * 200_000)
    else:
        edit_config(folder, r=None)
    with pytest.raises(gr.Error) as error:
        next(app.show(peft_files(folder)))
    assert "/tmp" not in str(error.value)
    assert not (tmp_path / "exploited").exists()


def test_a_file_that_takes_too_long_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"])
    monkeypatch.setattr(app, "TIME_LIMIT", 0.01)
    with pytest.raises(gr.Error, match=r"0\.01 seconds"):
        next(app.show(peft_files(tmp_path / "lora")))


@pytest.mark.parametrize(
    ("names", "criterion", "value", "keyword"),
    [
        (["a.safetensors", "b.safetensors"], app.BY_ERROR, "20%", "one file"),
        (["a.safetensors"], app.BY_RANK, "many", "rank"),
        (["a.safetensors"], app.BY_RANK, "99", "99"),
        (["a.safetensors"], app.BY_ERROR, "all", "all"),
        (["a.safetensors"], app.BY_SIZE, "1", "smallest"),
    ],
)
def test_invalid_choices_are_explained(
    tmp_path: Path, names: list[str], criterion: str, value: str, keyword: str
) -> None:
    files = [str(save_kohya_lora(tmp_path / name)) for name in names]
    with pytest.raises(gr.Error, match=keyword):
        next(app.shrink(files, criterion, value))
