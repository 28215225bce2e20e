"""What is asked and how it is judged, in the tokens that training sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.data.sources import load_data, parse_data
from matryoshka_lora.data.tasks import Example, get_task
from matryoshka_lora.errors import MatryoshkaError

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One question of a file, in TRL's prompt-completion form: both text, or both chat messages."""

    prompt: str | Messages
    completion: str | Messages


Question = Example | Row
"""A built-in task's question, or a file's."""


class Judge(Protocol):
    """What tells right answers from wrong ones; `matryoshka_lora.data.tasks.Task` is one."""

    @property
    def name(self) -> str:
        """For titles and messages."""

    def is_correct(self, answer: str, example: Any) -> bool:
        """Whether an answer to the question is right."""


@dataclass(frozen=True)
class ExactMatch:
    """Right is what equals the row's completion, but for white space at both ends."""

    name: str

    def is_correct(self, answer: str, example: Row) -> bool:
        return answer.strip() == text_of(example).strip()


def rows_from(data: Iterable[Mapping[str, Any]], source: str) -> list[Row]:
    """Rows as `matryoshka_lora.data.sources.load_data` gives them, as questions; of a chat, the last answer is asked.

    Args:
        data: Rows with ``prompt`` and ``completion``, or with ``messages``.
        source: Their file, for messages.

    Raises:
        MatryoshkaError: A row has no answer to compare with, or is no such row.
    """
    rows = []
    for number, row in enumerate(data, start=1):
        if not isinstance(row, Mapping):
            raise MatryoshkaError(
                f"{source}, row {number} is {row!r:.60}; expected a mapping with prompt and completion, or messages"
            )
        if row.get("tools"):
            raise MatryoshkaError(f"{source}, row {number} has tools, which evaluation does not know: leave it out")
        found: list[Any] = [row.get(key) for key in ("prompt", "completion", "messages")]
        prompt, completion, messages = found
        if prompt is not None and completion is not None:
            texts = isinstance(prompt, str) and isinstance(completion, str)
            if not texts and not (_is_chat(prompt) and _is_chat(completion)):
                raise MatryoshkaError(
                    f"{source}, row {number}: prompt is {prompt!r:.60} and completion {completion!r:.60}; expected two "
                    "texts, or two lists of messages"
                )
            rows.append(Row(prompt, completion))
        elif _is_chat(messages) and len(messages) > 1 and messages[-1].get("role") == "assistant":
            rows.append(Row(messages[:-1], messages[-1:]))
        else:
            raise MatryoshkaError(
                f"{source}, row {number} has no answer to compare with: evaluation needs prompt and completion, or "
                "messages that end with the assistant's"
            )
    return rows


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(m, Mapping) for m in value)


def rows_of(data: str | Sequence[Mapping[str, Any]], count: int, template: str | None = None) -> Sequence[Question]:
    """Up to ``count`` first rows of a built-in task's training split, of a file, of a hub dataset, or of a list.

    ``template`` is as in `matryoshka_lora.data.sources.load_data`.

    Raises:
        MatryoshkaError: The data cannot be found or read, or its rows have no answers.
    """
    if not isinstance(data, str):
        return rows_from(data, "data")[:count]
    parsed = parse_data(data)
    if "task" in parsed:
        return get_task(parsed["task"]).examples("train", count)
    return rows_from(load_data({**parsed, "size": count}, template), data)


@dataclass(frozen=True)
class Tokens:
    """One question in tokens.

    Attributes:
        context: What the model reads, without loss.
        completion: What is predicted from there on, with the end of the turn and what the template puts after it.
        prompt: What generation starts from. The same as ``context``, unless the chat template writes a prompt that is
            not yet answered differently, or the prompt's end and the answer's begin share a token.
    """

    context: list[int]
    completion: list[int]
    prompt: list[int]


