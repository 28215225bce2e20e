"""Print constraints for pip: the oldest versions that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PACKAGES = ("numpy", "torch", "peft", "transformers", "trl", "datasets")
# Newer versions need NumPy 2, and do not declare it.
OTHER_CONSTRAINTS = ("pyarrow==21.*",)
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def lower_bound(package: str) -> str:
    """Return the lower bound of a package's version."""
    requirements = list(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        requirements += extra
    matches = [re.match(rf"{package}>=([\d.]+)", requirement) for requirement in requirements]
    (bound,) = {match[1] for match in matches if match}
    return bound


if __name__ == "__main__":
    for package in PACKAGES:
        print(f"{package}=={lower_bound(package)}.*")
    print(*OTHER_CONSTRAINTS, sep="\n")
