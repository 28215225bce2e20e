"""Rows of tokens, Trainers of them, and what the tests of reordering from data look at."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from matryoshka_lora import NestedAdapter

Row = dict[str, list[int]]


def some_rows(count: int, seed: int = 0, answers: Sequence[int] = (50, 51)) -> list[Row]:
    """Return rows of four random tokens, no two alike, and an answer of two of the given ones."""
    draw = random.Random(seed)
    heads: dict[tuple[int, ...], Row] = {}
    while len(heads) < count:
        head = tuple(draw.randrange(10, 40) for _ in range(4))
        answer = answers if len(answers) == 2 else [draw.choice(answers) for _ in range(2)]
        heads.setdefault(head, {"input_ids": [*head, *answer], "labels": [-100] * 4 + [*answer]})
    return list(heads.values())


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Return rows of one length as a batch."""
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


class WatchedTrainer(Trainer):
    """A Trainer that notes the rows that it computes a loss of, with gradients and without."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        noted = self.__dict__.setdefault("taught" if torch.is_grad_enabled() else "judged", [])
        noted += [tuple(row) for row in inputs["input_ids"].tolist()]
        return super().compute_loss(model, inputs, *args, **kwargs)


def trainer_of(
    model: Any, folder: Path, rows: list[Row], held_out: list[Row] | None = None, **more: Any
) -> Any:
    """Return a Trainer of rows, which has not trained yet."""
    given = {"per_device_train_batch_size": 8, "learning_rate": 2e-2, "seed": 0, **more}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    args = TrainingArguments(str(folder / "trainer"), **{**quiet, **given})
    return WatchedTrainer(
        model, args, train_dataset=rows, eval_dataset=held_out, data_collator=collate
    )


def all_factors(adapter: NestedAdapter) -> list[Tensor]:
    """Return copies of all factors."""
    return [p.detach().clone() for n, p in adapter.model.named_parameters() if "lora_" in n]


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Return whether tensors are equal."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def loss_of(adapter: NestedAdapter, rows: list[Row], rank: int) -> float:
    """Return the model's own loss of rows at a rank."""
    q = (torch.arange(adapter.nesting.max_rank) < rank).double()
    with torch.no_grad(), adapter.override(q):
        return float(adapter.model.eval()(**collate(rows)).loss)
