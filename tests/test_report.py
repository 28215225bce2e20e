"""The picture and the page, which are read back."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

from PIL import Image
from test_results import RANKS, RIGHT, new_evaluation

from matryoshka_lora.evaluation import report


class Reader(HTMLParser):
    """Collects cells, pictures, and tags that are not closed in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "!doctype"):
            self.open.append(tag)
        self.outside += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


def test_the_page_shows_the_table() -> None:
    evaluation = new_evaluation("family", "words")
    (table,) = [text for tag, text in read(report.page(evaluation)).texts if tag == "pre"]
    for rank in RANKS:
        assert f"{RIGHT[rank] / 60:.3f} ± " in table


def test_the_page_needs_nothing_else_and_runs_nothing() -> None:
    page = report.page(new_evaluation(adapter="<script>alert(1)</script>"))
    assert "<script" not in page
    assert read(page).outside[0].startswith("data:image/png;base64,")
    assert len(read(page).outside) == 1
    assert "color-scheme: light dark" in page


def test_the_page_holds_the_picture(tmp_path: Path) -> None:
    evaluation = new_evaluation("family", "words")
    report.draw(evaluation, tmp_path / "curve.png")
    found = re.search(r"base64,([^\"]+)", report.page(evaluation))
    assert found is not None
    inside = Image.open(BytesIO(base64.b64decode(found[1])))
    alone = Image.open(tmp_path / "curve.png")
    assert inside.size == alone.size == (1080, 600)
    assert inside.tobytes() == alone.tobytes()
    for colour in ((0, 114, 178), (230, 159, 0)):  # each task's curve is drawn
        assert (
            sum(count for count, each in alone.convert("RGB").getcolors(10**6) if each == colour)
            > 50
        )


def test_a_value_that_is_missing_is_left_out() -> None:
    evaluation = new_evaluation()
    metric = evaluation.metric()
    metric["value"][2] = metric["stderr"][2] = None
    evaluation.tasks["family"]["aurac"] = None
    read(report.page(evaluation))
