"""Tasks of lm-evaluation-harness, examples of the user as such a task, and their results."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from lm_eval.api import task as task_module
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models import huggingface
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.errors import MatryoshkaError, printable, short, wrap_errors
from matryoshka_lora.evaluation.results import Evaluation, Example, Metric, TaskResult
from matryoshka_lora.examples import (
    PromptCompletion,
    apply_chat_template,
    common_prefix_length,
    prompt_and_completion,
)

HarnessResults = Mapping[str, Any]
"""The return value of ``lm_eval.evaluator.evaluate``."""

# The harness's default, 100,000, takes minutes per rank for metrics such as an F1 score.
_BOOTSTRAP_ITERS = 1000
_SEED = 1234  # the harness's default
_PLACEHOLDER = "\ufffc"  # stands for an answer, to find where a chat template puts it
_PROMPT_CHARACTERS = 2000  # kept of a prompt's end; few-shot prompts would fill the disk


@dataclass(frozen=True)
class LoadedTask:
    """A task or a group of tasks, with its data.

    Attributes:
        name: Its name in the evaluation.
        harness_tasks: The return value of ``TaskManager.load``.
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
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs the same at each rank
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
        hint = "Run `lm_eval ls tasks` for a list, or pass a YAML file."
        similar_names = get_close_matches(name, manager.all_tasks, n=3)
        if similar_names:
            hint = f"Did you mean {' or '.join(similar_names)}? {hint}"
        raise MatryoshkaError(f"There is no task {short(name)}. {hint}")
    hint = (
        "Its data come from the Hugging Face Hub, or from the files that its YAML file names. Pass "
        "`data` to evaluate on examples of a file."
    )
    with wrap_errors(f"Cannot load task {name}", hint):
        harness_tasks = manager.load([name])
    return LoadedTask(Path(name).stem if is_file else name, harness_tasks)


@contextmanager
def _named_bars(name: str, is_shown: bool) -> Iterator[None]:
    """Name the harness's progress bars that have no name, or hide the one that it always shows."""
    modules = {task_module: f"prompts of {name}", huggingface: f"texts of {name}"}
    bars = {module: module.tqdm for module in modules}
    for module, description in modules.items():
        module.tqdm = partial(
            bars[module], desc=description, disable=not is_shown, leave=False, delay=1
        )
    try:
        yield
    finally:
        for module, bar in bars.items():
            module.tqdm = bar


@_harness_seeds()
def run_task(
    lm: LM, task: LoadedTask, num_fewshot: int | None, limit: int | None, progress: bool = False
) -> HarnessResults:
    """Run a task with the seeds and few-shot examples of the harness's command line.

    Args:
        num_fewshot: The number of few-shot examples. Defaults to the task's own.

    Raises:
        MatryoshkaError: The harness cannot run the task with these settings.
    """
    for harness_task in task.harness_tasks["tasks"].values():
        task_num_fewshot = harness_task.get_config("num_fewshot")
        # As in the harness, 0 in the task's config cannot be overridden.
        if task_num_fewshot is None or (num_fewshot is not None and task_num_fewshot != 0):
            harness_task.set_config(key="num_fewshot", value=num_fewshot or 0)
        harness_task.set_fewshot_seed(seed=_SEED)
    names = ", ".join(task.subtasks)
    with (
        _named_bars(printable(task.name), progress),
        wrap_errors(f"The harness cannot run {names}", exceptions=(AssertionError, ValueError)),
    ):
        try:
            # Not simple_evaluate, which spends seconds on a description of the machine at each
            # rank.
            results: HarnessResults = evaluate(
                lm, task.harness_tasks, limit=limit, bootstrap_iters=_BOOTSTRAP_ITERS
            )
        except MatryoshkaError as error:
            raise type(error)(f"{names}: {error}") from error
    return results


class _ExamplesTask(ConfigurableTask):  # type: ignore[misc, unused-ignore]
    """A task that requests an answer and the log-likelihood of the completion for each example."""

    def construct_requests(self, doc: Any, ctx: Any, **kwargs: Any) -> list[Instance]:
        generation = super().construct_requests(doc, ctx, **kwargs)
        settings = {
            **generation.arguments[1],
            "until": doc["until"],
            "max_gen_toks": doc["max_gen_toks"],
        }
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

    def process_results(self, doc: Any, results: Any) -> dict[str, float]:
        answer, (logprob, _) = results
        is_correct = answer.strip() == doc["completion"].strip()
        return {"exact_match": float(is_correct), "loss": -logprob / doc["num_scored_tokens"]}


