"""Export a LoRA, or every LoRA in a folder, at a given rank or for another runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

from tqdm import tqdm

from matryoshka_lora.atomic import PathLike, check_output, create_folder
from matryoshka_lora.errors import MatryoshkaError, check_choice, check_list, short
from matryoshka_lora.formats.open import find_loras, open_lora
from matryoshka_lora.formats.vllm import round_up_to_vllm
from matryoshka_lora.linalg.factors import relative_error
from matryoshka_lora.lora.convert import part_of_pipeline, pipeline_key_format
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.save import choose_format
from matryoshka_lora.lora.transforms import matching_patterns
from matryoshka_lora.nesting import check_rank
from matryoshka_lora.operations.info import info
from matryoshka_lora.registry import (
    FORMATS,
    PICTURES_CAVEAT,
    DtypeName,
    Format,
    FormatName,
    KeyFormat,
    caveat_of,
)
from matryoshka_lora.text import (
    LARGE_ERROR,
    format_errors,
    format_percent,
    format_range,
    format_ranks,
    format_table,
    join_lines,
    mark_large_errors,
    with_name,
)
from matryoshka_lora.units import format_size, parse_share, parse_size, pluralize


class ExportOptions(TypedDict, total=False):
    """The options that `export` and `export_folder` have in common.

    Attributes:
        keep: A share of the squared singular values, such as ``"95%"`` or ``0.95``. Each layer gets
            the smallest rank that keeps it.
        error: The maximum relative error over all layers, such as ``"10%"`` or ``0.1``: the norm of
            what the output misses over the norm of the update. The layers get the ranks that reach
            it with few parameters, so the file is usually smaller than with ``keep``. If examples
            have weighted the order, it is the weighted error.
        max_bytes: The maximum size of the weights file, such as ``"50MB"``, or ``"25%"`` of the
            source's weights. The layers get the ranks that keep most of the update.
        for_vllm: Whether all layers get one rank: the smallest one with at most ``error``, rounded
            up to a ``--max-lora-rank`` of vLLM. vLLM reserves as much memory as the largest layer
            needs.
        pad: Whether to write a LoRA of a larger rank to train on, with the same update. Every layer
            gets ``rank``. The new rows of A are random, and the new columns of B zero.
        dtype: The dtype of the factors: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        drop: Patterns of names of layers that are left out, such as ``"lora_te*"``.
        scale: The factor of the update of each layer, by a pattern of names. The last pattern that
            matches a layer counts. The error is relative to the scaled update.
        key_format: The format of a single file's keys: ``"kohya"``, ``"diffusers"``, or ``"peft"``
            for a PEFT folder.
        base_model: The base model, for the formats merged, gguf and mlx. Defaults to the one that
            the LoRA names.
        base_revision: Its revision on the Hub. Defaults to the one that the LoRA names.
        force: Whether to replace an earlier output of this package. Nothing else is replaced.
    """

    keep: float | str | None
    error: float | str | None
    max_bytes: int | str | None
    for_vllm: bool
    pad: bool
    dtype: DtypeName | None
    drop: Iterable[str]
    scale: Mapping[str, float] | None
    key_format: KeyFormat | None
    base_model: str | None
    base_revision: str | None
    force: bool


@dataclass(frozen=True)
class ExportResult:
    """The result of `export`.

    Attributes:
        path: The folder or file that was written.
        format: Its format; ``"single"`` for a single file.
        ranks: The rank of each layer by its name; of a ladder, the largest ones.
        size_before: The size of the source's weights in bytes.
        size_after: The size of the output's weights in bytes.
        errors: The relative error of the output, by its largest rank: the norm of what it misses
            over the norm of the update. A ladder has one entry per rank, other formats have one.
        notes: Remarks for the user, one sentence each.
        trained_ranks: The ranks in ``errors`` that were trained, so that they minimise the loss.
        weighted_error: The weighted error, if examples have weighted the order and the output is
            one prefix of each layer.
        key_format: The format of the keys, if it was requested, or chosen for a file that was
            exported from a PEFT folder.
        is_for_images: Whether it is for an image model of diffusers.
    """

    path: Path
    format: FormatName
    ranks: dict[str, int]
    size_before: int
    size_after: int
    errors: dict[int, float]
    notes: tuple[str, ...] = ()
    trained_ranks: tuple[int, ...] = ()
    weighted_error: float | None = None
    key_format: KeyFormat | None = None
    is_for_images: bool = False

    def __repr__(self) -> str:
        """Return the ranks, sizes, errors and notes, as `matryoshka export` prints them."""
        sizes = f"{format_size(self.size_before)} -> {format_size(self.size_after)}"
        if len(self.errors) > 1:
            lines = [f"{self.path}: ranks {', '.join(map(str, self.errors))}, {sizes}"]
            lines += format_errors(self.errors, "update", trained_ranks=self.trained_ranks)
        else:
            ranks = format_ranks(self.ranks.values())
            by_layer = ", by layer" if " to " in ranks else ""
            (error,) = self.errors.values()
            remark = f"{format_percent(1 - error**2)} of the squared norm kept"
            if self.trained_ranks:
                remark = "the rank was trained: it minimises the loss, and not the error"
            lines = [
                f"{self.path}: {ranks}{by_layer}, {sizes}",
                f"Relative error {format_percent(error)} ({remark})",
            ]
            if self.weighted_error is not None:
                error = self.weighted_error
                lines.append(f"Weighted error {format_percent(error)}, see `reorder`")
        if FORMATS[self.format].is_lora and self.size_after >= self.size_before:
            lines.append("The output is not smaller than the source.")
        lines += self.notes
        if any(self.errors.values()):
            lines.append(PICTURES_CAVEAT if self.is_for_images else FORMATS[self.format].caveat)
        return join_lines(lines)


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

    def __repr__(self) -> str:
        """Return a table of the LoRAs and their notes, as `matryoshka export` prints them."""
        # Of a ladder, the error of the smallest rank.
        errors = mark_large_errors([max(result.errors.values()) for result in self.exported])
        rows = [["rank", "size", "error", "name"]]
        names_by_note: dict[str, list[str]] = {}
        for result, error in zip(self.exported, errors, strict=True):
            is_ladder = len(result.errors) > 1
            ranks = format_range(result.errors if is_ladder else result.ranks.values())
            sizes = f"{format_size(result.size_before)} -> {format_size(result.size_after)}"
            rows.append([ranks, sizes, error, result.path.name])
            for note in result.notes:
                names_by_note.setdefault(note, []).append(result.path.name)
        lines = format_table(rows, left_aligned=1)
        if any("*" in error for error in errors):
            lines.append(f"  {LARGE_ERROR}")
        for note, names in names_by_note.items():
            is_for_all = len(names) == len(self.exported)
            lines.append(note if is_for_all else f"{', '.join(names)}: {note}")
        lines += [f"{name} is not a LoRA. Export its content separately." for name in self.skipped]
        size_before = sum(result.size_before for result in self.exported)
        size_after = sum(result.size_after for result in self.exported)
        lines.append(
            f"{self.path}: {pluralize(len(self.exported), 'LoRA')} exported, {len(self.failed)} "
            f"failed: {format_size(size_before)} -> {format_size(size_after)}"
        )
        return join_lines([*lines, caveat_of(result.format for result in self.exported)])


def export(
    source: Lora | PathLike,
    output: PathLike,
    rank: int | Sequence[int] | None = None,
    format: FormatName | None = None,
    *,
    revision: str | None = None,
    alpha: float | None = None,
    **options: Unpack[ExportOptions],
) -> ExportResult:
    """Export a LoRA at a given rank, or for another runtime.

    A LoRA without an order is reordered by singular value decomposition first, so that the output
    is its best approximation of that rank. Without rank, keep, error and max_bytes, a PEFT folder
    or a single file keeps its ranks, and only what else is requested changes.

    It is a composition of the verbs of `Lora`: drop, scale, pad, cast, convert, truncate, save.

    Args:
        source: A folder of PEFT or mlx-lm, a single ``.safetensors`` file, the Hub id of either, or
            an opened LoRA.
        output: The folder or file to write.
        rank: The rank; with ``keep``, ``error`` or ``max_bytes``, an upper bound. For a ladder, one
            or several ranks; defaults to the nested ones.
        format: ``"peft"``, a PEFT folder; ``"merged"``, the base model with the LoRA merged into
            its weights; ``"ladder"``, one PEFT folder per rank; ``"gguf"``, a file for llama.cpp;
            ``"mlx"``, a folder for mlx-lm. Defaults to ``"gguf"`` for an output that ends in
            ``.gguf``, otherwise to the kind of the source.
        revision: Branch, tag or commit of the source on the Hub.
        alpha: The alpha of each layer, for a single file that does not contain it.
        options: See `ExportOptions`.

    Raises:
        MatryoshkaError: The rank or the format is not available, or the output already exists.
        MissingDependencyError: The format needs an extra that is not installed.
        NotFiniteError: A factor is NaN or infinite.
    """
    if not isinstance(source, Lora):
        source = open_lora(source, revision=revision, alpha=alpha)
    elif revision is not None or alpha is not None:
        raise MatryoshkaError("An opened LoRA has its revision and alpha. Pass them to open().")
    return _export(source, output, rank, format, **options)


def _export(
    lora: Lora,
    output: PathLike,
    rank: int | Sequence[int] | None,
    format: FormatName | None,
    *,
    keep: float | str | None = None,
    error: float | str | None = None,
    max_bytes: int | str | None = None,
    for_vllm: bool = False,
    pad: bool = False,
    dtype: DtypeName | None = None,
    drop: Iterable[str] = (),
    scale: Mapping[str, float] | None = None,
    key_format: KeyFormat | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    force: bool = False,
) -> ExportResult:
    drop = check_list("drop", drop)
    if key_format is None and format is None and Path(output).suffix == ".safetensors":
        key_format = pipeline_key_format(lora)  # of a PEFT folder for an image model
    container = lora.container
    if key_format is not None:
        container = "peft" if key_format == "peft" else "single"
    output_format = choose_format(replace(lora, container=container), output, format)
    is_ladder = output_format.name == "ladder"
    is_lora = output_format.is_lora
    sources = [*lora.sources, *([base_model] if base_model else [])]
    check_output(output, force, sources, is_file=bool(output_format.suffix))

    changes_ranks = any(value is not None for value in (rank, keep, error, max_bytes))
    has_other_change = bool(key_format or dtype or drop or scale)
    _check_request(
        output_format, rank, keep, error, max_bytes, for_vllm, pad, dtype, has_other_change
    )

    changed = lora
    if drop:
        changed = changed.drop(*drop)
    if scale:
        changed = changed.scale(scale)
    if pad:
        changed = changed.pad(check_rank(rank))
    if dtype is not None:
        changed = changed.cast(dtype)
    if for_vllm:
        assert error is not None
        needed = info(changed, error=error).rank_for_error(parse_share(error))
        assert not isinstance(rank, Sequence)
        limit = changed.max_rank if rank is None else changed.check_rank(rank)
        rank = min(round_up_to_vllm(needed), limit)
        error = None
    notes = [f"{change[0].upper()}{change[1:]}." for change in changed.changes]
    if key_format is not None:
        converted = changed.convert(key_format)
        if [layer.keys for layer in converted.layers] == [layer.keys for layer in changed.layers]:
            notes.append(f"The source has keys of the {key_format} format already.")
        if len(converted.layers) != len(changed.layers):
            notes.append(
                f"The {pluralize(len(changed.layers), 'layer')} are {len(converted.layers)} in the "
                f"{key_format} format, which has other layers for queries, keys and values."
            )
        if changed.order == "weighted" and converted.order is None:
            notes.append(
                "Its layers are split or fused, so the weighted order is lost. Truncate first, and "
                "change the keys of the output."
            )
        changed = converted
    ladder_ranks, weighted_errors = None, changed.weighted_squared_errors()
    if is_ladder:
        ladder_ranks = rank if rank is None or isinstance(rank, Sequence) else [rank]
    elif not pad and (changes_ranks or not is_lora):
        if isinstance(rank, int) and rank > changed.max_rank and is_lora:
            raise MatryoshkaError(
                f"{lora.name}: `rank` must be from 1 to {changed.max_rank}, got {rank}. Pass "
                "`pad=True` for a LoRA of a larger rank to train on."
            )
        assert not isinstance(rank, Sequence)
        if changed.small is not None and not keep is error is max_bytes is None:
            notes.append(
                f"The output is truncated from the main adapter. The trained ranks up to "
                f"{changed.small_rank} are exported by `rank` alone."
            )
        changed = changed.truncate(rank, keep=keep, error=error, max_bytes=max_bytes)
    result = changed.save(
        output,
        output_format.name,
        base_model=base_model,
        base_revision=base_revision,
        ranks=ladder_ranks,
        force=force,
    )
    copied = changed.other_tensors.items() & lora.other_tensors.items()
    if copied and output_format.name == "single":
        tensors = pluralize(len(copied), "other tensor")
        notes.append(f"Copied {tensors} unchanged, such as {min(copied)[0]}.")
    if lora.original_error > 0:
        notes.append(
            f"The source had a relative error of {lora.original_error:.1%} against its original, "
            f"the output has {result.written.original_error(changed):.1%}."
        )
    errors, weighted_error = result.errors, None
    if is_ladder:
        trained_ranks = tuple(rank for rank in errors if rank <= changed.small_rank)
    else:
        errors = {max(result.ranks.values()): result.written.relative_error()}
        trained_ranks = tuple(errors) if changed.order == "trained" else ()
        if changed.order == "weighted":
            weighted_error = relative_error(weighted_errors, result.ranks)
    return ExportResult(
        result.path,
        output_format.name,
        result.ranks,
        size_before=lora.size,
        size_after=result.size,
        errors=errors,
        notes=(*changed.notes, *notes),
        trained_ranks=trained_ranks,
        weighted_error=weighted_error,
        key_format=key_format,
        is_for_images=part_of_pipeline(lora) is not None,
    )


def _check_request(
    output_format: Format,
    rank: int | Sequence[int] | None,
    keep: float | str | None,
    error: float | str | None,
    max_bytes: int | str | None,
    for_vllm: bool,
    pad: bool,
    dtype: DtypeName | None,
    has_other_change: bool,
) -> None:
    """Raise MatryoshkaError if a request contradicts itself or the format, whatever the LoRA is.

    Args:
        output_format: The format of the output.
        rank: As in `export`, and so are the next ones up to ``dtype``.
        has_other_change: Whether anything other than the ranks changes.
    """
    is_ladder = output_format.name == "ladder"
    is_lora = output_format.is_lora
    changes_ranks = any(value is not None for value in (rank, keep, error, max_bytes))
    if for_vllm and (error is None or not keep is max_bytes is None):
        raise MatryoshkaError(
            "`for_vllm=True` needs `error`, such as '10%', and no `keep` or `max_bytes`."
        )
    if is_lora and not changes_ranks and not has_other_change:
        raise MatryoshkaError(
            "Pass at least one of `rank`, `keep`, `error`, `max_bytes`, `dtype`, `drop`, `scale` "
            "or `key_format`."
        )
    if not is_ladder and isinstance(rank, Sequence):
        hint = "Only `format='ladder'` takes several."
        if output_format.name == "single":
            hint = "Export each rank to a file of its own."
        raise MatryoshkaError(
            f"`rank` must be an integer in format {output_format.name!r}, got {short(rank)}. {hint}"
        )
    if rank is not None and not isinstance(rank, Sequence):
        check_rank(rank)
    for name, value in (("keep", keep), ("error", error), ("max_bytes", max_bytes)):
        if value is not None and is_ladder:
            raise MatryoshkaError(f"A ladder has one rank for all layers. Omit `{name}`.")
    if keep is not None and error is not None:
        raise MatryoshkaError("Pass `keep` or `error`, not both.")
    for share in (keep, error):
        if share is not None:
            parse_share(share)
    if max_bytes is not None:
        parse_size(max_bytes, whole=1)  # a size or a percentage, whatever the source's size is
        if not is_lora:
            raise MatryoshkaError(
                f"The size of format {output_format.name!r} is not known in advance. Pass `rank` "
                "or `keep` instead of `max_bytes`."
            )
    if dtype is not None and not (is_lora or is_ladder):
        raise MatryoshkaError(
            f"`dtype` is the dtype of a LoRA file, which format {output_format.name!r} does not "
            "write. Omit `dtype`."
        )
    if pad and not (is_lora and rank is not None and keep is error is max_bytes is None):
        raise MatryoshkaError(
            "`pad=True` writes a LoRA to train on, in which every layer gets the requested rank. "
            "Pass `rank`, and none of `keep`, `error`, `max_bytes` and `format`."
        )


def export_folder(
    source: PathLike,
    output: PathLike,
    rank: int | Sequence[int] | None = None,
    format: FormatName | None = None,
    **options: Unpack[ExportOptions],
) -> ExportFolderResult:
    """Export every LoRA in a folder into another folder, each under its own name.

    A LoRA that cannot be exported does not stop the others.

    Args:
        source: A folder of PEFT folders and single files.
        output: The folder to write.
        rank: As in `export`; a LoRA of a smaller rank keeps its own. A ladder has the ranks that
            the LoRA has.
        format: As in `export`.
        options: See `ExportOptions`. A pattern may match no layer of some LoRAs.

    Raises:
        MatryoshkaError: The source contains no LoRAs, the output already exists, or no LoRA could
            be exported.
    """
    paths = find_loras(source)
    if not paths:
        raise MatryoshkaError(f"{source} contains no LoRAs. Pass a folder that contains some.")
    force = options.pop("force", False)
    if format is not None:
        check_choice("format", format, list(FORMATS))
    suffix = Path(output).suffix
    if suffix.lower() in [spec.suffix for spec in FORMATS.values() if spec.suffix]:
        raise MatryoshkaError(
            f"{source} is a folder of LoRAs, so the output is a folder too, got {output}. Pass a "
            f"path without {suffix}."
        )
    drop = check_list("drop", options.pop("drop", ()))
    scale = dict(options.pop("scale", None) or {})
    _check_request(
        FORMATS[format or "peft"],
        rank,
        options.get("keep"),
        options.get("error"),
        options.get("max_bytes"),
        options.get("for_vllm", False),
        options.get("pad", False),
        options.get("dtype"),
        has_other_change=bool(options.get("key_format") or options.get("dtype") or drop or scale),
    )

    loras: dict[Path, Lora] = {}
    failed: dict[str, str] = {}
    for path in paths:
        try:
            loras[path] = open_lora(path)
        except MatryoshkaError as failure:
            failed[path.name] = str(failure)
    unused = {*drop, *scale}
    for lora in loras.values():
        unused.difference_update(matching_patterns(lora, unused))
    for pattern in sorted(unused):
        raise MatryoshkaError(f"{short(pattern)} matches no layer of the LoRAs in {source}.")

    entries = sorted(Path(source).iterdir())  # before the output, which may be in the source
    skipped = tuple(
        entry.name
        for entry in entries
        if entry.is_dir() and entry not in paths and not (entry / "evaluation.json").exists()
    )
    sources: list[PathLike] = [*paths]
    for lora in loras.values():
        sources += lora.sources
    if options.get("base_model"):
        sources.append(str(options["base_model"]))
    exported: list[ExportResult] = []
    with create_folder(output, force, sources) as temporary:
        bar = tqdm(loras.items(), "exporting", leave=False, unit=" LoRAs", disable=None)
        for path, lora in bar:
            name = path.name
            if options.get("key_format") == "peft":
                name = path.stem
            elif format is not None and not name.endswith(FORMATS[format].suffix):
                name += FORMATS[format].suffix
            lora_options: ExportOptions = {
                **options,
                "drop": matching_patterns(lora, drop),
                "scale": {pattern: scale[pattern] for pattern in matching_patterns(lora, scale)},
            }
            try:
                lora_rank = _rank_for(lora, rank, options, [*drop, *scale])
                result = _export(lora, temporary / name, lora_rank, format, **lora_options)
            except MatryoshkaError as failure:
                failed[path.name] = str(failure)
            else:
                exported.append(replace(result, path=Path(output) / name))
        if not exported:
            name = next(path.name for path in paths if path.name in failed)
            raise MatryoshkaError(
                f"{pluralize(len(failed), 'LoRA')} in {source} could not be exported. The first: "
                f"{with_name(name, failed[name])}"
            )
    failed = {path.name: failed[path.name] for path in paths if path.name in failed}
    return ExportFolderResult(Path(output), tuple(exported), failed, skipped)


def _rank_for(
    lora: Lora,
    rank: int | Sequence[int] | None,
    options: ExportOptions,
    patterns: Sequence[str],
) -> int | Sequence[int] | None:
    """Return the rank of a LoRA of a folder: the requested one, or its own if that is smaller."""
    if isinstance(rank, Sequence):
        return [value for value in rank if value <= lora.max_rank] or [lora.max_rank]
    if rank is not None:
        return rank if options.get("pad") else min(rank, lora.max_rank)
    changes = ("keep", "error", "max_bytes", "dtype", "key_format")
    if any(options.get(name) for name in changes) or matching_patterns(lora, patterns):
        return None
    return lora.max_rank  # it is only rewritten
