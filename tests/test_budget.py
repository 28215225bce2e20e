"""Ranks by layer: a share by its definition, and a size that is never exceeded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.budget import by_size, rank_that_keeps, read_bytes, read_share, show_bytes
from matryoshka_lora.files.layers import AdapterFile, Layer
from matryoshka_lora.files.peft import plan_rank
from matryoshka_lora.files.tensors import Stored

SPECTRUM = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)
LAYERS = st.lists(
    st.tuples(SPECTRUM, st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6
)


@given(SPECTRUM, st.floats(0.01, 1))
def test_a_share_is_kept_by_the_smallest_rank(values: Tensor, share: float) -> None:
    rank = rank_that_keeps(values, share)
    kept = (values**2).cumsum(0) / (values**2).sum()
    assert kept[rank - 1] >= share - 1e-12
    assert rank == 1 or kept[rank - 2] < share + 1e-12


def test_a_stack_of_experts_has_the_rank_of_the_expert_that_needs_most() -> None:
    values = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert rank_that_keeps(values, 0.9) == 3
    assert rank_that_keeps(values[[0, 2]], 0.5) == 1


def test_shares_and_sizes_as_people_write_them() -> None:
    shares: dict[Any, float] = {"95%": 0.95, 0.95: 0.95, " 99.5 % ": 0.995, 1: 1}
    assert {text: read_share(text) for text in shares} == pytest.approx(shares)
    for wrong in ("", "most", "101%", -1, "sv_ratio=20", "nan", "1.5", 95):
        with pytest.raises(MatryoshkaError, match="write a share such as 95%"):
            read_share(wrong)
    sizes: dict[Any, int] = {"50MB": 50 * 10**6, "1.5 kB": 1500, "2KiB": 2048, 7: 7, "1gb": 10**9}
    sizes |= {"100k": 100_000, "0.3M": 300_000, "5 b": 5}
    assert {text: read_bytes(text) for text in sizes} == sizes
    for wrong in ("", "0", "5 parsecs", -1, "MB"):
        with pytest.raises(MatryoshkaError, match="write, for example, 50MB"):
            read_bytes(wrong)
    shown = {999: "999 bytes", 13_900_000: "13.9 MB", 2 * 10**9: "2.0 GB"}
    assert {number: show_bytes(number) for number in shown} == shown


@given(LAYERS, st.integers(0, 8000))
def test_the_most_of_the_update_fits_into_a_size(
    shapes: list[tuple[Tensor, int, int]], room: int
) -> None:
    layers, values, most = [], {}, {}
    for number, (own, wide, tall) in enumerate(shapes):
        name, rank = str(number), len(own)
        A, B = (Stored.of(torch.empty(shape)) for shape in ((rank, wide), (tall, rank)))
        layers.append(Layer(name, f"{name}.A", f"{name}.B", A, B, rank, 1.0))
        values[name], most[name] = own, rank
    adapter = AdapterFile("adapter", tuple(layers), {}, {"peft_type": "LORA"})

    def size(ranks: dict[str, int]) -> int:
        return plan_rank(adapter, ranks).size

    if size(dict.fromkeys(most, 1)) > room:
        with pytest.raises(MatryoshkaError, match="write a larger size"):
            by_size(adapter, values, most, room)
        return
    ranks = by_size(adapter, values, most, room)
    assert size(ranks) <= room
    assert all(1 <= ranks[name] <= most[name] for name in most)
    # What was left out has at most the gain per number of what was taken, and the best of it has no
    # room.
    gains = {x.name: (values[x.name] ** 2 / x.width).tolist() for x in layers}
    left = [(gains[name][r], name) for name, r in ranks.items() if r < most[name]]
    taken = [gain for name, r in ranks.items() for gain in gains[name][1:r]]
    if left:
        best, _ = max(left)
        assert min(taken, default=best) >= best
        tied = [name for gain, name in left if gain == best]
        assert any(size({**ranks, name: ranks[name] + 1}) > room for name in tied)
