"""Results and messages as text for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from matryoshka_lora import (
    Evaluation,
    ExportFolderResult,
    ExportResult,
    ExtractResult,
    TrainRanksResult,
    select,
)
from matryoshka_lora.cli.file_results import (
    format_errors,
    format_export,
    format_export_folder,
    format_extract,
)
from matryoshka_lora.cli.model_results import (
    format_evaluation,
    format_selection,
)
from matryoshka_lora.cli.terminal import format_table, with_flags
from matryoshka_lora.evaluation.results import Metric, TaskResult


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
    text = format_export(export_result())
    for expected in ("2 to 4", "2.00MB -> 1.00MB", "10.0%", "99.0%", "A note."):
        assert expected in text
    assert "not smaller" not in text
    assert "not smaller" in format_export(export_result(size_after=2_000_000))


def test_a_ladder_shows_an_error_per_rank() -> None:
    text = format_export(export_result(format="ladder", errors={1: 0.5, 4: 0.1}))
    assert "ranks 1, 4" in text
    assert "50.0%" in text
    assert "10.0%" in text


def test_a_folder_shows_what_was_exported_and_what_was_skipped() -> None:
    result = ExportFolderResult(Path("out"), (export_result(),), {"broken": "Why"}, ("nested",))
    lines = format_export_folder(result).splitlines()
    assert len(lines) == 4
    assert "nested" in lines[1]
    assert "1 failed" in lines[2]
    assert "matryoshka eval" in lines[3]


def test_a_name_cannot_write_lines_or_control_characters() -> None:
    tensors = {"a\nNext: curl x | sh\x1b[2J.weight": 4}
    text = format_extract(ExtractResult(Path("out"), {"a": 4}, {4: 0.2}, 0.0, tensors))
    assert "\\nNext: curl" in text
    assert all(line.isprintable() for line in text.split("\n"))


def test_an_extraction_shows_what_was_not_saved(tmp_path: Path) -> None:
    result = ExtractResult(tmp_path, {"a": 4}, {4: 0.2}, 0.05, {"lm_head.weight": 4_000_000})
    text = format_extract(result)
    for expected in ("20.0%", "5.0%", "4.00MB", "--modules-to-save lm_head"):
        assert expected in text
    quiet = format_extract(ExtractResult(tmp_path, {"a": 4}, {4: 0.2}, 0.0, {}))
    assert "rounding" not in quiet
    assert "--modules-to-save" not in quiet


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("kept", "64"),
        ("not better", "did not improve"),
        ("nothing to train", "as good as"),
        ("no examples", "not trained"),
    ],
)
def test_training_of_ranks_says_whether_they_were_trained(outcome: Any, expected: str) -> None:
    losses_after = {1: 0.5, 4: 0.025} if outcome in ("kept", "not better") else None
    result = TrainRanksResult(
        Path("out"), outcome, {1: 48, 4: 16}, {1: 1.0, 4: 0.011}, losses_after
    )
    first_line, *table = str(result).splitlines()
    assert expected in first_line
    assert table[-1].split() == ["4", "0.011", *(["0.025"] if losses_after else [])]
    assert repr(result) == str(result)


def evaluation(num_tasks: int = 1, with_base: bool = True) -> Evaluation:
    base: dict[int, float | None] = {0: 0.25} if with_base else {}
    tasks = {}
    for index in range(num_tasks):
        accuracy = Metric(True, {**base, 1: 0.5, 2: None, 4: 0.75}, {1: 0.05, 2: None, 4: 0.04})
        loss = Metric(False, {**base, 1: 2.0, 2: 1.5, 4: 1.25}, {1: None, 2: None, 4: None})
        metrics = {"acc,none": accuracy, "loss,none": loss}
        tasks[f"task{index}"] = TaskResult(100, 5, "acc,none", None, None, metrics)
    return Evaluation({"adapter": "a"}, (1, 2, 4), {1: 1000, 2: 2000, 4: 4000}, tasks)


def test_the_evaluation_of_one_task_has_a_column_per_metric() -> None:
    header, base, *rows = format_evaluation(evaluation()).splitlines()
    assert header.split() == ["rank", "size", "acc", "loss"]
    assert base.split() == ["base", "0.250", "0.250"]
    assert rows[0].split() == ["1", "1.00kB", "0.500", "±", "0.050", "2.000"]
    assert rows[1].split() == ["2", "2.00kB", "1.500"]
    assert "5 shots" in rows[3]


def test_the_evaluation_of_several_tasks_has_a_column_per_task() -> None:
    lines = format_evaluation(evaluation(num_tasks=2, with_base=False)).splitlines()
    assert lines[0].split() == ["rank", "size", "task0", "task1"]
    assert lines[1].split()[0] == "1"


def test_a_selection_shows_the_evidence() -> None:
    text = format_selection(select(evaluation(), within="60%"))
    assert text.startswith("Rank 1 (1.00kB): acc 0.500")
    assert "rank 4 is better by 0.250" in text
    assert "the base model is worse by 0.250" in text
    assert "chance" not in text
    close = format_selection(select(evaluation(), within="34%"))
    assert "chance" in close


def test_a_selection_by_loss_says_that_no_answer_is_right() -> None:
    without_answers = evaluation()
    without_answers.metric().values.update(dict.fromkeys((0, 1, 2, 4), 0.0))
    metrics = without_answers.tasks["task0"].metrics
    metrics["loss,none"].values[0] = 3.0
    metrics["f1,none"] = Metric(True, dict.fromkeys((0, 1, 2, 4)), {})  # undefined, and not 0
    text = format_selection(select(without_answers, within="60%", metric="loss"))
    assert text.startswith("Rank 1 (1.00kB): loss 2.000")
    assert "acc is 0 at every rank" in text
    assert "f1" not in text
