"""Progress bars, and one BLAS thread for loops over layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from threadpoolctl import threadpool_limits
from tqdm import tqdm

T = TypeVar("T")


def progress_bar(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate over layers; a progress bar appears after a second."""
    return iter(tqdm(items, description, leave=False, unit=" layers", disable=None, delay=1))


def training_bar(items: Sequence[T], description: str, is_shown: bool, delay: float = 0.0) -> tqdm:
    """Return a progress bar that a notebook and a log file show too, as transformers' does.

    Args:
        items: The items to iterate over.
        description: The text before the bar.
        is_shown: Whether the bar is shown.
        delay: The seconds until the bar appears. With a delay, it disappears at the end.
    """
    return tqdm(
        items,
        description,
        leave=delay == 0,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a file gets a line each time
        disable=not is_shown,
        delay=delay,
    )


@contextmanager
def single_threaded() -> Iterator[None]:
    """Limit NumPy's BLAS to one thread: on small matrices several threads are slower."""
    with threadpool_limits(limits=1, user_api="blas"):
        yield
