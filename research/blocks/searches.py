"""The blocks on searches for learning rates: the paper's own regime, and LoRA at one rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from research import stats
from research.blocks.shared import block, difference, in_paper_regime, points, table
from research.curves import WARMUPS, curves, of_method, references_with_best_warmup
from research.plan import Rates, Unit, num_missing, rates, units
from research.runs import Run
from research.stats import Value, accuracy_at, aurac_linear, aurac_log2, mean_loss
from research.study import LORA_EACH, Study, load_study, parse_method

RECIPE_NAMES = {"lora": "LoRA", "matryoshka": "P", "dylora": "DyLoRA"}
SCALING_NAMES = {"": "1 / sqrt(r)", "-none": "1", "-rank": "1 / r"}
DEPLOYMENT_NAMES = {
    "matryoshka/prefix": "truncated, P dropped (the paper)",
    "matryoshka/kept": "truncated, P kept",
    "lora/prefix": "truncated, at the scale of the rank",
    "lora/kept": "truncated, at the scale of R",
    "dylora/prefix": "truncated",
}
"""All others are the SVD."""

PAPER_MAX_RATE = 1e-3
"""The largest rate of the paper's grid."""

PAPER_RATE = 1e-4
"""The rate that was tried nearest to that of the paper's script, 8e-5."""

COMPARISONS = (
    ("P kept minus dropped, truncated", "matryoshka-authors/kept", "matryoshka-authors/prefix"),
    ("P kept minus LoRA, truncated", "matryoshka-authors/kept", "lora-authors/prefix"),
    ("P minus LoRA, after `reorder`", "matryoshka-authors/svd", "lora-authors/svd"),
    ("P kept minus DyLoRA, truncated", "matryoshka-authors/kept", "dylora-authors/prefix"),
    ("P dropped minus DyLoRA, truncated", "matryoshka-authors/prefix", "dylora-authors/prefix"),
    ("DyLoRA, truncated, minus LoRA after `reorder`", "dylora-authors/prefix", "lora-authors/svd"),
)
"""A label, a method and another method."""


def paper_values(*ranks: int) -> dict[str, Value]:
    """Return what is shown of each method, by the heading."""
    return {
        **{f"rank {rank}": accuracy_at(rank) for rank in ranks},
        "AURAC (log2)": aurac_log2,
        "AURAC (linear)": aurac_linear,
    }


PAPER_VALUES = paper_values(1, 4, 32)


@block
def paper_regime() -> str:
    """Three deployments of LoRA, P and DyLoRA as the paper's authors train them."""
    return _paper_table("paper-regime", PAPER_VALUES)


@block
def paper_256() -> str:
    """The same at the paper's rank."""
    return _paper_table("paper-256", paper_values(1, 16, 256))


@block
def paper_scalings() -> str:
    """The same with the paper's other two scalings."""
    p_minus_lora = [
        points(
            difference(
                "paper-scalings",
                f"matryoshka-authors-{scaling}/svd",
                aurac_log2,
                f"lora-authors-{scaling}/svd",
            ),
            "+",
        )
        for scaling in ("none", "rank")
    ]
    return (
        f"{_paper_table('paper-scalings', PAPER_VALUES)}\n\nP minus LoRA, each after `reorder`, on "
        f"the same three seeds, in AURAC (log2): {p_minus_lora[0]} points at the scale 1, and "
        f"{p_minus_lora[1]} at 1 / r."
    )


def _paper_table(study_name: str, values: Mapping[str, Value]) -> str:
    study = load_study(study_name)
    runs = study.load_runs()
    rows: list[list[str]] = []
    for task in study.tasks:
        for method in study.methods:
            (unit,) = units(study, method, task)
            tests = of_method(study.name, method, task)
            means = [stats.mean(tests, method, value) for value in values.values()]
            rate = rate_cell(rates(study, runs, unit))
            cells = ["" if mean is None else mean.text(100, 1) for mean in means]
            row = [f"`{task}`", *_method_names(method), rate, f"test, {seeds_cell(len(tests))}"]
            rows.append([*row, *cells])
    heading = ["right answers in %", "recipe", "scale", "deployment", "rate", "measured", *values]
    return f"{table(heading, rows)}\n{_completeness([study])}"


