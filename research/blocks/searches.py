"""The blocks on searches for learning rates: the paper's own regime, and LoRA at one rank."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from research import stats
from research.blocks.shared import block, in_paper_regime, points, table
from research.curves import WARMUPS, curves
from research.plan import Rates, Unit, num_missing, rates, units
from research.runs import Job, Run
from research.stats import accuracy_at, mean_loss
from research.study import LORA_EACH, Study, load_study, parse_method

PAPER_RANKS = (1, 4, 32)
RECIPE_NAMES = {"lora-authors": "LoRA", "matryoshka-authors": "P", "dylora-authors": "DyLoRA"}
DEPLOYMENT_NAMES = {
    "matryoshka-authors/prefix": "truncated, P dropped (the paper)",
    "matryoshka-authors/kept": "truncated, P kept",
    "lora-authors/prefix": "truncated, at the scale of the rank",
    "lora-authors/kept": "truncated, at the scale of R",
    "dylora-authors/prefix": "truncated",
}
"""All others are the SVD."""

PAPER_RATE = 1e-4
"""The rate that was tried nearest to that of the paper's script, 8e-5."""

COMPARISONS = (
    ("P kept minus dropped, truncated", "matryoshka-authors/kept", "matryoshka-authors/prefix"),
    ("P kept minus LoRA, truncated", "matryoshka-authors/kept", "lora-authors/prefix"),
    ("P minus LoRA, after `reorder`", "matryoshka-authors/svd", "lora-authors/svd"),
    ("P dropped minus DyLoRA, truncated", "matryoshka-authors/prefix", "dylora-authors/prefix"),
    ("DyLoRA, truncated, minus LoRA after `reorder`", "dylora-authors/prefix", "lora-authors/svd"),
)
"""A label, a method and another method."""


@block
def paper_regime() -> str:
    """Three deployments of LoRA, P and DyLoRA as the paper's authors train them."""
    study = load_study("paper-regime")
    runs = study.load_runs()
    rows: list[list[str]] = []
    for task in study.tasks:
        for method in study.methods:
            (unit,) = units(study, method, task)
            row = _row_of_paper(study, runs, method, unit)
            if row:
                rows.append([f"`{task}`", *row])
    heading = ["right answers in %", "recipe", "deployment", "rate", "measured"]
    heading += [f"rank {rank}" for rank in PAPER_RANKS]
    return f"{table(heading, rows)}\n{_missing_sentence(study, runs)}"


def _row_of_paper(study: Study, runs: Mapping[Job, Run], method: str, unit: Unit) -> list[str]:
    """Return the cells of a method: tests if there are any, or the best validation so far."""
    state = rates(study, runs, unit)
    tests = [c for c in curves(study.name) if (c.method, c.task) == (method, unit.task)]
    names = [RECIPE_NAMES[unit.recipe], _deployment_name(method), rate_cell(state)]
    if tests:
        means = [stats.mean(tests, method, accuracy_at(rank)) for rank in PAPER_RANKS]
        cells = ["" if mean is None else mean.text(100, 1) for mean in means]
        return [*names, f"test, {seeds_cell(len(tests))}", *cells]
    measured = validation_runs(study, runs, unit, best_rate(state))
    if not measured:
        return []
    accuracies = [run.curves[unit.deployment].accuracy for run in measured]
    indices = [measured[0].ranks.index(rank) for rank in PAPER_RANKS]
    cells = [f"{100 * fmean(shares[index] for shares in accuracies):.1f}" for index in indices]
    return [*names, f"validation, {seeds_cell(len(measured))}", *cells]


def _missing_sentence(study: Study, runs: Mapping[Job, Run]) -> str:
    count = num_missing(study, runs)
    if not count:
        return "The study is complete."
    not_run = [
        f"{RECIPE_NAMES[recipe]} on `{task}`"
        for task in study.tasks
        for recipe in dict.fromkeys(parse_method(method)[0] for method in study.methods)
        if not any((job.task, job.recipe) == (task, recipe) for job in runs)
    ]
    sentence = f"At least {count} training runs are missing."
    if not_run:
        sentence = f"{sentence} Without any run: {', '.join(not_run)}."
    return textwrap.fill(sentence, 120, break_on_hyphens=False)


@block
def paper_differences() -> str:
    """Differences between recipes and deployments on the same seeds, each at its best rate."""
    study = load_study("paper-regime")
    rows: list[list[str]] = []
    for task in study.tasks:
        for label, method, other in COMPARISONS:
            differences = [
                stats.mean(curves(study.name), method, accuracy_at(rank), task, minus=other)
                for rank in PAPER_RANKS
            ]
            cells = [points(difference, "+") for difference in differences if difference]
            if cells:
                rows.append([f"`{task}`", label, *cells])
    heading = ["points", "difference", *(f"rank {rank}" for rank in PAPER_RANKS)]
    return table(heading, rows)


