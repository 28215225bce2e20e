"""Which rank each layer gets: one rank, a share of what a layer does, or a size of the file."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, get_args

import torch
from torch import Tensor

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.beside import Spectra
from matryoshka_lora.formats.layout import Layer

Rule = Literal["energy", "sv_ratio", "sv_fro", "sv_cumulative"]


@dataclass(frozen=True)
class Chosen:
    """The ranks that were chosen.

    Attributes:
        ranks: By layer; 0 leaves a layer out.
        parameters: How many numbers they have, without padding.
        total: How many the whole adapter has.
        kept: The share of the sum of squared singular values that is kept, 0 to 1.
    """

    ranks: dict[str, int]
    parameters: int
    total: int
    kept: float


@dataclass(frozen=True)
class Keep:
    """A threshold that each layer obeys with the smallest rank that does.

    Attributes:
        rule: ``energy``: the share of the squared singular values, which is that of the squared Frobenius norm. Those
            of kohya's script: ``sv_fro``, the share of the Frobenius norm; ``sv_cumulative``, the share of the sum of
            the singular values; ``sv_ratio``, all singular values above the largest one divided by this.
        value: The threshold.
    """

    rule: Rule
    value: float

    @staticmethod
    def read(text: str | float) -> Keep:
        """From ``"95%"``, ``0.95``, ``"sv_ratio=20"``, ``"sv_fro=0.9"`` or ``"sv_cumulative=0.8"``.

        Raises:
            MatryoshkaError: It is none of these, or no such value is possible.
        """
        rule, _, value = str(text).rpartition("=")
        rule = rule.strip() or "energy"
        number = re.fullmatch(r"\s*(\d+\.?\d*(?:e-?\d+)?|\.\d+)\s*(%?)\s*", value)
        found = float(number[1]) / (100 if number[2] else 1) if number else 0.0
        if rule not in get_args(Rule) or not (1 <= found < 1e30 if rule == "sv_ratio" else 0 < found <= 1):
            raise MatryoshkaError(
                f"keep is {str(text)!r:.80}; write a share such as 95%, or one of kohya's thresholds: sv_fro=0.95 or "
                "sv_cumulative=0.9, up to 1, or sv_ratio=20, from 1 on"
            )
        return Keep(rule, found)  # type: ignore[arg-type] # it is one of them

    def rank(self, values: Tensor) -> int:
        """The smallest rank that obeys it, at least 1.

        Args:
            values: The singular values of a layer, shape (R,) or (experts, R), decreasing. A stack has one rank.
        """
        return max(map(self._rank, values.double().reshape(-1, values.shape[-1])))

    def _rank(self, values: Tensor) -> int:
        if not float(values[0]) > 0:
            return 1
        if self.rule == "sv_ratio":
            return max(1, int((values > values[0] / self.value).sum()))
        shares = (values if self.rule == "sv_cumulative" else values**2).cumsum(0)
        wanted = self.value**2 if self.rule == "sv_fro" else self.value
        # A share of 1 is reached by the last value that is not lost in rounding.
        return min(int(torch.searchsorted(shares, wanted * float(shares[-1]))) + 1, len(values))


def choose_ranks(layers: Sequence[Layer], spectra: Spectra, budget: float) -> Chosen:
    """Keep the directions with the largest squared singular value per parameter, over all layers, within a budget.

    That is one threshold for all layers. A direction that no longer fits ends its layer; smaller ones may still fit.

    Args:
        layers: Of the adapter, each with its own rank, which is the most that it gets.
        spectra: Its singular values; zeros may follow a layer's own.
        budget: The share of the adapter's parameters, above 0 and at most 1.

    Raises:
        MatryoshkaError: The budget is no such share, or not even one direction fits.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise MatryoshkaError(f"budget is {budget!r}; write a share of the parameters, for example 0.25")
    gains = _gains(layers, spectra)
    costs = {layer.name: layer.width for layer in layers}
    total = sum(layer.width * layer.rank for layer in layers)
    whole = int(budget * total + 1e-6)
    ranks = _fill(layers, gains, costs, whole)
    if not any(ranks.values()):
        raise MatryoshkaError(
            f"a budget of {budget:g} is {whole} parameters, and one direction of one layer has at least "
            f"{min(costs[layer.name] for layer in _alive(layers, gains))}: write a larger one"
        )
    return _chosen(layers, spectra, ranks)


