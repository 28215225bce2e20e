"""Ranks by layer: a share is kept by the smallest rank, and a size is never exceeded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.linalg.allocation import (
    LayerSpectrum,
    rank_for_share,
    ranks_for_error,
    ranks_for_size,
)

Array = NDArray[Any]

spectra = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(
    lambda values: np.array(sorted(values, reverse=True))
)
layer_lists = st.lists(st.tuples(spectra, st.integers(2, 80)), min_size=1, max_size=6)


def spectra_of(shapes: list[tuple[Array, int]]) -> dict[str, LayerSpectrum]:
    """Return layers with these singular values and parameters per rank."""
    return {
        str(index): LayerSpectrum(values, parameters, len(values))
        for index, (values, parameters) in enumerate(shapes)
    }


@given(spectra, st.floats(0.01, 0.999))
def test_a_share_is_kept_by_the_smallest_rank(values: Array, share: float) -> None:
    rank = rank_for_share(values, share)
    kept = np.cumsum(values**2) / np.sum(values**2)
    assert kept[rank - 1] >= share - 1e-12
    assert rank == 1 or kept[rank - 2] < share + 1e-12


def test_experts_get_the_rank_of_the_expert_that_needs_most() -> None:
    values = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert rank_for_share(values, 0.9) == 3
    assert rank_for_share(values[[0, 2]], 0.5) == 1


@given(layer_lists, st.integers(0, 8000))
def test_a_file_of_a_size_keeps_most_of_the_update(
    shapes: list[tuple[Array, int]], max_bytes: int
) -> None:
    layers = spectra_of(shapes)

    def file_size(ranks: Mapping[str, int]) -> int:
        digits = sum(len(str(rank)) for rank in ranks.values())
        weights = sum(4 * rank * layers[name].parameters_per_rank for name, rank in ranks.items())
        return 100 + digits + weights

    if file_size(dict.fromkeys(layers, 1)) > max_bytes:
        with pytest.raises(MatryoshkaError, match="max_bytes"):
            ranks_for_size(layers, file_size, max_bytes)
        return
    ranks = ranks_for_size(layers, file_size, max_bytes)
    assert ranks.keys() == layers.keys()
    assert file_size(ranks) <= max_bytes
    assert all(1 <= ranks[name] <= layer.max_rank for name, layer in layers.items())

    # Every component that was not chosen gains at most as much per parameter as the chosen ones,
    # and the file has no room for the best of them.
    gains = {
        name: (layer.singular_values**2 / layer.parameters_per_rank).tolist()
        for name, layer in layers.items()
    }
    chosen = [gain for name, rank in ranks.items() for gain in gains[name][1:rank]]
    remaining = {
        name: gains[name][rank] for name, rank in ranks.items() if rank < layers[name].max_rank
    }
    if remaining:
        best = max(remaining.values())
        assert min(chosen, default=best) >= best
        ties = [name for name, gain in remaining.items() if gain == best]
        assert any(file_size({**ranks, name: ranks[name] + 1}) > max_bytes for name in ties)


@given(layer_lists, st.floats(0.001, 0.999))
def test_an_error_is_reached_by_the_components_that_gain_most(
    shapes: list[tuple[Array, int]], max_error: float
) -> None:
    layers = spectra_of(shapes)
    total = sum(np.sum(values**2) for values, _ in shapes)

    def error(ranks: Mapping[str, int]) -> float:
        squares = [np.sum(layers[name].singular_values[rank:] ** 2) for name, rank in ranks.items()]
        return float(np.sqrt(sum(squares) / total))

    ranks = ranks_for_error(layers, max_error)
    assert ranks.keys() == layers.keys()
    assert error(ranks) <= max_error * (1 + 1e-6)
    gains = {
        name: (layer.singular_values**2 / layer.parameters_per_rank).tolist()
        for name, layer in layers.items()
    }
    chosen = {(gains[name][rank - 1], name) for name, rank in ranks.items() if rank > 1}
    if chosen:
        smallest_gain, _ = min(chosen)
        remaining = [gains[name][rank] for name, rank in ranks.items() if rank < len(gains[name])]
        assert smallest_gain >= max(remaining, default=0)
        # Without its last component it would be too large, or another one with the same gain.
        candidates = [name for gain, name in chosen if gain == smallest_gain]
        errors = [error({**ranks, name: ranks[name] - 1}) for name in candidates]
        assert max(errors) > max_error * (1 - 1e-6)


def test_components_that_are_zero_or_above_the_maximum_rank_are_not_chosen() -> None:
    values = np.array([[2.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    layers = {
        "experts": LayerSpectrum(values, 10, 4),
        "limited": LayerSpectrum(np.array([9.0, 9.0, 9.0]), 10, 2),
    }
    expected = {"experts": 2, "limited": 2}
    assert ranks_for_size(layers, lambda ranks: sum(ranks.values()), max_bytes=5) == expected
    assert ranks_for_error(layers, 1e-9) == expected


def test_a_residual_is_a_part_of_the_error() -> None:
    layers = {"layer": LayerSpectrum(np.array([4.0, 2.0, 1.0]), 10, 3)}
    # The update has the squared norm 25, of which 4 are in no component.
    for max_error, rank in ((0.61, 1), (0.59, 2), (0.44, 3), (0.1, 3)):
        assert ranks_for_error(layers, max_error, total=25, residual=4) == {"layer": rank}
