"""The picture, which is read back."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from test_results import new_evaluation

from matryoshka_lora.evaluation import report


def test_the_picture_has_each_task_s_curve(tmp_path: Path) -> None:
    evaluation = new_evaluation("family", "words")
    metric = evaluation.metric("family")
    metric["value"][2] = metric["stderr"][2] = None  # a value that is missing is left out
    report.draw(evaluation, tmp_path / "curve.png")
    picture = Image.open(tmp_path / "curve.png").convert("RGB")
    assert picture.size == (1080, 600)
    for colour in ((0, 114, 178), (230, 159, 0)):
        assert sum(n for n, each in picture.getcolors(10**6) if each == colour) > 50
