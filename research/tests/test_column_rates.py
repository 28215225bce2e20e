"""Under Adam, P is a spread of learning rates over the columns; gradient clipping breaks that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matryoshka_lora import Nesting

RANK = 8
RATE = 0.01


def train(p: Tensor, column_rates: Tensor, max_norm: float | None) -> Tensor:
    """Return the update ``B diag(p) A`` after 50 steps of Adam on a linear regression.

    Args:
        p: The diagonal between the factors, of shape (R,).
        column_rates: The learning rate of each column of B, of shape (R,).
        max_norm: The largest norm of the gradients; None means no clipping.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = random(256, 32)
    y = x @ random(32, 16)
    A = random(RANK, 32).requires_grad_()
    columns = [torch.zeros(16, dtype=torch.float64, requires_grad=True) for _ in range(RANK)]
    groups = [
        {"params": [column], "lr": float(rate)}
        for column, rate in zip(columns, column_rates, strict=True)
    ]
    # With a tiny eps, a step does not depend on the size of the gradient.
    optimizer = torch.optim.Adam([{"params": [A], "lr": RATE}, *groups], eps=1e-30)
    for step in range(50):
        rows = slice(32 * (step % 8), 32 * (step % 8) + 32)
        B = torch.stack(columns, dim=1)
        loss = ((x[rows] @ A.T * p) @ B.T - y[rows]).pow(2).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([A, *columns], max_norm)
        optimizer.step()
    return (torch.stack(columns, dim=1) * p @ A).detach()


@pytest.mark.parametrize(
    ("max_norm", "is_equal"), [(None, True), (1.0, False)], ids=["no clipping", "clipping"]
)
def test_p_is_a_spread_of_learning_rates(max_norm: float | None, is_equal: bool) -> None:
    p = torch.from_numpy(Nesting.powers_of_two(RANK).diagonal()).double()
    ones = torch.ones(RANK, dtype=torch.float64)
    with_p = train(p, RATE * ones, max_norm)
    with_rates = train(ones, RATE * p, max_norm)
    difference = float((with_p - with_rates).norm() / with_p.norm())
    assert (difference < 1e-6) is is_equal, difference
