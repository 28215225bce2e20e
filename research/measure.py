"""What an adapter is worth at a rank, on questions with one right answer."""

from __future__ import annotations

from typing import Any

import torch

from matryoshka_lora import NestedAdapter
from research.trainers import AnswerTrainer, answer_logits


def measure(adapter: NestedAdapter, trainer: AnswerTrainer, rank: int, data: Any = None) -> tuple[float, float]:
    """`score` of an adapter at a rank."""
    adapter.set_rank(rank)
    return score(adapter.model, trainer, data)


@torch.no_grad()
def score(model: Any, trainer: AnswerTrainer, data: Any = None) -> tuple[float, float]:
    """The loss in nats per token of the answers, and the share of questions that greedy decoding answers to the letter.

    Args:
        model: In eval mode.
        trainer: Makes the batches, with the tokens that training has.
        data: Tokenised rows; None is the Trainer's held-out ones.
    """
    nats, tokens, right, rows = 0.0, 0, 0, 0
    for batch in trainer.get_eval_dataloader(data):
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        logits, targets = answer_logits(model, inputs)
        each = logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
        row = (inputs["labels"][:, 1:] != -100).nonzero()[:, 0]
        misses = torch.bincount(row[logits.argmax(dim=-1) != targets], minlength=len(inputs["labels"]))
        nats, tokens = nats - float(each.double().sum()), tokens + len(targets)
        right, rows = right + int((misses == 0).sum()), rows + len(misses)
    return round(nats / tokens, 6), round(right / rows, 6)
