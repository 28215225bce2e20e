"""The generated blocks of README and docs: tables, and sentences with numbers.

A module has the blocks of one page or two. Each block is a function without arguments, which
returns Markdown; its name is the name of the block.
"""

from __future__ import annotations

from research.blocks import (
    command_line,
    concepts,
    families,
    file_verbs,
    performance,
    pictures,
    readme,
    reordering,
    repeat,
    results,
    searches,
    serve,
)
from research.blocks.shared import BLOCKS

__all__ = [
    "BLOCKS",
    "command_line",
    "concepts",
    "families",
    "file_verbs",
    "performance",
    "pictures",
    "readme",
    "reordering",
    "repeat",
    "results",
    "searches",
    "serve",
]
