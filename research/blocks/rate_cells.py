"""Cells on learning rates, and on the runs that chose them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from research.plan import Rates, Unit
from research.runs import Job, Run
from research.study import Study


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
