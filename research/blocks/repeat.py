"""The blocks of research/README.md and research/earlier.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from matryoshka_lora import aurac
from research.blocks.shared import block, read, table
from research.runs import read_runs
from research.study import RUNS, STUDIES, load_study

LOW_RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 28, 32)
"""The ranks of each line of ``runs/low-ranks.jsonl``."""


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


_WAYS = {
    "reordered": "`reorder`",
    "trained": "`train_ranks` of version 0.4",
    "joint": "joint",
    "own": "a small adapter",
    "own-0.5": "a small adapter, rates 0.1 r^-0.5, 16 examples a step",
}
_TRAINED_WAYS = ("trained", "joint", "own")
_SHOWN_RANKS = (1, 2, 4, 8, 32)


@block
def low_ranks() -> str:
    """The ways to train the low ranks, on validation seeds.

    All ways of a task have the same seeds and orders: others are not shown.
    """
    cells = read("research/runs/low-ranks.jsonl")
    rows: list[list[str]] = []
    means: dict[str, list[float]] = {}
    for task in dict.fromkeys(f"{cell['study']}: {cell['task']}" for cell in cells):
        of_task = [cell for cell in cells if f"{cell['study']}: {cell['task']}" == task]
        by_way = {
            way: {(c["seed"], c["order"]): c for c in of_task if c["way"] == way} for way in _WAYS
        }
        keys = set.intersection(*(set(by_way[way]) for way in _TRAINED_WAYS))
        by_way["reordered"] = {(seed, order): by_way["reordered"][seed, 0] for seed, order in keys}
        for way, name in _WAYS.items():
            if not keys or not keys <= set(by_way[way]):
                continue
            of_way = [by_way[way][key] for key in sorted(keys)]
            mean = fmean(_mean_loss(cell["loss"]) for cell in of_way)
            if " at rate " not in task:
                means.setdefault(name, []).append(mean)
            losses = [fmean(_at(cell["loss"], rank) for cell in of_way) for rank in _SHOWN_RANKS]
            shares = [fmean(_at(cell["accuracy"], rank) for cell in of_way) for rank in (1, 2, 4)]
            seeds = {cell["seed"] for cell in of_way}
            rows.append(
                [
                    task,
                    name,
                    f"{mean:.4f}",
                    *(f"{loss:.3f}" for loss in losses[:-1]),
                    f"{losses[-1]:.4f}",
                    *(f"{100 * share:.1f}" for share in shares),
                    f"{len(seeds)}, {len(of_way)}",
                ]
            )
    heading = ["study and task", "way", "mean loss", *(f"rank {rank}" for rank in _SHOWN_RANKS)]
    heading += [*(f"rank {rank}, %" for rank in (1, 2, 4)), "seeds, runs"]
    number = max(map(len, means.values()))
    overall = [f"{fmean(m):.3f} for {name}" for name, m in means.items() if len(m) == number]
    return table(heading, rows) + (
        f"\nThe mean loss over the {number} tasks, without the other rate, is {', '.join(overall)}."
    )


def _at(values: Sequence[float], rank: int) -> float:
    return values[LOW_RANKS.index(rank)]


def _mean_loss(losses: Sequence[float]) -> float:
    """Return the mean loss over log2 of the rank, by the trapezoid rule."""
    return aurac(losses, LOW_RANKS)
