"""Kill a function in a child process just before one of its operations on files."""

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


def killed(action: Callable[[], object], root: Path, number: int) -> bool:
    """Run a function in a fork and kill it just before an operation.

    Args:
        action: The function.
        root: The folder whose operations count.
        number: Which operation, from 1.

    Returns:
        Whether it was killed; False where it has fewer operations.
    """
    child = os.fork()
    if child == 0:
        gc.disable()  # it would copy the memory that both processes share
        try:
            _watch(str(root), number)
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def _watch(root: str, number: int) -> None:
    count = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        is_read = event == "open" and not arguments[2] & _WRITES
        if event in _OPERATIONS and not is_read and str(arguments[0]).startswith(root):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
