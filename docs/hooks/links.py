"""A hook of mkdocs: adapt links and pictures to the site."""

from __future__ import annotations

import re
from typing import Any

_LINK_OUT_OF_DOCS = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]+)\)")
_PICTURE = re.compile(
    r'<picture>\n<source [^>]*srcset="([^"]+)">\n<img alt="([^"]*)" src="([^"]+)">\n</picture>'
)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page as the site shows it."""
    # GitHub chooses the picture by the reader's system, and the site by its own button.
    markdown = _PICTURE.sub(r"![\2](\3#only-light)\n![\2](\1#only-dark)", markdown)
    # The site contains no files outside docs/.
    return _LINK_OUT_OF_DOCS.sub(r"\1", markdown)
