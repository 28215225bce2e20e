"""AURAC, differences between ranks, and the files of an evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.evaluation.results import Evaluation, aurac, draw, examples, summary

RANKS = (1, 2, 4, 8)
RIGHT = {0: 20, 1: 20, 2: 40, 4: 56, 8: 57}  # of 60 questions: the first ones


def new_evaluation(
    *names: str, right: dict[int, int] = RIGHT, higher: bool | None = True, **more: Any
) -> Evaluation:
    """Return an evaluation of 60 questions in which rank r answers the first ``right[r]``."""
    found = Evaluation(
        {"adapter": "runs/lora", **more}, RANKS, {rank: 100 * rank for rank in RANKS}
    )
    for name in names or ("family",):
        value = {rank: count / 60 for rank, count in right.items()}
        error = {rank: math.sqrt(v * (1 - v) / 59) for rank, v in value.items()}
        metric = {"higher_is_better": higher, "value": value, "stderr": error}
        area = aurac([value[rank] for rank in RANKS], RANKS)
        task = {"items": 60, "num_fewshot": 2, "metric": "acc,none", "aurac": area}
        found.tasks[name] = {**task, "metrics": {"acc,none": metric}}
        for n in range(60):
            scores = {"acc,none": {str(rank): float(n < count) for rank, count in right.items()}}
            said = {str(rank): f"answer {n} of <{rank}>" for rank in right}
            line = {"task": name, "doc_id": n, "prompt": f"question {n}\u2028?", "target": "<b>"}
            found.examples.append({**line, "answers": said, "metrics": scores})
    return found


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
def test_aurac_is_the_trapezoid_rule(
    accuracies: list[float], ranks: list[int], axis: Any, expected: float
) -> None:
    assert aurac(accuracies, ranks, axis) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("accuracies", "ranks", "axis", "said"),
    [
        ([0.1], [1, 2], "log2", "not one finite accuracy for each"),
        ([0.1, 0.2], [2, 1], "log2", "they must increase"),
        ([0.1, math.nan], [1, 2], "log2", "not one finite accuracy"),
        ([0.1, 0.2], [1, 2], "log", "write 'log2' or 'linear'"),
    ],
)
def test_what_has_no_area(accuracies: Any, ranks: Any, axis: Any, said: str) -> None:
    with pytest.raises(MatryoshkaError, match=said):
        aurac(accuracies, ranks, axis)


def test_files_are_read_back_as_they_were(tmp_path: Path) -> None:
    """Also with a separator of lines in a question, as Unicode has some."""
    evaluation = new_evaluation("family", "words")
    folder = tmp_path / "lora-evaluation"
    folder.mkdir()
    evaluation.write(folder)
    for place in (folder, tmp_path / "lora"):
        assert Evaluation.read(place) == evaluation
    lines = (folder / "examples.jsonl").read_text().split("\n")
    assert len([json.loads(line) for line in lines if line]) == 120
    (folder / "examples.jsonl").unlink()
    assert Evaluation.read(folder).examples == []


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no evaluation in"), ("{", "damaged"), ("[]", "damaged"), ("{}", "damaged")],
)
def test_what_is_no_evaluation(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(MatryoshkaError, match=said):
        Evaluation.read(tmp_path)


def test_tasks_and_metrics_are_found_by_name() -> None:
    evaluation = new_evaluation("family", "words")
    with pytest.raises(MatryoshkaError, match=r"has several tasks; name one .*: family, words"):
        evaluation.values()
    with pytest.raises(MatryoshkaError, match="has no task 'arc'"):
        evaluation.values("arc")
    expected = {rank: RIGHT[rank] / 60 for rank in RANKS}
    assert evaluation.values("words") == expected


@pytest.mark.parametrize("higher", [True, False])
def test_differences_are_paired_by_question(higher: bool) -> None:
    found = new_evaluation(higher=higher).difference(None, 8, 4)
    assert found is not None
    # One question of 60 is all that differs.
    assert found.value == pytest.approx(1 / 60 if higher else -1 / 60)
    assert found.error == pytest.approx(math.sqrt((1 / 60 - 1 / 3600) / 59))


def test_without_its_questions_a_difference_is_of_independent_values() -> None:
    evaluation = new_evaluation()
    evaluation.examples = []
    metric = evaluation.metric()
    found = evaluation.difference(None, 8, 4)
    assert found is not None
    assert found.error == pytest.approx(math.hypot(metric["stderr"][8], metric["stderr"][4]))
    metric["stderr"][8] = None
    assert evaluation.difference(None, 8, 4) == (found.value, None)
    metric["value"][8] = None
    assert evaluation.difference(None, 8, 4) is None


def test_a_metric_that_is_no_mean_is_not_paired() -> None:
    evaluation = new_evaluation()
    evaluation.metric()["value"][4] += 0.01
    stderr, found = evaluation.metric()["stderr"], evaluation.difference(None, 8, 4)
    assert found is not None
    assert found.error == pytest.approx(math.hypot(stderr[8], stderr[4]))


def test_the_table_tells_each_rank() -> None:
    lines = new_evaluation("family", "words").lines()
    assert lines[0].split() == ["rank", "size", "family", "words"]
    assert lines[1].split()[:2] == ["base", "0.333"]
    assert [line.split()[0] for line in lines[2:6]] == ["1", "2", "4", "8"]
    assert "0.933 ± 0.032" in lines[4]
    assert lines[6] == "family: acc,none, 60 questions, 2 shots"


def judged(value: float, **more: Any) -> dict[str, Any]:
    """Return what the harness' ``evaluate`` gives, as far as it is read."""
    results = {"alias": "t", "acc,none": value, "acc_stderr,none": "N/A", **more}
    counts = {"t": {"original": 9, "effective": 5}}
    about = {"n-shot": {"t": 3}, "versions": {"t": 1.0}, "higher_is_better": {"t": {"acc": True}}}
    return {"results": {"t": results}, "n-samples": counts, **about}


