"""Caches that grow, and common prefixes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from matryoshka_lora.evaluation.engine import GrowingLayer, common_prefix


def test_a_growing_layer_equals_the_layer_of_transformers() -> None:
    growing_cache, plain_cache = DynamicCache(), DynamicCache()
    growing_cache.layer_class_to_replicate = GrowingLayer
    for num_positions in (5, 1, 1, 90, 1):
        keys, values = torch.randn(2, 3, num_positions, 4), torch.randn(2, 3, num_positions, 5)
        for layer in (0, 1):
            growing_states = growing_cache.update(keys, values, layer)
            plain_states = plain_cache.update(keys, values, layer)
            for states, expected in zip(growing_states, plain_states, strict=True):
                assert torch.equal(states, expected)
    assert growing_cache.get_seq_length() == plain_cache.get_seq_length() == 98


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple), min_size=1))
def test_the_common_prefix_is_the_longest_one(sequences: list[tuple[int, ...]]) -> None:
    prefix = common_prefix(sequences)
    for sequence in sequences:
        assert sequence[: len(prefix)] == prefix
        assert len(sequence) > len(prefix)
    longer_prefixes = {sequence[: len(prefix) + 1] for sequence in sequences}
    shortest = min(len(sequence) for sequence in sequences)
    assert len(longer_prefixes) > 1 or len(prefix) + 1 == shortest
