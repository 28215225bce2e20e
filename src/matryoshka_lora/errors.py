"""Errors that a caller may want to catch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class MatryoshkaError(ValueError):
    """Report a mistake that the caller can mend; the message names the way out."""


class NotFiniteError(MatryoshkaError):
    """Report a number that is infinite or not a number where a result needs finite ones."""


@contextmanager
def explained(what: str, way: str = "", kinds: Any = Exception) -> Iterator[None]:
    """Report what another library refuses as a MatryoshkaError: what failed, why, the way out."""
    try:
        yield
    except MatryoshkaError:
        raise
    except kinds as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise MatryoshkaError(f"{what}: {reason:.500}{way and f'. {way}'}") from error
