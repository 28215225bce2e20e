"""The blocks of README.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

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
from research.curves import accuracies, of_method, reference_accuracies
from research.looks import LOW_NAMES, NAMES, TRAINED
from research.stats import accuracy_at, aurac_log2
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
        for method in ("lora/svd", TRAINED, "lora-longer/svd")
    ]
    heading = ["right answers in %", *(f"rank {rank}" for rank in _ORDINARY_RANKS)]
    return table([*heading, "tokens", "seconds"], rows)


@block
def readme_findings() -> str:
    """The bullets below the tables: rivals, harder tests, and files."""
    num_seeds = [len(of_method(study, TRAINED)) for study in ("low-capacity", "low-512")]
    to_squeezed = {
        study: [difference(study, TRAINED, accuracy_at(rank), "lora/squeezed") for rank in (1, 2)]
        for study in ("low-256", "low-capacity", "low-512")
    }
    minus_squeezed = [
        " and ".join(points(estimate, "+") for estimate in estimates)
        for estimates in to_squeezed.values()
    ]
    is_clear = any(
        abs(estimate.mean) > (estimate.half_width or 0)
        for estimates in to_squeezed.values()
        for estimate in estimates
    )
    conclusion = "Not all of these intervals contain 0." if is_clear else "No difference is shown."
    references = reference_accuracies(1)
    trained = accuracies(of_method("low-256", TRAINED), 1)
    to_lora = points(difference("low-capacity", TRAINED, accuracy_at(2), LORA_EACH), "+")
    sweep = points(difference("headline", LORA_EACH, aurac_log2, "lora/svd"), "+")
    sweep_1 = points(difference("headline", LORA_EACH, accuracy_at(1), "lora/svd"), "+")
    tokens, _ = price("headline", LORA_EACH)
    file = read("benchmarks/results/reorder.json")["whole file, R = 64"]
    sentences = [
        "* **One run instead of six.** LoRA trained at each of six ranks minus one run and "
        f"`reorder`: {sweep} points of right answers in the mean over the",
        f"  ranks, {sweep_1} at rank 1, for {tokens} times the tokens (three ordinary tasks, five "
        "seeds each; both have coarse grids of learning rates).",
        "* **Where R can still improve, train longer** instead of `train_ranks`: the first table "
        "has both for the same tokens.",
        "* **LoRA trained at rank 1** knows "
        f"{median(references):.1f} % of the facts ({min(references):.1f} to "
        f"{max(references):.1f}, with the best of nine rates and three warmups; the rate is at the",
        f"  edge of its grid), `train_ranks` {median(trained):.1f} ({min(trained):.1f} to "
        f"{max(trained):.1f}). With fewer trainable parameters, `train_ranks` minus LoRA "
        f"trained at rank 2 is {to_lora} points.",
        "* **`train_ranks` minus [LoRA-Squeeze](https://arxiv.org/abs/2602.10993)**, our variant, "
        f"at the ranks 1 and 2: {minus_squeezed[0]} points; [harder]"
        "(docs/results.md#where-rank-matters):",
        f"  {minus_squeezed[1]} with fewer parameters ({num_seeds[0]} seeds), {minus_squeezed[2]} "
        f"with 512 facts ({num_seeds[1]} seeds). {conclusion}",
        "* **Time**: a file of 687 MB in Flux's shapes takes "
        f"{file['rank']['cpu_seconds']:.0f} seconds of CPU time with `--rank 8`, and "
        f"{file['error']['cpu_seconds']:.0f} with `--error`. [Other tools]"
        "(docs/performance.md#files).",
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
