"""What stays true of the sources of an output: their model cards and license files."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matryoshka_lora.lora_file.hub import CARD_NAME, LICENSE_FILES, leads_out_of_folder

ORIGINAL_HEADING = "# Original model card"
"""What precedes the text of the source's card in the card of an output."""
LICENSES_HEADING = "# Licenses"
"""What precedes the licenses of the sources of a sum."""
CREATED_WITH = "Created with matryoshka-lora."

_FRONT_MATTER = re.compile(r"\s*---\s*\n(?P<yaml>.*?)\n---\s*(\n|$)", re.DOTALL)
# The title of the template that PEFT saves if nobody has written a card.
_UNFILLED_TEMPLATE = "# Model Card for Model ID"


@dataclass(frozen=True)
class SourceCard:
    """The model card of a source.

    Attributes:
        name: The name of its folder, or its id on the Hugging Face Hub.
        front_matter: The fields at the start of its README.md.
        text: What follows them, if somebody has written it.
    """

    name: str
    front_matter: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    def values(self, key: str) -> list[str]:
        """Return a field as a list of strings; empty if the card does not have it."""
        value = self.front_matter.get(key)
        values = value if isinstance(value, list) else [value]
        return [item for item in values if isinstance(item, str)]


def read_source_card(folder: Path) -> SourceCard:
    """Return the model card of a folder; an empty one if it has none."""
    name = _source_name(folder)
    file = folder / CARD_NAME
    if not file.is_file() or _is_foreign(file, folder):
        return SourceCard(name)
    text = file.read_text(encoding="utf-8", errors="replace")
    match = _FRONT_MATTER.match(text)
    front_matter: dict[str, Any] = {}
    if match:
        text = text[match.end() :]
        front_matter = _parse_yaml(match["yaml"], file)
    if CREATED_WITH in text:  # only what this package has kept of earlier sources
        _, heading, licenses = text.partition(f"\n{LICENSES_HEADING}\n")
        original = text.partition(f"\n{ORIGINAL_HEADING}\n")[2]
        text = original or heading + licenses
    if _UNFILLED_TEMPLATE in text:
        text = ""
    return SourceCard(name, front_matter, text.strip())


def _parse_yaml(text: str, file: Path) -> dict[str, Any]:
    import yaml

    try:
        return dict(yaml.safe_load(text) or {})
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"The front matter of {file} is damaged ({reason:.200}), so license and tags are not "
            "kept.",
            stacklevel=2,
        )
        return {}


def _source_name(folder: Path) -> str:
    # In the Hub's cache, a repository is in models--OWNER--NAME/snapshots/COMMIT.
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def copy_license_files(folders: Sequence[Path], output_folder: Path) -> None:
    """Copy the license files of all sources. Different files of one name get the source's name.

    Args:
        folders: The folders of the sources.
        output_folder: An existing folder.
    """
    for folder in folders:
        for pattern in LICENSE_FILES:
            for file in sorted(folder.glob(pattern)):
                if file.is_file() and not _is_foreign(file, folder):
                    _copy_license(file, output_folder, _source_name(folder).replace("/", "-"))


def _copy_license(file: Path, output_folder: Path, source_name: str) -> None:
    output_file = output_folder / file.name
    if output_file.exists() and output_file.read_bytes() != file.read_bytes():
        output_file = output_folder / f"{file.stem}-{source_name}{file.suffix}"
    shutil.copyfile(file, output_file)


def _is_foreign(file: Path, folder: Path) -> bool:
    """Return whether a file leads out of a folder, after a warning."""
    is_foreign = leads_out_of_folder(file, folder)
    if is_foreign:
        warnings.warn(
            f"{file} is a symbolic link to another folder and is not used. Replace it by a copy, "
            "if you trust it.",
            stacklevel=3,
        )
    return is_foreign
