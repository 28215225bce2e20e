"""The choices inside the metric `loss`, on validation data only: its damping, and how its moments are weighted.

    python benchmarks/reorder_choices.py --out runs/reorder-study

Takes the adapters of seed 0 that ``reorder_study.py`` has trained, and prints the validation loss at ranks 1, 2 and 4
for each choice. Its test questions are not looked at here.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from reorder_study import TASKS, held_out_loss, make_adapter
from torch import Tensor

from matryoshka_lora.adapter import load
from matryoshka_lora.serving import calibrate, reorder
from matryoshka_lora.models import load_model, load_tokenizer
from matryoshka_lora.reordering.factors import reweigh_factors
from matryoshka_lora.data.tasks import get_task

RANKS = (1, 2, 4)
DAMPINGS = (0.01, 0.1, 1.0)


class KfacProbe(calibrate._Probe):
    """Adds both moments up without weights, as K-FAC does."""

    def _add(self, hidden: Tensor, gradient: Tensor | None) -> None:
        assert gradient is not None
        self.tokens += len(hidden)
        self.inner += (hidden.T @ hidden).double()
        self.outer += (gradient.T @ gradient).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reorder-study"))
    parser.add_argument("--items", type=int, default=100, help="validation questions (default: 100)")
    args = parser.parse_args()
    tokenizer = load_tokenizer()
    for task in TASKS:
        folder = args.out / f"{task}-0"
        ordered = make_adapter(task, 0, folder, "frobenius")
        questions = get_task(task).examples("validation", args.items)
        rows = get_task(task, 0).examples("train", calibrate.ROWS["loss"])

        def losses(path: Path) -> str:
            adapter, found = load(load_model(), path), []
            for rank in RANKS:
                adapter.set_rank(rank)
                found.append(held_out_loss(adapter.model, tokenizer, questions))  # noqa: B023
            return "  ".join(f"{loss:.4f}" for loss in found)

        print(f"{task:20}  frobenius                {losses(ordered)}", flush=True)
        for name, probe in (("loss", calibrate._Probe), ("loss by K-FAC", KfacProbe)):
            moments = measure(probe, ordered, tokenizer, rows)
            for damping in DAMPINGS:
                with tempfile.TemporaryDirectory() as target:
                    reweigh(ordered, Path(target), moments, damping)
                    print(f"{task:20}  {name:13}  damping {damping:<4g}  {losses(Path(target))}", flush=True)


def measure(probe: type, path: Path, tokenizer: object, rows: object) -> Mapping[str, reorder.Moments]:
    before, calibrate._Probe = calibrate._Probe, probe  # type: ignore[misc, assignment]
    try:
        adapter = load(load_model(), path, trainable=True)
        return calibrate.measure_moments(adapter, tokenizer, rows, gradients=True)  # type: ignore[arg-type]
    finally:
        calibrate._Probe = before  # type: ignore[misc]


def reweigh(source: Path, target: Path, moments: Mapping[str, reorder.Moments], damping: float) -> None:
    def damped(A: Tensor, B: Tensor, inner: Tensor, outer: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return reweigh_factors(A, B, inner, outer, damping=damping)

    reorder.reweigh_factors = damped  # type: ignore[assignment]
    reorder.reweigh_adapter(source, target, "loss", moments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
