"""Tables and lines of the results' texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matryoshka_lora.errors import printable


def format_table(
    rows: Sequence[Sequence[str]], indent: str = "  ", left_aligned: int = 0
) -> list[str]:
    """Return the lines of a table with right-aligned columns.

    Args:
        rows: The cells, with a heading as the first row.
        indent: The beginning of each line.
        left_aligned: The number of columns at the end that are aligned on the left.
    """
    # Not at the top: its import would slow down `matryoshka --help`.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heading, *body = rows
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=bool(indent))
    for index, name in enumerate(heading):
        is_left_aligned = index >= len(heading) - left_aligned
        table.add_column(Text(name), justify="left" if is_left_aligned else "right", no_wrap=True)
    for row in body:
        table.add_row(*map(Text, row))
    # Lines are not broken: a pipe has no width, and names of layers are long.
    console = Console(width=10_000, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def join_lines(lines: Iterable[str]) -> str:
    """Join lines, with control characters in them escaped."""
    return "\n".join(map(printable, lines))


def format_percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.1f}%"
