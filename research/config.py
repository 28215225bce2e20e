"""A study as its YAML file says it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.data.questions import Row, rows_from
from matryoshka_lora.models import EMBEDDED
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.privacy import marked
from research.recipes import EACH, RECIPES, parse_method
from matryoshka_lora.data.tasks import get_task
from matryoshka_lora.training.checks import check_keys, names, read_yaml
from matryoshka_lora.training.config import TrainConfig, make_config
from matryoshka_lora.data.sources import load_data, parse_data

_KEYS = (
    *("title", "model", "dtype", "rank", "tasks", "methods", "winner", "seeds", "learning_rates", "training", "items"),
    "threads",
)
_SPLITS = ("train", "validation", "test")
_ITEMS = {"validation": 50, "test": 100}
_TRAINING: dict[str, Any] = {"max_steps": 80, "per_device_train_batch_size": 12}
_FIXED = ("learning_rate", "seed", "output_dir", "data", "lora", "nesting", "model", "dtype")
_NEVER = ("do_eval", "num_train_epochs")
_COUNTS = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class StudyTask:
    """Where a study's questions come from.

    Attributes:
        name: In tables and file names.
        source: ``{"task": ..., **settings}`` for a built-in task, or a data source for each split.
    """

    name: str
    source: Mapping[str, Any]

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each split that is a local file, as it is now.

        Raises:
            MatryoshkaError: There is no such file.
        """
        found = {}
        for split in _SPLITS if "task" not in self.source else ():
            path = parse_data(self.source[split], split).get("path")
            if path is not None:
                file = Path(path).expanduser()
                try:
                    status = file.stat()
                    found[split] = _digest(file, status.st_size, status.st_mtime_ns)
                except OSError as error:
                    raise MatryoshkaError(
                        f"tasks.{self.name}.{split}: cannot read {path} ({error.strerror}): write its path from here, "
                        "or the whole path"
                    ) from error
        return found

    def rows(self, split: str, count: int | None, seed: int = 0) -> list[Row]:
        """Questions with their answers; the seed chooses those of a built-in task's training split.

        A built-in question is plain text that ends with "Answer:", without chat template.

        Raises:
            MatryoshkaError: There are not so many, or a file cannot be read.
        """
        if "task" not in self.source:
            data, source = parse_data(self.source[split], split), str(self.source[split])
            rows = rows_from(load_data(data if count is None else {**data, "size": count}), source)
            if count is not None and len(rows) < count:
                raise MatryoshkaError(f"{source} has {len(rows)} rows, not {count}: give more, or lower items.{split}")
            return rows
        spec = {"name" if key == "task" else key: value for key, value in self.source.items()}
        examples = get_task(spec, seed).examples(split, count)  # type: ignore[arg-type]
        return [Row(f"{example.prompt}\nAnswer:", f" {example.completion}") for example in examples]


