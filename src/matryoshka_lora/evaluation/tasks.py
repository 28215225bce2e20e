"""Tasks of lm-evaluation-harness, and examples of the user as such a task."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.errors import MatryoshkaError, wrap_errors
from matryoshka_lora.evaluation.harness import ManyRanksLM
from matryoshka_lora.evaluation.harness_results import HarnessResults
from matryoshka_lora.examples import (
    PromptCompletion,
    apply_chat_template,
    common_prefix_length,
    prompt_and_completion,
)

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs the same at each rank

_SEED = 1234  # the harness's default
_PLACEHOLDER = "\ufffc"  # stands for an answer, to find where a chat template puts it


class LoadedTask(NamedTuple):
    """A task or a group of tasks, with its data.

    Attributes:
        name: Its name in the evaluation.
        harness_tasks: What ``TaskManager.load`` returned.
    """

    name: str
    harness_tasks: dict[str, Any]

    @property
    def subtasks(self) -> list[str]:
        """The harness's names of the tasks of a group, or of the only task."""
        return list(self.harness_tasks["tasks"])


@contextmanager
def _harness_seeds() -> Iterator[None]:
    """Seed as the harness's command line does, and restore the random states at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(0)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@cache
def _task_manager(include_defaults: bool) -> TaskManager:
    return TaskManager(include_defaults=include_defaults)  # reads thousands of YAML files


@_harness_seeds()  # some tasks shuffle while they load
def load_task(name: str) -> LoadedTask:
    """Load a task or a group of the harness, or the YAML file of a task, with its data.

    Raises:
        MatryoshkaError: There is no such task, or its data cannot be loaded.
    """
    is_file = name.endswith((".yaml", ".yml"))
    manager = _task_manager(include_defaults=not is_file)
    if not is_file and name not in manager.all_tasks:
        similar_names = get_close_matches(name, manager.all_tasks, n=3)
        hint = "Run `lm_eval ls tasks` for a list, or pass a YAML file."
        if similar_names:
            hint = f"Did you mean {' or '.join(similar_names)}? {hint}"
        raise MatryoshkaError(f"There is no task {name!r:.80}. {hint}")
    hint = (
        "Its data come from the Hugging Face Hub, or from the files that its YAML file names. Pass "
        "`data` to evaluate on examples of a file."
    )
    with wrap_errors(f"Cannot load task {name}", hint):
        harness_tasks = manager.load([name])
    return LoadedTask(Path(name).stem if is_file else name, harness_tasks)


@_harness_seeds()
def run_task(
    lm: ManyRanksLM, task: LoadedTask, num_fewshot: int | None, limit: int | None
) -> HarnessResults:
    """Return the harness's results, with the seeds and few-shot examples of its command line.

    Args:
        lm: The model; its ``lora_rank`` is evaluated.
        task: The task.
        num_fewshot: The number of few-shot examples. Defaults to the task's own.
        limit: The maximum number of examples.

    Raises:
        MatryoshkaError: The harness cannot run the task with these settings.
    """
    for harness_task in task.harness_tasks["tasks"].values():
        task_num_fewshot = harness_task.get_config("num_fewshot")
        # As in the harness, 0 in the task's config cannot be overridden.
        if task_num_fewshot is None or (num_fewshot is not None and task_num_fewshot != 0):
            harness_task.set_config(key="num_fewshot", value=num_fewshot or 0)
        harness_task.set_fewshot_seed(seed=_SEED)
    action = f"The harness cannot run {', '.join(task.subtasks)}"
    with wrap_errors(action, exceptions=(AssertionError, ValueError)):
        # Not simple_evaluate, which spends seconds on a description of the machine at each rank.
        results: HarnessResults = evaluate(lm, task.harness_tasks, limit=limit)
    return results


class _ExamplesTask(ConfigurableTask):  # type: ignore[misc, unused-ignore]
    """A task that requests an answer and the log-likelihood of the completion for each example."""

    def construct_requests(self, doc: Any, ctx: Any, **kwargs: Any) -> list[Instance]:
        generation = super().construct_requests(doc, ctx, **kwargs)
        settings = {**generation.arguments[1], "max_gen_toks": doc["max_gen_toks"]}
        generation.arguments = (ctx, settings)
        log_likelihood = replace(
            generation,
            request_type="loglikelihood",
            arguments=(ctx, doc["scored_text"]),
            idx=1,
            resps=[],
            filtered_resps={},
        )
        return [generation, log_likelihood]


class _RenderedExample(NamedTuple):
    """An example as strings.

    Attributes:
        prompt: The prompt.
        completion: The answer that counts as correct.
        scored_text: The completion with what ends it, of which the loss is computed.
        stop_string: What ends an answer in the chat template; "" for examples without messages.
    """

    prompt: str
    completion: str
    scored_text: str
    stop_string: str


def load_data(
    name: str, examples: Sequence[object], tokenizer: PreTrainedTokenizerBase
) -> LoadedTask:
    """Make a task of examples, with the metrics ``exact_match`` and ``loss``.

    An answer is correct if it equals the completion, except for whitespace around it. The loss is
    that of the completion, its end, and the whitespace before it, which the harness counts as part
    of the continuation: nats per token, as a mean over the examples.

    Args:
        name: The name of the task.
        examples: As `matryoshka_lora.examples.prompt_and_completion` accepts them. Messages are
            rendered with the tokenizer's chat template.
        tokenizer: The base model's tokenizer.

    Raises:
        MatryoshkaError: An example has no prompt with a completion.
    """
    docs: list[dict[str, Any]] = []
    stop_strings: set[str] = set()
    for index, example in enumerate(examples):
        rendered = _render(example, index, tokenizer)
        docs.append(_make_doc(rendered, tokenizer))
        if rendered.stop_string:
            stop_strings.add(rendered.stop_string)
    if not any("\n" in doc["completion"] for doc in docs):
        stop_strings.add("\n")
    config = {
        "task": name,
        "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_list(docs)),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{completion}}",
        "process_results": _process_results,
        "generation_kwargs": {"until": sorted(stop_strings), "do_sample": False},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
            {"metric": "loss", "aggregation": "mean", "higher_is_better": False},
        ],
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    manager = _task_manager(include_defaults=False)
    return LoadedTask(name, manager.load([_ExamplesTask(config=config)]))


def _make_doc(example: _RenderedExample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return an example as a document of `_ExamplesTask`."""
    # Answers are decoded without special tokens, so the completion must be, too.
    token_ids = tokenizer.encode(example.completion, add_special_tokens=False)
    completion = str(tokenizer.decode(token_ids, skip_special_tokens=True))
    prompt_length = len(tokenizer.encode(example.prompt.rstrip()))
    full_length = len(tokenizer.encode(example.prompt + example.scored_text))
    max_length = len(tokenizer.encode(completion)) + 8  # a longer answer cannot be correct
    # Examples with the same maximum are generated in one batch. Round up, so that few distinct
    # maxima remain. Near
    # the end of the context window, the prompt must not be truncated for a larger one.
    rounded_length = -(-max_length // 32) * 32
    remaining_length = tokenizer.model_max_length - prompt_length
    return {
        "prompt": example.prompt,
        "completion": completion.rstrip(),
        "scored_text": example.scored_text,
        "num_scored_tokens": max(1, full_length - prompt_length),
        "max_gen_toks": min(rounded_length, max(max_length, remaining_length)),
    }


def _render(example: object, index: int, tokenizer: PreTrainedTokenizerBase) -> _RenderedExample:
    chat = prompt_and_completion(example, index)
    if isinstance(chat.prompt, str) and isinstance(chat.completion, str):
        end = str(tokenizer.eos_token or "")
        completion = chat.completion.removesuffix(end)
        return _RenderedExample(chat.prompt, chat.completion, completion + end, "")
    return _render_chat(chat, index, tokenizer)


def _render_chat(
    chat: PromptCompletion, index: int, tokenizer: PreTrainedTokenizerBase
) -> _RenderedExample:
    """Apply the chat template.

    Raises:
        MatryoshkaError: The template rejects the messages, or the answer is not a string.
    """
    prompt, full_text = apply_chat_template(tokenizer, chat, index, tokenize=False)
    content = chat.completion[-1].get("content")  # type: ignore[union-attr]
    completion = content.strip() if isinstance(content, str) else ""
    if not completion:
        raise MatryoshkaError(
            f"The content of the last message of example {index} must be a string, got "
            f"{content!r:.60}."
        )
    placeholder = [{"role": "assistant", "content": _PLACEHOLDER}]
    with_placeholder = PromptCompletion(chat.prompt, placeholder, chat.template_kwargs)
    _, text = apply_chat_template(tokenizer, with_placeholder, index, tokenize=False)
    before, _, end = text.partition(_PLACEHOLDER)
    # Some templates write an empty thought or the name of a channel before the answer.
    if full_text.startswith(before) and before.rstrip(" ") != prompt:
        prompt = before
    scored_text = full_text[common_prefix_length(prompt, full_text) :]
    return _RenderedExample(prompt, completion, scored_text, end.strip())


def _process_results(
    doc: Mapping[str, Any], results: tuple[str, tuple[float, bool]]
) -> dict[str, float]:
    answer, (logprob, _) = results
    is_correct = answer.strip() == doc["completion"].strip()
    return {"exact_match": float(is_correct), "loss": -logprob / doc["num_scored_tokens"]}
