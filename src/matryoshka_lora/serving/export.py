"""`export`: a rank of an adapter in the format that a device or an engine takes."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import check_free, check_writable, output_directory, output_path, read_bytes, write_text
from matryoshka_lora.formats.beside import Spectra, share_kept
from matryoshka_lora.formats.card import CARD_NAME, changed_tokenizer, has_own_card, ladder_readme
from matryoshka_lora.formats.directions import write_directions
from matryoshka_lora.formats.layout import Layer
from matryoshka_lora.formats.module_names import names_in_model
from matryoshka_lora.formats.opened import OpenedAdapter, first_ranks, from_memory, open_adapter
from matryoshka_lora.formats.sidecar import Sidecar, write_sidecar
from matryoshka_lora.formats.single import LoraFile, from_folder, is_file, open_file
from matryoshka_lora.formats.styles import Style
from matryoshka_lora.formats.weights_hash import hash_of_tensors
from matryoshka_lora.formats.write import Ranks, check_apart, cut, weights_size, write_adapter
from matryoshka_lora.reordering.files import deployed, is_in_order, reorder_opened, spectra_of
from matryoshka_lora.serving.converted import check_folders, export_gguf, export_gguf_ladder, export_mlx
from matryoshka_lora.serving.ranks import Chosen, Keep, by_size, by_threshold, choose_ranks
from matryoshka_lora.serving.single import Progress, Wish, write_single

if TYPE_CHECKING:
    from matryoshka_lora.serving.on_base import Base, Verified


Format = Literal["peft", "merged", "gguf", "mlx", "ladder", "gguf-ladder", "directions"]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: Where.
        ranks: One; one for each layer; or those of a ladder.
        chosen: How a budget was spent, if there was one.
        base: The base model's name, if the adapter or the caller says it.
        verified: How far its logits are from the nested adapter's, at most; None where no base model was at hand.
        kept: The share of the squared singular values in what was written, 0 to 1; None where it is not known: of a
            ladder, and after ``learned`` and ``trained``, whose first directions no singular values describe.
        error: Of a single file: the Frobenius norm of all that was lost, over that of the update.
    """

    path: Path
    ranks: Ranks | Sequence[int]
    chosen: Chosen | None
    base: str | None
    verified: Verified | None
    kept: float | None = None
    error: float | None = None


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    rank: int | None = None,
    format: Format = "peft",
    *,
    budget: float | None = None,
    keep: float | str | None = None,
    max_bytes: int | str | None = None,
    conv_rank: int | None = None,
    style: Style | None = None,
    pad: bool = False,
    model: str | None = None,
    revision: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    on_progress: Callable[[Progress], object] | None = None,
) -> Exported:
    """Write a rank of an adapter in the format that a device or an engine takes.

    An adapter that is not nested, or was never reordered, is reordered by SVD on the way. The numbers of each layer are
    compared with the adapter's before anything is put into place; with the base model on this machine, so are logits.

    Example::

        export("my-adapter", "rank-4", rank=4)
        export("flux.safetensors", "small.safetensors", keep="95%")

    Args:
        source: The folder of a LoRA adapter, or a LoRA in one ``.safetensors`` file, as image and video models have it.
        target: What to write: a folder, or a file for ``"gguf"`` and where the source is one.
        rank: The rank of every layer. Of a ladder or a file of directions, the largest one; None is R. With ``keep``,
            the most that a layer gets.
        format: ``"peft"``: an ordinary LoRA adapter. ``"merged"``: the base model with the adapter in its weights.
            ``"gguf"``: a file for llama.cpp. ``"mlx"``: a folder for mlx-lm. ``"ladder"``: one ordinary adapter for
            each nested rank. ``"gguf-ladder"``: one GGUF file for each. ``"directions"``: one file of which a device
            reads only the ranks it needs.
        budget: In the place of a rank: the share of the parameters; layers get ranks of their own.
        keep: In the place of a rank: each layer gets the smallest rank that keeps this share of its squared singular
            values, as ``"95%"`` or 0.95; or obeys a threshold of kohya's script: ``"sv_fro=0.95"``,
            ``"sv_cumulative=0.9"``, ``"sv_ratio=20"``. Not after ``learned`` and ``trained``.
        max_bytes: In the place of a rank: the most that the file of weights may have, as ``"50MB"``; ranks as for a
            budget.
        conv_rank: Of a single file: the rank of convolutions whose kernel is larger than one point.
        style: Of a single file: how its keys are spelled, ``"kohya"``, ``"diffusers"`` or ``"peft"``, which is a
            folder; None is as they are. Without a rank and the like, nothing else changes.
        pad: With a budget: fill up to one rank, for engines that know one; mlx-lm does, so ``"mlx"`` always is.
        model: The base model; None is what the adapter names. Of a single file with kohya's keys, for another style:
            the folder of a model of diffusers, which knows where the dots of the modules' names are.
        revision: Of the base model on the hub; None is the one that the adapter was trained on.
        verify: Whether logits are compared, if the base model is on this machine.
        overwrite: Whether the target may hold an adapter, a model or an evaluation, of which nothing is left then.
        on_progress: Called after each layer of a single file.

    Raises:
        MatryoshkaError: The adapter is damaged, has no such rank, or cannot be had in this format; the target cannot be
            written or holds something that may not be overwritten; or what was made computes something else. Nothing
            has been written then.
    """
    out = output_path(target)
    if format not in get_args(Format):
        raise MatryoshkaError(f"format is {format!r}; write one of {', '.join(map(repr, get_args(Format)))}")
    threshold = None if keep is None else Keep.read(keep)
    most_bytes = None if max_bytes is None else read_bytes(max_bytes)
    if is_file(source):
        if format != "peft" or budget is not None or pad or (model is not None and style is None):
            raise MatryoshkaError(
                f"{source} is a single file, for which there are rank, conv_rank, keep, max_bytes and style: another "
                "format, a budget and padding are for PEFT's folders"
            )
        file = open_file(source)
        if model is not None:
            file = replace(file, names=names_in_model(model))
        return _single(file, out, Wish(rank, conv_rank, threshold, most_bytes), style, overwrite, on_progress)
    if style in ("kohya", "diffusers") and format == "peft" and budget is None and not pad:
        file = from_folder(open_adapter(source))
        return _single(file, out, Wish(rank, conv_rank, threshold, most_bytes), style, overwrite, on_progress)
    if style is not None or conv_rank is not None:
        raise MatryoshkaError(f"{source} is a folder of PEFT's: style and conv_rank are for a single file, made of it")
    _check_wishes(rank, format, budget, threshold, most_bytes, pad)
    given = open_adapter(source)
    opened, spectra = _ready(given)
    if threshold is not None and opened.nested.reordered and not is_in_order(opened):
        raise MatryoshkaError(
            f"{source} is reordered by {opened.nested.reordered}, and no singular values say what its first directions "
            "keep: give a rank, a budget or a size, or make an adapter in the order of the SVD first, by `matryoshka "
            f"reorder {source} -o ANOTHER`"
        )
    if rank is not None:
        opened.nested.check_rank(rank)
        rank = int(rank)  # NumPy's integers are not JSON
    check_apart(source, out)
    check_writable(out.parent if format == "gguf" else out)
    check_free(out, overwrite)
    chosen = None
    if budget is not None or threshold is not None or most_bytes is not None:
        found = spectra or spectra_of(opened)
        chosen = _chosen(opened, given.layers, found, rank, budget, threshold, most_bytes)
    ranks: Ranks = chosen.ranks if chosen is not None else rank or opened.rank
    # A file of directions is compared with the adapter bit by bit.
    needs, compares = format in ("merged", "gguf", "mlx", "gguf-ladder"), verify and format != "directions"
    name, revision, base = _base(opened, model, revision, needs or compares, needs)
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

                if changed := changed_tokenizer(Path(opened.name)):
                    warnings.warn(
                        f"{opened.name} was trained with {changed} (train.yaml), and {out} gets the base model's "
                        "tokenizer: save the tokenizer of the training over it",
                        stacklevel=2,
                    )
                tokenizer = load_tokenizer(str(name), revision=revision)
                verified = write_merged(folder, opened, ranks, pad, base, tokenizer, verify)
            elif format == "mlx":
                from matryoshka_lora.models import stored_config

                verified = export_mlx(
                    opened, ranks, folder, base_config, stored_config(str(name), revision), checked_on
                )
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
    kept = None
    if not ladder and is_in_order(opened):
        kept = chosen.kept if chosen is not None else share_kept(spectra or spectra_of(opened), rank or opened.rank)
    return Exported(out, ladder or ranks, chosen, name, verified, kept)


