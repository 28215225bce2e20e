"""Export every LoRA in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from matryoshka_lora.errors import MatryoshkaError, check_choice, check_list
from matryoshka_lora.formats import DtypeName, Format, KeyFormat
from matryoshka_lora.lora_file.atomic import PathLike, create_folder
from matryoshka_lora.lora_file.open import find_loras, open_lora
from matryoshka_lora.operations.export import ExportResult, export
from matryoshka_lora.operations.output_format import EXPORT_FORMATS, FILE_SUFFIXES
from matryoshka_lora.operations.rank_choice import check_request, parse_request
from matryoshka_lora.units import pluralize


@dataclass(frozen=True)
class ExportFolderResult:
    """The result of `export_folder`.

    Attributes:
        path: The folder that was written.
        exported: The result of each LoRA that was exported, sorted by name.
        failed: Why the other LoRAs were not exported, by name.
        skipped: The names of the folders of the source that are not LoRAs.
    """

    path: Path
    exported: tuple[ExportResult, ...]
    failed: dict[str, str]
    skipped: tuple[str, ...]


def export_folder(
    source: PathLike,
    output: PathLike,
    rank: int | Sequence[int] | None = None,
    format: Format | None = None,
    *,
    keep: float | str | None = None,
    error: float | str | None = None,
    max_bytes: int | str | None = None,
    pad: bool = False,
    dtype: DtypeName | None = None,
    drop: Iterable[str] = (),
    scale: Mapping[str, float] | None = None,
    key_format: KeyFormat | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    force: bool = False,
) -> ExportFolderResult:
    """Export every LoRA in a folder into another folder, each under its own name.

    A LoRA that cannot be exported does not stop the others.

    Args:
        source: A folder of PEFT folders and single files.
        output: The folder to write.
        rank: As in `export`; a LoRA of a smaller rank keeps its own.
        format: As in `export`.
        keep: As in `export`.
        error: As in `export`.
        max_bytes: As in `export`, for each LoRA.
        pad: As in `export`.
        dtype: As in `export`.
        drop: As in `export`.
        scale: As in `export`.
        key_format: As in `export`.
        base_model: As in `export`.
        base_revision: As in `export`.
        force: Whether to overwrite the output.

    Raises:
        MatryoshkaError: The source contains no LoRAs, the output already exists, or no LoRA could
            be exported.
    """
    if format is not None:
        check_choice("format", format, get_args(Format))
    loras = find_loras(source)
    _check_folders(source, loras, output)
    output_path = Path(output)
    # A mistake that no LoRA is the reason of is one error.
    drop = check_list("drop", drop)
    has_other_change = bool(key_format or dtype or drop or scale)
    request = parse_request(rank, keep, error, max_bytes)
    check_request(request, format or "peft", pad=pad, has_other_change=has_other_change)
    exported: list[ExportResult] = []
    failed: dict[str, str] = {}
    skipped = _other_folders(source, loras)  # before the output, which may be in the source
    with create_folder(output, force, _folder_sources(loras, base_model)) as temporary:
        for path in tqdm(loras, "exporting", leave=False, unit=" LoRAs", disable=None):
            name = _output_name(path, format, key_format)
            try:
                result = export(
                    path,
                    temporary / name,
                    rank if pad else _limit_rank(rank, path),
                    format,
                    keep=keep,
                    error=error,
                    max_bytes=max_bytes,
                    pad=pad,
                    dtype=dtype,
                    drop=drop,
                    scale=scale,
                    key_format=key_format,
                    base_model=base_model,
                    base_revision=base_revision,
                )
            except MatryoshkaError as failure:
                failed[path.name] = str(failure)
            else:
                exported.append(replace(result, path=output_path / name))
        if not exported:
            raise _nothing_exported_error(source, loras[0].name, failed)
    return ExportFolderResult(output_path, tuple(exported), failed, skipped)


def _other_folders(source: PathLike, loras: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of the folders in a folder that are not LoRAs."""
    paths = sorted(Path(source).iterdir())
    return tuple(path.name for path in paths if path.is_dir() and path not in loras)


def _nothing_exported_error(
    source: PathLike, first: str, failed: Mapping[str, str]
) -> MatryoshkaError:
    return MatryoshkaError(
        f"{pluralize(len(failed), 'LoRA')} in {source} could not be exported. The first is "
        f"{first:.80}: {failed[first]}"
    )


def _check_folders(source: PathLike, loras: Sequence[Path], output: PathLike) -> None:
    if not loras:
        raise MatryoshkaError(f"{source} contains no LoRAs. Pass a folder that contains some.")
    suffix = Path(output).suffix
    if suffix.lower() in FILE_SUFFIXES:
        raise MatryoshkaError(
            f"{source} is a folder of LoRAs, so the output is a folder too, got {output}. Pass a "
            f"path without {suffix}."
        )


def _folder_sources(loras: Sequence[Path], base_model: str | None) -> list[PathLike]:
    """Return the paths that an output of several LoRAs must not overwrite."""
    sources: list[PathLike] = [*loras, base_model] if base_model else [*loras]
    for path in loras:
        with suppress(MatryoshkaError):  # its own export reports it
            sources += open_lora(path).sources
    return sources


def _output_name(path: Path, format: Format | None, key_format: KeyFormat | None) -> str:
    if key_format == "peft":
        return path.stem
    if format is not None:
        return f"{path.name}{EXPORT_FORMATS[format].suffix}"
    return path.name


def _limit_rank(rank: int | Sequence[int] | None, path: Path) -> int | Sequence[int] | None:
    """Return a rank that is at most the largest of a LoRA. Several ranks are not changed."""
    if rank is None or isinstance(rank, Sequence):
        return rank
    return min(rank, open_lora(path).max_rank)
