"""Built-in tasks: reasoning-gym's generators, cut into training, validation and test questions that never meet.

A generator makes item i of a dataset from the seed ``s + i``. Each split reads a stretch of seeds of its own:

==========  ==========================  ==========================================================
split       seeds                       questions
==========  ==========================  ==========================================================
test        0 .. 999                    each question once
validation  1,000,000 .. 1,000,999      each question once, without those of test
train       (2 + seed) * 1,000,000 ..   each question once, without any of the two stretches above
==========  ==========================  ==========================================================

So test and validation are the same whatever ``seed`` is, and no training question is among them, however many of them
are asked for. What this cannot rule out: a generator that fills a few templates with new numbers and names
(``gsm_symbolic`` does) shares its templates between the splits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal, get_args

from matryoshka_lora.errors import MatryoshkaError, one_line

Split = Literal["train", "validation", "test"]

HELD_OUT = 1000
"""Items that are generated for each of validation and test, before repeated questions are dropped."""

_STRETCH = 1_000_000

# Where a generator's own settings suit no small model.
PRESETS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
}

# They iterate over sets of strings, so their items depend on Python's hash seed (reasoning-gym 0.1.25).
_NEED_A_HASH_SEED = ("isomorphic_strings", "list_functions", "polynomial_multiplication", "ransom_note")


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        prompt: What is asked.
        completion: The answer that is trained on.
        entry: The generator's item, which its verifier needs.
    """

    prompt: str
    completion: str
    entry: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Task:
    """A generator with its settings. Made by `get_task`, which checks them.

    Attributes:
        name: reasoning-gym's name of the generator.
        params: Its settings, on top of its own defaults.
        seed: Which training questions are drawn; validation and test do not depend on it.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    seed: int = 0

    def examples(self, split: Split, size: int) -> list[Example]:
        """The first ``size`` questions of a split, all different; the same in every process.

        Raises:
            MatryoshkaError: There are not so many, the split is unknown, or the generator fails.
        """
        if split not in get_args(Split):
            raise MatryoshkaError(f"split is {split!r}; write one of {', '.join(map(repr, get_args(Split)))}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise MatryoshkaError(f"size is {size!r}; write how many questions are wanted, for example 200")
        found = self._distinct(split, size)
        if len(found) < size:
            raise MatryoshkaError(
                f"task {self.name!r} has {len(found)} different questions for {split}, not {size}: "
                f"write size {len(found)} or less, or give it settings that make more"
            )
        return [self._example(entry) for entry in found.values()]

    def is_correct(self, answer: str, example: Example) -> bool:
        """Whether the generator's verifier gives an answer its full score; False for anything that it cannot read."""
        verifier = self._verifier
        try:
            return bool(verifier.score_answer(answer.strip(), dict(example.entry)) == 1.0)
        except Exception:  # a verifier may parse or evaluate what a model wrote, and fail in any way
            return False

    @cached_property
    def _verifier(self) -> Any:
        return self._generator(first_seed=0, count=1)

    def _distinct(self, split: Split, size: int) -> dict[str, Mapping[str, Any]]:
        """Up to ``size`` different questions of a split, in order."""
        if split == "train":
            # A generator with few questions would be searched for ever.
            first_seed, tries = (2 + self.seed) * _STRETCH, min(_STRETCH, 20 * size + HELD_OUT)
            taken = self._all_of_test | self._all_of_validation
        elif split == "validation":
            first_seed, tries, taken = _STRETCH, HELD_OUT, self._all_of_test
        else:
            first_seed, tries, taken = 0, HELD_OUT, frozenset()
        found: dict[str, Mapping[str, Any]] = {}
        for question, entry in self._items(first_seed, tries):
            if question not in taken:
                found.setdefault(question, entry)
            if len(found) == size:
                break
        return found

    @cached_property
    def _all_of_test(self) -> frozenset[str]:
        return frozenset(self._distinct("test", HELD_OUT))

    @cached_property
    def _all_of_validation(self) -> frozenset[str]:
        return frozenset(self._distinct("validation", HELD_OUT))

    def _items(self, first_seed: int, count: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if self.name in _NEED_A_HASH_SEED and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise MatryoshkaError(
                f"task {self.name!r} makes other questions in every Python process, so that training and test would "
                "mix: set the environment variable PYTHONHASHSEED=0 for training and evaluation"
            )
        generator = self._generator(first_seed, count)
        for index in range(count):
            try:
                entry = generator[index]
                question = entry["question"]
            except Exception as error:  # 106 generators, each with failures of its own
                raise MatryoshkaError(f"task {self.name!r} cannot make a question: {one_line(error)}") from error
            yield question, entry

    def _generator(self, first_seed: int, count: int) -> Any:
        import reasoning_gym

        try:
            return reasoning_gym.create_dataset(self.name, seed=first_seed, size=count, **self.params)
        except Exception as error:  # mostly the assertions of a config's validate()
            settings = ", ".join(f"{key}={value!r}" for key, value in self.params.items()) or "its own settings"
            raise MatryoshkaError(f"task {self.name!r} does not run with {settings}: {one_line(error)}") from error

    def _example(self, entry: Mapping[str, Any]) -> Example:
        answer = entry["answer"]
        if not isinstance(answer, str):
            raise MatryoshkaError(f"task {self.name!r} has no answer in words to train on: take another task")
        return Example(entry["question"], answer, entry)


def get_task(spec: str | Mapping[str, Any], seed: int = 0) -> Task:
    """A built-in task.

    Args:
        spec: The name of a reasoning-gym generator, for example ``"family_relationships"``, or a mapping with
            ``name`` and the generator's settings: ``{"name": "chain_sum", "min_terms": 3, "max_terms": 3}``.
            ``chain_sum`` has 2 terms of 2 digits unless told otherwise.
        seed: Which training questions are drawn.

    Raises:
        MatryoshkaError: No such generator or setting; the message names the nearest ones.
    """
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = given.pop("name", None)
    known = _generators()
    if name not in known:
        close = get_close_matches(str(name), known, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "one is 'family_relationships'."
        raise MatryoshkaError(f"there is no built-in task {name!r}; {hint} They are reasoning-gym's generators.")
    settings = {f.name for f in fields(known[name])} - {"seed", "size"}
    for key in given:
        if key not in settings:
            close = get_close_matches(str(key), settings, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(settings)) or 'none'}"
            raise MatryoshkaError(f"task {name!r} has no setting {key!r}; {hint}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise MatryoshkaError(f"the seed of a task is {seed!r}; write an integer from 0 on")
    return Task(name, {**PRESETS.get(name, {}), **given}, seed)


def is_task(name: str) -> bool:
    """Whether a name is a built-in task's."""
    return name in _generators()


def nearest_tasks(name: str) -> list[str]:
    """Up to three built-in tasks with a similar name."""
    return get_close_matches(name, _generators(), n=3)


def _generators() -> dict[str, Any]:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MatryoshkaError("the built-in tasks come from reasoning-gym: pip install reasoning-gym") from error
    return {name: config for name, (_, config) in DATASETS.items()}
