"""Show what reordering does to a layer: the norms of its directions, what each prefix misses.

    python -m research.singular docs/singular.json       # about two minutes of one core

The adapter is plain LoRA on the 256 facts of seed 0, trained as `research/studies/facts256.yaml`
says, at the learning rate that validation chose for ``lora/svd``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    parser.add_argument("out", type=Path, help="the JSON file to write")
    given = parser.parse_args()
    set_up(1)
    found: dict[str, Any] = {"adapter": "lora-r32-lr0.004-seed0", "task": JOB.task, "layer": LAYER}
    with trainer_of(load_study("facts256"), JOB) as (adapter, trainer, _):
        trainer.train()
    for order in ("trained", "svd"):
        if order == "svd":
            adapter.reorder()
        pairs = adapter.factors()
        (layer,) = (name for name in pairs if name.endswith(LAYER))
        found[order] = describe(*pairs[layer])
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def describe(A: Tensor, B: Tensor) -> dict[str, list[float]]:
    """Return the norm of each direction ``b_i a_i``, and what 0, 1, ... R directions miss.

    A prefix misses ``|B A - B_r A_r| / |B A|`` of the update, in Frobenius norms.
    """
    A, B = A.double(), B.double()
    whole = B @ A
    missing = [(whole - B[:, :r] @ A[:r]).norm() / whole.norm() for r in range(len(A) + 1)]
    return {
        "norms": _rounded(B.norm(dim=0) * A.norm(dim=1)),
        "missing": _rounded(torch.stack(missing)),
    }


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") if value > 1e-6 else 0.0 for value in values.tolist()]


if __name__ == "__main__":
    main()
