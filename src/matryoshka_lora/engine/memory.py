"""How many rows and tokens fit: from the memory that is free and what this model takes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

SHARE = 0.5
"""Of the free memory; the rest is for other processes and for what is not counted here."""

_EFFICIENT = {"cpu": (2048, 128)}
"""Tokens of a prefill and rows of a decode step above which nothing was gained, by trial on one core."""


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


def free_bytes(device: torch.device) -> int:
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
    budget = int(SHARE * free_bytes(device))
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
