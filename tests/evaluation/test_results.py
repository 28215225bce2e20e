"""AURAC, differences between ranks, files, plots, and the conversion of the harness's results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.evaluations import NUM_CORRECT, NUM_EXAMPLES, RANKS, new_evaluation, two_metrics
from PIL import Image

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.evaluation.plot import plot_evaluation
from matryoshka_lora.evaluation.results import Evaluation, Metric, TaskResult, aurac
from matryoshka_lora.evaluation.tasks import convert_examples, convert_task


@pytest.mark.parametrize(
    ("accuracies", "ranks", "axis", "expected"),
    [
        ([0.4, 0.6], [1, 2], "log2", 0.5),
        ([0.0, 0.5, 1.0], [1, 2, 4], "log2", 0.5),
        ([0.0, 0.5, 1.0], [1, 2, 4], "linear", (0.25 + 1.5) / 3),
        ([0.2, 0.4, 0.4, 0.8], [1, 2, 8, 16], "log2", (0.3 + 0.8 + 0.6) / 4),
        ([0.3], [8], "linear", 0.3),
        ([50, 50, 50], [64, 128, 256], "linear", 50),
    ],
)
def test_aurac_is_the_trapezoidal_rule(
    accuracies: list[float], ranks: list[int], axis: Any, expected: float
) -> None:
    assert aurac(accuracies, ranks, axis) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("accuracies", "ranks", "axis", "keyword"),
    [
        ([0.1], [1, 2], "log2", "accuracies"),
        ([0.1, math.nan], [1, 2], "log2", "accuracies"),
        ([0.1, 0.2], [2, 1], "log2", "ranks"),
        ([0.1, 0.2], [1, 2], "log", "axis"),
    ],
)
def test_aurac_rejects_invalid_arguments(
    accuracies: Any, ranks: Any, axis: Any, keyword: str
) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        aurac(accuracies, ranks, axis)


def test_read_returns_what_was_written(tmp_path: Path) -> None:
    evaluation = new_evaluation("family", "words")
    folder = tmp_path / "lora-evaluation"
    folder.mkdir()
    evaluation.write(folder)
    assert Evaluation.read(folder) == evaluation
    assert Evaluation.read(tmp_path / "lora") == evaluation
    lines = (folder / "examples.jsonl").read_text().split("\n")
    assert len([json.loads(line) for line in lines if line]) == 2 * NUM_EXAMPLES
    (folder / "examples.jsonl").unlink()
    assert Evaluation.read(folder).examples == []


@pytest.mark.parametrize(
    "content", [None, "{", "[]", "{}", "[" * 99_999, '{"settings": {}, "ranks": 3}']
)
def test_read_rejects_damaged_files(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(MatryoshkaError, match=r"evaluation\.json"):
        Evaluation.read(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("settings", {}),
        ("ranks", [2, 1]),
        ("ranks", [1, 16]),
        ("sizes", {"1": "x"}),
        ("tasks", {"family": {}}),
    ],
)
def test_read_rejects_other_fields(field: str, value: object, tmp_path: Path) -> None:
    new_evaluation().write(tmp_path)
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(MatryoshkaError, match="damaged"):
        Evaluation.read(tmp_path)


def test_tasks_are_found_by_name() -> None:
    evaluation = new_evaluation("family", "words")
    assert evaluation.values("words") == {rank: NUM_CORRECT[rank] / 60 for rank in RANKS}
    assert new_evaluation("family").values() == evaluation.values("family")
    for name in (None, "arc"):
        with pytest.raises(MatryoshkaError, match="task"):
            evaluation.values(name)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_differences_are_paired_by_example(higher_is_better: bool) -> None:
    evaluation = new_evaluation(higher_is_better=higher_is_better)
    difference = evaluation.difference(None, 8, 4)
    assert difference is not None
    # The two ranks differ at one example of 60.
    assert difference.value == pytest.approx(1 / 60 if higher_is_better else -1 / 60)
    # With one example more each way, 3 of 62 differ, by 1 in total.
    assert difference.standard_error == pytest.approx(math.sqrt((3 - 1 / 62) / 61 / 62))


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_equal_ranks_have_an_error(higher_is_better: bool) -> None:
    num_correct = dict.fromkeys((0, *RANKS), NUM_EXAMPLES)
    evaluation = new_evaluation(num_correct=num_correct, higher_is_better=higher_is_better)
    difference = evaluation.difference(None, 8, 4)
    assert difference is not None
    assert difference.value == 0
    assert difference.standard_error == pytest.approx(math.sqrt(2 / 61 / 62))
    assert "cannot be told apart" in str(difference)


@pytest.mark.parametrize("reason", ["no examples", "not the mean of the examples"])
def test_unpaired_differences_are_of_independent_values(reason: str) -> None:
    evaluation = new_evaluation()
    metric = evaluation.metric()
    if reason == "no examples":
        evaluation.examples = []
    else:
        metric.values[4] = NUM_CORRECT[4] / 60 + 0.01
    difference = evaluation.difference(None, 8, 4)
    assert difference is not None
    errors = metric.standard_errors
    expected = math.sqrt((errors[8] or 0) ** 2 + (errors[4] or 0) ** 2)
    assert difference.standard_error == pytest.approx(expected)


def test_differences_without_values_or_errors() -> None:
    evaluation = new_evaluation()
    evaluation.examples = []
    metric = evaluation.metric()
    metric.standard_errors[8] = None
    difference = evaluation.difference(None, 8, 4)
    assert difference is not None
    assert difference.standard_error is None
    metric.values[8] = None
    assert evaluation.difference(None, 8, 4) is None


def harness_results(accuracy: object, **metrics: object) -> dict[str, Any]:
    """Return results of a task "t" as the harness's ``evaluate`` returns them."""
    return {
        "results": {"t": {"alias": "t", "acc,none": accuracy, "acc_stderr,none": "N/A", **metrics}},
        "n-samples": {"t": {"original": 9, "effective": 5}},
        "n-shot": {"t": 3},
        "higher_is_better": {"t": {"acc": True}},
    }


