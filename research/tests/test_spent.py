"""How many training examples the recorded runs have spent on a rank."""

from __future__ import annotations

import pytest

from research.plan import rates, units
from research.runs import Curve, Run
from research.spent import examples_spent, share_of_squeezed, share_of_trained
from research.study import Study, load_study


def test_shares_of_the_ranks_add_up() -> None:
    shares = [share_of_trained(rank, 1, 32) for rank in range(1, 33)]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] / shares[1] == pytest.approx(2**1.75)
    ranks = [1, 2, 4]
    # Rank 4 has 1/4 of 1 + 1/2 + 1/4, then rank 2 has 1/2 of 1 + 1/2 of what is left.
    assert [share_of_squeezed(rank, ranks) for rank in ranks] == pytest.approx(
        [4 / 7, 2 / 7, 1 / 7]
    )
    assert share_of_squeezed(8, ranks) == 0


def test_examples_of_recorded_runs() -> None:
    def mean(method: str, rank: int) -> float:
        points = examples_spent("capacity", method, "facts-256", rank)
        return sum(point.examples for point in points) / len(points)

    assert mean("lora/svd", 2) == 0
    assert mean("lora-each", 2) == 800 * 32
    assert sum(mean("lora/trained-0.3", rank) for rank in (1, 2, 32)) < 400 * 32
    assert mean("lora/squeezed", 12) == 0  # truncation leaves it near R
    assert sum(mean("lora/squeezed", rank) for rank in (1, 2, 3, 4, 6, 8)) == pytest.approx(
        400 * 32, rel=1e-3
    )


def test_examples_that_a_run_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """From version 0.4 on, ``trained`` records the examples of each rank."""
    study = load_study("capacity")
    (unit,) = units(study, "lora/trained", "facts-256")
    losses = {4e-3: 2.0, 8e-3: 1.0, 16e-3: 2.0}
    details = {"tokens": 3, "seconds": 1.0, "examples_by_rank": {"1": 16, "2": 8}}
    cost = {"tokens": 10, "seconds": 1.0, "parameters": 1, "cuts": {"trained": details}}
    runs = {}
    for rate, loss in losses.items():
        for seed in (*study.rate_seeds, 200):
            job = unit.job(rate, seed, "test" if seed == 200 else "validation")
            curve = Curve((loss,) * len(study.ranks), (0.5,) * len(study.ranks))
            runs[job] = Run(job, study.ranks, {"trained": curve}, cost, "", {})
    assert rates(study, runs, unit).chosen == 8e-3
    monkeypatch.setattr(Study, "load_runs", lambda _: runs)
    spent = {
        rank: [p.examples for p in examples_spent("capacity", "lora/trained", "facts-256", rank)]
        for rank in (1, 2, 32)
    }
    assert spent == {1: [16], 2: [8], 32: [0]}
