"""What `train_ranks` gains on ordinary tasks, where rank hardly matters: the study ``ordinary``."""

from __future__ import annotations

from research import stats
from research.blocks.comparisons import relative_seconds
from research.blocks.registry import block, nats, read, table
from research.curves import curves
from research.looks import NAMES, TRAINED
from research.stats import Value, loss_at, mean_loss
from research.study import load_study

LONGER = "lora-longer/svd"


@block
def ordinary_tasks() -> str:
    """Losses minus those of ``reorder``."""
    values = {"mean": mean_loss, "rank 1": loss_at(1), "rank 4": loss_at(4), "R": loss_at(32)}
    rows: list[list[str]] = []
    for task in load_study("ordinary").tasks:
        for method in (TRAINED, LONGER):
            cells = [nats("ordinary", method, value, task, "lora/svd") for value in values.values()]
            rows.append([f"`{task}`", NAMES[method], *cells])
    heading = ["task", "loss minus that of `reorder`, nats", *values]
    return table(heading, rows)


@block
def ordinary_findings() -> str:
    """How much of the gain of a longer run that is, how often it is kept, and why not more."""
    study = load_study("ordinary")
    gains: list[str] = []
    for task in study.tasks:
        of_mean, of_rank_1 = (_share_of_gain(task, value) for value in (mean_loss, loss_at(1)))
        gains.append(
            f"{of_mean:.0f} % ({of_rank_1:.0f} % at rank 1) on `{task}`, where "
            f"{_num_kept(task)} of {len(study.seeds)} were kept"
        )
    again, longer_run = (
        nats("rest", method, mean_loss, "chain_sum", "lora/svd")
        for method in ("lora-again/svd", LONGER)
    )
    seconds = relative_seconds("ordinary", TRAINED)
    return (
        f"* **Of the gain of half a run more**, `train_ranks` has {gains[0]},\n  and {gains[1]}. "
        f"It takes {seconds:.2f} times a run's seconds in all (the median of both tasks).\n"
        "* **A longer run needs no new examples for its gain**: on `chain_sum`, half as many steps "
        "again on the *same* examples, in one run,\n  change the mean loss by "
        f"{again} nats, and with new examples by {longer_run} (three seeds, version 0.1). "
        "Where R itself can still\n  improve, train longer from the start: once the learning rate "
        "has fallen to 0, more steps for R, or of plain LoRA, did\n  less than that on one "
        "validation seed ([tries](../research/README.md#what-was-tried))."
    )


def _share_of_gain(task: str, value: Value) -> float:
    """Return the gain of `train_ranks` over ``reorder`` in % of that of half a run more."""
    trained, longer = (
        stats.mean(curves("ordinary"), method, value, task, "lora/svd")
        for method in (TRAINED, LONGER)
    )
    if trained is None or longer is None:
        raise ValueError(f"The study ordinary lacks runs of {task}.")
    return 100 * trained.mean / longer.mean


def _num_kept(task: str) -> int:
    """Return the number of runs whose trained ranks were kept."""
    return sum(
        run["cost"]["cuts"].get("trained", {}).get("outcome") == "kept"
        for run in read("research/runs/ordinary.jsonl")
        if run["job"]["task"] == task
    )
