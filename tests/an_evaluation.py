"""A small evaluation, as ``matryoshka eval`` writes it, for the tests of what is made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

RANKS = (1, 2, 4, 8)


def example(task: str, number: int, scores: Mapping[int, float], **other: Any) -> dict[str, Any]:
    """A line of ``examples.jsonl``; rank 0 is the base model."""
    answers = {str(rank): "aunt" if score else f"uncle {number % 3}" for rank, score in scores.items()}
    by_rank = {str(rank): score for rank, score in scores.items()}
    line = {"task": task, "doc_id": number, "prompt": f"Question number {number}?", "target": "aunt"}
    return {**line, "answers": answers, "metrics": {"acc,none": by_rank}, **other}


def evaluation(examples: Sequence[Mapping[str, Any]], **other: Any) -> dict[str, Any]:
    """The ``evaluation.json`` of these examples: means, and standard errors as the harness has them."""
    tasks: dict[str, Any] = {}
    for task in dict.fromkeys(line["task"] for line in examples):
        scores = [line["metrics"]["acc,none"] for line in examples if line["task"] == task]
        columns = {rank: [score[str(rank)] for score in scores] for rank in (0, *RANKS)}
        value = {rank: fmean(column) for rank, column in columns.items()}
        error = {rank: stdev(column) / math.sqrt(len(column)) for rank, column in columns.items()}
        base = {"value": value.pop(0), "stderr": error.pop(0)}
        first = {"higher_is_better": True, "value": [*value.values()], "stderr": [*error.values()], "base": base}
        tasks[task] = {
            "kind": "harness",
            "items": len(scores),
            "num_fewshot": 5,
            "metric": "acc,none",
            "aurac": {"log2": 0.41, "linear": 0.42},
            "metrics": {"acc,none": first},
        }
    return {
        "format": 3,
        "model": "smollm2-135m",
        "dtype": "bfloat16",
        "adapter": {"name": "matryoshka, reordered by svd", "path": "runs/demo/adapter"},
        "mode": "exact",
        "ranks": [*RANKS],
        "bytes": [115_200 * rank for rank in RANKS],
        "latency_ms": [34.0 + rank / 10 for rank in RANKS],
        "tasks": tasks,
        "versions": {"lm_eval": "0.4.13"},
        **other,
    }


def some_examples(task: str = "family", questions: int = 60) -> list[dict[str, Any]]:
    """Rank 1 fails at more than rank 2; ranks 4 and 8 agree but for one question."""
    return [
        example(
            task,
            number,
            {0: float(number % 10 == 0), 1: float(number % 3 == 0), 2: float(number % 3 != 1), 4: float(number > 3)}
            | {8: float(number > 2)},
        )
        for number in range(questions)
    ]


def write(folder: Path, examples: Sequence[Mapping[str, Any]] | None, **other: Any) -> Path:
    """Both files; without examples, those of `some_examples` are evaluated but not written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "evaluation.json"
    file.write_text(json.dumps(evaluation(examples or some_examples(), **other)))
    if examples is not None:
        (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in examples))
    return file
