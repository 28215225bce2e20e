"""Choose a rank for each layer, by a share to keep or by a file size."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping

from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.layers import AdapterFile, in_turn
from matryoshka_lora.files.peft import plan_rank


def singular_values(adapter: AdapterFile) -> dict[str, Tensor]:
    """Return the singular values of each layer: shape (R,), or (experts, R), float64."""
    return {x.name: adapter.singular_values(x) for x in in_turn(adapter.layers, "measuring")}


def read_share(text: str | float) -> float:
    """Return the share of ``"95%"`` or ``0.95``."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", str(text))
    value = float(found[1]) / (100 if found[2] else 1) if found else 2.0
    if value > 1:
        raise MatryoshkaError(f"{str(text)!r:.80} is no share: write a share such as 95%")
    return value


def rank_that_keeps(values: Tensor, share: float) -> int:
    """Return the smallest rank that keeps a share of the squared singular values, at least 1.

    They are decreasing, of shape (R,) or (experts, R). A stack of experts has the rank of the
    expert that needs most. The share is above 0 and at most 1.
    """
    kept = (values.double() ** 2).reshape(-1, values.shape[-1]).cumsum(-1)
    # A share of 1 ends at the last value that still changes the sum.
    return int((kept[:, :-1] < share * kept[:, -1:]).sum(-1).max()) + 1


def by_size(
    adapter: AdapterFile, values: Mapping[str, Tensor], most: Mapping[str, int], max_bytes: int
) -> dict[str, int]:
    """Return the ranks that keep the most of the update in a file of at most some bytes.

    Every layer has its first direction. The others are taken in the order of their squared singular
    value per number of theirs, over all layers, as long as the file, header and all, has room.
    ``values`` are the `singular_values`, and ``most`` is the largest rank that each layer may have.

    Raises:
        MatryoshkaError: The file is too small for rank 1 in every layer.
    """
    if plan_rank(adapter, most).size <= max_bytes:
        return dict(most)
    found = list[tuple[float, int, str]]()
    for layer in adapter.layers:
        gains = (values[layer.name] ** 2).reshape(-1, layer.rank).sum(0) / layer.width
        for place in range(1, most[layer.name]):
            if gains[place] > 0:
                found.append((-float(gains[place]), place, layer.name))
    found.sort()

    def ranks(count: int) -> dict[str, int]:
        chosen = dict.fromkeys(most, 1)
        for _, _, name in found[:count]:
            chosen[name] += 1
        return chosen

    def size(count: int) -> int:
        return plan_rank(adapter, ranks(count)).size

    if (least := size(0)) > max_bytes:
        raise MatryoshkaError(
            f"the smallest file, with rank 1 in every layer, has {show_bytes(least)}, more than "
            f"{show_bytes(max_bytes)}: write a larger size"
        )
    # The file grows with each direction, so bisect.
    return ranks(bisect_right(range(len(found) + 1), max_bytes, key=size) - 1)


def read_bytes(text: str | int) -> int:
    """Return the bytes of ``50_000_000``, ``"50MB"``, ``"1.5 GB"`` or ``"20MiB"``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)(i?)b?\s*", str(text).lower())
    if not found or float(found[1]) <= 0:
        raise MatryoshkaError(f"{str(text)!r:.80} is no size: write, for example, 50MB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** ["", *"kmg"].index(found[2]))


def show_bytes(number: int) -> str:
    """Return bytes as people read them: ``13.9 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"


def error_lines(
    errors: Mapping[int, float], what: str, sizes: Mapping[int, int] | None = None
) -> list[str]:
    """Return a table of the relative error of each rank, and of its bytes, for people."""
    found = [f"  {'rank':>6}{' ' * 7 + 'size' if sizes else ''}   error of the {what}'s norm"]
    for rank, error in errors.items():
        size = f" {show_bytes(sizes[rank]):>10}" if sizes else ""
        kept = f"{100 * (1 - error**2):.1f} % of its square kept"
        found.append(f"  {rank:>6}{size}   {100 * error:4.1f} % ({kept})")
    return found