def following(path: Path, format: Format) -> str:
    """The line that uses what was written there."""
    out, quoted = str(path), shlex.quote(str(path))
    lines: dict[Format, str] = {
        "peft": f'PeftModel.from_pretrained(base_model, "{out}")',
        "merged": f'AutoModelForCausalLM.from_pretrained("{out}")',
        "gguf": f"llama-cli -m BASE.gguf --lora {quoted}",
        "mlx": f"mlx_lm.generate --model BASE --adapter-path {quoted}",
        "ladder": f"see {path / CARD_NAME}",
        "gguf-ladder": f"see {path / CARD_NAME}",
        "directions": f'load(base_model, "{out}", max_rank=4)',
    }
    return lines[format]


def _check_wishes(
    rank: int | None, format: Format, budget: float | None, keep: Keep | None, most_bytes: int | None, pad: bool
) -> None:
    wishes = [wish for wish in (budget, keep, most_bytes) if wish is not None]
    whole = format in ("ladder", "gguf-ladder", "directions")
    if wishes and whole:
        raise MatryoshkaError(f"format {format} has whole ranks: give a rank, or leave the budget out")
    if len(wishes) > 1 or (rank is None and not wishes and not whole) or (rank is not None and wishes and keep is None):
        raise MatryoshkaError(
            "give either a rank, for example 8, or a budget, for example 0.25, or a share to keep, for example 95%, or "
            "a size, for example 50MB; only a share to keep may have a rank beside it, as the most that a layer gets"
        )
    if most_bytes is not None and (format != "peft" or pad):
        raise MatryoshkaError("a size is that of the format peft without padding: give a rank for any other")
    if pad and not wishes:
        raise MatryoshkaError("padding belongs to a budget: with one rank all layers have it anyway")


