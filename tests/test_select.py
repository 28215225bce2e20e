"""Which rank is chosen, and what is said for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_results import RANKS, RIGHT, new_evaluation

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.budget import show_bytes
from matryoshka_lora.evaluation.select import select


@pytest.mark.parametrize(
    ("wish", "rank"),
    [
        ({"within": 0}, 8),
        ({"within": "1%"}, 8),
        ({"within": "5%"}, 4),
        ({"within": " 0.05 "}, 4),
        ({"within": "50 %"}, 2),
        ({"within": "90%"}, 1),
        ({"max_bytes": 10_000}, 8),
        ({"max_bytes": "399"}, 2),
        ({"max_bytes": 100}, 1),
        ({"within": "5%", "max_bytes": "0.5kB"}, 4),
    ],
)
def test_the_smallest_rank_that_meets_the_wish(wish: dict[str, Any], rank: int) -> None:
    choice = select(new_evaluation(right={**RIGHT, 0: 19}), **wish)
    assert (choice.rank, choice.best) == (rank, 8)
    told = f"Rank {rank} ({show_bytes(100 * rank)}): acc {RIGHT[rank] / 60:.3f} on family"
    assert choice.lines()[0].startswith(told)


def test_a_rank_at_the_bound_is_near_enough() -> None:
    right = {0: 1, 1: 2, 2: 5, 4: 20, 8: 25}  # in floats, 20 / 60 is below 0.8 * 25 / 60
    assert select(new_evaluation(right=right), within="20%").rank == 4


def test_of_equals_the_smallest() -> None:
    right = {**dict.fromkeys(RANKS, 30), 0: 10}
    assert select(new_evaluation(right=right), max_bytes="1MB").rank == 1


def test_a_metric_to_be_low() -> None:
    low = new_evaluation(right={**RIGHT, 0: 60}, higher=False)
    choice = select(low, within="99%")
    assert (choice.rank, choice.best, choice.bound) == (1, 1, pytest.approx(1.99 / 3))
    assert select(low, max_bytes=10_000).rank == 1


@pytest.mark.parametrize(("within", "sure"), [("2%", False), ("6%", True), (0, True)])
def test_paired_errors_say_whether_it_is_sure(within: Any, sure: bool) -> None:
    """Rank 4 loses one question of 60, 1.7 % with a standard error as large."""
    choice = select(new_evaluation(), within=within)
    assert choice.is_sure == sure
    assert any("too few" in line for line in choice.lines()) != sure


def test_the_evidence_is_told() -> None:
    lines = select(new_evaluation(), within="5%").lines()
    told = "acc 0.933 on family; 0.902 is near enough; 60 questions"
    assert lines[0] == f"Rank 4 (400 bytes): {told}"
    told = {line.split()[1]: line for line in lines[1:]}
    assert told["8"].endswith("better by 0.017 ± 0.017; they cannot be told apart")
    assert "worse by 0.600 ± 0.064" in told["1"]
    assert "apart" not in told["1"]


def test_an_evaluation_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_evaluation("family", "words").write(tmp_path)
    assert select(tmp_path, within="5%", task="words").rank == 4
    monkeypatch.chdir(tmp_path)
    assert select(".", within="5%", task="words").rank == 4
    with pytest.raises(MatryoshkaError, match="name one"):
        select(tmp_path, within="5%")


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({}, "say what the rank must meet"),
        ({"within": "-1%"}, "write a share such as"),
        ({"within": "101%"}, "write a share such as"),
        ({"within": 1}, "takes every rank: write a share such as 1%"),
        ({"max_bytes": 99}, "no rank is good and small enough: the best is 8"),
        ({"within": "1%", "max_bytes": 400}, "no rank is good and small enough"),
        ({"max_bytes": "many"}, "size"),
        ({"within": "1%", "metric": "los"}, "family has no metric 'los'; it has acc"),
    ],
)
def test_what_cannot_be_chosen(wish: dict[str, Any], said: str) -> None:
    with pytest.raises(MatryoshkaError, match=said):
        select(new_evaluation(), **wish)


def test_a_metric_that_does_not_say_which_is_better() -> None:
    with pytest.raises(MatryoshkaError, match="does not say whether more is better"):
        select(new_evaluation(higher=None), within="1%")


@pytest.mark.parametrize("base", [RIGHT[8], RIGHT[8] + 1])
def test_an_adapter_that_is_no_better_than_its_base_is_not_chosen(base: int) -> None:
    with pytest.raises(MatryoshkaError, match="no rank is better than the base model on family"):
        select(new_evaluation(right={**RIGHT, 0: base}), within="1%")
    # Nor is a rank, however near to the best one.
    assert select(new_evaluation(), within="90%").rank == 2
