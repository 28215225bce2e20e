"""Where a study's questions come from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.training import load_data, make_config
from research.commonsense import chosen_rows
from research.facts import facts

SPLITS = ("train", "validation", "test")

Row = dict[str, Any]
"""A prompt and its completion: both text, or both chat messages."""


@dataclass(frozen=True)
class Task:
    """One task of a study.

    Attributes:
        name: In tables and file names.
        source: ``{"task": ..., **settings}`` for a built-in task, ``{"facts": 512}`` for the memory task,
            ``{"choices": folder}`` for what `research.commonsense` writes, or a data source for each split.
    """

    name: str
    source: Mapping[str, Any]

    @property
    def is_built_in(self) -> bool:
        """Whether questions are made, as many as are wanted; those of a file are what they are."""
        return "task" in self.source

    @property
    def is_memory(self) -> bool:
        """Whether what is trained is what is asked."""
        return "facts" in self.source

    @property
    def choices(self) -> Path | None:
        """The folder of `research.commonsense`, where answers are chosen by likelihood and not written."""
        return Path(self.source["choices"]).expanduser() if "choices" in self.source else None

    def rows(self, split: str, count: int | None, seed: int = 0) -> list[Row]:
        """Questions with their answers; the seed chooses those of a built-in task's training split.

        A built-in question is plain text that ends with "Answer:", without chat template.

        Raises:
            MatryoshkaError: There are not so many, or a file cannot be read.
        """
        if self.is_memory:
            return list(facts(self.source["facts"], seed)[:count])
        if self.is_built_in:
            chats = load_data({**self.source, "split": split, "size": count, "seed": seed})
            return [_as_text(chat) for chat in chats]
        if self.choices is not None:
            try:
                found = chosen_rows(self.choices, split)
            except OSError as error:
                raise MatryoshkaError(
                    f"tasks.{self.name}: cannot read {error.filename}: write it with research.commonsense"
                ) from error
            # Batches of alike lengths have little padding. Training has its own order.
            return found[:count] if split == "train" else sorted(found[:count], key=_length)
        data, source = self._data(split), self.source[split]
        rows = [_as_question(row, source) for row in load_data(data if count is None else {**data, "size": count})]
        if count is not None and len(rows) < count:
            raise MatryoshkaError(f"{source} has {len(rows)} rows, not {count}: give more, or lower items.{split}")
        return rows

    def held_out(self, split: str, count: int, seed: int) -> list[Row]:
        """The questions that a run is measured on: the same for every seed, or what this run is to remember.

        Raises:
            MatryoshkaError: There are not so many, or a file cannot be read.
        """
        return self.rows(split, count, seed) if self.is_memory else self.rows(split, count)

    def settings(self) -> dict[str, Any]:
        """What numbers on it depend on. A local file is its digest, whatever its place.

        ``files`` is None where the eight commonsense tasks were not written here: their runs can be reported then.

        Raises:
            MatryoshkaError: There is no such file.
        """
        if self.is_built_in or self.is_memory:
            return {"source": dict(self.source), "files": {}}
        if self.choices is not None:
            paths_of = sorted(self.choices.glob("**/*.jsonl"))
            digests = {
                path.relative_to(self.choices).as_posix(): _digest_of(self.name, "choices", str(path))
                for path in paths_of
            }
            return {"source": {"choices": "commonsense"}, "files": digests or None}
        paths = {split: self._data(split).get("path") for split in SPLITS}
        files = {split: _digest_of(self.name, split, path) for split, path in paths.items() if path is not None}
        return {"source": {split: self.source[split] for split in SPLITS if split not in files}, "files": files}

    def _data(self, split: str) -> dict[str, Any]:
        return make_config({"data": self.source[split]}).data


def make_task(name: str, source: Any) -> Task:
    """Check a task as a study's YAML file says it.

    Raises:
        MatryoshkaError: It says no task.
    """
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise MatryoshkaError(f"tasks has {name!r}, which cannot name a folder: write letters, digits, - and _")
    if isinstance(source, Mapping) and set(source) == {"facts"}:
        if isinstance(source["facts"], bool) or not isinstance(source["facts"], int) or source["facts"] < 1:
            raise MatryoshkaError(f"tasks.{name}.facts is {source['facts']!r}; write a number of facts such as 512")
        return Task(name, dict(source))
    if isinstance(source, Mapping) and set(source) == {"choices"} and isinstance(source["choices"], str):
        return Task(name, dict(source))
    if not isinstance(source, Mapping) or ("task" in source) == (set(source) == set(SPLITS)):
        raise MatryoshkaError(
            f"tasks.{name} is {source!r}; write {{task: chain_sum}}, or {{train: a.jsonl, validation: b.jsonl, test: "
            "c.jsonl}"
        )
    try:
        for data in (source,) if "task" in source else source.values():
            make_config({"data": data})
    except MatryoshkaError as error:
        raise MatryoshkaError(f"tasks.{name}: {error}") from error
    return Task(name, dict(source))


def _length(row: Row) -> int:
    return len(row["prompt"]) + len(row["completion"])


def _as_text(chat: Mapping[str, Any]) -> Row:
    question, answer = (chat[column][0]["content"] for column in ("prompt", "completion"))
    return {"prompt": f"{question}\nAnswer:", "completion": f" {answer}"}


def _as_question(row: Mapping[str, Any], source: Any) -> Row:
    if "prompt" in row:
        return {"prompt": row["prompt"], "completion": row["completion"]}
    *before, last = row.get("messages") or [{}]
    if not before or last.get("role") != "assistant":
        raise MatryoshkaError(f"{source} has a row without an answer: write prompt and completion")
    return {"prompt": before, "completion": [last]}


def _digest_of(task: str, split: str, path: str) -> str:
    file = Path(path).expanduser()
    try:
        status = file.stat()
        return _digest(file, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise MatryoshkaError(
            f"tasks.{task}.{split}: cannot read {path} ({error.strerror}): write its path from here, or the whole path"
        ) from error


@lru_cache
def _digest(file: Path, size: int, changed: int) -> str:
    """Of a file that is asked for at every look at the runs: its size and time say whether it is another."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
