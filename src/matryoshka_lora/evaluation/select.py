"""`select`: the smallest rank that is good enough, by an evaluation that is read back without a model or a harness."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.choice import Choice, Wish, choose
from matryoshka_lora.evaluation.results import EXAMPLES_NAME, FORMAT, Evaluation
from matryoshka_lora.files import EVALUATION_FOLDER, EVALUATION_NAME, read_bytes, settle, write_text
from matryoshka_lora.formats.beside import check_measured, fingerprint
from matryoshka_lora.formats.config import CONFIG_NAME
from matryoshka_lora.formats.opened import open_adapter

_READABLE = (2, FORMAT)  # 2 is that of version 0.1, whose words for the adapter were others


def select(
    evaluation: Evaluation | str | os.PathLike[str],
    within: float | str | None = None,
    *,
    max_bytes: int | str | None = None,
    max_latency: float | None = None,
    task: str | None = None,
) -> Choice:
    """Choose the smallest rank that is good enough, and say what speaks for it.

    Example::

        select("my-adapter", within="1%").rank  # 4

    Args:
        evaluation: What `matryoshka_lora.evaluate` returned or wrote: its file, its folder, or the adapter's folder.
        within: How far below the best rank's value it may be, as a share of that value: ``0.01`` or ``"1%"``. None
            takes the best rank that keeps the limits.
        max_bytes: The most bytes of the exported adapter: ``50_000_000`` or ``"50MB"``.
        max_latency: The most milliseconds for one token, on the machine that evaluated.
        task: The task to choose by; may be None where there is only one.

    Returns:
        The rank, the best rank, and their differences: a difference below two standard errors cannot be told apart.

    Raises:
        MatryoshkaError: There is no such evaluation or task, no wish, or no rank that meets it.
    """
    found = evaluation if isinstance(evaluation, Evaluation) else read_evaluation(evaluation)
    most_bytes = None if max_bytes is None else read_bytes(max_bytes)
    wish = Wish(parse_share(within) if isinstance(within, str) else within, most_bytes, max_latency)
    if wish == Wish():
        raise MatryoshkaError("say what the rank must meet: within, such as 1%, max_bytes or max_latency")
    if wish.within is not None and not 0 <= wish.within <= 1:
        raise MatryoshkaError(f"within is {wish.within}; write a share from 0 to 1, such as 0.01, or a text such as 1%")
    return choose(found.measured(task), wish)


def save_choice(path: str | os.PathLike[str], choice: Choice, task: str) -> Path:
    """Write a choice into the ``evaluation.json`` that it was made of: vLLM's ``NAME@auto`` is this rank.

    The next evaluation of the adapter drops it.

    Args:
        path: As for `select`.
        choice: What it returned.
        task: The task that it was made by.

    Returns:
        The file.

    Raises:
        MatryoshkaError: There is no such evaluation, or it cannot be written.
    """
    read_evaluation(path)  # which refuses what is damaged, or of other weights
    file = _find_evaluation(path)
    wish = choice.wish
    limits = {"within": wish.within, "max_bytes": wish.max_bytes, "max_latency": wish.max_latency}
    data = {**json.loads(file.read_text(encoding="utf-8")), "selected": {"rank": choice.rank, "task": task, **limits}}
    write_text(file, json.dumps(data, indent=2, allow_nan=False) + "\n")
    return file


def parse_share(text: str) -> float:
    """``"1%"`` as 0.01.

    Raises:
        MatryoshkaError: It is no share in percent.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*%", text.strip())
    if not found or float(found[1]) > 100:
        raise MatryoshkaError(f"within is {text!r}; write a share of the best value in percent, such as 1%")
    return float(found[1]) / 100


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read back what ``matryoshka eval`` has written; no model and no harness is loaded for it.

    Args:
        path: An ``evaluation.json``, its folder, or an adapter that has been evaluated.

    Raises:
        MatryoshkaError: There is none, it is damaged, or it is that of other weights than the adapter around it has.
    """
    file = _find_evaluation(path)
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


def evaluation_file(path: str | os.PathLike[str]) -> Path | None:
    """The ``evaluation.json`` that a path means: the file, its folder, or an adapter that has been evaluated."""
    given = Path(path)
    places = (given, given / EVALUATION_FOLDER) if given.is_dir() else (given.parent,)
    for place in places:
        settle(place)
    files = (given, *(place / EVALUATION_NAME for place in places if given.is_dir()))
    return next((file for file in files if file.is_file()), None)


def _find_evaluation(path: str | os.PathLike[str]) -> Path:
    """The ``evaluation.json`` that a path means.

    Raises:
        MatryoshkaError: There is none.
    """
    found, given = evaluation_file(path), Path(path)
    if found is not None:
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
    file = _find_evaluation(path)
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
