"""The blocks of README.md."""

from __future__ import annotations

from textwrap import fill

from research.blocks.shared import (
    block,
    difference,
    median_and_lowest,
    points,
    price,
    read,
    reference_cells,
    table,
)
from research.curves import of_method, reference_accuracies
from research.looks import NAMES, TRAINED
from research.stats import accuracy_at, aurac_log2
from research.study import LORA_EACH

_README_RANKS = (1, 2, 4, 8, 32)
_ORDINARY_TASK = "family_relationships"


@block
def readme_table() -> str:
    """The table of README: an ordinary task, and one that fills a rank."""
    names = {
        "lora/svd": "LoRA, then `reorder`",
        "lora-longer/svd": "LoRA for half as long again, then `reorder`",
        TRAINED: "**LoRA, then `train_ranks`**",
        "lora/trained-1.0": "the same, with `max_examples=1.0`",
    }
    rows = [[f"{task}, rank {rank}"] for task in ("family", "facts") for rank in _README_RANKS]
    rows += [["tokens"], ["seconds"], ["seeds of *family*, of *facts*"]]
    for method in names:
        is_longer = method == "lora-longer/svd"
        ordinary, facts = ("ordinary", "every256") if is_longer else ("low-ordinary", "low-256")
        measures = [accuracy_at(rank) for rank in _README_RANKS]
        cells = [median_and_lowest(ordinary, method, m, _ORDINARY_TASK) for m in measures]
        cells += [median_and_lowest(facts, method, measure) for measure in measures]
        cells += price(facts, method)
        seeds = len(of_method(ordinary, method, _ORDINARY_TASK)), len(of_method(facts, method))
        cells.append(f"{seeds[0]}, {seeds[1]}")
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell)
    num_references = len(reference_accuracies(1))
    blanks = [""] * len(_README_RANKS)
    cells = [*blanks, *reference_cells(_README_RANKS), "1.00 each", "", f"0, {num_references}"]
    for row, cell in zip(rows, cells, strict=True):
        row.append(cell)
    return table(["", *names.values(), NAMES[LORA_EACH]], rows)


@block
def readme_findings() -> str:
    """The bullets below the table: what a sceptic would ask."""
    longer = points(
        difference("ordinary", "lora-longer/svd", accuracy_at(32), "lora/svd", _ORDINARY_TASK)
    )
    to_lora = points(difference("low-capacity", LORA_EACH, accuracy_at(2), TRAINED))
    one_run = points(difference("headline", "lora/svd", aurac_log2, LORA_EACH))
    one_run_1 = points(difference("headline", LORA_EACH, accuracy_at(1), "lora/svd"))
    tokens, _ = price("headline", LORA_EACH)
    small_ranks = [
        run["cost"]["cuts"]["trained"]["small_rank"]
        for study in ("low-ordinary", "low-256", "low-512", "low-capacity")
        for run in read(f"research/runs/{study}.jsonl")
        if "trained" in run["cost"].get("cuts", {})
    ]
    bullets = [
        f"""* **One run instead of six, on ordinary tasks.** LoRA trained at each of six ranks
        costs {tokens} times the tokens of one run and `reorder`.
        In the mean over the ranks, no difference was found: the
        one run has {one_run} points more. At rank 1 it has {one_run_1} points less (three ordinary
        tasks, *family* among them; five seeds; coarse grids of learning rates).""",
        f"""* **Where R still improves, train longer.** In *family*, that is better than
        `train_ranks` at rank 2 and above for the same tokens, and R gains {longer} points.
        **In *facts*, where R has learned the task and a low rank has not, `train_ranks` is
        better.**
        A trained rank may be better than R, which stays as it is: it has seen more examples.
        The small adapters here have rank {min(small_ranks)} to {max(small_ranks)}.""",
        f"""* **If you deploy rank 1 or 2 only, train at that rank**: it costs one run, and is often
        better. With `o_proj` and `down_proj` alone to learn the facts, LoRA at rank 2 is better
        than rank 2 of `train_ranks` by {to_lora} points
        ([details](docs/results.md#where-rank-matters)).""",
    ]
    lines = [fill(" ".join(bullet.split()), 160, subsequent_indent="  ") for bullet in bullets]
    return "\n".join(["± is half of a 95 % interval over seeds.", "", *lines])


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
