"""One finished training run of a study as a file, and several of them as one method's curve."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matryoshka_lora import MatryoshkaError

FORMAT = 2


@dataclass(frozen=True)
class Job:
    """One training run, before it is done.

    Attributes:
        recipe: How the adapter is trained; a name of `research.recipes.RECIPES`.
        task: A name of the study's tasks.
        rank: R of the adapter that is trained.
        learning_rate: Its peak.
        seed: Of initialisation, order of rows, drawn ranks, and which training questions there are.
        split: What is measured afterwards, ``"validation"`` or ``"test"``.
    """

    recipe: str
    task: str
    rank: int
    learning_rate: float
    seed: int
    split: str

    def path(self, folder: Path) -> Path:
        """The run's file below a study's folder of runs."""
        name = f"{self.recipe}-r{self.rank}-lr{self.learning_rate:g}-seed{self.seed}.json"
        return folder / self.split / self.task / name


@dataclass(frozen=True)
class Curve:
    """What one way of cutting an adapter gives at each rank.

    Attributes:
        loss: Held-out loss at each rank, nats per token of the answers.
        accuracy: The share of questions whose whole reference answer is what greedy decoding writes, 0 to 1; of
            choices, the mean of `research.commonsense.choose` over its tasks.
        parts: Of choices, what `research.commonsense.choose` has found for each task.
    """

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    parts: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """A finished `Job`.

    Attributes:
        job: What was done.
        ranks: At which the curves are measured.
        curves: By the name of the cut; see `research.cuts`.
        diverged: The cuts that are no longer finite numbers: all of them, where training diverged.
        cost: ``tokens`` that were trained on, ``seconds`` of training and of each cut (this machine's), ``parameters``
            of the adapter.
        settings: Everything else that the numbers depend on: training arguments, items, model, threads, ways of the
            cuts.
        versions: Of the packages.
    """

    job: Job
    ranks: tuple[int, ...]
    curves: dict[str, Curve]
    cost: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    diverged: tuple[str, ...] = ()

    def done(self) -> set[str]:
        """The cuts that need not be measured again."""
        return {*self.curves, *self.diverged}

    def write(self, folder: Path) -> None:
        """Write the run's file, all or nothing.

        Raises:
            MatryoshkaError: It cannot be written.
        """
        write_text(self.job.path(folder), json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Run:
        """The inverse of `write`.

        Raises:
            MatryoshkaError: The file is damaged or of another format.
        """
        try:
            found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] == 1:
                found = _of_version_1(found)
            elif found["format"] != FORMAT:
                raise ValueError(f"format {found['format']}, and this version reads 1 and {FORMAT}")
            curves = {
                name: Curve(tuple(curve["loss"]), tuple(curve["accuracy"]), curve.get("parts"))
                for name, curve in found["curves"].items()
            }
            others = {key: found[key] for key in ("cost", "settings", "versions")}
            return cls(
                Job(**found["job"]), tuple(found["ranks"]), curves, **others, diverged=tuple(found.get("diverged", ()))
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MatryoshkaError(f"{path} is no run of a study ({error}): delete it to run it again") from error


def _of_version_1(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run that version 0.1 has written, in the words of this one.

    ``svd`` was called ``frobenius``; files had a path beside the digest; an order of 480 rows was one of 40 steps.
    """

    def renamed(cuts: Mapping[str, Any]) -> dict[str, Any]:
        return {"svd" if cut == "frobenius" else cut: value for cut, value in cuts.items()}

    settings, cost = dict(found["settings"]), dict(found["cost"])
    source, files = settings.get("source", {}), settings.get("files")
    if "task" not in source:
        settings["source"] = {} if files is None else {split: source[split] for split in source.keys() - files.keys()}
    order = {"steps": 40, "learning_rate": 0.02}
    cuts = renamed(settings.get("cuts", {}))
    settings["cuts"] = {cut: {"rows": 480} if how == order else how for cut, how in cuts.items()}
    if "cuts" in cost:
        cost["cuts"] = renamed(cost["cuts"])
    diverged = ["svd" if cut == "frobenius" else cut for cut in found.get("diverged", ())]
    return {**found, "settings": settings, "cost": cost, "curves": renamed(found["curves"]), "diverged": diverged}


def write_text(path: Path, text: str) -> None:
    """Write a file, all or nothing, with its folders.

    Raises:
        MatryoshkaError: It cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        unfinished.replace(path)
    except OSError as error:
        raise MatryoshkaError(f"cannot write {path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Result:
    """One method on one task with one seed: a curve over the ranks, however many training runs it took.

    Attributes:
        method: ``recipe/cut``, or ``lora-each``, which is LoRA trained at each rank by itself.
        task: The task's name.
        seed: The seed.
        ranks: Strictly increasing.
        curve: Loss and accuracy at each rank.
        learning_rates: What each rank was trained with, chosen on validation data.
        tokens: Trained on, over all runs that the curve took.
        seconds: The same, of training and of making the cut.
        parameters: Of the trained adapters, over all runs.
    """

    method: str
    task: str
    seed: int
    ranks: tuple[int, ...]
    curve: Curve
    learning_rates: tuple[float, ...]
    tokens: int
    seconds: float
    parameters: int


@dataclass(frozen=True)
class Tried:
    """The learning rates that were tried for one method on one task, on validation data.

    Attributes:
        method: As in `Result`.
        task: The task's name.
        rank: R of the adapters.
        losses: By rate, the mean validation loss over the nested ranks, or for a method with a run for each rank that
            at its rank; infinite where training diverged.
        chosen: The rate with the lowest, or None while runs are missing.
    """

    method: str
    task: str
    rank: int
    losses: Mapping[float, float]
    chosen: float | None

    @property
    def loss(self) -> float:
        """That of the chosen rate; infinite without one."""
        return math.inf if self.chosen is None else self.losses[self.chosen]