def _method_names(method: str) -> tuple[str, str, str]:
    """Return the names of the recipe, of the scaling and of the deployment of a method."""
    recipe, deployment = parse_method(method)
    recipe, _, scaling = recipe.partition("-authors")
    deployment_name = DEPLOYMENT_NAMES.get(f"{recipe}/{deployment}", "`reorder` (SVD)")
    return RECIPE_NAMES[recipe], SCALING_NAMES[scaling], deployment_name


def _completeness(studies: Sequence[Study]) -> str:
    """Return whether runs of studies are missing, as a sentence."""
    count = sum(num_missing(study, study.load_runs()) for study in studies)
    if count:
        return f"At least {count} training runs are missing."
    return "The study is complete." if len(studies) == 1 else "The studies are complete."


@block
def paper_differences() -> str:
    """Differences between recipes and deployments on the same seeds, each at its best rate."""
    study = load_study("paper-regime")
    rows: list[list[str]] = []
    for task in study.tasks:
        for label, method, other in COMPARISONS:
            differences = [
                stats.mean(curves(study.name), method, value, task, minus=other)
                for value in PAPER_VALUES.values()
            ]
            cells = [points(difference, "+") for difference in differences if difference]
            if cells:
                rows.append([f"`{task}`", label, *cells])
    heading = ["points", "difference", *PAPER_VALUES]
    return table(heading, rows)


@block
def paper_findings() -> str:
    """P and LoRA at a rate of the paper, and at the best rate of each; DyLoRA."""
    study = load_study("paper-regime")
    runs = study.load_runs()
    (seed,) = study.rate_seeds
    losses: list[str] = []
    chosen_rates: list[str] = []
    for method in ("matryoshka-authors/svd", "lora-authors/svd"):
        (unit,) = units(study, method, "chain_sum")
        losses.append(_loss(runs[unit.job(PAPER_RATE, seed, "validation")], unit))
        chosen_rates.append(rate_cell(rates(study, runs, unit)))
    chosen = [
        rates(study, runs, unit).chosen or 0.0
        for task in study.tasks
        for method in study.methods
        for unit in units(study, method, task)
    ]
    num_above = sum(rate > PAPER_MAX_RATE for rate in chosen)
    at_best_rate = in_paper_regime(
        "matryoshka-authors/svd", "lora-authors/svd", mean_loss, "chain_sum"
    )
    return (
        f"* **At a rate of the paper, P learns faster.** At {PAPER_RATE:g} on `chain_sum`, the "
        f"losses of P and LoRA after `reorder` are {' and '.join(losses)}\n  (validation, one "
        f"seed). At the best rate of each, {' and '.join(chosen_rates)}, the difference is "
        f"{at_best_rate.text(sign='+')} nats\n  ({at_best_rate.n} test seeds).\n"
        "* **DyLoRA has the best rank 1**, and a worse rank 32 than LoRA: on the two tasks "
        f"{_accuracies('dylora-authors/prefix', 1)} % at rank 1 and\n  "
        f"{_accuracies('dylora-authors/prefix', 32)} % at rank 32. LoRA, after `reorder`, has "
        f"{_accuracies('lora-authors/svd', 1)} %, and {_accuracies('lora-authors/svd', 32)} %.\n"
        "  `train_ranks` was not run in this regime.\n"
        f"* **Of the paper's settings**, {len(study.ranks)} nested ranks up to R = {study.rank}, "
        "one of three scalings (1 / sqrt(r), the others below) and "
        f"{study.training['max_steps']} steps were run. "
        f"{num_above} of {len(chosen)} chosen rates are\n  above {PAPER_MAX_RATE:g}, the largest "
        "of the paper. Its tables of numbers could not be obtained, so ours are not next to them."
    )


