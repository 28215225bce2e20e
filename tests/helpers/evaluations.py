"""Evaluations with known answers."""

from __future__ import annotations

import math
from typing import Any

from matryoshka_lora.evaluation.results import Evaluation, Example, Metric, TaskResult

RANKS = (1, 2, 4, 8)
NUM_EXAMPLES = 60
NUM_CORRECT = {0: 20, 1: 20, 2: 40, 4: 56, 8: 57}
"""By rank; these are the first examples."""


def new_evaluation(
    *tasks: str,
    num_correct: dict[int, int] = NUM_CORRECT,
    higher_is_better: bool | None = True,
    **settings: Any,
) -> Evaluation:
    """Return an evaluation of 60 examples per task, of which rank r answers the first ones."""
    sizes = {rank: 100 * rank for rank in RANKS}
    evaluation = Evaluation({"adapter": "runs/lora", **settings}, RANKS, sizes)
    for task in tasks or ("family",):
        values = {rank: count / NUM_EXAMPLES for rank, count in num_correct.items()}
        errors = {
            rank: math.sqrt(value * (1 - value) / (NUM_EXAMPLES - 1))
            for rank, value in values.items()
        }
        metric = Metric(higher_is_better, dict(values), dict(errors))
        evaluation.tasks[task] = TaskResult(
            NUM_EXAMPLES, 2, "acc,none", 0.5, 0.6, {"acc,none": metric}
        )
        for doc_id in range(NUM_EXAMPLES):
            prompt = f"question {doc_id}\u2028?"  # Unicode's separator of lines is part of a text
            answers = {rank: f"answer {doc_id} of <{rank}>" for rank in num_correct}
            is_correct = {rank: float(doc_id < count) for rank, count in num_correct.items()}
            metrics = {"acc,none": is_correct}
            evaluation.examples.append(Example(task, doc_id, prompt, "<b>", answers, metrics))
    return evaluation
