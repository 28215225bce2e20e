"""Ranks that are asked for by name: ``NAME@4`` is rank 4 of the nested adapter NAME, cut when it is first asked for."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import EVALUATION_FOLDER, EVALUATION_NAME, check_writable, read_text
from matryoshka_lora.formats.beside import check_measured, fingerprint
from matryoshka_lora.formats.opened import OpenedAdapter, open_adapter
from matryoshka_lora.formats.sidecar import has_sidecar
from matryoshka_lora.formats.vllm import check_for_vllm
from matryoshka_lora.reordering.files import deployed
from matryoshka_lora.serving.export import export
from matryoshka_lora.state import State

AUTO = "auto"
"""In the place of a rank: the one that `matryoshka select --save` chose."""

_RANK = re.compile(r"[1-9][0-9]{0,8}")
_MAX_BYTES = 1 << 26


@dataclass(frozen=True)
class Settings:
    """What a server's environment says. vLLM's plugins get nothing else.

    Attributes:
        source: A nested adapter, or a folder of them; absolute.
        cache: Where cut ranks are kept; each server has a folder of its own in it.
        limit: The most bytes that the ranks of one server may have.
        base: What the adapters call the server's base model; None is what the server calls it.
    """

    source: Path
    cache: Path
    limit: int
    base: str | None = None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings | None:
        """The settings, or None where the environment names no adapters.

        Raises:
            MatryoshkaError: The adapters are no folder, or the limit is no number.
        """
        source = environment.get("MATRYOSHKA_VLLM_ADAPTERS")
        if not source:
            return None
        if not os.path.isdir(source):
            raise MatryoshkaError(
                f"MATRYOSHKA_VLLM_ADAPTERS is {source!r}, which is no folder: give a nested adapter, or several in one"
            )
        text = environment.get("MATRYOSHKA_VLLM_CACHE_GB") or "10"
        try:
            limit = int(float(text) * 1e9)
        except (ValueError, OverflowError):
            limit = 0
        if limit < 1:
            raise MatryoshkaError(f"MATRYOSHKA_VLLM_CACHE_GB is {text!r}: write a positive number, for example 10")
        home = environment.get("MATRYOSHKA_CACHE") or "~/.cache/matryoshka-lora"
        cache = Path(environment.get("MATRYOSHKA_VLLM_CACHE") or f"{home}/vllm").expanduser()
        return cls(Path(source).resolve(), cache.absolute(), limit, environment.get("MATRYOSHKA_VLLM_BASE") or None)

    def variables(self) -> dict[str, str]:
        """The environment that `read` makes these settings of."""
        found = {
            "MATRYOSHKA_VLLM_ADAPTERS": str(self.source),
            "MATRYOSHKA_VLLM_CACHE": str(self.cache),
            "MATRYOSHKA_VLLM_CACHE_GB": f"{self.limit / 1e9:g}",
        }
        return found if self.base is None else {**found, "MATRYOSHKA_VLLM_BASE": self.base}


def nested_adapters(source: Path) -> dict[str, Path]:
    """The nested adapters that a server has, by name: a folder itself, or those in it."""
    if has_sidecar(source):
        return {source.name: source}
    return {folder.name: folder for folder in sorted(source.iterdir()) if folder.is_dir() and has_sidecar(folder)}


def state_of(opened: OpenedAdapter) -> State:
    """The nesting of an adapter as it is exported.

    Raises:
        MatryoshkaError: It is not nested.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is reordered on the way is said when it is
        return deployed(opened)[0].nested


