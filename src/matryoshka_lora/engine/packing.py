"""What runs together: which requests share a prefix, and how many rows and tokens fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import psutil
import torch

from matryoshka_lora.data.questions import common_prefix

SHARE = 0.5
"""Of the free memory; the rest is for other processes and for what is not counted here."""

_EFFICIENT = {"cpu": (2048, 128)}
"""Tokens of a prefill and rows of a decode step above which nothing was gained, by trial on one core."""

Tokens = tuple[int, ...]

MIN_PREFIX = 16
"""Shorter prefixes are computed with each row: keeping them apart costs more than it saves."""


def encoded(tokenizer: Any, text: str) -> Tokens:
    """Tokens of a text, with the special tokens that the tokenizer adds unless the text begins with one."""
    bos = tokenizer.bos_token
    options = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    return tuple(tokenizer(text, **options)["input_ids"])


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
        min(common_prefix(sequences[a], sequences[b]), len(sequences[a]) - 1, len(sequences[b]) - 1)
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


def batches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Places in ``lengths``, longest first, in batches of alike lengths.

    A batch has at most ``max_rows`` rows and, padded to its longest, at most ``max_tokens`` tokens, but always one row.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        rows = max(1, min(max_rows, max_tokens // max(lengths[order[0]], 1)))
        yield order[:rows]
        order = order[rows:]


@dataclass(frozen=True)
class Room:
    """What a batch may hold.

    Attributes:
        prefill_tokens: New tokens of one forward pass, padding included.
        cache_tokens: Tokens whose keys and values are kept, over all rows and prefixes.
        rows: That generate together.
    """

    prefill_tokens: int
    cache_tokens: int
    rows: int


def _free_bytes(device: torch.device) -> int:
    """What the device can still give to this process."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)


def measure_room(model: Any, token_bytes: int, batch_size: int | None = None) -> Room:
    """What fits beside a model now.

    Args:
        model: A transformers model on its device.
        token_bytes: Of the keys and values of one token.
        batch_size: Rows that may generate together; None means as many as fit and pay.
    """
    device = model.device
    budget = int(SHARE * _free_bytes(device))
    prefill, rows = _EFFICIENT.get(device.type, (32768, 512))
    prefill = max(1, min(prefill, budget // 2 // (_transient_bytes(model) + token_bytes)))
    return Room(prefill, max(1, budget // 2 // token_bytes), batch_size or rows)


def _transient_bytes(model: Any) -> int:
    """Bytes of what a layer holds of one token at once, and its logits: every token could be asked for."""
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = max(inner) if isinstance(inner, list) else inner  # Gemma 3n has one for each layer
    layer = (8 * config.hidden_size + 4 * inner) * max(model.dtype.itemsize, 4)
    return int(layer + 3 * 4 * config.vocab_size)
