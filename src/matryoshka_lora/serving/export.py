"""`export`: a rank of an adapter in the format that a device or an engine takes."""

from __future__ import annotations

import heapq
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import check_free, check_writable, output_directory, write_text
from matryoshka_lora.formats.beside import Spectra
from matryoshka_lora.formats.card import CARD_NAME, has_own_card, ladder_readme
from matryoshka_lora.formats.directions import write_directions
from matryoshka_lora.formats.layout import Layer
from matryoshka_lora.formats.opened import OpenedAdapter, first_ranks, from_memory, open_adapter
from matryoshka_lora.formats.sidecar import write_sidecar
from matryoshka_lora.formats.write import Ranks, check_apart, cut, write_adapter
from matryoshka_lora.reordering.files import deployed, reorder_opened, spectra_of
from matryoshka_lora.serving.converted import check_folders, export_gguf, export_gguf_ladder, export_mlx

if TYPE_CHECKING:
    from matryoshka_lora.serving.on_base import Base, Verified


Format = Literal["peft", "merged", "gguf", "mlx", "ladder", "gguf-ladder", "directions"]


@dataclass(frozen=True)
class Chosen:
    """The ranks that were chosen.

    Attributes:
        ranks: By layer; 0 leaves a layer out.
        parameters: How many numbers they have, without padding.
        total: How many the whole adapter has.
        kept: The share of the sum of squared singular values that is kept, 0 to 1.
    """

    ranks: dict[str, int]
    parameters: int
    total: int
    kept: float


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: Where.
        ranks: One; one for each layer; or those of a ladder.
        chosen: How a budget was spent, if there was one.
        base: The base model's name, if the adapter or the caller says it.
        verified: How far its logits are from the nested adapter's, at most; None where no base model was at hand.
    """

    path: Path
    ranks: Ranks | Sequence[int]
    chosen: Chosen | None
    base: str | None
    verified: Verified | None


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    rank: int | None = None,
    format: Format = "peft",
    *,
    budget: float | None = None,
    pad: bool = False,
    model: str | None = None,
    revision: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Write a rank of an adapter in the format that a device or an engine takes.

    An adapter that is not nested, or was never reordered, is reordered by SVD on the way. The numbers of each layer are
    compared with the adapter's before anything is put into place; with the base model on this machine, so are logits.

    Example::

        export("my-adapter", "rank-4", rank=4)

    Args:
        source: The folder of a LoRA adapter.
        target: What to write: a folder, or for ``"gguf"`` a file.
        rank: The rank of every layer. Of a ladder or a file of directions, the largest one; None is R.
        format: ``"peft"``: an ordinary LoRA adapter. ``"merged"``: the base model with the adapter in its weights.
            ``"gguf"``: a file for llama.cpp. ``"mlx"``: a folder for mlx-lm. ``"ladder"``: one ordinary adapter for
            each nested rank. ``"gguf-ladder"``: one GGUF file for each. ``"directions"``: one file of which a device
            reads only the ranks it needs.
        budget: In the place of a rank: the share of the parameters; layers get ranks of their own.
        pad: With a budget: fill up to one rank, for engines that know one; mlx-lm does, so ``"mlx"`` always is.
        model: The base model; None is what the adapter names.
        revision: Of the base model on the hub; None is the one that the adapter was trained on.
        verify: Whether logits are compared, if the base model is on this machine.
        overwrite: Whether the target may hold an adapter, a model or an evaluation, of which nothing is left then.

    Raises:
        MatryoshkaError: The adapter is damaged, has no such rank, or cannot be had in this format; the target cannot be
            written or holds something that may not be overwritten; or what was made computes something else. Nothing
            has been written then.
    """
    out = Path(target)
    if format not in get_args(Format):
        raise MatryoshkaError(f"format is {format!r}; write one of {', '.join(map(repr, get_args(Format)))}")
    _check_wishes(rank, format, budget, pad)
    opened, spectra = _ready(open_adapter(source))
    if rank is not None:
        opened.nested.check_rank(rank)
        rank = int(rank)  # NumPy's integers are not JSON
    check_apart(source, out)
    check_writable(out.parent if format == "gguf" else out)
    check_free(out, overwrite)
    chosen = None if budget is None else choose_ranks(opened.layers, spectra or spectra_of(opened), budget)
    ranks: Ranks = chosen.ranks if chosen is not None else rank or opened.rank
    # A file of directions is compared with the adapter bit by bit.
    needs, compares = format in ("merged", "gguf", "mlx", "gguf-ladder"), verify and format != "directions"
    name, revision, base = _base(opened, model, revision, needs or compares)
    if base is None and needs:
        raise MatryoshkaError(
            f"format {format} needs the base model, and {name or 'none'} is not on this machine: give its folder with "
            "--model"
        )
    checked_on = base if compares else None
    verified: Verified | None = None
    ladder: list[int] = []
    base_config = _base_config(str(name), revision) if needs else None
    if format == "gguf":
        verified = export_gguf(opened, ranks, pad, out, base_config, checked_on, overwrite)
    else:
        with output_directory(out, overwrite) as folder:
            if format == "peft":
                write_adapter(folder, cut(opened, ranks, pad), home=out)
                verified = check_folders(opened, [ranks], [folder], checked_on, pad)
            elif format == "merged" and base is not None:
                from matryoshka_lora.models import load_tokenizer
                from matryoshka_lora.serving.on_base import write_merged

                tokenizer = load_tokenizer(str(name), revision=revision)
                verified = write_merged(folder, opened, ranks, pad, base, tokenizer, verify)
            elif format == "mlx":
                verified = export_mlx(opened, ranks, folder, base_config, checked_on)
            elif format in ("ladder", "gguf-ladder"):
                top = opened.rank if rank is None else rank
                ladder = [*(r for r in opened.nested.nesting.ranks if r < top), top]
                if has_own_card(out):
                    raise MatryoshkaError(
                        f"{out} holds a {CARD_NAME} that somebody has written, and a ladder needs one: choose another "
                        "folder"
                    )
                if format == "ladder":
                    verified = _ladder(opened, ladder, folder, checked_on)
                else:
                    verified = export_gguf_ladder(opened, ladder, folder, base_config, checked_on)
            else:
                _directions(opened, folder, opened.rank if rank is None else rank)
    return Exported(out, ladder or ranks, chosen, name, verified)


