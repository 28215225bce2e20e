"""A bar for the work on a single file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matryoshka_lora.serving.single import Progress


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[Progress], object]]:
    """A bar of the bytes and layers of a single file; hidden where nobody watches."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.all_bytes
            bar.set_postfix_str(f"layer {progress.layers} of {progress.all_layers}", refresh=False)
            bar.update(progress.bytes - bar.n)

        yield show
