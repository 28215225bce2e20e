"""Convert adapters on disk: `reorder` makes every rank good, `export` writes one for a reader."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from matryoshka_lora.budget import (
    by_size,
    rank_that_keeps,
    read_bytes,
    read_share,
    show_bytes,
    singular_values,
)
from matryoshka_lora.errors import MatryoshkaError, explained
from matryoshka_lora.files.engines import missing_rope, write_gguf, write_mlx
from matryoshka_lora.files.layers import AdapterFile
from matryoshka_lora.files.output import PathLike, check_place, new_file, new_folder
from matryoshka_lora.files.peft import (
    CONFIG_NAME,
    open_adapter,
    plan_rank,
    write_nested,
    write_rank,
)
from matryoshka_lora.files.rows import read_rows
from matryoshka_lora.files.single import Style, in_style
from matryoshka_lora.files.tensors import read_json
from matryoshka_lora.models import load_model, source_of, tokenizer_beside

Format = Literal["peft", "merged", "ladder", "gguf", "mlx"]

_ENDINGS = {"gguf": ".gguf", "single": ".safetensors"}


@dataclass(frozen=True)
class Exported:
    """Report what `export` wrote.

    Attributes:
        path: The path.
        format: The format, or "single" for a single file.
        ranks: One for each layer by its name, or those of a ladder.
        before, after: The bytes of the source's weights, and of those that were written.
        error: The norm of what was left out over the norm of the whole update.
        notes: What else a user should know.
    """

    path: Path
    format: str
    ranks: Mapping[str, int] | tuple[int, ...]
    before: int
    after: int
    error: float
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return what to tell a user."""
        if isinstance(self.ranks, Mapping):
            low, high = min(self.ranks.values()), max(self.ranks.values())
            named = f"rank {low}" if low == high else f"ranks by layer from {low} to {high}"
        else:
            named = f"rank {', '.join(map(str, self.ranks))}"
        found = [f"{self.path}: {named}, {show_bytes(self.before)} -> {show_bytes(self.after)}"]
        if self.format != "ladder":
            error, kept = 100 * self.error, 100 * (1 - self.error**2)
            found += [f"error {error:.1f} % of the update's norm ({kept:.1f} % of its square kept)"]
        if self.format in ("peft", "single") and self.after >= self.before:
            found += ["Nothing was left out, so it is no smaller than before"]
        return [*found, *self.notes]


