"""The ranks are trained in two processes as in one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from helpers.two_processes import FOLDER, run_in_two_processes

TOLERANCES = {"sft": 1e-5, "dpo": 1e-5, "reward": 1e-5, "kto": 0.02}
"""KTO compares each example with the others of its process, so its loss is another one."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Of each Trainer in one process, and in two."""
    folder = tmp_path_factory.mktemp("processes")
    adapters = str(folder / "adapters")
    outputs = [folder / "one.json", folder / "two.json"]
    command = [sys.executable, str(FOLDER / "train_ranks.py"), adapters, str(outputs[0])]
    subprocess.run(command, env={"PYTHONPATH": str(FOLDER.parent)}, check=True)
    run_in_two_processes("ddp", "train_ranks.py", [adapters, str(outputs[1])])
    one, two = [json.loads(output.read_text()) for output in outputs]
    return one, two


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of cases in which the processes differ, by process."""
    folder = tmp_path_factory.mktemp("outcomes")
    run_in_two_processes("ddp", "different_processes.py", [str(folder)])
    return [json.loads((folder / f"{index}.json").read_text()) for index in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("no labels", ("no examples", "no examples")),
        ("a bug", ("RuntimeError", "AttributeError")),
        ("no data", ("MatryoshkaError", "MatryoshkaError")),
    ],
)
def test_every_process_fails_if_one_does(
    case: str, expected: tuple[str, str], outcomes: list[dict[str, Any]]
) -> None:
    """None waits for the others, and all reach the end of the script."""
    assert tuple(by_case[case] for by_case in outcomes) == expected


@pytest.mark.slow
def test_the_loss_of_compute_loss_func_is_not_multiplied(outcomes: list[dict[str, Any]]) -> None:
    for by_case in outcomes:
        loss, expected = by_case["losses"]
        assert loss == pytest.approx(expected, rel=1e-5)
        assert by_case["is averaged"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOLERANCES)
def test_two_processes_train_the_ranks_as_one(kind: str, results: tuple[Any, Any]) -> None:
    one, two = [by_kind[kind] for by_kind in results]
    assert one["outcome"] == two["outcome"] == "kept"
    assert one["examples_by_rank"] == two["examples_by_rank"]
    for key in ("losses_before", "losses_after", "factors"):
        assert one[key] == pytest.approx(two[key], rel=0, abs=TOLERANCES[kind])
    assert one["losses_after"][0] < one["losses_before"][0]
