"""Convert adapters on disk: `reorder` makes every rank good, `export` writes one for a reader."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from matryoshka_lora.budget import Keep, by_size, read_bytes, show_bytes, spectra
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.gguf import write_gguf
from matryoshka_lora.files.layers import AdapterFile, Lost, OnLayer
from matryoshka_lora.files.mlx import missing_rope, write_mlx
from matryoshka_lora.files.output import PathLike, check_place, new_file, new_folder
from matryoshka_lora.files.peft import Ranks, open_adapter, plan_rank, write_nested, write_rank
from matryoshka_lora.files.single import AS_GIVEN, Style, in_style, plan_single, write_single
from matryoshka_lora.files.tensors import read_json
from matryoshka_lora.nesting import Nesting

Format = Literal["peft", "merged", "ladder", "gguf", "mlx"]

_ENDINGS = {"gguf": ".gguf", "single": ".safetensors"}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: Where.
        format: The format, or "single" for a single file.
        ranks: One for all layers, one for each by name, or those of a ladder.
        before: The bytes of the source's weights.
        after: The bytes of the weights that were written.
        error: The norm of what was left out over the norm of the whole update.
        note: What else a user should know.
    """

    path: Path
    format: str
    ranks: Ranks | tuple[int, ...]
    before: int
    after: int
    error: float = 0.0
    note: str = ""

    def lines(self) -> list[str]:
        """Return what to tell a user."""
        if isinstance(self.ranks, Mapping):
            low, high = min(self.ranks.values()), max(self.ranks.values())
            named = f"rank {low}" if low == high else f"ranks by layer from {low} to {high}"
        else:
            several = (self.ranks,) if isinstance(self.ranks, int) else self.ranks
            named = f"rank {', '.join(map(str, several))}"
        found = [f"{self.path}: {named}, {show_bytes(self.before)} -> {show_bytes(self.after)}"]
        if self.format != "ladder":
            error, kept = 100 * self.error, 100 * (1 - self.error**2)
            found.append(
                f"error {error:.1f} % of the update's norm ({kept:.1f} % of its square kept)"
            )
        return [*found, self.note] if self.note else found


def reorder(
    source: PathLike,
    target: PathLike,
    by: str = "svd",
    data: Any = None,
    *,
    rows: int | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    force: bool = False,
    on_layer: OnLayer = None,
) -> Exported:
    """Make any LoRA adapter nested, so that every prefix is a good adapter of its rank.

    Args:
        source: PEFT's folder of an adapter, or a single ``.safetensors`` file.
        target: The folder or file to write. In a file each layer keeps its own rank.
        by: ``"svd"`` needs neither data nor the base model, and keeps the function of the largest
            rank. ``"learned"`` and ``"trained"``: see `NestedAdapter.reorder`.
        data: The training data, for all but ``"svd"``.
        rows: How many rows of the data are used; None is the method's own number.
        model: The base model; None is what the adapter names.
        revision: The base model's revision on the hub; None is what the adapter names.
        dtype: The base model's dtype; None chooses by the hardware.
        seed: Seeds the choice of rows and ranks.
        force: Whether what is at the target is replaced.
        on_layer: Called after each layer of ``"svd"``.

    Raises:
        MatryoshkaError: The source cannot be read or has no ranks, or the target is taken.
    """
    adapter = open_adapter(source)
    kind = _kind(adapter, target, None if adapter.is_single else "peft", None)
    place = check_place(target, force, source, kind == "peft")
    ranks = (adapter.nesting or Nesting.powers_of_two(adapter.max_rank)).ranks
    if (by == "svd") != (data is None) or (data is not None and kind == "single"):
        raise MatryoshkaError(f"svd uses no data, {by} an adapter's folder and data: give these")
    if by == "svd":
        adapter = replace(adapter, order=None)
        if kind == "single":
            own = {layer.name: layer.rank for layer in adapter.layers}
            write_single(adapter, place, own, force, on_layer)
        else:
            write_nested(adapter, place, force, on_layer)
    else:
        from matryoshka_lora.models import load_model, load_tokenizer
        from matryoshka_lora.nested import load

        name, revision = _base(adapter, model, revision)
        base, tokenizer = load_model(name, dtype, revision), load_tokenizer(name, revision)
        with tempfile.TemporaryDirectory() as folder:
            write_nested(adapter, f"{folder}/nested")
            nested = load(base, f"{folder}/nested", trainable=True)
        nested.reorder(cast(Any, by), data, tokenizer, rows, seed)
        nested.save(place, force)
    return Exported(place, kind, ranks, adapter.size, _size(place))


