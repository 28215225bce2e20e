"""Make README.md and pyproject.toml those of a release, for a package index::

    python tools/release_metadata.py https://github.com/OWNER/NAME v0.5.0

An index shows README without the files next to it. So links become addresses in the repository at
the tag, a picture with a dark variant becomes the light one, and the project gets its links.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

_PICTURE = re.compile(r'<picture>.*?<img src="([^"]+)" alt="([^"]*)"></picture>', re.DOTALL)
_RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def readme_for_index(readme: str, repository: str, tag: str) -> str:
    """Return README with absolute links and plain pictures."""

    def absolute(match: re.Match[str]) -> str:
        mark, text, path = match.groups()
        return f"{mark}[{text}]({repository}/{'raw' if mark else 'blob'}/{tag}/{path})"

    return _RELATIVE.sub(absolute, _PICTURE.sub(r"![\2](\1)", readme))


def project_urls(repository: str, tag: str) -> str:
    """Return the table of pyproject.toml with the project's links."""
    return (
        f'\n[project.urls]\nRepository = "{repository}"\n'
        f'Documentation = "{repository}/blob/{tag}/docs/index.md"\n'
        f'Changelog = "{repository}/blob/{tag}/CHANGELOG.md"\nIssues = "{repository}/issues"\n'
    )


def main() -> None:
    """Rewrite both files."""
    repository, tag = sys.argv[1:]
    readme, project = ROOT / "README.md", ROOT / "pyproject.toml"
    text = readme_for_index(readme.read_text(encoding="utf-8"), repository, tag)
    readme.write_text(text, encoding="utf-8")
    with project.open("a", encoding="utf-8") as file:
        file.write(project_urls(repository, tag))


if __name__ == "__main__":
    main()
