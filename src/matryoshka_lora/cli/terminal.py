"""Print lines in the terminal."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path

import typer

from matryoshka_lora.errors import printable


def print_loading() -> None:
    """Print a loading notice to stderr."""
    typer.echo("Loading libraries and model", err=True)


def print_line(line: str, err: bool = False) -> None:
    """Print one line, with control characters escaped: it may hold a name from a file."""
    typer.echo(printable(line), err=err)


def print_next(*words: object) -> None:
    """Print the command that a user may want to run next.

    A `Path` that begins with a dash gets ``./`` before it.
    """
    arguments = [
        f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
        for word in words
    ]
    print_line(f"Next: {shlex.join(['matryoshka', *arguments])}")


def revision_option(revision: str | None) -> list[str]:
    """Return the option of a revision for `print_next`."""
    return ["--revision", revision] if revision else []


def is_main_process() -> bool:
    """Return whether this is the first process of `accelerate launch`, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def with_flags(message: str, options: Collection[str]) -> str:
    """Return the message of a Python function with its parameters written as options.

    The parameters are in backticks: "`max_bytes`" becomes "--max-bytes", "`force=True`" becomes
    "--force", and "`format='ladder'`" becomes "--format ladder". Other backticks stay.

    Args:
        message: The message.
        options: The Python names of the options, such as ``"max_bytes"``.
    """

    def replace(match: re.Match[str]) -> str:
        name, _, value = match[1].partition("=")
        if name not in options:
            return match[0]
        option = "--" + name.replace("_", "-")
        value = value.strip("'")
        return option if value in ("", "True") else f"{option} {value}"

    return re.sub("`([^`]*)`", replace, message)
