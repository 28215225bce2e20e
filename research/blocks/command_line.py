"""The block of docs/cli.md."""

from __future__ import annotations

import html
import subprocess
import sys

from research.blocks.shared import block
from research.study import ROOT


@block
def command_line() -> str:
    """All commands and options, as typer writes them."""
    command = ["typer", "matryoshka_lora.cli", "utils", "docs", "--name", "matryoshka"]
    text = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    _, _, commands = text.partition("\n## ")
    return html.unescape(f"\n## {commands}").rstrip() + "\n"
