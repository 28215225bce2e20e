"""The content of an output."""

from __future__ import annotations

from pathlib import Path

from matryoshka_lora.atomic import MANIFEST_NAME


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted, without the manifest."""
    return sorted(path.name for path in folder.iterdir() if path.name != MANIFEST_NAME)
