"""Put outputs into place: everything is written aside and then renamed.

A failure or a kill leaves the old place or the new one. Only a kill between the two renames of a
forced folder leaves both whole beside the place, named ``.NAME.*.old`` and ``.NAME.*.new``.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from matryoshka_lora.errors import MatryoshkaError

PathLike = str | os.PathLike[str]


def check_place(
    path: PathLike, force: bool = False, source: PathLike | None = None, folder: bool = True
) -> Path:
    """Return the path of an output after making sure that nothing there would be lost.

    Args:
        path: Where the output goes. An empty folder counts as free.
        force: Whether the whole of what is there may be replaced.
        source: What the output is made of.
        folder: Whether the output is a folder, or else a file.

    Raises:
        MatryoshkaError: The place is taken, or it is or holds the source or the current folder.
    """
    if not os.fspath(path):
        raise MatryoshkaError("the name of the output is empty: write one, for example out")
    place = Path(path)
    for name, kept in (("current folder", Path()), ("source", Path(source) if source else None)):
        if kept and place.resolve() in (kept.resolve(), *kept.resolve().parents):
            raise MatryoshkaError(
                f"{path} is the {name} or holds it: name a new place, such as out"
            )
    if not os.path.lexists(place) or (folder and _is_empty(place)):
        return place
    if not force:
        raise MatryoshkaError(
            f"{path} exists already: name another place, or replace all that it holds with --force "
            "(in Python, force=True)"
        )
    if place.is_dir() != folder:
        kinds = ("folder", "file") if place.is_dir() else ("file", "folder")
        raise MatryoshkaError(f"{path} is a {kinds[0]} and not a {kinds[1]}: name another place")
    return place


@contextmanager
def new_folder(
    path: PathLike, force: bool = False, source: PathLike | None = None, folder: bool = True
) -> Iterator[Path]:
    """Give a new folder to write into; at the end of the block it is renamed to ``path``.

    Args and Raises: as `check_place`, or the disk refuses. An old folder is moved aside whole
    before the new one is put, and deleted after.
    """
    place = check_place(path, force, source, folder)
    fresh = place.absolute().with_name(f".{place.name}.{secrets.token_hex(4)}.new")
    try:
        fresh.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            fresh.mkdir()
        yield fresh
        check_place(path, force, source, folder)  # another program may have written meanwhile
        if folder:
            _put(fresh, place)
        else:
            os.replace(fresh, place)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MatryoshkaError(f"cannot write {path}: {reason}. Name another place") from error
    finally:
        _remove(fresh)


def new_file(
    path: PathLike, force: bool = False, source: PathLike | None = None
) -> AbstractContextManager[Path]:
    """Give a file to write, as `new_folder` gives a folder. An old file is replaced in one step."""
    return new_folder(path, force, source, folder=False)


def _put(fresh: Path, place: Path) -> None:
    old = fresh.with_suffix(".old")
    if _is_empty(place):
        place.rmdir()  # Windows renames to no folder that exists
    elif os.path.lexists(place):
        os.rename(place, old)
    try:
        os.rename(fresh, place)
    except OSError:
        if os.path.lexists(old):
            os.rename(old, place)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _is_empty(place: Path) -> bool:
    return place.is_dir() and not place.is_symlink() and not any(place.iterdir())
