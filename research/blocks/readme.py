"""The blocks of README.md."""

from __future__ import annotations

from statistics import median

from research import stats
from research.blocks.comparisons import (
    THREE_TASKS,
    num_tries,
    p_kept_minus_lora,
    p_minus_lora,
    points,
    points_less,
    trained_minus,
)
from research.blocks.registry import block, facts_table, read
from research.figures import curves
from research.looks import train_ranks_name, trained_method
from research.stats import accuracy_at, aurac_log2
from research.study import LORA_EACH


@block
def readme_facts() -> str:
    """The table of README."""
    methods = ("lora/svd", trained_method("every256"), "lora/squeezed", LORA_EACH)
    return facts_table("every256", "right answers in %", methods, (1, 2, 4, 32))


@block
def readme_findings() -> str:
    """The bullets below the table: harder tests, what the rivals are, and P."""
    method = trained_method("capacity")
    trained, lora = _median_at_rank_2(method), _median_at_rank_2(LORA_EACH)
    at_rank_2 = accuracy_at(2)
    on_256, on_512, on_capacity = (
        points_less(trained_minus(study, "lora/squeezed", at_rank_2))
        for study in ("every256", "every512", "capacity")
    )
    num_of_trained, num_of_squeezed = num_tries()
    shares = stats.values(curves("every256"), LORA_EACH, accuracy_at(1)).values()
    gain = points(p_kept_minus_lora(accuracy_at(1)))
    areas = [points(p_minus_lora(aurac_log2, task), "+") for task in THREE_TASKS]
    return (
        "* **Harder tests.** With about as many facts as two ranks can hold, "
        f"{train_ranks_name(method)} has {trained} % at rank 2. LoRA trained at\n  "
        f"rank 2, with a whole run for it, has {lora} % (five seeds). LoRA-Squeeze is ahead at "
        f"rank 2 by {on_capacity} points\n  there, by {on_512} with 512 facts, and by {on_256} in "
        "the table above.\n"
        "* **[LoRA-Squeeze](https://arxiv.org/abs/2602.10993)** is our variant of it: it truncates "
        "and trains on, from rank to rank, and leaves a\n  file for each. Its authors' form was "
        f"not run. {num_of_squeezed} settings of it were tried, and {num_of_trained} of "
        "`train_ranks`.\n"
        f"* **LoRA trained at the rank** is unstable here: {100 * min(shares):.1f} to "
        f"{100 * max(shares):.1f} % at rank 1. Runs with other\n  warmups are not "
        "complete.\n"
        "* **The [paper](https://arxiv.org/abs/2605.07850) trains with a diagonal P between A and "
        'B** (`rule="matryoshka"`), which orders the columns. On one\n  task, truncated to rank '
        f"1, it has {gain} points more than LoRA of the same learning rate. After `reorder` it is "
        "redundant in\n  the mean over the ranks of three tasks: "
        f"{areas[0]}, {areas[1]} and {areas[2]} points. "
        "[Single ranks\n  differ](docs/results.md#p-and-plain-lora)."
    )


def _median_at_rank_2(method: str) -> str:
    shares = stats.values(curves("capacity"), method, accuracy_at(2)).values()
    return f"{100 * median(shares):.1f}"


@block
def readme_shrink() -> str:
    """The time of truncating one file."""
    file = read("docs/reorder.json")["whole file, R = 64"]
    megabytes_before = file["bytes_before"] / 1e6
    megabytes_after = file["bytes_after"] / 1e6
    return (
        f"A file of Flux's size goes from {megabytes_before:.0f} to {megabytes_after:.0f} MB (rank "
        f"64 to 8) in {file['cpu_seconds']:.0f} seconds of CPU time,\nwithout data, base model or "
        "GPU."
    )
