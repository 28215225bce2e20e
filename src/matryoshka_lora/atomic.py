"""Write outputs atomically, and replace only outputs that this package has written.

An output is written to a temporary path, which is renamed at the end. After a failure the output is
the old one or the new one. If the process is killed, it may leave ``.matryoshka-lora.*.new`` next
to the output, and between the two renames of a replaced folder also ``.matryoshka-lora.*.old``.

A folder has a manifest of its files. A file has a mark at its beginning: a key that begins with
`METADATA_PREFIX`, or `CREATED_WITH`.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from matryoshka_lora.errors import MatryoshkaError, wrap_errors

PathLike = str | os.PathLike[str]

MANIFEST_NAME = ".matryoshka-lora.json"
"""The file in a folder that lists the other files with their sizes and modification times."""

CREATED_WITH = "Created with matryoshka-lora."
"""The sentence in model cards, PNG and JSON files, and the description of a GGUF file."""

METADATA_PREFIX = "matryoshka_lora"
"""The beginning of a key in the metadata of every safetensors file of a LoRA."""


def check_output(
    output: PathLike,
    force: bool = False,
    sources: Sequence[PathLike] = (),
    *,
    is_file: bool = False,
) -> Path:
    """Return the path of an output, after checking that writing it loses nothing.

    An empty folder counts as not existing. With ``force`` an output of this package may be
    replaced, except for the sources. Everything else is never replaced.

    Args:
        output: The file or folder to write.
        force: Whether an existing output may be replaced.
        sources: The input paths. Those that do not exist, such as ids on the Hub, do not count.
        is_file: Whether the output is a file.

    Raises:
        MatryoshkaError: The path already exists, or it holds a source, the current folder, or a
            file that this package has not written.
    """
    path = Path(output)
    with wrap_errors(f"Cannot write {output}", "Pass another path.", ValueError):  # a null byte
        resolved_output = path.resolve()
    # Files in the Hub's cache are symlinks: check the folders of the link and of its target.
    source_paths = [Path(source) for source in sources if os.path.exists(source)]
    protected = [Path(), *source_paths, *(source.parent for source in source_paths)]
    for protected_path in protected:
        resolved = protected_path.resolve()
        for folder in (resolved, *resolved.parents):
            # Mounts, and names that differ in case only, may have several paths for one file.
            if resolved_output == folder or (path.exists() and path.samefile(folder)):
                raise MatryoshkaError(
                    f"The output {output} is or contains a source or the current folder. Pass "
                    "another path."
                )
    if is_file and path.is_dir():
        raise MatryoshkaError(f"{output} is a folder, but the output is a file. Pass another path.")
    if not is_file and path.is_file():
        raise MatryoshkaError(f"{output} is a file, but the output is a folder. Pass another path.")
    if is_occupied(path):
        foreign_files = _foreign_files(path)
        if foreign_files:
            names = ", ".join(foreign_files[:3]) + (", ..." if len(foreign_files) > 3 else "")
            raise MatryoshkaError(
                f"{output} already exists, and only an unchanged output of matryoshka-lora is "
                f"replaced. It holds other or changed files: {names}. Pass another path."
            )
        if not force:
            raise MatryoshkaError(
                f"{output} already exists. Pass another path, or `force=True` to replace it."
            )
    return path


def is_occupied(path: Path) -> bool:
    """Return whether an output would replace something. An empty folder does not count."""
    is_folder = path.is_dir() and not path.is_symlink()
    return os.path.lexists(path) and not (is_folder and not any(path.iterdir()))


def _foreign_files(path: Path) -> list[str]:
    """Return the files of an existing output that this package did not write, sorted."""
    if path.is_symlink() or not path.is_dir():
        return [] if path.is_file() and _has_marker(path) else [path.name]
    manifest: object = None
    with suppress(OSError, ValueError):
        manifest = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):  # without reading the folder, which may be large
        return sorted(entry.name for entry in path.iterdir())
    states = _file_states(path)
    return sorted(name for name, state in states.items() if manifest.get(name) != state)


def _has_marker(file: Path) -> bool:
    """Return whether the header of a file shows that this package has written it."""
    if file.is_symlink():
        return False
    with file.open("rb") as stream:
        start = stream.read(4096)
    if start.startswith((b"GGUF", b"\x89PNG", b'{\n "created_with"')):
        return CREATED_WITH.encode() in start
    with suppress(SafetensorError), safe_open(file, "np") as tensors:
        return any(key.startswith(METADATA_PREFIX) for key in tensors.metadata() or ())
    return False


def _file_states(folder: Path) -> dict[str, list[int]]:
    """Return size and modification time in ns of all files in a folder except the manifest."""
    states: dict[str, list[int]] = {}

    def fail(error: OSError) -> None:  # a folder that cannot be listed may hold anything
        raise error

    for root, folders, files in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in [*files, *links]:
            file = Path(root, name)
            states[file.relative_to(folder).as_posix()] = _state(file)
    states.pop(MANIFEST_NAME, None)
    return states


def _state(file: Path) -> list[int]:
    stat = file.lstat()
    return [stat.st_size, stat.st_mtime_ns]


@contextmanager
def create_folder(
    output: PathLike, force: bool = False, sources: Sequence[PathLike] = ()
) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to the output at the end.

    A replaced output is moved aside first and deleted last. See `check_output` for arguments and
    errors; the output may also not be writable.
    """
    path = check_output(output, force, sources)
    with _temporary_path(path) as temporary:
        temporary.mkdir()
        yield temporary
        manifest = json.dumps(_file_states(temporary), indent=2)
        (temporary / MANIFEST_NAME).write_text(manifest, encoding="utf-8")
        _check_again(path, temporary, force, sources)
        if is_occupied(path):
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
        _check_again(path, temporary, force, sources)
        os.replace(temporary, path)


def _check_again(path: Path, temporary: Path, force: bool, sources: Sequence[PathLike]) -> None:
    """Check an output after it was computed: another program may have written in the meantime.

    The computed output may have taken hours, so it is kept next to the path.

    Raises:
        MatryoshkaError: See `check_output`.
    """
    try:
        check_output(path, force, sources, is_file=temporary.is_file())
    except MatryoshkaError as error:
        kept = path.with_name(f"{path.stem[:100]}-{secrets.token_hex(4)}{path.suffix}")
        os.rename(temporary, kept)
        raise MatryoshkaError(f"{error} The output was written to {kept} instead.") from error


def free_folder(path: Path) -> Path:
    """Return a path next to a folder that does not exist, such as ``adapter-2``."""
    names = (f"{path.name[:100]}-{number}" for number in itertools.count(2))
    return next(free for free in map(path.with_name, names) if not os.path.lexists(free))


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file to create, and rename it to ``path`` at the end.

    Nothing is checked: the path must be in a folder that the caller has created. If the folder has
    a manifest, it is updated.

    Raises:
        MatryoshkaError: The file cannot be written.
    """
    with _temporary_path(path) as temporary:
        yield temporary
        os.replace(temporary, path)
        manifest = path.parent / MANIFEST_NAME
        if manifest.is_file():
            states = json.loads(manifest.read_text(encoding="utf-8"))
            states[path.name] = _state(path)
            manifest.write_text(json.dumps(states, indent=2), encoding="utf-8")


@contextmanager
def _temporary_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to an output, and remove what is there at the end.

    Raises:
        MatryoshkaError: The output cannot be written.
    """
    # Without the name of the output, which may already have the maximum length.
    temporary = path.absolute().with_name(f".matryoshka-lora.{secrets.token_hex(4)}.new")
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
