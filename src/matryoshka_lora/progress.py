"""Helpers of loops over layers: a progress bar, and one BLAS thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from threadpoolctl import threadpool_limits
from tqdm import tqdm

T = TypeVar("T")


def progress_bar(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate over layers; a progress bar appears after a second."""
    return iter(tqdm(items, description, leave=False, unit=" layers", disable=None, delay=1))


@contextmanager
def single_threaded() -> Iterator[None]:
    """Limit NumPy's BLAS to one thread: on small matrices several threads are slower."""
    with threadpool_limits(limits=1, user_api="blas"):
        yield