def _check_wishes(rank: int | None, format: Format, budget: float | None, pad: bool) -> None:
    whole = format in ("ladder", "gguf-ladder", "directions")
    if (rank is None) == (budget is None) and not (whole and budget is None):
        raise MatryoshkaError("give either a rank, for example 8, or a budget, for example 0.25")
    if budget is not None and whole:
        raise MatryoshkaError(f"format {format} has whole ranks: give a rank, or leave the budget out")
    if pad and budget is None:
        raise MatryoshkaError("padding belongs to a budget: with one rank all layers have it anyway")


def _ready(opened: OpenedAdapter) -> tuple[OpenedAdapter, Spectra | None]:
    """The adapter as it is deployed, and its singular values if they were computed for that."""
    new, spectra = reorder_opened(opened) if opened.state is None else deployed(opened)
    if spectra is None:
        return new, None
    return from_memory(new.name, new.config, new.state, new.tensors()), spectra


def _base(
    opened: OpenedAdapter, model: str | None, revision: str | None, wanted: bool
) -> tuple[str | None, str | None, Base | None]:
    """Name, revision and loader of the base model; no loader where it is not on this machine, or not wanted."""
    if not wanted:
        return model or opened.config.base_model, revision, None
    from matryoshka_lora.models import base_of, load_config, load_model

    name, revision = base_of(opened.config, model, revision)
    if not name:
        return None, None, None
    try:
        load_config(name, revision=revision, local_files_only=True)
    except MatryoshkaError:
        return name, revision, None

    def load(dtype: Any) -> Any:
        return load_model(name, dtype or "auto", revision=revision, local_files_only=True)

    return name, revision, load


def _base_config(name: str, revision: str | None) -> Any:
    from matryoshka_lora.models import load_config

    return load_config(name, revision=revision)


def _ladder(opened: OpenedAdapter, ranks: Sequence[int], folder: Path, base: Base | None) -> Verified | None:
    folders = [folder / f"rank-{rank}" for rank in ranks]
    for rank, own in zip(ranks, folders, strict=True):
        own.mkdir()
        write_adapter(own, cut(opened, rank))
    write_text(folder / CARD_NAME, ladder_readme(opened.config, ranks))
    return check_folders(opened, ranks, folders, base)


def _directions(opened: OpenedAdapter, folder: Path, rank: int) -> None:
    """Its first rows are compared with the adapter, bit by bit."""
    shorter = first_ranks(opened, rank)
    tensors = shorter.tensors()
    write_directions(folder, tensors, shorter.rank)
    shorter.config.write(folder)
    write_sidecar(folder, shorter.nested)
    again = open_adapter(folder).tensors()
    if tensors.keys() != again.keys() or not all(tensors[key].equal(again[key]) for key in tensors):
        raise MatryoshkaError("the file that was written holds other numbers: check the disk and export again")


def choose_ranks(layers: Sequence[Layer], spectra: Spectra, budget: float) -> Chosen:
    """Keep the directions with the largest squared singular value per parameter, over all layers, within a budget.

    That is one threshold for all layers. A direction that no longer fits ends its layer; smaller ones may still fit.

    Args:
        layers: Of a reordered adapter.
        spectra: Its singular values.
        budget: The share of the adapter's parameters, above 0 and at most 1.

    Raises:
        MatryoshkaError: The budget is no such share, or not even one direction fits.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise MatryoshkaError(f"budget is {budget!r}; write a share of the parameters, for example 0.25")
    gains = {}
    for layer in layers:
        squares = spectra[layer.name] ** 2
        # All experts of a stack have one rank.
        gains[layer.name] = (squares.sum(dim=0) if squares.ndim > 1 else squares).tolist()
    total = sum(layer.width * layer.rank for layer in layers)
    left = whole = int(budget * total + 1e-6)
    ranks, order = {layer.name: 0 for layer in layers}, count()
    heap = [(-gains[layer.name][0] / layer.width, next(order), layer) for layer in layers]
    heapq.heapify(heap)
    while heap:
        _, _, layer = heapq.heappop(heap)
        if layer.width > left:
            continue
        left -= layer.width
        ranks[layer.name] += 1
        rank = ranks[layer.name]
        if rank < layer.rank and gains[layer.name][rank] > 0:
            heapq.heappush(heap, (-gains[layer.name][rank] / layer.width, next(order), layer))
    if not any(ranks.values()):
        raise MatryoshkaError(
            f"a budget of {budget:g} is {whole} parameters, and one direction of one layer has at least "
            f"{min(layer.width for layer in layers)}: write a larger one"
        )
    kept = sum(sum(gains[name][:rank]) for name, rank in ranks.items())
    everything = sum(map(sum, gains.values()))
    return Chosen(ranks, whole - left, total, kept / everything if everything else 1.0)
