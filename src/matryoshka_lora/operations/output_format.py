"""Choose the format of an output: the one that was requested, or the one of its suffix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from matryoshka_lora.errors import MatryoshkaError, check_choice
from matryoshka_lora.formats import Format, KeyFormat, OutputFormat
from matryoshka_lora.lora_file.atomic import PathLike
from matryoshka_lora.lora_file.lora import LoraFile
from matryoshka_lora.lora_file.peft_folder import PeftFolder
from matryoshka_lora.lora_file.single_file import SingleFile


@dataclass(frozen=True)
class ExportFormat:
    """What a format supports.

    Attributes:
        suffix: The suffix of a format that is a file; empty for a folder.
        supports_keep: Whether layers may have different ranks.
        supports_max_bytes: Whether the size is known in advance.
        supports_dtype: Whether the dtype of the factors may be chosen.
    """

    suffix: str = ""
    supports_keep: bool = False
    supports_max_bytes: bool = False
    supports_dtype: bool = False


# A new format needs: its name in formats.Format and formats.OutputFormat, an entry here, a writer
# that export._write calls, the help of the option in cli/arguments.py, and how_to_load in
# cli/file_results.py.
EXPORT_FORMATS: dict[OutputFormat, ExportFormat] = {
    "peft": ExportFormat(supports_keep=True, supports_max_bytes=True, supports_dtype=True),
    "single": ExportFormat(
        ".safetensors", supports_keep=True, supports_max_bytes=True, supports_dtype=True
    ),
    "merged": ExportFormat(supports_keep=True),
    "ladder": ExportFormat(supports_dtype=True),
    "gguf": ExportFormat(".gguf", supports_keep=True),
    "mlx": ExportFormat(),
}

FILE_SUFFIXES = tuple(spec.suffix for spec in EXPORT_FORMATS.values() if spec.suffix)
"""The suffixes of outputs that are files. All other outputs are folders."""


def choose_output_format(
    lora: LoraFile,
    output: PathLike,
    format: Format | None = None,
    key_format: KeyFormat | None = None,
) -> OutputFormat:
    """Return the format of an output.

    Args:
        lora: The source.
        output: The path of the output.
        format: The requested format. Defaults to ``"gguf"`` for a path that ends in ``.gguf``,
            otherwise to a PEFT folder. A single file has no other format than its own.
        key_format: The requested format of the keys of a single file; ``"peft"`` makes a PEFT
            folder of it.

    Raises:
        MatryoshkaError: The source, the formats and the suffix contradict each other.
    """
    if format is not None:
        check_choice("format", format, get_args(Format))
    if isinstance(lora, SingleFile):
        return _single_file_format(lora, Path(output), format, key_format)
    if key_format is not None:
        raise MatryoshkaError(
            f"{lora.name} is a PEFT folder, and only single files have a key format. Omit "
            "`key_format`."
        )
    return _folder_format(lora, Path(output), format)


def check_same_kind(lora: LoraFile, output: PathLike) -> None:
    """Raise MatryoshkaError unless an output is a folder or a file, as its source is."""
    choose_output_format(lora, output, "peft" if isinstance(lora, PeftFolder) else None)


def _single_file_format(
    lora: LoraFile, output: Path, format: Format | None, key_format: KeyFormat | None
) -> OutputFormat:
    if key_format == "peft":
        if format not in (None, "peft"):
            raise MatryoshkaError(
                f"`key_format='peft'` writes a PEFT folder, got format {format!r}. Omit `format`."
            )
        return _folder_format(lora, output, "peft")
    if format is not None:
        raise MatryoshkaError(
            f"{lora.name} is a single file, which cannot be written in format {format!r}. Omit "
            "`format`, or write a PEFT folder with `key_format='peft'` first."
        )
    if output.suffix.lower() != ".safetensors":
        raise MatryoshkaError(
            f"{lora.name} is a single file, so the output is a file too, got {output}. Pass a path "
            "such as small.safetensors."
        )
    return "single"


def _folder_format(lora: LoraFile, output: Path, format: Format | None) -> OutputFormat:
    """Return the format of an output that is made from a PEFT folder."""
    suffix = output.suffix.lower()
    if format is None:
        format = _format_of_suffix(suffix)
    expected_suffix = EXPORT_FORMATS[format].suffix
    if expected_suffix and suffix != expected_suffix:
        raise MatryoshkaError(
            f"Format {format!r} writes a file, got {output}. Pass {output}{expected_suffix}."
        )
    if not expected_suffix and suffix in FILE_SUFFIXES:
        raise MatryoshkaError(
            f"{lora.name} is written as a folder in format {format!r}, got {output}. Pass a path "
            f"without {suffix}."
        )
    return format


def _format_of_suffix(suffix: str) -> Format:
    format: Format
    for format in get_args(Format):
        if suffix and suffix == EXPORT_FORMATS[format].suffix:
            return format
    return "peft"
