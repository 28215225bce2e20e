"""``python -m research.low_ranks``: compare ways to train the low ranks, on validation seeds.

Each way starts from the same adapter, trained at R and reordered by SVD:

* ``reordered``: nothing is trained.
* ``trained``: `NestedAdapter.train_ranks`.
* ``joint``: every rank from 1 to R is trained, with shares and rates fixed by rank. R moves.
* ``own``: the ranks from 1 to k get columns of their own, which begin as the first k components of
  the adapter. The adapter itself does not change. k is the smallest nested rank whose gap is below
  the tolerance of `train_ranks`. Each rank up to k is the prefix of its own columns or of the
  adapter, whichever has the lower validation loss.

The rule, written before any test seed: the way with the lowest mean loss over log2 of the rank, in
the mean over all studies and seeds, is chosen. A way without columns of its own is simpler, and is
chosen if it is within 0.01 nats. No rank may be worse than after the SVD by more than a standard
error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from matryoshka_lora import NestedAdapter
from matryoshka_lora.training.data import TrainingData, read_training_data
from matryoshka_lora.training.factors import FactorMatrices, ModelFactors
from matryoshka_lora.training.train_ranks import (
    Hyperparameters,
    PrefixAdam,
    RankSchedule,
    loss_and_gradients,
    trainable_factors,
    validation_losses,
)
from research.run import set_up, versions
from research.runs import Job
from research.study import RUNS, load_study
from research.training import AnswerTrainer, Trained, score, trainer_of

RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 28, 32)

KEYS = ("study", "task", "dtype", "seed", "way", "share", "order")
"""The keys of a cell in the file, which is run once."""

RATES = {
    "facts-256": 4e-3,
    "facts-512": 4e-3,
    "chain_sum": 2e-3,
    "family_relationships": 2e-3,
}
"""The learning rate of LoRA at R, chosen on validation examples; `capacity` has 8e-3."""


@dataclass(frozen=True)
class Way:
    """A way to train the low ranks with fixed shares and rates.

    A rank r gets a share of the steps in proportion to 1 / r, and the rate
    ``learning_rate * r ** -exponent``.

    Attributes:
        is_joint: Whether all ranks to R are trained; otherwise the ranks to k, in columns of their
            own.
        exponent: The exponent of the rates.
        examples_per_step: The number of examples of a step.
        learning_rate: The rate of rank 1, relative to the size of each component.
    """

    is_joint: bool
    exponent: float
    examples_per_step: int
    learning_rate: float = 0.1


WAYS = {
    "joint": Way(True, 0.5, 16),
    "own": Way(False, 0.3, 8),
    "own-0.5": Way(False, 0.5, 16),
}


def train_columns(
    factors: ModelFactors,
    max_rank: int,
    data: TrainingData,
    indices: Sequence[int],
    way: Way,
    seed: int,
) -> FactorMatrices:
    """Train the prefixes of the first components, and return all factors. See `train_prefixes`.

    Args:
        factors: The ordered factors, within `trainable_factors`. They are restored.
        max_rank: The largest rank to train.
        data: The examples.
        indices: The indices of the examples to train on.
        way: The shares and rates.
        seed: The seed of the schedule of the ranks.
    """
    options = Hyperparameters()
    original = factors.copy()
    optimizer = PrefixAdam(original)
    total = sum(1 / rank for rank in range(1, max_rank + 1))
    shares = {rank: 1 / rank / total for rank in range(1, max_rank + 1)}
    schedule = RankSchedule(seed)
    num_steps = math.ceil(len(indices) / way.examples_per_step)
    layer_factor = min(1.0, (options.reference_layers / len(factors.parameters)) ** 0.5)
    for step in range(num_steps):
        rank = schedule.next(shares)
        batches = data.batches(
            indices[step * way.examples_per_step : (step + 1) * way.examples_per_step]
        )
        q = torch.ones(factors.max_rank, dtype=torch.float64)
        q[rank:] = options.tail_factor * max(0.0, 1 - step / (options.tail_steps * num_steps))
        with factors.masked(q):
            _, gradients = loss_and_gradients(factors, rank, data, batches)
        warmup = min(1.0, (step + 1) / max(1.0, options.warmup * num_steps))
        rate = way.learning_rate * rank**-way.exponent * warmup * (1 - step / num_steps)
        optimizer.step(gradients, rate * layer_factor)
        factors.write(optimizer.factors())
    trained = factors.copy()
    factors.write(original)
    return trained


def factors_by_rank(
    adapter: NestedAdapter, trainer: AnswerTrainer, way: Way, share: float, order: int
) -> tuple[dict[int, FactorMatrices], dict[str, Any]]:
    """Train the low ranks, and return the factors whose prefix each rank is, and details."""
    factors, nested_ranks = adapter.factors, adapter.nesting.ranks
    options = Hyperparameters()
    data = read_training_data(adapter.model, trainer)
    num_examples = round(share * trainer.args.max_steps * trainer.args.per_device_train_batch_size)
    split = data.split(num_examples, options.max_validation_examples, order)
    with adapter.use_diagonal(torch.ones(factors.max_rank)), trainable_factors(factors) as main:
        before = validation_losses(factors, nested_ranks, data, split.validation_batches)
        base_loss = validation_losses(factors, [0], data, split.validation_batches).mean(0)
        gain = max(0.0, base_loss - before.mean(factors.max_rank))
        tolerance = max(options.rounding, min(options.smallest_gap * gain, options.max_tolerance))
        k = min(rank for rank, gap in before.gaps().items() if gap <= tolerance)
        max_rank = factors.max_rank if way.is_joint else k
        trained = train_columns(factors, max_rank, data, split.training_indices, way, order)
        if way.is_joint:
            return dict.fromkeys(RANKS, trained), {}
        ranks = [rank for rank in RANKS if rank <= k]
        before = validation_losses(factors, ranks, data, split.validation_batches)
        factors.write(trained)
        after = validation_losses(factors, ranks, data, split.validation_batches)
        factors.write(main)
    own_ranks = [rank for rank in ranks if after.mean(rank) < before.mean(rank)]
    return (
        {rank: trained if rank in own_ranks else main for rank in RANKS},
        {"k": k, "own_ranks": own_ranks},
    )


def measure(
    adapter: NestedAdapter,
    trainer: AnswerTrainer,
    examples: Any,
    factors: dict[int, FactorMatrices],
) -> dict[str, list[float]]:
    """Return loss and accuracy at each rank."""
    model = adapter.model.eval()
    curve: dict[str, list[float]] = {"loss": [], "accuracy": []}
    for rank in RANKS:
        adapter.factors.write(factors[rank])
        q = (torch.arange(adapter.factors.max_rank) < rank).double()
        with adapter.factors.masked(q):  # the rank that is set is R
            loss, accuracy = score(model, trainer, examples)
        curve["loss"].append(loss)
        curve["accuracy"].append(accuracy)
    return curve


def run_cell(
    trained: Trained, trainer: AnswerTrainer, name: str, share: float, order: int
) -> dict[str, Any]:
    """Return the numbers of one way."""
    adapter = trained.new_adapter()
    adapter.reorder()
    start, tokens = time.perf_counter(), AnswerTrainer.num_tokens
    details: dict[str, Any] = {}
    if name == "trained":
        num_seen = trainer.args.max_steps * trainer.args.per_device_train_batch_size
        adapter.train_ranks(trainer, max_examples=round(share * num_seen), seed=order)
    if name in WAYS:
        factors, details = factors_by_rank(adapter, trainer, WAYS[name], share, order)
    else:
        factors = dict.fromkeys(RANKS, adapter.factors.copy())
    seconds = round(time.perf_counter() - start, 1)
    tokens = AnswerTrainer.num_tokens - tokens
    curve = measure(adapter, trainer, trained.measured, factors)
    return {**details, "tokens": tokens, "seconds": seconds, **curve}


def main() -> None:
    """Run the cells that are missing in the file, and append each one when it is finished."""
    parser = argparse.ArgumentParser("python -m research.low_ranks", description=__doc__)
    parser.add_argument("study", help="every256, every512, capacity or ordinary")
    parser.add_argument("--task", help="a task of the study; defaults to the first")
    parser.add_argument("--seed", type=int, default=100, help="a validation seed")
    parser.add_argument("--orders", default="0,1", help="seeds of the training of the ranks")
    parser.add_argument("--ways", default="reordered,trained,joint,own,own-0.5")
    parser.add_argument("--shares", default="0.5", help="examples, relative to the run")
    parser.add_argument("--output", type=Path, default=RUNS / "low-ranks.jsonl")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/low-ranks"), help="the trained adapters"
    )
    parser.add_argument("--dtype", default="bf16", help="of the base model; fp32 on a slow CPU")
    options = parser.parse_args()
    study = replace(load_study(options.study), dtype=options.dtype)
    if options.study == "ordinary":  # more questions: accuracies of 50 say little
        study = replace(study, items={**study.items, "validation": 200})
    set_up(study.threads)
    task = options.task or next(iter(study.tasks))
    rate = 8e-3 if options.study == "capacity" else RATES[task]
    job = Job("lora", task, study.rank, rate, options.seed, "validation")
    done: set[tuple[Any, ...]] = set()
    if options.output.exists():
        for line in options.output.read_text().splitlines():
            cell = json.loads(line)
            done.add(tuple(cell[key] for key in KEYS))
    cache = options.cache / f"{options.study}-{task}-{options.dtype}-{options.seed}.safetensors"
    with trainer_of(study, job) as (adapter, trainer, measured):
        if cache.exists():
            tensors = load_file(cache)
            names = {key.rpartition(".")[0] for key in tensors}
            factors = {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}
            # As after training, which `train_ranks` asks for.
            trainer.state.global_step = trainer.args.max_steps
        else:
            trainer.train()
            factors = adapter.factors.copy()
            cache.parent.mkdir(parents=True, exist_ok=True)
            tensors = {}
            for name, (A, B) in factors.items():
                tensors |= {f"{name}.A": A.contiguous(), f"{name}.B": B.contiguous()}
            save_file(tensors, cache)
        trained = Trained(study, job, factors, trainer, measured)
        for order in map(int, options.orders.split(",")):
            for share in map(float, options.shares.split(",")):
                for way in options.ways.split(","):
                    key = (options.study, task, options.dtype, options.seed, way, share, order)
                    if key in done or (way == "reordered" and order != 0):
                        continue
                    cell = dict(zip(KEYS, key, strict=True))
                    cell |= run_cell(trained, trainer, way, share, order)
                    cell["versions"] = versions()
                    with options.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(cell) + "\n")
                    shown = zip(RANKS[:6], cell["loss"], cell["accuracy"], strict=False)
                    numbers = [(r, round(x, 3), round(a, 3)) for r, x, a in shown]
                    print(way, share, order, numbers, file=sys.stderr)


if __name__ == "__main__":
    main()
