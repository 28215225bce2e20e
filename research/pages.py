"""Headings, paragraphs, tables and a picture, as Markdown and as one page of HTML."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

PICTURE = "study.png"
"""The picture's file, and the block that stands for it."""

_PICTURE_TEXT = "Accuracy and loss of each task against rank"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0 auto; max-width: 76rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #222 }}
h1, h2, h3 {{ line-height: 1.2; overflow-wrap: anywhere }} h2 {{ border-top: 1px solid #ccc; padding-top: 1rem }}
p {{ max-width: 48rem }} .wide {{ overflow-x: auto; margin: 1rem 0 }} img {{ width: 100%; min-width: 40rem }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }}
th:first-child {{ position: sticky; left: 0; background: #fff; max-width: 40vw; overflow-wrap: anywhere }}
.n {{ text-align: right; white-space: nowrap }}
</style></head>
<body>
{body}
</body></html>
"""


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
            found.append(f"![{_PICTURE_TEXT}]({PICTURE})" if block == PICTURE else plain(block))
    return "\n\n".join(found) + "\n"


def page(title: str, blocks: Sequence[Block], picture: bytes) -> str:
    """Blocks as a page that needs no other file: the picture, a PNG, is in it."""

    def line(cells: Sequence[str], numeric: Sequence[bool], tag: str) -> str:
        tags = ["th", *[tag] * (len(cells) - 1)]
        found = zip(tags, (' class="n"' if right else "" for right in numeric), map(escape, cells), strict=True)
        return f"<tr>{''.join(f'<{tag}{style}>{cell}</{tag}>' for tag, style, cell in found)}</tr>"

    image = f'<img alt="{_PICTURE_TEXT}" src="data:image/png;base64,{base64.b64encode(picture).decode("ascii")}">'
    found = []
    for block in blocks:
        if isinstance(block, tuple):
            found.append(f"<h{block[0]}>{escape(block[1])}</h{block[0]}>")
        elif isinstance(block, Table):
            head = line(block.heading, block.numeric(), "th")
            rows = "\n".join(line(row, block.numeric(), "td") for row in block.rows)
            table = f"<table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
            found.append(f'<div class="wide">{table}</div>')
        else:
            found.append(f'<div class="wide">{image}</div>' if block == PICTURE else f"<p>{escape(block)}</p>")
    return _PAGE.format(title=escape(title), body="\n".join(found))
