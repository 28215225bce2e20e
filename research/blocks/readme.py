"""The blocks of README.md."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import fill

from research.blocks.serve import run_on_three_adapters
from research.blocks.shared import (
    block,
    difference,
    percent,
    points,
    price,
    read,
    table,
)
from research.curves import of_method
from research.looks import TRAINED
from research.stats import accuracy_at, aurac_log2
from research.study import LORA_EACH, ROOT, load_study

_README_RANKS = (1, 4, 32)
_ORDINARY_TASK = "family_relationships"
_LONGER = "lora-longer/svd"
_METHODS = {
    "lora/svd": "LoRA, then `reorder`",
    _LONGER: "LoRA with 1.5 times as many steps, then `reorder`",
    TRAINED: "LoRA, then `train_ranks`",
    LORA_EACH: "a LoRA trained at this rank alone",
}
_STUDIES = {"family": ("low-ordinary", _ORDINARY_TASK), "facts": ("low-256", "facts-256")}


@block
def readme_table() -> str:
    """The table of README: an ordinary task, and one that fills a rank."""
    columns = [f"*{name}*, rank {rank}" for name in _STUDIES for rank in _README_RANKS]
    rows: list[list[str]] = []
    for method, name in _METHODS.items():
        # Each rank is a run of its own, so at R it would be the run of the first row.
        cells = [
            "as *reorder*"
            if method == LORA_EACH and rank == max(_README_RANKS)
            else percent(study, method, accuracy_at(rank), task)
            for study, task in _STUDIES.values()
            for rank in _README_RANKS
        ]
        tokens, seconds = ("1.00 each", "") if method == LORA_EACH else price("low-256", method)
        rows.append([name, *cells, tokens, seconds or "not timed"])
    questions = " and ".join(
        f"{load_study(study).items['test']} questions of *{name}*"
        for name, (study, _) in _STUDIES.items()
    )
    caption = (
        f"Right answers in %: the mean of {len(of_method('low-256', TRAINED))} seeds, ± half of a "
        f"95 % interval over the seeds, on {questions}. Differences below are of pairs with the "
        "same seed. Tokens and seconds: 1 is one LoRA run; seconds are of *facts*, where one "
        "process ran both. Learning rates were chosen on validation examples "
        "([how](docs/results.md))."
    )
    return f"{fill(caption, 160)}\n{table(['', *columns, 'tokens', 'seconds'], rows)}"


@block
def readme_findings() -> str:
    """What follows from the table, by what a reader wants to deploy."""

    def minus(name: str, rank: int, method: str, other: str) -> str:
        """Return how much more or less a method has than another, and if the interval has 0."""
        study, task = _STUDIES[name]
        number = points(difference(study, method, accuracy_at(rank), other, task))
        mean, _, half_interval = number.partition(" ± ")
        undecided = " (undecided)" if abs(float(mean)) <= float(half_interval) else ""
        direction = "less" if mean.startswith("-") else "more"
        return f"{number.lstrip('-')} points {direction}{undecided}"

    def share(name: str, rank: int, method: str) -> str:
        study, task = _STUDIES[name]
        return percent(study, method, accuracy_at(rank), task).partition(" ")[0]

    def area(method: str) -> str:
        return percent("headline", method, aurac_log2, _ORDINARY_TASK)

    bullets = [
        f"""* **Whether a low rank is enough as it is depends on the task.** Compared
        with a LoRA trained at the rank, `reorder` in *family* has
        {minus("family", 1, "lora/svd", LORA_EACH)} at rank 1 and
        {minus("family", 4, "lora/svd", LORA_EACH)} at rank 4. In *facts*, it has
        {minus("facts", 1, "lora/svd", LORA_EACH)} and
        {minus("facts", 4, "lora/svd", LORA_EACH)}.""",
        f"""* **If a longer training improves R, train longer.** In *family*, R has
        {minus("family", 32, _LONGER, "lora/svd")} after 1.5 times as many steps. Compared with
        `train_ranks`, which takes as many tokens, rank 4 has
        {minus("family", 4, _LONGER, TRAINED)}, and rank 1 has
        {minus("family", 1, _LONGER, TRAINED)}.""",
        f"""* **If R is good, and the low ranks are not, use `train_ranks`.** Rank 1 of *facts* has
        {share("facts", 1, TRAINED)} % in place of {share("facts", 1, "lora/svd")} %, which is
        {minus("facts", 1, TRAINED, LORA_EACH)} than a LoRA trained at rank 1 alone. That LoRA saw
        each example fewer times, so if one low rank is all that you need,
        [train just that one](docs/results.md#where-rank-matters).""",
        f"""* **Training all ranks at once was no better.** In an earlier study of *family*, the
        mean over the ranks 1 to 32, on a log2 axis, is {area("matryoshka/prefix")} with our
        implementation of MatryoshkaLoRA, {area("matryoshka/svd")} with its training and `reorder`,
        {area("dylora/prefix")} with DyLoRA, and {area("lora/svd")} with plain LoRA and `reorder`.
        The paper's own experiments were not repeated
        ([three tasks](docs/results.md#three-other-tasks)).""",
    ]
    return "\n".join(
        fill(" ".join(bullet.split()), 160, subsequent_indent="  ", break_on_hyphens=False)
        for bullet in bullets
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
def readme_eval() -> str:
    """What `eval` says of the LoRA of `readme_sample`."""
    text = Path(ROOT, "research/runs/sample.txt").read_text(encoding="utf-8")
    (scores,) = re.findall(r"^rank +size +exact_match.*?(?=^held-out:)", text, re.M | re.S)
    (best,) = re.findall(r"^Compared with rank (\d+)", text, re.MULTILINE)
    (rank_4,) = re.findall(r"^  rank 4 is worse by (\S+ ± \S+)$", text, re.MULTILINE)
    (rank_8,) = re.findall(r"^  rank 8 is worse by (.+); they cannot be told", text, re.MULTILINE)
    sentence = (
        f"On the same questions, `select` finds rank 4 worse than rank {best}, the best, by "
        f"{rank_4}. Rank 8 is worse by {rank_8}, which may be chance. How much is too much, you "
        "decide, with your model and data."
    )
    return (
        "On 200 questions of *family*, `eval` prints this, ± one standard error; *base* is the "
        f"model without the LoRA:\n\n```text\n{scores}```\n\n{fill(sentence, 160)}"
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
        "Here only `chat` needs slots of rank 64. If its answers are good enough at rank 16, where "
        f"its error is {errors['chat']} %, `matryoshka {export}` cuts it there, and `code` to an "
        f"error of {errors['code']} %. `matryoshka serve capped` then starts vLLM with all three "
        "in slots of rank 16."
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
