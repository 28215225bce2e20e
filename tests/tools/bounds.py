"""Fail where a module of the package is above 450 lines, or a function above 60.

    python tests/tools/bounds.py [FOLDER]

A function's docstring does not count. `make lint` runs this.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 60

SOURCE = Path(__file__).parents[2] / "src"


def function_lengths(text: str) -> Iterator[tuple[str, int]]:
    """Yield the name of each function of a module, and its number of lines."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node):
                docstring = node.body[0]
                length -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
            yield node.name, length


def violations(folder: Path) -> list[str]:
    """Return a message for each module and function of a folder that is too long."""
    messages = []
    for file in sorted(folder.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        num_lines = len(text.splitlines())
        if num_lines > MAX_MODULE_LINES:
            messages.append(f"{file} has {num_lines} lines, above {MAX_MODULE_LINES}.")
        for name, length in function_lengths(text):
            if length > MAX_FUNCTION_LINES:
                messages.append(f"{file}: {name} has {length} lines, above {MAX_FUNCTION_LINES}.")
    return messages


if __name__ == "__main__":
    messages = violations(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE)
    for message in messages:
        print(message)
    sys.exit(bool(messages))
