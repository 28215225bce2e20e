"""The blocks of README.md."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import fill

from research.blocks.shared import (
    block,
    difference,
    median_and_lowest,
    percent,
    points,
    price,
    read,
    reference_cells,
    table,
)
from research.curves import of_method, reference_accuracies
from research.looks import NAMES, TRAINED
from research.plan import Result
from research.stats import accuracy_at, aurac_log2
from research.study import LORA_EACH, ROOT

_README_RANKS = (1, 2, 4, 32)
_ORDINARY_TASK = "family_relationships"
_LONGER = "lora-longer/svd"
_METHODS = {
    "lora/svd": "LoRA, then `reorder`",
    _LONGER: "LoRA for half as long again, then `reorder`",
    TRAINED: "**LoRA, then `train_ranks`**",
    "lora/trained-1.0": "the same, with `max_examples=1.0`",
}
_STUDIES = {"family": ("low-ordinary", _ORDINARY_TASK), "facts": ("low-256", "facts-256")}


@block
def readme_table() -> str:
    """The table of README: an ordinary task, and one that fills a rank."""
    rows = [[f"*{name}*, rank {rank}"] for name in _STUDIES for rank in _README_RANKS]
    rows += [["tokens"], ["seconds, *facts*"], ["seeds of *family*, of *facts*"]]
    for method in _METHODS:
        cells = [
            median_and_lowest(study, method, accuracy_at(rank), task)
            for study, task in _STUDIES.values()
            for rank in _README_RANKS
        ]
        cells += price("low-256", method)
        seeds = [str(len(of_method(study, method, task))) for study, task in _STUDIES.values()]
        for row, cell in zip(rows, [*cells, ", ".join(seeds)], strict=True):
            row.append(cell)
    blanks = [""] * len(_README_RANKS)
    seeds_of_each = f"0, {len(reference_accuracies(1))}"
    cells = [*blanks, *reference_cells(_README_RANKS), "1.00 each", "", seeds_of_each]
    for row, cell in zip(rows, cells, strict=True):
        row.append(cell)
    return table(["", *_METHODS.values(), NAMES[LORA_EACH]], rows)


@block
def readme_findings() -> str:
    """The bullets below the table: what a sceptic would ask."""

    def of_family(method: str, rank: int, minus: str) -> str:
        return points(difference("low-ordinary", method, accuracy_at(rank), minus, _ORDINARY_TASK))

    def loss_of(rank: int) -> str:
        def points_lost(result: Result) -> float:
            accuracies = dict(zip(result.ranks, result.curve.accuracy, strict=True))
            return accuracies[max(result.ranks)] - accuracies[rank]

        return percent("low-ordinary", "lora/svd", points_lost, _ORDINARY_TASK)

    tokens, _ = price("headline", LORA_EACH)
    one_run = points(difference("headline", "lora/svd", aurac_log2, LORA_EACH))
    one_run_1 = points(difference("headline", "lora/svd", accuracy_at(1), LORA_EACH))
    to_lora = points(difference("low-capacity", LORA_EACH, accuracy_at(2), TRAINED))
    small_ranks = [
        run["cost"]["cuts"]["trained"]["small_rank"]
        for study, _ in _STUDIES.values()
        for run in read(f"research/runs/{study}.jsonl")
        if "trained" in run["cost"].get("cuts", {})
    ]
    bullets = [
        f"""* **Without training, *family* loses {loss_of(4)} points at rank 4, and {loss_of(1)} at
        rank 1**, compared with R. LoRA trained at each of six ranks costs {tokens} times the
        tokens.
        In an earlier study of three ordinary tasks, *family* among them, one run and `reorder`
        differ from it by {one_run} points in the mean over the ranks, and by {one_run_1} at rank 1
        ([details](docs/results.md#three-other-tasks)).""",
        f"""* **Where R still improves, train longer.** In *family*, that is better than
        `train_ranks` at rank 2 and above for the same tokens, and R gains
        {of_family(_LONGER, 32, "lora/svd")} points.""",
        f"""* **Where R has learned the task and a low rank has not, as in *facts*,
        `train_ranks` is better.** A trained rank may be better than R, which stays as it is: it has
        seen more examples. The small adapters here have rank {min(small_ranks)} to
        {max(small_ranks)}.""",
        f"""* **If you deploy rank 1 or 2 only, train at that rank too, and compare**: it costs one
        run. With `o_proj` and `down_proj` alone to learn the facts, it is {to_lora} points better
        than `train_ranks` at rank 2, and no difference was found at rank 1
        ([details](docs/results.md#where-rank-matters)).""",
    ]
    lines = [fill(" ".join(bullet.split()), 160, subsequent_indent="  ") for bullet in bullets]
    return "\n".join(
        [
            "Differences are means over seeds, where the table has medians. "
            "± is half of a 95 % interval.",
            "",
            *lines,
        ]
    )


@block
def readme_sample() -> str:
    """What `info` and `export --error` say of a LoRA that was trained."""
    text = Path(ROOT, "research/runs/sample.txt").read_text(encoding="utf-8")
    (info,) = re.findall(r"^  rank +size.*?^  kept: .*?$", text, re.MULTILINE | re.DOTALL)
    ((before, after),) = re.findall(r"(\S+MB) -> (\S+MB)", text)
    return (
        "`matryoshka info` prints this for the LoRA of *family* [below](#what-was-measured); "
        f"`export --error 10%` reduces its file from {before} to {after}:\n\n```text\n{info}\n```"
    )


@block
def readme_export() -> str:
    """What a large file costs."""
    file = read("benchmarks/results/reorder.json")["whole file, R = 64"]
    sizes = {verb: f"{file[verb]['bytes'] / 1e6:.0f} MB" for verb in ("read", "rank", "error")}
    seconds = {verb: f"{file[verb]['cpu_seconds']:.0f}" for verb in ("rank", "error")}
    memory = 2**20 / 1e6 * max(file[verb]["peak_MiB"] for verb in seconds)
    return (
        f"A file of {sizes['read']} (Flux, rank 64, random weights: for speed only) becomes "
        f"{sizes['rank']} with `--rank 8`, in {seconds['rank']} seconds of one core;\n"
        f"`--error 10%` takes {seconds['error']} seconds. Both need {memory:.0f} MB of memory, and "
        "no GPU ([how it was measured](docs/performance.md))."
    )
