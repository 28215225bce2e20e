"""``python -m research.reordering``: reorder by SVD, and by the SVD that examples weight.

Adapters of the studies are trained again in float32, and reordered. Nothing else is trained. Each
is truncated, to one rank for all layers or to a file of the same size with the ranks that
`Lora.truncate` allocates. A line of ``runs/reordering.jsonl`` has the Kullback-Leibler divergence
from the whole adapter, in nats per token of the answers: over test questions of generated tasks,
which are in no training, or over the facts, where there are no others.

The orders:

* ``svd``: `NestedAdapter.reorder` without examples.
* ``16``, ``128``: with as many training examples.
* ``other``: with 128 examples of another task; for facts, of other facts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka_lora import NestedAdapter
from research.run import set_up, versions
from research.runs import Job
from research.study import RUNS, Study, load_study
from research.training import AnswerTrainer, Trained, label_log_probabilities, trainer_of

RANKS = (2, 4, 8)
"""The ranks that each adapter of rank 32 is truncated to: 6, 12.5 and 25 % of its parameters."""

NUM_QUESTIONS = 100

TASKS = {
    "chain_sum": ("ordinary", 1e-3, (5, 6, 7)),
    "family_relationships": ("ordinary", 2e-3, (5, 6, 7)),
    "facts-256": ("every256", 4e-3, (200, 201, 202)),
    "facts-512": ("every512", 2e-3, (200, 201, 202)),
    "capacity": ("capacity", 4e-3, (200, 201, 202)),
}
"""The study of each task, the rate that it has chosen for `lora/svd`, and the seeds."""

OTHER_TASKS = {"chain_sum": "family_relationships", "family_relationships": "chain_sum"}

OTHER_FACTS = 1000
"""The distance of the seed of other facts."""

ORDERS = {"svd": 0, "16": 16, "128": 128, "other": 128}
"""The number of examples of each order."""


def main() -> None:
    """Run the cells that are missing in the file, and append those of each adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--output", type=Path, default=RUNS / "reordering.jsonl")
    options = parser.parse_args()
    set_up(1)
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done = {(cell["task"], cell["seed"]) for cell in map(json.loads, lines)}
    for name in options.tasks.split(","):
        study_name, rate, seeds = TASKS[name]
        study = replace(load_study(study_name), dtype="fp32")
        if study_name == "ordinary":
            study = replace(study, items={**study.items, "test": NUM_QUESTIONS})
        task = name if name in study.tasks else next(iter(study.tasks))
        for seed in seeds:
            if (name, seed) in done:
                continue
            cells = run(study, Job("lora", task, study.rank, rate, seed, "test"))
            with options.output.open("a", encoding="utf-8") as file:
                for cell in cells:
                    line = {"task": name, "seed": seed, **cell, "versions": versions()}
                    file.write(json.dumps(line) + "\n")


def run(study: Study, job: Job) -> list[dict[str, Any]]:
    """Train an adapter, and return the numbers of each order, rank and allocation."""
    other_job = replace(job, seed=job.seed + OTHER_FACTS)
    if job.task in OTHER_TASKS:
        other_job = replace(job, task=OTHER_TASKS[job.task])
    cells: list[dict[str, Any]] = []
    with trainer_of(study, job) as (adapter, trainer, measured):
        trainer.train()
        trained = Trained(study, job, adapter.factors.copy(), trainer, measured)
        with trainer_of(study, other_job) as (_, other_trainer, _):
            for order, num_examples in ORDERS.items():
                adapter = trained.new_adapter()
                start = time.perf_counter()
                if num_examples:
                    data = other_trainer if order == "other" else trainer
                    adapter.reorder(data, max_examples=num_examples, seed=job.seed)
                else:
                    adapter.reorder()
                seconds = round(time.perf_counter() - start, 2)
                adapter.model.eval()
                for cell in _divergences(adapter, trainer, measured):
                    cells.append({"order": order, "seconds": seconds, **cell})
    return cells


def truncations(adapter: NestedAdapter) -> Iterator[tuple[str, int]]:
    """Truncate an adapter in memory: to each rank, and to a file of its size with ranks by layer.

    Yields:
        The allocation, ``"uniform"`` or ``"allocated"``, and the rank. The adapter is whole again
        at the end.
    """
    factors = adapter.factors.copy()
    lora = adapter.to_lora()
    for rank in RANKS:
        truncated = lora.truncate(rank)
        ways = {"uniform": truncated, "allocated": lora.truncate(max_bytes=truncated.file_size)}
        for allocation, small in ways.items():
            kept = {
                name: (A, B * (torch.arange(B.shape[1]) < small.ranks[name]))
                for name, (A, B) in factors.items()
            }
            adapter.factors.write(kept)
            yield allocation, rank
    adapter.factors.write(factors)


def _divergences(
    adapter: NestedAdapter, trainer: AnswerTrainer, examples: Any
) -> list[dict[str, Any]]:
    """Return the divergence at each rank, and at the same size with ranks by layer."""
    whole = label_log_probabilities(adapter.model, trainer, examples)
    cells: list[dict[str, Any]] = []
    for allocation, rank in truncations(adapter):
        divergence = _divergence(whole, adapter, trainer, examples)
        cells.append({"allocation": allocation, "rank": rank, "divergence": divergence})
    return cells


def _divergence(
    whole: Tensor, adapter: NestedAdapter, trainer: AnswerTrainer, examples: Any
) -> float:
    """Return the Kullback-Leibler divergence from the whole adapter, in nats per token."""
    truncated = label_log_probabilities(adapter.model, trainer, examples)
    terms = whole.exp() * (whole - truncated)
    return round(float(terms.sum(dim=-1).double().mean()), 7)


if __name__ == "__main__":
    main()
