"""Say what an adapter's files hold, without a base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from matryoshka_lora.budget import Keep, show_bytes, spectra
from matryoshka_lora.files.layers import AdapterFile, Lost
from matryoshka_lora.files.output import PathLike
from matryoshka_lora.files.peft import Ranks, open_adapter, plan_rank
from matryoshka_lora.files.single import plan_single
from matryoshka_lora.nesting import Nesting


@dataclass(frozen=True)
class Description:
    """An adapter in numbers.

    Attributes:
        adapter: What was opened.
        lost: What each rank leaves out.
        spectra: The singular values of each layer; see `matryoshka_lora.budget.spectra`.
    """

    adapter: AdapterFile
    lost: Lost
    spectra: Mapping[str, Tensor]

    @property
    def order(self) -> str | None:
        """How the adapter was reordered, if it was."""
        return self.adapter.order

    @property
    def nesting(self) -> Nesting:
        """The adapter's ranks; those of one that is not nested are powers of two."""
        return self.adapter.nesting or Nesting.powers_of_two(self.adapter.max_rank)

    def size(self, ranks: Ranks) -> int:
        """Return the bytes of the file of weights that `export` writes, with all that it holds."""
        if not self.adapter.is_single:
            return plan_rank(self.adapter, ranks).size
        if isinstance(ranks, int):
            ranks = {layer.name: min(ranks, layer.rank) for layer in self.adapter.layers}
        return plan_single(self.adapter, ranks).size

    def lines(self) -> list[str]:
        """Return what ``matryoshka info`` prints."""
        adapter, layers = self.adapter, self.adapter.layers
        base = adapter.config.get("base_model_name_or_path") or "not named"
        found = [
            f"{adapter.name} is {self._what()}",
            *([] if adapter.is_single else [f"  base model  {base}"]),
            f"  layers      {len(layers)}: {', '.join(sorted({kind_of(x.name) for x in layers}))}",
            f"  rank        {_range([x.rank for x in layers])}",
            f"  scale       {_range([x.scale for x in layers])}",
            f"  file        {show_bytes(adapter.size)}",
        ]
        if adapter.others:
            found.append(
                f"  besides     {len(adapter.others)} tensors, such as {adapter.others[0]}"
            )
        found += ["", f"  {'rank':>10} {'size':>10}   error of the update's norm"]
        for rank in self.nesting.ranks:
            found.append(self._row(str(rank), self.size(rank), self.lost.error(rank)))
        if adapter.order in (None, "svd") and all(layer.experts == 1 for layer in layers):
            for keep in ("99%", "95%", "90%"):
                ranks = {name: Keep.read(keep).rank(own) for name, own in self.spectra.items()}
                left = [(own[ranks[name] :] ** 2).sum() for name, own in self.spectra.items()]
                error = Lost(self.lost.by_rank, float(sum(left))).error()
                found.append(self._row(f"--keep {keep}", self.size(ranks), error))
        return found

    @staticmethod
    def _row(name: str, size: int, error: float) -> str:
        kept = f"{100 * (1 - error**2):.1f} % of its square kept"
        return f"  {name:>10} {show_bytes(size):>10}   {100 * error:4.1f} % ({kept})"

    def _what(self) -> str:
        ranks = ", ".join(map(str, self.nesting.ranks))
        if self.adapter.is_single:
            return "a LoRA in one file"
        if self.adapter.nesting is None:
            return "a plain LoRA adapter: `matryoshka reorder` makes it nested"
        if self.order == "paper":
            return f"a nested LoRA adapter as the paper deploys it, for the ranks {ranks} alone"
        return f"a nested LoRA adapter in the order {self.order!r}, for any rank (trained: {ranks})"


def describe(path: PathLike) -> Description:
    """Open an adapter and read its layers.

    Raises:
        MatryoshkaError: It is no LoRA adapter, or damaged.
    """
    adapter = open_adapter(path)
    values, lost = spectra(adapter)
    return Description(adapter, lost, values)


def kind_of(name: str) -> str:
    """Return a layer's name without its numbers and what stands before them."""
    if "." not in name:
        return re.split(r"_\d+_(?=[a-z])", name)[-1]
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def _range(values: list[int] | list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}, by layer"
