"""How the study's adapters are trained: one entry of `RECIPES` for each way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from matryoshka_lora import MatryoshkaError
from research.rules import RULES

Scaling = Literal["none", "rank", "sqrt"]

EACH = "lora-each"
"""LoRA trained at each rank by itself: the gold standard, at the price of a run for each rank."""

EACH_RECIPES = {EACH: "lora", "adalora-each": "adalora"}
"""The methods that train an adapter for each rank by itself, and the recipe of each."""

MOMENT_ROWS, ORDER_ROWS = 128, 480
"""Training rows that a cut looks at, and rows that an order is learned from, which is 40 steps."""

TRAINED_SHARE = 0.5
"""The rows that ranks are trained on by themselves, as a share of those of training."""

SQUEEZE_POWER = 0.4
"""Training on at rank r has (R / r) to this power times the rate of R. It was not looked for."""

GAINS = (0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
"""What the cut ``gains`` tries for each rank."""

CUTS: dict[str, dict[str, Any] | None] = {
    "prefix": None,
    "keep": None,
    "svd": None,
    "activations": {"rows": MOMENT_ROWS},
    "loss": {"rows": MOMENT_ROWS},
    "para": None,
    "budget": None,
    "gains": {"gains": list(GAINS), "rows": MOMENT_ROWS},
    "learned": {"rows": ORDER_ROWS},
    "learned-20": {"steps": 20, "learning_rate": 0.01},
    "distilled": {"rows": ORDER_ROWS},
    "trained": {"share": TRAINED_SHARE},
    "trained-1": {"share": 1.0},
    "squeezed": {"share": TRAINED_SHARE, "power": SQUEEZE_POWER},
    "squeezed-in-turn": {"share": TRAINED_SHARE, "power": SQUEEZE_POWER},
}
"""The ways in which a trained adapter is deployed, and what the numbers of each depend on; see `research.cuts`."""


def learning_rows(cut: str, train_rows: int) -> int:
    """The rows of the gradient steps that a cut takes after a training of so many rows."""
    how = CUTS[cut] or {}
    if "share" in how:
        return round(float(how["share"]) * train_rows)
    return ORDER_ROWS if cut in ("learned", "distilled") else 0


def squeeze_steps(ranks: Sequence[int], steps: int) -> dict[int, int]:
    """How many of the steps after a training of ``steps`` each rank below R gets: half of what the smaller one gets."""
    parts = [2.0**-number for number in range(len(ranks))]
    return {
        rank: max(1, round(TRAINED_SHARE * steps * part / sum(parts))) for rank, part in zip(ranks, parts, strict=True)
    }


@dataclass(frozen=True)
class Recipe:
    """One way of training.

    Attributes:
        summary: One sentence for reports.
        rule: One of `matryoshka_lora.rules.RULES` or of `research.rules.RULES`.
        scaling: As `matryoshka_lora.nest` takes it.
        alpha: A rank r has the scale alpha / r with scaling ``"rank"`` and alpha / sqrt(r) with ``"sqrt"``; None is 1.
            With ``"none"`` every scale is 1.
        objective: What is minimised, where it is not the loss under the rule's diagonal: a name of
            `research.trainers.TRAINERS`, or ``"adalora"``.
        length: Optimizer steps, as a multiple of the study's.
        new_rows: Whether a longer run has more questions of a built-in task; else it sees the same ones again.
    """

    summary: str
    rule: str = "lora"
    scaling: Scaling = "none"
    alpha: float | None = None
    objective: str | None = None
    length: float = 1.0
    new_rows: bool = True

    @property
    def cuts(self) -> tuple[str, ...]:
        """The cuts that its adapters may have. Only what has a P of its own can keep it."""
        if self.one_rank:
            return ("prefix",)
        return tuple(cut for cut in CUTS if cut != "keep" or self.rule in ("matryoshka", *RULES))

    @property
    def one_rank(self) -> bool:
        """Whether its adapters are made for one rank, and have no curve of their own."""
        return self.objective == "adalora"

    def lora(self, rank: int) -> dict[str, Any]:
        """The section ``lora`` of a training config."""
        alpha = rank if self.scaling == "none" else self.alpha or 1.0
        return {"r": rank, "lora_alpha": alpha, "use_rslora": self.scaling == "sqrt"}

    def settings(self) -> dict[str, Any]:
        """What its numbers depend on; what is not said has its default."""
        nesting: dict[str, Any] = {"rule": self.rule}
        if self.scaling != "none":
            nesting["scaling"] = self.scaling
        if self.alpha is not None:
            nesting["alpha"] = self.alpha
        found = {"nesting": nesting, "objective": self.objective, "length": self.length}
        return found if self.new_rows else {**found, "new_rows": False}


RECIPES: dict[str, Recipe] = {
    "lora": Recipe("plain LoRA at R, scale 1"),
    "lora-shorter": Recipe("plain LoRA with three quarters of the steps", length=0.75),
    "lora-longer": Recipe(
        "plain LoRA with half as many steps and questions again: the tokens of a learned order", length=1.5
    ),
    "lora-quarter-longer": Recipe("plain LoRA with a quarter as many steps and questions again", length=1.25),
    "lora-again": Recipe("plain LoRA with half as many steps again, on the same questions", length=1.5, new_rows=False),
    "rslora": Recipe("LoRA at R with rsLoRA's scale, 16 / sqrt(R)", scaling="sqrt", alpha=16.0),
    "matryoshka": Recipe("the paper's P, scaling none", "matryoshka"),
    "matryoshka-longer": Recipe("the paper's P with half as many steps and questions again", "matryoshka", length=1.5),
    "matryoshka-sqrt": Recipe("the paper's P, scaling 1 / sqrt(r)", "matryoshka", "sqrt"),
    "matryoshka-rank": Recipe("the paper's P, scaling 1 / r", "matryoshka", "rank"),
    "dylora": Recipe("one nested rank for each step, as the MatryoshkaLoRA paper runs DyLoRA", "dylora"),
    "dylora-longer": Recipe("the same DyLoRA with half as many steps and questions again", "dylora", length=1.5),
    "dylora-all": Recipe("one rank of 1..R for each step, all at one scale", "dylora-all"),
    "dylora-alpha": Recipe(
        "DyLoRA as its inventors run it: one rank b of 1..R for each step, at the scale 16 / b",
        "dylora-all",
        "rank",
        16.0,
    ),
    "dylora-frozen": Recipe(
        "DyLoRA's frozen mode: the same, and only column b of B and row b of A learn", "dylora-frozen", "rank", 16.0
    ),
    "stratified": Recipe("each row of a batch at a nested rank of its own", "stratified"),
    "p-mean": Recipe("P divided by the number of ranks", "mean"),
    "p-reversed": Recipe("P with its order reversed", "reversed"),
    "p-random": Recipe("P in a random order", "random"),
    "p-geometric-0.97": Recipe("a diagonal that falls by 0.97 from column to column", "geometric-0.97"),
    "p-geometric-0.9": Recipe("a diagonal that falls by 0.9 from column to column", "geometric-0.9"),
    "p-geometric-0.8": Recipe("a diagonal that falls by 0.8 from column to column", "geometric-0.8"),
    "p-learned": Recipe("a diagonal for each layer that begins as P, learns, and is kept in B", objective="p-learned"),
    "p-rates": Recipe("P as learning rates: column c of B moves p_c times as far", objective="p-rates"),
    "sum": Recipe("the mean of the losses of all nested ranks at each step", objective="sum"),
    "sandwich": Recipe(
        "the largest, the smallest and a random nested rank at each step, the largest teaching the others",
        objective="sandwich",
    ),
    "adalora": Recipe("PEFT's AdaLoRA down to r of 1.5 r, scale 1", objective="adalora"),
}


def parse_method(name: str) -> tuple[str, str]:
    """The recipe and the cut of ``recipe/cut``, or of a method of `EACH_RECIPES`.

    Raises:
        MatryoshkaError: There is no such recipe, or it has no such cut; the message names the nearest.
    """
    if name in EACH_RECIPES:
        return EACH_RECIPES[name], "prefix"
    recipe, slash, cut = str(name).partition("/")
    if recipe not in RECIPES or RECIPES[recipe].one_rank or not slash:
        whole = {name: recipe for name, recipe in RECIPES.items() if not recipe.one_rank}
        known = [*EACH_RECIPES, *(f"{recipe}/{cut}" for recipe in whole for cut in whole[recipe].cuts)]
        close = get_close_matches(str(name), known, n=3) or [EACH, "lora/svd"]
        raise MatryoshkaError(f"there is no method {name!r}; did you mean {' or '.join(close)}?")
    if cut not in RECIPES[recipe].cuts:
        raise MatryoshkaError(f"recipe {recipe!r} has no cut {cut!r}; it has {', '.join(RECIPES[recipe].cuts)}")
    return recipe, cut
