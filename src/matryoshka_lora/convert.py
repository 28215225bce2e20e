"""Convert adapters on the disk: `reorder` makes every rank good, `export` writes one for a reader."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from matryoshka_lora.budget import Keep, by_size, read_bytes, show_bytes, spectra
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.gguf import write_gguf
from matryoshka_lora.files.layers import AdapterFile, Lost
from matryoshka_lora.files.mlx import missing_rope, write_mlx
from matryoshka_lora.files.output import PathLike, check_place, new_file, new_folder
from matryoshka_lora.files.peft import (
    CONFIG_NAME,
    Ranks,
    open_adapter,
    plan_rank,
    write_nested,
    write_rank,
)
from matryoshka_lora.files.single import AS_GIVEN, Style, in_style, plan_single, write_single
from matryoshka_lora.files.tensors import read_json

Format = Literal["peft", "merged", "ladder", "gguf", "mlx"]
OnLayer = Callable[[], object] | None

_ENDINGS = {"gguf": ".gguf", "single": ".safetensors"}
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: Where.
        format: The format, or "single" for a single file.
        ranks: One for all layers, one for each by name, or those of a ladder.
        before: The bytes of the source's weights.
        after: The bytes that were written.
        error: The norm of what was left out over the norm of the whole update.
        limited: In how many layers ``rank`` was below what ``keep`` asked for.
        arguments: Of a ladder: what vLLM is started with.
        notes: What else a user should know.
    """

    path: Path
    format: str
    ranks: Ranks | Sequence[int]
    before: int
    after: int
    error: float
    limited: int = 0
    arguments: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return what to tell a user."""
        ranks = self.ranks
        if isinstance(ranks, int):
            named = f"rank {ranks}"
        elif isinstance(ranks, Mapping):
            named = f"ranks by layer from {min(ranks.values())} to {max(ranks.values())}"
        else:
            named = f"ranks {', '.join(map(str, ranks))}"
        found = [f"{self.path}: {named}, {show_bytes(self.before)} -> {show_bytes(self.after)}"]
        if not self.arguments:
            found.append(
                f"error {100 * self.error:.1f} % of the update's norm "
                f"({100 * (1 - self.error**2):.1f} % of its square is kept)"
            )
        if self.limited:
            found.append(f"--rank decided in {self.limited} layers, where --keep asks for more")
        return [*found, *self.notes]


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

    ``"svd"`` needs neither data nor the base model, keeps the function of the largest rank, and has
    one layer in memory at a time. ``"learned"`` and ``"trained"`` run the base model over training
    data.

    Args:
        source: PEFT's folder of an adapter, or a single ``.safetensors`` file.
        target: The folder or file to write. In a file each layer keeps its own rank.
        by: ``"svd"``, ``"learned"`` or ``"trained"``; see `NestedAdapter.reorder`.
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
    kind = _kind(adapter, target, None, None)
    check_place(target, force, source, kind == "peft")
    nested = (1 << n for n in range(adapter.max_rank.bit_length()))
    ranks = adapter.nesting.ranks if adapter.nesting else (*nested, adapter.max_rank)
    if by == "svd":
        if data is not None or rows is not None:
            raise MatryoshkaError("svd uses no data: leave data and rows out, or reorder by learned")
        adapter = replace(adapter, order=None)
        if kind == "single":
            write_single(adapter, target, {x.name: x.rank for x in adapter.layers}, force, on_layer)
        else:
            write_nested(adapter, target, force, on_layer)
    else:
        if data is None or kind == "single":
            raise MatryoshkaError(f"{by} runs the base model of an adapter folder over data: give both")
        from matryoshka_lora.adapter import load
        from matryoshka_lora.models import load_model, load_tokenizer

        name, revision = _base(adapter, model, revision)
        base = load_model(name, dtype, revision)
        nested_adapter = load(base, source, trainable=True)
        nested_adapter.reorder(by, data, load_tokenizer(name, revision), rows, seed)
        nested_adapter.save(target, force)
    return Exported(Path(target), kind, sorted({*ranks}), adapter.size, _size(Path(target)), 0.0)


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
        rank: The rank. Beside ``keep`` or ``max_bytes``, the most that a layer gets. The largest one
            of a ladder, where None is all.
        format: ``"peft"``, a folder; ``"merged"``, the base model with the adapter in its weights;
            ``"ladder"``, a folder of PEFT's for each nested rank; ``"gguf"``, a file for llama.cpp;
            ``"mlx"``, a folder for mlx-lm.
        keep: In each layer the smallest rank that keeps a share; see `Keep.read`.
        max_bytes: The most that the file of weights may have, such as ``"50MB"``.
        conv_rank: The rank of a single file's convolutions.
        style: The keys of a single file: ``"kohya"``, ``"diffusers"``, or ``"peft"`` for a folder.
            Alone it changes nothing else.
        model: The base model; None is what the adapter names.
        revision: The base model's revision on the hub.
        force: Whether what is at the target is replaced.
        on_layer: Called after each layer.

    Raises:
        MatryoshkaError: The adapter has no such rank or format, or the target is taken.
    """
    adapter = open_adapter(source)
    kind = _kind(adapter, target, format, style)
    place = check_place(target, force, source, folder=kind not in _ENDINGS)
    _check_wishes(adapter, kind, rank, keep, max_bytes, conv_rank, style)
    before, others = adapter.size, adapter.others
    limit = None if max_bytes is None else read_bytes(max_bytes)
    if limit is not None and limit >= before and (rank, conv_rank, style) == (None,) * 3:
        _copy(adapter, target, kind, force)
        own = {layer.name: layer.rank for layer in adapter.layers}
        return Exported(place, kind, own, before, _size(place), 0.0)
    if kind == "single" and (style or not adapter.is_single):
        adapter = in_style(adapter, style or "diffusers")
    elif adapter.is_single and kind == "peft":
        adapter = in_style(adapter, "peft")
    if (rank, keep, limit, conv_rank) == (None,) * 4 and kind != "ladder":
        adapter = replace(adapter, order=AS_GIVEN)
    ranks, limited = _ranks(adapter, kind, rank, keep, limit, conv_rank)
    notes, arguments, lost = list[str](), (), Lost(torch.zeros(1))
    name, revision = _base(adapter, model, revision, kind in ("merged", "gguf", "mlx"))
    if kind == "single":
        assert isinstance(ranks, Mapping)
        lost = write_single(adapter, target, ranks, force, on_layer)
        if others:
            notes.append(f"{len(others)} tensors that are no factors are kept as they are")
    elif kind == "peft":
        lost = write_rank(adapter, target, ranks, force, on_layer)
    return Exported(place, kind, ranks, before, _size(place), lost.error(), limited, arguments, tuple(notes))
