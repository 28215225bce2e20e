"""Kill a function at one of the operations that it does below a folder, in a process of its own."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def operations(action: Callable[[], object], root: Path) -> int:
    """Return how many operations below ``root`` a function does in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _as_child(lambda: os.write(writing, str(_counted(action, str(root), None)).encode()))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        counted = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return int(counted)


def stopped(action: Callable[[], object], root: Path, number: int) -> int:
    """Run a function in a fork, kill it just before an operation, and return the exit status."""
    child = os.fork()
    if child == 0:
        _as_child(lambda: _counted(action, str(root), number))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _as_child(action: Callable[[], object]) -> None:
    gc.disable()  # it would copy the memory that both processes share
    try:
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _counted(action: Callable[[], object], root: str, number: int | None) -> int:
    count, active = 0, True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        reads = event == "open" and not arguments[2] & _WRITES
        if active and event in _OPERATIONS and not reads and str(arguments[0]).startswith(root):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    action()
    active = False
    return count