def tokenize(tokenizer: PreTrainedTokenizerBase, question: Question) -> Tokens:
    """The tokens of a question and its reference answer, exactly as TRL's ``SFTTrainer`` makes them for training.

    A built-in task's question is one user's and one assistant's message. Text is taken without chat template and
    ends with the tokenizer's end-of-sequence token. The completion begins where the tokens of the prompt and those of
    the whole part ways; its first token is never the whole's, which nothing predicts.

    Raises:
        MatryoshkaError: The tokenizer has no chat template, or the prompt or the answer is empty.
    """
    prompt, completion = _as_trained(tokenizer, question)
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
        whole = tokenizer(prompt + completion)["input_ids"]
    else:
        prompt_ids = _template(tokenizer, prompt, add_generation_prompt=True)
        whole = _template(tokenizer, [*prompt, *completion])
    length = max(common_prefix(prompt_ids, whole), 1)
    if not prompt_ids or length >= len(whole):
        raise MatryoshkaError(f"a question has an empty {'answer' if prompt_ids else 'prompt'}: {question!r:.200}")
    return Tokens(context=whole[:length], completion=whole[length:], prompt=prompt_ids)


def end_texts(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Tokens]) -> list[str]:
    """The special tokens that end the reference answers: some templates end a turn with another than the tokenizer."""
    ends = {token for one in questions for token in one.completion[_end(tokenizer, one.completion) :][:1]}
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(ends)]


def answer_text(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, skip_special_tokens: bool = True) -> str:
    """The reference answer as a model writes it that has learned it: with what the chat template puts before it."""
    answer = tokens.completion[: _end(tokenizer, tokens.completion)]
    return str(tokenizer.decode(answer, skip_special_tokens=skip_special_tokens))


def openings(tokenizer: PreTrainedTokenizerBase, question: Question, tokens: Tokens) -> tuple[str, ...]:
    """What a chat template puts before the answer, without and with special tokens: an empty ``<think>`` for example.

    It is trained, so the model writes it, and it is no part of the answer.
    """
    if not is_chat(question):
        return ()
    reference = text_of(question).strip()
    texts = [answer_text(tokenizer, tokens, skip).rstrip() for skip in (True, False)]
    found = [text.removesuffix(reference).strip() for text in texts if text.endswith(reference)]
    return tuple(text for text in dict.fromkeys(found) if text)


def is_chat(question: Question) -> bool:
    """Whether the tokenizer's chat template writes it."""
    return isinstance(question, Example) or not isinstance(question.prompt, str)


def text_of(question: Question) -> str:
    """The reference answer.

    Raises:
        MatryoshkaError: It is a message without text.
    """
    completion = question.completion
    found = completion if isinstance(completion, str) else completion[-1].get("content")
    if not isinstance(found, str):
        raise MatryoshkaError(
            f"the answer {completion!r:.200} has no text to compare with: evaluation needs a last message whose "
            "content is text"
        )
    return found


def _end(tokenizer: PreTrainedTokenizerBase, completion: Sequence[int]) -> int:
    """Where the special tokens begin that end a completion, with white space among them; its length if there are none.

    Where a template puts text behind them, the first special token counts.
    """
    special, end = set(tokenizer.all_special_ids), len(completion)
    for place in reversed(range(len(completion))):
        if completion[place] in special:
            end = place
        elif tokenizer.decode([completion[place]]).strip():
            break
    if end < len(completion):
        return end
    return next((place for place, token in enumerate(completion) if token in special), end)


def _as_trained(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[Any, Any]:
    """Prompt and completion as TRL trains on them: two lists of chat messages, or two texts, the second one ended.

    Raises:
        MatryoshkaError: They are chat, and the tokenizer has no chat template.
    """
    prompt, completion = question.prompt, question.completion
    if isinstance(question, Example):
        prompt = [{"role": "user", "content": question.prompt}]
        completion = [{"role": "assistant", "content": question.completion}]
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion + ("" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token)
    if not tokenizer.chat_template:
        raise MatryoshkaError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template and the questions are chat: take "
            "an instruction-tuned model, or data with prompt and completion as text"
        )
    return prompt, completion


def pad_rows(rows: Sequence[Tokens], pad: int, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts with their completions as one batch, padded on the right.

    Returns:
        The tokens, shape (rows, tokens); which of them are no padding; and which belong to a completion.
    """
    whole = [row.context + row.completion for row in rows]
    longest = max(map(len, whole))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in whole], device=device)
    position = torch.arange(longest, device=device)
    is_token = torch.stack([position < len(row) for row in whole])
    is_answer = torch.stack([is_token[i] & (position >= len(row.context)) for i, row in enumerate(rows)])
    return ids, is_token, is_answer


def _template(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
    return ids


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
