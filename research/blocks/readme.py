"""The blocks of README.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from research.blocks.shared import (
    block,
    difference,
    median_and_lowest,
    points,
    price,
    table,
)
from research.curves import of_method
from research.looks import TRAINED
from research.stats import accuracy_at, aurac_log2
from research.study import LORA_EACH

_README_RANKS = (1, 2, 4, 32)
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
    return table(["", *names.values()], rows)


@block
def readme_findings() -> str:
    """The bullets below the table: what a sceptic would ask."""
    longer = points(
        difference("ordinary", "lora-longer/svd", accuracy_at(32), "lora/svd", _ORDINARY_TASK)
    )
    to_lora = points(difference("low-capacity", LORA_EACH, accuracy_at(2), TRAINED))
    sweep = points(difference("headline", LORA_EACH, aurac_log2, "lora/svd"), "+")
    sweep_1 = points(difference("headline", LORA_EACH, accuracy_at(1), "lora/svd"), "+")
    tokens, _ = price("headline", LORA_EACH)
    sentences = [
        "* **One run replaces a search for the rank.** LoRA trained at each of six ranks costs "
        f"{tokens} times the tokens. Compared with one run and `reorder`, it has {sweep} points in",
        f"  the mean over the ranks, and {sweep_1} at rank 1 (three ordinary tasks, five seeds "
        "each; both have coarse grids of learning rates).",
        f"* **Where R still improves, train longer**: in *family*, R gains {longer} points for the "
        "tokens of `train_ranks`.",
        "  **Where a rank is too small, use `train_ranks`**. A trained rank 2 may be better than "
        "R, which stays as it is: it has seen more examples.",
        "* **A LoRA trained at rank 1 is often better than a trained rank 1**, as in the picture. "
        "Where a rank has fewer parameters still, LoRA trained",
        f"  at rank 2 has {to_lora} points more than `train_ranks`, for a run of its own "
        "([details](docs/results.md#where-rank-matters)).",
    ]
    return "\n".join(sentences)


@block
def readme_export() -> str:
    """The output of `matryoshka export --error 10%` for a small file."""
    generator = np.random.default_rng(0)
    tensors: dict[str, NDArray[np.float16]] = {}
    for number in range(16):
        name = f"lora_unet_down_blocks_1_attentions_{number}_proj_in"
        sizes = 0.8 ** np.arange(32)
        A = generator.standard_normal((32, 640)) * sizes[:, None]
        tensors[f"{name}.lora_down.weight"] = A.astype(np.float16)
        tensors[f"{name}.lora_up.weight"] = generator.standard_normal((640, 32)).astype(np.float16)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        save_file(tensors, file)
        command = f"export {file.name} --error 10% -o small.safetensors".split()
        text = subprocess.run(
            [sys.executable, "-m", "matryoshka_lora", *command],
            capture_output=True,
            check=True,
            cwd=folder,
            text=True,
        ).stdout
    output, error = text.splitlines()[:2]
    return f"`{output}`, `{error}`"
