"""What an adapter's files are, without a base model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from matryoshka_lora.formats.beside import Spectra, share_kept
from matryoshka_lora.formats.opened import OpenedAdapter, open_adapter
from matryoshka_lora.formats.single import LoraFile, is_file, open_file
from matryoshka_lora.formats.single_write import plan
from matryoshka_lora.formats.styles import kind_of
from matryoshka_lora.formats.write import cut, weights_size
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.reordering.files import is_in_order, reorder_opened, spectra_of
from matryoshka_lora.serving.choices import choices
from matryoshka_lora.serving.ranks import Chosen
from matryoshka_lora.serving.single import read_spectra_of


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
        if isinstance(self.adapter, LoraFile):
            done = self.adapter.done.get("did")
            return f"a LoRA in one file{f', made by this package: {done!s:.200}' if done else ''}"
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
        """What the singular values measure."""
        by = self.adapter.state and self.adapter.state.reordered
        return by if by in ("activations", "loss") and is_in_order(self.adapter) else "svd"

    @property
    def scale(self) -> str:
        """What PEFT multiplies ``B A`` with: one number, or the range over the layers."""
        scales = sorted({layer.scale for layer in self.adapter.layers})
        return f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}, by layer"

    def parameters(self, rank: int) -> int:
        """How many numbers the factors have at a rank."""
        return sum(layer.width * min(rank, layer.rank) for layer in self.adapter.layers)

    def size(self, rank: int) -> int:
        """How many bytes they are, in the dtype of the file; of a single file, how many bytes it would have."""
        if isinstance(self.adapter, LoraFile):
            return self.bytes_of({layer.name: min(rank, layer.rank) for layer in self.adapter.layers})
        return self.parameters(rank) * self.adapter.dtype.itemsize

    def bytes_of(self, ranks: Mapping[str, int]) -> int:
        """How many bytes a file of weights with some ranks has; that of a plain adapter once it is reordered."""
        if isinstance(self.adapter, LoraFile):
            return plan(self.adapter, ranks, None, "").size
        whole = self.adapter if self.adapter.state is not None else reorder_opened(self.adapter)[0]
        return weights_size(cut(whole, ranks))

    def choices(self) -> Iterator[tuple[str, Chosen, int]]:
        """What options of `export` would give; nothing of an adapter that is as it was trained."""
        adapter = self.adapter
        if adapter.state is not None and not adapter.state.reordered:
            return iter(())
        sizes = {layer.name: adapter.itemsize(layer) for layer in adapter.layers}
        return choices(adapter.layers, self.spectra, sizes, self.bytes_of, is_in_order(adapter))

    def kept(self, rank: int) -> float:
        """See `matryoshka_lora.formats.beside.share_kept`."""
        return share_kept(self.spectra, rank)

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
                    kinds.setdefault(kind_of(name), []).append(squares / squares.sum())
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
        if not isinstance(adapter, LoraFile):
            yield f"  base model  {adapter.config.base_model or 'not named'}{revision}"
        yield f"  layers      {len(adapter.layers)}: {', '.join(sorted({kind_of(x.name) for x in adapter.layers}))}"
        own = sorted({layer.rank for layer in adapter.layers})
        yield f"  rank        {own[0] if len(own) == 1 else f'{own[0]} to {own[-1]}, by layer'}; scale {self.scale}"
        yield f"  file        {_bytes(adapter.size)}, {str(adapter.dtype).removeprefix('torch.')}"
        if adapter.others:
            yield f"  besides     {len(adapter.others)} tensors that are no factors, such as {adapter.others[0]}"
        for name, key in adapter.whole.items() if isinstance(adapter, LoraFile) else ():
            yield f"  kept whole  {name}, which is more than two factors ({key})"
        yield ""
        kept_by = f"kept ({self.sense}{'' if is_in_order(adapter) else ', at most'})"
        yield f"  {'rank':>5} {'parameters':>12} {'size':>10}   {kept_by}"
        for rank in self.ranks():
            kept = f"{100 * self.kept(rank):.1f} %"
            yield f"  {rank:>5} {self.parameters(rank):>12,} {_bytes(self.size(rank)):>10}   {kept}"
        found = list(self.choices())
        if found:
            yield ""
            yield f"  {'ranks by layer':<26} {'ranks':>10} {'size':>10}   {kept_by}"
        for option, chosen, size in found:
            used = sorted(chosen.ranks.values())
            span = f"{used[0]} to {used[-1]}"
            yield f"  {option:<26} {span:>10} {_bytes(size):>10}   {100 * chosen.kept:.1f} %"
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
    if is_file(path):
        file = open_file(path)
        return Description(file, read_spectra_of(file))
    adapter = open_adapter(path)
    return Description(adapter, spectra_of(adapter))


def plot(description: Description, file: IO[bytes], form: str) -> None:
    """Draw each layer's singular values and what the first ones keep, by kind; ``form`` is ``"png"`` and so on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(kind_of(name) for name in description.spectra))
    columns = min(4, len(kinds))
    rows, decay = -(-len(kinds) // columns), description.decay()
    figure = Figure(figsize=(4 * columns, 3.2 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel, kind in zip(panels.flat, kinds, strict=False):
        for name, values in description.spectra.items():
            if kind_of(name) == kind:
                for one in values.reshape(-1, values.shape[-1]):
                    if float(one[0]) > 0:
                        panel.plot(range(1, len(one) + 1), (one / one[0]).tolist(), color="#0072B2", alpha=0.35)
        if kind in decay:
            kept = panel.twinx()
            shares = (100 * decay[kind].cumsum(0)).tolist()
            kept.plot(range(1, len(shares) + 1), shares, color="#D55E00")
            kept.set_ylim(0, 102)
            kept.spines["top"].set_visible(False)
        panel.set_title(kind, loc="left")
        panel.set_yscale("log")
        panel.set_xscale("log", base=2)
        panel.grid(color="#DDDDDD")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels.flat)[len(kinds) :]:
        panel.set_visible(False)
    figure.suptitle(
        f"Blue: singular values ({description.sense}) of each layer, relative to its first, by rank\n"
        "Red: what the first ranks keep of their squares, in %, mean of the kind"
    )
    figure.savefig(file, format=form)


def _bytes(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
