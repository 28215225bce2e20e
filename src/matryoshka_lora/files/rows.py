"""Read rows of text: questions with their answers. Nothing heavy is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matryoshka_lora.errors import MatryoshkaError, explained


def read_rows(data: Any) -> list[Any]:
    """Return the rows of a dataset or a list, or of a file with a JSON object in each line.

    Raises:
        MatryoshkaError: The file cannot be read, or there are no rows.
    """
    rows, place = list[Any](), ""
    if not isinstance(data, (str, os.PathLike)):
        rows = list(data)
    else:
        try:
            for number, line in enumerate(Path(data).read_text("utf-8-sig").split("\n"), start=1):
                place = f" in line {number}"
                rows += [json.loads(line)] if line.strip() else []
        except (OSError, ValueError) as error:
            text = f"{data} cannot be read{place}: {error}. Give a JSON object in each line"
            raise MatryoshkaError(text) from error
    if not rows:
        raise MatryoshkaError(f"{data!s:.80} has no rows: give rows with prompt and completion")
    return rows


def question_and_answer(row: Any, number: int) -> tuple[Any, Any, Any]:
    """Return a row's prompt and completion, texts or lists of messages, and its template's kwargs.

    Raises:
        MatryoshkaError: It has neither these nor messages that end with an answer.
    """
    fields = dict(row) if isinstance(row, Mapping) else {}
    prompt, answer, messages, tools = map(fields.get, ("prompt", "completion", "messages", "tools"))
    turns = [x for x in messages if isinstance(x, Mapping)] if isinstance(messages, list) else []
    if prompt is None and turns and turns[-1].get("role") == "assistant":
        prompt, answer = turns[:-1], turns[-1:]
    if not prompt or not answer or {type(prompt), type(answer)} not in ({str}, {list}):
        raise MatryoshkaError(
            f"row {number} of the data is {row!r:.80}: give rows with prompt and completion, both "
            "text or both messages, or with messages that end with the assistant's"
        )
    tools = json.loads(tools) if isinstance(tools, str) else tools  # as TRL
    return prompt, answer, {"tools": tools, **(fields.get("chat_template_kwargs") or {})}


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how many items two sequences begin with alike."""
    apart = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(apart, min(len(a), len(b)))


def in_template(
    tokenizer: Any, chat: tuple[Any, Any, Any], number: int, **options: Any
) -> tuple[Any, Any]:
    """Return a row's messages by the tokenizer's chat template: the prompt, and the whole.

    ``chat`` is from `question_and_answer`. ``options`` are those of ``apply_chat_template``.

    Raises:
        MatryoshkaError: There is no template, or it refuses the messages.
    """
    prompt, answer, kwargs = chat
    written = partial(tokenizer.apply_chat_template, **kwargs, **options)
    with explained(f"the chat template cannot write row {number} of the data", "Texts need none"):
        return written(prompt, add_generation_prompt=True), written([*prompt, *answer])
