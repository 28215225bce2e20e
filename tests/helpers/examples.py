"""Tokenized examples, Trainers of them, and what tests of training look at."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from matryoshka_lora import NestedAdapter

Example = dict[str, list[int]]


def random_examples(count: int, seed: int = 0, answers: Sequence[int] = (50, 51)) -> list[Example]:
    """Return examples of four random tokens, all different, and a completion of two tokens.

    Args:
        count: The number of examples.
        seed: The seed of the tokens.
        answers: The tokens of the completion. Of more than two, two are drawn for each example.
    """
    rng = random.Random(seed)
    examples: dict[tuple[int, ...], Example] = {}
    while len(examples) < count:
        prompt = tuple(rng.randrange(10, 40) for _ in range(4))
        completion = list(answers)
        if len(answers) > 2:
            completion = [rng.choice(answers), rng.choice(answers)]
        if prompt not in examples:
            examples[prompt] = {
                "input_ids": [*prompt, *completion],
                "labels": [-100] * 4 + completion,
            }
    return list(examples.values())


def lookup_examples(count: int, seed: int = 0) -> list[Example]:
    """Return examples whose last token before the completion alone determines it.

    They need a rank above 1, and other examples of the same table can validate.
    """
    rng = random.Random(99)
    completions = [[rng.randrange(50, 90), rng.randrange(50, 90)] for _ in range(8)]
    examples = random_examples(count, seed)
    for example in examples:
        completion = completions[example["input_ids"][3] % 8]
        example["input_ids"][4:] = completion
        example["labels"][4:] = completion
    return examples


def collate(examples: list[Example]) -> dict[str, Tensor]:
    """Return examples of one length as a batch."""
    return {
        key: torch.tensor([example[key] for example in examples]) for key in ("input_ids", "labels")
    }


class RecordingTrainer(Trainer):
    """A Trainer that records the tokens of which it computes a loss.

    Attributes:
        trained_on: The tokens of each row whose loss has gradients.
        validated_on: The tokens of each row whose loss has none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trained_on: list[tuple[int, ...]] = []
        self.validated_on: list[tuple[int, ...]] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        record = self.trained_on if torch.is_grad_enabled() else self.validated_on
        record.extend(tuple(row) for row in inputs["input_ids"].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def make_trainer(
    model: Any,
    folder: Path,
    examples: list[Example],
    eval_examples: list[Example] | None = None,
    **arguments: Any,
) -> RecordingTrainer:
    """Return a Trainer that has not trained yet."""
    defaults = {
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-2,
        "seed": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    training_arguments = TrainingArguments(str(folder / "trainer"), **{**defaults, **arguments})
    return RecordingTrainer(
        model,
        training_arguments,
        train_dataset=examples,
        eval_dataset=eval_examples,
        data_collator=collate,
    )


def copy_lora_parameters(adapter: NestedAdapter) -> list[Tensor]:
    """Return copies of all factors of all adapters of the model."""
    return [
        parameter.detach().clone()
        for name, parameter in adapter.model.named_parameters()
        if "lora_" in name
    ]


def all_equal(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether all pairs of tensors are equal to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def loss_at_rank(adapter: NestedAdapter, examples: list[Example], rank: int) -> float:
    """Return the model's own loss of examples at a rank, or at the prefix of unordered factors."""
    q = (torch.arange(adapter.nesting.max_rank) < rank).double()
    if adapter.order is not None:
        q = adapter.state.deployed_q(rank)
    with torch.no_grad(), adapter.use_diagonal(q):
        return float(adapter.model.eval()(**collate(examples)).loss)
