"""Which tasks a name means: a preset, a task of the harness, a YAML file, or a built-in task.

Our own questions, a built-in task's or a file's, are a task of the harness too, asked for an answer and for its loss.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import set_torch_seed
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.data.questions import Judge, Question, answer_text, end_texts, is_chat, openings, text_of, tokenize
from matryoshka_lora.data.tasks import get_task, is_task, nearest_tasks
from matryoshka_lora.errors import MatryoshkaError, one_line
from matryoshka_lora.privacy import shown

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""The harness's own defaults."""

EXTRA_TOKENS = 8
"""How many tokens more than the longest reference answer a model may write."""

BUILT_IN_ITEMS = 200
"""How many questions of a built-in task are asked unless told otherwise."""


@dataclass(frozen=True)
class Preset:
    """A task of the harness with its number of shots and the metric that is reported first."""

    task: str
    num_fewshot: int
    metric: str


PRESETS = {
    "gsm8k-3shot": Preset("gsm8k", 3, "exact_match,strict-match"),
    "gsm8k-8shot": Preset("gsm8k", 8, "exact_match,strict-match"),
    "arc_challenge-25shot": Preset("arc_challenge", 25, "acc,none"),
    "hellaswag-10shot": Preset("hellaswag", 10, "acc,none"),
}
"""The protocol of the paper (arXiv 2605.07850)."""


@dataclass(frozen=True)
class Asked:
    """What a name meant.

    Attributes:
        name: As it was given, or the file's name where that is an absolute path.
        kind: Where the task comes from.
        tasks: The harness's; several where the name is a group's.
        num_fewshot: None leaves it to the task.
        metric: What is reported first; None leaves it to the task.
    """

    name: str
    kind: Literal["harness", "built-in", "file"]
    tasks: Sequence[Task]
    num_fewshot: int | None
    metric: str | None = None

    @property
    def names(self) -> dict[str, str]:
        """What an evaluation calls each of the tasks, by the harness's name: those of a group have their own."""
        own = [str(task.config.task) for task in self.tasks]
        return {each: each if len(own) > 1 else self.name for each in own}