def test_a_summary_has_numbers_alone() -> None:
    found = summary("t", {0: judged(np.float32(0.5)), 1: judged(0.5), 2: judged(math.nan)})
    assert found == {
        "items": 5,
        "num_fewshot": 3,
        "metric": "acc,none",
        "aurac": None,
        "metrics": {
            "acc,none": {
                "higher_is_better": True,
                "value": {0: 0.5, 1: 0.5, 2: None},
                "stderr": {0: None, 1: None, 2: None},
            }
        },
    }
    json.dumps(found, allow_nan=False)
    zeros = [judged(0.0, **{"loss,none": loss}) for loss in (2.0, 1.0)]  # no answer is right
    assert summary("t", {0: zeros[0], 1: zeros[1]})["metric"] == "loss,none"
    with pytest.raises(MatryoshkaError, match="no metric that is a number"):
        summary("t", {1: judged("none")})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "resps", "arguments", "expected"),
    [
        (1, [[(-3.0, False)], [(-2.0, False)]], [("q", " a"), ("q", " b")], (" b", " b")),
        ("b", [[(-3.0, False)], [(-2.0, False)]], [("q a", " b"), ("q c", " b")], ("b", "q c")),
        ("x", [["text"]], [("q", {"until": []})], ("x", "text")),
        ("x", [[-3.5]], [("q",)], ("x", "-3.5")),
        (5, [["5"]], [("q", {})], ("5", "5")),
    ],
)
def test_examples_tell_the_answer_and_the_target(
    target: Any, resps: Any, arguments: Any, expected: tuple[str, str]
) -> None:
    row = {"doc_id": 3, "target": target, "resps": resps, "arguments": arguments}
    row |= {"metrics": ["acc", "list"], "acc": 1.0, "list": [1, 2], "filter": "none"}
    (line,) = examples("t", {1: [row], 2: [row, {**row, "filter": "strict", "acc": 0.0}]})
    assert (line["target"], line["answers"]["1"]) == expected
    assert line["metrics"] == {"acc,none": {"1": 1.0, "2": 1.0}, "acc,strict": {"2": 0.0}}


def test_the_picture_has_each_task_s_curve(tmp_path: Path) -> None:
    evaluation = new_evaluation("family", "words")
    metric = evaluation.metric("family")
    metric["value"][2] = metric["stderr"][2] = None  # a value that is missing is left out
    draw(evaluation, tmp_path / "curve.png")
    picture = Image.open(tmp_path / "curve.png").convert("RGB")
    assert picture.size == (1080, 600)
    for colour in ((0, 114, 178), (230, 159, 0)):
        assert sum(n for n, each in picture.getcolors(10**6) if each == colour) > 50
