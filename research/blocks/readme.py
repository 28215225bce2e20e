"""The blocks of README.md."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from textwrap import fill

from research.blocks.serve import run_on_three_adapters
from research.blocks.shared import (
    block,
    difference,
    format_mean,
    percent,
    points,
    price,
    read,
    reference_cells,
    table,
)
from research.curves import of_method, reference_accuracies
from research.looks import TRAINED
from research.stats import accuracy_at
from research.study import LORA_EACH, ROOT

_README_RANKS = (1, 4, 32)
_ORDINARY_TASK = "family_relationships"
_LONGER = "lora-longer/svd"
_METHODS = {
    "lora/svd": "LoRA, then `reorder`",
    _LONGER: "LoRA for half as long again, then `reorder`",
    TRAINED: "LoRA, then `train_ranks`",
}
_STUDIES = {"family": ("low-ordinary", _ORDINARY_TASK), "facts": ("low-256", "facts-256")}


@block
def readme_table() -> str:
    """The table of README: an ordinary task, and one that fills a rank."""
    columns = [f"*{name}*, rank {rank}" for name in _STUDIES for rank in _README_RANKS]
    rows: list[list[str]] = []
    for method, name in _METHODS.items():
        cells = [
            percent(study, method, accuracy_at(rank), task)
            for study, task in _STUDIES.values()
            for rank in _README_RANKS
        ]
        rows.append([name, *cells, *price("low-256", method)])
    of_family = [
        percent("low-ordinary", LORA_EACH, accuracy_at(rank), _ORDINARY_TASK)
        for rank in _README_RANKS
    ]
    of_facts = reference_cells(_README_RANKS, format_mean)
    rows.append(["a LoRA trained at this rank alone", *of_family, *of_facts, "1.00 each", ""])
    caption = (
        f"Right answers in %: the mean of {len(of_method('low-256', TRAINED))} seeds, ± half of a "
        "95 % interval. The last row of *facts* is of an earlier study, in bfloat16, with "
        f"{len(reference_accuracies(1))} seeds. Tokens and seconds: 1 is one LoRA run; seconds are "
        "of *facts*. Rates were chosen on validation examples ([how](docs/results.md))."
    )
    return f"{fill(caption, 160)}\n{table(['', *columns, 'tokens', 'seconds'], rows)}"


@block
def readme_findings() -> str:
    """What follows from the table, by what a reader wants to deploy."""

    def of_family(rank: int, method: str, minus: str) -> str:
        return points(
            difference("low-ordinary", method, accuracy_at(rank), minus, _ORDINARY_TASK), "+"
        )

    def in_facts(rank: int, method: str) -> str:
        return percent("low-256", method, accuracy_at(rank)).partition(" ")[0]

    alone = {rank: f"{fmean(reference_accuracies(rank)):.1f}" for rank in (1, 4)}
    bullets = [
        f"""* **Whether a low rank is enough as it is depends on the task.** Rank 4 of `reorder`
        minus a LoRA trained at rank 4 is {of_family(4, "lora/svd", LORA_EACH)} points in *family*,
        which is undecided, and {in_facts(4, "lora/svd")} against {alone[4]} % in *facts*. LoRA was
        not trained at the ranks 8 and 16 alone here.""",
        f"""* **If R has not learned all, train longer**, which gives
        {of_family(32, _LONGER, "lora/svd")} points at rank 32 of *family*. Minus `train_ranks`, for
        the same tokens, it is {of_family(4, _LONGER, TRAINED)} points at rank 4, and
        {of_family(1, _LONGER, TRAINED)} at rank 1.""",
        f"""* **If R has, and low ranks have not, `train_ranks`**: rank 1 of *facts* has
        {in_facts(1, TRAINED)} % in place of {in_facts(1, "lora/svd")} %. A LoRA trained at rank 1
        alone has {alone[1]} %, for fewer tokens, so if you need one low rank only,
        [compare](docs/results.md#where-rank-matters).""",
    ]
    return "\n".join(
        fill(" ".join(bullet.split()), 160, subsequent_indent="  ") for bullet in bullets
    )


@block
def readme_sample() -> str:
    """What `info` and `export --error` say of a LoRA that was trained."""
    text = Path(ROOT, "research/runs/sample.txt").read_text(encoding="utf-8")
    (info,) = re.findall(r"^  rank +size.*?^  kept: .*?$", text, re.MULTILINE | re.DOTALL)
    ((before, after),) = re.findall(r"(\S+MB) -> (\S+MB)", text)
    return (
        "`info` prints this for the LoRA of *family* [below](#what-was-measured), and "
        f"`export --error 10%` makes {after} of its {before}:\n\n```text\n{info}\n```"
    )


@block
def readme_plan() -> str:
    """What `info` says of a folder, and how much `export` truncates."""
    info, export = "info loras --error 20%", "export loras --rank 16 -o capped"
    outputs = run_on_three_adapters(info, export)
    plan = outputs[info].partition("The error does not")[0]
    pairs = re.findall(r"([\d.]+)%[ *]+(chat|code)$", outputs[export], re.MULTILINE)
    errors = {name: error for error, name in pairs}
    sentence = (
        f"`matryoshka {export}` cuts the adapters above rank 16, to an error of {errors['chat']} % "
        f"for `chat` and {errors['code']} % for `code`. `matryoshka serve capped` then starts vLLM "
        "with all three."
    )
    return f"```text\n$ matryoshka {info}\n{plan}```\n\n{fill(sentence, 160)}"


@block
def readme_export() -> str:
    """What a large file costs."""
    file = read("benchmarks/results/reorder.json")["whole file, R = 64"]
    size = f"{file['read']['bytes'] / 1e6:.0f} MB"
    seconds = {verb: f"{file[verb]['cpu_seconds']:.0f}" for verb in ("rank", "error")}
    memory = 2**20 / 1e6 * max(file[verb]["peak_MiB"] for verb in seconds)
    return (
        f"A file of {size} (the shapes of Flux at rank 64, random weights) takes "
        f"{seconds['rank']} seconds of one core with `--rank 8`, and {seconds['error']} with "
        f"`--error 10%`, {memory:.0f} MB of memory,\nand no GPU "
        "([how it was measured](docs/performance.md)). How small yours become, `info` says."
    )
