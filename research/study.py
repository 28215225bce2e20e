"""Read a study: a YAML file that names tasks, methods, seeds and learning rates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from matryoshka_lora import MatryoshkaError, Nesting
from research.runs import Job, Run, read

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "research" / "studies"
RUNS = ROOT / "research" / "runs"

EACH = "lora-each"
"""LoRA trained at each rank by itself: the reference, at the price of one run for each rank."""

EACH_RECIPES = {EACH: "lora", "adalora-each": "adalora"}
"""The methods that train one adapter for each rank, and the recipe of each."""

CUTS = ("prefix", "kept", "svd", "trained", "squeezed")
"""The ways to deploy a trained adapter that can be run; see `research.cuts`. The recorded runs have
more, which are settled."""


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        summary: One phrase for tables.
        rule: A rule of `matryoshka_lora.nest`. None means that the recipe is settled: its recorded
            runs are reported, and no new ones can be made.
        scaling: As `matryoshka_lora.nest` takes it.
        alpha: Rank r has the scale alpha / r with scaling ``"rank"``, alpha / sqrt(r) with
            ``"sqrt"``, and 1 with ``"none"``.
        length: Optimizer steps, as a multiple of the study's.
        authors: Begin as the authors' code does: A is uniform within 1 / sqrt(R), which is four to
            eight times PEFT's bound, and the factors have the model's dtype.
        parts: Micro-batches of a step. The rule draws a rank for each.
    """

    summary: str
    rule: str | None = "lora"
    scaling: Literal["none", "rank", "sqrt"] = "none"
    alpha: float = 1.0
    length: float = 1.0
    authors: bool = False
    parts: int = 1

    def lora(self, rank: int) -> dict[str, Any]:
        """Return arguments of ``peft.LoraConfig``."""
        alpha = rank if self.scaling == "none" else self.alpha
        return {"r": rank, "lora_alpha": alpha, "use_rslora": self.scaling == "sqrt"}


RECIPES = {
    "lora": Recipe("plain LoRA at R, scale 1"),
    "lora-shorter": Recipe("plain LoRA, three quarters of the steps", length=0.75),
    "lora-longer": Recipe("plain LoRA, half as many steps and questions again", length=1.5),
    "lora-quarter-longer": Recipe("plain LoRA, a quarter more steps and questions", length=1.25),
    "rslora": Recipe("LoRA at R with rsLoRA's scale, 16 / sqrt(R)", scaling="sqrt", alpha=16.0),
    "matryoshka": Recipe("the paper's P, scaling none", "matryoshka"),
    "matryoshka-longer": Recipe("P, half as many steps again", "matryoshka", length=1.5),
    "matryoshka-authors": Recipe(
        "P as its authors run it: 1 / sqrt(r), a larger A, bf16 factors",
        "matryoshka",
        "sqrt",
        authors=True,
    ),
    "lora-authors": Recipe(
        "LoRA as P's authors run it: 1 / sqrt(R), a larger A, bf16 factors",
        scaling="sqrt",
        authors=True,
    ),
    "matryoshka-sqrt": Recipe("the paper's P, scaling 1 / sqrt(r)", "matryoshka", "sqrt"),
    "matryoshka-rank": Recipe("the paper's P, scaling 1 / r", "matryoshka", "rank"),
    "dylora": Recipe("one nested rank for each step, as the paper runs DyLoRA", "dylora"),
    "dylora-longer": Recipe("the same, half as many steps again", "dylora", length=1.5),
    "dylora-authors": Recipe(
        "DyLoRA as the paper's authors run it: a rank for each of 8 micro-batches",
        "dylora",
        "sqrt",
        authors=True,
        parts=8,
    ),
    "dylora-all": Recipe("one rank of 1..R for each step, all at one scale", "dylora-all"),
    "dylora-alpha": Recipe(
        "DyLoRA as its inventors run it: scale 16 / b", "dylora-all", "rank", 16.0
    ),
    "dylora-frozen": Recipe("its frozen mode: one column learns", "dylora-frozen", "rank", 16.0),
    "stratified": Recipe("each row of a batch at a nested rank of its own", "stratified"),
    "lora-again": Recipe("plain LoRA for longer, on the same questions", None, length=1.5),
    "p-mean": Recipe("P divided by the number of ranks", None),
    "p-reversed": Recipe("P with its order reversed", None),
    "p-random": Recipe("P in a random order", None),
    "p-geometric-0.97": Recipe("a diagonal that falls by 0.97 from column to column", None),
    "p-geometric-0.9": Recipe("a diagonal that falls by 0.9", None),
    "p-geometric-0.8": Recipe("a diagonal that falls by 0.8", None),
    "p-learned": Recipe("a diagonal for each layer that begins as P and learns", None),
    "p-rates": Recipe("P as learning rates: column c of B moves p_c times as far", None),
    "sum": Recipe("the mean of the losses of all nested ranks at each step", None),
    "sandwich": Recipe("largest, smallest and a random rank, the largest as teacher", None),
    "adalora": Recipe("PEFT's AdaLoRA down to r from 1.5 r, scale 1", None),
}


