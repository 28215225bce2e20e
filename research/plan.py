"""What is still to be run, as a function of the runs that are there: learning rates first, then the test runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matryoshka_lora import MatryoshkaError
from research.recipes import CUTS, EACH_RECIPES, RECIPES, parse_method
from research.records import Curve, Job, Result, Run, Tried
from research.study import Study

MOST_RATES = 9
"""Rates that are tried for one method: a grid that still has its best at the edge then grows no further."""


FINALISTS = 2
"""Rates of the first seed's best that every seed tries."""


class Unit(NamedTuple):
    """What has a learning rate of its own: a recipe, with one cut, on one task, at one R.

    ``alone`` says that only R counts, as for an adapter that is trained for one rank; else all nested ranks do.
    """

    recipe: str
    cut: str
    task: str
    rank: int
    alone: bool = False


def units(study: Study, method: str, task: str) -> list[Unit]:
    """The training runs behind one curve."""
    recipe, cut = parse_method(method)
    if method in EACH_RECIPES:
        return [Unit(recipe, cut, task, rank, alone=True) for rank in study.nesting(study.rank)]
    return [Unit(recipe, cut, task, study.rank)]


def cuts(study: Study, job: Job) -> list[str]:
    """The cuts of a job that the study asks for, in the order of the recipe."""
    wanted = {unit.cut for unit in _asked(study, job)}
    return [cut for cut in RECIPES[job.recipe].cuts if cut in wanted] if wanted else []


def needed(study: Study, runs: Mapping[Job, Run], job: Job) -> list[str]:
    """The `cuts` of a job that something waits for.

    On test data, those whose learning rate is the job's. On validation data, those that have not tried it yet; where
    none has to and none has, all.
    """
    states = {unit: rates(study, runs, unit) for unit in _asked(study, job)}
    if job.split == "validation":
        found = {unit.cut for unit, state in states.items() if job in state.missing}
        if not found and not any(_has(runs, job, unit.cut) for unit in states):
            found = {unit.cut for unit in states}
    else:
        found = {unit.cut for unit, state in states.items() if state.chosen == job.learning_rate}
    return [cut for cut in cuts(study, job) if cut in found]


def settled(study: Study, runs: Mapping[Job, Run], job: Job) -> bool:
    """Whether every cut of a job, of which there is one, has its learning rate."""
    asked = _asked(study, job)
    return bool(asked) and not any(rates(study, runs, unit).missing for unit in asked)


def measured_ranks(study: Study, job: Job) -> tuple[int, ...]:
    """At which a job's adapter is measured."""
    return (job.rank,) if RECIPES[job.recipe].one_rank else study.nesting(job.rank)


def _asked(study: Study, job: Job) -> set[Unit]:
    """What of a study a job's training serves."""
    found = {unit for method in study.methods for unit in units(study, method, job.task)}
    return {unit for unit in found if (unit.recipe, unit.rank) == (job.recipe, job.rank)}


def load_runs(study: Study, folder: Path) -> dict[Job, Run]:
    """The runs of a folder that are the study's; one may still lack a cut that the study has got since.

    Raises:
        MatryoshkaError: A file is damaged, or is one of the study's jobs with other settings or other ranks.
    """
    found: dict[Job, Run] = {}
    for path in sorted(path for split in ("validation", "test") for path in (folder / split).glob("*/*.json")):
        run = Run.read(path)
        if run.job.task not in study.tasks or not cuts(study, run.job):
            continue
        settings = study.settings(run.job.task, run.job.recipe) | {"cuts": run.settings.get("cuts")}
        if settings["files"] is None:  # they are not here to compare with
            settings["files"] = run.settings.get("files")
        # A run that an older version wrote may lack some.
        different = [key for key, value in run.settings.items() if settings.get(key) != value]
        different += [f"cut {cut}" for cut, how in run.settings.get("cuts", {}).items() if how != CUTS.get(cut)]
        if run.ranks != measured_ranks(study, run.job):
            different.append("rank")
        if different:
            raise MatryoshkaError(
                f"{path} was run with another {', '.join(different)} than this study has: take another folder "
                "with --out or --runs, or give the study the settings of its runs"
            )
        found[run.job] = run
    return found


def _has(runs: Mapping[Job, Run], job: Job, cut: str) -> bool:
    return job in runs and cut in runs[job].done()


class Rates(NamedTuple):
    """The state of a unit's learning rates.

    Attributes:
        missing: Jobs that must be run before more is known.
        losses: By rate, the mean validation loss over the ranks and over the seeds that have tried it; infinite where
            training diverged.
        chosen: The rate with the lowest, when it is known; none where training diverged at every rate.
    """

    missing: list[Job]
    losses: dict[float, float]
    chosen: float | None


