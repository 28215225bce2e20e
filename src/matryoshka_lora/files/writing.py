"""Write a file or a folder all or nothing, one program at a time: see the package for what holds."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.disk import (
    adapter_files,
    check_free,
    explained,
    flush_file,
    flush_folder,
    output_files,
    output_path,
)
from matryoshka_lora.files.switch import NEW, Mark, Switch, has_journal, mark

PATIENCE = 30.0
"""Seconds that a second writer of one place waits for the first."""

# The name of the workspace inside a folder; beside a file or a new folder, its name stands before.
_WORKSPACE = ".writing"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file, all or nothing; missing parent folders are made.

    Raises:
        MatryoshkaError: The file cannot be written; what was there is unchanged.
    """
    with replace_file(path) as temporary, open(temporary, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)


@contextmanager
def replace_file(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """Yield a name for a new file; when the block ends without an error, the file takes the place of ``path``.

    Missing parent folders are made. A link stays a link, and the file that it points to is replaced.

    Args:
        path: The file to write.
        overwrite: Whether it may exist already.

    Raises:
        MatryoshkaError: The file exists and may not, or cannot be written; what was there is unchanged.
    """
    given, target = output_path(path), Path(os.path.realpath(path))
    if any(part.startswith(".") and part.endswith(_WORKSPACE) for part in target.parts):
        yield target  # what is unfinished belongs to one writer, who throws it away as a whole
        return
    with explained(given):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with _held(_beside(target), given) as workspace:
        if not overwrite:
            check_free(given, overwrite)
        temporary = workspace / target.name
        with explained(given, only_in=workspace):
            yield temporary
        with explained(given):
            flush_file(temporary)
            os.replace(temporary, target)
            flush_folder(target.parent)


def replace_directory(path: str | os.PathLike[str]) -> AbstractContextManager[Path]:
    """Yield an empty folder; when the block ends without an error, its files take their place in ``path``.

    A folder that does not exist yet appears at once, complete. In one that exists, files of the same name are
    replaced and all others stay, but for those of an adapter: where a new one comes, nothing of the old one is left.
    A link to a folder stays a link; links inside it are replaced as files are.

    Raises:
        MatryoshkaError: The target is no folder, cannot be written or its disk is full; it is unchanged.
    """
    return _replaced(output_path(path), lambda: None, _of_the_old_adapter)


def output_directory(path: str | os.PathLike[str], overwrite: bool) -> AbstractContextManager[Path]:
    """As `replace_directory`, for what stands for itself and does not belong to the adapter that is there.

    Args:
        path: The folder to write.
        overwrite: Whether it may hold an adapter, a model or an evaluation already, of which nothing is left then.

    Raises:
        MatryoshkaError: As `replace_directory`; or it holds one of them and may not, or a training run.
    """
    return _replaced(output_path(path), lambda: check_free(path, overwrite), lambda folder, new: output_files(folder))


def settle(folder: str | os.PathLike[str]) -> None:
    """Complete what a writer has begun that was stopped half way. Call it before the files of a folder are read.

    Raises:
        MatryoshkaError: It cannot be completed, since the files may not be written here or were changed since.
    """
    if not os.path.isdir(folder) or not has_journal(Path(folder) / _WORKSPACE):
        return
    place = Path(folder).resolve()
    try:
        with _held(place / _WORKSPACE, Path(folder)):
            pass
    except MatryoshkaError as error:
        raise MatryoshkaError(
            f"{folder} was being replaced when its writer was stopped. Whoever opens it completes that, and cannot: "
            f"{error}"
        ) from error


@contextmanager
def one_state(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Settle an adapter's folder, and let a block read its files only if nobody replaces them meanwhile.

    Raises:
        MatryoshkaError: Somebody has, so that what was read may be of two adapters; or as `settle`.
    """
    settle(folder)
    before = _marks(Path(folder))
    yield
    if _marks(Path(folder)) != before:
        raise MatryoshkaError(f"{folder} was replaced while it was read: read it again")


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make sure, before any long work, that files can be written to ``folder``, which need not exist yet.

    Raises:
        MatryoshkaError: They cannot. Nothing is left behind either way.
    """
    existing = output_path(folder).resolve()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    with explained(Path(folder)):
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _probe(existing)
    settle(folder)


@contextmanager
def _replaced(path: Path, check: Callable[[], None], gone: Callable[[Path, Path], Iterable[Path]]) -> Iterator[Path]:
    """See `replace_directory`.

    Args:
        path: The folder to write.
        check: Called before the block, when nobody else can write the folder.
        gone: Of the folder and the new files: the old files that go though no new one has their name.
    """
    with _claimed(path) as (folder, workspace):
        check()
        new = workspace / NEW
        with explained(path):
            new.mkdir()
        with explained(path, only_in=new):
            yield new
        with explained(path):
            for found in sorted(new.rglob("*"), reverse=True):
                flush_folder(found) if found.is_dir() else flush_file(found)
            flush_folder(new)
            if workspace.parent != folder:
                os.replace(new, folder)
                flush_folder(folder.parent)
                return
            try:
                switch = Switch.begin(folder, workspace, gone(folder, new))
                switch.complete()
            except BaseException:
                if begun := Switch.found(folder, workspace):
                    begun.undo()
                raise
            switch.end()


def _marks(folder: Path) -> dict[Path, Mark | None]:
    found: dict[Path, Mark | None] = {}
    for file in adapter_files(folder) if os.path.isdir(folder) else ():
        try:
            found[file] = mark(folder / file)
        except FileNotFoundError:  # between finding it and looking at it
            found[file] = None
    return found


def _probe(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"\0")


def _of_the_old_adapter(folder: Path, new: Path) -> Iterable[Path]:
    return adapter_files(folder) if (new / "adapter_config.json").is_file() else ()


@contextmanager
def _claimed(path: Path) -> Iterator[tuple[Path, Path]]:
    """The real folder, and a workspace: inside it, or beside it where it does not exist yet."""
    folder = path.resolve()
    while True:
        with explained(path):
            exists = folder.exists()
            if exists and not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            folder.parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(folder)
        if exists and (beside.exists() or _lock_of(beside).exists()):
            with _held(beside, path):
                pass  # what a writer left that was stopped just after it had made the folder
        # Inside where that is possible, as the folder may be a mount point, to which nothing can be renamed.
        with _held(folder / _WORKSPACE if exists else beside, path) as workspace:
            if folder.exists() == exists:
                yield folder, workspace
                return


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_WORKSPACE}")


def _lock_of(workspace: Path) -> Path:
    return workspace.with_name(f"{workspace.name}.lock")


@contextmanager
def _held(workspace: Path, path: Path) -> Iterator[Path]:
    """An empty folder that no other writer has while the block runs; what a dead one has left in it is settled.

    Args:
        workspace: The folder. It is gone afterwards, unless a switch was stopped that is still to be completed.
        path: What is written, for the messages.
    """
    with _locked(_lock_of(workspace), path):
        with explained(path):
            if workspace.name == _WORKSPACE and (begun := Switch.found(workspace.parent, workspace)):
                begun.complete()
                begun.end()
            shutil.rmtree(workspace, ignore_errors=True)
            workspace.mkdir()
        try:
            yield workspace
        finally:
            if not has_journal(workspace):
                shutil.rmtree(workspace, ignore_errors=True)


@contextmanager
def _locked(file: Path, path: Path) -> Iterator[None]:
    """The kernel gives the lock back when its holder dies."""
    lock = FileLock(file)
    with explained(path):
        _probe(file.parent)  # else filelock would wait where no file can be made
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise MatryoshkaError(
                f"another process is writing {path}: wait until it has finished, or choose another place"
            ) from error
    try:
        yield
    finally:
        # Deleted while it is held: filelock makes a new one where it finds that the one it waited for is gone.
        with suppress(OSError):
            file.unlink()
        lock.release()
