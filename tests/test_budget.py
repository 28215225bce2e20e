"""Ranks by layer: each threshold by its definition, and a size that is never exceeded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.budget import Keep, by_size, read_bytes, show_bytes
from matryoshka_lora.files.layers import Layer

SPECTRUM = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


def kohya(rule: str, value: float, s: np.ndarray) -> int:
    """Return the rank as kohya's resize_lora.py computes it, and ours as its square."""
    if rule == "sv_ratio":
        return int(np.clip(np.sum(s > s[0] / value), 1, len(s)))
    if rule == "sv_cumulative":
        return int(np.clip(np.searchsorted(np.cumsum(s) / s.sum(), value) + 1, 1, len(s)))
    wanted = value**2 if rule == "sv_fro" else value
    return int(np.clip(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), wanted) + 1, 1, len(s)))


@given(SPECTRUM, st.sampled_from(["sv_ratio", "sv_cumulative", "sv_fro", "energy"]), st.data())
def test_a_threshold_is_kohyas(values: Tensor, rule: Any, data: st.DataObject) -> None:
    value = data.draw(st.floats(1, 1e4) if rule == "sv_ratio" else st.floats(0.01, 0.999))
    assert Keep(rule, value).rank(values) == kohya(rule, value, values.numpy())


@given(SPECTRUM, st.floats(0.01, 1))
def test_a_share_is_kept_by_the_smallest_rank(values: Tensor, share: float) -> None:
    rank = Keep("energy", share).rank(values)
    kept = (values**2).cumsum(0) / (values**2).sum()
    assert kept[rank - 1] >= share - 1e-12
    assert rank == 1 or kept[rank - 2] < share + 1e-12


def test_a_stack_of_experts_has_the_rank_of_the_expert_that_needs_most() -> None:
    values = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert Keep("energy", 0.9).rank(values) == 3
    assert Keep("energy", 0.5).rank(values[[0, 2]]) == 1


@pytest.mark.parametrize(
    ("text", "rule", "value"),
    [
        ("95%", "energy", 0.95),
        (0.95, "energy", 0.95),
        (95, "energy", 0.95),
        ("95", "energy", 0.95),
        (" 99.5 % ", "energy", 0.995),
        (1, "energy", 1.0),
        ("1%", "energy", 0.01),
        ("sv_fro=0.9", "sv_fro", 0.9),
        ("sv_cumulative=80%", "sv_cumulative", 0.8),
        ("sv_ratio=20", "sv_ratio", 20.0),
    ],
)
def test_what_keep_may_be(text: Any, rule: str, value: float) -> None:
    found = Keep.read(text)
    assert (found.rule, found.value) == (rule, pytest.approx(value))


@pytest.mark.parametrize("text", ["", "most", 0, "0%", "101%", -1, "sv_ratio=0.5", "sv=1", "nan"])
def test_what_keep_may_not_be(text: Any) -> None:
    with pytest.raises(MatryoshkaError, match="write a share such as 95%"):
        Keep.read(text)


def test_sizes() -> None:
    sizes = {"50MB": 50 * 10**6, "1.5 kB": 1500, "2KiB": 2048, 7: 7, "1gb": 10**9}
    assert {text: read_bytes(text) for text in sizes} == sizes
    for wrong in ("", "0", "5 parsecs", -1, "MB"):
        with pytest.raises(MatryoshkaError, match="write, for example, 50MB"):
            read_bytes(wrong)
    assert [show_bytes(x) for x in (999, 13_900_000, 2 * 10**9)] == [
        "999 bytes",
        "13.9 MB",
        "2.0 GB",
    ]


LAYERS = st.lists(
    st.tuples(SPECTRUM, st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6
)


@given(LAYERS, st.integers(0, 4000), st.integers(0, 300))
def test_the_most_of_the_update_fits_into_a_size(
    shapes: list[tuple[Tensor, int, int]], room: int, header: int
) -> None:
    layers, values, most = [], {}, {}
    for number, (own, wide, tall) in enumerate(shapes):
        name, rank = str(number), len(own)
        layers.append(Layer(name, "A", "B", (rank, wide), (tall, rank), rank, 1.0))
        values[name], most[name] = own, rank

    def size(ranks: Mapping[str, int]) -> int:
        # The header is longer for numbers of more digits, as safetensors' is.
        digits = sum(len(str(rank)) for rank in ranks.values())
        return header + digits + sum(4 * x.width * ranks[x.name] for x in layers)

    if size(dict.fromkeys(most, 1)) > room:
        with pytest.raises(MatryoshkaError, match="write a larger size"):
            by_size(layers, values, most, room, size)
        return
    ranks = by_size(layers, values, most, room, size)
    assert size(ranks) <= room or ranks == most
    assert all(1 <= ranks[name] <= most[name] for name in most)
    # What was left out has at most the gain per number of what was taken, and the best of it has no
    # room.
    gains = {x.name: (values[x.name] ** 2 / x.width).tolist() for x in layers}
    left = [(gains[name][r], name) for name, r in ranks.items() if r < most[name]]
    taken = [gain for name, r in ranks.items() for gain in gains[name][1:r]]
    if left:
        best, name = max(left, key=lambda pair: pair[0])
        assert min(taken, default=best) >= best
        tied = [n for gain, n in left if gain == best]
        assert any(size({**ranks, n: ranks[n] + 1}) > room for n in tied)
