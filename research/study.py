"""Read a study: a YAML file that names tasks, methods, seeds and learning rates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from matryoshka_lora import MatryoshkaError, Nesting
from research.runs import Job, Run, read_runs

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "research" / "studies"
RUNS = ROOT / "research" / "runs"

LORA_EACH = "lora-each"
"""The reference: a LoRA for each rank, trained at this rank."""

DEPLOYMENTS = ("prefix", "kept", "svd", "trained", "trained-0.25", "trained-1.0", "squeezed")
"""The ways to deploy a trained adapter; see `research.deployments`."""

WITHOUT_TRAINING = ("prefix", "kept", "svd")
"""The deployments that take seconds."""


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    Attributes:
        summary: A phrase for tables.
        rule: The name of a built-in rule, or of a rule of `research.rules`.
        scaling: The argument of `matryoshka_lora.nest`.
        alpha: Rank r has the scale alpha / r with scaling ``"rank"``, alpha / sqrt(r) with
            ``"sqrt"``, and 1 with ``"none"``.
        length: Optimizer steps, as a multiple of the study's.
        authors: Whether to start as the code of the paper's authors does: A is uniform within
            1 / sqrt(R), which is four to eight times PEFT's bound, and the factors have the dtype
            of the model.
        parts: DyLoRA draws a rank for each of these equal parts of a batch.
    """

    summary: str
    rule: str = "lora"
    scaling: Literal["none", "rank", "sqrt"] = "none"
    alpha: float = 1.0
    length: float = 1.0
    authors: bool = False
    parts: int = 1

    def lora(self, rank: int) -> dict[str, Any]:
        """Return the arguments of ``peft.LoraConfig``."""
        alpha = rank if self.scaling == "none" else self.alpha
        return {"r": rank, "lora_alpha": alpha, "use_rslora": self.scaling == "sqrt"}


