"""Examples: reading them, and splitting them into prompt and completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_chat import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.examples import (
    PromptCompletion,
    apply_chat_template,
    common_prefix_length,
    prompt_and_completion,
    read_examples,
)

USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_json_lines_file_is_read(tmp_path: Path, encoding: str) -> None:
    examples = [{"prompt": "ä\u2028b", "completion": "c"}, {"prompt": "d", "completion": "e"}]
    file = tmp_path / "examples.jsonl"
    lines = [json.dumps(example, ensure_ascii=False) for example in examples]
    file.write_text("\n\n".join(lines) + "\r\n", encoding=encoding, newline="")
    assert read_examples(file) == examples
    assert read_examples(str(file)) == examples
    assert read_examples(iter(examples)) == examples


@pytest.mark.parametrize(
    ("content", "keyword"),
    [
        (None, "No such file"),
        (b"", "no examples"),
        (b'{"prompt": "a"}\n{"prompt": "a"\n', "line 2"),
        (b"\xff\xfe", "decode"),
        (b"[" * 99_999, "line 1"),
        (rb'{"prompt": "\ud800"}', "line 1"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(
    tmp_path: Path, content: bytes | None, keyword: str
) -> None:
    file = tmp_path / "examples.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(MatryoshkaError, match=keyword):
        read_examples(file)


def test_no_examples_are_an_error() -> None:
    with pytest.raises(MatryoshkaError, match="no examples"):
        read_examples([])


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, ("a", "b", {"tools": None})),
        ({"prompt": [USER], "completion": [ASSISTANT]}, ([USER], [ASSISTANT], {"tools": None})),
        ({"messages": [USER, ASSISTANT]}, ([USER], [ASSISTANT], {"tools": None})),
        (
            {"messages": [USER, ASSISTANT], "tools": "[1]", "chat_template_kwargs": {"x": 2}},
            ([USER], [ASSISTANT], {"tools": [1], "x": 2}),
        ),
        (
            {"prompt": "a", "completion": "b", "chat_template_kwargs": None},
            ("a", "b", {"tools": None}),
        ),
    ],
)
def test_an_example_has_a_prompt_and_a_completion(example: Any, expected: Any) -> None:
    assert prompt_and_completion(example, 0) == expected


@pytest.mark.parametrize(
    "example",
    [
        "a",
        None,
        {},
        {"prompt": "a"},
        {"prompt": "a", "completion": None},
        {"prompt": "", "completion": "a"},
        {"prompt": "a", "completion": 3},
        {"prompt": [USER], "completion": "a"},
        {"messages": [USER]},
        {"messages": [ASSISTANT]},
        {"messages": ["a", ASSISTANT]},
        {"messages": []},
        {"prompt": "a", "completion": "b", "tools": "{"},
        {"input_ids": np.array([1, 2])},
    ],
)
def test_other_examples_are_an_error_that_names_them(example: Any) -> None:
    with pytest.raises(MatryoshkaError, match="xample 7"):
        prompt_and_completion(example, 7)


@given(st.text("ab", max_size=4), st.text("ab", max_size=4), st.text("ab", max_size=4))
def test_common_prefix_length(prefix: str, rest_a: str, rest_b: str) -> None:
    a, b = prefix + rest_a, prefix + rest_b
    length = common_prefix_length(a, b)
    assert length >= len(prefix)
    assert a[:length] == b[:length]
    assert a[length : length + 1] != b[length : length + 1] or length == min(len(a), len(b))


def test_the_chat_template_gets_the_keywords_of_the_example() -> None:
    tokenizer = tiny_tokenizer()
    chat = PromptCompletion([USER], [ASSISTANT], {"tools": None, "end": "!"})
    tokenizer.chat_template += "{{ end }}"
    prompt, full = apply_chat_template(tokenizer, chat, 0, tokenize=False)
    assert prompt == "<s>user\na</s><s>assistant\n!"
    assert full == "<s>user\na</s><s>assistant\nb</s>!"


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_an_error(template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(MatryoshkaError, match="example 7"):
        apply_chat_template(tokenizer, PromptCompletion([USER], [ASSISTANT], {}), 7)
