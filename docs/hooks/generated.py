"""A hook of mkdocs: insert what comes from code, and adapt links and pictures to the site."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COMMAND_LINE = "<!-- command line -->"

_LINK_OUT_OF_DOCS = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]+)\)")
_PICTURE = re.compile(
    r'<picture>\n<source [^>]*srcset="([^"]+)">\n<img alt="([^"]*)" src="([^"]+)">\n</picture>'
)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page as the site shows it."""
    if COMMAND_LINE in markdown:
        markdown = markdown.replace(COMMAND_LINE, describe_commands())
    # GitHub chooses the picture by the reader's system, and the site by its own button.
    markdown = _PICTURE.sub(r"![\2](\3#only-light)\n![\2](\1#only-dark)", markdown)
    # The site contains no files outside docs/.
    return _LINK_OUT_OF_DOCS.sub(r"\1", markdown)


def describe_commands() -> str:
    """Return all commands and options, as typer writes them."""
    arguments = ["-m", "typer", "matryoshka_lora.cli", "utils", "docs", "--name", "matryoshka"]
    process = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    _, _, commands = process.stdout.partition("\n## ")
    return html.unescape(f"## {commands}")
