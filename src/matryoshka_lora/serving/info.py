"""What an adapter's files are, without a base model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from matryoshka_lora.formats.beside import Spectra
from matryoshka_lora.formats.opened import OpenedAdapter, open_adapter
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.reordering.files import spectra_of


@dataclass(frozen=True)
class Description:
    """An adapter's files in numbers.

    Attributes:
        adapter: What was opened.
        spectra: Its singular values: those that reordering left, or those of the factors.
    """

    adapter: OpenedAdapter
    spectra: Spectra

    @property
    def kind(self) -> str:
        """What it is, in words."""
        state = self.adapter.state
        if state is None:
            return "a plain LoRA adapter: `matryoshka reorder` makes it nested"
        rule = f"rule {state.rule.name}, ranks {', '.join(map(str, state.nesting.ranks))}"
        if state.reordered:
            where = "; of this file a device reads only the ranks it needs" * self.adapter.is_directions
            return f"a nested LoRA adapter, reordered by {state.reordered}: any rank may be used ({rule}){where}"
        if state.deploy == "paper" and not state.rule.fixed:
            return f"a nested LoRA adapter, deployed as it is trained: rank r is its first r columns ({rule})"
        if state.deploy == "paper":
            return f"a nested LoRA adapter with the paper's deployment, which drops P: low ranks are poor ({rule})"
        return f"a nested LoRA adapter as it is trained: `matryoshka reorder` makes every rank good ({rule})"

    @property
    def sense(self) -> str:
        """What the singular values measure; those of a learned order are the SVD's."""
        return (self.adapter.state and self.adapter.state.reordered) or "svd"

    @property
    def scale(self) -> str:
        """What PEFT multiplies ``B A`` with: one number, or the range over the layers."""
        scales = sorted({layer.scale for layer in self.adapter.layers})
        return f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}, by layer"

    def parameters(self, rank: int) -> int:
        """How many numbers the factors have at a rank."""
        return sum(layer.width * min(rank, layer.rank) for layer in self.adapter.layers)

    def size(self, rank: int) -> int:
        """How many bytes they are, in the dtype of the file."""
        return self.parameters(rank) * self.adapter.dtype.itemsize

    def kept(self, rank: int) -> float:
        """The share of the sum of all squared singular values in the first ``rank`` directions, 0 to 1."""
        squares = [values**2 for values in self.spectra.values()]
        total = sum(float(s.sum()) for s in squares)
        return sum(float(s[..., :rank].sum()) for s in squares) / total if total else 1.0

    def ranks(self) -> tuple[int, ...]:
        """The ranks to tell of: those of the nesting, or powers of two."""
        if self.adapter.state is not None:
            return self.adapter.state.nesting.ranks
        return Nesting.powers_of_two(self.adapter.rank).ranks

    def decay(self) -> dict[str, Tensor]:
        """The squared singular values of each kind of layer, as shares of their sum: the mean over its layers."""
        kinds: dict[str, list[Tensor]] = {}
        for name, values in self.spectra.items():
            for squares in (values**2).reshape(-1, values.shape[-1]):
                if float(squares.sum()) > 0:
                    kinds.setdefault(_kind(name), []).append(squares / squares.sum())
        longest = max((len(s) for found in kinds.values() for s in found), default=0)
        pad = torch.nn.functional.pad
        return {
            kind: torch.stack([pad(s, (0, longest - len(s))) for s in found]).mean(dim=0)
            for kind, found in kinds.items()
        }

    def lines(self) -> Iterator[str]:
        """The text that ``matryoshka info`` prints."""
        adapter = self.adapter
        yield f"{adapter.name} is {self.kind}"
        revision = f", revision {adapter.config.revision}" if adapter.config.revision else ""
        yield f"  base model  {adapter.config.base_model or 'not named'}{revision}"
        yield f"  layers      {len(adapter.layers)}: {', '.join(sorted({_kind(x.name) for x in adapter.layers}))}"
        own = sorted({layer.rank for layer in adapter.layers})
        yield f"  rank        {own[0] if len(own) == 1 else f'{own[0]} to {own[-1]}, by layer'}; scale {self.scale}"
        yield f"  file        {_bytes(adapter.size)}, {str(adapter.dtype).removeprefix('torch.')}"
        if adapter.others:
            yield f"  besides     {len(adapter.others)} tensors that are no factors, such as {adapter.others[0]}"
        yield ""
        kept_by = "svd, at most" if self.sense in ("learned", "trained") else self.sense
        yield f"  {'rank':>5} {'parameters':>12} {'size':>10}   kept ({kept_by})"
        for rank in self.ranks():
            kept = f"{100 * self.kept(rank):.1f} %"
            yield f"  {rank:>5} {self.parameters(rank):>12,} {_bytes(self.size(rank)):>10}   {kept}"
        yield ""
        yield "  decay: the share of a layer's squared singular values in its first directions, mean over its kind"
        ranks = self.ranks()
        yield "  " + " " * 18 + "".join(f"{rank:>8}" for rank in ranks)
        for kind, shares in self.decay().items():
            yield f"  {kind:<18}" + "".join(f"{100 * float(shares[:rank].sum()):>6.1f} %" for rank in ranks)


def describe(path: str | os.PathLike[str]) -> Description:
    """Open an adapter and look at it; reads each layer once if it was not reordered.

    Raises:
        MatryoshkaError: It is no LoRA adapter, or damaged.
    """
    adapter = open_adapter(path)
    return Description(adapter, spectra_of(adapter))


def plot(description: Description, file: IO[bytes], form: str) -> None:
    """Draw each layer's singular values, relative to its first, by kind of layer; ``form`` is ``"png"`` and so on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(_kind(name) for name in description.spectra))
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel, kind in zip(panels.flat, kinds, strict=False):
        for name, values in description.spectra.items():
            if _kind(name) == kind:
                for one in values.reshape(-1, values.shape[-1]):
                    if float(one[0]) > 0:
                        panel.plot(range(1, len(one) + 1), (one / one[0]).tolist(), color="#0072B2", alpha=0.35)
        panel.set_title(kind, loc="left")
        panel.set_yscale("log")
        panel.set_xscale("log", base=2)
        panel.grid(color="#DDDDDD")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels.flat)[len(kinds) :]:
        panel.set_visible(False)
    figure.suptitle(f"Singular values ({description.sense}) of each layer, relative to its first; by rank")
    figure.savefig(file, format=form)


def _kind(name: str) -> str:
    """A layer's name without its number: the last part that is no number."""
    parts = [part for part in name.split(".") if part != "base_layer" and not re.fullmatch(r"\d+", part)]
    return parts[-1] if parts else name


def _bytes(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
