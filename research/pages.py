"""Headings, paragraphs, tables and a picture, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

PICTURE = "study.png"
"""The picture's file, and the block that stands for it."""


@dataclass(frozen=True)
class Table:
    """Cells of text; rows are as long as the heading."""

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]

    def numeric(self) -> list[bool]:
        """Which columns hold nothing but numbers; the first one names the rows."""
        number = re.compile(r"([-+]?\d[\d,.]*( ± [\d.]+)?)?")
        return [n > 0 and all(number.fullmatch(row[n]) for row in self.rows) for n in range(len(self.heading))]


Block = tuple[int, str] | Table | str
"""A heading with its level, a table, `PICTURE` or a paragraph."""


def markdown(blocks: Sequence[Block]) -> str:
    """Blocks as Markdown, in which no text of theirs is markup."""

    def plain(text: str) -> str:
        return re.sub(r"([\\`*<|~\[\]])", r"\\\1", " ".join(text.split()))

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(plain, cells))} |"

    found = []
    for block in blocks:
        if isinstance(block, tuple):
            found.append(f"{'#' * block[0]} {plain(block[1])}")
        elif isinstance(block, Table):
            ruler = line(["---:" if right else "---" for right in block.numeric()])
            found.append("\n".join([line(block.heading), ruler, *map(line, block.rows)]))
        else:
            image = f"![Accuracy and loss of each task against rank]({PICTURE})"
            found.append(image if block == PICTURE else plain(block))
    return "\n\n".join(found) + "\n"
