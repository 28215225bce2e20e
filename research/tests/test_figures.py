"""The pictures of the documentation are those that `python -m research.figures` draws of the repository's files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import combinations

import pytest
from PIL import Image

from research import figures
from research.looks import DARK, LIGHT, LOOKS, Mode
from research.records import Result


def words(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def points(svg: str) -> list[float]:
    """Every number of where something lies."""
    places = re.findall(r' (?:d|x|y|points|transform|width|height)="([^"]*)"', svg)
    return [float(number) for place in places for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", place)]


def same(one: str, other: str) -> bool:
    """Another matplotlib may set words a little otherwise, which moves everything. Another number moves more."""
    if one == other:
        return True
    ours, theirs = points(one), points(other)
    near = len(ours) == len(theirs) and all(abs(a - b) < 1 for a, b in zip(ours, theirs, strict=True))
    return words(one) == words(other) and near


@pytest.fixture(scope="module")
def drawn() -> dict[str, bytes]:
    return dict(figures.files())


def test_the_pictures_are_those_of_the_files(drawn: dict[str, bytes]) -> None:
    assert sorted(drawn) == sorted(path.name for path in figures.OUT.iterdir())
    for name, data in drawn.items():
        if name.endswith(".svg"):
            there = (figures.OUT / name).read_text(encoding="utf-8")
            assert same(there, data.decode()), f"{name} is of other files: python -m research.figures"


def test_a_png_is_of_the_svg_beside_it(drawn: dict[str, bytes]) -> None:
    for name in (name for name in drawn if name.endswith(".png")):
        svg = (figures.OUT / name).with_suffix(".svg").read_bytes()
        assert Image.open(figures.OUT / name).info["Comment"] == sha256(svg).hexdigest()


def test_the_same_files_give_the_same_bytes(drawn: dict[str, bytes]) -> None:
    assert all(data == drawn[name] for name, data in figures.files("face"))


@pytest.mark.parametrize("picture", ["face", "methods", "tokens"])
def test_another_run_makes_another_picture(
    picture: str, drawn: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = figures.curves

    def changed(study: str) -> Iterator[Result]:
        for result in real(study):
            last = max(0.0, result.curve.accuracy[-1] - 0.05)
            curve = replace(result.curve, accuracy=(*result.curve.accuracy[:-1], last))
            yield replace(result, curve=curve) if result.seed == 1 else result

    monkeypatch.setattr(figures, "curves", lambda study: tuple(changed(study)))
    name = f"{picture}-light.svg"
    assert not same(dict(figures.files(picture))[name].decode(), drawn[name].decode())


def luminance(colour: str) -> float:
    """Of sRGB, as the web's contrast rules define it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [LIGHT, DARK], ids=lambda mode: mode.name)
def test_every_method_is_seen_and_told_apart(mode: Mode) -> None:
    ground = luminance(mode.ground)
    for look in LOOKS.values():
        high, low = sorted((luminance(look.colour(mode)), ground), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3, f"{look.name} can hardly be seen on {mode.ground}"
    for one, other in combinations(LOOKS.values(), 2):
        assert one.name != other.name
        assert one.marker != other.marker
        assert one.colour(mode) != other.colour(mode)