@dataclass(frozen=True)
class Study:
    """A checked study.

    Attributes:
        title: Of the report.
        model: The base model's name.
        dtype: Its dtype.
        rank: R; the nested ranks are the powers of two up to it.
        tasks: By name.
        methods: ``recipe/cut``, or ``lora-each``.
        winner: The method that the others are tested against, named before the runs; None takes the best on validation
            data.
        seeds: Of the runs that are measured on test data.
        learning_rates: The grid that every method begins with, ascending. Where its best rate is at the edge, the
            grid grows there by its own factor.
        rate_seed: The seed of the grid's runs, which see validation data only.
        training: Fields of a training config, the same for every recipe.
        items: Questions of each split.
        threads: Of one run, which changes the rounding of its numbers.
    """

    title: str
    model: str
    dtype: str
    rank: int
    tasks: Mapping[str, StudyTask]
    methods: tuple[str, ...]
    winner: str | None
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    rate_seed: int
    training: Mapping[str, Any]
    items: Mapping[str, int]
    threads: int

    def nesting(self, rank: int) -> tuple[int, ...]:
        """The nested ranks of a run: all up to R, or for a LoRA of one rank that alone."""
        return Nesting.powers_of_two(self.rank).ranks if rank == self.rank else (rank,)

    def steps(self, recipe: str) -> int:
        """Optimizer steps of one run."""
        return int(RECIPES[recipe].length * self.training["max_steps"])

    def train_rows(self, recipe: str) -> int:
        """That one run takes, counting those that it sees again."""
        accumulated = self.training.get("gradient_accumulation_steps", 1)
        return int(self.steps(recipe) * self.training["per_device_train_batch_size"] * accumulated)

    def train_set(self, recipe: str, task: str, seed: int) -> list[Row]:
        """The training rows of one run: of a built-in task as many as it takes, so that each is seen once unless the
        recipe says otherwise; of a file all.

        Raises:
            MatryoshkaError: There are not so many, or a file cannot be read.
        """
        taken = self.train_rows(recipe if RECIPES[recipe].new_rows else "lora")
        return self.tasks[task].rows("train", taken if "task" in self.tasks[task].source else None, seed)

    def train_config(
        self, recipe: str, rank: int, learning_rate: float, seed: int, data: Any, output_dir: str
    ) -> TrainConfig:
        """The training config of a run."""
        return make_config(
            {
                "model": self.model,
                "dtype": self.dtype,
                "logging_strategy": "no",
                "save_strategy": "no",
                **self.training,
                "max_steps": self.steps(recipe),
                "data": data,
                # As it is trained: each cut of the study says itself what becomes of P.
                "nesting": {
                    "inference": "prefix",
                    **RECIPES[recipe].nesting,
                    "ranks": list(self.nesting(rank)),
                    "reorder": False,
                },
                "learning_rate": learning_rate,
                "seed": seed,
                "output_dir": output_dir,
            }
        )

    def settings(self, task: str, recipe: str) -> dict[str, Any]:
        """What the numbers of a run depend on besides its job: runs with others are of another study.

        It is written with each run, so it holds no token and no absolute path.
        """
        found: dict[str, Any] = {
            "source": dict(self.tasks[task].source),
            "files": self.tasks[task].digests,
            "recipe": RECIPES[recipe].settings(),
            "model": self.model,
            "dtype": self.dtype,
            "training": dict(self.training),
            "items": dict(self.items),
            "threads": self.threads,
        }
        return {key: marked(value) for key, value in found.items()}


def load_study(path: str | PathLike[str]) -> Study:
    """Read a study.

    Its keys: ``title``, ``model``, ``dtype``, ``rank``, ``tasks`` (name to ``{task: ...}`` or to ``{train: ...,
    validation: ..., test: ...}``), ``methods``, ``winner``, ``seeds``, ``learning_rates`` (``{grid: [...], seed: n}``),
    ``training`` (fields of ``trl.SFTConfig``), ``items`` and ``threads``.

    Raises:
        MatryoshkaError: The file cannot be read, or something in it is wrong.
    """
    try:
        return make_study(read_yaml(path))
    except MatryoshkaError as error:
        raise MatryoshkaError(f"{path}: {error}") from error


