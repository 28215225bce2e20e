"""Exceptions, and the translation of other libraries' errors into them."""

from __future__ import annotations

import os
import reprlib
import textwrap
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import TypeVar

T = TypeVar("T")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


class MatryoshkaError(ValueError):
    """An error that the caller can correct. The message says what was wrong and what to do.

    Parameters that the caller can set are in backticks; the command line writes them as options.
    The message is one line: names and values come from files that anyone may have written.
    """

    def __init__(self, message: object = "") -> None:
        text = printable(str(message))
        if len(text) > 480:  # a name in a file may have any length
            text = f"{text[:320]} ... {text[-150:]}"
        super().__init__(text)


class NotFiniteError(MatryoshkaError):
    """A factor, weight, loss or gradient is NaN or infinite."""


class MissingDependencyError(MatryoshkaError, ImportError):
    """An optional dependency is not installed. The message names the extra to install."""


# The extra of pyproject.toml that installs a module.
_EXTRAS = {
    "torch": "peft",
    "peft": "peft",
    "transformers": "peft",
    "psutil": "peft",
    "accelerate": "train",
    "datasets": "train",
    "trl": "train",
    "yaml": "train",
    "lm_eval": "eval",
    "matplotlib": "eval",
    "diffusers": "image",
    "PIL": "image",
    "gguf": "gguf",
    "iso3166": "demo",
}


def short(value: object) -> str:
    """Return the representation of a value in a message, without its middle if it is long."""
    return _SHORT.repr(value)


def printable(text: str) -> str:
    """Return a text on one line that a terminal prints as it is.

    Line breaks, control characters and lone surrogates are escaped, such as ``\\n``.
    """
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def check_choice(parameter: str, value: object, choices: Collection[str]) -> None:
    """Raise MatryoshkaError unless the value of a parameter is one of some strings."""
    if value not in choices:
        names = ", ".join(map(repr, choices))
        raise MatryoshkaError(f"`{parameter}` must be one of {names}, got {short(value)}.")


def check_integer(
    parameter: str, value: object, minimum: int = 1, maximum: int | None = None
) -> int:
    """Return the value of a parameter as an int from ``minimum`` to ``maximum``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise MatryoshkaError(f"`{parameter}` must be an integer, got {short(value)}.")
    integer = int(value)  # JSON does not accept NumPy's integers
    if integer < minimum:
        raise MatryoshkaError(f"`{parameter}` must be at least {minimum}, got {integer}.")
    if maximum is not None and integer > maximum:
        raise MatryoshkaError(f"`{parameter}` must be at most {maximum}, got {integer}.")
    return integer


def check_list(parameter: str, values: Iterable[T]) -> tuple[T, ...]:
    """Return the value of a parameter that is a list, and no single string or path, as a tuple."""
    if isinstance(values, (str, os.PathLike)) or not isinstance(values, Iterable):
        raise MatryoshkaError(f"`{parameter}` must be a list, got {short(values)}.")
    return tuple(values)


@contextmanager
def optional_imports(extra: str | None = None) -> Iterator[None]:
    """Raise `MissingDependencyError` if an import fails because an extra is not installed.

    Args:
        extra: The extra to name, or several with commas. Defaults to the smallest one that
            installs the module.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        if module not in _EXTRAS:
            raise
        raise MissingDependencyError(
            f"{module} is not installed. Run: pip install "
            f"'matryoshka-lora[{extra or _EXTRAS[module]}]'"
        ) from error


@contextmanager
def wrap_errors(
    action: str,
    hint: str = "",
    exceptions: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> Iterator[None]:
    """Convert the given exceptions to MatryoshkaError.

    Args:
        action: What failed, such as ``"cannot load the tokenizer"``.
        hint: What the caller can do, one or more sentences.
        exceptions: The types to convert. A `MatryoshkaError` passes unchanged.
    """
    try:
        yield
    except MatryoshkaError:
        raise
    except exceptions as error:
        reason = textwrap.shorten(str(error), 240, placeholder=" ...").rstrip(".")
        reason = reason or type(error).__name__
        message = f"{action}: {reason}."
        if hint:
            message = f"{message} {hint.rstrip('.')}."
        raise MatryoshkaError(message) from error