def export(
    source: PathLike,
    target: PathLike,
    rank: int | None = None,
    format: Format | None = None,
    *,
    keep: float | str | None = None,
    max_bytes: int | str | None = None,
    conv_rank: int | None = None,
    style: Style | None = None,
    model: str | None = None,
    revision: str | None = None,
    force: bool = False,
    on_layer: OnLayer = None,
) -> Exported:
    """Write a rank of an adapter in the format that a device or an engine takes.

    An adapter that was never reordered is reordered by SVD on the way.

    Args:
        source: PEFT's folder of an adapter, or a single ``.safetensors`` file.
        target: The folder or file to write; its ending says the format.
        rank: The rank. Beside ``keep`` or ``max_bytes``, the most that a layer gets. The largest
            one of a ladder, where None is all.
        format: ``"peft"``, a folder; ``"merged"``, the base model with the adapter in its weights;
            ``"ladder"``, a folder of PEFT's for each nested rank; ``"gguf"``, a file for llama.cpp;
            ``"mlx"``, a folder for mlx-lm.
        keep: In each layer the smallest rank that keeps a share; see `Keep.read`.
        max_bytes: The most that the file of weights may have, such as ``"50MB"``.
        conv_rank: The rank of a single file's convolutions.
        style: The keys of a single file: ``"kohya"``, ``"diffusers"``, or ``"peft"`` for a folder.
            Alone it changes nothing else.
        model, revision, force, on_layer: As for `reorder`.

    Raises:
        MatryoshkaError: The adapter has no such rank or format, or the target is taken.
    """
    adapter = open_adapter(source)
    kind, before = _kind(adapter, target, format, style), adapter.size
    place = check_place(target, force, source, folder=kind not in _ENDINGS)
    limit = None if max_bytes is None else read_bytes(max_bytes)
    is_plain = (rank, conv_rank, style) == (None, None, None)
    _check(kind, is_plain, keep, limit, conv_rank)
    if style or adapter.is_single != (kind == "single"):
        adapter = in_style(adapter, style or "diffusers")
    elif limit is not None and limit >= before and is_plain:
        _copy(adapter, place, force)
        own = {layer.name: layer.rank for layer in adapter.layers}
        return Exported(place, kind, own, before, _size(place))
    if kind == "ladder":
        ladder = _ladder(adapter, place, rank, force, on_layer)
        note = f"vLLM's command: matryoshka serve {source} --print"
        return Exported(place, kind, ladder, before, _size(place), note=note)
    if (rank, keep, limit, conv_rank) == (None, None, None, None):
        adapter = replace(adapter, order=AS_GIVEN)
    ranks, limited = _ranks(adapter, kind, rank, keep, limit, conv_rank)
    lost, note = _write(adapter, place, kind, ranks, (model, revision), force, on_layer)
    if limited:
        note = f"rank {rank} decided in {limited} of {len(adapter.layers)} layers: keep wants more"
    return Exported(place, kind, ranks, before, _size(place), lost.error(), note)


