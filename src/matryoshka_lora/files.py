"""Writing files so that a failure leaves what was there before.

Everything is written under a temporary name on the same file system, flushed to the disk and then renamed. A full
disk, a missing permission or a file in the way becomes a `MatryoshkaError` that names the path and the way out.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from matryoshka_lora.errors import MatryoshkaError

SPECTRA_NAME = "spectra.safetensors"
"""The singular values of a reordered adapter, beside its weights."""

EVALUATION_FOLDER = "evaluation"
"""Where `matryoshka eval` writes, below the adapter."""

EVALUATION_NAME = "evaluation.json"
PICTURE_NAME = "curve.png"

# An adapter is these together: what holds its weights, and what says how to read them.
_WEIGHTS = ("adapter_model.safetensors", "directions.safetensors")
_DESCRIPTIONS = ("adapter_config.json", "nesting.json", SPECTRA_NAME)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file, all or nothing; missing parent folders are made.

    Raises:
        MatryoshkaError: The file cannot be written; what was there is unchanged.
    """
    with replace_file(path) as temporary, open(temporary, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a name for a new file; when the block ends without an error, the file takes the place of ``path``.

    Missing parent folders are made.

    Raises:
        MatryoshkaError: The file cannot be written; what was there is unchanged.
    """
    target = Path(path)
    temporary = target.with_name(_temporary_name(target))
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    try:
        with _explained(target, only_in=target.parent):
            yield temporary
        with _explained(target):
            _flush_file(temporary)
            os.replace(temporary, target)
            _flush_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder; when the block ends without an error, its files take their place in ``target``.

    A target that does not exist yet appears at once, complete. In one that exists, files of the same name are
    replaced and all others stay, but for an adapter's own, which go as one: nothing of the old adapter is left beside
    the new one. There, the old ``adapter_config.json`` and ``nesting.json`` go first and the new ones come last:
    whoever reads in between, or after a power cut, finds an adapter without a description, which is an error, and never
    weights with the description of others.

    Raises:
        MatryoshkaError: The target is no folder, cannot be written or its disk is full; it is unchanged.
    """
    # A link to a folder stays a link.
    folder = Path(target).resolve()
    with _explained(Path(target)):
        exists = folder.exists()
        if exists and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        # Inside an existing target, as it may be a mount point, to which nothing can be renamed from beside it.
        temporary = (folder if exists else folder.parent) / _temporary_name(folder)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        with _explained(Path(target), only_in=temporary):
            yield temporary
        with _explained(Path(target)):
            files = sorted(file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file())
            for file in files:
                _flush_file(temporary / file)
            if exists:
                _move_into(temporary, files, folder)
            else:
                os.replace(temporary, folder)
            _flush_folder(folder)
            _flush_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make sure, before any long work, that files can be written to ``folder``, which need not exist yet.

    Raises:
        MatryoshkaError: They cannot. Nothing is left behind either way.
    """
    existing = Path(folder).resolve()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    with _explained(Path(folder)):
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        probe = existing / _temporary_name(existing)
        try:
            probe.write_bytes(b"\0")
        finally:
            probe.unlink(missing_ok=True)


def _move_into(source: Path, files: list[Path], target: Path) -> None:
    for file in files:
        if (target / file).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{file} is a folder")
        (target / file).parent.mkdir(parents=True, exist_ok=True)
    # What is not written anew goes too: an exported slice has no sidecar, a file of directions no PEFT weights.
    is_adapter = any(str(file) in _DESCRIPTIONS for file in files)
    last = [Path(name) for name in _DESCRIPTIONS] if is_adapter else []
    old_weights = [Path(name) for name in _WEIGHTS if is_adapter and Path(name) not in files]
    first = [*(file for file in files if file not in last), *old_weights]
    aside = source / "replaced"
    try:
        for file in (file for file in last + first if (target / file).exists()):
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(target / file, aside / file)
        for file in (file for file in first + last if file in files):
            os.replace(source / file, target / file)
    except OSError:
        for file in first + last:
            if (aside / file).exists():
                os.replace(aside / file, target / file)
            elif file in files and not (source / file).exists():
                (target / file).unlink()
        raise


def _temporary_name(path: Path) -> str:
    return f".{path.name}.{uuid.uuid4().hex[:8]}.writing"


def _flush_file(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(target: Path, only_in: Path | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # The caller's block may also read: what goes wrong elsewhere is not about writing here.
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
    else:
        way_out = "choose another place"
    return f"cannot write {target}: {reason}; {way_out}"
