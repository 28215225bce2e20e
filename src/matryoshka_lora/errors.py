"""The exceptions that are meant for the person at the keyboard, and what others say."""

from __future__ import annotations


class MatryoshkaError(ValueError):
    """Something a user can put right: the message names the fault and what to write instead.

    Every check of this package raises it before anything is changed, on disk or in a model. The command line prints
    it without a traceback.
    """


class NotFiniteError(MatryoshkaError):
    """Numbers are NaN or infinity: training diverged, or the base model's dtype is too narrow for it."""


def one_line(error: Exception) -> str:
    """What an error says, without line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
