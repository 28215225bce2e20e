"""The disk: what a folder holds, reading with a limit, flushing, and what the operating system refuses, in words."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from matryoshka_lora.errors import MatryoshkaError

SPECTRA_NAME = "spectra.safetensors"
"""The singular values of a reordered adapter, beside its weights."""

TRAINED_NAME = "trained.safetensors"
"""The factors as they are trained, beside those that are deployed: training goes on from them."""

EVALUATION_FOLDER = "evaluation"
"""Where `matryoshka eval` writes, below the adapter."""

EVALUATION_NAME = "evaluation.json"
PICTURE_NAME = "curve.png"

WRITTEN_BY_US = "<!-- Written by matryoshka-lora"
"""How a line begins that marks a README.md as ours; one without it is somebody's own, and is never touched."""

_ADAPTER_FILES = (
    *("adapter_config.json", "adapter_model*.safetensors", "adapter_model.safetensors.index.json"),
    *("adapter_model.bin", "directions.safetensors", "nesting.json", SPECTRA_NAME, TRAINED_NAME),
    "adapters.safetensors",  # of mlx-lm, whose config has the name of PEFT's
)
_MODEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/*", "processor_config.json", "preprocessor_config.json"),
)
EVALUATION_FILES = (
    *(EVALUATION_NAME, PICTURE_NAME, "examples.jsonl", "report.html", "answers.jsonl", "answers.jsonl.lock"),
)
"""What `matryoshka eval` writes into its folder."""

_README = "README.md"

_RUN, EVALUATION = "a training run", "an evaluation"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}

# What a folder holds, and the files by which that is seen.
_SIGNS = {
    _RUN: ("train.yaml", "trainer_state.json", "optimizer.pt", "checkpoint-*/trainer_state.json"),
    "an adapter": ("adapter_config.json", "adapter_model*", "directions.safetensors", "nesting.json"),
    "a model": ("config.json", "model*.safetensors", "pytorch_model*.bin"),
    "adapters of several ranks": ("rank-*/adapter_config.json", "rank-*/adapter.gguf"),
    EVALUATION: (EVALUATION_NAME, "answers.jsonl", f"{EVALUATION_FOLDER}/{EVALUATION_NAME}"),
}


def kinds_in(folder: str | os.PathLike[str]) -> list[str]:
    """What of this package's concern a folder holds, in words; nothing of a folder that does not exist."""
    return [kind for kind, signs in _SIGNS.items() if any(any(Path(folder).glob(sign)) for sign in signs)]


def checkpoint_file(folder: str | os.PathLike[str]) -> Path:
    """Where training the ranks of an adapter keeps what it has done, until the folder is written: a file beside it."""
    path = Path(folder).resolve()
    return path.with_name(f"{path.name}.checkpoint.safetensors")


def output_path(path: str | os.PathLike[str]) -> Path:
    """The path of an output.

    Raises:
        MatryoshkaError: It is empty, as a variable of the shell is that was never set. ``Path`` would make the current
            folder of it.
    """
    if not os.fspath(path):
        raise MatryoshkaError("the name of the output is empty: write one; a dot is the current folder")
    return Path(path)


def check_free(path: str | os.PathLike[str], overwrite: bool, beside: Collection[str] = ()) -> None:
    """Make sure that an output may be written to a place.

    Args:
        path: A folder, or a file, that need not exist.
        overwrite: Whether it may replace an adapter, a model, an evaluation or a file.
        beside: What may be there since the output goes beside it, as `kinds_in` calls it.

    Raises:
        MatryoshkaError: It holds something that would be replaced. A training run is never replaced.
    """
    kinds = [kind for kind in kinds_in(path) if kind not in beside]
    if _RUN in kinds:
        raise MatryoshkaError(
            f"{path} holds a training run, and the result of another command would pass for its adapter: choose "
            "another folder"
        )
    if overwrite or not (kinds or Path(path).is_file()):
        return
    there = f"holds {' and '.join(kinds)}" if kinds else "exists"
    raise MatryoshkaError(
        f"{path} {there} already: choose another place, or say that it may be replaced, with --force or, in Python, "
        "overwrite=True"
    )


def adapter_files(folder: Path) -> Iterator[Path]:
    """The files of an adapter in a folder, relative to it."""
    return _matching(folder, _ADAPTER_FILES)


def output_files(folder: Path) -> Iterator[Path]:
    """The files of all that `kinds_in` knows in a folder, but for a training run; relative to it."""
    yield from _matching(folder, (*_ADAPTER_FILES, *_MODEL_FILES, *EVALUATION_FILES))
    yield from _matching(folder, (f"{EVALUATION_FOLDER}/{name}" for name in EVALUATION_FILES))
    yield from _matching(folder, (f"rank-*/{name}" for name in (*_ADAPTER_FILES, "adapter.gguf")))
    for card in _matching(folder, (_README, f"rank-*/{_README}")):
        if is_ours(folder / card):
            yield card


def is_ours(readme: Path) -> bool:
    """Whether this package has written a README.md, and may write it again."""
    try:
        return WRITTEN_BY_US in readme.read_text(encoding="utf-8")
    except ValueError:  # it is no text
        return False


def _matching(folder: Path, patterns: Iterator[str] | tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        for found in sorted(folder.glob(pattern)):
            if not found.is_dir() or found.is_symlink():
                yield found.relative_to(folder)


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


def read_bytes(text: str | int) -> int:
    """From ``50_000_000``, ``"50MB"``, ``"1.5 GB"`` or ``"20MiB"``.

    Raises:
        MatryoshkaError: It is none of these, or less than a byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text), re.IGNORECASE)
    if not isinstance(text, bool) and found and found[2].upper() in _UNITS:
        size = float(found[1]) * _UNITS[found[2].upper()]
        if 1 <= size < 1e18:
            return int(size)
    raise MatryoshkaError(f"a size is {str(text)!r:.80}; write, for example, 50MB")
