"""Format the results of commands on files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matryoshka_lora.registry import ANSWERS_CAVEAT, FORMATS, PICTURES_CAVEAT, KeyFormat
from matryoshka_lora.text import format_percent, format_table, join_lines
from matryoshka_lora.units import format_size, pluralize

if TYPE_CHECKING:
    from matryoshka_lora.extraction.extract import ExtractResult
    from matryoshka_lora.lora.lora import Lora
    from matryoshka_lora.operations.combine import CombineResult
    from matryoshka_lora.operations.export import ExportFolderResult, ExportResult
    from matryoshka_lora.operations.info import FolderInfo, LoraInfo


def format_errors(
    errors: Mapping[int, float], whole: str, sizes: Mapping[int, int] | None = None
) -> list[str]:
    """Return a table of the relative error, and of the file size, at each rank.

    Args:
        errors: The relative error by rank.
        whole: What the error is relative to, such as ``"update"``.
        sizes: The size in bytes by rank.
    """
    rows = [["rank", "size", "error", "kept"]]
    for rank, error in errors.items():
        size = format_size(sizes[rank]) if sizes else ""
        rows.append([str(rank), size, format_percent(error), format_percent(1 - error**2)])
    if not sizes:
        rows = [[row[0], *row[2:]] for row in rows]
    return [
        *format_table(rows),
        f"  error: norm of what is truncated, relative to the norm of the {whole}",
        f"  kept: share of the squared norm of the {whole}",
    ]


def format_info(info: LoraInfo) -> str:
    """Return what `matryoshka info` prints for one LoRA."""
    lora = info.lora
    layers = lora.layers
    rows = {
        "base model": info.base_model or _likely_models(info),
        "triggers": ", ".join(info.trigger_words),
        "layers": f"{_format_parts(info)}, such as {layers[0].name}",
        "rank": _range([layer.rank for layer in layers]),
        "alpha": _range(info.alphas),
        "scale": _range([layer.scale for layer in layers]),
        "file": f"{format_size(lora.size)}, {', '.join(info.dtypes)}",
    }
    if any(layer.kind != "LoRA" for layer in layers):
        rows["kinds"] = _format_counts(info.layers_by_kind)
    if lora.other_tensors:
        size = format_size(sum(tensor.nbytes for tensor in lora.other_tensors.values()))
        kinds = _format_counts(info.other_kinds)
        rows["other"] = f"{kinds}: {size} at every rank, such as {min(lora.other_tensors)}"
    lines = [f"{lora.name} is {_kind_of(lora)}."]
    lines += [f"  {label:10}  {value}" for label, value in rows.items() if value]
    if info.layers:
        lines += ["", *_format_layers(info)]
    errors = {rank: info.errors[rank] for rank in lora.nested_ranks}
    lines += ["", *format_errors(errors, "update", info.sizes), FORMATS[lora.container].caveat]
    return join_lines(lines)


def _likely_models(info: LoraInfo) -> str:
    if not info.likely_models:
        return "not named"
    return f"not named; the layers are of {' or '.join(info.likely_models)}"


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {number}" for kind, number in counts.items())


def _format_parts(info: LoraInfo) -> str:
    """Return the number of layers, also of each part, and of its convolutions."""
    parts: list[str] = []
    for name, part in info.parts.items():
        words = f"{name} {part.layers}".strip()
        if part.convolutions:
            words += f" ({pluralize(part.convolutions, 'convolution')})"
        parts.append(words)
    text = ", ".join(parts)
    return text if len(parts) == 1 else f"{len(info.lora.layers)}: {text}"


def _format_layers(info: LoraInfo) -> list[str]:
    rows = [["rank", "95%", "99%", "stable rank", "norm", "layer"]]
    for name, layer in info.layers.items():
        numbers = [str(layer.rank), str(layer.rank_95), str(layer.rank_99)]
        numbers += [f"{layer.stable_rank:.1f}", f"{layer.largest_singular_value:.3g}"]
        rows.append([*numbers, name])
    return [
        *format_table(rows, left_aligned=1),
        "  95%, 99%: the rank that keeps this share of the squared singular values",
        "  stable rank: the squared norm over the largest squared singular value",
        "  norm: the largest singular value",
    ]


def format_info_folder(info: FolderInfo, max_error: float) -> str:
    """Return what `matryoshka info` prints for a folder of LoRAs: a table, and a rank for all."""
    limit = f"{100 * max_error:.4g}%"
    rows = [["rank", "layers", "size", f"rank for {limit}", "name"]]
    for name, lora_info in info.loras.items():
        lora = lora_info.lora
        numbers = [str(lora.max_rank), str(len(lora.layers)), format_size(lora.size)]
        rows.append([*numbers, str(lora_info.rank_for_error(max_error)), name])
    lines = format_table(rows, left_aligned=1)
    lines += [f"{name} cannot be read: {reason}" for name, reason in info.failed.items()]
    total_size = format_size(sum(lora_info.lora.size for lora_info in info.loras.values()))
    lines.append(
        f"{pluralize(len(info.loras), 'LoRA')}, {total_size}. At rank "
        f"{info.common_rank(max_error)}, each has a relative error of at most {limit}."
    )
    lines.append(_caveat([lora_info.lora.container for lora_info in info.loras.values()]))
    return join_lines(lines)


def format_export(result: ExportResult) -> str:
    """Return what `matryoshka export` prints for one LoRA."""
    lines = _export_lines(result)
    if len(result.errors) > 1:
        lines[1:2] = format_errors(result.errors, "update")
    if any(result.errors.values()):
        lines.append(FORMATS[result.format].caveat)
    return join_lines(lines)


def _export_lines(result: ExportResult) -> list[str]:
    """Return the ranks and sizes, the errors, and the notes of an export, one line each."""
    if len(result.errors) > 1:
        ranks = f"ranks {', '.join(map(str, result.errors))}"
        errors = ", ".join(format_percent(error) for error in result.errors.values())
        error_line = f"Relative errors {errors}"
    else:
        low, high = min(result.ranks.values()), max(result.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks from {low} to {high}, by layer"
        (error,) = result.errors.values()
        kept = format_percent(1 - error**2)
        error_line = f"Relative error {format_percent(error)} ({kept} of the squared norm kept)"
    sizes = f"{format_size(result.size_before)} -> {format_size(result.size_after)}"
    lines = [f"{result.path}: {ranks}, {sizes}", error_line]
    if FORMATS[result.format].is_lora and result.size_after >= result.size_before:
        lines.append("The output is not smaller than the source.")
    return [*lines, *result.notes]


def format_export_folder(result: ExportFolderResult) -> str:
    """Return what `matryoshka export` prints for a folder of LoRAs: a line for each."""
    lines = ["; ".join(_export_lines(exported)) for exported in result.exported]
    lines += [f"{name} is not a LoRA. Export its content separately." for name in result.skipped]
    size_before = sum(exported.size_before for exported in result.exported)
    size_after = sum(exported.size_after for exported in result.exported)
    lines.append(
        f"{pluralize(len(result.exported), 'LoRA')} exported, {len(result.failed)} failed: "
        f"{format_size(size_before)} -> {format_size(size_after)}"
    )
    lines.append(_caveat([exported.format for exported in result.exported]))
    return join_lines(lines)


def _caveat(formats: Sequence[str]) -> str:
    """Return the caveat of the formats of several LoRAs, or the default if they differ."""
    caveats = {FORMATS[name].caveat for name in formats}
    return caveats.pop() if len(caveats) == 1 else ANSWERS_CAVEAT


def how_to_load(result: ExportResult, key_format: KeyFormat | None = None) -> str:
    """Return how another program loads an exported LoRA.

    Args:
        result: The result.
        key_format: The format of the keys, if it was changed.
    """
    path = shlex.quote(str(result.path))
    readers = {"kohya": "ComfyUI", "diffusers": "diffusers"}
    if result.format == "single" and key_format in readers:
        return f"load {path} with {readers[key_format]}"
    if result.format == "peft":  # Python, and not a command
        path = repr(str(result.path))
    return FORMATS[result.format].load.format(path=path)


def format_combine(result: CombineResult, names: Sequence[str]) -> str:
    """Return what `matryoshka combine` prints.

    Args:
        result: The result.
        names: The names of the sources.
    """
    error = result.errors[max(result.errors)]
    lines = [
        f"{result.path}: {pluralize(result.num_layers, 'layer')}, rank {result.rank}, "
        f"{format_size(result.size)}, relative error {format_percent(error)}"
    ]
    if result.rank < result.exact_rank and error > 1e-6:
        lines.append(f"The exact sum needs at most rank {result.exact_rank}: --rank sum.")
    if result.path.is_dir():
        lines += ["", *format_errors(result.errors, "sum"), ANSWERS_CAVEAT]
    else:
        lines.append(PICTURES_CAVEAT)
    if len(names) > 1:
        rows = [["", *(str(number) for number in range(1, len(names) + 1)), ""]]
        for number, (name, cosines) in enumerate(zip(names, result.cosines, strict=True), start=1):
            rows.append([str(number), *(f"{cosine:.2f}" for cosine in cosines), name])
        lines += ["", "Cosines of the updates: 0 unrelated, 1 the same, negative opposed"]
        lines += format_table(rows, left_aligned=1)
    return join_lines(lines)


def format_extract(result: ExtractResult) -> str:
    """Return what `matryoshka extract` prints."""
    lines = [f"{result.path}: {pluralize(len(result.ranks), 'layer')}", ""]
    lines += format_errors(result.errors, "change")
    lines.append(PICTURES_CAVEAT if result.path.is_file() else ANSWERS_CAVEAT)
    lines += result.notes
    if result.rounding_share > 0.001:
        share = format_percent(result.rounding_share)
        lines.append(f"{share} of the squared change is due to rounding of the weights.")
    if result.unsaved_tensors:
        modules = [key.rpartition(".")[0] for key in result.unsaved_tensors]
        size = format_size(sum(result.unsaved_tensors.values()))
        lines.append(
            f"Not in the LoRA: {pluralize(len(modules), 'tensor')} ({size}) that changed too, such "
            f"as {', '.join(modules[:3])}."
        )
        if result.path.is_dir():
            lines.append(f"Add --modules-to-save {modules[0]} to save this one in full.")
    return join_lines(lines)


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}, depending on the layer"


def _kind_of(lora: Lora) -> str:
    ranks = ", ".join(map(str, lora.nested_ranks))
    if lora.container == "single":
        return "a LoRA in a single file"
    if lora.deploy == "paper":
        return f"a nested LoRA adapter in the paper's deployment, usable at ranks {ranks} only"
    if lora.order is None:
        return "a LoRA adapter without an order; `matryoshka reorder` makes it nested"
    order = "trained ranks" if lora.order == "trained" else "reordered by SVD"
    return f"a nested LoRA adapter ({order}), usable at every rank (nested: {ranks})"
