"""The names of the methods on pages and in figures, and their colors and markers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from research.study import LORA_EACH

TRAINED = "lora/trained"
"""`train_ranks`: of version 0.5 in the studies ``low-...``, and of version 0.4 in all others."""

NAMES = {
    "lora/prefix": "LoRA, truncated",
    "lora/svd": "LoRA, then `reorder`",
    "lora/learned-0.1": "LoRA, then `learned` of version 0.1, which was removed",
    "lora/trained": "**LoRA, then `train_ranks` of version 0.4**",
    "lora-longer/svd": "LoRA with 1.5 times as many steps, then `reorder`",
    "lora/squeezed": "LoRA-Squeeze, our variant: a file for each rank",
    "matryoshka/prefix": "P, dropped after training (the paper)",
    "matryoshka/svd": "P, then `reorder`",
    "matryoshka/trained": "P, then `train_ranks`",
    "matryoshka/trained-0.3": "P, then `train_ranks` of version 0.3",
    "matryoshka-authors/svd": "P with the authors' settings, then `reorder`",
    "dylora-authors/prefix": "DyLoRA with the authors' settings",
    "dylora/prefix": "DyLoRA",
    LORA_EACH: "*LoRA trained at the rank*",
}
"""The names of the methods, as Markdown."""


LOW_NAMES = {
    **NAMES,
    "lora/trained": "**LoRA, then `train_ranks`**",
    "lora/trained-0.25": "LoRA, then `train_ranks` with `max_examples=0.25`",
    "lora/trained-1.0": "LoRA, then `train_ranks` with `max_examples=1.0`",
}
"""The names in the studies of the `train_ranks` of version 0.5."""


def plain_name(method: str, names: Mapping[str, str] = NAMES) -> str:
    """Return the name of a method without Markdown, for a legend."""
    return names[method].replace("*", "").replace("`", "")


@dataclass(frozen=True)
class Mode:
    """The background that a figure is made for; the figure itself is transparent.

    Attributes:
        name: The end of the name of the figure's file.
        text: The color of text and axes.
        muted: The color of what should not stand out.
        grid: The color of the lines behind the curves.
    """

    name: str
    text: str
    muted: str
    grid: str


LIGHT = Mode("light", text="#24292F", muted="#6E7781", grid="#D8DEE4")
DARK = Mode("dark", text="#E6EDF3", muted="#9AA4AF", grid="#3D444D")
MODES = (LIGHT, DARK)


@dataclass(frozen=True)
class Look:
    """The color of a method in each mode, and its marker."""

    light: str
    dark: str
    marker: str

    def color(self, mode: Mode) -> str:
        """Return the color for a mode."""
        return self.light if mode is LIGHT else self.dark


LOOKS = {
    LORA_EACH: Look("#24292F", "#F0F3F6", "*"),
    "lora/trained": Look("#0065A8", "#4AA3E8", "o"),
    "lora/squeezed": Look("#A86F00", "#E69F00", "v"),
    "lora-longer/svd": Look("#A86F00", "#E69F00", "v"),
    "lora/trained-1.0": Look("#7A3E9D", "#C08BE0", "P"),
    "lora/svd": Look("#009E73", "#4FD6A8", "D"),
    "lora/prefix": Look("#5F6770", "#8E97A1", "^"),
    "matryoshka/prefix": Look("#C94F00", "#FF8A4C", "X"),
    "matryoshka/svd": Look("#4A7FD6", "#9DBEFF", "s"),
}
"""The hues are those of Okabe and Ito, which differ for every kind of color vision."""


def set_rank_axis(axes: Any, ranks: Sequence[int], label: str) -> None:
    """Give matplotlib's axes a logarithmic horizontal axis with a tick at each rank."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlabel(label)
