"""Small adapters of random factors, which no training has made."""

from __future__ import annotations

import torch

from matryoshka_lora import NestedAdapter
from matryoshka_lora.training.factors import FactorMatrices


def add_small_adapter(
    adapter: NestedAdapter, rank: int = 3, size: float = 0.3, seed: int = 5
) -> FactorMatrices:
    """Give the low ranks of a reordered adapter random factors of their own, and return these."""
    generator = torch.Generator().manual_seed(seed)
    small: FactorMatrices = {}
    for name, (A, B) in adapter.factors.copy().items():
        small[name] = (
            torch.randn(rank, A.shape[1], generator=generator, dtype=A.dtype) * size,
            torch.randn(len(B), rank, generator=generator, dtype=A.dtype) * size,
        )
    adapter.set_small_factors(small)
    return small
