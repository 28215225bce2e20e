"""The block on LoRA trained at one rank, with several warmups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from research import stats
from research.blocks.rate_cells import best_rate, rate_cell, seeds_cell, validation_runs
from research.blocks.registry import block, table
from research.curves import WARMUPS
from research.plan import Unit, num_missing, rates, units
from research.runs import Job, Run
from research.study import LORA_EACH, Study, load_study


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
