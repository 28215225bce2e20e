"""The figures of the documentation are those that `python -m research.figures` draws."""

from __future__ import annotations

import re

import pytest

from research import figures


def texts(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def numbers(svg: str) -> list[float]:
    """Return all numbers of positions and sizes."""
    attributes = re.findall(r' (?:d|x|y|points|transform|width|height)="([^"]*)"', svg)
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    return [float(match) for text in attributes for match in re.findall(number, text)]


def look_the_same(svg: str, other_svg: str) -> bool:
    """Compare two figures; another version of matplotlib sets texts a little differently."""
    positions = numbers(svg)
    other_positions = numbers(other_svg)
    if texts(svg) != texts(other_svg) or len(positions) != len(other_positions):
        return False
    return all(abs(a - b) < 1 for a, b in zip(positions, other_positions, strict=True))


@pytest.mark.slow
def test_figures_are_those_of_the_files() -> None:
    drawn = dict(figures.files())
    assert sorted(drawn) == sorted(path.name for path in figures.OUTPUT.glob("*.svg"))
    for name, content in drawn.items():
        written = (figures.OUTPUT / name).read_text(encoding="utf-8")
        assert look_the_same(written, content.decode()), name


def test_a_moved_point_is_another_figure() -> None:
    written = (figures.OUTPUT / "face-light.svg").read_text(encoding="utf-8")
    moved = re.sub(r"\nL (\d+)", lambda match: f"\nL {int(match[1]) + 2}", written, count=1)
    assert moved != written
    assert look_the_same(written, written)
    assert not look_the_same(written, moved)