class Cuts:
    """The ranks that one server has cut. May be used from several threads.

    A rank stays until the server ends: vLLM reads its files again whenever it has dropped it from its memory. So a full
    cache refuses new ranks. What a server has left that was killed is removed by the next one.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._made: dict[tuple[str, int], Path] = {}
        self._bytes = 0
        self._known: dict[str, str] = {}
        self._place: tuple[Path, FileLock] | None = None
        self._lock = Lock()

    def find(self, name: str, base: str | None = None) -> Path | None:
        """The folder of an ordinary LoRA adapter for a name such as ``family@4``; None where there is no such adapter.

        Nothing but the names that are there is looked for, so no name leads to another place.

        Args:
            name: As a request has it.
            base: What the server calls its base model.

        Raises:
            MatryoshkaError: The adapter is there, and the rank cannot be had. The message names no place on this
                machine but the adapter.
        """
        adapters = nested_adapters(self.settings.source)
        if name in adapters:
            raise MatryoshkaError(f"{name} has many ranks: write {name}@4 for rank 4, or {name}@{AUTO}")
        known, _, wanted = name.rpartition("@")
        if known not in adapters:
            return None
        try:
            return self._find(known, adapters[known], wanted, base)
        except MatryoshkaError as error:
            text = str(error)
            for place in (adapters[known].parent, self.settings.cache):
                text = text.replace(f"{place}{os.sep}", "")
            raise MatryoshkaError(text) from error

    def listing(self) -> list[dict[str, Any]]:
        """Every adapter with its ranks, as JSON has it; of one that cannot be read, the reason."""
        found = []
        for name, folder in nested_adapters(self.settings.source).items():
            entry: dict[str, Any] = {"id": name}
            try:
                opened = open_adapter(folder)
                entry |= {"ranks": list(state_of(opened).ranks), AUTO: _selected(folder)}
            except MatryoshkaError as error:
                entry["error"] = str(error).replace(f"{folder.parent}{os.sep}", "")
            found.append(entry)
        return found

    def close(self) -> None:
        """Remove what was cut."""
        with self._lock:
            if self._place is not None:
                _remove(*self._place)
                self._place = None
            self._made.clear()
            self._bytes = 0

    def _find(self, name: str, folder: Path, wanted: str, base: str | None) -> Path:
        opened = open_adapter(folder)
        rank = self._rank(name, opened, wanted)
        state_of(opened).check_rank(rank)
        check_for_vllm(opened)
        self._check_base(name, opened, base)
        with self._lock:
            if (name, rank) not in self._made:
                self._made[name, rank] = self._cut(name, opened, rank)
            return self._made[name, rank]

    def _rank(self, name: str, opened: OpenedAdapter, wanted: str) -> int:
        if wanted == AUTO:
            rank = _selected(Path(opened.name))
            if rank is None:
                raise MatryoshkaError(
                    f"no rank was chosen for {name}: run `matryoshka select {name} --within 1% --save`, or write "
                    f"{name}@4 for rank 4"
                )
            check_measured(Path(opened.name) / EVALUATION_FOLDER / EVALUATION_NAME, opened)
            return rank
        if not _RANK.fullmatch(wanted):
            raise MatryoshkaError(f"{wanted[:40]!r} is no rank: write {name}@4 for rank 4, or {name}@{AUTO}")
        return int(wanted)

    def _check_base(self, name: str, opened: OpenedAdapter, served: str | None) -> None:
        own, called = opened.config.base_model, self.settings.base or served
        if not own or called is None or own == called:
            return
        if not (os.path.isdir(own) and os.path.isdir(called) and os.path.samefile(own, called)):
            raise MatryoshkaError(
                f"{name} belongs to the base model {own}, and this server has another one. If it is the same by "
                f"another name, start the server with MATRYOSHKA_VLLM_BASE={own}"
            )

    def _cut(self, name: str, opened: OpenedAdapter, rank: int) -> Path:
        size = opened.size * rank // opened.rank
        if self._bytes + size > self.settings.limit:
            raise MatryoshkaError(
                f"this server's cache is full: it holds {self._bytes / 1e9:.2g} GB, {name}@{rank} has {size / 1e9:.2g} "
                f"GB, and {self.settings.limit / 1e9:.2g} GB are allowed. Ask for a rank that was asked for before, or "
                "start the server with a larger MATRYOSHKA_VLLM_CACHE_GB"
            )
        if self._place is None:
            self._place = _folder_of_my_own(self.settings.cache)
            atexit.register(self.close)
        target = self._place[0] / f"{len(self._made)}-rank-{rank}"
        before = self._known.setdefault(name, fingerprint(opened))
        export(opened.name, target, rank, verify=False)
        if fingerprint(open_adapter(opened.name)) != before:
            shutil.rmtree(target)
            raise MatryoshkaError(
                f"{name} has changed since this server began, and its ranks would be those of two adapters: start the "
                "server again"
            )
        self._bytes += size
        return target


def _selected(folder: Path) -> int | None:
    """The rank that `matryoshka select --save` has written beside an adapter."""
    try:
        found = json.loads(read_text(folder / EVALUATION_FOLDER / EVALUATION_NAME, _MAX_BYTES))["selected"]["rank"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _folder_of_my_own(cache: Path) -> tuple[Path, FileLock]:
    """A new folder in the cache with its lock, which the kernel gives back when this process dies.

    The folders of dead processes are removed.

    Raises:
        MatryoshkaError: The cache cannot be written.
    """
    check_writable(cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "cleaning.lock", timeout=60):
            for file in cache.glob("server-*.lock"):
                lock = FileLock(file, timeout=0)
                with suppress(Timeout):
                    lock.acquire()
                    _remove(file.with_suffix(""), lock)
            folder = Path(tempfile.mkdtemp(prefix="server-", dir=cache))
            # It is given back by whichever thread ends the server.
            lock = FileLock(f"{folder}.lock", thread_local=False)
            lock.acquire()
    except (OSError, Timeout) as error:
        raise MatryoshkaError(f"cannot write the cache {cache}: {error}. Set MATRYOSHKA_VLLM_CACHE") from error
    return folder, lock


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
