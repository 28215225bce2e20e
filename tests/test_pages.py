"""The numbers of README, docs and research/README come from recorded files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from research.blocks import BLOCKS
from research.pages import BLOCK, PAGES, ROOT, generate

RESULT_PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "docs/results.md",
        "docs/performance.md",
        "docs/combine.md",
        "docs/extract.md",
        "research/README.md",
    )
]
"""In these pages every number in a table is a result."""

_MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_TABLE = re.compile(r"^\|.*(?:\n\|.*)+", re.MULTILINE)
_CODE = re.compile(r"`[^`]*`")
_INTERVAL = re.compile(r"\d ± \d")

result_pages = pytest.mark.parametrize("page", RESULT_PAGES, ids=lambda page: page.name)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_blocks_are_current(page: Path) -> None:
    assert generate(read(page)) == read(page), "run python -m research.pages"


def test_markers_and_block_functions_correspond() -> None:
    markers: list[str] = []
    for page in PAGES:
        text = read(page)
        markers += _MARKER.findall(text)
        assert len(_MARKER.findall(text)) == text.count("<!-- end -->") == len(BLOCK.findall(text))
    assert sorted(markers) == sorted(BLOCKS)


@result_pages
def test_tables_of_results_are_generated(page: Path) -> None:
    written_by_hand = BLOCK.sub("", read(page))
    for table in _TABLE.findall(written_by_hand):
        assert not re.search(r"\d", _CODE.sub("", table)), table


@result_pages
def test_intervals_are_generated(page: Path) -> None:
    assert not _INTERVAL.search(BLOCK.sub("", read(page)))
