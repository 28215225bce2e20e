"""Evaluations with known answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

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
        evaluation.tasks[task] = TaskResult(NUM_EXAMPLES, 2, "acc,none", {"acc,none": metric})
        for doc_id in range(NUM_EXAMPLES):
            prompt = f"question {doc_id}\u2028?"  # Unicode's separator of lines is part of a text
            answers = {rank: f"answer {doc_id} of <{rank}>" for rank in num_correct}
            is_correct = {rank: float(doc_id < count) for rank, count in num_correct.items()}
            metrics = {"acc,none": is_correct}
            evaluation.examples.append(Example(task, doc_id, prompt, "<b>", answers, metrics))
    return evaluation


def evaluation_of(values: np.ndarray[Any, Any], higher_is_better: bool = True) -> Evaluation:
    """Return an evaluation with a value for each example and rank, shape (examples, ranks)."""
    means = dict(zip(RANKS, values.mean(axis=0).tolist(), strict=True))
    metric = Metric(higher_is_better, means, dict.fromkeys(RANKS))
    task = TaskResult(len(values), 0, "m,none", {"m,none": metric})
    sizes = {rank: 100 * rank for rank in RANKS}
    evaluation = Evaluation({"adapter": None}, RANKS, sizes, {"t": task})
    for doc_id, row in enumerate(values.tolist()):
        metrics = {"m,none": dict(zip(RANKS, row, strict=True))}
        evaluation.examples.append(Example("t", doc_id, "", "", {}, metrics))
    return evaluation


def two_metrics(num_tasks: int = 1, with_base: bool = True) -> Evaluation:
    """Return an evaluation with an accuracy and a loss, and without examples."""
    base: dict[int, float | None] = {0: 0.25} if with_base else {}
    tasks = {}
    for index in range(num_tasks):
        accuracy = Metric(True, {**base, 1: 0.5, 2: None, 4: 0.75}, {1: 0.05, 2: None, 4: 0.04})
        loss = Metric(False, {**base, 1: 2.0, 2: 1.5, 4: 1.25}, {1: None, 2: None, 4: None})
        metrics = {"acc,none": accuracy, "loss,none": loss}
        tasks[f"task{index}"] = TaskResult(100, 5, "acc,none", metrics)
    return Evaluation({"adapter": "a"}, (1, 2, 4), {1: 1000, 2: 2000, 4: 4000}, tasks)
