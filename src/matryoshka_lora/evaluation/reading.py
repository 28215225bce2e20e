"""Reading back what ``matryoshka eval`` has written; no model and no harness is loaded for it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.select import Measured
from matryoshka_lora.files import EVALUATION_FOLDER, EVALUATION_NAME, settle

EXAMPLES_NAME = "examples.jsonl"


def find_evaluation(path: str | PathLike[str]) -> Path:
    """The ``evaluation.json`` that a path means: the file, its folder, or an adapter that has been evaluated.

    Raises:
        MatryoshkaError: There is none, or it is that of other weights than the adapter has that it lies in.
    """
    given = Path(path)
    places = (given, given / EVALUATION_FOLDER) if given.is_dir() else (given.parent,)
    for place in places:
        settle(place)
    for found in (given, *(place / EVALUATION_NAME for place in places if given.is_dir())):
        if found.is_file():
            _check_weights(found)
            return found
    if (given / "adapter_config.json").is_file():
        raise MatryoshkaError(
            f"{given} is an adapter that was never evaluated, or into another folder; "
            f"write: matryoshka eval {given} --tasks family_relationships"
        )
    if given.is_dir():
        raise MatryoshkaError(f"there is no {EVALUATION_NAME} in {given}; give the folder that matryoshka eval wrote")
    raise MatryoshkaError(f"{given} does not exist; give what matryoshka eval wrote, a file or its folder")


def find_adapter(file: Path) -> Path:
    """The adapter of an ``evaluation.json``: the folder around the evaluation's, or else what the file calls it.

    Raises:
        MatryoshkaError: The file is no evaluation.
    """
    about = read_evaluation(file).get("adapter")
    named = Path(str(about.get("path", "ADAPTER"))) if isinstance(about, dict) else Path("ADAPTER")
    around = file.resolve().parent.parent
    if not (around / "adapter_config.json").is_file():
        return named
    # In the words that the user has: a relative path where there is one.
    near = Path(os.path.relpath(around))
    return around if os.pardir in near.parts else near


def _check_weights(file: Path) -> None:
    adapter = file.resolve().parent.parent
    if file.resolve().parent.name != EVALUATION_FOLDER or not (adapter / "adapter_config.json").is_file():
        return
    about = read_evaluation(file).get("adapter")
    measured = about.get("sha256") if isinstance(about, dict) else None
    if measured is not None and measured != weights_hash(adapter):
        raise MatryoshkaError(
            f"{file} was measured on other weights than {adapter} has now: evaluate it again, with --force"
        )


def weights_hash(adapter: Path) -> str:
    """The hash of everything in an adapter's folder that its answers depend on, and of nothing else there."""
    found = sha256()
    descriptions = [adapter / name for name in ("adapter_config.json", "nesting.json")]
    for file in sorted((*adapter.glob("*.safetensors"), *(file for file in descriptions if file.is_file()))):
        found.update(file.name.encode())
        found.update(file.read_bytes())
    return found.hexdigest()


def read_evaluation(file: Path) -> dict[str, Any]:
    """The content of an ``evaluation.json`` of format 2.

    Raises:
        MatryoshkaError: It is something else.
    """
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MatryoshkaError(f"{file} cannot be read as JSON: {error}") from error
    is_evaluation = isinstance(data, dict) and "format" in data
    if not is_evaluation or data["format"] != 2:
        what = f"has format {data['format']!r}" if is_evaluation else "is no evaluation"
        raise MatryoshkaError(f"{file} {what}, and format 2 is needed; matryoshka eval ADAPTER --tasks ... writes it")
    return dict(data)


def read_measured(file: Path, task: str | None = None) -> tuple[str, Measured]:
    """A task's name and its first metric at every rank, by question where ``examples.jsonl`` stands beside the file.

    Args:
        file: An ``evaluation.json``.
        task: May be None where there is only one.

    Raises:
        MatryoshkaError: The file is damaged, has no such task, or has several and none is named.
    """
    data = read_evaluation(file)
    try:
        tasks = data["tasks"]
        name = _task_name(file, list(tasks), task)
        found = tasks[name]
        metric = found["metric"]
        first = found["metrics"][metric]
        measured = Measured(
            ranks=data["ranks"],
            metric=metric,
            items=found["items"],
            values=first["value"],
            errors=first["stderr"],
            bytes=data["bytes"],
            latency_ms=data["latency_ms"],
            higher_is_better=first["higher_is_better"],
            by_question=_by_question(file.with_name(EXAMPLES_NAME), name, metric),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise MatryoshkaError(f"{file} is damaged ({error!r}); evaluate the adapter again") from error
    return name, measured


def _task_name(file: Path, names: list[str], wanted: str | None) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return str(wanted)
    problem = f"has {len(names)} tasks" if wanted is None else f"has no task {wanted!r}"
    raise MatryoshkaError(f"{file} {problem}; write --task and one of: {', '.join(names)}")


def _by_question(file: Path, task: str, metric: str) -> dict[int, list[float]]:
    """Each rank's metric of every question; a rank that lacks one is left out."""
    if not file.is_file():
        return {}
    found: dict[int, list[float]] = {}
    lines = 0
    try:
        with open(file, encoding="utf-8") as text:
            for line in text:
                example: Mapping[str, Any] = json.loads(line)
                if example["task"] != task:
                    continue
                lines += 1
                for rank, value in example["metrics"].get(metric, {}).items():
                    if not math.isfinite(value):
                        raise ValueError(f"{value} is not finite")
                    found.setdefault(int(rank), []).append(float(value))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MatryoshkaError(f"{file} is damaged ({error!r}); move it away, or evaluate the adapter again") from error
    return {rank: values for rank, values in found.items() if len(values) == lines}
