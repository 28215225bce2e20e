"""Measure a layer before and after reordering: norms of components, and errors of prefixes.

    python -m research.singular research/runs/singular.json    # about two minutes of one core

The adapter is plain LoRA on the 256 facts of seed 0, trained without warmup.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka_lora import NestedAdapter
from research.run import set_up
from research.runs import Job
from research.study import load_study
from research.training import trainer_of

JOB = Job("lora", "facts-256", 32, 4e-3, 0, "validation")
LAYER = "model.layers.1.mlp.down_proj"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    set_up(1)
    with trainer_of(load_study("reference-warmup-0"), JOB) as (adapter, trainer, _):
        trainer.train()
    content: dict[str, Any] = {
        "adapter": "lora-r32-lr0.004-seed0",
        "task": JOB.task,
        "layer": LAYER,
        "trained": describe(adapter),
    }
    adapter.reorder()
    content["svd"] = describe(adapter)
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def describe(adapter: NestedAdapter) -> dict[str, list[float]]:
    """Return the norm of each component ``b_i a_i`` of `LAYER`, and the error of each rank from 0.

    The error is ``|B A - B_r A_r| / |B A|``, in Frobenius norms.
    """
    factors = adapter.factors.copy()
    (name,) = (name for name in factors if name.endswith(LAYER))
    A, B = (factor.double() for factor in factors[name])
    update = B @ A
    errors = [
        (update - B[:, :rank] @ A[:rank]).norm() / update.norm() for rank in range(len(A) + 1)
    ]
    return {
        "norms": _round(B.norm(dim=0) * A.norm(dim=1)),
        "missing": _round(torch.stack(errors)),
    }


def _round(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") if value > 1e-6 else 0.0 for value in values.tolist()]


if __name__ == "__main__":
    main()
