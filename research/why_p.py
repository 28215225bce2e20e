"""What the paper's P does to training: gradients and sizes by column, spectra, and whether two runs find the same.

    python -m research.why_p --out runs/why --json runs/why.json          # some 75 seconds for each of 15 runs
    python -m research.why_p --json research/pages/why.json --table       # the recorded tables again

Five ways of training on chain_sum, three seeds, as the study trains: plain LoRA at two learning rates, P, P of scaling
1 / r, and P as learning rates (plain LoRA whose column c of B moves p_c times as far), which is what P should be under
Adam. Every finished run is kept, so the command goes on where it was stopped. No question is asked, of test data or
others. The recorded numbers, research/pages/why.json, are of version 0.1.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from matryoshka_lora import Nesting
from research.recipes import RECIPES
from research.records import Job, write_text
from research.study import load_study
from research.trainers import TRAINERS, AnswerTrainer, factors_of
from research.training import Trained, train, training

WAYS = {
    "lora 0.001": ("lora", 1e-3),
    "lora 0.002": ("lora", 2e-3),
    "P 0.001": ("matryoshka", 1e-3),
    "P as rates 0.001": ("p-rates", 1e-3),
    "P by rank 0.004": ("matryoshka-rank", 4e-3),
}
SEEDS = (0, 1, 2)
NESTING = Nesting.powers_of_two(32)
GROUPS = list(zip((0, *NESTING.ranks), NESTING.ranks, strict=False))
"""Columns between two nested ranks, which all have the same p."""

PAIRS = (("P 0.001", "P as rates 0.001"), ("P 0.001", "lora 0.001"), ("P 0.001", "lora 0.002"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/why"), help="folder for the subspaces of finished runs")
    parser.add_argument("--json", type=Path, default=Path("runs/why.json"), help="file of the numbers")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables of the file")
    given = parser.parse_args()
    if not given.table:
        measure(given.out, given.json)
    found = json.loads(given.json.read_text())
    print_tables(found)


def measure(out: Path, file: Path) -> None:
    """Train what is missing, then compare the subspaces."""
    study = load_study(Path(__file__).parent / "configs" / "headline.yaml")
    for seed in SEEDS:
        for way, (recipe, rate) in WAYS.items():
            kept = file_of(out, way, seed)
            how = json.dumps(study.settings("chain_sum", recipe), sort_keys=True)
            if kept.exists():
                with safe_open(kept, "pt") as opened:
                    if opened.metadata() != {"settings": how}:
                        raise SystemExit(f"{kept} was trained with other settings: take another folder with --out")
                continue
            job = Job(recipe, "chain_sum", 32, rate, seed, "validation")
            plain = TRAINERS.get(RECIPES[recipe].objective or "", AnswerTrainer)
            gradients: list[Tensor] = []
            watching = type("Watching", (Watching, plain), {"gradients": gradients})
            rows = study.train_set(recipe, "chain_sum", seed)
            with training(study, job, rows, rows[:1], watching) as trainer:
                found = describe(train(trainer, study, job))
            found["gradient"] = torch.stack(gradients).mean(dim=0)
            out.mkdir(parents=True, exist_ok=True)
            writing = out / f"{kept.stem}.{os.getpid()}"
            save_file(found, writing, {"settings": how})
            writing.rename(kept)
            print(f"{way}, seed {seed}: done", flush=True)
    write_text(file, json.dumps(summary(out), indent=1) + "\n")


def file_of(out: Path, way: str, seed: int) -> Path:
    """Of a finished run."""
    return out / f"{way.replace(' ', '-')}-{seed}.safetensors"


class Watching(AnswerTrainer):
    """Keeps the norms of B's gradient by column, at each step the mean over the layers."""

    gradients: list[Tensor]

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(model, *args, **kwargs)
        norms = [p.grad.norm(dim=0) for name, p in model.named_parameters() if "lora_B" in name and p.grad is not None]
        self.gradients.append(torch.stack(norms).mean(dim=0))
        return loss


