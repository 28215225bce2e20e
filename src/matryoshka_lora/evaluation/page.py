"""``report.html``: an evaluation to look at, in one file that asks nothing of the network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

PAGE_NAME = "report.html"

MOST_EXAMPLES = 1000
"""Of each task: a browser is slow with a file of many megabytes. ``examples.jsonl`` has all."""

_CHARACTERS = 600
_PLACE = "{{evaluation}}"


def page(evaluation: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    """The text of ``report.html``.

    Args:
        evaluation: The content of ``evaluation.json``.
        examples: The lines of ``examples.jsonl``. Of a task with more than `MOST_EXAMPLES`, those stay that ranks score
            differently, as far as there is room; prompts and answers are shortened.
    """
    by_task: dict[str, list[dict[str, Any]]] = {name: [] for name in evaluation["tasks"]}
    for example in examples:
        metric = evaluation["tasks"][example["task"]]["metric"]
        by_task[example["task"]].append(_short(example, metric))
    shown = {name: _those_shown(rows) for name, rows in by_task.items()}
    counts = {name: len(rows) for name, rows in by_task.items()}
    data = json.dumps(
        {"evaluation": evaluation, "examples": shown, "all": counts},
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )
    template = (files("matryoshka_lora.evaluation") / "page.html").read_text(encoding="utf-8")
    # Inside a script element, only "<" can begin something else: "</script>", or "<!--".
    return template.replace(_PLACE, data.replace("<", "\\u003c"), 1)


def _short(example: Mapping[str, Any], metric: str) -> dict[str, Any]:
    prompt = example["prompt"]
    return {
        "id": example["doc_id"],
        # The question is at the end, after the shots.
        "prompt": prompt if len(prompt) <= _CHARACTERS else "…" + prompt[-_CHARACTERS:],
        "target": _cut(example["target"]),
        "answers": {rank: _cut(answer) for rank, answer in example["answers"].items()},
        "scores": example["metrics"].get(metric, {}),
    }


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "…"


def _those_shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def agrees(row: dict[str, Any]) -> bool:
        return len({score for rank, score in row["scores"].items() if rank != "0"}) <= 1

    return sorted(sorted(rows, key=agrees)[:MOST_EXAMPLES], key=lambda row: row["id"])
