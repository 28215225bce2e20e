"""The rule for the default, by hand on two made-up families."""

from __future__ import annotations

from pathlib import Path

import pytest

from research.default import scores
from research.records import Job
from research.tests.test_plan import finish, study_of


def test_scores_by_hand(tmp_path: Path) -> None:
    losses = {  # of the chosen rate: the mean over the ranks, and one more at rank R
        "sums": {"lora/svd": 4.0, "lora/learned": 2.0, "lora/para": 1.0, "lora/prefix": 1.0, "matryoshka/svd": 1.0},
        "names": {"lora/svd": 3.0, "lora/learned": 3.0, "lora/para": 1.0, "lora/prefix": 1.0, "matryoshka/svd": 9.0},
    }
    tasks = {name: {"task": "chain_sum"} for name in losses}
    methods = ["lora/svd", "lora/learned", "matryoshka/svd", "lora/para", "lora-each"]
    study = study_of(methods=methods, tasks=tasks, learning_rates={"grid": [1e-3, 2e-3, 4e-3], "seeds": [100, 101]})

    def world(job: Job, cut: str) -> float:
        of_test = 100 if job.split == "test" else 0  # test questions are not asked
        return losses[job.task][f"{job.recipe}/{cut}"] + of_test + 50 * (job.learning_rate != 2e-3)

    for run in finish(study, world).values():
        run.write(tmp_path)
    found = {one.method: one for one in scores([(study, tmp_path)])}
    # A file for each rank is no nested adapter, and neither is para's.
    assert list(found) == ["lora/learned", "matryoshka/svd", "lora/svd"]
    assert found["lora/svd"].score == found["lora/svd"].at_r["sums"] == 1
    assert found["lora/learned"].of_families == {"sums": 0.5, "names": 1.0}
    assert found["lora/learned"].score == pytest.approx(0.5**0.5)
    assert found["lora/learned"].at_r == {"sums": 3 / 5, "names": 1.0}
    assert found["lora/learned"].may_be_default
    assert found["matryoshka/svd"].score == pytest.approx((1 / 4 * 9 / 3) ** 0.5)
    assert not found["matryoshka/svd"].may_be_default  # 10 / 4 at rank R of names
