"""What each way to choose ranks would give, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.beside import Spectra
from matryoshka_lora.formats.layout import Layer
from matryoshka_lora.serving.ranks import Chosen, Keep, by_size, by_threshold

_KEEPS = ("99%", "95%", "90%", "sv_fro=0.95", "sv_cumulative=0.9", "sv_ratio=20")
_SHARES = (2, 4, 8)


def choices(
    layers: Sequence[Layer],
    spectra: Spectra,
    itemsizes: Mapping[str, int],
    size: Callable[[Mapping[str, int]], int],
    keeps: bool = True,
) -> Iterator[tuple[str, Chosen, int]]:
    """Some options of `export`, the ranks that they give, and the bytes of the file.

    Args:
        layers: Of an adapter.
        spectra: Its singular values.
        itemsizes: Bytes of a number of each layer.
        size: How many bytes a file with some ranks has.
        keeps: Whether the singular values say what a rank keeps.
    """
    most = {layer.name: layer.rank for layer in layers}
    for text in _KEEPS if keeps else ():
        found = by_threshold(layers, spectra, Keep.read(text), most)
        yield f"--keep {text}", found, size(found.ranks)
    for share in _SHARES:
        wanted = size(most) // share
        try:
            found = by_size(layers, spectra, wanted, itemsizes, size)
        except MatryoshkaError:  # so small a file has room for nothing
            return
        yield f"--max-bytes {wanted}", found, size(found.ranks)
