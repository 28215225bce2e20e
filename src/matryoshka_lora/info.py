"""Say what an adapter's files hold, without a base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from matryoshka_lora.budget import error_lines, show_bytes
from matryoshka_lora.files.layers import AdapterFile, in_turn
from matryoshka_lora.files.output import PathLike
from matryoshka_lora.files.peft import open_adapter, plan_rank


@dataclass(frozen=True)
class Description:
    """Describe an adapter file in numbers.

    Attributes:
        sizes: The bytes of the whole file of weights that `export` writes at each nested rank.
        errors: The norm of what each nested rank leaves out over the norm of the update.
    """

    adapter: AdapterFile
    sizes: Mapping[int, int]
    errors: Mapping[int, float]

    def lines(self) -> list[str]:
        """Return what ``matryoshka info`` prints."""
        adapter, layers = self.adapter, self.adapter.layers
        base = adapter.config.get("base_model_name_or_path")
        found = [
            f"{adapter.name} is {self._what()}",
            f"  base model  {base or 'not named'}",
            f"  layers      {len(layers)}, such as {layers[0].name}",
            f"  rank        {_range([layer.rank for layer in layers])}",
            f"  scale       {_range([layer.scale for layer in layers])}",
            f"  file        {show_bytes(adapter.size)}, {str(layers[0].A.dtype).split('.')[1]}",
        ]
        if others := adapter.others:
            size = show_bytes(sum(each.size for each in others.values()))
            names = next(iter(others)) + (f" and {len(others) - 1} more" if len(others) > 1 else "")
            found.append(f"  besides     {names}: {size} at every rank")
        found += ["", *error_lines(self.errors, "update", self.sizes)]
        if self.adapter.order not in (None, "svd", "paper"):
            found.append("`matryoshka eval` says what a rank is worth after training it.")
        return found

    def _what(self) -> str:
        order, ranks = self.adapter.order, ", ".join(map(str, self.adapter.ranks))
        if self.adapter.is_single:
            return "a LoRA in one file"
        if order is None:
            return "a plain LoRA adapter: `matryoshka reorder` makes it nested"
        if order == "paper":
            return f"a nested LoRA adapter as the paper deploys it, for the ranks {ranks} alone"
        return f"a nested LoRA adapter in the order {order!r}, for any rank (nested: {ranks})"


def describe(path: PathLike) -> Description:
    """Open an adapter and read its layers. Raises: as `open_adapter`."""
    adapter = open_adapter(path)
    whole = plan_rank(adapter, adapter.max_rank)
    for layer in in_turn(adapter.layers, "measuring"):
        whole.lost[layer.name] = adapter.lost(layer)
    sizes = {rank: plan_rank(adapter, rank).size for rank in adapter.ranks}
    return Description(adapter, sizes, {rank: whole.error(rank) for rank in adapter.ranks})


def _range(values: list[int] | list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}, by layer"
