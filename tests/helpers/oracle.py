"""The method's formulas in plain torch. Nothing here may import the package.

Every kind of layer is computed through its dense weight, ``W + sum_i p_i B[:, i] A[i]``, which the
package never forms in its forward.
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


def scale(scaling: str, max_scale: float, max_rank: int, rank: int) -> float:
    """Return s_r, where rank R = ``max_rank`` has the scale ``max_scale``."""
    ratios = {"none": 1.0, "rank": max_rank / rank, "sqrt": math.sqrt(max_rank / rank)}
    return max_scale * ratios[scaling]


def trained_p(ranks: Sequence[int], scaling: str = "none", max_scale: float = 1.0) -> Tensor:
    """Return P: ``p_i = sum of s_r over the nested r >= i``, entry by entry."""
    max_rank = max(ranks)
    entries = []
    for i in range(1, max_rank + 1):
        entries.append(sum(scale(scaling, max_scale, max_rank, r) for r in ranks if r >= i))
    return torch.tensor(entries, dtype=torch.float64)


def prefix_p(
    ranks: Sequence[int], rank: int, scaling: str = "none", max_scale: float = 1.0
) -> Tensor:
    """Return ``s_r`` on the first r entries, then 0."""
    max_rank = max(ranks)
    entries = [0.0] * max_rank
    for i in range(rank):
        entries[i] = scale(scaling, max_scale, max_rank, rank)
    return torch.tensor(entries, dtype=torch.float64)


@dataclass(frozen=True)
class Kind:
    """A kind of base layer.

    Attributes:
        build: Returns a new layer of small size.
        batch: Returns an input of some number of rows.
        apply: Returns the layer's output for a weight and an input.
        transposed: Whether the weight is stored as (in, out).
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Tensor]
    apply: Callable[[Any, Tensor, Tensor], Tensor]
    transposed: bool = False

    def delta(self, base: Any, A: Tensor, B: Tensor, p: Tensor) -> Tensor:
        """Return ``B diag(p) A`` in the shape of the base layer's weight."""
        product = torch.einsum("or,r,ri->oi", B.flatten(1), p.to(B.dtype), A.flatten(1))
        return (product.T if self.transposed else product).reshape(base.weight.shape)

    def forward(self, base: Any, A: Tensor, B: Tensor, p: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output for p of shape (R,), or (rows, R) with one for each row."""
        if p.ndim == 1:
            return self.apply(base, base.weight.detach() + self.delta(base, A, B, p), x)
        outputs = [self.forward(base, A, B, row_p, x[j : j + 1]) for j, row_p in enumerate(p)]
        return torch.cat(outputs)


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
    squared_tails = np.append(np.cumsum(s[::-1] ** 2)[::-1], 0.0)
    return torch.from_numpy(np.sqrt(squared_tails))
