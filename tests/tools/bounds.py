"""Count the house and fail where it outgrows its bounds: ``make lint`` runs this.

python tests/tools/bounds.py [ROOT]
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


class Bound(NamedTuple):
    """What was counted, and the most that it may be."""

    name: str
    value: int
    limit: int
    where: str = ""


def code_lines(text: str) -> int:
    """Return how many lines hold code: no blank lines, comments or docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def functions(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines, but for the docstring, and the place of each function of a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = node.body[0] if ast.get_docstring(node) else None
            documented = text.end_lineno - text.lineno + 1 if text else 0
            yield node.end_lineno - node.lineno + 1 - documented, f"{file.name}:{node.name}"


def lines_of(files: Iterable[Path]) -> int:
    """Return how many lines some files have together."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def code_of(files: Iterable[Path]) -> int:
    """Return how many lines of code some files have together."""
    return sum(code_lines(file.read_text(encoding="utf-8")) for file in files)


def bounds(root: Path) -> list[Bound]:
    """Count a tree that has the folders src, tests, research and docs."""
    src = sorted(root.glob("src/**/*.py"))
    pages = sorted(root.glob("docs/**/*.md"))
    largest = max(((lines_of([file]), file.name) for file in src), default=(0, ""))
    longest = max((found for file in src for found in functions(file)), default=(0, ""))
    return [
        Bound("files in src", len(src), 40),
        Bound("lines in src", lines_of(src), 7_000),
        Bound("lines of code in src", code_of(src), 4_800),
        Bound("lines of the largest file in src", largest[0], 450, largest[1]),
        Bound("lines of the longest function in src", longest[0], 60, longest[1]),
        Bound("lines in tests", lines_of(root.glob("tests/**/*.py")), 9_600),
        Bound("lines of code in research", code_of(root.glob("research/**/*.py")), 3_000),
        Bound("pages in docs", len(pages), 16),
        Bound("words in docs", sum(len(page.read_text().split()) for page in pages), 9_000),
    ]


def main(root: Path) -> int:
    """Print the table, and return how many bounds are broken."""
    found = bounds(root)
    for bound in found:
        mark = "  TOO MANY" if bound.value > bound.limit else ""
        print(f"{bound.name:38}{bound.value:6,} of {bound.limit:6,}  {bound.where}{mark}")
    return sum(bound.value > bound.limit for bound in found)


if __name__ == "__main__":
    sys.exit(bool(main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))))
