"""The blocks of README.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from research import stats
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
from research.curves import curves, of_method, reference_accuracies
from research.looks import LOW_NAMES, NAMES, TRAINED
from research.stats import accuracy_at
from research.study import LORA_EACH

_README_RANKS = (1, 2, 3, 4, 8)
_ORDINARY_RANKS = (1, 2, 4, 8, 32)


@block
def readme_table() -> str:
    """The table of README: a task where rank matters."""
    rows: list[list[str]] = []
    for method in ("lora/svd", TRAINED, "lora/trained-1.0", "lora/squeezed"):
        cells = [median_and_lowest("low-256", method, accuracy_at(r)) for r in _README_RANKS]
        rows.append([LOW_NAMES[method], *cells, *price("low-256", method)])
    rows.append([LOW_NAMES[LORA_EACH], *reference_cells(_README_RANKS), "1.00 each", ""])
    heading = ["right answers in %", *(f"rank {rank}" for rank in _README_RANKS)]
    return table([*heading, "tokens", "seconds"], rows)


@block
def readme_ordinary() -> str:
    """The second table of README: a task where rank matters less."""
    rows = [
        [
            NAMES[method],
            *(
                percent("ordinary", method, accuracy_at(rank), "family_relationships")
                for rank in _ORDINARY_RANKS
            ),
            *price("ordinary", method),
        ]
        for method in ("lora/svd", "lora-longer/svd")
    ]
    heading = ["right answers in %", *(f"rank {rank}" for rank in _ORDINARY_RANKS)]
    return table([*heading, "tokens", "seconds"], rows)


@block
def readme_findings() -> str:
    """The bullets below the tables: rivals, harder tests, and files."""
    num_seeds = [len(of_method(study, TRAINED)) for study in ("low-capacity", "low-512")]
    minus_squeezed = [
        " and ".join(
            points(difference(study, TRAINED, accuracy_at(rank), "lora/squeezed"), "+")
            for rank in (1, 2)
        )
        for study in ("low-256", "low-capacity", "low-512")
    ]
    references = reference_accuracies(1)
    shares = stats.values(curves("low-256"), TRAINED, accuracy_at(1)).values()
    file = read("benchmarks/results/reorder.json")["whole file, R = 64"]
    sentences = [
        "* **`train_ranks` minus [LoRA-Squeeze](https://arxiv.org/abs/2602.10993)**, our variant, "
        f"means at the ranks 1 and 2, in points: {minus_squeezed[0]}.",
        f"  [Harder](docs/results.md#where-rank-matters): with fewer trainable parameters "
        f"{minus_squeezed[1]} ({num_seeds[0]} seeds); with 512 facts {minus_squeezed[2]} "
        f"({num_seeds[1]} seeds).",
        f"* **LoRA trained at rank 1** has {min(references):.1f} to {max(references):.1f} %, with "
        f"the best of nine rates and three warmups. `train_ranks` has {100 * min(shares):.1f} to "
        f"{100 * max(shares):.1f} %.",
        "* **Shrinking** a file of random factors in Flux's shapes from "
        f"{file['read']['bytes'] / 1e6:.0f} to {file['rank']['bytes'] / 1e6:.0f} MB, rank 64 to "
        f"8, takes {file['rank']['cpu_seconds']:.0f} seconds of CPU time. "
        "[Other tools](docs/performance.md#files).",
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
