"""Give each method a plain name, a colour and a marker, on white and on dark ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from research.study import EACH


@dataclass(frozen=True)
class Mode:
    """A ground that a picture is looked at on; the picture itself has none.

    Attributes:
        name: Ends the name of its file.
        ground: The lightest or darkest that it will lie on.
        ink: Of words and axes.
        quiet: Of what shall not stand out.
        grid: Of lines behind the curves.
    """

    name: str
    ground: str
    ink: str
    quiet: str
    grid: str


LIGHT = Mode("light", ground="#FFFFFF", ink="#24292F", quiet="#6E7781", grid="#D8DEE4")
DARK = Mode("dark", ground="#1E2129", ink="#E6EDF3", quiet="#9AA4AF", grid="#3D444D")
MODES = (LIGHT, DARK)


@dataclass(frozen=True)
class Look:
    """One method's words for a legend, its colour in each mode, and its marker."""

    name: str
    light: str
    dark: str
    marker: str

    def colour(self, mode: Mode) -> str:
        """On a mode's ground."""
        return self.light if mode is LIGHT else self.dark


_BLUE, _ORANGE, _GREEN = ("#0065A8", "#4AA3E8"), ("#A86F00", "#E69F00"), ("#009E73", "#4FD6A8")
_RED, _SKY = ("#C94F00", "#FF8A4C"), ("#4A7FD6", "#9DBEFF")
_BLACK, _GREY = ("#24292F", "#F0F3F6"), ("#5F6770", "#8E97A1")

LOOKS = {
    EACH: Look("LoRA trained at the rank alone", *_BLACK, "*"),
    "lora/trained": Look("one LoRA run, every rank trained a little", *_BLUE, "o"),
    "lora/squeezed": Look("LoRA-Squeeze, a file for each rank", *_ORANGE, "v"),
    "lora/svd": Look("one LoRA run, reordered by SVD", *_GREEN, "D"),
    "lora/prefix": Look("one LoRA run, its first columns as they are", *_GREY, "^"),
    "matryoshka/prefix": Look("the paper's deployment: P dropped", *_RED, "X"),
    "matryoshka/svd": Look("one run with P, reordered by SVD", *_SKY, "s"),
}
"""Okabe and Ito's hues, which differ for every kind of colour vision."""


def rank_axis(
    axes: Any, ranks: Sequence[int], label: str = "rank at which the adapter is used"
) -> None:
    """Give matplotlib's axes a horizontal axis of these ranks, by powers of two."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlabel(label)