def make_study(given: Mapping[str, Any]) -> Study:
    """Check a study given as a mapping of the YAML file's form.

    Raises:
        MatryoshkaError: A key or value is wrong; the message says which.
    """
    from trl import SFTConfig

    from research.adalora import check_adalora
    from research.objectives import check_objective

    check_keys(given, _KEYS)
    for key in ("tasks", "methods"):
        if not given.get(key):
            raise MatryoshkaError(f"{key} is missing; a study needs tasks and methods")
    for key in ("tasks", "training", "items"):
        if not isinstance(given.get(key) or {}, Mapping):
            raise MatryoshkaError(f"{key} is {given[key]!r}; write a mapping of keys to values")
    if not isinstance(given["methods"], list):
        raise MatryoshkaError(f"methods is {given['methods']!r}; write a list, for example [lora/frobenius, lora-each]")
    methods = tuple(dict.fromkeys(map(str, given["methods"])))
    for method in methods:
        if method != EACH:
            parse_method(method)
    winner = given.get("winner")
    if winner is not None and winner not in methods:
        raise MatryoshkaError(f"winner is {winner!r}, which is none of the methods")
    rates = given.get("learning_rates") or {}
    check_keys(rates, ("grid", "seed"), "learning_rates")
    training = {**_TRAINING, **(given.get("training") or {})}
    for key in _FIXED:
        if key in training:
            raise MatryoshkaError(f"training.{key} is the study's to set: leave it out")
    for key in training:
        if key in _NEVER or str(key).startswith("eval_"):
            raise MatryoshkaError(
                f"training.{key} has no place in a study, which counts max_steps and measures when training has ended: "
                "leave it out"
            )
    check_keys(training, (*names(SFTConfig), "quantization", "trust_remote_code"), "training")
    for key in _COUNTS:
        _count(f"training.{key}", training.get(key, 1))
    items = {**_ITEMS, **(given.get("items") or {})}
    check_keys(items, tuple(_ITEMS), "items")
    made = Study(
        title=str(given.get("title", "A comparison of methods")),
        model=given.get("model", EMBEDDED),
        dtype=given.get("dtype", "bf16"),
        rank=Nesting((given.get("rank", 32),)).max_rank,
        tasks={str(name): _task(str(name), source) for name, source in dict(given["tasks"]).items()},
        methods=methods,
        winner=winner,
        seeds=_seeds(given.get("seeds", [0, 1, 2, 3, 4])),
        learning_rates=_rates(rates.get("grid", [1e-3, 2e-3, 4e-3])),
        rate_seed=_seed(rates.get("seed", 100)),
        training=training,
        items={split: _count(f"items.{split}", count) for split, count in items.items()},
        threads=_count("threads", given.get("threads", 1)),
    )
    if made.rate_seed in made.seeds:
        raise MatryoshkaError(
            f"learning_rates.seed {made.rate_seed} is one of seeds: rates are chosen on runs that are not counted"
        )
    for recipe in dict.fromkeys(parse_method(method)[0] for method in methods):  # finds wrong arguments now
        config = made.train_config(recipe, made.rank, made.learning_rates[0], 0, "chain_sum", "unused")
        check_objective(RECIPES[recipe].objective, config)
        if RECIPES[recipe].objective == "adalora":
            check_adalora(config)
    return made


@lru_cache
def _digest(file: Path, size: int, changed: int) -> str:
    """Of a file that is asked for at every look at the runs: its size and time say whether it is another."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _task(name: str, source: Any) -> StudyTask:
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise MatryoshkaError(f"tasks has {name!r}, which cannot name a folder: write letters, digits, - and _")
    if not isinstance(source, Mapping) or ("task" in source) == all(split in source for split in _SPLITS):
        raise MatryoshkaError(
            f"tasks.{name} is {source!r}; write {{task: chain_sum}}, or {{train: a.jsonl, validation: b.jsonl, test: "
            "c.jsonl}"
        )
    try:
        if "task" in source:
            get_task({"name" if key == "task" else key: value for key, value in source.items()})
        else:
            check_keys(source, _SPLITS)
            for split in _SPLITS:
                parse_data(source[split], split)
    except MatryoshkaError as error:
        raise MatryoshkaError(f"tasks.{name}: {error}") from error
    return StudyTask(name, dict(source))


def _rates(given: Any) -> tuple[float, ...]:
    good = isinstance(given, list) and len(given) > 1 and all(type(rate) in (int, float) for rate in given)
    if not good or not all(0 < rate < math.inf for rate in given) or sorted(set(given)) != given:
        raise MatryoshkaError(f"learning_rates.grid is {given!r}; write at least two ascending rates")
    return tuple(map(float, given))


def _seeds(given: Any) -> tuple[int, ...]:
    good = isinstance(given, list) and given and all(type(seed) is int and seed >= 0 for seed in given)
    if not good or len(set(given)) != len(given):
        raise MatryoshkaError(f"seeds is {given!r}; write different whole numbers from 0 on")
    return tuple(given)


def _seed(given: Any) -> int:
    if type(given) is not int or given < 0:
        raise MatryoshkaError(f"learning_rates.seed is {given!r}; write a whole number from 0 on")
    return given


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise MatryoshkaError(f"{name} is {value!r}; write a positive whole number")
    return value
