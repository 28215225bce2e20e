"""Keep a study's training runs as JSON lines: a finished run is a line that is appended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matryoshka_lora import MatryoshkaError


@dataclass(frozen=True)
class Job:
    """One training run, before it is done.

    Attributes:
        recipe: How the adapter is trained; a name of `research.study.RECIPES`.
        task: A name of the study's tasks.
        rank: R of the adapter.
        learning_rate: Its peak.
        seed: It decides initialisation, the order of rows, drawn ranks and the training questions.
        split: What is measured afterwards, ``"validation"`` or ``"test"``.
    """

    recipe: str
    task: str
    rank: int
    learning_rate: float
    seed: int
    split: str


@dataclass(frozen=True)
class Curve:
    """What one way to deploy an adapter gives at each rank.

    Attributes:
        loss: The loss on measured rows, nats per token of the answers.
        accuracy: The share of questions whose whole answer is what greedy decoding writes, 0 to 1;
            for questions with choices, the mean over the tasks of `research.commonsense`.
        parts: For questions with choices, the shares by task and metric; the first is the base
            model's.
    """

    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    parts: Mapping[str, Mapping[str, list[float]]] | None = None


@dataclass(frozen=True)
class Run:
    """A finished job.

    Attributes:
        job: What was done.
        ranks: The ranks at which the curves are measured.
        curves: The curves by the name of the cut, see `research.cuts`.
        cost: ``tokens`` of training, ``seconds`` of training, ``parameters`` of the adapter, and
            ``cuts``: the same tokens and seconds for each cut.
        settings: A hash of everything else that the numbers depend on, see `Study.settings`.
        versions: The versions of the packages.
        diverged: The cuts that gave no finite number; all of them where training diverged.
    """

    job: Job
    ranks: tuple[int, ...]
    curves: dict[str, Curve]
    cost: dict[str, Any]
    settings: str
    versions: dict[str, str]
    diverged: tuple[str, ...] = field(default=())

    def has(self, cut: str) -> bool:
        """Return whether a cut needs no further measurement."""
        return cut in self.curves or cut in self.diverged

    def joined(self, later: Run) -> Run:
        """Return one run with the cuts of two runs of the same job."""
        cuts = {**self.cost["cuts"], **later.cost["cuts"]}
        curves, cost = {**self.curves, **later.curves}, {**self.cost, "cuts": cuts}
        diverged = tuple(dict.fromkeys((*self.diverged, *later.diverged)))
        each, versions = (self.versions, later.versions), dict[str, str]()
        for name in dict.fromkeys(key for one in each for key in one):
            numbers = " and ".join(one[name] for one in each if name in one).split(" and ")
            versions[name] = " and ".join(dict.fromkeys(numbers))
        return Run(self.job, self.ranks, curves, cost, self.settings, versions, diverged)

    def to_line(self) -> str:
        """Return the run as one line of JSON."""
        found = asdict(self)
        for curve in found["curves"].values():
            if curve["parts"] is None:
                del curve["parts"]
        if not self.diverged:
            del found["diverged"]
        return json.dumps(found, allow_nan=False, separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Run:
        """Return the run of a line that `to_line` has written."""
        found = json.loads(line)
        job, ranks, curves = found.pop("job"), found.pop("ranks"), found.pop("curves")
        made = {
            name: Curve(tuple(c["loss"]), tuple(c["accuracy"]), c.get("parts"))
            for name, c in curves.items()
        }
        diverged = tuple(found.pop("diverged", ()))
        return cls(Job(**job), tuple(ranks), made, diverged=diverged, **found)


def read(files: Iterable[Path]) -> dict[Job, Run]:
    """Read runs; several lines of one job become one run.

    Raises:
        MatryoshkaError: A line is no run.
    """
    found: dict[Job, Run] = {}
    for file in files:
        for number, line in enumerate(whole_lines(file), start=1):
            try:
                run = Run.from_line(line)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise MatryoshkaError(
                    f"{file}, line {number} is no run ({error}): delete the line to run it again"
                ) from error
            found[run.job] = found[run.job].joined(run) if run.job in found else run
    return found


def whole_lines(file: Path) -> list[str]:
    """Return the lines of a file, without a last one that a killed process has left."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def append(file: Path, run: Run) -> None:
    """Append a run to a file, in place of an unfinished last line."""
    append_line(file, run.to_line())


def append_line(file: Path, line: str) -> None:
    """Append a line to a file, in place of an unfinished last one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as target:
        target.seek(0)
        text = target.read()
        if text and not text.endswith(b"\n"):
            target.truncate(text.rfind(b"\n") + 1)
        target.write(line.encode())
        target.flush()
        os.fsync(target.fileno())
