"""Stop a function at one of the file operations that it does below a folder, in a process of its own."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matryoshka_lora import MatryoshkaError

_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

DONE, STOPPED = 0, 3
"""How a process ends that was not killed: the function returned, or raised what had been put into it."""


def kill() -> None:
    """As `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    """As Ctrl-C."""
    raise KeyboardInterrupt


def fill_the_disk() -> None:
    """As a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(action: Callable[[], object], root: Path, number: int | None = None, stop: Callable[[], None] = kill) -> int:
    """Run a function in a fork of this process, and stop it just before one of its operations below ``root``.

    Operations are those that Python audits with a path, and ``os.fsync``; reading is none, as it changes nothing.

    Returns:
        The exit status, or minus the signal. Without a number, how many operations there were.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        gc.disable()  # which would copy the memory that both processes share
        os.close(reading)
        status = 1
        try:
            count = _counted(action, str(root), number, stop)
            os.write(writing, str(count).encode())
            status = DONE
        except (KeyboardInterrupt, MatryoshkaError, OSError):
            status = STOPPED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        counted = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return int(counted) if number is None else status


def _counted(action: Callable[[], object], root: str, number: int | None, stop: Callable[[], None]) -> int:
    count, active = 0, True

    def reached() -> None:
        nonlocal count
        count += 1
        if count == number:
            stop()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        reads = event == "open" and not arguments[2] & _WRITES
        if active and event in _OPERATIONS and not reads and str(arguments[0]).startswith(root):
            reached()

    # What a killed process has written is there: only a power cut would need the disk to be waited for.
    os.fsync = lambda descriptor: reached()
    sys.addaudithook(audit)
    action()
    active = False
    return count
