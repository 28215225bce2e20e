"""The method's formulas in plain torch, written apart from the package: nothing here may import it.

Every layer kind is computed through its dense weight, ``W + sum_i p_i B[:, i] A[i]``, while the
package never forms that matrix in its forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D


def scale(scaling: str, whole: float, top: int, rank: int) -> float:
    """Return s_r, where rank R = ``top`` has the scale ``whole``."""
    factors = {"none": 1.0, "rank": top / rank, "sqrt": math.sqrt(top / rank)}
    return whole * factors[scaling]


def trained_p(ranks: Sequence[int], scaling: str = "none", whole: float = 1.0) -> Tensor:
    """P: ``p_i = sum of s_r over the nested r >= i``, entry by entry."""
    columns = range(1, max(ranks) + 1)
    return torch.tensor(
        [sum(scale(scaling, whole, max(ranks), r) for r in ranks if r >= i) for i in columns],
        dtype=torch.float64,
    )


def prefix_p(ranks: Sequence[int], rank: int, scaling: str = "none", whole: float = 1.0) -> Tensor:
    """``s_r`` on the first r entries."""
    columns = range(1, max(ranks) + 1)
    return torch.tensor(
        [scale(scaling, whole, max(ranks), rank) if i <= rank else 0.0 for i in columns],
        dtype=torch.float64,
    )


@dataclass(frozen=True)
class Kind:
    """A kind of base layer: how it is built, what it is fed and what it computes with a weight.

    Attributes:
        build: A fresh layer of small size.
        batch: An input with that many rows.
        apply: What the layer computes on an input with some weight in place of its own.
        transposed: The weight is stored as (in, out).
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Tensor]
    apply: Callable[[Any, Tensor, Tensor], Tensor]
    transposed: bool = False

    def delta(self, base: Any, A: Tensor, B: Tensor, p: Tensor) -> Tensor:
        """``B diag(p) A`` in the shape of the base layer's weight; A and B in PEFT's layout."""
        product = torch.einsum("or,r,ri->oi", B.flatten(1), p.to(B.dtype), A.flatten(1))
        return (product.T if self.transposed else product).reshape(base.weight.shape)

    def forward(self, base: Any, A: Tensor, B: Tensor, p: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output for p of shape (R,), or (rows, R) with one for each row."""
        if p.ndim == 1:
            return self.apply(base, base.weight.detach() + self.delta(base, A, B, p), x)
        rows = [self.forward(base, A, B, row_p, x[j : j + 1]) for j, row_p in enumerate(p)]
        return torch.cat(rows)


def _conv(dimensions: int) -> Callable[[Any, Tensor, Tensor], Tensor]:
    function: Any = getattr(functional, f"conv{dimensions}d")
    return lambda base, weight, x: function(
        x, weight, base.bias, base.stride, base.padding, base.dilation
    )


def _dense(base: Any, weight: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x, weight, base.bias)


def _normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape, dtype=torch.float64)


KINDS = {
    "Linear": Kind(lambda: nn.Linear(12, 10), _normal(3, 12), _dense),
    "Linear-no-bias": Kind(lambda: nn.Linear(9, 11, bias=False), _normal(2, 2, 9), _dense),
    "Linear-2d-input": Kind(lambda: nn.Linear(12, 10), _normal(12), _dense),
    "Conv1D": Kind(
        lambda: Conv1D(10, 12),
        _normal(3, 12),
        lambda base, w, x: x @ w + base.bias,
        transposed=True,
    ),
    "Embedding": Kind(
        lambda: nn.Embedding(14, 10),
        lambda rows: torch.randint(14, (rows, 5)),
        lambda base, weight, x: functional.embedding(x, weight),
        transposed=True,
    ),
    "Embedding-scaled": Kind(  # Gemma's
        lambda: Gemma3TextScaledWordEmbedding(14, 10, None, embed_scale=3.5),
        lambda rows: torch.randint(14, (rows, 5)),
        lambda base, weight, x: functional.embedding(x, weight) * base.embed_scale,
        transposed=True,
    ),
    "Conv1d": Kind(lambda: nn.Conv1d(4, 10, 3, stride=2, padding=1), _normal(4, 9), _conv(1)),
    "Conv2d": Kind(
        lambda: nn.Conv2d(3, 10, (3, 2), stride=(2, 1), padding=1), _normal(3, 7, 6), _conv(2)
    ),
    "Conv2d-same": Kind(
        lambda: nn.Conv2d(3, 10, 3, padding="same", bias=False), _normal(3, 5, 4), _conv(2)
    ),
    "Conv3d": Kind(lambda: nn.Conv3d(2, 10, 2, stride=(1, 2, 1)), _normal(2, 4, 4, 3), _conv(3)),
}


def best_errors(delta: Tensor) -> Tensor:
    """Return the Frobenius error of the best matrix of each rank 0, 1, ... (Eckart-Young)."""
    s = np.linalg.svd(delta.detach().double().numpy(), compute_uv=False)
    tail = np.concatenate([np.cumsum(s[::-1] ** 2)[::-1], [0.0]])
    return torch.from_numpy(np.sqrt(tail))
