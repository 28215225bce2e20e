"""Print constraints for pip: the oldest versions that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"].values()
REQUIREMENTS = [line for lines in (PROJECT["dependencies"], *EXTRAS) for line in lines]

if __name__ == "__main__":
    for name in ("torch", "peft", "transformers", "trl"):
        (bound,) = {m[1] for line in REQUIREMENTS if (m := re.match(rf"{name}>=([\d.]+)", line))}
        print(f"{name}=={bound}.*")
