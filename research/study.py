"""A study as its YAML file says it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from matryoshka_lora import MatryoshkaError, Nesting
from matryoshka_lora.training import TrainConfig, make_config
from research.recipes import RECIPES, parse_method
from research.tasks import Row, Task, make_task
from research.trainers import check_objective

_ITEMS = {"validation": 50, "test": 100}
_TRAINING: dict[str, Any] = {"max_steps": 80, "per_device_train_batch_size": 12}
_COUNTS = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
_KEYS = (
    *("title", "model", "dtype", "rank", "ranks", "tasks", "methods", "winner", "seeds", "learning_rates", "training"),
    *("items", "threads"),
)
# The study's own to say, or of no use where steps are counted and training is measured when it has ended.
_NOT_HERE = (
    *("learning_rate", "seed", "output_dir", "data", "eval_data", "lora", "nesting", "model", "dtype", "quantization"),
    *("trust_remote_code", "do_eval", "num_train_epochs"),
)


@dataclass(frozen=True)
class Study:
    """A checked study.

    Attributes:
        title: Of the report.
        model: The base model's name.
        dtype: Its dtype.
        rank: R.
        ranks: The nested ranks, the last of which is R.
        tasks: By name.
        methods: ``recipe/cut``, or ``lora-each``.
        winner: The method that the others are tested against, named before the runs; None takes the best on validation
            data.
        seeds: Of the runs that are measured on test data.
        learning_rates: The grid that every method begins with, ascending. Where its best rate is at the edge, the
            grid grows there by its own factor.
        rate_seeds: Of the grid's runs, which see validation data only. The first tries every rate, the others the two
            best.
        training: Fields of a training config, the same for every recipe.
        items: Questions of each split.
        threads: Of one run, which changes the rounding of its numbers.
    """

    title: str
    model: str
    dtype: str
    rank: int
    ranks: tuple[int, ...]
    tasks: Mapping[str, Task]
    methods: tuple[str, ...]
    winner: str | None
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    rate_seeds: tuple[int, ...]
    training: Mapping[str, Any]
    items: Mapping[str, int]
    threads: int

    @property
    def model_name(self) -> str:
        """The model as files of others may name it: of a folder on this machine, its last part."""
        path = Path(self.model).expanduser()
        # A name on the hub has one stroke at most.
        is_path = path.is_absolute() or len(path.parts) > 2 or path.is_dir()
        return path.name if is_path else self.model

    def nesting(self, rank: int) -> tuple[int, ...]:
        """The nested ranks of a run: all up to R, or for a LoRA of one rank that alone."""
        return self.ranks if rank == self.rank else (rank,)

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
        return self.tasks[task].rows("train", taken if self.tasks[task].is_built_in else None, seed)

    def train_config(self, recipe: str, rank: int, learning_rate: float, seed: int, output_dir: str) -> TrainConfig:
        """The training config of a run; its data and its rule are given to `research.training` besides."""
        return make_config(
            {
                "model": self.model,
                "dtype": self.dtype,
                "logging_strategy": "no",
                "save_strategy": "no",
                "disable_tqdm": True,
                **self.training,
                "max_steps": self.steps(recipe),
                "data": "chain_sum",
                "lora": RECIPES[recipe].lora(rank),
                "nesting": {"ranks": list(self.nesting(rank)), "scaling": RECIPES[recipe].scaling},
                "learning_rate": learning_rate,
                "seed": seed,
                "output_dir": output_dir,
            }
        )

    def settings(self, task: str, recipe: str) -> dict[str, Any]:
        """What the numbers of a run depend on besides its job: runs with others are of another study.

        It is written with each run, so it holds no token and no path.
        """
        return {
            **self.tasks[task].settings(),
            "recipe": RECIPES[recipe].settings(),
            "model": self.model_name,
            "dtype": self.dtype,
            "training": dict(self.training),
            "items": dict(self.items),
            "threads": self.threads,
        }


def load_study(path: str | PathLike[str]) -> Study:
    """Read a study.

    Its keys: ``title``, ``model``, ``dtype``, ``rank``, ``ranks`` (by default the powers of two up to it), ``tasks``
    (name to ``{task: ...}`` or to ``{train: ..., validation: ..., test: ...}``), ``methods``, ``winner``, ``seeds``,
    ``learning_rates`` (``{grid: [...], seeds: [...]}``), ``training`` (fields of ``trl.SFTConfig``), ``items`` and
    ``threads``.

    Raises:
        MatryoshkaError: The file cannot be read, or something in it is wrong.
    """
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MatryoshkaError(f"cannot read the study {path}: {error}") from error
    try:
        return make_study(given)
    except MatryoshkaError as error:
        raise MatryoshkaError(f"{path}: {error}") from error


def make_study(given: Any) -> Study:
    """Check a study given as a mapping of the YAML file's form.

    Raises:
        MatryoshkaError: A key or value is wrong; the message says which.
    """
    _check_keys("the study", given, _KEYS)
    for key in ("tasks", "methods"):
        if not given.get(key):
            raise MatryoshkaError(f"{key} is missing; a study needs tasks and methods")
    if not isinstance(given["tasks"], Mapping):
        raise MatryoshkaError(f"tasks is {given['tasks']!r}; write a mapping of names to sources")
    if not isinstance(given["methods"], list):
        raise MatryoshkaError(f"methods is {given['methods']!r}; write a list, for example [lora/svd, lora-each]")
    methods = tuple(dict.fromkeys(map(str, given["methods"])))
    recipes = list(dict.fromkeys(parse_method(method)[0] for method in methods))
    winner = given.get("winner")
    if winner is not None and winner not in methods:
        raise MatryoshkaError(f"winner is {winner!r}, which is none of the methods")
    rates, items = given.get("learning_rates") or {}, given.get("items") or {}
    _check_keys("learning_rates", rates, ("grid", "seeds"))
    _check_keys("items", items, tuple(_ITEMS))
    rank = Nesting((given.get("rank", 32),)).max_rank
    nesting = Nesting(given["ranks"]) if "ranks" in given else Nesting.powers_of_two(rank)
    if nesting.max_rank != rank:
        raise MatryoshkaError(f"the last of ranks is {nesting.max_rank}, and rank is {rank}: write the same number")
    made = Study(
        title=str(given.get("title", "A comparison of methods")),
        model=given.get("model", "smollm2-135m"),
        dtype=given.get("dtype", "bf16"),
        rank=nesting.max_rank,
        ranks=nesting.ranks,
        tasks={str(name): make_task(str(name), source) for name, source in given["tasks"].items()},
        methods=methods,
        winner=winner,
        seeds=_seeds("seeds", given.get("seeds", [0, 1, 2, 3, 4])),
        learning_rates=_rates(rates.get("grid", [1e-3, 2e-3, 4e-3])),
        rate_seeds=_seeds("learning_rates.seeds", rates.get("seeds", [100])),
        training=_training(given.get("training") or {}),
        items={split: _count(f"items.{split}", count) for split, count in {**_ITEMS, **items}.items()},
        threads=_count("threads", given.get("threads", 1)),
    )
    if counted := sorted({*made.rate_seeds} & {*made.seeds}):
        raise MatryoshkaError(
            f"learning_rates.seeds has {counted[0]}, one of seeds too: rates are chosen on runs that are not counted"
        )
    for recipe in recipes:  # finds wrong arguments now
        config = made.train_config(recipe, made.rank, made.learning_rates[0], 0, "unused")
        check_objective(RECIPES[recipe].objective, config)
    return made


def _check_keys(name: str, given: Any, known: tuple[str, ...]) -> None:
    if not isinstance(given, Mapping):
        raise MatryoshkaError(f"{name} is {given!r}; write a mapping of keys to values")
    for key in given:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}"
            raise MatryoshkaError(f"{name} has no key {str(key)!r}; {hint}")


def _training(given: Any) -> dict[str, Any]:
    from trl import SFTConfig

    _check_keys("training", given, (*(field.name for field in fields(SFTConfig) if field.init), *_NOT_HERE))
    for key, value in given.items():
        if key in _NOT_HERE or key.startswith("eval_"):
            raise MatryoshkaError(
                f"training.{key} has no place in a study, which sets it, counts max_steps or measures when training "
                "has ended: leave it out"
            )
        if "token" in key or not isinstance(value, (bool, int, float, str)) or "/" in str(value):
            raise MatryoshkaError(f"training.{key} stands in every run's file: only plain words and numbers may")
    training = {**_TRAINING, **given}
    for key in _COUNTS:
        _count(f"training.{key}", training.get(key, 1))
    return training


def _rates(given: Any) -> tuple[float, ...]:
    good = isinstance(given, list) and len(given) > 1 and all(type(rate) in (int, float) for rate in given)
    if not good or not all(0 < rate < math.inf for rate in given) or sorted(set(given)) != given:
        raise MatryoshkaError(
            f"learning_rates.grid is {given!r}; write at least two ascending rates, as 1.0e-3 and not as 1e-3"
        )
    return tuple(map(float, given))


def _seeds(name: str, given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or not given or len(set(map(str, given))) != len(given):
        raise MatryoshkaError(f"{name} is {given!r}; write a list of different whole numbers")
    for seed in given:
        if type(seed) is not int or seed < 0:
            raise MatryoshkaError(f"one of {name} is {seed!r}; write a whole number from 0 on")
    return tuple(given)


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise MatryoshkaError(f"{name} is {value!r}; write a positive whole number")
    return value
