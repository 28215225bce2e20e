"""Write outputs atomically: into a temporary path, which is renamed at the end.

After a failure the output is the old one or the new one. If the process is killed, it may leave
``.NAME.*.new`` next to the output, and between the two renames of an overwritten folder also
``.NAME.*.old``.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from matryoshka_lora.errors import MatryoshkaError, wrap_errors

PathLike = str | os.PathLike[str]


def check_output(
    output: PathLike,
    force: bool = False,
    sources: Sequence[PathLike] = (),
    *,
    is_file: bool = False,
) -> Path:
    """Return the path of an output, after checking that writing it loses nothing.

    An empty folder counts as not existing. With ``force`` everything at the path may be
    overwritten, except for the sources. A file never replaces a folder.

    Args:
        output: The file or folder to write.
        force: Whether an existing output may be overwritten.
        sources: The input paths. Those that do not exist, such as ids on the Hub, do not count.
        is_file: Whether the output is a file.

    Raises:
        MatryoshkaError: The path already exists, or it holds a source or the current folder.
    """
    path = Path(output)
    with wrap_errors(f"Cannot write {output}", "Pass another path.", ValueError):  # a null byte
        resolved_output = path.resolve()
    # Files in the Hub's cache are symlinks: check the folders of the link and of its target.
    source_paths = [Path(source) for source in sources if os.path.exists(source)]
    protected = [Path(), *source_paths, *(source.parent for source in source_paths)]
    for protected_path in protected:
        resolved = protected_path.resolve()
        if resolved_output in (resolved, *resolved.parents):
            raise MatryoshkaError(
                f"The output {output} is or contains a source or the current folder. Pass another "
                "path."
            )
    if is_file and _is_folder(path):
        raise MatryoshkaError(f"{output} is a folder, but the output is a file. Pass another path.")
    if not force and is_occupied(path):
        raise MatryoshkaError(
            f"{output} already exists. Pass another path, or `force=True` to overwrite it."
        )
    return path


def is_occupied(path: Path) -> bool:
    """Return whether an output would replace something. An empty folder does not count."""
    return os.path.lexists(path) and not (_is_folder(path) and not any(path.iterdir()))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


@contextmanager
def create_folder(
    output: PathLike, force: bool = False, sources: Sequence[PathLike] = ()
) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to the output at the end.

    An existing output is moved aside first and deleted last. See `check_output` for arguments and
    errors; the output may also not be writable.
    """
    path = check_output(output, force, sources)
    with _temporary_path(path) as temporary:
        temporary.mkdir()
        yield temporary
        check_output(output, force, sources)  # another program may have written in the meantime
        if force and os.path.lexists(path):
            _swap(temporary, path)
        else:
            os.replace(temporary, path)


@contextmanager
def create_file(
    output: PathLike, force: bool = False, sources: Sequence[PathLike] = ()
) -> Iterator[Path]:
    """Yield the path of a temporary file to create, and rename it to the output at the end.

    An existing output is replaced in one step. See `check_output` for arguments and errors; the
    output may also not be writable.
    """
    path = check_output(output, force, sources, is_file=True)
    with _temporary_path(path) as temporary:
        yield temporary
        check_output(output, force, sources, is_file=True)
        os.replace(temporary, path)


@contextmanager
def _temporary_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to an output, and remove what is there at the end.

    Raises:
        MatryoshkaError: The output cannot be written.
    """
    temporary = path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        if _concerns_another_file(error, path.absolute(), temporary):
            raise
        reason = error.strerror or str(error)
        raise MatryoshkaError(f"Cannot write {path}: {reason}. Pass another path.") from error
    except SafetensorError as error:  # a full disk
        raise MatryoshkaError(f"Cannot write {path}: {error}. Pass another path.") from error
    finally:
        _remove(temporary)


def _concerns_another_file(error: OSError, path: Path, temporary: Path) -> bool:
    """Return whether an error names a file other than the output, such as a source."""
    if not isinstance(error.filename, str):
        return False  # a full disk, for example
    file = Path(error.filename).absolute()
    is_output = file == path or file.is_relative_to(temporary)
    # Creating the output's folder fails at one of its parents.
    return not is_output and not temporary.is_relative_to(file)


def _swap(temporary: Path, path: Path) -> None:
    old = temporary.with_suffix(".old")
    try:
        os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:  # Ctrl-C too
        if not os.path.lexists(path):
            os.rename(old, path)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if os.path.islink(path) or os.path.isfile(path):  # False if the folder cannot be read
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
