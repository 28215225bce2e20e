"""Examples of the user as a task of the harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.evaluation.tasks import load_data, load_task
from matryoshka_lora.examples import read_examples
from matryoshka_lora.peft.base_model import load_tokenizer

USER = {"role": "user", "content": "Which color?"}
ASSISTANT = {"role": "assistant", "content": "red"}
MESSAGES = [USER, ASSISTANT]
ALWAYS_THINKS = (  # as Qwen3's: an empty thought before an answer without one
    "{% for m in messages %}"
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and '<' not in m.content }}"
    "{{ m.content }};{% endfor %}"
)
SPACE_BEFORE_ANSWER = (  # as Mistral's: the space belongs to the answer
    "{% for m in messages %}"
    "{{ ' ' + m.content + ';' if m.role == 'assistant' else m.content }}{% endfor %}"
)
WITH_KEYWORDS = "{{ tools[0].name }}{{ mark }}{{ messages[1].content if messages[1:] }}"


def load_one(example: dict[str, Any], tokenizer: Any) -> Any:
    """Return the harness's task of one example."""
    (task,) = load_data("mine", [example], tokenizer).harness_tasks["tasks"].values()
    return task


def check_request(task: Any, prompt: str, stop_texts: list[str]) -> None:
    task.build_all_requests()
    request_prompt, settings = task.instances[0].args
    assert request_prompt == prompt
    assert settings["until"] == stop_texts
    assert settings["do_sample"] is False


@pytest.mark.parametrize(
    ("completion", "stop_texts"),
    [(" c ", ["\n"]), ("c\nd", []), ("\nc", [])],
)
def test_prompts_that_are_texts(completion: str, stop_texts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    example = {"prompt": "a b", "completion": completion}
    file.write_text(json.dumps(example) + "\n\n", encoding="utf-8-sig")  # as Windows writes it
    (task,) = (
        load_data("mine", read_examples(file), load_tokenizer()).harness_tasks["tasks"].values()
    )
    check_request(task, "a b", stop_texts)


@pytest.mark.parametrize(
    "example", [{"messages": MESSAGES}, {"prompt": [USER], "completion": [ASSISTANT]}]
)
def test_prompts_that_are_messages(example: dict[str, Any]) -> None:
    tokenizer = load_tokenizer()
    prompt = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    check_request(load_one(example, tokenizer), str(prompt), ["<|im_end|>", "\n"])


@pytest.mark.parametrize(
    ("template", "answer", "prompt"),
    [
        # The template contains these letters, too.
        (ALWAYS_THINKS, "in", "Which color?;<think>\n\n</think>\n\n"),
        # The example's own thought belongs to the answer.
        (ALWAYS_THINKS, "<think>mine</think>in", "Which color?;"),
        (SPACE_BEFORE_ANSWER, "red", "Which color?"),
    ],
)
def test_what_a_template_writes_before_the_answer(template: str, answer: str, prompt: str) -> None:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = template
    messages = [USER, {"role": "assistant", "content": answer}]
    check_request(load_one({"messages": messages}, tokenizer), prompt, [";", "\n"])


def test_keywords_of_the_template() -> None:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = WITH_KEYWORDS
    example = {
        "messages": MESSAGES,
        "tools": '[{"name": "add"}]',
        "chat_template_kwargs": {"mark": ":"},
    }
    check_request(load_one(example, tokenizer), "add:", ["\n"])


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n"])
@pytest.mark.parametrize(("answer", "accuracy"), [(" red \n", 1.0), ("red.", 0.0), ("", 0.0)])
def test_an_answer_is_correct_if_it_is_the_completion(
    answer: str, accuracy: float, end: str
) -> None:
    task = load_one({"prompt": "red is", "completion": f" red{end}"}, load_tokenizer())
    (doc,) = task.test_docs()
    results = task.process_results(doc, [answer, (-3.0, False)])
    assert results["exact_match"] == accuracy


@pytest.mark.parametrize(
    ("content", "template", "keyword"),
    [
        ("red", None, "template"),
        ("red", "{{ raise_exception('no system') }}", "no system"),
        ("", "{{ messages }}", "content"),
        (None, "{{ messages }}", "content"),
        ([{"type": "text", "text": "red"}], "{{ messages }}", "content"),
    ],
)
def test_messages_need_a_template_and_a_text(
    content: Any, template: str | None, keyword: str
) -> None:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = template
    messages = [USER, {"role": "assistant", "content": content}]
    with pytest.raises(MatryoshkaError, match=keyword):
        load_data("mine", [{"messages": messages}], tokenizer)


@pytest.mark.slow
def test_a_misspelled_task() -> None:
    with pytest.raises(MatryoshkaError, match="gsm8k"):
        load_task("gsm8kk")
