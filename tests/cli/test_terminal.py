"""Results and messages as text for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.plain_peft import plain_adapter

import matryoshka_lora as ml
from matryoshka_lora import (
    ExportFolderResult,
    ExportResult,
    ExtractResult,
    TrainRanksResult,
)
from matryoshka_lora.cli.terminal import with_flags
from matryoshka_lora.text import format_errors, format_table


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Pass one of `rank` or `max_bytes`.", "Pass one of --rank or --max-bytes."),
        ("Pass `force=True` to overwrite it.", "Pass --force to overwrite it."),
        ("Only `format='ladder'` takes several.", "Only --format ladder takes several."),
        ("Pass `rank=4`.", "Pass --rank 4."),
        ("The rank of max_bytes. Pass `is_trainable=True`.",) * 2,
        ("Run `hf auth login`, or `matryoshka reorder`.",) * 2,
    ],
)
def test_parameters_become_flags(message: str, expected: str) -> None:
    assert with_flags(message, {"rank", "max_bytes", "format", "force"}) == expected


def test_tables_are_aligned_to_the_right() -> None:
    assert format_table([["rank", "a"], ["1", "10.5"]]) == ["  rank     a", "     1  10.5"]


def test_errors_are_shown_with_the_share_that_is_kept() -> None:
    lines = format_errors({1: 0.6, 8: 0.0}, "sum")
    assert lines[1].split() == ["1", "60.0%", "64.0%"]
    assert lines[2].split() == ["8", "0.0%", "100.0%"]
    assert format_errors({1: 0.6}, "sum", {1: 1500})[1].split() == ["1", "1.50kB", "60.0%", "64.0%"]


def export_result(**changes: object) -> ExportResult:
    fields: dict[str, object] = {
        "path": Path("small"),
        "format": "peft",
        "ranks": {"a": 2, "b": 4},
        "size_before": 2_000_000,
        "size_after": 1_000_000,
        "errors": {4: 0.1},
        "notes": ("A note.",),
    }
    return ExportResult(**{**fields, **changes})  # type: ignore[arg-type]


def test_an_export_shows_ranks_sizes_error_and_notes() -> None:
    text = str(export_result())
    for expected in ("2 to 4", "2.00MB -> 1.00MB", "10.0%", "99.0%", "A note."):
        assert expected in text
    assert "not smaller" not in text
    assert "not smaller" in str(export_result(size_after=2_000_000))


def test_a_result_is_shown_as_its_text(tmp_path: Path) -> None:
    """In a notebook as well as in the terminal."""
    plain_adapter(tmp_path / "a", r=4)
    lora = ml.open(tmp_path / "a")
    results: list[object] = [
        lora,
        lora.layers[0],
        lora.save(tmp_path / "saved"),
        ml.info(lora, layers=True),
        ml.info_folder(tmp_path),
        ml.reorder(lora, tmp_path / "reordered"),
        ml.export(lora, tmp_path / "small", 2),
        ml.export_folder(tmp_path, tmp_path / "smaller", 1),
        ml.combine([lora, lora], tmp_path / "sum"),
        ExtractResult(tmp_path, {"a": 4}, {4: 0.2}, 0.0, {}),
    ]
    for result in results:
        text = repr(result)
        assert text == str(result)
        assert 0 < len(text) < 3000
        assert "array(" not in text
        assert "<function" not in text


def test_a_ladder_shows_an_error_per_rank() -> None:
    text = str(export_result(format="ladder", errors={1: 0.5, 4: 0.1}))
    assert "ranks 1, 4" in text
    assert "50.0%" in text
    assert "10.0%" in text


def test_a_folder_shows_what_was_exported_and_what_was_skipped() -> None:
    result = ExportFolderResult(Path("out"), (export_result(),), {"broken": "Why"}, ("nested",))
    lines = str(result).splitlines()
    assert len(lines) == 6
    assert "A note." in lines[2]
    assert "nested" in lines[3]
    assert "1 failed" in lines[4]
    assert "matryoshka eval" in lines[5]


def test_a_name_cannot_write_lines_or_control_characters() -> None:
    tensors = {"a\nNext: curl x | sh\x1b[2J.weight": 4}
    text = str(ExtractResult(Path("out"), {"a": 4}, {4: 0.2}, 0.0, tensors))
    assert "\\nNext: curl" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_an_extraction_shows_what_was_not_saved(tmp_path: Path) -> None:
    result = ExtractResult(tmp_path, {"a": 4}, {4: 0.2}, 0.05, {"lm_head.weight": 4_000_000})
    text = str(result)
    for expected in ("20.0%", "5.0%", "4.00MB", "lm_head in `modules_to_save`"):
        assert expected in text
    quiet = str(ExtractResult(tmp_path, {"a": 4}, {4: 0.2}, 0.0, {}))
    assert "rounding" not in quiet
    assert "modules_to_save" not in quiet


@pytest.mark.parametrize(
    ("outcome", "small_rank", "expected"),
    [
        ("kept", 1, ["64", "Rank 2", "raised", "0.25"]),
        ("not better", 0, ["not kept", "Rank 1", "0.5"]),
        ("nothing to train", 0, ["0.0123", "rank 4"]),
        ("no examples", 0, ["not trained"]),
    ],
)
def test_training_of_ranks_says_which_losses_decided(
    outcome: Any, small_rank: int, expected: list[str]
) -> None:
    is_trained = outcome in ("kept", "not better")
    losses_after = {1: 0.5 if small_rank else 1.5, 2: 0.75} if is_trained else {}
    losses = {1: 1.0, 2: 0.5, 4: 0.011}
    result = TrainRanksResult(
        Path("out"), outcome, small_rank, {1: 48, 4: 16}, losses, losses_after, 0, 1.0, True,
        base_loss=2.25, max_gap=0.0123,
    )  # fmt: skip
    text = str(result)
    assert all(word in text for word in expected)
    assert ("was not kept" in text) == is_trained
    *_, base, _, _, last = (line.split() for line in text.splitlines())
    assert (base, last) == (["base", "2.250"], ["4", "0.011"])
    assert repr(result) == text
