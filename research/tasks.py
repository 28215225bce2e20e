"""The questions of a study.

A source of a task is ``{facts: 256}`` (`research.facts`), ``{generated: chain_sum}`` (a generator
of reasoning-gym), ``{wordnet: FOLDER}`` (examples of prompt and completion), or ``{choices:
FOLDER}`` (`research.commonsense`). The examples to train on, to decide with and to measure on are
separate. Only the facts are the same, because the task is to remember what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matryoshka_lora import MatryoshkaError
from research import commonsense
from research.facts import facts
from research.study import ROOT, Study

Example = dict[str, Any]
"""A prompt and its completion, both text."""

GENERATORS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    "family_relationships": {},
}
"""The settings of reasoning-gym's generators."""

SEED_RANGE = 1_000_000
"""Each split of generated questions, and each training seed, has a range of seeds of its own."""
NUM_HELD_OUT = 1000
"""The number of generated questions of the validation and the test split."""


def training_examples(study: Study, task: str, recipe: str, seed: int) -> list[Example]:
    """Return the examples that a run trains on, without the held-out ones.

    There are as many generated questions as the run takes, so that it sees each of them once. The
    examples of a file are all that it has.
    """
    source = study.tasks[task]
    if "facts" in source:
        return list(facts(source["facts"], seed))
    if "generated" in source:
        return generated(source["generated"], "train", study.num_training_examples(recipe), seed)
    examples = _read(source, "train")
    return examples[: len(examples) - study.items["judge"]]


def held_out_examples(study: Study, task: str, recipe: str, seed: int) -> list[Example]:
    """Return the training examples that are held out to decide whether trained ranks are kept.

    There are none for facts, as there is nothing else to remember.
    """
    source = study.tasks[task]
    count = study.items["judge"]
    if not count or "facts" in source:
        return []
    if "generated" in source:
        num_training = study.num_training_examples(recipe)
        examples = generated(source["generated"], "train", num_training + count, seed)
        return examples[num_training:]
    return _read(source, "train")[-count:]


def measured_examples(study: Study, task: str, split: str, seed: int) -> list[Example]:
    """Return the examples that a run is measured on: the same for every seed, except for facts."""
    source = study.tasks[task]
    count = study.items[split]
    if "facts" in source:
        return list(facts(source["facts"], seed))[:count]
    if "generated" in source:
        return generated(source["generated"], split, count)
    examples = _read(source, split)[:count]
    if len(examples) < count:
        raise MatryoshkaError(
            f"items.{split} is {count}, but {task} has only {len(examples)} examples."
        )
    if "choices" in source:
        # Batches of similar lengths have little padding.
        examples.sort(key=lambda example: len(example["prompt"]) + len(example["completion"]))
    return examples


def choices_folder(study: Study, task: str) -> Path | None:
    """Return the folder of questions with choices, or None if a task has none."""
    source = study.tasks[task]
    return ROOT / source["choices"] if "choices" in source else None


def _read(source: Mapping[str, Any], split: str) -> list[Example]:
    try:
        if "choices" in source:
            return commonsense.right_answers(ROOT / source["choices"], split)
        text = (ROOT / source["wordnet"] / f"{split}.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MatryoshkaError(
            f"{error.filename} does not exist. Write it with: python -m research.commonsense"
        ) from error
    return [json.loads(line) for line in text.splitlines()]


def generated(name: str, split: str, count: int, seed: int = 0) -> list[Example]:
    """Return the first questions of a split, all different, and none of them in another split.

    The seed chooses training questions. Validation and test are always the same.
    """
    test = _distinct(name, 0, NUM_HELD_OUT, NUM_HELD_OUT, excluded={})
    validation = _distinct(name, SEED_RANGE, NUM_HELD_OUT, NUM_HELD_OUT, excluded=test)
    if split == "train":
        num_tries = min(SEED_RANGE, 20 * count + NUM_HELD_OUT)
        first_seed = (2 + seed) * SEED_RANGE
        answers = _distinct(name, first_seed, num_tries, count, excluded={**test, **validation})
    else:
        answers = test if split == "test" else validation
    if len(answers) < count:
        raise MatryoshkaError(
            f"{name} has only {len(answers)} questions for {split}, {count} are needed."
        )
    return [
        {"prompt": f"{question}\nAnswer:", "completion": f" {answer}"}
        for question, answer in list(answers.items())[:count]
    ]


def _distinct(
    name: str, first_seed: int, num_tries: int, count: int, excluded: Mapping[str, str]
) -> dict[str, str]:
    """Return the answers by question, of different questions that are not excluded."""
    import reasoning_gym  # tables do not need it

    dataset = reasoning_gym.create_dataset(
        name, seed=first_seed, size=num_tries, **GENERATORS[name]
    )
    answers: dict[str, str] = {}
    for index in range(num_tries):
        item = dataset[index]
        if item["question"] not in excluded:
            answers.setdefault(item["question"], str(item["answer"]))
        if len(answers) == count:
            break
    return answers
