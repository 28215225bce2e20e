"""The dotted names of the modules of a model of diffusers, by what kohya calls them."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.styles import KOHYA_PARTS, kohya_name


def names_in_model(folder: str | os.PathLike[str]) -> dict[str, str]:
    """The modules of the parts of a pipeline, from the headers of its files.

    Args:
        folder: Of a pipeline, with a folder for each part, such as ``unet`` and ``text_encoder``.

    Raises:
        MatryoshkaError: It has none, or a file is damaged.
    """
    found: dict[str, str] = {}
    parts = [part for part in KOHYA_PARTS if (Path(folder) / part).is_dir()]
    for part in parts:
        for file in sorted((Path(folder) / part).glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    keys = list(opened.keys())
            except (SafetensorError, OSError) as error:
                raise MatryoshkaError(f"{file} is damaged: {error}. Copy the model again") from error
            for key in keys:
                if key.endswith(".weight"):
                    inside = key.removesuffix(".weight")
                    for kohya in _spelled(part, inside, parts):
                        found[kohya] = f"{part}.{inside}"
    if not found:
        raise MatryoshkaError(
            f"{folder} has no folder with safetensors files for a part of a pipeline ({', '.join(KOHYA_PARTS)}): "
            "give the folder of a model of diffusers"
        )
    return found


def _spelled(part: str, inside: str, parts: list[str]) -> list[str]:
    """Some versions of transformers leave the first part of a text encoder's names out, and kohya's names have it."""
    names = [inside, f"text_model.{inside}"] if part.startswith("text_encoder") else [inside]
    first = {kohya_name(part, name, parts) for name in names}
    first |= {kohya_name(part, name, ()) for name in names}
    if part == "transformer":
        first |= {kohya_name("unet", name, ()) for name in names}
    return sorted(first)
