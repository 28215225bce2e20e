"""Common prefixes of sequences of tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from matryoshka_lora.evaluation.engine import common_prefix


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple), min_size=1))
def test_the_common_prefix_is_the_longest_one(sequences: list[tuple[int, ...]]) -> None:
    prefix = common_prefix(sequences)
    for sequence in sequences:
        assert sequence[: len(prefix)] == prefix
        assert len(sequence) > len(prefix)
    longer_prefixes = {sequence[: len(prefix) + 1] for sequence in sequences}
    shortest = min(len(sequence) for sequence in sequences)
    assert len(longer_prefixes) > 1 or len(prefix) + 1 == shortest
