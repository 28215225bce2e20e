"""The training runs of a study, as JSON lines: a finished run is appended as a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matryoshka_lora import MatryoshkaError


@dataclass(frozen=True)
class Job:
    """A training run before it is done.

    Attributes:
        recipe: How the adapter is trained; a name of `research.study.RECIPES`.
        task: The name of a task of the study.
        rank: R of the adapter.
        learning_rate: The peak learning rate.
        seed: The seed of the initialisation, the order of examples, the drawn ranks and the
            training questions.
        split: The examples to measure on, ``"validation"`` or ``"test"``.
    """

    recipe: str
    task: str
    rank: int
    learning_rate: float
    seed: int
    split: str


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy of a deployment at each rank.

    Attributes:
        loss: The loss of the answers, in nats per token.
        accuracy: The share of questions whose whole answer greedy decoding would write. For
            questions with choices, the mean over the tasks of `research.commonsense`.
        parts: For questions with choices, the shares by task and metric. The first share is that of
            the base model.
    """

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    parts: Mapping[str, Mapping[str, list[float]]] | None = None


@dataclass(frozen=True)
class Run:
    """A finished job. The fields are the keys of a line of JSON.

    Attributes:
        job: The job.
        ranks: The ranks of the curves.
        curves: The curves by deployment; see `research.deployments`.
        cost: ``tokens`` and ``seconds`` of training, ``parameters`` of the adapter, and ``cuts``:
            tokens and seconds by deployment. ``trained`` also has its ``outcome`` and
            ``examples_by_rank``; see `matryoshka_lora.TrainRanksResult`.
        settings: A hash of everything else that the numbers depend on; see `Study.settings`.
        versions: The versions of the packages.
        diverged: The deployments without a finite loss; all of them if training diverged.
    """

    job: Job
    ranks: tuple[int, ...]
    curves: dict[str, Curve]
    cost: dict[str, Any]
    settings: str
    versions: dict[str, str]
    diverged: tuple[str, ...] = ()

    def has(self, deployment: str) -> bool:
        """Return whether a deployment was measured, or has diverged."""
        return deployment in self.curves or deployment in self.diverged

    def merge(self, later: Run) -> Run:
        """Return a run with the deployments of two runs of the same job."""
        deployment_costs = {**self.cost["cuts"], **later.cost["cuts"]}
        return Run(
            self.job,
            self.ranks,
            curves={**self.curves, **later.curves},
            cost={**self.cost, "cuts": deployment_costs},
            settings=self.settings,
            versions=_merge_versions(self.versions, later.versions),
            diverged=tuple(dict.fromkeys((*self.diverged, *later.diverged))),
        )

    def to_line(self) -> str:
        """Return the run as a line of JSON."""
        content = asdict(self)
        for curve in content["curves"].values():
            if curve["parts"] is None:
                del curve["parts"]
        if not self.diverged:
            del content["diverged"]
        return json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Run:
        """Return the run of a line of `to_line`."""
        content = json.loads(line)
        curves = {
            deployment: Curve(tuple(curve["loss"]), tuple(curve["accuracy"]), curve.get("parts"))
            for deployment, curve in content["curves"].items()
        }
        return cls(
            Job(**content["job"]),
            tuple(content["ranks"]),
            curves,
            cost=content["cost"],
            settings=content["settings"],
            versions=content["versions"],
            diverged=tuple(content.get("diverged", ())),
        )


def _merge_versions(earlier: Mapping[str, str], later: Mapping[str, str]) -> dict[str, str]:
    """Return the versions by package; several ones are joined by "and"."""
    versions: dict[str, str] = {}
    for name in dict.fromkeys((*earlier, *later)):
        numbers: list[str] = []
        for source in (earlier, later):
            if name in source:
                numbers += source[name].split(" and ")
        versions[name] = " and ".join(dict.fromkeys(numbers))
    return versions


def read_runs(files: Iterable[Path]) -> dict[Job, Run]:
    """Return the runs of some files; several lines of a job become one run.

    Raises:
        MatryoshkaError: A line is not a run.
    """
    runs: dict[Job, Run] = {}
    for file in files:
        for number, line in enumerate(complete_lines(file), start=1):
            try:
                run = Run.from_line(line)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise MatryoshkaError(
                    f"{file}, line {number} is not a run ({error}). Delete the line to repeat the "
                    "run."
                ) from error
            runs[run.job] = runs[run.job].merge(run) if run.job in runs else run
    return runs


def complete_lines(file: Path) -> list[str]:
    """Return the lines of a file, without an incomplete last line of a killed process."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def append_line(file: Path, line: str) -> None:
    """Append a line to a file; an incomplete last line is replaced."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as target:
        target.seek(0)
        content = target.read()
        if content and not content.endswith(b"\n"):
            target.truncate(content.rfind(b"\n") + 1)
        target.write(line.encode())
        target.flush()
        os.fsync(target.fileno())
