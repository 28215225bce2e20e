"""Prints constraints for pip: the oldest peft, transformers and trl that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"].values()
REQUIREMENTS = [*PROJECT["dependencies"], *(line for lines in EXTRAS for line in lines)]


def oldest(name: str) -> str:
    """The lower bound of a package, as pip wants it pinned."""
    (bound,) = {found[1] for line in REQUIREMENTS if (found := re.match(rf"{name}>=([\d.]+)", line))}
    return f"{name}=={bound}.*"


if __name__ == "__main__":
    print(*map(oldest, ("peft", "transformers", "trl")), sep="\n")
