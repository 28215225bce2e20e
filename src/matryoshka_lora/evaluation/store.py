"""Answers on disk, line by line: a killed evaluation goes on with the first request that has none."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from filelock import FileLock, Timeout
from torch import nn

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import check_writable
from matryoshka_lora.privacy import marked

ANSWERS_NAME = "answers.jsonl"

_FORMAT = 1
_SAMPLE = 64
"""Numbers of each weight that are looked at."""
_OF_PEFT = ("lora_", "modules_to_save", "token_adapter")
"""In the names of what belongs to an adapter."""


def request_key(*parts: Any) -> str:
    """What a request is known by: the hash of everything that its answer depends on, the rank and the model aside."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def mark_of_weights(model: nn.Module) -> str:
    """A hash over a sample of a base model's weights: one that was trained further, or quantised, has another.

    Args:
        model: What PEFT has put into it does not count.
    """
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        if any(part in name for part in _OF_PEFT):
            continue
        found.update(json.dumps([str(weight.dtype), list(weight.shape)]).encode())
        if weight.numel() and not weight.is_meta:  # accelerate has put it on the disk
            at = torch.arange(_SAMPLE, device=weight.device) * (weight.numel() - 1) // (_SAMPLE - 1)
            sample = weight.detach().flatten()[at].cpu()
            found.update(sample.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def mark_of_files(model: str | os.PathLike[str]) -> str | None:
    """A hash over the sizes and times of a base model's files, where it is a folder; None where it is not."""
    if not Path(model).is_dir():
        return None
    files = sorted(path for path in Path(model).iterdir() if path.suffix in (".json", ".safetensors"))
    return request_key(*((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


class Store:
    """Answers by request and rank, in memory and in a file of one JSON line each.

    A line is written as soon as its answer is known. A last line that was cut short is dropped; its request is
    answered again.

    Args:
        path: The file; None keeps the answers in memory only.
        subject: What was asked: the model, the adapter's weights, the dtype and all else that an answer depends on.
            Answers of another subject are refused.
        anew: Drop all answers that are there.

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
        if path.exists() and not anew:
            complete, _, _ = path.read_bytes().rpartition(b"\n")
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
                differs = (key for key, value in header["subject"].items() if found.get(key) != value)
                first = next(differs, "format")
                old = ", or of version 0.1, which knew adapters by another hash" * (first == "adapter")
                raise MatryoshkaError(f"{path} holds answers of another {first}{old}: {way_out}")

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
            with suppress(OSError):  # `put` has said so
                self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.release()