@block
def paper_findings() -> str:
    """What P does at a rate of the paper, and at its best rate."""
    study = load_study("paper-regime")
    runs = study.load_runs()
    (seed,) = study.rate_seeds
    losses: list[str] = []
    chosen_rates: list[str] = []
    for method in ("matryoshka-authors/svd", "lora-authors/svd"):
        (unit,) = units(study, method, "chain_sum")
        losses.append(_loss(runs[unit.job(PAPER_RATE, seed, "validation")], unit))
        chosen_rates.append(rate_cell(rates(study, runs, unit)))
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
        "  `train_ranks` was not run in this regime."
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
                names = [RECIPE_NAMES[unit.recipe], _deployment_name(method)]
                rows.append([f"`{task}`", *names, *losses])
    heading = ["validation loss", "recipe", "deployment", *(f"{rate:g}" for rate in tried)]
    return table(heading, rows)


def _loss(run: Run | None, unit: Unit) -> str:
    """Return the mean loss over the ranks as a cell, which is empty without a run."""
    if run is None or not run.has(unit.deployment):
        return ""
    loss = unit.loss(run)
    return f"{loss:.2f}" if math.isfinite(loss) else "diverged"


def _deployment_name(method: str) -> str:
    return DEPLOYMENT_NAMES.get(method, "`reorder` (SVD)")


# LoRA trained at one rank, with several warmups.


@block
def reference() -> str:
    """LoRA alone at the ranks 1 and 2 of 256 facts, by warmup."""
    rows: list[list[str]] = []
    num_validations = 0
    tests_missing: list[int] = []
    for warmup in WARMUPS:
        study = load_study(f"reference-warmup-{warmup}")
        runs = study.load_runs()
        num_validations += num_missing(replace(study, seeds=()), runs)
        (task,) = study.tasks
        all_units = units(study, LORA_EACH, task)
        for unit in all_units:
            rows.append([f"{warmup} %", *_row_of_reference(study, runs, unit)])
        num_tested = sum(job.split == "test" for job in runs)
        tests_missing.append(len(all_units) * len(study.seeds) - num_tested)
    heading = ["warmup", "rank", "rates tried", "rate", "validation loss"]
    heading += ["validation: mean of the seeds, %", "test: mean, %", "test: each seed, %"]
    num_tests = min(tests_missing)  # only a single warmup is tested
    sentence = (
        f"At least {num_validations} validation runs and {num_tests} test runs are missing."
        if num_validations or num_tests
        else "The studies are complete."
    )
    return f"{table(heading, rows)}\n{sentence}"


def _row_of_reference(study: Study, runs: Mapping[Job, Run], unit: Unit) -> list[str]:
    state = rates(study, runs, unit)
    rate = best_rate(state)
    validations = validation_runs(study, runs, unit, rate)
    tests = [
        runs[job]
        for seed in study.seeds
        if (job := unit.job(state.chosen or -1.0, seed, "test")) in runs
    ]
    tried = [f"{rate:g}" for rate in sorted(state.losses)]
    return [
        str(unit.rank),
        " to ".join(dict.fromkeys((tried[0], tried[-1]))) if tried else "not run",
        rate_cell(state),
        f"{state.losses[rate]:.3f}" if rate in state.losses else "",
        _spread(unit, validations),
        _spread(unit, tests),
        ", ".join(f"{share:.0f}" for share in sorted(_percent(unit, tests))),
    ]


def _percent(unit: Unit, runs: Sequence[Run]) -> list[float]:
    """Return the right answers of runs of a single rank, in %."""
    return [
        100 * run.curves[unit.deployment].accuracy[-1]
        for run in runs
        if unit.deployment in run.curves
    ]


def _spread(unit: Unit, runs: Sequence[Run]) -> str:
    """Return the mean, the lowest and the highest of some seeds, and their number."""
    estimate = stats.estimate(_percent(unit, runs))
    return "" if estimate is None else f"{estimate.spread(digits=1)}, {seeds_cell(estimate.n)}"


# Cells on learning rates, and on the runs that chose them.


def best_rate(state: Rates) -> float | None:
    """Return the chosen rate, or the best one of those that were tried."""
    finite = {rate: loss for rate, loss in state.losses.items() if math.isfinite(loss)}
    return state.chosen or min(finite, key=finite.__getitem__, default=None)


def rate_cell(state: Rates) -> str:
    """Return the rate as a cell, and whether no smaller or no larger one was tried."""
    rate = best_rate(state)
    if rate is None:
        return "" if state.missing else "none: every rate diverged"
    if state.chosen is None:
        return f"{rate:g} so far"
    is_edge = rate in (min(state.losses), max(state.losses))
    return f"{rate:g}, an edge of the grid" if is_edge else f"{rate:g}"


def validation_runs(
    study: Study, runs: Mapping[Job, Run], unit: Unit, rate: float | None
) -> list[Run]:
    """Return the validation runs of a unit at a rate."""
    jobs = [unit.job(rate or -1.0, seed, "validation") for seed in study.rate_seeds]
    return [runs[job] for job in jobs if job in runs and unit.deployment in runs[job].curves]


def seeds_cell(count: int) -> str:
    """Return a number of seeds as a cell."""
    return "1 seed" if count == 1 else f"{count} seeds"