def test_convert_task_keeps_finite_numbers() -> None:
    results = {
        0: harness_results(np.float32(0.5)),
        1: harness_results(0.5),
        2: harness_results(math.nan),
    }
    metric = Metric(True, {0: 0.5, 1: 0.5, 2: None}, {0: None, 1: None, 2: None})
    expected = TaskResult(5, 3, "acc,none", {"acc,none": metric})
    assert convert_task("t", results) == expected
    with pytest.raises(MatryoshkaError, match="metric"):
        convert_task("t", {1: harness_results("none")})


def test_the_primary_metric_is_the_first_one_that_is_not_zero() -> None:
    results = {
        rank: harness_results(0.0, **{"loss,none": loss}) for rank, loss in ((0, 2.0), (1, 1.0))
    }
    assert convert_task("t", results).primary_metric == "loss,none"


@pytest.mark.parametrize(
    ("target", "responses", "arguments", "expected"),
    [
        (1, [[(-3.0, False)], [(-2.0, False)]], [("q", " a"), ("q", " b")], (" b", " b")),
        ("b", [[(-3.0, False)], [(-2.0, False)]], [("q a", " b"), ("q c", " b")], ("b", "q c")),
        ("x", [["text"]], [("q", {"until": []})], ("x", "text")),
        ("x", [[-3.5]], [("q",)], ("x", "-3.5")),
        (5, [["5"]], [("q", {})], ("5", "5")),
    ],
)
def test_convert_examples(
    target: Any, responses: Any, arguments: Any, expected: tuple[str, str]
) -> None:
    sample = {
        "doc_id": 3,
        "target": target,
        "resps": responses,
        "arguments": arguments,
        "metrics": ["acc", "list"],
        "acc": 1.0,
        "list": [1, 2],
        "filter": "none",
    }
    strict_sample = {**sample, "filter": "strict", "acc": 0.0}
    (example,) = convert_examples("t", {1: [sample], 2: [sample, strict_sample]})
    assert (example.target, example.answers[1]) == expected
    assert example.metrics == {"acc,none": {1: 1.0, 2: 1.0}, "acc,strict": {2: 0.0}}


def test_the_plot_has_a_curve_for_each_task(tmp_path: Path) -> None:
    evaluation = new_evaluation("family", "words")
    metric = evaluation.metric("family")
    metric.values[2] = metric.standard_errors[2] = None
    plot_evaluation(evaluation, tmp_path / "curve.png")
    image = Image.open(tmp_path / "curve.png").convert("RGB")
    assert image.size == (1080, 600)
    for color in ((0, 114, 178), (230, 159, 0)):
        num_pixels = sum(count for count, pixel in image.getcolors(10**6) if pixel == color)
        assert num_pixels > 50


def _blue_rows(file: Path) -> list[int]:
    """Return the rows of the pixels of the curve, and of its mark in the legend, of 600."""
    image = Image.open(file).convert("RGB")
    rows = []
    for y in range(image.height):
        columns = [x for x in range(image.width) if image.getpixel((x, y)) == (0, 114, 178)]
        rows += [y] * len(columns)
    return rows


def test_a_base_model_far_away_does_not_flatten_the_curve(tmp_path: Path) -> None:
    evaluation = new_evaluation()
    evaluation.metric("family").values[0] = -100.0
    plot_evaluation(evaluation, tmp_path / "curve.png")
    rows = _blue_rows(tmp_path / "curve.png")
    assert max(rows) - min(rows) > 300


def test_the_evaluation_of_one_task_has_a_column_per_metric() -> None:
    header, base, *rows = repr(two_metrics()).splitlines()
    assert header.split() == ["rank", "size", "acc", "loss"]
    assert base.split() == ["base", "0.250", "0.250"]
    assert rows[0].split() == ["1", "1.00kB", "0.500", "±", "0.050", "2.000"]
    assert rows[1].split() == ["2", "2.00kB", "1.500"]
    assert "5 shots" in rows[3]


def test_the_evaluation_of_several_tasks_has_a_column_per_task() -> None:
    lines = repr(two_metrics(num_tasks=2, with_base=False)).splitlines()
    assert lines[0].split() == ["rank", "size", "task0", "task1"]
    assert lines[1].split()[0] == "1"


@pytest.mark.parametrize("sign", [1, -1])
def test_the_axis_of_the_plot_contains_0(sign: int, tmp_path: Path) -> None:
    evaluation = new_evaluation()
    values: dict[int, float | None] = {1: 0.95 * sign, 2: 0.96 * sign, 4: 0.965 * sign, 8: sign}
    evaluation.tasks["family"].metrics["acc,none"] = Metric(True, values, dict.fromkeys(RANKS))
    plot_evaluation(evaluation, tmp_path / "curve.png")
    first, middle, last = np.quantile(_blue_rows(tmp_path / "curve.png"), [0.1, 0.5, 0.9])
    assert last - first < 60  # close values are close in the picture
    assert middle < 150 if sign == 1 else middle > 450
