"""Export every LoRA in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, get_args

from tqdm import tqdm

from matryoshka_lora.errors import MatryoshkaError, check_choice, check_list
from matryoshka_lora.formats import DtypeName, Format, KeyFormat
from matryoshka_lora.lora_file.atomic import PathLike, create_folder
from matryoshka_lora.lora_file.keys.formats import has_key_format
from matryoshka_lora.lora_file.lora import LoraFile
from matryoshka_lora.lora_file.open import find_loras, open_lora
from matryoshka_lora.lora_file.single_file import SingleFile
from matryoshka_lora.lora_file.transforms import matching_patterns
from matryoshka_lora.operations.export import ExportResult, export
from matryoshka_lora.operations.output_format import EXPORT_FORMATS, FILE_SUFFIXES
from matryoshka_lora.operations.rank_choice import RankRequest, check_request, parse_request
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
        rank: As in `export`; a LoRA of a smaller rank keeps its own. A ladder has
            the ranks that the LoRA has.
        format: As in `export`.
        keep: As in `export`.
        error: As in `export`.
        max_bytes: As in `export`, for each LoRA.
        pad: As in `export`.
        dtype: As in `export`.
        drop: As in `export`. A pattern may match no layer of some LoRAs.
        scale: As in `export`. A pattern may match no layer of some LoRAs.
        key_format: As in `export`.
        base_model: As in `export`.
        base_revision: As in `export`.
        force: Whether to overwrite the output.

    Raises:
        MatryoshkaError: The source contains no LoRAs, the output already exists, or no LoRA could
            be exported.
    """
    loras = find_loras(source)
    _check_arguments(source, loras, output, format)
    # A mistake that no LoRA is the reason of is one error.
    drop = check_list("drop", drop)
    scale = dict(scale or {})
    _check_patterns(source, loras, [*drop, *scale])
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
                changes = _changes_for(
                    open_lora(path), request, pad, drop, scale, dtype, key_format
                )
                result = export(
                    path,
                    temporary / name,
                    changes.rank,
                    format,
                    keep=keep,
                    error=error,
                    max_bytes=max_bytes,
                    pad=pad,
                    dtype=dtype,
                    drop=changes.drop,
                    scale=changes.scale,
                    key_format=key_format,
                    base_model=base_model,
                    base_revision=base_revision,
                )
            except MatryoshkaError as failure:
                failed[path.name] = str(failure)
            else:
                exported.append(replace(result, path=Path(output) / name))
        if not exported:
            raise _nothing_exported_error(source, loras[0].name, failed)
    return ExportFolderResult(Path(output), tuple(exported), failed, skipped)


def _check_patterns(source: PathLike, loras: Sequence[Path], patterns: Sequence[str]) -> None:
    """Raise MatryoshkaError if a pattern matches no layer of any LoRA."""
    unused = set(patterns)
    for path in loras if patterns else []:
        with suppress(MatryoshkaError):  # its own export reports it
            unused.difference_update(matching_patterns(open_lora(path), patterns))
    for pattern in sorted(unused):
        raise MatryoshkaError(f"{pattern!r:.80} matches no layer of the LoRAs in {source}.")


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


def _check_arguments(
    source: PathLike, loras: Sequence[Path], output: PathLike, format: Format | None
) -> None:
    if format is not None:
        check_choice("format", format, get_args(Format))
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


class _Changes(NamedTuple):
    """The arguments of `export` that depend on the LoRA."""

    rank: int | Sequence[int] | None
    drop: list[str]
    scale: dict[str, float]


def _changes_for(
    lora: LoraFile,
    request: RankRequest,
    pad: bool,
    drop: Sequence[str],
    scale: Mapping[str, float],
    dtype: DtypeName | None,
    key_format: KeyFormat | None,
) -> _Changes:
    """Return the patterns that match a LoRA, and a rank that it has.

    Args:
        lora: The LoRA.
        request: The requested ranks.
        pad: Whether a smaller LoRA gets the requested rank.
        drop: The patterns of the layers that are left out.
        scale: The factor by the pattern of the layers that are scaled.
        dtype: The requested dtype of the factors.
        key_format: The requested format of the keys.
    """
    has_other_change = dtype is not None or _changes_keys(lora, key_format)
    lora_drop = matching_patterns(lora, drop)
    lora_scale = {pattern: scale[pattern] for pattern in matching_patterns(lora, scale)}
    rank = request.rank
    if isinstance(rank, Sequence):
        rank = [value for value in rank if value <= lora.max_rank] or [lora.max_rank]
    elif rank is not None and not pad:
        rank = min(rank, lora.max_rank)
    elif request.is_empty and not (lora_drop or lora_scale or has_other_change):
        rank = lora.max_rank  # it is only rewritten
    return _Changes(rank, lora_drop, lora_scale)


def _changes_keys(lora: LoraFile, key_format: KeyFormat | None) -> bool:
    """Return whether a LoRA gets other keys."""
    if key_format is None:
        return False
    return not isinstance(lora, SingleFile) or not has_key_format(lora, key_format)