def _check(
    kind: str, is_plain: bool, keep: object, max_bytes: int | None, conv_rank: int | None
) -> None:
    """Refuse contradictions; ``is_plain``: neither a rank nor a style is wished for."""
    by_layer = keep is not None or max_bytes is not None
    reason = ""
    if is_plain and not by_layer and kind != "ladder":
        reason = "say how much to keep: --rank 8, --keep 95% or --max-bytes 50MB"
    elif keep is not None and max_bytes is not None:
        reason = "--keep and --max-bytes each choose the ranks: leave one out"
    elif by_layer and kind in ("ladder", "mlx"):
        reason = f"format {kind} has one rank for all layers: give --rank"
    elif max_bytes is not None and kind in ("gguf", "merged"):
        reason = f"format {kind} cannot be held to a size: give --rank or --keep"
    elif conv_rank is not None and kind != "single":
        reason = "--conv-rank is for single files: give --rank"
    if reason:
        raise MatryoshkaError(reason)


def _kind(
    adapter: AdapterFile, target: PathLike, format: Format | None, style: Style | None
) -> str:
    """Return the format of an output: what is asked for, or what the target's ending says."""
    end = Path(target).suffix if Path(target).suffix in _ENDINGS.values() else ""
    if adapter.is_single and format is not None:
        raise MatryoshkaError(f"{adapter.name} is a single file and stays one: leave --format out")
    by_end = next((kind for kind, ending in _ENDINGS.items() if ending == end), "peft")
    kind = "single" if adapter.is_single else (format or by_end)
    if style is not None:
        kind = "peft" if style == "peft" else "single"
    wanted = _ENDINGS.get(kind, "")
    if wanted != end:
        how = f"a file: write {Path(target)}{wanted}" if wanted else "a folder, and no file"
        raise MatryoshkaError(f"{target} cannot be the output, since it becomes {how}")
    return kind


def _ranks(
    adapter: AdapterFile,
    kind: str,
    rank: int | None,
    keep: float | str | None,
    max_bytes: int | None,
    conv_rank: int | None,
) -> tuple[Ranks, int]:
    """Return the ranks, and in how many layers the wished rank is below what keep asks for."""
    for each in (rank, conv_rank):
        if each is not None:
            adapter.check_rank(each)
    most = {}
    for layer in adapter.layers:
        asked = conv_rank if conv_rank and layer.is_convolution else rank
        most[layer.name] = min(asked or layer.rank, layer.rank)
    if keep is None and max_bytes is None:
        return (rank if rank and kind != "single" else most), 0
    if adapter.order not in (None, "svd"):
        raise MatryoshkaError(
            f"singular values do not say what the ranks of {adapter.name} keep, since its order is "
            f"{adapter.order!r}: give --rank, or reorder it by svd first"
        )
    values, _ = spectra(adapter)
    if keep is not None:
        wanted = {name: Keep.read(keep).rank(own) for name, own in values.items()}
        limited = sum(wanted[name] > most[name] for name in most) if rank else 0
        return {name: min(most[name], wanted[name]) for name in most}, limited
    plan = plan_single if kind == "single" else plan_rank
    room = max_bytes or 0
    return by_size(adapter.layers, values, most, room, lambda own: plan(adapter, own).size), 0


def _write(
    adapter: AdapterFile,
    place: Path,
    kind: str,
    ranks: Ranks,
    base: tuple[str | None, str | None],
    force: bool,
    on_layer: OnLayer,
) -> tuple[Lost, str]:
    """Write an output; return what it leaves out, and what a user should know."""
    if kind == "single":
        assert isinstance(ranks, Mapping)
        others = adapter.others
        note = f"{len(others)} tensors stay as they are, such as {others[0]}" if others else ""
        return write_single(adapter, place, ranks, force, on_layer), note
    if kind == "peft":
        return write_rank(adapter, place, ranks, force, on_layer), ""
    name, revision = _base(adapter, *base)
    config, plan = _base_config(name, revision), plan_rank(adapter, ranks)
    if kind == "gguf":
        with new_file(place, force, adapter.source) as file:
            return write_gguf(plan, file, config, on_layer), ""
    with new_folder(place, force, adapter.source) as folder:
        if kind == "merged":
            return _merge(adapter, folder, ranks, (name, revision, config), on_layer), ""
        fields = missing_rope(config)
        note = f"mlx-lm may need these in the base model's config.json: {json.dumps(fields)[1:-1]}"
        return write_mlx(plan, folder, config, on_layer), note if fields else ""


