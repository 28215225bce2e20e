"""Reading back what `matryoshka_lora.evaluate` has written; no model and no harness is loaded for it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.results import EXAMPLES_NAME, FORMAT, Evaluation
from matryoshka_lora.files import EVALUATION_FOLDER, EVALUATION_NAME, settle
from matryoshka_lora.formats.config import CONFIG_NAME
from matryoshka_lora.formats.fingerprint import check_measured, fingerprint
from matryoshka_lora.formats.opened import open_adapter

_READABLE = (2, FORMAT)  # 2 is that of version 0.1, whose words for the adapter were others


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read back what ``matryoshka eval`` has written; no model and no harness is loaded for it.

    Args:
        path: An ``evaluation.json``, its folder, or an adapter that has been evaluated.

    Raises:
        MatryoshkaError: There is none, it is damaged, or it is that of other weights than the adapter around it has.
    """
    file = find_evaluation(path)
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MatryoshkaError(f"{file} cannot be read as JSON: {error}") from error
    is_evaluation = isinstance(data, dict) and "format" in data
    if not is_evaluation or data["format"] not in _READABLE:
        what = f"has format {data['format']!r}" if is_evaluation else "is no evaluation"
        raise MatryoshkaError(f"{file} {what}, and format {FORMAT} is needed; matryoshka eval ADAPTER writes it")
    about = {key: value for key, value in data.items() if key not in ("format", "ranks", "tasks")}
    around = _around(file)
    if around is not None:
        adapter = open_adapter(around)
        check_measured(file, adapter)
        if isinstance(about.get("adapter"), dict):  # version 0.1 knew it by another hash
            about["adapter"] = {**about["adapter"], "sha256": fingerprint(adapter)}
    try:
        evaluation = Evaluation(about, data["ranks"], dict(data["tasks"]), _read_examples(file))
        for name in evaluation.tasks:
            evaluation.measured(name)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, MatryoshkaError):
            raise
        raise MatryoshkaError(f"{file} is damaged ({error!r}); evaluate the adapter again") from error
    if not evaluation.tasks:
        raise MatryoshkaError(f"{file} holds no task; evaluate the adapter again")
    return evaluation


def find_evaluation(path: str | os.PathLike[str]) -> Path:
    """The ``evaluation.json`` that a path means: the file, its folder, or an adapter that has been evaluated.

    Raises:
        MatryoshkaError: There is none.
    """
    given = Path(path)
    places = (given, given / EVALUATION_FOLDER) if given.is_dir() else (given.parent,)
    for place in places:
        settle(place)
    for found in (given, *(place / EVALUATION_NAME for place in places if given.is_dir())):
        if found.is_file():
            return found
    if (given / CONFIG_NAME).is_file():
        raise MatryoshkaError(
            f"{given} is an adapter that was never evaluated, or into another folder; "
            f"write: matryoshka eval {given} --tasks family_relationships"
        )
    if given.is_dir():
        raise MatryoshkaError(f"there is no {EVALUATION_NAME} in {given}; give the folder that matryoshka eval wrote")
    raise MatryoshkaError(f"{given} does not exist; give what matryoshka eval wrote, a file or its folder")


def find_adapter(path: str | os.PathLike[str]) -> Path:
    """The adapter of an evaluation: the folder around the evaluation's, or else what the file calls it.

    Raises:
        MatryoshkaError: There is no evaluation.
    """
    file = find_evaluation(path)
    around = _around(file)
    if around is None:
        return Path(str(read_evaluation(file).about.get("adapter", {}).get("path", "ADAPTER")))
    # In the words that the user has: a relative path where there is one.
    near = Path(os.path.relpath(around))
    return around if os.pardir in near.parts else near


def _around(file: Path) -> Path | None:
    """The adapter in whose folder an evaluation lies."""
    folder = file.resolve().parent
    places = (folder, folder.parent) if folder.name == EVALUATION_FOLDER else (folder,)
    return next((place for place in places if (place / CONFIG_NAME).is_file()), None)


def _read_examples(file: Path) -> list[dict[str, Any]]:
    examples = file.with_name(EXAMPLES_NAME)
    if not examples.is_file():
        return []
    try:
        with open(examples, encoding="utf-8") as text:
            return [dict(json.loads(line)) for line in text]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise MatryoshkaError(
            f"{examples} is damaged ({error!r}); move it away, or evaluate the adapter again"
        ) from error
