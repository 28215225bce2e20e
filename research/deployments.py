"""Deploy a trained adapter of a study at each rank."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from matryoshka_lora import NestedAdapter
from research.training import (
    AnswerTrainer,
    Factors,
    Trained,
    score,
)

Deployment = Callable[[Trained], Iterator[tuple[NestedAdapter, int]]]
"""Yields the adapter of each nested rank in turn, and the rank at which to use it."""

SQUEEZE_SHARE = 0.5
"""LoRA-Squeeze trains on at most this share of the run's examples, as ``trained`` does."""

SQUEEZE_EXAMPLES_PER_STEP = 16

SQUEEZE_SMALLEST_GAP = 0.02
"""In nats: LoRA-Squeeze does not train a rank that is within this of R."""

SQUEEZE_VALIDATION_EXAMPLES = 64

SQUEEZE_EXPONENT = 0.2
"""At rank r, LoRA-Squeeze multiplies the learning rate of R by (R / r) to the power of this."""


def prefix(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    """Use the first columns at the scale of their rank: the paper's deployment, or truncation."""
    adapter = trained.new_adapter("paper")
    for rank in trained.ranks:
        yield adapter, rank


def kept(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    """Use the first columns with the entries of P that they were trained with."""
    adapter = trained.new_adapter()  # rank R has the diagonal of the training
    for rank in trained.ranks:
        adapter.factors.write(_truncate(trained.factors, rank))
        yield adapter, trained.ranks[-1]


def svd(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    """Reorder the factors by SVD."""
    adapter = trained.new_adapter()
    adapter.reorder()
    adapter.model.eval()
    for rank in trained.ranks:
        yield adapter, rank


def trained_ranks(
    trained: Trained, name: str = "trained", share: float | None = None
) -> Iterator[tuple[NestedAdapter, int]]:
    """Reorder the factors by SVD, and train the low ranks.

    Args:
        trained: The adapter.
        name: The name of the deployment.
        share: The number of examples, relative to the run. Defaults to the study's, or to the
            package's.
    """
    if len(trained.ranks) == 1:  # there is no smaller rank to train
        yield from svd(trained)
        return
    adapter = trained.new_adapter()
    trainer = trained.trainer
    max_examples = trained.study.max_examples if share is None else share
    result = adapter.train_ranks(trainer, max_examples=max_examples, seed=trainer.args.seed)
    trained.details[name] = {
        "outcome": result.outcome,
        "small_rank": result.small_rank,
        "examples_by_rank": {str(r): count for r, count in result.examples_by_rank.items()},
    }
    adapter.model.eval()
    for rank in trained.ranks:
        yield adapter, rank


def squeezed(trained: Trained) -> Iterator[tuple[NestedAdapter, int]]:
    """Truncate to a rank by SVD and train on, from each rank to the next smaller one.

    This is LoRA-Squeeze (arXiv 2602.10993) with training after each truncation, and a file for each
    rank. A rank within `SQUEEZE_SMALLEST_GAP` nats of R needs no training. Ranks that
    training has made worse are kept, as there is no validation.
    """
    *smaller_ranks, max_rank = trained.ranks
    adapter = trained.new_adapter()
    trainer = trained.trainer
    adapter.reorder()
    factors_by_rank = {max_rank: adapter.factors.copy()}
    good_loss = _validation_loss(adapter, trainer) + SQUEEZE_SMALLEST_GAP
    num_examples = trainer.args.max_steps * trainer.args.per_device_train_batch_size
    steps_left = int(SQUEEZE_SHARE * num_examples) // SQUEEZE_EXAMPLES_PER_STEP
    for index in reversed(range(len(smaller_ranks))):
        rank = smaller_ranks[index]
        if rank != smaller_ranks[-1]:
            adapter.reorder()
        # The zeros have no gradient, and stay zero.
        adapter.factors.write(_truncate(adapter.factors.copy(), rank))
        if _validation_loss(adapter, trainer) > good_loss:
            steps = steps_of_largest(smaller_ranks[: index + 1], steps_left)
            _train_on(adapter, trainer, steps, rank, max_rank)
            steps_left -= steps
        factors_by_rank[rank] = adapter.factors.copy()
    for rank in trained.ranks:
        adapter.factors.write(factors_by_rank[rank])
        adapter.set_rank(max_rank)
        yield adapter, max_rank  # the columns after the rank are zero


def _validation_loss(adapter: NestedAdapter, trainer: AnswerTrainer) -> float:
    examples: Any = trainer.eval_dataset or trainer.train_dataset
    count = min(SQUEEZE_VALIDATION_EXAMPLES, len(examples))
    loss, _ = score(adapter.model, trainer, examples.select(range(count)))
    return loss


def steps_of_largest(ranks: Sequence[int], steps: int) -> int:
    """Return the steps of the largest of some ranks: half the rank gets twice the steps."""
    return round(steps / ranks[-1] / sum(1 / rank for rank in ranks))


def _truncate(factors: Factors, rank: int) -> Factors:
    """Return factors whose columns of B and rows of A are zero after a rank."""
    truncated: Factors = {}
    for name, (A, B) in factors.items():
        is_kept = torch.arange(len(A)) < rank
        truncated[name] = A * is_kept[:, None], B * is_kept
    return truncated


def _train_on(
    adapter: NestedAdapter, trainer: AnswerTrainer, steps: int, rank: int, max_rank: int
) -> None:
    """Train the factors of a rank for some steps, with the data of a Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        args = replace(
            trainer.args,
            output_dir=folder,
            max_steps=steps,
            learning_rate=trainer.args.learning_rate * (max_rank / rank) ** SQUEEZE_EXPONENT,
            per_device_train_batch_size=SQUEEZE_EXAMPLES_PER_STEP,
            seed=trainer.args.seed + rank,
        )
        new_trainer = AnswerTrainer(
            model=adapter.model,
            args=args,
            train_dataset=trainer.train_dataset,
            processing_class=trainer.processing_class,
        )
        new_trainer.train()
    adapter.model.eval()


FUNCTIONS: dict[str, Deployment] = {
    "prefix": prefix,
    "kept": kept,
    "svd": svd,
    "trained": trained_ranks,
    "trained-0.25": partial(trained_ranks, name="trained-0.25", share=0.25),
    "trained-1.0": partial(trained_ranks, name="trained-1.0", share=1.0),
    "squeezed": squeezed,
}
"""The deployments by the names of `research.study.DEPLOYMENTS`."""
