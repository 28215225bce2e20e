"""Answers on disk, line by line: a killed evaluation goes on with the first request that has none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import check_writable
from matryoshka_lora.privacy import marked

ANSWERS_NAME = "answers.jsonl"

_FORMAT = 1


def request_key(*parts: Any) -> str:
    """What a request is known by: the hash of everything that its answer depends on, the rank and the model aside."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Store:
    """Answers by request and rank, in memory and in a file of one JSON line each.

    A line is written as soon as its answer is known. A last line that was cut short is dropped; its request is
    answered again.

    Args:
        path: The file; None keeps the answers in memory only.
        subject: What was asked: the model, the adapter's weights, the dtype. Answers of another subject are refused.
        anew: Drop them instead.

    Raises:
        MatryoshkaError: The file belongs to another subject, is damaged, cannot be written, or another process has it.
    """

    def __init__(self, path: Path | None, subject: Mapping[str, Any], anew: bool = False) -> None:
        self._answers: dict[tuple[str, int], Any] = {}
        self._file: TextIO | None = None
        self._lock: FileLock | None = None
        self.written = 0
        if path is None:
            return
        check_writable(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise MatryoshkaError(
                f"another evaluation is writing {path}: wait for it, or give another folder with --out"
            ) from error
        try:
            self._open(path, {"format": _FORMAT, "subject": dict(subject)}, anew)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, path: Path, header: dict[str, Any], anew: bool) -> None:
        complete = b""
        if path.exists():
            complete, _, _ = path.read_bytes().rpartition(b"\n")
        if anew and complete.partition(b"\n")[0] != json.dumps(header).encode():
            complete = b""
        if complete:
            self._read(path, complete.split(b"\n"), header)
        # What stands after the last end of a line was cut short.
        with path.open("r+b" if path.exists() else "w+b") as raw:
            raw.truncate(len(complete) + 1 if complete else 0)
        self._file = path.open("a", encoding="utf-8", newline="\n")
        if not complete:
            self._write(header)

    def _read(self, path: Path, lines: Sequence[bytes], header: dict[str, Any]) -> None:
        way_out = "give another folder with --out, or begin anew with --force"
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                if number > 1:
                    self._answers[entry["key"], entry["rank"]] = entry["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise MatryoshkaError(f"line {number} of {path} is damaged: {way_out}") from error
            if number == 1 and marked(entry) != header:  # an older version wrote whole paths
                found = entry.get("subject", {}) if isinstance(entry, dict) else {}
                differs = [key for key, value in header["subject"].items() if found.get(key) != value] or ["format"]
                old = ", or of version 0.1, which knew adapters by another hash" * ("adapter" in differs)
                raise MatryoshkaError(f"{path} holds answers of another {' and '.join(differs)}{old}: {way_out}")

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, request: tuple[str, int]) -> bool:
        return request in self._answers

    def __getitem__(self, request: tuple[str, int]) -> Any:
        return self._answers[request]

    def put(self, key: str, rank: int, answer: Any) -> None:
        """Remember an answer, JSON as it is, and write its line.

        Raises:
            MatryoshkaError: The file cannot be written.
        """
        self._answers[key, rank] = answer
        try:
            self._write({"key": key, "rank": rank, "answer": answer})
        except OSError as error:
            raise MatryoshkaError(
                f"cannot write the answers: {error.strerror}; free some space. What was written is kept: the same "
                "command goes on from there"
            ) from error
        self.written += 1

    def close(self) -> None:
        """Let another process have the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.release()
