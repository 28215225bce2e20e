"""Choose a rank for each layer: by the share it keeps, the total error, or the size of the file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.units import format_size


def rank_for_share(singular_values: Float64Array, share: float) -> int:
    """Return the smallest rank that keeps a share of the squared singular values, at least 1.

    Args:
        singular_values: Decreasing, shape (R,), or (experts, R). A stack of experts gets the rank
            of the expert that needs most.
        share: Between 0 and 1.
    """
    kept = np.cumsum(singular_values**2, axis=-1).reshape(-1, singular_values.shape[-1])
    is_too_small = kept[:, :-1] < share * kept[:, -1:]
    return int(np.max(is_too_small.sum(axis=-1))) + 1


@dataclass(frozen=True)
class LayerSpectrum:
    """The singular values of a layer, and its size.

    Attributes:
        singular_values: Shape (R,) or (experts, R), float64, decreasing.
        parameters_per_rank: in + out, times the number of experts.
        max_rank: The largest rank that the layer may get.
    """

    singular_values: Float64Array
    parameters_per_rank: int
    max_rank: int

    @property
    def squares(self) -> list[float]:
        """The squared singular values of each component, summed over the experts."""
        squares = self.singular_values**2
        sums: list[float] = squares.reshape(-1, squares.shape[-1]).sum(axis=0).tolist()
        return sums


def _components_by_gain(layers: Mapping[str, LayerSpectrum]) -> list[tuple[str, float]]:
    """Return the layer and the square of each component, the largest gain per parameter first.

    The first component of each layer is left out, and so are components of zero.
    """
    components: list[tuple[float, int, str, float]] = []
    for name, layer in layers.items():
        for position, square in enumerate(layer.squares[: layer.max_rank]):
            if position > 0 and square > 0:
                components.append((-square / layer.parameters_per_rank, position, name, square))
    return [(name, square) for _, _, name, square in sorted(components)]


def ranks_for_error(
    layers: Mapping[str, LayerSpectrum],
    max_error: float,
    total: float | None = None,
    residual: float = 0.0,
) -> dict[str, int]:
    """Return ranks of a small file whose total relative error does not exceed a maximum.

    Every layer gets rank 1. The other components are added in the order of their squared singular
    value per parameter, over all layers, until the error is small enough.

    Args:
        layers: The layers by name. Their maximum ranks may make the error larger.
        max_error: The maximum norm of the difference over the norm of the update, over all layers.
        total: The squared norm of the update. Defaults to the sum of all squared singular values.
        residual: The squared norm of the part of the update that is in no component.
    """
    ranks = dict.fromkeys(layers, 1)
    squared_sum = sum(sum(layer.squares) for layer in layers.values())
    if total is None:
        total = squared_sum
    squared_error = squared_sum - sum(layer.squares[0] for layer in layers.values()) + residual
    for name, square in _components_by_gain(layers):
        if squared_error <= max_error**2 * total:
            break
        ranks[name] += 1
        squared_error -= square
    return ranks


def ranks_for_size(
    layers: Mapping[str, LayerSpectrum],
    file_size: Callable[[Mapping[str, int]], int],
    max_bytes: int,
) -> dict[str, int]:
    """Return the ranks that keep most of the update in a file of a maximum size.

    Every layer gets rank 1. The other components are added in the order of their squared singular
    value per parameter, over all layers, while the file has room for them.

    Args:
        layers: The layers by name.
        file_size: Returns the size of the file in bytes, header included, for a rank of each layer.
        max_bytes: The maximum size of the file.

    Raises:
        MatryoshkaError: A file with rank 1 in every layer is too large.
    """
    max_ranks = {name: layer.max_rank for name, layer in layers.items()}
    if file_size(max_ranks) <= max_bytes:
        return max_ranks
    components = _components_by_gain(layers)

    def ranks_with(count: int) -> dict[str, int]:
        ranks = dict.fromkeys(layers, 1)
        for name, _ in components[:count]:
            ranks[name] += 1
        return ranks

    def size_with(count: int) -> int:
        return file_size(ranks_with(count))

    smallest = size_with(0)
    if smallest > max_bytes:
        raise MatryoshkaError(
            f"The smallest file, with rank 1 in every layer, takes {format_size(smallest)}, which "
            f"exceeds {format_size(max_bytes)}. Pass a larger `max_bytes`."
        )
    # The size grows with every component, so bisect.
    count = bisect_right(range(len(components) + 1), max_bytes, key=size_with) - 1
    return ranks_with(count)