def rates(study: Study, runs: Mapping[Job, Run], unit: Unit) -> Rates:
    """How far the choice of a unit's learning rate is.

    The first seed tries every rate. The others try the best of these, until `FINALISTS` have diverged with no seed. The
    lowest mean over all seeds is chosen.
    """
    tried = sorted(study.learning_rates)
    down, up = tried[1] / tried[0], tried[-1] / tried[-2]
    while True:
        jobs = {
            rate: [Job(unit.recipe, unit.task, unit.rank, rate, seed, "validation") for seed in study.rate_seeds]
            for rate in tried
        }
        losses = {
            rate: fmean(_loss(runs[job], unit) for job in of_rate if _has(runs, job, unit.cut))
            for rate, of_rate in jobs.items()
            if _has(runs, of_rate[0], unit.cut)
        }
        missing = [of_rate[0] for rate, of_rate in jobs.items() if rate not in losses]
        if missing:
            return Rates(missing, losses, None)
        finalists: list[float] = []
        for rate in sorted(tried, key=lambda rate: _loss(runs[jobs[rate][0]], unit)):
            missing += [job for job in jobs[rate] if not _has(runs, job, unit.cut)]
            finalists += [rate] if math.isfinite(losses[rate]) else []
            if len(finalists) == FINALISTS:
                break
        if missing:
            return Rates(missing, losses, None)
        best = min(finalists, key=lambda rate: losses[rate], default=tried[0])
        edge = best in (tried[0], tried[-1])
        if not edge or len(tried) >= MOST_RATES:
            return Rates([], losses, best if finalists else None)
        tried = [_rounded(tried[0] / down), *tried] if best == tried[0] else [*tried, _rounded(tried[-1] * up)]


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def _loss(run: Run, unit: Unit) -> float:
    if unit.cut not in run.curves:
        return math.inf
    losses = run.curves[unit.cut].loss
    return losses[-1] if unit.alone else fmean(losses)


def missing_jobs(study: Study, runs: Mapping[Job, Run]) -> list[Job]:
    """What can be run now: nothing of it waits for anything else.

    In the order in which it should be run, so that a study that is stopped early says something: task by task, and
    within one the seeds of all methods whose rate is known after the rates that are not.
    """
    found: dict[Job, None] = {}
    for task in study.tasks:
        tests: dict[Job, None] = {}
        states = {unit: rates(study, runs, unit) for method in study.methods for unit in units(study, method, task)}
        for state in states.values():
            found |= dict.fromkeys(state.missing)
        # One run serves all cuts that have its rate, so it waits until each has one.
        unsettled = {(unit.recipe, unit.rank) for unit, state in states.items() if state.missing}
        for unit, state in states.items():
            if state.chosen is not None and (unit.recipe, unit.rank) not in unsettled:
                for seed in study.seeds:
                    job = Job(unit.recipe, task, unit.rank, state.chosen, seed, "test")
                    if not _has(runs, job, unit.cut):
                        tests[job] = None
        found |= dict.fromkeys(sorted(tests, key=lambda job: job.seed))
    return list(found)


def tried(study: Study, runs: Mapping[Job, Run]) -> list[Tried]:
    """The learning rates of every curve that have been tried."""
    found = []
    for method in study.methods:
        for task in study.tasks:
            for unit in units(study, method, task):
                state = rates(study, runs, unit)
                if state.losses:
                    found.append(Tried(method, task, unit.rank, state.losses, state.chosen))
    return found


def diverged(study: Study, runs: Mapping[Job, Run]) -> list[str]:
    """Test runs that gave no finite number, in words: whoever reads a mean must know that it is without them."""
    found = []
    for method in study.methods:
        for task in study.tasks:
            for seed in study.seeds:
                for unit in units(study, method, task):
                    rate = rates(study, runs, unit).chosen or math.nan
                    run = runs.get(Job(unit.recipe, task, unit.rank, rate, seed, "test"))
                    if run is not None and unit.cut in run.diverged:
                        found.append(f"{method} on {task}, seed {seed}, R = {unit.rank}")
    return found


def results(study: Study, runs: Mapping[Job, Run]) -> Iterator[Result]:
    """Every curve whose runs are all there."""
    for method in study.methods:
        for task in study.tasks:
            parts = [(unit, rates(study, runs, unit).chosen) for unit in units(study, method, task)]
            for seed in study.seeds:
                found = []
                for unit, rate in parts:
                    job = Job(unit.recipe, task, unit.rank, rate or math.nan, seed, "test")
                    run = runs.get(job)
                    if run is not None and unit.cut in run.curves:
                        found.append((unit, run))
                if len(found) == len(parts):
                    yield _result(method, task, seed, found)


def _chosen(points: Sequence[tuple[int, Mapping[str, Any]]]) -> Mapping[str, Any] | None:
    """Of choices: the base model's shares, and those of the points of a curve."""
    if not points:
        return None
    first = points[0][1]
    return {
        task: {
            metric: [shares[0], *(parts[task][metric][1 + number] for number, parts in points)]
            for metric, shares in metrics.items()
        }
        for task, metrics in first.items()
    }


def _result(method: str, task: str, seed: int, parts: Collection[tuple[Unit, Run]]) -> Result:
    points = [
        (rank, number, run.curves[unit.cut], run)
        for unit, run in parts
        for number, rank in enumerate(run.ranks)
        if method not in EACH_RECIPES or rank == unit.rank
    ]
    curve = Curve(
        tuple(curve.loss[number] for _, number, curve, _ in points),
        tuple(curve.accuracy[number] for _, number, curve, _ in points),
        _chosen([(number, curve.parts) for _, number, curve, _ in points if curve.parts is not None]),
    )
    costs = [(run.cost, run.cost["cuts"][unit.cut]) for unit, run in parts]
    return Result(
        method=method,
        task=task,
        seed=seed,
        ranks=tuple(rank for rank, *_ in points),
        curve=curve,
        learning_rates=tuple(run.job.learning_rate for _, _, _, run in points),
        tokens=sum(cost["tokens"] + cut["tokens"] for cost, cut in costs),
        seconds=sum(cost["seconds"] + cut["seconds"] for cost, cut in costs),
        parameters=sum(cost["parameters"] for cost, _ in costs),
    )
