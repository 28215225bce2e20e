"""Cut a single LoRA file to a rank, or put its directions in order: file to file, few layers in memory at a time."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import check_free, check_writable, output_directory, output_path, replace_file
from matryoshka_lora.formats.layout import Layer, layer_name
from matryoshka_lora.formats.opened import WEIGHTS_NAME, open_adapter
from matryoshka_lora.formats.single import SUFFIX, LoraFile, open_file
from matryoshka_lora.formats.single_write import Plan, adapter_config, plan
from matryoshka_lora.formats.styles import Style
from matryoshka_lora.formats.write import check_apart
from matryoshka_lora.reordering.single import CutLayer, cut_layer, rescale_layer, singular_values
from matryoshka_lora.serving.ranks import Chosen, Keep, by_size, by_threshold

_MOST_LOST = 1e-2
"""What the rounding of the new factors may take of a layer, as a share of its norm."""

T = TypeVar("T")


@dataclass(frozen=True)
class Wish:
    """What is wanted of a file.

    Attributes:
        rank: The most that a layer gets; None is its own.
        conv_rank: The same of convolutions; None is ``rank``.
        keep: A threshold for each layer.
        most_bytes: Of the new file.
        reorder: Whether directions are put in order; else only the keys change.
    """

    rank: int | None = None
    conv_rank: int | None = None
    keep: Keep | None = None
    most_bytes: int | None = None
    reorder: bool = True

    def __str__(self) -> str:
        said = {"rank": self.rank, "conv_rank": self.conv_rank, "max_bytes": self.most_bytes}
        words = [f"{name} {value}" for name, value in said.items() if value is not None]
        if self.keep is not None:
            words.append(f"keep {self.keep.rule} {self.keep.value:g}")
        return ", ".join(words) or ("all ranks, in order" if self.reorder else "another style")


class Progress(NamedTuple):
    """How many layers and bytes of factors were written, and of how many."""

    layers: int
    all_layers: int
    bytes: int
    all_bytes: int


@dataclass(frozen=True)
class Written:
    """What was made.

    Attributes:
        path: Where.
        chosen: The ranks, and what they keep.
        error: The Frobenius norm of all that was lost, over that of the whole update.
        size: Bytes of the file.
        spectra: The singular values of each layer; none where only keys were changed.
    """

    path: Path
    chosen: Chosen
    error: float
    size: int
    spectra: dict[str, Tensor]


def write_single(
    opened: LoraFile,
    target: str | os.PathLike[str],
    wish: Wish,
    style: Style | None,
    overwrite: bool,
    on_progress: Callable[[Progress], object] | None = None,
) -> Written:
    """Write what is wanted of a single file, or of a folder in another style.

    Raises:
        MatryoshkaError: The file is damaged or no LoRA; the wish or the style cannot be had; or the target cannot be
            written. Nothing has been written then.
    """
    out = output_path(target)
    folder = style == "peft"
    if folder == (out.suffix == SUFFIX):
        wanted = "a folder" if folder else f"a file that ends in {SUFFIX}"
        raise MatryoshkaError(f"{out} is not {wanted}, as PEFT's style is one and the others are not")
    check_apart(opened.name, out)
    check_writable(out if folder else out.parent)
    check_free(out, overwrite)
    ranks = _choose(opened, wish, style)
    new = plan(opened, ranks, style, str(wish))
    _warn(opened)
    if folder:
        with output_directory(out, overwrite) as directory:
            made = _write(new, directory / WEIGHTS_NAME, wish, on_progress)
            adapter_config(new).write(directory)
            _check(new, open_adapter(directory).layers)
    else:
        with replace_file(out, overwrite) as file:
            made = _write(new, file, wish, on_progress)
            _check(new, open_file(file).layers)
    total, kept, error = made.sums()
    costs = {layer.name: layer.width for layer in opened.layers}
    parameters = sum(width * ranks[name] for name, width in costs.items())
    known = Chosen(ranks, parameters, sum(x.width * x.rank for x in opened.layers), kept / total if total else 1.0)
    return Written(out, known, _root(error, total), new.size, made.spectra)


def _choose(
    opened: LoraFile, wish: Wish, style: Style | None = None, spectra: Mapping[str, Tensor] | None = None
) -> dict[str, int]:
    """The rank of each layer.

    Args:
        opened: The file.
        wish: What is wanted of it.
        style: Of the new file.
        spectra: Its singular values, if they are known.

    Raises:
        MatryoshkaError: It cannot be had.
    """
    if wish.most_bytes is not None and (wish.rank, wish.conv_rank, wish.keep) != (None, None, None):
        raise MatryoshkaError("a size chooses the ranks itself: leave the rank and the share to keep out")
    for rank in (wish.rank, wish.conv_rank):
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= opened.rank):
            raise MatryoshkaError(f"rank {rank} cannot be had: {opened.name} has ranks from 1 to {opened.rank}")
    most = {}
    for layer in opened.layers:
        asked = wish.conv_rank if opened.is_convolution(layer) and wish.conv_rank is not None else wish.rank
        most[layer.name] = layer.rank if asked is None else min(asked, layer.rank)
    if wish.keep is None and wish.most_bytes is None:
        return most
    spectra = spectra or read_spectra_of(opened)
    if wish.keep is not None:
        return by_threshold(opened.layers, spectra, wish.keep, most).ranks
    assert wish.most_bytes is not None
    itemsizes = {layer.name: opened.itemsize(layer) for layer in opened.layers}

    def size(ranks: Mapping[str, int]) -> int:
        return plan(opened, ranks, style, str(wish)).size

    return by_size(opened.layers, spectra, wish.most_bytes, itemsizes, size).ranks


def read_spectra_of(opened: LoraFile) -> dict[str, Tensor]:
    """The singular values of each layer."""

    def values(layer: Layer) -> Tensor:
        return singular_values(*opened.factors(layer), layer.scale)

    with in_order([partial(values, layer) for layer in opened.layers]) as take:
        return {layer.name: take() for layer in opened.layers}


@contextmanager
def in_order(jobs: Sequence[Callable[[], T]]) -> Iterator[Callable[[], T]]:
    """Give the results of jobs in their order; each core works at one, and no more are begun than that.

    Torch's own threads are off meanwhile: for matrices of this shape they cost more than they bring.
    """
    workers, before = max(1, min(os.cpu_count() or 1, 4)), torch.get_num_threads()
    left, begun = iter(jobs), list[Future[T]]()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, 1)) as pool:

        def take() -> T:
            while len(begun) < workers and (job := next(left, None)) is not None:
                begun.append(pool.submit(job))
            result = begun.pop(0).result()
            if (job := next(left, None)) is not None:
                begun.append(pool.submit(job))
            return result

        try:
            yield take
        finally:
            for future in begun:
                future.cancel()
            torch.set_num_threads(before)


def _warn(opened: LoraFile) -> None:
    """Of what is copied as it is."""
    if opened.whole:
        name, key = next(iter(opened.whole.items()))
        warnings.warn(
            f"{opened.name}: {len(opened.whole)} layers are kept as they are, since they are more than two factors, "
            f"such as {name} ({key})",
            stacklevel=4,
        )
    if strangers := [key for key in opened.others if not any(start in opened.whole for start in _starts(key))]:
        warnings.warn(
            f"{opened.name}: {len(strangers)} tensors that are no factors are kept as they are, such as {strangers[0]}",
            stacklevel=4,
        )


def _starts(key: str) -> Iterator[str]:
    """What stands before each of its dots."""
    return (key[:place] for place, letter in enumerate(key) if letter == ".")


class _Made:
    """What was measured of the layers that were written so far."""

    def __init__(self) -> None:
        self.spectra: dict[str, Tensor] = {}
        self._sums = torch.zeros(3, dtype=torch.float64)

    def add(self, name: str, layer: CutLayer) -> None:
        self._sums += torch.tensor([layer.size, layer.kept, layer.error], dtype=torch.float64)
        if layer.values is not None:
            self.spectra[name] = layer.values

    def sums(self) -> tuple[float, float, float]:
        """Squared norms: of the update, of what is kept, and of what is lost."""
        size, kept, error = self._sums.tolist()
        return size, kept, error


def _write(new: Plan, file: Path, wish: Wish, on_progress: Callable[[Progress], object] | None) -> _Made:
    found = _Made()
    sizes = [old.width * own.rank * new.source.itemsize(old) for old, own in zip(new.given, new.layers, strict=True)]

    def job(number: int) -> CutLayer:
        layer, given = new.layers[number], new.given[number]
        A, B = new.source.factors(given)
        if wish.reorder:
            return cut_layer(A, B, given.scale, layer.rank, layer.scale)
        return rescale_layer(A, B, given.scale, layer.scale)

    with in_order([partial(job, number) for number in range(len(new.layers))]) as take:

        def factors(number: int) -> tuple[Tensor, Tensor]:
            made = take()
            _check_rounding(new.given[number], made)
            found.add(new.given[number].name, made)
            if on_progress is not None:
                on_progress(Progress(number + 1, len(sizes), sum(sizes[: number + 1]), sum(sizes)))
            return made.A, made.B

        def whole() -> tuple[float, float]:
            total, kept, error = found.sums()
            return kept / total if total else 1.0, _root(error, total)

        new.write(file, factors, whole)
    return found


def _check_rounding(layer: Layer, made: CutLayer) -> None:
    lost, size = max(made.size - made.kept, 0.0) ** 0.5, made.size**0.5
    if not made.error**0.5 <= lost + _MOST_LOST * size:
        raise MatryoshkaError(
            f"layer {layer.name} cannot be written in its dtype, whose rounding would take too much of it: save the "
            "file in fp32 first"
        )


def _check(new: Plan, found: Sequence[Layer]) -> None:
    """The file as it is read again."""
    wanted = {layer_name(layer.name) if new.style == "peft" else layer.name: layer for layer in new.layers}
    read = {layer.name: layer for layer in found}
    same = wanted.keys() == read.keys() and all(
        read[name].rank == layer.rank and math.isclose(read[name].scale, layer.scale) for name, layer in wanted.items()
    )
    if not same:
        raise MatryoshkaError("the file was made and then thrown away, because it reads otherwise: check the disk")


def _root(error: float, total: float) -> float:
    return (error / total) ** 0.5 if total else 0.0
