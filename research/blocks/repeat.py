"""The blocks of research/README.md and research/earlier.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from research.blocks.shared import block, read, table
from research.runs import read_runs
from research.study import RUNS, STUDIES, load_study


@block
def reproduce() -> str:
    """The versions that ran each study, and the time that it takes."""
    rows: list[list[str]] = []
    for path in sorted(STUDIES.glob("*.yaml")):
        name = load_study(path.stem).name
        runs = list(read_runs([RUNS / f"{name}.jsonl"]).values())
        versions = {v for run in runs for v in run.versions["matryoshka-lora"].split(" and ")}
        training = [run.cost["seconds"] for run in runs]
        of_train_ranks = [
            run.cost["cuts"]["trained"]["seconds"] for run in runs if "trained" in run.cost["cuts"]
        ]
        rows.append(
            [
                f"`{name}`",
                ", ".join(sorted(versions)),
                str(len(runs)),
                _minutes(training),
                _minutes(of_train_ranks),
            ]
        )
    return table(["study", "version", "runs", "minutes of a run", "of `train_ranks`"], rows)


def _minutes(seconds: Sequence[float]) -> str:
    """Return the median and the longest of some times."""
    if not seconds:
        return ""
    longest = f" (up to {max(seconds) / 60:.1f})" if len(seconds) > 1 else ""
    return f"{median(seconds) / 60:.1f}{longest}"


@block
def tries() -> str:
    """The tries of `train_ranks` and LoRA-Squeeze: the lowest and the highest of each kind."""
    rows: list[list[str]] = []
    for line in read("research/runs/tries.jsonl"):
        ranges = [
            " to ".join(dict.fromkeys(f"{number:.{digits}f}" for number in line[key]))
            for key, digits in (("rank 1", 1), ("rank 2", 1), ("loss at rank 1", 3))
        ]
        rows.append(
            [line["version"], f"`{line['task']}`", line["kind"], str(line["tries"]), *ranges]
        )
    heading = ["version", "task or study", "kind", "tries", "rank 1, %", "rank 2, %"]
    return table([*heading, "loss at rank 1"], rows)
