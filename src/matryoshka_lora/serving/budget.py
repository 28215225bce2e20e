"""A rank for each layer, within a budget of parameters."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.layout import Layer
from matryoshka_lora.formats.spectra import Spectra


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


def choose_ranks(layers: Sequence[Layer], spectra: Spectra, budget: float) -> Chosen:
    """Keep the directions with the largest squared singular value per parameter, over all layers, within a budget.

    That is one threshold for all layers. A direction that no longer fits ends its layer; smaller ones may still fit.

    Args:
        layers: Of a reordered adapter.
        spectra: Its singular values.
        budget: The share of the adapter's parameters, above 0 and at most 1.

    Raises:
        MatryoshkaError: The budget is no such share, or not even one direction fits.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise MatryoshkaError(f"budget is {budget!r}; write a share of the parameters, for example 0.25")
    gains = {}
    for layer in layers:
        squares = spectra[layer.name] ** 2
        # All experts of a stack have one rank.
        gains[layer.name] = (squares.sum(dim=0) if squares.ndim > 1 else squares).tolist()
    total = sum(layer.width * layer.rank for layer in layers)
    left = whole = int(budget * total + 1e-6)
    ranks, order = {layer.name: 0 for layer in layers}, count()
    heap = [(-gains[layer.name][0] / layer.width, next(order), layer) for layer in layers]
    heapq.heapify(heap)
    while heap:
        _, _, layer = heapq.heappop(heap)
        if layer.width > left:
            continue
        left -= layer.width
        ranks[layer.name] += 1
        rank = ranks[layer.name]
        if rank < layer.rank and gains[layer.name][rank] > 0:
            heapq.heappush(heap, (-gains[layer.name][rank] / layer.width, next(order), layer))
    if not any(ranks.values()):
        raise MatryoshkaError(
            f"a budget of {budget:g} is {whole} parameters, and one direction of one layer has at least "
            f"{min(layer.width for layer in layers)}: write a larger one"
        )
    kept = sum(sum(gains[name][:rank]) for name, rank in ranks.items())
    everything = sum(map(sum, gains.values()))
    return Chosen(ranks, whole - left, total, kept / everything if everything else 1.0)
