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


def save_kohya_lora(file: Path, first_rank: int = 8, seed: int = 0) -> Path:
    """Write a LoRA with two layers, the second one of rank 3, and an alpha of 6."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, rank in (("lora_unet_first", first_rank), ("lora_unet_second", 3)):
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


def relative_error(updates: dict[str, Any], rank: int) -> float:
    """Return the error of the best updates of a rank."""
    dropped = sum(np.linalg.norm(update - best(update, rank)) ** 2 for update in updates.values())
    total = sum(np.linalg.norm(update) ** 2 for update in updates.values())
    return float((dropped / total) ** 0.5)


def size_in_mb(file: Path, rank: int) -> float:
    """Return the size of an export."""
    output = file.with_name("exported.safetensors")
    export(file, output, rank=rank, force=True)
    return output.stat().st_size / 1e6


def test_errors_sizes_and_ranks_of_layers(tmp_path: Path) -> None:
    file = save_kohya_lora(tmp_path / "lora.safetensors")
    results, sentence, _, _, curve, ranks, layers, file_table, *_ = app.show([str(file)])
    assert results.visible
    assert not file_table.visible
    updates = read_updates(file)
    expected = {rank: 100 * relative_error(updates, rank) for rank in range(1, 9)}
    assert dict(curve.to_numpy()) == pytest.approx(expected, abs=0.01)
    assert [*ranks["rank"]] == [1, 2, 4, 8]
    full_size = file.stat().st_size / 1e6
    for _, row in ranks.iterrows():
        assert row["error %"] == pytest.approx(expected[row["rank"]], abs=0.01)
        size = size_in_mb(file, int(row["rank"]))
        assert row["MB"] == pytest.approx(size, abs=0.001)
        assert row["size %"] == pytest.approx(100 * size / full_size, abs=0.01)
    for _, row in layers.iterrows():
        squares = np.linalg.svd(updates[row["layer"]], compute_uv=False) ** 2
        kept = squares.cumsum() / squares.sum()
        assert row["for 95%"] == int((kept < 0.95 - 1e-9).sum()) + 1
    rank = min(rank for rank, error in expected.items() if error <= 10)
    assert f"Rank {rank} of 8: " in sentence
    assert f"error {expected[rank]:.1f}%" in sentence


def test_several_files_are_rows_and_one_archive_of_exports(tmp_path: Path) -> None:
    first = save_kohya_lora(tmp_path / "first.safetensors")
    # Several tools name every file so.
    files = [str(first)]
    for seed, name in enumerate(("b", "c"), start=1):
        (tmp_path / name).mkdir()
        file = save_kohya_lora(tmp_path / name / "pytorch_lora_weights.safetensors", seed, seed)
        files.append(str(file))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"damaged")
    files.append(str(damaged))
    names = ["first", "pytorch_lora_weights", "pytorch_lora_weights-2"]

    _, text, single, _, curve, _, _, file_table, *_ = app.show(files)
    assert not single.visible
    assert curve is None
    assert "damaged.safetensors" in text
    table = file_table.value["data"]
    assert [row[0] for row in table] == [f"{name}.safetensors" for name in names]
    for file, row in zip(files, table, strict=False):
        updates = read_updates(Path(file))
        errors = {rank: relative_error(updates, rank) for rank in range(1, row[1] + 1)}
        rank = min(rank for rank, error in errors.items() if error <= 0.1)
        assert row[3] == rank
        assert row[4] == pytest.approx(size_in_mb(Path(file), rank), abs=0.01)
        assert row[5] == pytest.approx(0, abs=0.01)  # no rank is larger than 8

    outputs = app.shrink(files, app.BY_RANK, "2")
    text, download = next(outputs)
    assert "damaged.safetensors" in text
    zipfile.ZipFile(download).extractall(tmp_path / "small")
    assert "damaged.safetensors" in (tmp_path / "small/failed.txt").read_text()
    for name, file in zip(names, files, strict=False):
        source = read_updates(Path(file))
        small = read_updates(tmp_path / f"small/{name}-small.safetensors")
        for layer, update in source.items():
            np.testing.assert_allclose(small[layer], best(update, 2), atol=1e-4)


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
        app.show(peft_files(folder))
    assert "/tmp" not in str(error.value)
    assert not (tmp_path / "exploited").exists()


def test_a_file_that_takes_too_long_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"])
    monkeypatch.setattr(app, "TIME_LIMIT", 0)
    with pytest.raises(gr.Error, match="0 seconds"):
        app.show(peft_files(tmp_path / "lora"))


@pytest.mark.parametrize(
    ("names", "criterion", "value", "keyword"),
    [
        (["a.safetensors", "b.safetensors"], app.BY_ERROR, "all", "all"),
        ([f"{index}.safetensors" for index in range(21)], app.BY_ERROR, "20%", "20 files"),
        (["a.safetensors", "b.safetensors", "adapter_config.json"], app.BY_ERROR, "20%", "PEFT"),
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