@dataclass(frozen=True)
class Study:
    """A checked study.

    Attributes:
        name: The name of its file.
        title: The title of its tables.
        tasks: The source of each task, see `research.tasks`.
        methods: ``recipe/cut``, or ``lora-each``.
        seeds: The seeds of the runs that are measured on test rows.
        learning_rates: The grid that every method begins with, ascending. Where the best rate is at
            an edge, the grid grows there by its own factor.
        rate_seeds: The seeds of the grid's runs, which see validation rows only. The first tries
            every rate, the others the two best, and those that may be chosen.
        within: How many nats above the best rate's loss a lower rate may be and be chosen.
        training: Fields of ``trl.SFTConfig``, the same for every recipe.
        items: Questions of ``validation`` and of ``test``; ``judge`` is the number of training rows
            that are cut out of training and judge ranks that are trained. It is 0 where no method
            trains them.
        model: The base model's name.
        layers: Only so many of its first layers, with the tokens that the task needs; None is all.
        modules: The names of the adapted layers; empty is all linear ones.
        rank: R.
        ranks: The nested ranks, the last of which is R.
        each: The ranks of ``lora-each``; empty is all nested ones. Above these, the reference is
            the best that can be: all answers, and a loss of 0.
        also: Studies whose runs this one reads too.
        settled: Why the study is only reported; empty where it can be run.
        threads: The threads of one run, which change the rounding of its numbers.
    """

    name: str
    title: str
    tasks: Mapping[str, Mapping[str, Any]]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    rate_seeds: tuple[int, ...]
    training: Mapping[str, Any]
    items: Mapping[str, int]
    model: str = "smollm2-135m"
    layers: int | None = None
    modules: tuple[str, ...] = ()
    dtype: str = "bf16"
    rank: int = 32
    ranks: tuple[int, ...] = field(default=())
    within: float = 0.0
    each: tuple[int, ...] = ()
    also: tuple[str, ...] = field(default=())
    settled: str = ""
    threads: int = 1

    def nesting(self, rank: int) -> tuple[int, ...]:
        """Return the nested ranks of a run: all up to R, or for a LoRA of one rank that alone."""
        return self.ranks if rank == self.rank else (rank,)

    def measured(self, job: Job) -> tuple[int, ...]:
        """Return the ranks at which a job's adapter is measured."""
        return (job.rank,) if job.recipe == "adalora" else self.nesting(job.rank)

    def steps(self, recipe: str) -> int:
        """Return the optimizer steps of one run."""
        return int(RECIPES[recipe].length * self.training["max_steps"])

    def train_rows(self, recipe: str) -> int:
        """Return how many rows one run takes, counting those that it sees again."""
        return self.steps(recipe) * int(self.training["per_device_train_batch_size"])

    def settings(self, task: str, recipe: str) -> str:
        """Return a hash of what a run's numbers depend on besides its job."""
        how = RECIPES[recipe]
        # Rows that judge are cut out of those of a file; generated ones are others anyway.
        apart = {"judge"} if "generated" in self.tasks[task] else set()
        found = {
            "source": dict(self.tasks[task]),
            "recipe": [
                how.rule,
                how.scaling,
                how.alpha,
                how.length,
                *["authors"] * how.authors,
                *[how.parts] * (how.parts > 1),
            ],
            "model": [self.model, self.layers, self.dtype],
            "training": dict(self.training),
            "items": {split: n for split, n in self.items.items() if n and split not in apart},
            "threads": self.threads,
            **({"modules": list(self.modules)} if self.modules else {}),
        }
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]

    def load_runs(self) -> dict[Job, Run]:
        """Return the recorded runs of this study and of those that it shares runs with."""
        return self.its_own(read(RUNS / f"{name}.jsonl" for name in (*self.also, self.name)))

    def its_own(self, runs: Mapping[Job, Run]) -> dict[Job, Run]:
        """Return those of some runs whose task and recipe are the study's.

        Raises:
            MatryoshkaError: One of them was run with other settings.
        """
        recipes = {parse_method(method)[0] for method in self.methods}
        found = {
            job: run
            for job, run in runs.items()
            if job.task in self.tasks and job.recipe in recipes
        }
        for job, run in found.items():
            own = self.settings(job.task, job.recipe), self.measured(job)
            if (run.settings, run.ranks) != own:
                raise MatryoshkaError(
                    f"{job} was run with other settings than {self.name} has: give the study those "
                    "settings, or move its runs aside"
                )
        return found