RECIPES = {
    "lora": Recipe("plain LoRA at R, scale 1"),
    "lora-longer": Recipe("plain LoRA, half as many steps and questions again", length=1.5),
    "rslora": Recipe("LoRA at R with rsLoRA's scale, 16 / sqrt(R)", scaling="sqrt", alpha=16.0),
    "matryoshka": Recipe("the paper's P, scaling none", "matryoshka"),
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
    "matryoshka-authors-none": Recipe("the same, scaling none", "matryoshka", authors=True),
    "matryoshka-authors-rank": Recipe(
        "the same, scaling 1 / r", "matryoshka", "rank", authors=True
    ),
    "lora-authors-none": Recipe("LoRA in the same way, scale 1", authors=True),
    "lora-authors-rank": Recipe("LoRA in the same way, scale 1 / R", scaling="rank", authors=True),
    "dylora-authors-none": Recipe(
        "DyLoRA in the same way, scale 1", "dylora", authors=True, parts=8
    ),
    "dylora-authors-rank": Recipe(
        "DyLoRA in the same way, scale 1 / r", "dylora", "rank", authors=True, parts=8
    ),
    "matryoshka-sqrt": Recipe("the paper's P, scaling 1 / sqrt(r)", "matryoshka", "sqrt"),
    "matryoshka-rank": Recipe("the paper's P, scaling 1 / r", "matryoshka", "rank"),
    "dylora": Recipe("one nested rank for each step, as the paper runs DyLoRA", "dylora"),
    "dylora-authors": Recipe(
        "DyLoRA as the paper's authors run it: a rank for each of 8 parts of a batch",
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
}


@dataclass(frozen=True)
class Study:
    """A validated study.

    Raises:
        MatryoshkaError: Fields do not fit together, or the grid has a single learning rate.

    Attributes:
        name: The name of its file.
        title: The title of its tables.
        tasks: The source of each task; see `research.tasks`.
        methods: ``recipe/deployment``, or ``lora-each``.
        seeds: The seeds of the runs that are measured on test examples.
        learning_rates: The grid that every method begins with, increasing. Where the best rate is
            at an end, the grid grows there by its own ratio.
        rate_seeds: The seeds of the runs that choose a rate, which are measured on validation
            examples only. The first seed tries every rate; the others try the two best rates, and
            those that may be chosen.
        within: The lowest rate whose loss is at most this far above the best one, in nats, is
            chosen.
        training: Fields of ``trl.SFTConfig``, the same for every recipe.
        items: The number of ``validation`` and ``test`` examples. ``judge`` is the number of
            training examples that are held out to decide whether trained ranks are kept. It is 0 in
            studies without ``trained``.
        model: The name of the base model.
        layers: The number of its first layers to use, with the tokens that the task needs. None
            means all of it.
        modules: The names of the adapted layers; empty means all linear layers.
        dtype: The dtype of the base model.
        rank: R.
        ranks: The nested ranks, the last of which is R.
        reference_ranks: The ranks of ``lora-each``; empty means all nested ranks.
        max_examples: The argument of `matryoshka_lora.NestedAdapter.train_ranks`.
        also: The names of studies whose runs this one uses too.
        rates_of: The name of a study whose chosen learning rates this one uses; empty if it chooses
            its own.
        threads: The threads of a run. They change the rounding of its numbers.
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
    ranks: tuple[int, ...] = ()
    within: float = 0.0
    reference_ranks: tuple[int, ...] = ()
    max_examples: int | None = None
    also: tuple[str, ...] = ()
    rates_of: str = ""
    threads: int = 1

    def __post_init__(self) -> None:
        if self.ranks[-1] != self.rank:
            raise MatryoshkaError(
                f"{self.name}: the last of ranks must be rank, {self.rank}, got {self.ranks[-1]}."
            )
        grid = list(self.learning_rates)
        if not self.rates_of and (len(grid) < 2 or grid != sorted(set(grid))):
            raise MatryoshkaError(
                f"{self.name}: learning_rates.grid must be at least two increasing rates, got "
                f"{grid}."
            )
        if shared_seeds := {*self.seeds} & {*self.rate_seeds}:
            raise MatryoshkaError(
                f"{self.name}: the seeds {sorted(shared_seeds)} choose a learning rate and are "
                "measured too. Choose the rates with other seeds."
            )
        sources = self.tasks.values()
        needs_judge = any("facts" not in source for source in sources)
        for method in self.methods:
            _, deployment = parse_method(method)
            if deployment.startswith("trained") and needs_judge and not self.items["judge"]:
                raise MatryoshkaError(
                    f"{method} needs examples that decide whether the ranks are kept, and that are "
                    "not measured. Set items.judge."
                )
            if deployment in ("kept", "squeezed") and any("choices" in s for s in sources):
                raise MatryoshkaError(
                    f"{method} has another adapter at each rank, so it cannot answer questions "
                    "with choices."
                )

    def nested_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the nested ranks of a run: the study's at R, otherwise only ``rank``."""
        return self.ranks if rank == self.rank else (rank,)

    def steps(self, recipe: str) -> int:
        """Return the optimizer steps of a run."""
        return int(RECIPES[recipe].length * self.training["max_steps"])

    def num_training_examples(self, recipe: str) -> int:
        """Return how many examples a run takes, counting repetitions."""
        return self.steps(recipe) * int(self.training["per_device_train_batch_size"])

    def settings(self, task: str, recipe_name: str) -> str:
        """Return a hash of what the numbers of a run depend on besides its job."""
        recipe = RECIPES[recipe_name]
        recipe_settings: list[Any] = [recipe.rule, recipe.scaling, recipe.alpha, recipe.length]
        if recipe.authors:
            recipe_settings.append("authors")
        if recipe.parts > 1:
            recipe_settings.append(recipe.parts)
        items = {split: count for split, count in self.items.items() if count}
        if "generated" in self.tasks[task]:
            # The held-out examples of a file are missing in training; generated ones are new.
            items.pop("judge", None)
        # Recorded runs have a hash of these keys and values.
        settings: dict[str, Any] = {
            "source": dict(self.tasks[task]),
            "recipe": recipe_settings,
            "model": [self.model, self.layers, self.dtype],
            "training": dict(self.training),
            "items": items,
            "threads": self.threads,
        }
        if self.modules:
            settings["modules"] = list(self.modules)
        if self.max_examples is not None:
            settings["max_examples"] = self.max_examples
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def load_runs(self) -> dict[Job, Run]:
        """Return the recorded runs of this study, and of those in ``also``."""
        files = [RUNS / f"{name}.jsonl" for name in (*self.also, self.name)]
        return self.select_runs(read_runs(files))

    def select_runs(self, runs: Mapping[Job, Run]) -> dict[Job, Run]:
        """Return the runs whose task and recipe are in the study.

        Raises:
            MatryoshkaError: A run has other settings than the study.
        """
        recipes = {parse_method(method)[0] for method in self.methods}
        selected: dict[Job, Run] = {}
        for job, run in runs.items():
            if job.task not in self.tasks or job.recipe not in recipes:
                continue
            same_settings = run.settings == self.settings(job.task, job.recipe)
            if not same_settings or run.ranks != self.nested_ranks(job.rank):
                raise MatryoshkaError(
                    f"{job} was run with other settings than those of {self.name}. Restore the "
                    "settings of the study, or move its runs away."
                )
            selected[job] = run
        return selected


def parse_method(name: str) -> tuple[str, str]:
    """Return the recipe and the deployment of ``recipe/deployment``, or of ``lora-each``."""
    if name == LORA_EACH:
        return "lora", "prefix"
    recipe, _, deployment = name.partition("/")
    if recipe not in RECIPES or deployment not in DEPLOYMENTS:
        raise MatryoshkaError(
            f"A method must be recipe/deployment or {LORA_EACH}, got {name!r}. The recipes are "
            f"{', '.join(RECIPES)}, and the deployments {', '.join(DEPLOYMENTS)}."
        )
    return recipe, deployment


def load_study(name: str) -> Study:
    """Return a study of `research/studies`, by its name, or of any YAML file, by its path.

    Raises:
        MatryoshkaError: The file cannot be read, or its content is not valid.
    """
    path = Path(name) if name.endswith(".yaml") else STUDIES / f"{name}.yaml"
    try:
        return make_study(path.stem, yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        names = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
        raise MatryoshkaError(f"There is no study {name!r}. The studies are {names}.") from error
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise MatryoshkaError(f"{path} is not a valid study: {error}") from error


def make_study(name: str, content: Mapping[str, Any]) -> Study:
    """Return the study of the content of a YAML file.

    Raises:
        MatryoshkaError: The content is not valid.
    """
    fields = dict(content)
    rates = fields.pop("learning_rates")
    rates_of = rates.get("of", "")
    items = {"judge": 0, **fields.pop("items")}
    default_ranks = Nesting.powers_of_two(fields.get("rank", 32)).ranks
    nesting = Nesting(fields.pop("ranks", None) or default_ranks)
    return Study(
        name=name,
        methods=tuple(fields.pop("methods")),
        tasks=fields.pop("tasks"),
        seeds=tuple(fields.pop("seeds")),
        learning_rates=() if rates_of else tuple(map(float, rates["grid"])),
        rate_seeds=() if rates_of else tuple(rates["seeds"]),
        rates_of=rates_of,
        within=float(rates.get("within", 0)),
        items=items,
        ranks=nesting.ranks,
        modules=tuple(fields.pop("modules", ())),
        reference_ranks=tuple(fields.pop("each", ())),
        also=tuple(fields.pop("also", ())),
        **fields,
    )