def ask(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    num_fewshot: int | None = None,
    limit: int | None = None,
    split: Literal["test", "validation"] = "test",
    fixed_shots: bool = False,
) -> Asked:
    """Load the tasks that a name means, with their data.

    Args:
        name: A preset, a name that the harness knows (task, group or tag), a YAML file of a task, or a built-in task.
        tokenizer: The base model's.
        num_fewshot: Shots, where the harness's task takes them; None leaves it to the preset or the task.
        limit: How many questions of a built-in task; the harness's own tasks are cut by the harness.
        split: Of a built-in task.
        fixed_shots: Let every question have the first examples as its shots, whatever the task's own way is. Not the
            harness's prompts any more, but a prefix that is computed once for each rank.

    Raises:
        MatryoshkaError: There is no such task, its data cannot be had or is empty, or the shots make no sense.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise MatryoshkaError(f"--num-fewshot is {num_fewshot}; write 0 or more")
    preset, shots = PRESETS.get(name), num_fewshot
    if preset is not None:
        shots, found = preset.num_fewshot if shots is None else shots, _load(preset.task, name)
    elif _is_file(name):
        found = _load(name, name)
    elif is_task(name):  # before the harness is asked, which reads thousands of files to know its names
        if num_fewshot:
            raise MatryoshkaError(f"{name} is a built-in task, which is asked without shots: leave --num-fewshot out")
        task = get_task(name)
        questions = task.examples(split, limit or BUILT_IN_ITEMS)
        return Asked(name, "built-in", [QuestionsTask(task, questions, tokenizer)], None, "accuracy,none")
    elif name in _manager().all_tasks:
        found = _load(name, name)
    else:
        raise MatryoshkaError(_unknown(name))
    for task in found:
        _check(task, name, shots)
        if fixed_shots:
            _fix_shots(task)
    return Asked(shown(name), "harness", found, shots, preset.metric if preset is not None else None)


def seed() -> None:
    """Seed what tasks draw from, as the harness does before it loads them."""
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    set_torch_seed(SEEDS["torch"])


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


@cache
def _manager(names: bool = True) -> TaskManager:
    return TaskManager(include_defaults=names)


def _load(spec: str, name: str) -> list[Task]:
    if _is_file(spec) and not Path(spec).is_file():
        raise MatryoshkaError(f"there is no file {spec}: give the YAML file of a task of the harness")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(names=not _is_file(spec))
    seed()  # some tasks shuffle while they load
    try:
        loaded = manager.load([spec])
        found = list(loaded["tasks"].values())
    except MatryoshkaError:
        raise
    except (IndexError, StopIteration) as error:  # the first document is looked at
        raise MatryoshkaError(f"task {name} has no documents: its data file is empty") from error
    # A dataset that is not there, a hub that does not answer, a YAML that makes no task, a missing package: the
    # harness and datasets have no common error.
    except Exception as error:
        raise MatryoshkaError(
            f"task {name} cannot be loaded: {one_line(error)[:300]}. Its data comes from the Hugging Face hub or from "
            "the files that its YAML names: they must be within reach"
        ) from error
    if not found:
        raise MatryoshkaError(f"{name} names no task of the harness")
    return found


def _check(task: Any, name: str, shots: int | None) -> None:
    if len(task.eval_docs) == 0:
        raise MatryoshkaError(f"task {name} has no documents: its data is empty")
    own = task.config.num_fewshot
    if shots and own == 0:
        raise MatryoshkaError(
            f"task {task.config.task} is defined without shots and the harness would ignore --num-fewshot {shots}: "
            "leave it out"
        )
    wanted = shots if shots is not None else own or 0
    pool = getattr(getattr(task, "sampler", None), "df", None) or ()
    if wanted > len(pool):
        raise MatryoshkaError(
            f"task {task.config.task} has {len(pool)} examples for {wanted} shots: give a smaller --num-fewshot"
        )


def _fix_shots(task: Any) -> None:
    sampler = getattr(task, "sampler", None)
    if sampler is not None:
        task.sampler = FirstNSampler(sampler.df, rnd=None)


def _unknown(name: str) -> str:
    near = [*get_close_matches(name, [*PRESETS, *_manager().all_tasks], n=3), *nearest_tasks(name)]
    close = get_close_matches(name, near, n=3)  # the nearest one first, whoever has it
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return (
        f"there is no task {name!r}: {hint}Names are those of lm-evaluation-harness (lm_eval ls tasks), of its YAML "
        f"files, of the presets ({', '.join(PRESETS)}) and of the built-in tasks (family_relationships and others)"
    )


class QuestionsTask(ConfigurableTask):  # type: ignore[misc, unused-ignore]
    """A task of the harness without shots, with the metrics ``accuracy`` and ``loss`` (nats per token).

    Its requests are the tokens of training. The harness's are text, which would be cut into others where a prompt and
    its answer share one; and its ``loglikelihood`` moves white space from the end of a context to the continuation.

    Args:
        judge: Tells right answers from wrong ones.
        questions: At least one.
        tokenizer: Its chat template writes chat questions; text is asked as it is.

    Warns:
        UserWarning: Some reference answers are not judged right themselves, in the text that their tokens make.

    Raises:
        MatryoshkaError: The questions are chat and the tokenizer has no template, or a question has no answer.
    """

    VERSION = 1

    def __init__(self, judge: Judge, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> None:
        self._judge, self._questions = judge, questions
        for question in questions:
            text_of(question)  # raises
        self._tokens = [tokenize(tokenizer, question) for question in questions]
        self._openings = [openings(tokenizer, *pair) for pair in zip(questions, self._tokens, strict=True)]
        learned = [self._is_right(answer_text(tokenizer, tokens), n) for n, tokens in enumerate(self._tokens)]
        if not all(learned):
            warnings.warn(
                f"{learned.count(False)} of {len(learned)} reference answers of {judge.name} are not judged right "
                "themselves, in the text that the tokenizer makes of their tokens: the accuracy is too low by these",
                stacklevel=2,
            )
        longest = max(len(tokens.completion) for tokens in self._tokens)
        data = {
            "prompt": [tokenizer.decode(tokens.prompt) for tokens in self._tokens],
            "completion": [tokenizer.decode(tokens.completion) for tokens in self._tokens],
            "index": list(range(len(questions))),
        }
        means = [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}]
        super().__init__(
            config={
                "task": judge.name,
                "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_dict(data)),
                "test_split": "test",
                "doc_to_text": "{{prompt}}",
                "doc_to_target": "{{completion}}",
                "output_type": "generate_until",
                "generation_kwargs": {
                    "until": end_texts(tokenizer, self._tokens),
                    "max_gen_toks": longest + EXTRA_TOKENS,
                    "do_sample": False,
                },
                "process_results": self._judged,
                "metric_list": [*means, {"metric": "loss", "aggregation": _per_token, "higher_is_better": False}],
                "num_fewshot": 0,
                "metadata": {"version": self.VERSION},
            }
        )

    @property
    def is_chat(self) -> bool:
        """Whether the chat template writes some of its questions."""
        return any(map(is_chat, self._questions))

    def download(self, *args: Any, **kwargs: Any) -> None:
        self.dataset = self.config.custom_dataset()

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """The answer, and its likelihood: `matryoshka_lora.evaluation.harness.RanksLM` knows both kinds."""
        kwargs.pop("apply_chat_template", None)
        kwargs.pop("chat_template", None)
        tokens, text = self._tokens[doc["index"]], doc["prompt"]
        settings = dict(self.config.generation_kwargs)
        return [
            Instance("answer", doc, (text, tokens.prompt, settings), 0, **kwargs),
            Instance("answer_likelihood", doc, (text, tokens.context, tokens.completion), 1, **kwargs),
        ]

    def _judged(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        answer, (logprob, _) = results
        right = self._is_right(answer, doc["index"])
        return {"accuracy": float(right), "loss": (-logprob, len(self._tokens[doc["index"]].completion))}

    def _is_right(self, answer: str, index: int) -> bool:
        answer = answer.strip()
        for opening in self._openings[index]:
            answer = answer.removeprefix(opening).strip()
        return self._judge.is_correct(answer, self._questions[index])


def _per_token(items: Sequence[tuple[float, int]]) -> float:
    return sum(loss for loss, _ in items) / sum(tokens for _, tokens in items)
