"""A rank for each layer: by a threshold that every layer obeys, or within a size of the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.layers import AdapterFile, Layer, Lost, one_thread

Rule = Literal["energy", "sv_ratio", "sv_fro", "sv_cumulative"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def spectra(adapter: AdapterFile) -> tuple[dict[str, Tensor], Lost]:
    """Return the singular values of each layer, and what each rank leaves out of the update.

    The values are the norms of columns in order, ``s_i = scale |B_i| |A_i|``: shape (R,), or
    (experts, R), float64. They decrease where the order is that of the SVD.
    """
    found, lost = {}, Lost(torch.zeros(adapter.max_rank + 1).double())
    with one_thread():
        for layer in adapter.layers:
            A, B, own = adapter.cut(layer, layer.rank, 1.0)
            found[layer.name] = A.double().norm(dim=-1) * B.double().norm(dim=-2)
            lost.by_rank[: len(own)] += own
    return found, lost


@dataclass(frozen=True)
class Keep:
    """A threshold that each layer obeys with the smallest rank that does.

    Attributes:
        rule: ``energy`` is the share of the squared singular values. The others are those of
            kohya's ``resize_lora.py``: ``sv_fro`` is the share of the Frobenius norm,
            ``sv_cumulative`` that of the sum of the singular values, and ``sv_ratio`` keeps what is
            above the largest one divided by the threshold.
        value: The threshold.
    """

    rule: Rule
    value: float

    @staticmethod
    def read(text: str | float) -> Keep:
        """Return the threshold of ``"95%"``, ``0.95``, ``95``, ``"sv_ratio=20"`` or the like.

        Raises:
            MatryoshkaError: It is none of these, or no such value is possible.
        """
        rule, _, number = str(text).rpartition("=")
        rule = rule.strip() or "energy"
        found = re.fullmatch(r"\s*(\d+\.?\d*(?:e-?\d+)?|\.\d+)\s*(%?)\s*", number)
        value = float(found[1]) if found else 0.0
        # A share above 1 is a percentage: 95 is 95 %.
        if found and rule != "sv_ratio" and (found[2] or value > 1):
            value /= 100
        if rule not in get_args(Rule) or not (value >= 1 if rule == "sv_ratio" else 0 < value <= 1):
            raise MatryoshkaError(
                f"keep is {str(text)!r:.80}: write a share such as 95%, or a threshold of kohya's: "
                "sv_fro=0.95, sv_cumulative=0.9 or sv_ratio=20"
            )
        return Keep(cast(Rule, rule), value)

    def rank(self, values: Tensor) -> int:
        """Return the smallest rank that obeys the threshold, at least 1.

        Args:
            values: The singular values of a layer, shape (R,) or (experts, R), decreasing. A stack
                of experts has one rank.
        """
        return max(map(self._rank, values.double().reshape(-1, values.shape[-1])))

    def _rank(self, values: Tensor) -> int:
        if not values[0] > 0:
            return 1
        if self.rule == "sv_ratio":
            return max(1, int((values > values[0] / self.value).sum()))
        shares = (values if self.rule == "sv_cumulative" else values**2).cumsum(0)
        wanted = self.value**2 if self.rule == "sv_fro" else self.value
        # A share of 1 is reached by the last value that is not lost in rounding.
        return min(int(torch.searchsorted(shares, wanted * float(shares[-1]))) + 1, len(values))


def by_size(
    layers: Sequence[Layer],
    values: Mapping[str, Tensor],
    most: Mapping[str, int],
    max_bytes: int,
    size: Callable[[Mapping[str, int]], int],
) -> dict[str, int]:
    """Return the ranks that keep the most of the update in a file of at most some bytes.

    Every layer has its first direction. The others are taken in the order of their squared singular
    value per number of theirs, over all layers, as long as the file has room.

    Args:
        layers: The adapter's.
        values: Their singular values; see `spectra`.
        most: The largest rank that each layer may have.
        max_bytes: How large the file may be.
        size: Returns the bytes of a file with some ranks, header and all.

    Raises:
        MatryoshkaError: Not even rank 1 in every layer has room.
    """
    if size(most) <= max_bytes:
        return dict(most)
    found = list[tuple[float, int, str]]()
    for layer in layers:
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

    if (least := size(ranks(0))) > max_bytes:
        raise MatryoshkaError(
            f"the smallest file, with rank 1 in every layer, has {least} bytes, which is more than "
            f"{max_bytes}: write a larger size"
        )
    low, high = 0, len(found) + 1  # low directions have room, high ones have not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(ranks(middle)) <= max_bytes else (low, middle)
    return ranks(low)


def read_bytes(text: str | int) -> int:
    """Return the bytes of ``50_000_000``, ``"50MB"``, ``"1.5 GB"`` or ``"20MiB"``.

    Raises:
        MatryoshkaError: It is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if not found or found[2] not in _UNITS or float(found[1]) <= 0:
        raise MatryoshkaError(f"a size is {str(text)!r:.80}: write, for example, 50MB")
    return int(float(found[1]) * _UNITS[found[2]])


def show_bytes(number: int) -> str:
    """Return bytes as people read them: ``13.9 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
