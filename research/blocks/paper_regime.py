"""The blocks on the paper's own regime: its initialisation, dtype and learning rates."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from statistics import fmean

from research import stats
from research.blocks.comparisons import in_paper_regime, points
from research.blocks.rate_cells import best_rate, rate_cell, seeds_cell, validation_runs
from research.blocks.registry import block, table
from research.curves import curves
from research.plan import Unit, num_missing, rates, units
from research.runs import Job, Run
from research.stats import accuracy_at, mean_loss
from research.study import Study, load_study, parse_method

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
