"""Fill the pages of the site that come from code, and fit links and pictures to the site."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]+)\)")
_PICTURE = re.compile(
    r'<picture>\n<source [^>]*srcset="([^"]+)">\n<img alt="([^"]*)" src="([^"]+)">\n</picture>'
)
_TYPER = ["-m", "typer", "matryoshka_lora.cli", "utils", "docs", "--name", "matryoshka"]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page as the site shows it."""
    if "<!-- command line -->" in markdown:
        markdown = markdown.replace("<!-- command line -->", command_line())
    # GitHub chooses by the reader's system, the site by its own button.
    markdown = _PICTURE.sub(r"![\2](\3#only-light)\n![\2](\1#only-dark)", markdown)
    # What lies outside docs/ is no part of the site.
    return _LINK.sub(r"\1", markdown)


def command_line() -> str:
    """Return every verb and option, as typer writes them."""
    made = subprocess.run(
        [sys.executable, *_TYPER], capture_output=True, text=True, check=True, cwd=ROOT
    )
    _, _, verbs = made.stdout.partition("\n## ")
    return html.unescape(f"## {verbs}")
