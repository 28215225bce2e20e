"""What ``report.html`` and the page of ``matryoshka play`` draw alike: the curve, and questions with their answers.

They draw it in the browser, by one script with one style sheet.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

_CHARACTERS = 600


def part(name: str) -> str:
    """The text of ``drawing.js``, ``drawing.css`` or ``page.html``."""
    return (files("matryoshka_lora.evaluation") / name).read_text(encoding="utf-8")


def question(example: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """A line of ``examples.jsonl`` as the script takes it; prompts and answers are shortened."""
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