@torch.no_grad()
def describe(trained: Trained) -> dict[str, Tensor]:
    """Sizes of the columns, spectra, and the leading left singular vectors of every layer, as it was trained."""
    adapter = trained.adapter()
    p = adapter.rule.trained_diagonal(adapter.nesting)
    found: dict[str, list[Tensor]] = {"sizes": [], "spectra": [], "agree": []}
    vectors = {}
    for name, pair in factors_of(trained.model).items():
        A, B = (factor.double() for factor in pair)
        B = B * p
        raw, R_B = torch.linalg.qr(B)
        R_A = torch.linalg.qr(A.T)[1]
        inner, values, _ = torch.linalg.svd(R_B @ R_A.T)
        U = raw @ inner
        found["sizes"].append(B.norm(dim=0) * A.norm(dim=1))
        found["spectra"].append(values)
        found["agree"].append(torch.stack([overlap(raw, U, rank) for rank in NESTING.ranks]))
        vectors[f"U.{name}"] = U.float().contiguous()
    return {key: torch.stack(some).float().contiguous() for key, some in found.items()} | vectors


def overlap(one: Tensor, other: Tensor, rank: int) -> Tensor:
    """Of the spans of two orthonormal bases' first columns: 1 if they are the same, 0 if orthogonal."""
    return (one[:, :rank].T @ other[:, :rank]).square().sum() / rank


def summary(out: Path) -> dict[str, Any]:
    """The numbers of all runs, by way and seed, and the overlaps between them."""
    runs = {(way, seed): load_file(file_of(out, way, seed)) for way in WAYS for seed in SEEDS}
    found: dict[str, Any] = {"ways": {}, "overlaps": {}}
    for (way, seed), run in runs.items():
        energy = run["spectra"].double().square()
        shares = energy.cumsum(dim=1) / energy.sum(dim=1, keepdim=True)
        sizes = run["sizes"].double()
        found["ways"].setdefault(way, {})[str(seed)] = {
            "gradient": [run["gradient"][a:b].mean().item() for a, b in GROUPS],
            "size": [sizes[:, a:b].mean().item() for a, b in GROUPS],
            "norm": energy.sum(dim=1).sqrt().mean().item(),
            "energy": [shares[:, rank - 1].mean().item() for rank in NESTING.ranks],
            "prefix is svd": run["agree"].mean(dim=0).tolist(),
        }
    for one, other in PAIRS:
        found["overlaps"][f"{one} and {other}"] = [between(runs[one, seed], runs[other, seed]) for seed in SEEDS]
    found["overlaps"]["P 0.001, seeds 0 and 1"] = [between(runs["P 0.001", 0], runs["P 0.001", 1])]
    return found


def between(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[float]:
    """Mean over the layers of the overlap of two runs' leading left singular vectors, at each nested rank."""
    names = [name for name in one if name.startswith("U.")]
    return [fmean(overlap(one[name], other[name], rank).item() for name in names) for rank in NESTING.ranks]


def print_tables(found: dict[str, Any]) -> None:
    """As Markdown: means over the seeds, with the standard deviation in brackets."""
    ways = found["ways"]
    groups = [f"{a + 1}" if b == a + 1 else f"{a + 1}-{b}" for a, b in GROUPS]
    for key, title in (("gradient", "Norm of B's gradient by column, times 1000"), ("size", "Size of b_c a_c p_c")):
        unit = 1000 if key == "gradient" else 1
        print_table(title, groups, {way: [run[key] for run in of.values()] for way, of in ways.items()}, unit)
    ranks = [str(rank) for rank in NESTING.ranks]
    energies = {way: [run["energy"] for run in of.values()] for way, of in ways.items()}
    print_table("Share of the squared singular values in the first r", ranks, energies)
    agreed = {way: [run["prefix is svd"] for run in of.values()] for way, of in ways.items()}
    print_table("Overlap of the first r trained columns with the first r singular vectors", ranks, agreed)
    print_table("Overlap of the first r singular vectors of two runs", ranks, found["overlaps"])
    norms = {way: [[run["norm"]] for run in of.values()] for way, of in ways.items()}
    print_table("Norm of the update, mean over the layers", ["norm"], norms)


def print_table(title: str, columns: list[str], rows: dict[str, list[list[float]]], unit: float = 1) -> None:
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, runs in rows.items():
        print(f"| {name} | {' | '.join(cells(runs, unit))} |")


def cells(runs: list[list[float]], unit: float) -> Iterator[str]:
    for values in zip(*runs, strict=True):
        spread = f" ({unit * stdev(values):.3f})" if len(values) > 1 else ""
        yield f"{unit * fmean(values):.3f}{spread}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    main()
