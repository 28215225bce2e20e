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


def training_bar(
    items: Sequence[T], description: str, *, is_shown: bool, leave: bool = True
) -> tqdm:
    """Return a progress bar that a notebook and a log file show too, as transformers' does."""
    return tqdm(
        items,
        description,
        leave=leave,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a file gets a line each time
        disable=not is_shown,
    )


@contextmanager
def single_threaded() -> Iterator[None]:
    """Limit NumPy's BLAS to one thread: on small matrices several threads are slower."""
    with threadpool_limits(limits=1, user_api="blas"):
        yield