def parse_method(name: str) -> tuple[str, str]:
    """Return the recipe and the cut of ``recipe/cut``, or of a method that trains each rank."""
    if name in EACH_RECIPES:
        return EACH_RECIPES[name], "prefix"
    recipe, _, cut = name.partition("/")
    if recipe not in RECIPES or not cut:
        known = ", ".join(RECIPES)
        raise MatryoshkaError(f"{name!r} is no recipe/cut, and no {EACH}; the recipes are {known}")
    return recipe, cut


def load_study(name: str) -> Study:
    """Return a study of `research/studies`, by its name, or of any YAML file, by its path.

    Raises:
        MatryoshkaError: The file cannot be read, or something in it is wrong.
    """
    path = Path(name) if name.endswith(".yaml") else STUDIES / f"{name}.yaml"
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        return make_study(path.stem, given)
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
        raise MatryoshkaError(f"there is no study {name!r}; the studies are {known}") from error
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise MatryoshkaError(f"{path} is no study: {error}") from error


def make_study(name: str, given: Mapping[str, Any]) -> Study:
    """Return the study of a mapping that has the YAML file's form."""
    rest = dict(given)
    rates, items = rest.pop("learning_rates"), {"judge": 0, **rest.pop("items")}
    nesting = Nesting(rest.pop("ranks", None) or Nesting.powers_of_two(rest.get("rank", 32)).ranks)
    methods, tasks = tuple(rest.pop("methods")), rest.pop("tasks")
    study = Study(
        name=name,
        methods=methods,
        tasks=tasks,
        seeds=tuple(rest.pop("seeds")),
        learning_rates=tuple(map(float, rates["grid"])),
        rate_seeds=tuple(rates["seeds"]),
        within=float(rates.get("within", 0)),
        items=items,
        ranks=nesting.ranks,
        modules=tuple(rest.pop("modules", ())),
        each=tuple(rest.pop("each", ())),
        also=tuple(rest.pop("also", ())),
        **rest,
    )
    if nesting.max_rank != study.rank:
        raise MatryoshkaError(f"{name}: the last of ranks is not rank, {study.rank}")
    if {*study.seeds} & {*study.rate_seeds}:
        raise MatryoshkaError(f"{name}: a seed that chooses rates may not be measured too")
    for method in methods:
        parse_method(method)
    return study


def may_be_run(study: Study) -> None:
    """Refuse to run what can only be reported.

    Raises:
        MatryoshkaError: The study, a recipe or a cut is settled, or an order would be judged by the
            rows that are measured.
    """
    if study.settled:
        raise MatryoshkaError(f"{study.name} is only reported: {study.settled}")
    for method in study.methods:
        recipe, cut = parse_method(method)
        if RECIPES[recipe].rule is None or cut not in CUTS:
            raise MatryoshkaError(
                f"{method} is settled: its runs are reported, and no new ones made"
            )
        if (
            cut == "trained"
            and not study.items["judge"]
            and any("facts" not in t for t in study.tasks.values())
        ):
            raise MatryoshkaError(
                f"{method} needs rows to judge by that are not measured: write items.judge"
            )
