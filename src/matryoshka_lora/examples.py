"""Examples of training and evaluation data: prompts with completions. Nothing heavy is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from matryoshka_lora.errors import MatryoshkaError, short, wrap_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_JSON_ERRORS = (ValueError, RecursionError)


class PromptCompletion(NamedTuple):
    """A prompt and its completion.

    Attributes:
        prompt: A string, or a list of messages.
        completion: A string, or a list of messages, as the prompt.
        template_kwargs: Keyword arguments of the tokenizer's ``apply_chat_template``, such as
            ``tools``.
    """

    prompt: str | list[Any]
    completion: str | list[Any]
    template_kwargs: dict[str, Any]


def read_examples(data: Iterable[object] | str | os.PathLike[str]) -> list[object]:
    """Return the examples of a dataset, a list, or a JSON lines file.

    Args:
        data: A dataset or another iterable of examples, or the path of a file with a JSON object in
            each line. Empty lines are skipped.

    Raises:
        MatryoshkaError: The file cannot be read, or there are no examples.
    """
    if isinstance(data, (str, os.PathLike)):
        data = _read_json_lines(data)
    examples = list(data)
    if not examples:
        raise MatryoshkaError(
            f"{short(data)} has no examples. Pass examples with a prompt and a completion."
        )
    return examples


def _read_json_lines(file: str | os.PathLike[str]) -> list[object]:
    hint = "Write one JSON object per line."
    with wrap_errors(f"Cannot read {file}", "Pass the path of a JSON lines file.", OSError):
        content = Path(file).read_bytes()
    with wrap_errors(f"Cannot read {file}", hint, ValueError):
        text = content.decode("utf-8-sig")
    examples: list[object] = []
    # Not splitlines(), which also splits at separators that JSON allows within a string.
    for line_number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            with wrap_errors(f"Cannot read line {line_number} of {file}", hint, _JSON_ERRORS):
                example = json.loads(line)
                # Half of a surrogate pair cannot be encoded, nor tokenized.
                json.dumps(example, ensure_ascii=False).encode()
                examples.append(example)
    return examples


def prompt_and_completion(example: object, index: int) -> PromptCompletion:
    """Return the prompt and the completion of an example.

    Args:
        example: A mapping with ``prompt`` and ``completion``, both strings or both lists of
            messages; or with ``messages``, the last of which is the assistant's and becomes the
            completion. ``tools`` and ``chat_template_kwargs`` are passed to the chat template, as
            TRL does.
        index: Its index in the data, from 0, for messages.

    Raises:
        MatryoshkaError: The example is not such a mapping.
    """
    fields = dict(example) if isinstance(example, Mapping) else {}
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if prompt is None:
        prompt, completion = _split_messages(fields.get("messages"))
    are_strings = isinstance(prompt, str) and isinstance(completion, str)
    are_messages = isinstance(prompt, list) and isinstance(completion, list)
    if not (are_strings or are_messages) or not prompt or not completion:
        raise MatryoshkaError(
            f"Example {index} of the data is {short(example)}. Pass examples with a prompt and a "
            "completion, both strings or both lists of messages, or with messages that end with "
            "the assistant's."
        )
    tools = fields.get("tools")
    action = f"Cannot read the tools or chat_template_kwargs of example {index}"
    with wrap_errors(action, exceptions=(TypeError, *_JSON_ERRORS)):
        if isinstance(tools, str):  # a column of a dataset holds them as JSON
            tools = json.loads(tools)
        template_kwargs = {"tools": tools, **(fields.get("chat_template_kwargs") or {})}
    return PromptCompletion(prompt, completion, template_kwargs)


def _split_messages(messages: object) -> tuple[list[Any] | None, list[Any] | None]:
    """Return the messages before the assistant's last one, and that one; None for other values."""
    if (
        isinstance(messages, list)
        and messages
        and all(isinstance(message, Mapping) for message in messages)
        and messages[-1].get("role") == "assistant"
    ):
        return messages[:-1], messages[-1:]
    return None, None


def common_prefix_length(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the number of items with which both sequences begin."""
    for index, (item_a, item_b) in enumerate(zip(a, b, strict=False)):
        if item_a != item_b:
            return index
    return min(len(a), len(b))


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase, chat: PromptCompletion, index: int, **options: Any
) -> tuple[Any, Any]:
    """Apply the tokenizer's chat template to the messages of an example.

    Args:
        tokenizer: The tokenizer with the chat template.
        chat: From `prompt_and_completion`, with messages.
        index: The index of the example in the data, from 0, for messages.
        options: Further keyword arguments of ``tokenizer.apply_chat_template``, such as
            ``tokenize=False``.

    Returns:
        The result of the template for the prompt, with the generation prompt, and the result for
        the prompt with the completion.

    Raises:
        MatryoshkaError: The tokenizer has no chat template, or the template rejects the messages.
    """
    kwargs = {**chat.template_kwargs, **options}
    messages = [*chat.prompt, *chat.completion]
    action = f"Cannot apply the chat template to example {index} of the data"
    with wrap_errors(action, "A prompt and a completion that are strings need no template."):
        prompt = tokenizer.apply_chat_template(chat.prompt, add_generation_prompt=True, **kwargs)
        full = tokenizer.apply_chat_template(messages, **kwargs)
    return prompt, full
