"""What is asked: tasks of lm-evaluation-harness, and rows of one's own as such a task."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from matryoshka_lora.errors import MatryoshkaError, explained
from matryoshka_lora.files.rows import common_length, in_template, question_and_answer

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it would log at each rank what it does

_SEED = 1234  # the harness' own
_MARK = "\ufffc"  # stands for an answer, to find its place in a chat template

Asked = tuple[str, Any]  # the task's name in the evaluation, and what `TaskManager.load` returned


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed as the harness' command line does; afterwards the random states are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(0)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@_seeded()  # some tasks shuffle while they load
def load_task(name: str) -> Asked:
    """Load a task or a group of the harness, or the YAML file of a task, with the data.

    Raises:
        MatryoshkaError: There is no such task, or its data cannot be had.
    """
    is_file = name.endswith((".yaml", ".yml"))
    manager = _manager(not is_file)
    if not is_file and name not in manager.all_tasks:
        near = get_close_matches(name, manager.all_tasks, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise MatryoshkaError(
            f"there is no task {name!r}: {hint}Give one of `lm_eval ls tasks`, or a YAML file"
        )
    way = "Its data come from the hub, or files that its YAML names; --data asks rows of a file"
    with explained(f"task {name} cannot be loaded", way):
        return Path(name).stem if is_file else name, manager.load([name])


class _Rows(ConfigurableTask):  # type: ignore[misc, unused-ignore]
    """Asks a row twice: for an answer, and for the log-likelihood of the row's own answer."""

    def construct_requests(self, doc: Any, ctx: Any, **kwargs: Any) -> list[Any]:
        answer = super().construct_requests(doc, ctx, **kwargs)
        answer.arguments = (ctx, answer.arguments[1] | {"max_gen_toks": doc["most"]})
        own = {"request_type": "loglikelihood", "arguments": (ctx, doc["answer"]), "idx": 1}
        return [answer, replace(answer, **own, resps=[], filtered_resps={})]


def load_data(name: str, rows: Sequence[Any], tokenizer: Any) -> Asked:
    """Make a task of rows, which measures whether answers are right, and the loss.

    An answer is right if it equals the completion, white space aside. The loss is that of the
    completion, its end, and the white space before it, which the harness counts too: nats per
    token, as a mean over the rows. The tokenizer's chat template writes rows of messages.

    Raises:
        MatryoshkaError: A row has no question with an answer.
    """
    from datasets import Dataset, DatasetDict

    until, docs = set[str](), []
    for number, row in enumerate(rows, start=1):
        chat = prompt, completion, _ = question_and_answer(row, number)
        if isinstance(prompt, str):
            answer = completion.removesuffix(end := tokenizer.eos_token or "") + end
        else:
            prompt, completion, answer, end = _in_chat(tokenizer, chat, number)
            until.add(end)
        ids = tokenizer.encode(completion, add_special_tokens=False)
        completion = tokenizer.decode(ids, skip_special_tokens=True)  # as answers are
        before = len(tokenizer.encode(prompt.rstrip()))
        size = len(tokenizer.encode(prompt + answer)) - before
        doc = {"prompt": prompt, "completion": completion.rstrip(), "answer": answer}
        most = len(tokenizer.encode(completion)) + 8  # a longer answer cannot be right
        # Few lengths make large batches. Near the model's context, no prompt is cut for them.
        most = min(-(-most // 32) * 32, max(most, tokenizer.model_max_length - before))
        docs.append(doc | {"tokens": max(1, size), "most": most})
    if not any("\n" in doc["completion"] for doc in docs):
        until.add("\n")
    mean = {"aggregation": "mean", "higher_is_better": True}
    config = {
        "task": name,
        "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_list(docs)),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{completion}}",
        "process_results": _measured,
        "generation_kwargs": {"until": sorted(until - {""}), "do_sample": False},
        "metric_list": [
            {"metric": "exact_match", **mean},
            {"metric": "loss", **mean, "higher_is_better": False},
        ],
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    return name, _manager(False).load([_Rows(config=config)])


def _in_chat(tokenizer: Any, chat: tuple[Any, Any, Any], number: int) -> tuple[str, ...]:
    """Return a row of chat as texts: prompt, answer, the answer with its end, and what ends it."""
    asked, said, kwargs = chat
    prompt, whole = in_template(tokenizer, chat, number, tokenize=False)
    content = said[-1].get("content")
    answer = content.strip() if isinstance(content, str) else ""
    if not answer:
        raise MatryoshkaError(f"the answer of row {number} is {content!r:.60}: give it as a text")
    marked = asked, [{"role": "assistant", "content": _MARK}], kwargs
    before, _, end = in_template(tokenizer, marked, number, tokenize=False)[1].partition(_MARK)
    if whole.startswith(before) and before.rstrip(" ") != prompt:  # an empty thought, a channel
        prompt = before
    return prompt, answer, whole[common_length(prompt, whole) :], end.strip()


@_seeded()
def judge(lm: Any, loaded: Any, num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
    """Return what the harness' ``evaluate`` says, with seeds and shots as by its command line."""
    # `simple_evaluate` would describe the machine with git and pip at each rank, for seconds.
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=_SEED)
    kinds = (AssertionError, ValueError)
    with explained(f"the harness cannot run {', '.join(loaded['tasks'])}", kinds=kinds):
        found: dict[str, Any] = evaluate(lm, loaded, limit=limit)
        return found


@cache
def _manager(defaults: bool) -> TaskManager:
    return TaskManager(include_defaults=defaults)  # reads thousands of YAML files


def _measured(doc: Mapping[str, Any], results: tuple[str, tuple[float, bool]]) -> dict[str, float]:
    text, (likelihood, _) = results
    right = float(text.strip() == doc["completion"].strip())
    return {"exact_match": right, "loss": -likelihood / doc["tokens"]}