def _merge(
    adapter: AdapterFile,
    place: Path,
    ranks: Ranks,
    base: tuple[str, str | None, dict[str, Any]],
    on_layer: OnLayer,
) -> Lost:
    """Write the base model with the adapter in its weights, in the base model's own dtype."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from matryoshka_lora.models import load_model, load_tokenizer

    name, revision, config = base
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    model = load_model(name, getattr(torch, dtype.removeprefix("torch.")), revision, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        lost = write_rank(adapter, f"{folder}/rank", ranks, on_layer=on_layer)
        adapted: Any = PeftModel.from_pretrained(model, f"{folder}/rank")
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(inside, LoraLayer) or isinstance(outside, LoraLayer):
        # A shared weight would get the updates of both layers. PEFT only warns of that.
        layer: Any = outside.get_base_layer() if isinstance(outside, LoraLayer) else outside
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        model.config.tie_word_embeddings = False
    adapted.merge_and_unload(safe_merge=True).save_pretrained(place)
    load_tokenizer(name, revision).save_pretrained(place)
    written = read_json(place / "config.json")
    text = json.dumps({**written, **missing_rope(written)}, indent=2)
    (place / "config.json").write_text(text, encoding="utf-8")
    return lost


def _ladder(
    adapter: AdapterFile, place: Path, most: int | None, force: bool, on_layer: OnLayer
) -> tuple[int, ...]:
    """Write a folder for each nested rank up to the largest one; return the ranks."""
    family = Path(adapter.name).resolve().name
    top = most or adapter.max_rank
    adapter.check_rank(top)
    with tempfile.TemporaryDirectory() as cache, new_folder(place, force, adapter.source) as folder:
        if adapter.order is None:  # one SVD for all ranks
            write_nested(adapter, f"{cache}/{family}", on_layer=on_layer)
            adapter = open_adapter(f"{cache}/{family}")
        nested = (adapter.nesting or Nesting.powers_of_two(adapter.max_rank)).ranks
        ranks = (*(rank for rank in nested if rank < top), top)
        for rank in ranks:
            write_rank(adapter, folder / f"{family}@{rank}", rank, on_layer=on_layer)
    return ranks


def _base(adapter: AdapterFile, model: str | None, revision: str | None) -> tuple[str, str | None]:
    """Return name and revision of the base model."""
    own = adapter.config.get("base_model_name_or_path")
    if not (model or own):
        raise MatryoshkaError(f"{adapter.name} does not name its base model: give it with --model")
    return str(model or own), revision or (None if model else adapter.config.get("revision"))


def _base_config(name: str, revision: str | None) -> dict[str, Any]:
    """Return the base model's ``config.json``."""
    from transformers.utils import cached_file

    from matryoshka_lora.models import source_of

    try:
        file = cached_file(source_of(name), "config.json", revision=revision or "main")
    except OSError as error:
        raise MatryoshkaError(f"no base model {name!r}: give another one with --model") from error
    return read_json(Path(str(file)))


def _copy(adapter: AdapterFile, place: Path, force: bool) -> None:
    """Copy an adapter that has all the room it needs."""
    if adapter.is_single:
        with new_file(place, force, adapter.source) as file:
            shutil.copyfile(adapter.files[0], file)
        return
    with new_folder(place, force, adapter.source) as folder:
        for each in (*adapter.files, *adapter.files[0].parent.glob("adapter_*.json")):
            shutil.copyfile(each, folder / each.name)


def _size(place: Path) -> int:
    """Return the bytes of a file, or of all weights in a folder."""
    files = [place] if place.is_file() else place.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files)
