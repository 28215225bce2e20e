"""Plan a study: which runs are missing. Learning rates come first, then the test runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from research.runs import Curve, Job, Run
from research.study import LORA_EACH, WITHOUT_TRAINING, Study, load_study, parse_method

MAX_RATES = 9
"""The grid of a method does not grow beyond this number of rates."""

FINALISTS = 2
"""The number of best rates of the first seed that every other seed tries too."""


class Unit(NamedTuple):
    """A recipe with a deployment, on a task, at an R. It has its own learning rate.

    Attributes:
        recipe: The name of the recipe.
        deployment: The name of the deployment.
        task: The name of the task.
        rank: R.
        only_max_rank: Whether only R counts, as for an adapter of a single rank. Otherwise all
            nested ranks count.
    """

    recipe: str
    deployment: str
    task: str
    rank: int
    only_max_rank: bool = False

    def loss(self, run: Run) -> float:
        """Return the loss that chooses the rate; infinite if the run diverged."""
        if self.deployment not in run.curves:
            return math.inf
        losses = run.curves[self.deployment].loss
        return losses[-1] if self.only_max_rank else fmean(losses)

    def job(self, rate: float, seed: int, split: str) -> Job:
        """Return a training run of the unit."""
        return Job(self.recipe, self.task, self.rank, rate, seed, split)

    def is_measured(self, job: Job, runs: Mapping[Job, Run]) -> bool:
        """Return whether the runs have the unit's deployment of a job."""
        return job in runs and runs[job].has(self.deployment)


class Rates(NamedTuple):
    """The state of a unit's learning rates.

    Attributes:
        missing: The jobs to run before more is known.
        losses: The mean validation loss by rate, over the seeds that have tried it.
        chosen: The chosen rate. None if it is not known yet, or if every rate diverged.
        best: The rate with the lowest loss, from which the grid grows.
    """

    missing: list[Job]
    losses: dict[float, float]
    chosen: float | None
    best: float | None = None