def _accuracies(method: str, rank: int) -> str:
    """Return the mean of the right answers at a rank on each task, in %."""
    study = load_study("paper-regime")
    means = [stats.mean(curves(study.name), method, accuracy_at(rank), t) for t in study.tasks]
    return " and ".join(f"{100 * mean.mean:.1f}" for mean in means if mean)


@block
def paper_rates() -> str:
    """The validation loss of each recipe and deployment at every rate that was tried."""
    study = load_study("paper-regime")
    runs = study.load_runs()
    (seed,) = study.rate_seeds
    tried = sorted({job.learning_rate for job in runs if job.split == "validation"})
    rows: list[list[str]] = []
    for task in study.tasks:
        for method in study.methods:
            (unit,) = units(study, method, task)
            losses = [_loss(runs.get(unit.job(rate, seed, "validation")), unit) for rate in tried]
            if any(losses):
                recipe, _, deployment = _method_names(method)
                rows.append([f"`{task}`", recipe, deployment, *losses])
    heading = ["validation loss", "recipe", "deployment", *(f"{rate:g}" for rate in tried)]
    return table(heading, rows)


def _loss(run: Run | None, unit: Unit) -> str:
    """Return the mean loss over the ranks as a cell, which is empty without a run."""
    if run is None or not run.has(unit.deployment):
        return ""
    loss = unit.loss(run)
    return f"{loss:.2f}" if math.isfinite(loss) else "diverged"


# LoRA trained at one rank, with several warmups.


@block
def reference() -> str:
    """LoRA alone at the ranks 1 and 2 of 256 facts, by warmup."""
    rows: list[list[str]] = []
    studies = [load_study(f"reference-warmup-{warmup}") for warmup in WARMUPS]
    for warmup, study in zip(WARMUPS, studies, strict=True):
        runs = study.load_runs()
        (task,) = study.tasks
        for unit in units(study, LORA_EACH, task):
            state = rates(study, runs, unit)
            rate = state.chosen
            if rate is None:
                raise ValueError(f"{study.name} has no rate for rank {unit.rank}.")
            validations, tests = (
                [
                    100 * runs[job].curves[unit.deployment].accuracy[-1]
                    for seed in seeds
                    if (job := unit.job(rate, seed, split)) in runs
                ]
                for seeds, split in ((study.rate_seeds, "validation"), (study.seeds, "test"))
            )
            rows.append(
                [
                    f"{warmup} %",
                    str(unit.rank),
                    f"{min(state.losses):g} to {max(state.losses):g}",
                    rate_cell(state),
                    f"{state.losses[rate]:.3f}",
                    _spread(validations),
                    _spread(tests),
                    ", ".join(f"{share:.0f}" for share in sorted(tests)),
                ]
            )
    heading = ["warmup", "rank", "rates tried", "rate", "validation loss"]
    heading += ["validation: mean of the seeds, %", "test: mean, %", "test: each seed, %"]
    # Only the best warmup is tested.
    best_warmup, _ = references_with_best_warmup()
    expected = [
        study if warmup == best_warmup else replace(study, seeds=())
        for warmup, study in zip(WARMUPS, studies, strict=True)
    ]
    return f"{table(heading, rows)}\n{_completeness(expected)}"


def _spread(shares: Sequence[float]) -> str:
    """Return the mean, the lowest and the highest of some seeds, and their number."""
    estimate = stats.estimate(shares)
    return "" if estimate is None else f"{estimate.spread(digits=1)}, {seeds_cell(estimate.n)}"


# Cells on learning rates and seeds.


def rate_cell(state: Rates) -> str:
    """Return the chosen rate as a cell, and whether no smaller or no larger one was tried."""
    if state.chosen is None:
        return "not known yet" if state.missing else "none: every rate diverged"
    is_edge = state.chosen in (min(state.losses), max(state.losses))
    return f"{state.chosen:g}, an edge of the grid" if is_edge else f"{state.chosen:g}"


def seeds_cell(count: int) -> str:
    """Return a number of seeds as a cell."""
    return "1 seed" if count == 1 else f"{count} seeds"
