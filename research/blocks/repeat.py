"""The blocks of research/README.md on how to repeat runs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from matryoshka_lora import MatryoshkaError
from research.blocks.registry import block, table
from research.looks import trained_method
from research.runs import read_runs
from research.study import RUNS, STUDIES, Study, check_can_run, load_study, parse_method


@block
def reproduce() -> str:
    """The studies that the current code runs: what they take, and what it cannot repeat."""
    rows: list[list[str]] = []
    for study in _studies():
        own_runs = list(read_runs([RUNS / f"{study.name}.jsonl"]).values())
        refused = [method for method in study.methods if _refusal(study, method)]
        if not own_runs or len(refused) == len(study.methods):
            continue
        _, shown_deployment = parse_method(trained_method(study.name))
        versions = {
            version
            for run in own_runs
            for version in run.versions["matryoshka-lora"].split(" and ")
        }
        training = [run.cost["seconds"] for run in own_runs]
        deploying = [
            cost["seconds"]
            for run in own_runs
            for name, cost in run.cost["cuts"].items()
            if name == shown_deployment
        ]
        rows.append(
            [
                f"`{study.name}`",
                ", ".join(sorted(versions)),
                str(len(own_runs)),
                _minutes(training),
                _minutes(deploying),
                ", ".join(f"`{method}`" for method in (*refused, *study.reported)),
            ]
        )
    heading = ["study", "version", "runs", "minutes of a run", "of `train_ranks`", "only reported"]
    return table(heading, rows)


@block
def settled_studies() -> str:
    """The studies that no current code runs."""
    names = [f"`{study.name}`" for study in _studies() if study.settled]
    sentence = f"All rows of these studies are only reported: {', '.join(names)}."
    return textwrap.fill(sentence, 120, break_on_hyphens=False)


def _studies() -> list[Study]:
    return [load_study(path.stem) for path in sorted(STUDIES.glob("*.yaml"))]


def _refusal(study: Study, method: str) -> str:
    """Return why the current code does not run a method of a study, or nothing."""
    try:
        check_can_run(replace(study, methods=(method,)))
    except MatryoshkaError as error:
        return str(error)
    return ""


def _minutes(seconds: Sequence[float]) -> str:
    """Return the median and the longest of some times."""
    if not seconds:
        return ""
    longest = f" (up to {max(seconds) / 60:.1f})" if len(seconds) > 1 else ""
    return f"{median(seconds) / 60:.1f}{longest}"