@dataclass(frozen=True)
class Result:
    """A method on a task with a seed: a curve over the ranks, and the cost of all its runs.

    Attributes:
        method: ``recipe/deployment``, or ``lora-each``.
        task: The name of the task.
        seed: The seed.
        ranks: Strictly increasing.
        curve: Loss and accuracy at each rank.
        tokens: The tokens of training.
        seconds: The seconds of training and of the deployment.
        parameters: The parameters of the adapters.
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
    """Return the training runs of a curve."""
    recipe, deployment = parse_method(method)
    if method == LORA_EACH:
        ranks = study.reference_ranks or study.nested_ranks(study.rank)
        return [Unit(recipe, deployment, task, rank, only_max_rank=True) for rank in ranks]
    return [Unit(recipe, deployment, task, study.rank)]


def rates(study: Study, runs: Mapping[Job, Run], unit: Unit) -> Rates:
    """Return the state of a unit's learning rates.

    The first seed tries every rate. The others try the best rates of the first seed, until
    `FINALISTS` of them have diverged with no seed. The rate with the lowest mean over the seeds is
    chosen, or the lowest rate that every seed has tried and whose mean is within ``study.within``
    nats of it. Where the chosen rate is the lowest of the grid, or the best rate is at an end, the
    grid grows. A study with ``rates_of`` has the rates of another one.
    """
    if study.rates_of:
        source = load_study(study.rates_of)
        deployment, _, _ = unit.deployment.partition("-")  # trained-1.0 has the rate of trained
        return rates(source, source.load_runs(), unit._replace(deployment=deployment))
    grid = sorted(study.learning_rates)
    ratio_down = grid[1] / grid[0]
    ratio_up = grid[-1] / grid[-2]
    while True:
        state = _rates_of_grid(study, runs, unit, grid)
        at_lower_end = grid[0] in (state.chosen, state.best)
        at_upper_end = grid[-1] == state.best
        is_inside = not (at_lower_end or at_upper_end)
        if state.missing or is_inside or len(grid) >= MAX_RATES:
            if math.isfinite(state.losses.get(state.chosen or 0, math.inf)):
                return state
            return Rates(state.missing, state.losses, None)
        new_rate = grid[-1] * ratio_up if at_upper_end else grid[0] / ratio_down
        grid = sorted([*grid, float(f"{new_rate:.3g}")])


def _rates_of_grid(
    study: Study, runs: Mapping[Job, Run], unit: Unit, grid: Sequence[float]
) -> Rates:
    """Return the state of a grid. If every rate diverged, the lowest one counts as chosen."""
    jobs = {
        rate: [unit.job(rate, seed, "validation") for seed in study.rate_seeds] for rate in grid
    }
    losses_by_seed: dict[float, list[float]] = {}
    for rate in grid:
        losses_by_seed[rate] = [
            unit.loss(runs[job]) for job in jobs[rate] if unit.is_measured(job, runs)
        ]
    losses = {rate: fmean(values) for rate, values in losses_by_seed.items() if values}

    first_jobs = [jobs[rate][0] for rate in grid]
    missing = [job for job in first_jobs if not unit.is_measured(job, runs)]
    if missing:
        return Rates(missing, losses, None)

    first_losses = {rate: unit.loss(runs[jobs[rate][0]]) for rate in grid}
    limit = min(first_losses.values()) + study.within
    num_finalists = 0
    for rate in sorted(grid, key=first_losses.__getitem__):
        if num_finalists >= FINALISTS and first_losses[rate] > limit:
            break
        missing += [job for job in jobs[rate] if not unit.is_measured(job, runs)]
        if math.isfinite(losses[rate]):
            num_finalists += 1
    if missing:
        return Rates(missing, losses, None)

    # A finalist of a smaller grid may be chosen too.
    candidates = [
        rate
        for rate in grid
        if len(losses_by_seed[rate]) == len(jobs[rate]) and math.isfinite(losses[rate])
    ]
    if not candidates:
        return Rates([], losses, grid[0], grid[0])
    best = min(candidates, key=losses.__getitem__)
    chosen = min(rate for rate in candidates if losses[rate] <= losses[best] + study.within)
    return Rates([], losses, chosen, best)


def missing_jobs(study: Study, runs: Mapping[Job, Run]) -> dict[Job, set[str]]:
    """Return the jobs that can be run now, with the deployments that are missing.

    The order makes the results of an interrupted study useful: task by task, and for each task the
    rates before the seeds.
    """
    jobs: dict[Job, set[str]] = {}
    for task in study.tasks:
        states = {
            unit: rates(study, runs, unit)
            for method in study.methods
            for unit in units(study, method, task)
        }
        for unit, state in states.items():
            for job in state.missing:
                jobs.setdefault(job, set()).add(unit.deployment)
        # A run serves all deployments that have its rate, so it waits until their rates are known.
        waiting = {(unit.recipe, unit.rank) for unit, state in states.items() if state.missing}
        for seed in study.seeds:
            for unit, state in states.items():
                if state.chosen is not None and (unit.recipe, unit.rank) not in waiting:
                    job = unit.job(state.chosen, seed, "test")
                    if not unit.is_measured(job, runs):
                        deployments = jobs.setdefault(job, set())
                        deployments.add(unit.deployment)
                        # It also measures all cheap deployments of the same adapter, whatever
                        # their rate, to compare them. Questions with choices take too long.
                        deployments |= {
                            other.deployment
                            for other in states
                            if (other.recipe, other.rank) == (unit.recipe, unit.rank)
                            and other.deployment in WITHOUT_TRAINING
                            and "choices" not in study.tasks[task]
                            and not other.is_measured(job, runs)
                        }
    return jobs


def num_missing(study: Study, runs: Mapping[Job, Run]) -> int:
    """Return the least number of training runs that a study lacks.

    It counts a test run for each recipe, task and seed whose rate is not known yet. Deployments
    that choose several rates need more of them, and so does a grid that grows.
    """
    unplanned: set[tuple[str, str, int, int]] = set()
    for method in study.methods:
        for task in study.tasks:
            for unit in units(study, method, task):
                if rates(study, runs, unit).missing:
                    unplanned |= {(unit.recipe, task, unit.rank, seed) for seed in study.seeds}
    return len(missing_jobs(study, runs)) + len(unplanned)


def diverged(study: Study, runs: Mapping[Job, Run]) -> list[str]:
    """Return the test runs without a finite loss, in words. Means do not include them."""
    descriptions: list[str] = []
    for method in study.methods:
        for task in study.tasks:
            chosen_rates = {
                unit: rates(study, runs, unit).chosen for unit in units(study, method, task)
            }
            for seed in study.seeds:
                for unit, rate in chosen_rates.items():
                    if rate is None:
                        continue
                    run = runs.get(unit.job(rate, seed, "test"))
                    if run is not None and unit.deployment in run.diverged:
                        descriptions.append(f"{method} on {task}, seed {seed}, R = {unit.rank}")
    return descriptions


def results(study: Study, runs: Mapping[Job, Run]) -> Iterator[Result]:
    """Yield every curve whose runs are complete."""
    for method in study.methods:
        for task in study.tasks:
            chosen_rates = {
                unit: rates(study, runs, unit).chosen for unit in units(study, method, task)
            }
            for seed in study.seeds:
                runs_by_unit: dict[Unit, Run] = {}
                for unit, rate in chosen_rates.items():
                    run = runs.get(unit.job(rate or -1, seed, "test"))
                    if run is not None and unit.deployment in run.curves:
                        runs_by_unit[unit] = run
                if len(runs_by_unit) == len(chosen_rates):
                    yield _result(method, task, seed, runs_by_unit)


def _result(method: str, task: str, seed: int, runs_by_unit: Mapping[Unit, Run]) -> Result:
    points = [
        (rank, index, run.curves[unit.deployment])
        for unit, run in runs_by_unit.items()
        for index, rank in enumerate(run.ranks)
        if method != LORA_EACH or rank == unit.rank
    ]
    parts = [(index, curve.parts) for _, index, curve in points if curve.parts is not None]
    tokens = 0
    seconds = 0.0
    parameters = 0
    for unit, run in runs_by_unit.items():
        deployment_cost = run.cost["cuts"][unit.deployment]
        tokens += run.cost["tokens"] + deployment_cost["tokens"]
        seconds += run.cost["seconds"] + deployment_cost["seconds"]
        # LoRA-Squeeze has a file for each rank.
        ranks = run.ranks if unit.deployment == "squeezed" else (unit.rank,)
        parameters += int(run.cost["parameters"]) * sum(ranks) // unit.rank
    return Result(
        method=method,
        task=task,
        seed=seed,
        ranks=tuple(rank for rank, _, _ in points),
        curve=Curve(
            tuple(curve.loss[index] for _, index, curve in points),
            tuple(curve.accuracy[index] for _, index, curve in points),
            _join_parts(parts),
        ),
        tokens=tokens,
        seconds=seconds,
        parameters=parameters,
    )


def _join_parts(points: Sequence[tuple[int, Mapping[str, Any]]]) -> Mapping[str, Any] | None:
    """Return the shares of the base model, and of the points of a curve."""
    if not points:
        return None
    _, first_parts = points[0]
    joined: dict[str, dict[str, list[float]]] = {}
    for task, metrics in first_parts.items():
        joined[task] = {}
        for metric, shares in metrics.items():
            # The first share is that of the base model.
            at_ranks = [parts[task][metric][1 + index] for index, parts in points]
            joined[task][metric] = [shares[0], *at_ranks]
    return joined
