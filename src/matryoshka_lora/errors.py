"""Errors that a caller may want to catch."""

from __future__ import annotations


class MatryoshkaError(ValueError):
    """Report a mistake that the caller can mend; the message names the way out."""


class NotFiniteError(MatryoshkaError):
    """Report a number that is infinite or not a number where a result needs finite ones."""