def _gains(layers: Sequence[Layer], spectra: Spectra) -> dict[str, list[float]]:
    """The squared singular values of each layer's directions; all experts of a stack have one rank."""
    return {layer.name: _squares(spectra[layer.name]).sum(dim=0).tolist() for layer in layers}


def _squares(values: Tensor) -> Tensor:
    """Of shape (experts, R)."""
    return (values**2).reshape(-1, values.shape[-1])


def _alive(layers: Sequence[Layer], gains: Mapping[str, Sequence[float]]) -> Sequence[Layer]:
    """The layers that do something; all, where none does."""
    return [layer for layer in layers if gains[layer.name][0] > 0] or layers


def _fill(
    layers: Sequence[Layer], gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], room: int
) -> dict[str, int]:
    """The ranks of the best directions by gain per cost that have room; a layer has its own rank at most."""
    ranks, order = {layer.name: 0 for layer in layers}, count()
    heap = [(-gains[layer.name][0] / costs[layer.name], next(order), layer) for layer in _alive(layers, gains)]
    heapq.heapify(heap)
    while heap:
        _, _, layer = heapq.heappop(heap)
        name = layer.name
        if costs[name] > room:
            continue
        room -= costs[name]
        ranks[name] += 1
        if ranks[name] < layer.rank and gains[name][ranks[name]] > 0:
            heapq.heappush(heap, (-gains[name][ranks[name]] / costs[name], next(order), layer))
    return ranks


def by_threshold(layers: Sequence[Layer], spectra: Spectra, keep: Keep, most: Mapping[str, int]) -> Chosen:
    """The smallest rank of each layer that obeys a threshold, and at most the rank that is given for it."""
    return _chosen(
        layers, spectra, {layer.name: min(keep.rank(spectra[layer.name]), most[layer.name]) for layer in layers}
    )


def by_size(
    layers: Sequence[Layer],
    spectra: Spectra,
    most: int,
    itemsizes: Mapping[str, int],
    size: Callable[[Mapping[str, int]], int],
) -> Chosen:
    """The best directions of all layers that a file of some size has room for; see `choose_ranks`.

    Args:
        layers: Of the adapter.
        spectra: Its singular values.
        most: How many bytes the file may have.
        itemsizes: Bytes of a number of each layer.
        size: How many bytes a file with some ranks has, headers and all.

    Raises:
        MatryoshkaError: Not even one direction has room.
    """
    full = {layer.name: layer.rank for layer in layers}
    if size(full) <= most:
        return _chosen(layers, spectra, full)
    gains = _gains(layers, spectra)
    costs = {layer.name: layer.width * itemsizes[layer.name] for layer in layers}

    def factors(ranks: Mapping[str, int]) -> int:
        return sum(costs[name] * rank for name, rank in ranks.items())

    # The header is nearly always longest at full rank, and what it has left over is filled afterwards. It is longer
    # where differing ranks need words of their own: then there is less room.
    ranks = _fill(layers, gains, costs, most - (size(full) - factors(full)))
    while any(ranks.values()) and (excess := size(ranks) - most) > 0:
        ranks = _fill(layers, gains, costs, factors(ranks) - excess)
    while (left := most - size(ranks) if any(ranks.values()) else most) > 0:
        can_grow = [x for x in layers if ranks[x.name] < x.rank and gains[x.name][ranks[x.name]] > 0]
        fits = [x for x in can_grow if costs[x.name] <= left]
        fits.sort(key=lambda x: -gains[x.name][ranks[x.name]] / costs[x.name])
        more = ({**ranks, x.name: ranks[x.name] + 1} for x in fits)
        best = next((new for new in more if size(new) <= most), None)
        if best is None:
            break
        ranks = best
    if not any(ranks.values()):
        raise MatryoshkaError(f"no direction of any layer has room in {most} bytes: write a larger size")
    return _chosen(layers, spectra, ranks)


def _chosen(layers: Sequence[Layer], spectra: Spectra, ranks: Mapping[str, int]) -> Chosen:
    """Ranks with what they cost and keep."""
    squares = {layer.name: _squares(spectra[layer.name]) for layer in layers}
    everything = sum(float(own.sum()) for own in squares.values())
    kept = sum(float(own[:, : ranks[name]].sum()) for name, own in squares.items())
    return Chosen(
        dict(ranks),
        sum(layer.width * ranks[layer.name] for layer in layers),
        sum(layer.width * layer.rank for layer in layers),
        kept / everything if everything else 1.0,
    )
