"""The pictures of the documentation are those that `python -m research.figures` draws."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from research import figures
from research.plan import Result


def words(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def points(svg: str) -> list[float]:
    """Return every number of where something lies."""
    places = re.findall(r' (?:d|x|y|points|transform|width|height)="([^"]*)"', svg)
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    return [float(found) for place in places for found in re.findall(number, place)]


def same(one: str, other: str) -> bool:
    """Return whether pictures agree; another matplotlib sets words a little otherwise."""
    ours, theirs = points(one), points(other)
    near = len(ours) == len(theirs) and all(
        abs(a - b) < 1 for a, b in zip(ours, theirs, strict=True)
    )
    return words(one) == words(other) and near


@pytest.mark.slow
def test_the_pictures_are_those_of_the_files() -> None:
    drawn = dict(figures.files())
    assert sorted(drawn) == sorted(path.name for path in figures.OUT.iterdir())
    for name, data in drawn.items():
        assert same((figures.OUT / name).read_text(encoding="utf-8"), data.decode()), name


def test_another_run_makes_another_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    real = figures.curves("every256")

    def changed(result: Result) -> Result:
        first, *rest = result.curve.accuracy
        return replace(result, curve=replace(result.curve, accuracy=(first / 2, *rest)))

    monkeypatch.setattr(figures, "curves", lambda study: tuple(map(changed, real)))
    (drawn,) = [data for name, data in figures.files("face") if name == "face-light.svg"]
    assert not same((figures.OUT / "face-light.svg").read_text(encoding="utf-8"), drawn.decode())