def _chosen(
    opened: OpenedAdapter,
    layers: Sequence[Layer],
    spectra: Spectra,
    rank: int | None,
    budget: float | None,
    keep: Keep | None,
    most_bytes: int | None,
) -> Chosen:
    """The ranks of layers, each of which has its own rank at most, though all of a reordered adapter have one."""
    if budget is not None:
        return choose_ranks(layers, spectra, budget)
    if keep is not None:
        most = {layer.name: min(rank or layer.rank, layer.rank) for layer in layers}
        return by_threshold(layers, spectra, keep, most)
    assert most_bytes is not None
    itemsizes = {layer.name: opened.itemsize(layer) for layer in opened.layers}
    return by_size(layers, spectra, most_bytes, itemsizes, lambda ranks: weights_size(cut(opened, ranks)))


def _single(
    opened: LoraFile,
    out: Path,
    wish: Wish,
    style: Style | None,
    overwrite: bool,
    on_progress: Callable[[Progress], object] | None,
) -> Exported:
    if wish == Wish():
        if style is None:
            raise MatryoshkaError(
                "give a rank, for example 8; a share to keep, for example 95%; a size, for example 50MB"
            )
        wish = Wish(reorder=False)
    made = write_single(opened, out, wish, style, overwrite, on_progress)
    return Exported(out, made.chosen.ranks, made.chosen, None, None, made.chosen.kept, made.error)


def _ready(opened: OpenedAdapter) -> tuple[OpenedAdapter, Spectra | None]:
    """The adapter as it is deployed, and its singular values if they were computed for that."""
    new, spectra = reorder_opened(opened) if opened.state is None else deployed(opened)
    if spectra is None:
        return new, None
    return from_memory(new.name, new.config, new.state, new.tensors()), spectra


def _base(
    opened: OpenedAdapter, model: str | None, revision: str | None, wanted: bool, needed: bool
) -> tuple[str | None, str | None, Base | None]:
    """Name, revision and loader of the base model; no loader where it is not on this machine, or not wanted.

    Raises:
        MatryoshkaError: It is needed, and it is the embedded one, which lacks a package.
    """
    if not wanted:
        return model or opened.config.base_model, revision, None
    from matryoshka_lora.models import EMBEDDED, base_of, load_config, load_model

    name, revision = base_of(opened.config, model, revision)
    if not name:
        return None, None, None
    try:
        load_config(name, revision=revision, local_files_only=True)
    except MatryoshkaError:
        if needed and name == EMBEDDED:
            raise
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
    write_sidecar(folder, Sidecar(shorter.nested, hash_of_tensors(shorter.layers, tensors)))
    again = open_adapter(folder).tensors()
    if tensors.keys() != again.keys() or not all(tensors[key].equal(again[key]) for key in tensors):
        raise MatryoshkaError("the file that was written holds other numbers: check the disk and export again")
