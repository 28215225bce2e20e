"""The blocks of research/README.md on how to repeat runs, and on studies that are not complete."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median

from matryoshka_lora import MatryoshkaError
from research import stats
from research.blocks.registry import block, table
from research.curves import WARMUPS, curves
from research.looks import trained_method
from research.plan import Rates, Unit, num_missing, rates, units
from research.runs import Job, Run, read_runs
from research.stats import accuracy_at
from research.study import LORA_EACH, RUNS, STUDIES, Study, check_can_run, load_study, parse_method

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


@block
def reproduce() -> str:
    """The studies that the current code runs: what they take, and what it cannot repeat."""
    rows: list[list[str]] = []
    for study in _studies():
        own_runs = list(read_runs([RUNS / f"{study.name}.jsonl"]).values())
        refused = [method for method in study.methods if _refusal(study, method)]
        if not own_runs or len(refused) == len(study.methods):
            continue
        _, shown_deployment = parse_method(trained_method(study.name))
        versions = {
            version
            for run in own_runs
            for version in run.versions["matryoshka-lora"].split(" and ")
        }
        training = [run.cost["seconds"] for run in own_runs]
        deploying = [
            cost["seconds"]
            for run in own_runs
            for name, cost in run.cost["cuts"].items()
            if name == shown_deployment
        ]
        rows.append(
            [
                f"`{study.name}`",
                ", ".join(sorted(versions)),
                str(len(own_runs)),
                _minutes(training),
                _minutes(deploying),
                ", ".join(f"`{method}`" for method in (*refused, *study.reported)),
            ]
        )
    heading = ["study", "version", "runs", "minutes of a run", "of `train_ranks`", "only reported"]
    return table(heading, rows)


@block
def settled_studies() -> str:
    """The studies that no current code runs."""
    names = [f"`{study.name}`" for study in _studies() if study.settled]
    sentence = f"All rows of these studies are only reported: {', '.join(names)}."
    return textwrap.fill(sentence, 120, break_on_hyphens=False)


def _studies() -> list[Study]:
    return [load_study(path.stem) for path in sorted(STUDIES.glob("*.yaml"))]


def _refusal(study: Study, method: str) -> str:
    """Return why the current code does not run a method of a study, or nothing."""
    try:
        check_can_run(replace(study, methods=(method,)))
    except MatryoshkaError as error:
        return str(error)
    return ""


def _minutes(seconds: Sequence[float]) -> str:
    """Return the median and the longest of some times."""
    if not seconds:
        return ""
    longest = f" (up to {max(seconds) / 60:.1f})" if len(seconds) > 1 else ""
    return f"{median(seconds) / 60:.1f}{longest}"


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


def _row_of_paper(study: Study, runs: Mapping[Job, Run], method: str, unit: Unit) -> list[str]:
    """Return the cells of a method: tests if there are any, or the best validation so far."""
    state = rates(study, runs, unit)
    tests = [c for c in curves(study.name) if (c.method, c.task) == (method, unit.task)]
    names = [RECIPE_NAMES[unit.recipe], _deployment_name(method), _rate(state)]
    if tests:
        means = [stats.mean(tests, method, accuracy_at(rank)) for rank in PAPER_RANKS]
        cells = ["" if mean is None else mean.text(100, 1) for mean in means]
        return [*names, f"test, {_seeds(len(tests))}", *cells]
    measured = _validation_runs(study, runs, unit, _best_rate(state))
    if not measured:
        return []
    accuracies = [run.curves[unit.deployment].accuracy for run in measured]
    indices = [measured[0].ranks.index(rank) for rank in PAPER_RANKS]
    cells = [f"{100 * fmean(shares[index] for shares in accuracies):.1f}" for index in indices]
    return [*names, f"validation, {_seeds(len(measured))}", *cells]


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
    best_rate = _best_rate(state)
    validations = _validation_runs(study, runs, unit, best_rate)
    tests = [
        runs[job]
        for seed in study.seeds
        if (job := unit.job(state.chosen or -1.0, seed, "test")) in runs
    ]
    tried = [f"{rate:g}" for rate in sorted(state.losses)]
    return [
        str(unit.rank),
        " to ".join(dict.fromkeys((tried[0], tried[-1]))) if tried else "not run",
        _rate(state),
        f"{state.losses[best_rate]:.3f}" if best_rate in state.losses else "",
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
    return "" if estimate is None else f"{estimate.spread(digits=1)}, {_seeds(estimate.n)}"


def _validation_runs(
    study: Study, runs: Mapping[Job, Run], unit: Unit, rate: float | None
) -> list[Run]:
    jobs = [unit.job(rate or -1.0, seed, "validation") for seed in study.rate_seeds]
    return [runs[job] for job in jobs if job in runs and unit.deployment in runs[job].curves]


def _best_rate(state: Rates) -> float | None:
    """Return the chosen rate, or the best one of those that were tried."""
    finite = {rate: loss for rate, loss in state.losses.items() if math.isfinite(loss)}
    return state.chosen or min(finite, key=finite.__getitem__, default=None)


def _rate(state: Rates) -> str:
    """Return the rate as a cell, and whether no smaller or no larger one was tried."""
    rate = _best_rate(state)
    if rate is None:
        return "" if state.missing else "none: every rate diverged"
    if state.chosen is None:
        return f"{rate:g} so far"
    is_edge = rate in (min(state.losses), max(state.losses))
    return f"{rate:g}, an edge of the grid" if is_edge else f"{rate:g}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


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
