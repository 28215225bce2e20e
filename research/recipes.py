"""How the study's adapters are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from matryoshka_lora.adapter.order import LEARNING_RATE, STEPS
from matryoshka_lora.serving.calibrate import ROWS
from matryoshka_lora.errors import MatryoshkaError

EACH = "lora-each"
"""LoRA trained at each rank by itself: the gold standard, at the price of a run for each rank."""

EACH_RECIPES = {EACH: "lora", "adalora-each": "adalora"}
"""The methods that train an adapter for each rank by itself, and the recipe of each."""

LEARNED = {"learned": (STEPS, LEARNING_RATE), "learned-20": (20, 0.01), "distilled": (STEPS, LEARNING_RATE)}
"""The cuts that take gradient steps after training: how many, and at which rate."""

GAINS = (0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
"""What the cut ``gains`` tries for each rank."""

_REORDERED = ("frobenius", "activations", "loss", "para", "budget", "gains", *LEARNED)


@dataclass(frozen=True)
class Recipe:
    """One way of training.

    Attributes:
        summary: One sentence for reports.
        nesting: The section ``nesting`` of a training config, without the ranks.
        cuts: The ways in which its adapters may be deployed; names of `research.cuts.CUTS`.
        objective: What is minimised, where it is not the loss under the rule's diagonal: a name of
            `research.objectives.TRAINERS`, or ``"adalora"``.
        length: Optimizer steps, as a multiple of the study's.
        new_rows: Whether a longer run has more questions of a built-in task; else it sees the same ones again.
    """

    summary: str
    nesting: Mapping[str, Any] = field(default_factory=dict)
    cuts: tuple[str, ...] = ("prefix", *_REORDERED)
    objective: str | None = None
    length: float = 1.0
    new_rows: bool = True

    def settings(self) -> dict[str, Any]:
        """What its numbers depend on."""
        found = {"nesting": dict(self.nesting), "objective": self.objective, "length": self.length}
        return found if self.new_rows else {**found, "new_rows": False}

    @property
    def one_rank(self) -> bool:
        """Whether its adapters are made for one rank, and have no curve of their own."""
        return self.objective == "adalora"


def _p(rule: str, summary: str, length: float = 1.0, **nesting: Any) -> Recipe:
    return Recipe(summary, {"rule": rule, **nesting}, ("prefix", "keep", *_REORDERED), length=length)


RECIPES: dict[str, Recipe] = {
    "lora": Recipe("plain LoRA at R, scale 1", {"rule": "lora"}),
    "lora-longer": Recipe(
        "plain LoRA with half as many steps and questions again: the tokens of a learned order",
        {"rule": "lora"},
        length=1.5,
    ),
    "lora-again": Recipe(
        "plain LoRA with half as many steps again, on the same questions", {"rule": "lora"}, length=1.5, new_rows=False
    ),
    "rslora": Recipe("LoRA at R with rsLoRA's scale, 16 / sqrt(R)", {"rule": "lora", "scaling": "sqrt", "alpha": 16.0}),
    "matryoshka": _p("matryoshka", "the paper's P, scaling none"),
    "matryoshka-longer": _p("matryoshka", "the paper's P with half as many steps and questions again", 1.5),
    "matryoshka-sqrt": _p("matryoshka", "the paper's P, scaling 1 / sqrt(r)", scaling="sqrt"),
    "matryoshka-rank": _p("matryoshka", "the paper's P, scaling 1 / r", scaling="rank"),
    "dylora": Recipe("one nested rank for each step, as the MatryoshkaLoRA paper runs DyLoRA", {"rule": "dylora"}),
    "dylora-all": Recipe("one rank of 1..R for each step, all at one scale", {"rule": "dylora-all"}),
    "dylora-alpha": Recipe(
        "DyLoRA as its inventors run it: one rank b of 1..R for each step, at the scale 16 / b",
        {"rule": "dylora-all", "scaling": "rank", "alpha": 16.0},
    ),
    "dylora-frozen": Recipe(
        "DyLoRA's frozen mode: the same, and only column b of B and row b of A learn",
        {"rule": "dylora-frozen", "scaling": "rank", "alpha": 16.0},
    ),
    "stratified": Recipe("each row of a batch at a nested rank of its own", {"rule": "stratified"}),
    "p-mean": _p("mean", "P divided by the number of ranks"),
    "p-reversed": _p("reversed", "P with its order reversed"),
    "p-random": _p("random", "P in a random order"),
    "p-geometric-0.97": _p("geometric-0.97", "a diagonal that falls by 0.97 from column to column"),
    "p-geometric-0.9": _p("geometric-0.9", "a diagonal that falls by 0.9 from column to column"),
    "p-geometric-0.8": _p("geometric-0.8", "a diagonal that falls by 0.8 from column to column"),
    "p-learned": Recipe(
        "a diagonal for each layer that begins as P, learns, and is kept in B", {"rule": "lora"}, objective="p-learned"
    ),
    "p-rates": Recipe(
        "P as learning rates: column c of B moves p_c times as far", {"rule": "lora"}, objective="p-rates"
    ),
    "sum": Recipe("the mean of the losses of all nested ranks at each step", {"rule": "lora"}, objective="sum"),
    "sandwich": Recipe(
        "the largest, the smallest and a random nested rank at each step, the largest teaching the others",
        {"rule": "lora"},
        objective="sandwich",
    ),
    "adalora": Recipe("PEFT's AdaLoRA down to r of 1.5 r, scale 1", {"rule": "lora"}, ("prefix",), "adalora"),
}


def cut_settings(cut: str) -> dict[str, Any] | None:
    """What a cut's numbers depend on besides its name; None if nothing does."""
    if cut in LEARNED:
        steps, learning_rate = LEARNED[cut]
        return {"steps": steps, "learning_rate": learning_rate}
    if cut == "gains":
        return {"gains": list(GAINS), "rows": ROWS["loss"]}
    return {"rows": ROWS[cut]} if cut in ("activations", "loss") else None


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
        close = get_close_matches(str(name), known, n=3) or [EACH, "lora/frobenius"]
        raise MatryoshkaError(f"there is no method {name!r}; did you mean {' or '.join(close)}?")
    if cut not in RECIPES[recipe].cuts:
        raise MatryoshkaError(f"recipe {recipe!r} has no cut {cut!r}; it has {', '.join(RECIPES[recipe].cuts)}")
    return recipe, cut
