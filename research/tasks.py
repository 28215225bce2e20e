"""The questions of a study.

A source of a task is one of ``{facts: 256}`` (`research.facts`), ``{generated: chain_sum}`` (a
generator of reasoning-gym), ``{wordnet: FOLDER}`` (rows of prompt and completion), and ``{choices:
FOLDER}`` (`research.commonsense`). Training, judging and measured rows are apart, but for facts,
whose task is to remember what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matryoshka_lora import MatryoshkaError
from research import commonsense
from research.facts import facts
from research.study import ROOT, Study

Row = dict[str, Any]
"""A prompt and its completion, both text."""

GENERATORS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    "family_relationships": {},
}
"""The generators of reasoning-gym that are used, and their settings."""

STRETCH, HELD_OUT = 1_000_000, 1000
"""Each split reads a stretch of seeds of its own; so many questions are made for a held-out one."""


def train_rows(study: Study, task: str, recipe: str, seed: int) -> list[Row]:
    """Return the rows that one run trains on, without those that judge.

    Generated questions are as many as the run takes, so that each is seen once; the rows of a file
    are all that it has.
    """
    source, judges = study.tasks[task], study.items["judge"]
    if "facts" in source:
        return list(facts(source["facts"], seed))
    if "generated" in source:
        return generated(source["generated"], "train", study.train_rows(recipe), seed)
    found = _of_files(source, "train")
    return found[: len(found) - judges]


def judge_rows(study: Study, task: str, recipe: str, seed: int) -> list[Row]:
    """Return the rows that decide whether trained ranks are kept: training rows, held out.

    For facts these are the facts: there is nothing else to remember.
    """
    source, judges = study.tasks[task], study.items["judge"]
    if "facts" in source:
        return list(facts(source["facts"], seed))
    if not judges:
        return []
    if "generated" in source:
        taken = study.train_rows(recipe)
        return generated(source["generated"], "train", taken + judges, seed)[taken:]
    return _of_files(source, "train")[-judges:]


def measured_rows(study: Study, task: str, split: str, seed: int) -> list[Row]:
    """Return the rows that a run is measured on: the same for every seed, but for facts."""
    source, count = study.tasks[task], study.items[split]
    if "facts" in source:
        return list(facts(source["facts"], seed))[:count]
    if "generated" in source:
        return generated(source["generated"], split, count)
    found = _of_files(source, split)[:count]
    if len(found) < count:
        raise MatryoshkaError(f"{task} has {len(found)} rows, not {count}: lower items.{split}")
    # Batches of alike lengths have little padding.
    return sorted(found, key=_length) if "choices" in source else found


def choices(study: Study, task: str) -> Path | None:
    """Return the folder of questions with choices, where a task has some."""
    source = study.tasks[task]
    return ROOT / source["choices"] if "choices" in source else None


def _of_files(source: Mapping[str, Any], split: str) -> list[Row]:
    try:
        if "choices" in source:
            return commonsense.rows(ROOT / source["choices"], split)
        text = (ROOT / source["wordnet"] / f"{split}.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MatryoshkaError(
            f"{error.filename} is not there: python -m research.commonsense writes it"
        ) from error
    return [json.loads(line) for line in text.splitlines()]


def _length(row: Row) -> int:
    return len(row["prompt"]) + len(row["completion"])


def generated(name: str, split: str, count: int, seed: int = 0) -> list[Row]:
    """Return the first questions of a split, all different, and none of them in another split.

    A seed chooses training questions; validation and test are the same whatever it is.
    """
    test = _distinct(name, 0, HELD_OUT, HELD_OUT, {})
    validation = _distinct(name, STRETCH, HELD_OUT, HELD_OUT, test)
    if split == "train":
        tries = min(STRETCH, 20 * count + HELD_OUT)
        found = _distinct(name, (2 + seed) * STRETCH, tries, count, {**test, **validation})
    else:
        found = test if split == "test" else validation
    if len(found) < count:
        raise MatryoshkaError(f"{name} has {len(found)} questions for {split}, not {count}")
    return [
        {"prompt": f"{question}\nAnswer:", "completion": f" {answer}"}
        for question, answer in list(found.items())[:count]
    ]


def _distinct(
    name: str, first: int, tries: int, count: int, taken: Mapping[str, str]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for question, answer in _items(name, first, tries):
        if question not in taken:
            found.setdefault(question, answer)
        if len(found) == count:
            break
    return found


def _items(name: str, first: int, count: int) -> Iterator[tuple[str, str]]:
    import reasoning_gym

    made = reasoning_gym.create_dataset(name, seed=first, size=count, **GENERATORS[name])
    return ((made[number]["question"], str(made[number]["answer"])) for number in range(count))
