"""Tables and lines of the results' texts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import median_low

from matryoshka_lora.errors import printable
from matryoshka_lora.units import format_size


def with_name(name: str, reason: str) -> str:
    """Return why something with a name failed. Most reasons begin with its path already."""
    begins_with_path = re.match(rf"(.*[/\\])?{re.escape(name)}(?!\w)", reason)
    return reason if begins_with_path else f"{name}: {reason}"


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


def format_value(value: float | None, standard_error: float | None) -> str:
    """Return a value with its standard error; "" for None."""
    if value is None:
        return ""
    return f"{value:.3f}" if standard_error is None else f"{value:.3f} ± {standard_error:.3f}"


def format_range(values: Iterable[float]) -> str:
    """Return the smallest and the largest value, such as ``"2 to 8"``."""
    values = list(values)
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def format_ranks(ranks: Iterable[int]) -> str:
    """Return ranks in words, such as ``"rank 8"`` or ``"ranks from 2 to 8"``."""
    text = format_range(ranks)
    return f"ranks from {text}" if " to " in text else f"rank {text}"


LARGE_ERROR = "* A large error: above 70%, or twice the error of most of the others."
"""The meaning of the mark in `mark_large_errors`."""


def mark_large_errors(errors: Sequence[float]) -> list[str]:
    """Return the error of each LoRA of a folder in percent, with a mark where it is large."""
    limit = max(0.2, min(0.7, 2 * median_low(errors)))
    return [format_percent(error) + (" *" if error > limit else "") for error in errors]


def format_errors(
    errors: Mapping[int, float],
    whole: str,
    sizes: Mapping[int, int] | None = None,
    trained_ranks: Collection[int] = (),
    weighted_errors: Mapping[int, float] | None = None,
) -> list[str]:
    """Return a table of the relative error, and of the file size, at each rank.

    Args:
        errors: The relative error by rank.
        whole: What the error is relative to, such as ``"update"``.
        sizes: The size in bytes by rank.
        trained_ranks: The ranks that were trained, so that they minimise the loss.
        weighted_errors: The weighted error by rank, if examples have weighted the order.
    """
    columns = {
        "rank": [str(rank) for rank in errors],
        "size": [format_size(sizes[rank]) for rank in errors] if sizes else [],
        "weighted": [format_percent(weighted_errors[rank]) for rank in errors]
        if weighted_errors
        else [],
        "error": [format_percent(error) for error in errors.values()],
        "kept": [
            "trained" if rank in trained_ranks else format_percent(1 - error**2)
            for rank, error in errors.items()
        ],
    }
    rows = zip(*([name, *cells] for name, cells in columns.items() if cells), strict=True)
    lines = format_table(list(rows))
    if weighted_errors:
        lines.append("  weighted: the error, weighted by what changes the outputs, see `reorder`")
    if trained_ranks:
        lines.append("  trained: the rank minimises the loss, and not the error")
    return [
        *lines,
        f"  error: norm of what is truncated, relative to the norm of the {whole}",
        f"  kept: share of the squared norm of the {whole}",
    ]
