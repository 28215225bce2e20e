"""Write the generated blocks of README, docs and research/README from the recorded files::

    python -m research.pages        # about ten seconds

A page marks a block with ``<!-- generated: NAME -->`` and ``<!-- end -->``. The functions of
`research.blocks` return the Markdown between them. A test checks that the command changes nothing.
"""

from __future__ import annotations

import re

from research.blocks import BLOCKS
from research.study import ROOT

PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "research").glob("*.md")),
)

BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def generate(text: str) -> str:
    """Return the text of a page with new content in its blocks."""

    def new_block(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        return f"{begin}{BLOCKS[name]()}\n{end}"

    return BLOCK.sub(new_block, text)


def main() -> None:
    """Rewrite the blocks of all pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new_text = generate(text)
        if new_text != text:
            page.write_text(new_text, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} has changed")


if __name__ == "__main__":
    main()
