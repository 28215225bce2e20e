"""Put outputs into place: everything is written aside and then renamed.

After a failure or a kill the path holds the old output or the new one. A kill may leave
``.NAME.*.new`` beside it, and between the two renames of a forced folder also ``.NAME.*.old``.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from matryoshka_lora.errors import MatryoshkaError

PathLike = str | os.PathLike[str]


def check_place(path: PathLike, force: bool = False, sources: Sequence[object] = ()) -> Path:
    """Return the path of an output after making sure that nothing there would be lost.

    An empty folder counts as free. With ``force`` all that is there may be replaced, except for
    ``sources``, the paths that the output is made of, among other objects.

    Raises:
        MatryoshkaError: The place is taken, or it holds a source or the current folder.
    """
    place = Path(path)
    # In the hub's cache files are symlinks: check the folders of link and target.
    paths = [Path(each) for each in sources if isinstance(each, (str, os.PathLike))]
    kept = (Path(), *paths, *(path.parent for path in paths))
    if any(place.resolve() in (each.resolve(), *each.resolve().parents) for each in kept):
        raise MatryoshkaError(
            f"{path} is or holds the source or the current folder: name another place"
        )
    taken = os.path.lexists(place) and not force
    if taken and (place.is_symlink() or not place.is_dir() or any(place.iterdir())):
        raise MatryoshkaError(
            f"{path} exists already: name another place, or replace all that it holds with --force "
            "(in Python, force=True)"
        )
    return place


@contextmanager
def new_folder(
    path: PathLike, force: bool = False, sources: Sequence[object] = (), folder: bool = True
) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to ``path`` at the end.

    An existing path is moved aside first and deleted last.

    Args and Raises: as `check_place`; or the place cannot be written.
    """
    place = check_place(path, force, sources)
    fresh = place.absolute().with_name(f".{place.name}.{secrets.token_hex(4)}.new")
    try:
        fresh.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            fresh.mkdir()
        yield fresh
        check_place(path, force, sources)  # another program may have written meanwhile
        if folder and force and os.path.lexists(place):
            _exchange(fresh, place)
        else:
            os.replace(fresh, place)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MatryoshkaError(f"cannot write {path}: {reason}. Name another place") from error
    finally:
        _remove(fresh)


new_file = partial(new_folder, folder=False)
"""Give a file to write, as `new_folder` gives a folder. An old file is replaced in one step."""


def _exchange(fresh: Path, place: Path) -> None:
    old = fresh.with_suffix(".old")
    os.rename(place, old)
    try:
        os.rename(fresh, place)
    except OSError:
        os.rename(old, place)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if os.path.islink(path) or os.path.isfile(path):  # False where the folder cannot be read
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
