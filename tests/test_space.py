"""The page to upload to: its numbers, its files, and what it does with files of strangers."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_llama
from peft import PeftModel
from strangers import best, distance, file_updates, logits, plain_adapter
from test_hostile_files import HARMS, config
from test_single import lora_file

from matryoshka_lora import export

gr = pytest.importorskip("gradio")
sys.path.append(str(Path(__file__).parents[1] / "examples/space"))
import app  # noqa: E402

pytestmark = pytest.mark.slow
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def test_the_numbers_are_numpys(tmp_path: Path) -> None:
    file = lora_file(tmp_path / "lora.safetensors", "kohya")
    curve, layers = app.measure(str(file))
    updates = file_updates(file)
    whole = sum(np.linalg.norm(each) ** 2 for each in updates.values())
    for row in curve:
        export(file, tmp_path / "cut.safetensors", rank=row["rank"], force=True)
        left = sum(np.linalg.norm(each - best(each, row["rank"])) ** 2 for each in updates.values())
        assert row["error in %"] == pytest.approx(100 * (left / whole) ** 0.5, abs=0.01)
        size = (tmp_path / "cut.safetensors").stat().st_size
        assert row["MB"] == pytest.approx(size / 1e6, abs=0.001)
    for row in layers:
        squares = np.linalg.svd(updates[row["layer"]], compute_uv=False) ** 2
        kept = squares.cumsum() / squares.sum()
        assert row["for 95 %"] == int((kept < 0.95 - 1e-9).sum()) + 1


def test_what_is_downloaded_is_what_was_chosen_and_the_rest_is_gone(tmp_path: Path) -> None:
    file = lora_file(tmp_path / "lora.safetensors", "kohya")
    steps = app.shrink([str(file)], app.ONE, "2")
    said, made = next(steps)
    assert "rank 2" in said
    assert str(Path(made).parent) not in said
    export(file, tmp_path / "wanted.safetensors", rank=2)
    for name, update in file_updates(Path(made)).items():
        np.testing.assert_array_equal(update, file_updates(tmp_path / "wanted.safetensors")[name])
    assert next(steps, None) is None
    assert not Path(made).parent.exists()


def test_pefts_two_files_become_a_folder_that_peft_reads(tmp_path: Path) -> None:
    given = logits(plain_adapter(tmp_path / "lora"))
    files = [str(tmp_path / "lora" / name) for name in (WEIGHTS, CONFIG)]
    steps = app.shrink(files, app.SHARE, "100%")
    zipfile.ZipFile(next(steps)[1]).extractall(tmp_path / "small")
    found = logits(PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "small")))
    assert distance(found, given) < 1e-5


# A pattern that no regular expression engine of Python's ends with.
ENDLESS = config(rank_pattern={"(([a-z_.0-9])*)*(!)": 4})
STRANGE = {harm: HARMS[harm] for harm in ("a pickle by another name", "endless JSON", "no rank")}


@pytest.mark.parametrize("harm", STRANGE)
def test_a_harmful_file_gets_one_error_without_a_path(tmp_path: Path, harm: str) -> None:
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"])
    make, message = STRANGE[harm]
    make(tmp_path / "lora")
    with pytest.raises(gr.Error, match=message) as caught:
        next(app.look([str(tmp_path / "lora" / name) for name in (WEIGHTS, CONFIG)]))
    assert "/tmp" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_work_without_an_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"])
    ENDLESS(tmp_path / "lora")
    monkeypatch.setattr(app, "SECONDS", 15)
    with pytest.raises(gr.Error, match="more than 15 seconds"):
        next(app.look([str(tmp_path / "lora" / name) for name in (WEIGHTS, CONFIG)]))


@pytest.mark.parametrize(
    ("files", "how", "wish", "message"),
    [
        (["a.safetensors", "b.safetensors"], app.SHARE, "95%", "Drop one file"),
        (["a.safetensors"], app.ONE, "many", "A rank is a number"),
        (["a.safetensors"], app.ONE, "99", "has no rank 99: choose one of 1 to 8"),
        (["a.safetensors"], app.SIZE, "1", "the smallest file"),
    ],
)
def test_a_wish_that_cannot_be_met_is_explained(
    tmp_path: Path, files: list[str], how: str, wish: str, message: str
) -> None:
    paths: list[Any] = [str(lora_file(tmp_path / name, "kohya")) for name in files]
    with pytest.raises(gr.Error, match=message):
        next(app.shrink(paths, how, wish))
