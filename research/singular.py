"""What reordering does to one layer of one adapter: the sizes of its directions, and what each prefix leaves out.

    python -m research.facts runs/facts/model --layers 2
    python -m research.singular docs/singular.json       # about two minutes

The adapter is plain LoRA on the 256 facts of seed 0, trained as `research/configs/facts256.yaml` says, at the learning
rate that validation chose for ``lora/svd``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from research.records import Job, write_text
from research.study import load_study
from research.trainers import factors_of
from research.training import Trained, train, training

STUDY = Path(__file__).parent / "configs" / "facts256.yaml"
JOB = Job("lora", "facts-256", 32, 4e-3, 0, "validation")
LAYER = "model.layers.1.mlp.down_proj"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    given = parser.parse_args(arguments)
    study = load_study(STUDY)
    rows = study.train_set(JOB.recipe, JOB.task, JOB.seed)
    with training(study, JOB, rows, rows[:1]) as trainer:
        trained = train(trainer, study, JOB)
    about = {"adapter": JOB.path(Path()).stem, "task": JOB.task, "layer": LAYER}
    write_text(given.out, json.dumps({**about, **before_and_after(trained)}, indent=1) + "\n")


def before_and_after(trained: Trained) -> dict[str, Any]:
    """Of `LAYER`, as it was trained and after `reorder`."""
    adapter = trained.adapter()
    before = describe(*_factors(trained))
    adapter.reorder()
    return {"trained": before, "svd": describe(*_factors(trained))}


def describe(A: Tensor, B: Tensor) -> dict[str, list[float]]:
    """The norm of each direction ``b_i a_i``, and for 0, 1, ... R directions how much of the update is missing.

    That is ``|B A - B_r A_r| / |B A|`` in Frobenius norms.
    """
    A, B = A.double(), B.double()
    whole = B @ A
    missing = [(whole - B[:, :rank] @ A[:rank]).norm() / whole.norm() for rank in range(len(A) + 1)]
    return {"norms": _rounded(B.norm(dim=0) * A.norm(dim=1)), "missing": _rounded(torch.stack(missing))}


def _factors(trained: Trained) -> tuple[Tensor, Tensor]:
    found = {name.removeprefix("base_model.model."): pair for name, pair in factors_of(trained.model).items()}
    A, B = found[LAYER]
    return A.detach(), B.detach()


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") if value > 1e-6 else 0.0 for value in values.tolist()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    main()
