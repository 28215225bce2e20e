"""Export a LoRA at a given rank, or for another runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from matryoshka_lora.algebra.allocation import rank_for_share, ranks_for_error, ranks_for_size
from matryoshka_lora.errors import MatryoshkaError, check_choice, optional_imports
from matryoshka_lora.formats import Format, KeyFormat, OutputFormat
from matryoshka_lora.lora_file.atomic import PathLike, check_output, create_file, create_folder
from matryoshka_lora.lora_file.gguf import write_gguf
from matryoshka_lora.lora_file.key_formats import convert_keys
from matryoshka_lora.lora_file.lora import LoraFile, OutputPlan, WrittenOutput
from matryoshka_lora.lora_file.mlx import write_mlx
from matryoshka_lora.lora_file.open import find_loras, open_lora
from matryoshka_lora.lora_file.peft_folder import PeftFolder, open_peft_folder
from matryoshka_lora.lora_file.single_file import SingleFile
from matryoshka_lora.nesting import check_rank
from matryoshka_lora.operations.base_config import read_base_config
from matryoshka_lora.operations.output_format import (
    EXPORT_FORMATS,
    FILE_SUFFIXES,
    choose_output_format,
)
from matryoshka_lora.units import parse_share, parse_size, pluralize


@dataclass(frozen=True)
class ExportResult:
    """The result of `export`.

    Attributes:
        path: The folder or file that was written.
        format: Its format; ``"single"`` for a single file.
        ranks: The rank of each layer by its name, or the ranks of a ladder.
        size_before: The size of the source's weights in bytes.
        size_after: The size of the output's weights in bytes.
        errors: The relative error of the output, by its largest rank: the norm of what it misses
            over the norm of the update. A ladder has one entry per rank, other formats have one.
        notes: What else the user should know, one sentence each.
    """

    path: Path
    format: OutputFormat
    ranks: dict[str, int] | tuple[int, ...]
    size_before: int
    size_after: int
    errors: dict[int, float]
    notes: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class _Selection:
    """What the caller wants to keep.

    Attributes:
        rank: The rank, or an upper bound if something else is requested too, or several ranks.
        share: The minimum share of the squared singular values kept per layer.
        error: The maximum relative error over all layers.
        max_size: The maximum size of the weights in bytes.
    """

    rank: int | Sequence[int] | None
    share: float | None
    error: float | None
    max_size: int | None

    @property
    def is_empty(self) -> bool:
        return self == _Selection(None, None, None, None)

    @property
    def needs_singular_values(self) -> bool:
        """Whether the rank of a layer depends on its singular values."""
        return self != _Selection(self.rank, None, None, None)


def export(
    source: PathLike,
    output: PathLike,
    rank: int | Sequence[int] | None = None,
    format: Format | None = None,
    *,
    keep: float | str | None = None,
    error: float | str | None = None,
    max_bytes: int | str | None = None,
    key_format: KeyFormat | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    alpha: float | None = None,
    force: bool = False,
) -> ExportResult:
    """Export a LoRA at a given rank, or for another runtime.

    A LoRA without an order is reordered by singular value decomposition first, so that the output
    is its best approximation of that rank.

    Args:
        source: A PEFT folder, a single ``.safetensors`` file, or the Hub id of either.
        output: The folder or file to write.
        rank: The rank; with ``keep``, ``error`` or ``max_bytes``, an upper bound. For a ladder, one
            or several ranks; defaults to the nested ones.
        format: ``"peft"``, a PEFT folder; ``"merged"``, the base model with the LoRA merged into
            its weights; ``"ladder"``, one PEFT folder per rank; ``"gguf"``, a file for llama.cpp;
            ``"mlx"``, a folder for mlx-lm. Defaults to ``"gguf"`` for an output that ends in
            ``.gguf``, otherwise to the kind of the source.
        keep: A share of the squared singular values, such as ``"95%"`` or ``0.95``. Each layer gets
            the smallest rank that keeps it.
        error: The maximum relative error over all layers, such as ``"10%"`` or ``0.1``: the norm of
            what the output misses over the norm of the update. The layers get the ranks that reach
            it with few parameters, so the file is usually smaller than with ``keep``.
        max_bytes: The maximum size of the weights file, such as ``"50MB"``. The layers get the
            ranks that keep most of the update.
        key_format: The format of a single file's keys: ``"kohya"``, ``"diffusers"``, or ``"peft"``
            for a PEFT folder. Without rank, keep, error and max_bytes, only the keys change.
        base_model: The base model, for the formats merged, gguf and mlx. Defaults to the one that
            the LoRA names.
        base_revision: Its revision on the Hub. Defaults to the one that the LoRA names.
        revision: Branch, tag or commit of the source on the Hub.
        alpha: The alpha of each layer, for a single file that does not contain it.
        force: Whether to overwrite the output.

    Raises:
        MatryoshkaError: The rank or the format is not available, or the output already exists.
        MissingDependencyError: The format needs an extra that is not installed.
        NotFiniteError: A factor is NaN or infinite.
    """
    lora = open_lora(source, revision, alpha)
    size_before = lora.size
    output_format = choose_output_format(lora, output, format, key_format)
    is_file = bool(EXPORT_FORMATS[output_format].suffix)
    output_path = check_output(output, force, lora.sources, is_file=is_file)
    selection = _parse_selection(rank, keep, error, max_bytes)
    _check_selection(selection, output_format, key_format)
    keep_factors = selection.is_empty and key_format is not None
    if isinstance(lora, SingleFile) and key_format is not None:
        converted = convert_keys(lora, key_format)
        if keep_factors and converted.layers == lora.layers:
            raise MatryoshkaError(f"{lora.name} has keys of the {key_format} format already.")
        lora = converted

    ranks: dict[str, int] | tuple[int, ...]
    notes: list[str] = []
    if output_format == "ladder":
        ranks = _ladder_ranks(lora, rank)
        errors = _write_ladder(lora, output_path, ranks, force)
    else:
        ranks = _choose_ranks(lora, selection, output_format)
        plan = lora.plan_unchanged() if keep_factors else lora.plan(ranks)
        written = _write(lora, plan, output_path, output_format, base_model, base_revision, force)
        errors = {plan.rank: written.relative_error()}
        notes = _notes(lora, ranks, selection, output_format)
    size_after = _weights_size(output_path)
    return ExportResult(
        output_path, output_format, ranks, size_before, size_after, errors, tuple(notes)
    )


def export_folder(
    source: PathLike,
    output: PathLike,
    rank: int | Sequence[int] | None = None,
    format: Format | None = None,
    *,
    keep: float | str | None = None,
    error: float | str | None = None,
    max_bytes: int | str | None = None,
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
    _check_selection(_parse_selection(rank, keep, error, max_bytes), format or "peft", key_format)
    exported: list[ExportResult] = []
    failed: dict[str, str] = {}
    skipped = tuple(
        folder.name
        for folder in sorted(Path(source).iterdir())
        if folder.is_dir() and folder not in loras
    )
    with create_folder(output, force, _folder_sources(loras, base_model)) as temporary:
        for path in tqdm(loras, "exporting", leave=False, unit=" LoRAs", disable=None):
            name = _output_name(path, format, key_format)
            try:
                result = export(
                    path,
                    temporary / name,
                    _limit_rank(rank, path),
                    format,
                    keep=keep,
                    error=error,
                    max_bytes=max_bytes,
                    key_format=key_format,
                    base_model=base_model,
                    base_revision=base_revision,
                )
            except MatryoshkaError as failure:
                failed[path.name] = str(failure)
            else:
                exported.append(replace(result, path=output_path / name))
        if not exported:
            name = loras[0].name
            raise MatryoshkaError(
                f"{pluralize(len(loras), 'LoRA')} in {source} could not be exported. The first is "
                f"{name:.80}: {failed[name]}"
            )
    return ExportFolderResult(output_path, tuple(exported), failed, skipped)


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


def _parse_selection(
    rank: int | Sequence[int] | None,
    keep: float | str | None,
    error: float | str | None,
    max_bytes: int | str | None,
) -> _Selection:
    if rank is not None and (isinstance(rank, str) or not isinstance(rank, Sequence)):
        check_rank(rank)
    return _Selection(
        rank,
        share=None if keep is None else parse_share(keep),
        error=None if error is None else parse_share(error),
        max_size=None if max_bytes is None else parse_size(max_bytes),
    )


def _check_selection(
    selection: _Selection, output_format: OutputFormat, key_format: KeyFormat | None
) -> None:
    if selection.is_empty and key_format is None and output_format in ("peft", "single"):
        raise MatryoshkaError("Pass at least one of `rank`, `keep`, `error` or `max_bytes`.")
    if isinstance(selection.rank, Sequence) and output_format != "ladder":
        raise MatryoshkaError(
            f"`rank` must be an integer in format {output_format!r}, got {selection.rank!r:.80}. "
            "Only `format='ladder'` takes several."
        )
    if selection.share is not None and selection.error is not None:
        raise MatryoshkaError("Pass `keep` or `error`, not both.")
    supported = EXPORT_FORMATS[output_format]
    for name, value in (("keep", selection.share), ("error", selection.error)):
        if value is not None and not supported.supports_keep:
            raise MatryoshkaError(
                f"`{name}` gives each layer its own rank, which format {output_format!r} does not "
                "support. Pass `rank`."
            )
    if selection.max_size is not None and not supported.supports_max_bytes:
        alternatives = "`rank` or `keep`" if supported.supports_keep else "`rank`"
        raise MatryoshkaError(
            f"`max_bytes` is not supported for format {output_format!r}. Pass {alternatives}."
        )


def _ladder_ranks(lora: LoraFile, rank: int | Sequence[int] | None) -> tuple[int, ...]:
    if rank is None or isinstance(rank, Sequence):
        return lora.check_ranks(rank)
    return lora.check_ranks([rank])


def _choose_ranks(
    lora: LoraFile, selection: _Selection, output_format: OutputFormat
) -> dict[str, int]:
    """Return the rank of each layer by its name."""
    max_rank = lora.max_rank if selection.rank is None else selection.rank
    assert not isinstance(max_rank, Sequence)  # `_check_selection` rejects several
    ranks = lora.ranks_by_layer(max_rank)
    if not EXPORT_FORMATS[output_format].supports_keep:  # one rank for all layers
        return dict.fromkeys(ranks, max_rank)
    if not selection.needs_singular_values:
        return ranks
    if lora.order == "trained" or lora.deploy == "paper":
        raise MatryoshkaError(
            "`keep`, `error` and `max_bytes` need factors that are ordered by singular values, and "
            f"those of {lora.name} are not. Pass `rank`, or reorder it first."
        )
    spectra = lora.spectra(ranks)
    if selection.error is not None:
        ranks = ranks_for_error(spectra, selection.error)
    if selection.share is not None:
        for name, layer in spectra.items():
            ranks[name] = min(ranks[name], rank_for_share(layer.singular_values, selection.share))
    if selection.max_size is not None:
        spectra = {name: replace(layer, max_rank=ranks[name]) for name, layer in spectra.items()}
        ranks = ranks_for_size(
            spectra, lambda ranks: lora.plan(ranks).file_size, selection.max_size
        )
    return ranks


def _write(
    lora: LoraFile,
    plan: OutputPlan,
    output_path: Path,
    output_format: OutputFormat,
    base_model: str | None,
    base_revision: str | None,
    force: bool,
) -> WrittenOutput:
    """Write a plan in a format other than a ladder."""
    if output_format in ("peft", "single"):
        return plan.write(output_path, force)
    assert isinstance(lora, PeftFolder)  # `choose_output_format` rejects single files
    base_model, base_revision = lora.base_model(base_model, base_revision)
    sources: list[PathLike] = [*lora.sources, base_model]
    if output_format == "merged":
        with optional_imports():
            from matryoshka_lora.model.merge import write_merged
        with create_folder(output_path, force, sources) as folder:
            return write_merged(lora, folder, plan, base_model, base_revision)
    base_config = read_base_config(base_model, base_revision)
    if output_format == "gguf":
        with create_file(output_path, force, sources) as file:
            return write_gguf(plan, file, base_config)
    if output_format == "mlx":
        with create_folder(output_path, force, sources) as folder:
            return write_mlx(plan, folder, base_config)
    raise AssertionError(f"Format {output_format!r} has no writer.")


def _write_ladder(
    lora: LoraFile, output_path: Path, ranks: tuple[int, ...], force: bool
) -> dict[int, float]:
    """Write a PEFT folder for each rank, and return the relative error of each rank."""
    assert isinstance(lora, PeftFolder)  # `choose_output_format` rejects single files
    adapter_name = Path(lora.name).resolve().name
    layer_ranks = {layer.name: layer.rank for layer in lora.layers}
    errors: dict[int, float] = {}
    with (
        create_folder(output_path, force, lora.sources) as folder,
        tempfile.TemporaryDirectory(dir=folder) as cache,
    ):
        if lora.order is None and lora.deploy != "paper":
            # Reorder once for all ranks.
            nested_folder = Path(cache) / adapter_name
            lora.plan_nested().write(nested_folder)
            lora = open_peft_folder(nested_folder)
        for rank in ranks:
            plan = lora.plan({name: min(rank, own) for name, own in layer_ranks.items()})
            written = plan.write(folder / f"{adapter_name}@{rank}")
            errors[rank] = written.relative_error()
    return errors


def _notes(
    lora: LoraFile, ranks: Mapping[str, int], selection: _Selection, output_format: OutputFormat
) -> list[str]:
    notes = list(lora.notes) if isinstance(lora, SingleFile) else []
    if lora.other_tensors and output_format == "single":
        tensors = pluralize(len(lora.other_tensors), "other tensor")
        notes.append(f"Copied {tensors} unchanged, such as {min(lora.other_tensors)}.")
    if selection.share is not None or selection.error is not None:
        num_bounded = sum(rank == selection.rank for rank in ranks.values())
        if num_bounded:
            notes.append(
                f"The requested rank limits {pluralize(num_bounded, 'layer')}, so the error may be "
                "larger than requested."
            )
    return notes


def _weights_size(output_path: Path) -> int:
    """Return the size of a file, or of all safetensors files in a folder."""
    if output_path.is_file():
        return output_path.stat().st_size
    return sum(file.stat().st_size for file in output_path.rglob("*.safetensors"))
