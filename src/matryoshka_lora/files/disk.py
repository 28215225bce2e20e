"""Reading with a limit, flushing to the disk, and what the operating system refuses, in words."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from matryoshka_lora.errors import MatryoshkaError


def flush_file(path: Path) -> None:
    """Wait until the disk has a file's content."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: Path, most: int) -> str:
    """The UTF-8 text of a file that may be of anybody's making.

    Args:
        path: The file.
        most: How many bytes it may have.

    Raises:
        OSError: It cannot be read, or is no file: a pipe would be waited for, and a device has no end.
        ValueError: It is larger, or no text.
    """
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"it has {size} bytes")
    return path.read_text(encoding="utf-8")


@contextmanager
def explained(target: Path, only_in: Path | None = None) -> Iterator[None]:
    """Let an error of the operating system become a `MatryoshkaError` about ``target``.

    Args:
        target: What is written.
        only_in: Errors about files that are not in this folder stay as they are: a caller's block may also read.
    """
    try:
        yield
    except OSError as error:
        if only_in and error.filename is not None and only_in not in Path(os.fsdecode(error.filename)).parents:
            raise
        raise MatryoshkaError(_message(target, error.errno, error.strerror or str(error))) from error
    except SafetensorError as error:
        # safetensors writes in Rust and reports the operating system's error as text.
        found = re.search(r"os error (\d+)|code: (\d+)", str(error))
        if not found:
            raise
        code = int(found[1] or found[2])
        raise MatryoshkaError(_message(target, code, os.strerror(code))) from error


def _message(target: Path, code: int | None, reason: str) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        way_out = "free some space there or write to another disk"
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
        way_out = "choose a place where you may write, or change its permissions"
    elif code in (errno.ENOTDIR, errno.EEXIST):
        way_out = "a file stands where a folder is needed; move it away or choose another place"
    elif code == errno.EISDIR:
        way_out = "a folder stands where a file is needed; move it away or choose another place"
    elif code == errno.ENOTEMPTY:
        way_out = "another program has written there meanwhile; choose another place"
    else:
        way_out = "choose another place"
    return f"cannot write {target}: {reason}; {way_out}"
