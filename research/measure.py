"""What an adapter is worth at a rank, on questions with one right answer."""

from __future__ import annotations

from typing import Any

import torch

from matryoshka_lora import NestedAdapter
from research.trainers import AnswerTrainer, answer_logits


@torch.no_grad()
def measure(adapter: NestedAdapter, trainer: AnswerTrainer, rank: int, data: Any = None) -> tuple[float, float]:
    """The loss in nats per token of the answers, and the share of questions that greedy decoding answers to the letter.

    Args:
        adapter: In eval mode.
        trainer: Makes the batches, with the tokens that training has.
        rank: Where the adapter is measured.
        data: Tokenised rows; None is the Trainer's held-out ones.
    """
    adapter.set_rank(rank)
    nats, tokens, right, rows = 0.0, 0, 0, 0
    for inputs in trainer.get_eval_dataloader(data):
        here = trainer._prepare_inputs(inputs)
        logits, targets = answer_logits(adapter.model, here)
        each = logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
        row = (here["labels"][:, 1:] != -100).nonzero()[:, 0]
        wrong = torch.zeros(len(here["labels"]), device=row.device).index_add(0, row, (logits.argmax(-1) != targets).float())
        nats -= float(each.double().sum())
        tokens, right, rows = tokens + len(targets), right + int((wrong == 0).sum()), rows + len(wrong)
    return round(nats / tokens, 6), round(right / rows, 6)
