"""Export a LoRA at a given rank, or for another runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matryoshka_lora.errors import MatryoshkaError, check_list, optional_imports
from matryoshka_lora.formats import DtypeName, Format, KeyFormat, OutputFormat
from matryoshka_lora.lora_file.atomic import PathLike, check_output, create_file, create_folder
from matryoshka_lora.lora_file.gguf import write_gguf
from matryoshka_lora.lora_file.keys.formats import convert_keys
from matryoshka_lora.lora_file.lora import LoraFile, OutputPlan, WrittenOutput
from matryoshka_lora.lora_file.mlx import write_mlx
from matryoshka_lora.lora_file.open import open_lora
from matryoshka_lora.lora_file.peft_folder import PeftFolder, open_peft_folder
from matryoshka_lora.lora_file.single_file import SingleFile
from matryoshka_lora.lora_file.transforms import (
    cast_factors,
    drop_layers,
    pad_layers,
    plan_same_scales,
    scale_layers,
)
from matryoshka_lora.operations.base_config import read_base_config
from matryoshka_lora.operations.output_format import EXPORT_FORMATS, choose_output_format
from matryoshka_lora.operations.rank_choice import (
    RankRequest,
    check_request,
    choose_ranks,
    ladder_ranks,
    parse_request,
)
from matryoshka_lora.units import pluralize


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


def export(
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
    revision: str | None = None,
    alpha: float | None = None,
    force: bool = False,
) -> ExportResult:
    """Export a LoRA at a given rank, or for another runtime.

    A LoRA without an order is reordered by singular value decomposition first, so that the output
    is its best approximation of that rank. Without rank, keep, error and max_bytes, a PEFT folder
    or a single file keeps its ranks, and only what else is requested changes.

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
        pad: Whether to write a LoRA of a larger rank to train on, with the same update. Every layer
            gets ``rank``. The new rows of A are random, and the new columns of B zero.
        dtype: The dtype of the factors: ``"fp32"``, ``"bf16"`` or ``"fp16"``. Defaults to theirs.
        drop: Patterns of names of layers that are left out, such as ``"lora_te*"``.
        scale: The factor of the update of each layer, by a pattern of names. The last pattern that
            matches a layer counts. The error is relative to the scaled update.
        key_format: The format of a single file's keys: ``"kohya"``, ``"diffusers"``, or ``"peft"``
            for a PEFT folder.
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
    request = parse_request(rank, keep, error, max_bytes)
    drop = check_list("drop", drop)
    has_other_change = bool(key_format or dtype or drop or scale)
    check_request(request, output_format, pad=pad, has_other_change=has_other_change)
    changed = _change_layers(lora, output_format, request.rank if pad else None, dtype, drop, scale)
    notes = _notes_on_layers(changed)
    if isinstance(changed, SingleFile) and key_format is not None:
        converted = convert_keys(changed, key_format)
        if request.is_empty and converted.layers == lora.layers:
            raise MatryoshkaError(f"{lora.name} has keys of the {key_format} format already.")
        notes += _notes_on_keys(changed, converted, key_format)
        changed = converted

    ranks: dict[str, int] | tuple[int, ...]
    if output_format == "ladder":
        ranks = ladder_ranks(changed, rank)
        errors = _write_ladder(changed, output_path, ranks, force)
    else:
        if pad or (request.is_empty and output_format in ("peft", "single")):
            plan = plan_same_scales(changed) if key_format is None else changed.plan_unchanged()
        else:
            plan = changed.plan(choose_ranks(changed, request, output_format))
        ranks = plan.ranks
        written = _write(
            changed, plan, output_path, output_format, base_model, base_revision, force
        )
        errors = {plan.rank: written.relative_error()}
        notes += _notes_on_output(changed, ranks, request, output_format)
    size_after = _weights_size(output_path)
    return ExportResult(
        output_path, output_format, ranks, size_before, size_after, errors, tuple(notes)
    )


def _change_layers(
    lora: LoraFile,
    output_format: OutputFormat,
    padded_rank: int | Sequence[int] | None,
    dtype: DtypeName | None,
    drop: Sequence[str],
    scale: Mapping[str, float] | None,
) -> LoraFile:
    """Return a LoRA with everything that is requested except other ranks and keys."""
    if dtype is not None and not EXPORT_FORMATS[output_format].supports_dtype:
        raise MatryoshkaError(
            f"`dtype` is that of a LoRA file, which format {output_format!r} does not write. Omit "
            "`dtype`."
        )
    if drop:
        lora = drop_layers(lora, drop)
    if scale:
        lora = scale_layers(lora, scale)
    if padded_rank is not None:
        assert isinstance(padded_rank, int)  # `check_request` rejects several
        lora = pad_layers(lora, padded_rank)
    if dtype is not None:
        lora = cast_factors(lora, dtype)
    return lora


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
            from matryoshka_lora.peft.merge import write_merged
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
            plan = lora.plan({name: min(rank, max_rank) for name, max_rank in layer_ranks.items()})
            written = plan.write(folder / f"{adapter_name}@{rank}")
            errors[rank] = written.relative_error()
    return errors


def _notes_on_layers(lora: LoraFile) -> list[str]:
    """Return what happened to the layers of the source, before their keys are converted."""
    notes = list(lora.notes) if isinstance(lora, SingleFile) else []
    notes += [f"{change[0].upper()}{change[1:]}." for change in lora.changes]
    return notes


def _notes_on_keys(lora: LoraFile, converted: LoraFile, key_format: KeyFormat) -> list[str]:
    if len(converted.layers) == len(lora.layers):
        return []
    return [
        f"The {pluralize(len(lora.layers), 'layer')} are {len(converted.layers)} in the "
        f"{key_format} format, which has other layers for queries, keys and values."
    ]


def _notes_on_output(
    lora: LoraFile, ranks: Mapping[str, int], request: RankRequest, output_format: OutputFormat
) -> list[str]:
    notes: list[str] = []
    if lora.other_tensors and output_format == "single":
        tensors = pluralize(len(lora.other_tensors), "other tensor")
        notes.append(f"Copied {tensors} unchanged, such as {min(lora.other_tensors)}.")
    if request.share is not None or request.error is not None:
        num_bounded = sum(rank == request.rank for rank in ranks.values())
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
