"""The blocks on studies that search for rates, with no run and with all of them."""

from __future__ import annotations

import pytest

from research.blocks import BLOCKS, searches
from research.plan import Result, missing_jobs, results
from research.runs import Curve, Job, Run
from research.study import Study, load_study

COST = {"tokens": 1, "seconds": 1.0, "parameters": 1}

blocks = pytest.mark.parametrize("name", ["paper_regime", "reference"])


def all_runs(study: Study) -> dict[Job, Run]:
    """Return the runs of a complete study; the loss is least at the middle rate of the grid."""
    rates = study.learning_rates
    runs: dict[Job, Run] = {}
    while missing := missing_jobs(study, runs):
        for job, names in missing.items():
            loss = 1000 * abs(job.learning_rate - rates[len(rates) // 2])
            ranks = study.measured_ranks(job)
            curve = Curve((loss,) * len(ranks), (0.25,) * len(ranks))
            cost = {**COST, "cuts": dict.fromkeys(names, COST)}
            run = Run(job, ranks, dict.fromkeys(names, curve), cost, "", {})
            runs[job] = runs[job].merge(run) if job in runs else run
    return runs


def all_curves(study_name: str) -> list[Result]:
    study = load_study(study_name)
    return list(results(study, all_runs(study)))


@blocks
def test_without_any_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "load_runs", lambda study: {})
    monkeypatch.setattr(searches, "curves", lambda study_name: [])
    text = BLOCKS[name]()
    assert "are missing" in text
    assert "25.0" not in text


@blocks
def test_with_all_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "load_runs", all_runs)
    monkeypatch.setattr(searches, "curves", all_curves)
    text = BLOCKS[name]()
    assert "25.0" in text
    assert "so far" not in text
    assert "edge" not in text


def test_every_comparison_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches, "curves", all_curves)
    rows = BLOCKS["paper_differences"]().strip().splitlines()[2:]
    assert len(rows) == 2 * len(searches.COMPARISONS)
    assert all(row.count("+0.0 ± 0.0") == 3 for row in rows)  # all runs are equal


def test_the_loss_of_each_rate_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "load_runs", all_runs)
    lowest, *_ = load_study("paper-regime").learning_rates
    table = BLOCKS["paper_rates"]()
    assert f"{lowest:g}" in table
    assert "| 0.00 |" in table  # the loss of the middle rate
