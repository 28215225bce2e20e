"""Which requests share a prefix, and which run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

Tokens = tuple[int, ...]

MIN_PREFIX = 16
"""Shorter prefixes are computed with each row: keeping them apart costs more than it saves."""


@dataclass(frozen=True)
class Family:
    """Sequences that begin with the same tokens.

    Attributes:
        prefix: What all of them begin with; each has at least one token more. Empty where nothing is shared.
        members: Their places in the list that was given.
    """

    prefix: Tokens
    members: tuple[int, ...]


def families(sequences: Sequence[Tokens]) -> list[Family]:
    """Group sequences so that the prefixes of the groups spare as many tokens as possible.

    Args:
        sequences: Each of at least one token.

    Returns:
        Every sequence in exactly one family. Those that share nothing worth the while are one family without prefix.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    # The last token of a sequence is never in a prefix: its logits are wanted.
    shared = [
        min(_common(sequences[a], sequences[b]), len(sequences[a]) - 1, len(sequences[b]) - 1)
        for a, b in pairwise(order)
    ]
    found: list[Family] = []
    alone: list[int] = []
    for first, last in _cut(shared, 0, len(order)) if order else ():
        length = min(shared[first : last - 1], default=0)
        members = tuple(order[first:last])
        if length < MIN_PREFIX:
            alone.extend(members)
        else:
            found.append(Family(sequences[members[0]][:length], members))
    if alone:
        found.append(Family((), tuple(sorted(alone))))
    return found


def _cut(shared: Sequence[int], first: int, last: int, depth: int = 0) -> list[tuple[int, int]]:
    """Cut a stretch of the sorted sequences where that spares more tokens than the prefix of the whole stretch."""
    if last - first == 1:
        return [(first, last)]
    length = min(shared[first : last - 1])
    ends = [i + 1 for i in range(first, last - 1) if shared[i] == length] + [last]
    # So deep only in made-up data; each level is a longer prefix of fewer sequences.
    parts: list[tuple[int, int]] = []
    for start, end in zip([first, *ends[:-1]], ends, strict=True):
        parts += _cut(shared, start, end, depth + 1) if depth < 100 else [(start, end)]
    whole = _spared(length, last - first)
    return [(first, last)] if whole >= sum(_spared_by(shared, part) for part in parts) and whole > 0 else parts


def _spared_by(shared: Sequence[int], part: tuple[int, int]) -> int:
    first, last = part
    return _spared(min(shared[first : last - 1], default=0), last - first)


def _spared(length: int, count: int) -> int:
    return length * (count - 1) if length >= MIN_PREFIX else 0


def _common(a: Tokens, b: Tokens) -> int:
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def batches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Places in ``lengths``, longest first, in batches of alike lengths.

    A batch has at most ``max_rows`` rows and, padded to its longest, at most ``max_tokens`` tokens, but always one row.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        rows = max(1, min(max_rows, max_tokens // max(lengths[order[0]], 1)))
        yield order[:rows]
        order = order[rows:]
