"""What a study still lacks, from the runs that it has: learning rates first, then the test runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from research.runs import Curve, Job, Run
from research.study import EACH_RECIPES, Study, parse_method

MOST_RATES = 9
"""Rates that are tried for one method: a grid with its best at the edge then grows no further."""

FINALISTS = 2
"""Of the rates that the first seed tries, so many of the best are tried by every seed."""


class Unit(NamedTuple):
    """What has a learning rate of its own: a recipe with one cut, on one task, at one R.

    ``alone`` says that R alone counts, as for an adapter of one rank; else all nested ranks count.
    """

    recipe: str
    cut: str
    task: str
    rank: int
    alone: bool = False

    def loss(self, run: Run) -> float:
        """Return the loss that rates are chosen by; infinite where the run diverged."""
        if self.cut not in run.curves:
            return math.inf
        losses = run.curves[self.cut].loss
        return losses[-1] if self.alone else fmean(losses)


class Rates(NamedTuple):
    """The state of a unit's learning rates.

    Attributes:
        missing: Jobs that must be run before more is known.
        losses: The mean validation loss by rate, over the seeds that have tried it.
        chosen: The rate, when it is known; None where every rate diverged.
        best: The rate with the lowest loss, from which the grid grows.
    """

    missing: list[Job]
    losses: dict[float, float]
    chosen: float | None
    best: float | None = None


@dataclass(frozen=True)
class Result:
    """One method on one task with one seed: a curve over the ranks, over all runs that it takes.

    Attributes:
        method: ``recipe/cut``, or ``lora-each``.
        task: The task's name.
        seed: The seed.
        ranks: Strictly increasing.
        curve: Loss and accuracy at each rank.
        tokens: Trained on, over all runs.
        seconds: Of training and of the cut, over all runs.
        parameters: Of the adapters, over all runs.
    """

    method: str
    task: str
    seed: int
    ranks: tuple[int, ...]
    curve: Curve
    tokens: int
    seconds: float
    parameters: int


def units(study: Study, method: str, task: str) -> list[Unit]:
    """Return the training runs behind one curve."""
    recipe, cut = parse_method(method)
    if method in EACH_RECIPES:
        ranks = study.each or study.nesting(study.rank)
        return [Unit(recipe, cut, task, rank, alone=True) for rank in ranks]
    return [Unit(recipe, cut, task, study.rank)]


def rates(study: Study, runs: Mapping[Job, Run], unit: Unit) -> Rates:
    """Return how far the choice of a unit's learning rate is.

    The first seed tries every rate. The others try the best of these, until `FINALISTS` rates have
    diverged with no seed. The lowest mean over all seeds is chosen, or the lowest rate that is
    within ``study.within`` nats of it with every seed.
    """
    tried = sorted(study.learning_rates)
    down, up = tried[1] / tried[0], tried[-1] / tried[-2]
    while True:
        state = _rates_of(study, runs, unit, tried)
        lowest, highest = tried[0] in (state.chosen, state.best), tried[-1] == state.best
        if state.missing or not (lowest or highest) or len(tried) >= MOST_RATES:
            finite = math.isfinite(state.losses.get(state.chosen or 0, math.inf))
            return state if finite else Rates(state.missing, state.losses, None)
        rate = tried[-1] * up if highest else tried[0] / down
        tried = sorted([*tried, float(f"{rate:.3g}")])


def _rates_of(study: Study, runs: Mapping[Job, Run], unit: Unit, tried: Sequence[float]) -> Rates:
    """Return the state of a grid; where every rate diverged, its lowest one counts as chosen."""
    jobs = {
        rate: [
            Job(unit.recipe, unit.task, unit.rank, rate, seed, "validation")
            for seed in study.rate_seeds
        ]
        for rate in tried
    }
    done = {
        rate: [runs[job] for job in of_rate if job in runs and runs[job].has(unit.cut)]
        for rate, of_rate in jobs.items()
    }
    losses = {rate: fmean(map(unit.loss, found)) for rate, found in done.items() if found}
    missing = [jobs[rate][0] for rate in tried if not _has(runs, jobs[rate][0], unit.cut)]
    if missing:
        return Rates(missing, losses, None)
    finalists = 0
    first = {rate: unit.loss(runs[jobs[rate][0]]) for rate in tried}
    for rate in sorted(tried, key=first.__getitem__):
        if finalists >= FINALISTS and first[rate] > min(first.values()) + study.within:
            break
        missing += [job for job in jobs[rate] if not _has(runs, job, unit.cut)]
        finalists += math.isfinite(losses[rate])
    if missing:
        return Rates(missing, losses, None)
    # What has been a finalist of a smaller grid may be chosen too.
    whole = [r for r in tried if len(done[r]) == len(jobs[r]) and math.isfinite(losses[r])]
    best = min(whole, key=losses.__getitem__, default=tried[0])
    near = [rate for rate in whole if losses[rate] <= losses[best] + study.within]
    return Rates([], losses, min(near, default=tried[0]), best)


def _has(runs: Mapping[Job, Run], job: Job, cut: str) -> bool:
    return job in runs and runs[job].has(cut)


def missing_jobs(study: Study, runs: Mapping[Job, Run]) -> dict[Job, set[str]]:
    """Return the jobs that can be run now, each with the cuts that something waits for.

    They are in the order in which they should be run, so that a study that is stopped early says
    something: task by task, and within one the rates before the seeds.
    """
    found: dict[Job, set[str]] = {}
    for task in study.tasks:
        states = {
            unit: rates(study, runs, unit)
            for method in study.methods
            for unit in units(study, method, task)
        }
        for unit, state in states.items():
            for job in state.missing:
                found.setdefault(job, set()).add(unit.cut)
        # One run serves all cuts that have its rate, so it waits until each has one.
        unsettled = {(unit.recipe, unit.rank) for unit, state in states.items() if state.missing}
        for seed in study.seeds:
            for unit, state in states.items():
                if state.chosen is not None and (unit.recipe, unit.rank) not in unsettled:
                    job = Job(unit.recipe, task, unit.rank, state.chosen, seed, "test")
                    if not _has(runs, job, unit.cut):
                        found.setdefault(job, set()).add(unit.cut)
    return found


def diverged(study: Study, runs: Mapping[Job, Run]) -> list[str]:
    """Return the test runs without a finite number, in words: the means are without them."""
    return [
        f"{method} on {task}, seed {seed}, R = {unit.rank}"
        for method in study.methods
        for task in study.tasks
        for seed in study.seeds
        for unit in units(study, method, task)
        if (rate := rates(study, runs, unit).chosen) is not None
        and (job := Job(unit.recipe, task, unit.rank, rate, seed, "test")) in runs
        and unit.cut in runs[job].diverged
    ]


def results(study: Study, runs: Mapping[Job, Run]) -> Iterator[Result]:
    """Yield every curve whose runs are all there."""
    for method in study.methods:
        for task in study.tasks:
            parts = [(u, rates(study, runs, u).chosen) for u in units(study, method, task)]
            for seed in study.seeds:
                found = []
                for unit, rate in parts:
                    run = runs.get(Job(unit.recipe, task, unit.rank, rate or -1, seed, "test"))
                    if run is not None and unit.cut in run.curves:
                        found.append((unit, run))
                if len(found) == len(parts):
                    yield _result(method, task, seed, found)


def _result(method: str, task: str, seed: int, parts: Collection[tuple[Unit, Run]]) -> Result:
    points = [
        (rank, number, run.curves[unit.cut])
        for unit, run in parts
        for number, rank in enumerate(run.ranks)
        if method not in EACH_RECIPES or rank == unit.rank
    ]
    curve = Curve(
        tuple(curve.loss[number] for _, number, curve in points),
        tuple(curve.accuracy[number] for _, number, curve in points),
        _parts([(number, curve.parts) for _, number, curve in points if curve.parts is not None]),
    )
    costs = [(run.cost, run.cost["cuts"][unit.cut]) for unit, run in parts]
    return Result(
        method=method,
        task=task,
        seed=seed,
        ranks=tuple(rank for rank, _, _ in points),
        curve=curve,
        tokens=sum(cost["tokens"] + cut["tokens"] for cost, cut in costs),
        seconds=sum(cost["seconds"] + cut["seconds"] for cost, cut in costs),
        parameters=sum(_parameters(unit, run) for unit, run in parts),
    )


def _parameters(unit: Unit, run: Run) -> int:
    """Return how many a run deploys: LoRA-Squeeze has a file for each rank, others have one."""
    whole = int(run.cost["parameters"])
    return whole * sum(run.ranks) // unit.rank if unit.cut.startswith("squeezed") else whole


def _parts(points: Sequence[tuple[int, Mapping[str, Any]]]) -> Mapping[str, Any] | None:
    """Return the base model's shares, and those of the points of a curve."""
    if not points:
        return None
    return {
        task: {
            metric: [shares[0], *(parts[task][metric][1 + number] for number, parts in points)]
            for metric, shares in metrics.items()
        }
        for task, metrics in points[0][1].items()
    }
