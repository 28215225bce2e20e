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
    reference_cells,
    table,
)
from research.curves import of_method, reference_accuracies
from research.looks import LOW_NAMES, TRAINED
from research.stats import accuracy_at, aurac_log2
from research.study import LORA_EACH

_README_RANKS = (1, 2, 4, 32)
_ORDINARY_TASK = "family_relationships"


@block
def readme_table() -> str:
    """The table of README: an ordinary task, and one that fills a rank."""
    rows: list[list[str]] = []
    measures = [accuracy_at(rank) for rank in _README_RANKS]
    for method in ("lora/svd", TRAINED, "lora/trained-1.0", "lora/squeezed"):
        cells = [median_and_lowest("low-ordinary", method, m, _ORDINARY_TASK) for m in measures]
        cells += [median_and_lowest("low-256", method, measure) for measure in measures]
        rows.append([LOW_NAMES[method], *cells, *price("low-256", method)])
    longer = "lora-longer/svd"
    cells = [median_and_lowest("ordinary", longer, m, _ORDINARY_TASK) for m in measures]
    cells += [median_and_lowest("every256", longer, measure) for measure in measures]
    rows.insert(1, [LOW_NAMES[longer], *cells, *price("every256", longer)])
    references = reference_cells(_README_RANKS)
    rows.append([LOW_NAMES[LORA_EACH], *[""] * len(_README_RANKS), *references, "1.00 each", ""])
    heading = [f"{task}, {rank}" for task in ("family", "facts") for rank in _README_RANKS]
    num_seeds = len(of_method("low-ordinary", TRAINED, _ORDINARY_TASK))
    seeds = len(of_method("low-256", TRAINED))
    return (
        "Right answers in %, the median of "
        f"{num_seeds} seeds of *family* and of {seeds} of *facts*, the lowest in brackets:\n"
        + table(["task, rank", *heading, "tokens", "seconds"], rows)
    )


@block
def readme_findings() -> str:
    """The bullets below the table: what a sceptic would ask."""
    longer = points(
        difference("ordinary", "lora-longer/svd", accuracy_at(32), "lora/svd", _ORDINARY_TASK), "+"
    )
    references = reference_accuracies(1)
    to_lora = points(difference("low-capacity", TRAINED, accuracy_at(2), LORA_EACH), "+")
    sweep = points(difference("headline", LORA_EACH, aurac_log2, "lora/svd"), "+")
    sweep_1 = points(difference("headline", LORA_EACH, accuracy_at(1), "lora/svd"), "+")
    tokens, _ = price("headline", LORA_EACH)
    sentences = [
        "* **One run instead of six.** LoRA trained at each of six ranks has, compared with one "
        f"run and `reorder`, {sweep} points in the mean over the ranks and {sweep_1} at rank 1,",
        f"  for {tokens} times the tokens (three ordinary tasks, five seeds each; both have coarse "
        "grids of learning rates).",
        "* **Where R can still improve, as in *family*, train longer, then `reorder`**: for the "
        f"same tokens as `train_ranks`, R gains {longer} points (five seeds).",
        "  **Where a rank is too small, as in *facts*, use `train_ranks`.** A trained rank 2 may "
        "be better than R, as it has seen more examples.",
        "* **LoRA trained at rank 1 is often better than a trained rank 1.** On the facts it has "
        f"{min(references):.1f} to {max(references):.1f} %, at its best rate (15 seeds). Where",
        f"  a rank has fewer parameters, `train_ranks` has {to_lora} points at rank 2, compared "
        "with LoRA trained at rank 2 ([details](docs/results.md#where-rank-matters)).",
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