def reorder(
    source: PathLike,
    target: PathLike,
    by: Literal["svd", "trained"] = "svd",
    data: Any = None,
    *,
    rows: int | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Make any LoRA adapter nested, so that every prefix is a good one, and return the target.

    Args:
        source: PEFT's folder of an adapter, or a single ``.safetensors`` file.
        target: The folder or file to write. In a file each layer keeps its own rank.
        by: ``"svd"`` needs neither data nor the base model, and keeps the function of the largest
            rank. ``"trained"``: see `NestedAdapter.reorder`.
        data: The training data, for ``"trained"``: rows, or a file of them.
        rows: How many rows ``"trained"`` takes; None is as many as it needs, up to 3200.
        model: The base model; None is what the adapter names.
        revision: The base model's revision on the hub; None is what the adapter names.
        dtype: The base model's, as `load_model` takes it; None chooses by the hardware.
        seed: Seeds the choice of rows and ranks.
        force: Whether what is at the target is replaced.

    Raises:
        MatryoshkaError: The source cannot be read or has no ranks, or the target is taken.
    """
    adapter = open_adapter(source)
    kind = _kind(adapter, target, None if adapter.is_single else "peft", None)
    base_model = model or adapter.config.get("base_model_name_or_path")
    place = check_place(target, force, [*adapter.files, data, base_model])
    if (by == "svd") != (data is None):
        way = "give it rows with --data" if data is None else "write --by trained"
        raise MatryoshkaError(f"order {by!r} takes {'no ' * (by == 'svd')}data: {way}")
    if data is not None and kind == "single":
        raise MatryoshkaError(f"{adapter.name} names no base model to train: take --by svd")
    rows_of_data = None if data is None else read_rows(data)
    if kind == "single":
        write_rank(adapter, place, adapter.max_rank, force)
    elif by == "svd":
        write_nested(replace(adapter, order=None), place, force)
    else:
        from matryoshka_lora.nested import load

        name, revision = adapter.base_model(model, revision)
        base = load_model(name, dtype, revision)
        tokenizer = tokenizer_beside(adapter, name, revision)
        with tempfile.TemporaryDirectory() as folder:
            write_nested(adapter, f"{folder}/nested")
            nested = load(base, f"{folder}/nested", trainable=True)
        nested.reorder(by, rows_of_data, tokenizer, rows, seed)
        write_nested(replace(nested.opened(), files=adapter.files), place, force)
    return place


def export(
    source: PathLike,
    target: PathLike,
    rank: int | Sequence[int] | None = None,
    format: Format | None = None,
    *,
    keep: float | str | None = None,
    max_bytes: int | str | None = None,
    style: Style | None = None,
    model: str | None = None,
    revision: str | None = None,
    force: bool = False,
) -> Exported:
    """Write a rank of an adapter in a format for another program.

    An adapter that was never reordered is reordered by SVD on the way.

    Args:
        source: PEFT's folder of an adapter, or a single ``.safetensors`` file.
        target: The folder or file to write; its ending says the format.
        rank: The rank. Beside ``keep`` or ``max_bytes``, the most that a layer gets. For a ladder,
            several; None is the nested ones.
        format: ``"peft"``, a folder; ``"merged"``, the base model with the adapter in its weights;
            ``"ladder"``, one PEFT folder per nested rank; ``"gguf"``, a file for llama.cpp;
            ``"mlx"``, a folder for mlx-lm.
        keep: In each layer the smallest rank that keeps this share of the squared singular values,
            such as ``"95%"``.
        max_bytes: The maximum size of the weights file, such as ``"50MB"``.
        style: The keys of a single file: ``"kohya"``, ``"diffusers"``, or ``"peft"`` for a folder.
        model: The base model; None is what the adapter names.
        revision: The base model's revision on the hub; None is what the adapter names.
        force: Whether what is at the target is replaced.

    Raises:
        MatryoshkaError: The adapter has no such rank or format, or the target is taken.
    """
    adapter = open_adapter(source)
    kind, before = _kind(adapter, target, format, style), adapter.size
    place = check_place(target, force, adapter.files)
    share = None if keep is None else read_share(keep)
    limit = None if max_bytes is None else read_bytes(max_bytes)
    nothing = (rank, share, limit) == (None, None, None)
    if nothing and style is None and kind in ("peft", "single"):
        raise MatryoshkaError("say how much to keep: --rank 8, --keep 95% or --max-bytes 50MB")
    by_layer = ("peft", "single") if limit is not None else ("peft", "single", "gguf", "merged")
    if (share, limit) != (None, None) and kind not in by_layer:
        way = "--rank" if kind in ("ladder", "mlx") else "--rank or --keep"
        raise MatryoshkaError(f"format {kind} cannot be cut like that: give {way}")
    if style is not None:
        if nothing:
            adapter = replace(adapter, order="as given")  # the factors are only renamed
        adapter = in_style(adapter, style)
    ranks = _ranks(adapter, kind, rank, share, limit)
    error = _write(adapter, place, kind, ranks, (model, revision), force)
    notes, others = list[str](), list(adapter.others)
    if others and kind == "single":
        notes += [f"{len(others)} tensors stay as they are, such as {others[0]}"]
    if share is not None and isinstance(ranks, Mapping) and rank in ranks.values():
        bound = sum(each == rank for each in ranks.values())
        notes += [f"--rank {rank} bounds {bound} layers, which may keep less than {keep}"]
    written = [place] if place.is_file() else place.rglob("*.safetensors")
    after = sum(file.stat().st_size for file in written)
    return Exported(place, kind, ranks, before, after, error, tuple(notes))


def adapters_in(folder: PathLike) -> list[Path]:
    """Return the adapters in a folder that is none itself, sorted by name."""
    place = Path(folder)
    if not place.is_dir() or (place / CONFIG_NAME).exists():
        return []
    inside = sorted(place.iterdir())
    return [x for x in inside if x.suffix.lower() == ".safetensors" or (x / CONFIG_NAME).is_file()]


def export_all(
    source: PathLike,
    target: PathLike,
    rank: int | Sequence[int] | None = None,
    *,
    force: bool = False,
    **how: Any,
) -> list[str]:
    """Export every adapter of a folder into another one, each under its own name.

    Args:
        source: A folder of PEFT's folders and single files.
        target: The folder to write.
        rank: As `export`; an adapter of a smaller rank keeps its own.
        how: More arguments of `export`.

    Returns:
        A line for each adapter: what was written, or why it was not.

    Raises:
        MatryoshkaError: The target is taken, or none could be exported.
    """
    made, found = list[str](), adapters_in(source)
    others = sorted({x for x in Path(source).iterdir() if x.is_dir()} - {*found})
    failed = [f"not {x.name}: no adapter; give it alone to export what it holds" for x in others]
    end = _ENDINGS.get(str(how.get("format")), "")
    if Path(target).suffix.lower() in _ENDINGS.values():
        raise MatryoshkaError(f"{source} is a folder of adapters, and {target} is none: name one")
    with new_folder(target, force, found) as folder:
        for path in tqdm(found, "exporting", leave=False, unit=" adapters", disable=None):
            try:
                own = min(rank, open_adapter(path).max_rank) if isinstance(rank, int) else rank
                name = path.stem if how.get("style") == "peft" else path.name + end
                one = export(path, folder / name, own, **how)
                made.append("; ".join(replace(one, path=Path(name)).lines()))
            except MatryoshkaError as error:
                failed.append(f"not {path.name}: {error}")
        if not made:
            raise MatryoshkaError(
                f"none of {len(found)} adapters could be exported: {'; '.join(failed)}"
            )
    return made + failed


def _kind(
    adapter: AdapterFile, target: PathLike, format: Format | None, style: Style | None
) -> str:
    """Return the format of an output: what is asked for, or what the target's ending says."""
    end = Path(target).suffix.lower()
    by_end = next((kind for kind, each in _ENDINGS.items() if each == end), "peft")
    kind, reason = "peft" if style == "peft" else format or by_end, ""
    if adapter.is_single and style != "peft" and kind != "single":
        reason = "is a single file and stays one: name a file such as small.safetensors"
        reason += ", without --format" if format else ""
    elif not adapter.is_single and (style is not None or kind == "single"):
        reason = "is a folder and stays one: name a folder"
        reason += ", and no --style" if style else ""
    elif kind != by_end and kind in _ENDINGS:
        reason = f"becomes a file: name it {Path(target)}{_ENDINGS[kind]}"
    elif kind != by_end and by_end in _ENDINGS:
        reason = f"becomes a folder, which cannot be called {target}: leave {_ENDINGS[by_end]} out"
    if reason:
        raise MatryoshkaError(f"{adapter.name} {reason}")
    return kind


def _ranks(
    adapter: AdapterFile,
    kind: str,
    rank: int | Sequence[int] | None,
    share: float | None,
    limit: int | None,
) -> dict[str, int] | tuple[int, ...]:
    """Return the rank of each layer, or those of a ladder."""
    if kind == "ladder":
        return adapter.several([rank] if isinstance(rank, int) else rank)
    most = adapter.max_rank if rank is None else rank
    if not isinstance(most, int):
        way = "give one" if kind == "single" else "give --format ladder"
        raise MatryoshkaError(f"several ranks make a ladder, and no {kind}: {way}")
    adapter.check_rank(most)
    ranks = {layer.name: min(most, layer.rank) for layer in adapter.layers}
    if share is None and limit is None:
        # mlx-lm has one rank for all layers.
        return dict.fromkeys(ranks, most) if kind == "mlx" else ranks
    if adapter.order not in (None, "svd"):
        raise MatryoshkaError(
            f"singular values do not say what the ranks of {adapter.name} keep, since its order is "
            f"{adapter.order!r}: give --rank, or reorder it by svd first"
        )
    values = singular_values(adapter)
    if share is not None:
        ranks = {name: min(r, rank_that_keeps(values[name], share)) for name, r in ranks.items()}
    return ranks if limit is None else by_size(adapter, values, ranks, limit)


def _write(
    adapter: AdapterFile,
    place: Path,
    kind: str,
    ranks: Mapping[str, int] | tuple[int, ...],
    base: tuple[str | None, str | None],
    force: bool,
) -> float:
    """Write an output and return its error."""
    if isinstance(ranks, tuple):
        _ladder(adapter, place, ranks, force)
        return 0.0
    if kind in ("peft", "single"):
        return write_rank(adapter, place, ranks, force).error()
    name, revision = adapter.base_model(*base)
    config, plan = _base_config(name, revision), plan_rank(adapter, ranks)
    sources = (*adapter.files, name)
    if kind == "gguf":
        with new_file(place, force, sources) as file:
            write_gguf(plan, file, config)
        return plan.error()
    with new_folder(place, force, sources) as folder:
        if kind == "merged":
            return _merge(adapter, folder, ranks, name, revision)
        write_mlx(plan, folder, config)
    return plan.error()


def _merge(
    adapter: AdapterFile, place: Path, ranks: Mapping[str, int], name: str, revision: str | None
) -> float:
    """Write the base model with the adapter in its weights, in its own dtype; return the error."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from matryoshka_lora.nested import fit

    model = load_model(name, "auto", revision, "cpu")
    if getattr(model, "quantization_method", "") == "bitsandbytes":  # it saves no merged weights
        model = model.dequantize()
    fit(model, adapter)
    with tempfile.TemporaryDirectory() as folder:
        error = write_rank(adapter, f"{folder}/rank", ranks).error()
        adapted: Any = PeftModel.from_pretrained(model, f"{folder}/rank")
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(inside, LoraLayer) or isinstance(outside, LoraLayer):
        # A shared weight would get the updates of both layers. PEFT only warns of that.
        layer: Any = outside.get_base_layer() if isinstance(outside, LoraLayer) else outside
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        model.config.tie_word_embeddings = False
    adapted.merge_and_unload(safe_merge=True).save_pretrained(place)
    tokenizer_beside(adapter, name, revision).save_pretrained(place)
    config = read_json(place / "config.json")
    text = json.dumps({**config, **missing_rope(config)}, indent=2)
    (place / "config.json").write_text(text, encoding="utf-8")
    return error


def _ladder(adapter: AdapterFile, place: Path, ranks: tuple[int, ...], force: bool) -> None:
    """Write a folder of PEFT's for each rank."""
    family, own = Path(adapter.name).resolve().name, {x.name: x.rank for x in adapter.layers}
    with tempfile.TemporaryDirectory() as cache, new_folder(place, force, adapter.files) as folder:
        if adapter.order is None:  # one SVD for all ranks
            write_nested(adapter, f"{cache}/{family}")
            adapter = open_adapter(f"{cache}/{family}")
        for rank in ranks:
            at = {name: min(rank, most) for name, most in own.items()}
            write_rank(adapter, folder / f"{family}@{rank}", at)


def _base_config(name: str, revision: str | None) -> dict[str, Any]:
    """Return the base model's ``config.json``."""
    from transformers import PreTrainedConfig

    with explained(f"no base model {name!r}", "Give another one with --model", OSError):
        found, _ = PreTrainedConfig.get_config_dict(source_of(name), revision=revision or "main")
    return dict(found)
