"""Put outputs into place: everything is written aside and then renamed.

A failure or a kill leaves the old place or the new one. Only a kill between the two renames of a
forced folder leaves both whole beside the place, named ``.NAME.*.old`` and ``.NAME.*.new``.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
    for name, kept in (("current folder", "."), ("source", source)):
        if kept is not None and place.resolve() in (
            Path(kept).resolve(),
            *Path(kept).resolve().parents,
        ):
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
    path: PathLike, force: bool = False, source: PathLike | None = None
) -> Iterator[Path]:
    """Give a new folder to write into; at the end of the block it is renamed to ``path``.

    Args:
        path: The place of the folder.
        force: Whether the folder that is there is replaced: it is moved aside whole before the new
            one is put, and deleted after.
        source: What the output is made of; see `check_place`.

    Raises:
        MatryoshkaError: See `check_place`; or the disk refuses. The old folder is as it was then.
    """
    with _aside(path, force, source, True) as (place, fresh):
        fresh.mkdir()
        yield fresh
        check_place(path, force, source)  # another program may have written there meanwhile
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
        if old.is_symlink():
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_file(path: PathLike, force: bool = False, source: PathLike | None = None) -> Iterator[Path]:
    """Give the path of a file to write; at the end of the block it is renamed to ``path``.

    Args and Raises: as `new_folder`. An old file is replaced in one step.
    """
    with _aside(path, force, source, False) as (place, fresh):
        yield fresh
        check_place(path, force, source, folder=False)
        os.replace(fresh, place)


@contextmanager
def _aside(
    path: PathLike, force: bool, source: PathLike | None, folder: bool
) -> Iterator[tuple[Path, Path]]:
    """Give a place and a new name beside it, of which nothing is left at the end."""
    place = check_place(path, force, source, folder)
    fresh = place.absolute().with_name(f".{place.name}.{secrets.token_hex(4)}.new")
    try:
        fresh.parent.mkdir(parents=True, exist_ok=True)
        yield place, fresh
    except OSError as error:
        reason = error.strerror or str(error)
        raise MatryoshkaError(f"cannot write {path}: {reason}. Name another place") from error
    finally:
        if folder:
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            fresh.unlink(missing_ok=True)


def _is_empty(place: Path) -> bool:
    return place.is_dir() and not place.is_symlink() and not any(place.iterdir())