def load_data(
    name: str, examples: Sequence[object], tokenizer: PreTrainedTokenizerBase
) -> LoadedTask:
    """Make a task of examples, with the metrics ``exact_match`` and ``loss``.

    An answer is correct if it equals the completion, except for whitespace around it. The loss is
    the mean over the examples of the nats per token of the completion with its end. It includes the
    whitespace before the completion, which the harness counts as part of the continuation.

    Args:
        examples: As `matryoshka_lora.examples.prompt_and_completion` accepts them. Messages are
            rendered with the tokenizer's chat template.

    Raises:
        MatryoshkaError: An example has no prompt with a completion.
    """

    def loss(*_: object) -> None:
        """`_ExamplesTask` computes it. Of a name, the harness would look for it on the Hub."""

    docs = [_make_doc(example, index, tokenizer) for index, example in enumerate(examples)]
    config = {
        "task": name,
        "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_list(docs)),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{completion}}",
        "generation_kwargs": {"until": [], "do_sample": False},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
            {"metric": loss, "aggregation": "mean", "higher_is_better": False},
        ],
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    manager = _task_manager(include_defaults=False)
    return LoadedTask(name, manager.load([_ExamplesTask(config=config)]))


def _make_doc(example: object, index: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return an example as a document of `_ExamplesTask`.

    The loss is computed of ``scored_text``: the completion and the token or string that ends it.
    ``until`` ends an answer: the chat template's end, and a newline if the completion has none.

    Raises:
        MatryoshkaError: The chat template rejects the messages, or the answer is not a string.
    """
    chat = prompt_and_completion(example, index)
    if isinstance(chat.prompt, str) and isinstance(chat.completion, str):
        end = str(tokenizer.eos_token or "")
        prompt, completion, stop_string = chat.prompt, chat.completion.removesuffix(end), ""
        scored_text = completion + end
    else:
        prompt, full_text = apply_chat_template(tokenizer, chat, index, tokenize=False)
        content = chat.completion[-1].get("content")  # type: ignore[union-attr]
        completion = content.strip() if isinstance(content, str) else ""
        if not completion:
            raise MatryoshkaError(
                f"The content of the last message of example {index} must be a string, got "
                f"{short(content)}."
            )
        placeholder = [{"role": "assistant", "content": _PLACEHOLDER}]
        with_placeholder = PromptCompletion(chat.prompt, placeholder, chat.template_kwargs)
        _, text = apply_chat_template(tokenizer, with_placeholder, index, tokenize=False)
        before, _, stop_string = text.partition(_PLACEHOLDER)
        # Some templates write an empty thought or the name of a channel before the answer.
        if full_text.startswith(before) and before.rstrip(" ") != prompt:
            prompt = before
        scored_text = full_text[common_prefix_length(prompt, full_text) :]

    until = [stop_string.strip()] if stop_string.strip() else []
    if "\n" not in completion.rstrip():
        until.append("\n")
    # Answers are decoded without special tokens, so the completion must be, too.
    token_ids = tokenizer.encode(completion, add_special_tokens=False)
    completion = str(tokenizer.decode(token_ids, skip_special_tokens=True))
    prompt_length = len(tokenizer.encode(prompt.rstrip()))
    full_length = len(tokenizer.encode(prompt + scored_text))
    max_length = len(tokenizer.encode(completion)) + 8  # a longer answer cannot be correct
    # Examples with the same maximum are generated together, so round it up. Near the end of the
    # context window, the prompt must not be truncated for a larger one.
    rounded_length = math.ceil(max_length / 32) * 32
    remaining_length = tokenizer.model_max_length - prompt_length
    return {
        "prompt": prompt,
        "completion": completion.rstrip(),
        "scored_text": scored_text,
        "until": until,
        "num_scored_tokens": max(1, full_length - prompt_length),
        "max_gen_toks": min(rounded_length, max(max_length, remaining_length)),
    }


def add_results(
    evaluation: Evaluation, task: LoadedTask, results: Mapping[int, HarnessResults]
) -> list[str]:
    """Add the harness's results of a task, by rank, to an evaluation.

    Returns:
        The new names in the evaluation: one for a task or a group, and one for each task of a tag,
        whose tasks have no common metric.

    Raises:
        MatryoshkaError: A task has no metric that is a number.
    """
    if len(task.subtasks) == 1:
        names = {task.name: task.subtasks[0]}
    elif any(task.name in result.get("groups", {}) for result in results.values()):
        names = {task.name: task.name}
    else:
        names = {subtask: subtask for subtask in task.subtasks}
    for name, harness_name in names.items():
        evaluation.tasks[name] = convert_task(harness_name, results)
    for subtask in task.subtasks:
        samples = {rank: result["samples"][subtask] for rank, result in results.items()}
        name = task.name if task.name in names else subtask
        evaluation.examples += convert_examples(name, samples)
    return list(names)


def convert_task(name: str, results: Mapping[int, HarnessResults]) -> TaskResult:
    """Return the results of a task or a group.

    The primary metric is the first one that is not 0 at every rank. If no answer is correct, which
    is usual for long answers, the loss is more informative.

    Raises:
        MatryoshkaError: The task has no metric that is a number.
    """
    first = next(iter(results.values()))
    metrics: dict[str, Metric] = {}
    for key, first_value in first["results"][name].items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(first_value, SupportsFloat):
            continue
        values: dict[int, float | None] = {}
        standard_errors: dict[int, float | None] = {}
        for rank, result in results.items():
            by_metric = result["results"][name]
            values[rank] = _finite_number(by_metric[key])
            standard_errors[rank] = _finite_number(by_metric.get(f"{metric}_stderr,{filter_name}"))
        higher_is_better = first["higher_is_better"][name].get(metric)
        metrics[key] = Metric(higher_is_better, values, standard_errors)
    if not metrics:
        raise MatryoshkaError(
            f"Task {name} has no metric that is a number. Add one to metric_list in its YAML file."
        )
    primary_metric = next(iter(metrics))
    for key, candidate in metrics.items():
        if any(candidate.values.values()):
            primary_metric = key
            break
    num_examples = first["n-samples"]
    tasks = [name] if name in num_examples else list(num_examples)
    return TaskResult(
        num_examples=sum(num_examples[task]["effective"] for task in tasks),
        num_fewshot=first["n-shot"].get(name),
        primary_metric=primary_metric,
        metrics=metrics,
    )


def convert_examples(task: str, samples: Mapping[int, Sequence[Any]]) -> list[Example]:
    """Return the examples of a task, sorted by their number.

    Args:
        task: The task's name in the evaluation.
        samples: The harness's samples by rank: one for each example and filter.
    """
    examples: dict[int, Example] = {}
    for rank, rank_samples in samples.items():
        for sample in rank_samples:
            doc_id, target, requests = sample["doc_id"], sample["target"], sample["arguments"]
            if doc_id not in examples:
                if isinstance(target, int) and 0 <= target < len(requests) > 1:
                    target = requests[target][1]
                prompt = str(requests[0][0])[-_PROMPT_CHARACTERS:]
                examples[doc_id] = Example(task, doc_id, prompt, str(target))
            example = examples[doc_id]
            example.answers.setdefault(rank, _answer(sample))
            for metric in sample["metrics"]:
                value = _finite_number(sample[metric])
                if value is not None:
                    values = example.metrics.setdefault(f"{metric},{sample['filter']}", {})
                    values[rank] = value
    return [examples[doc_id] for doc_id in sorted(examples)]


def _answer(sample: Any) -> str:
    """Return the model's answer: a string, or the choice with the highest log-likelihood."""
    responses = [response[0] for response in sample["resps"]]
    is_choice = len(responses) > 1 and isinstance(responses[0], (tuple, list))
    if not is_choice:
        return str(responses[0])
    logprobs = [logprob for logprob, _ in responses]
    context, continuation = sample["arguments"][logprobs.index(max(logprobs))][:2]
    # In winogrande the contexts are the choices, and the continuation is the same for all.
    continuations = {arguments[1] for arguments in sample["arguments"]}
    return str(continuation if len(continuations) > 1 else context)


def _finite_number(value: Any) -> float | None:
    """Return a number that JSON can hold, or None."""
    if isinstance(value, SupportsFloat) and math.isfinite(value):
        return float(value)
    return None
