"""The metrics of reordering against a dense whitened SVD in numpy, which the package never forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matryoshka_lora.reordering.factors import reorder_factors, reweigh_factors

sizes = st.integers(1, 12)


def moment(size: int, generator: torch.Generator) -> Tensor:
    """A random second moment with eigenvalues over four orders of magnitude."""
    samples = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    mixed = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    scaled = samples * torch.logspace(0, -2, size, dtype=torch.float64) @ mixed
    return scaled.T @ scaled / len(samples)


def root(matrix: Tensor) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix.numpy())
    return vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R, inside, outside = draw(sizes), draw(sizes), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    A = torch.randn(R, inside, generator=generator, dtype=torch.float64)
    B = torch.randn(outside, R, generator=generator, dtype=torch.float64)
    B[:, draw(st.integers(1, R)) :] = 0
    return A, B, moment(inside, generator), moment(outside, generator)


@settings(max_examples=150)
@given(problems(), st.booleans())
def test_every_prefix_is_the_best_in_the_metric(problem: tuple[Tensor, Tensor, Tensor, Tensor], outer: bool) -> None:
    A, B, C, G = problem
    weigh_in, weigh_out = root(C), root(G) if outer else np.eye(len(G))
    ordered_A, ordered_B, _ = reorder_factors(A, B)
    new_A, new_B, values = reweigh_factors(
        ordered_A, ordered_B, ordered_A @ C @ ordered_A.T, ordered_B.T @ G @ ordered_B if outer else None, damping=0
    )
    delta = (B @ A).numpy()
    wanted = np.linalg.svd(weigh_out @ delta @ weigh_in, compute_uv=False)
    size = wanted[0] + 1e-9
    # Without damping, moments of 12 dimensions that are nearly singular cost half of the digits.
    assert np.abs((new_B @ new_A).numpy() - delta).max() < 1e-6 * (1 + np.abs(delta).max())
    for rank in range(len(A) + 1):
        error = np.linalg.norm(weigh_out @ (delta - (new_B[:, :rank] @ new_A[:rank]).numpy()) @ weigh_in)
        assert error <= np.sqrt((wanted[rank:] ** 2).sum()) + 1e-6 * size
    count = min(len(values), len(wanted))
    assert np.allclose(values[:count].numpy(), wanted[:count], atol=1e-6 * size)
    assert not values[count:].any()


def test_white_data_leaves_the_order_of_sizes() -> None:
    torch.manual_seed(0)
    A, B, s = reorder_factors(torch.randn(6, 20).double(), torch.randn(30, 6).double())
    new_A, new_B, values = reweigh_factors(A, B, 3.0 * A @ A.T, 0.5 * B.T @ B)
    torch.testing.assert_close(values / values[0], s / s[0])
    for rank in range(1, 7):
        torch.testing.assert_close(new_B[:, :rank] @ new_A[:rank], B[:, :rank] @ A[:rank])


def test_the_scale_of_a_moment_changes_no_prefix() -> None:
    torch.manual_seed(0)
    A, B, _ = reorder_factors(torch.randn(6, 20).double(), torch.randn(30, 6).double())
    C = moment(20, torch.Generator().manual_seed(1))
    one = reweigh_factors(A, B, A @ C @ A.T)
    other = reweigh_factors(A, B, 1e-9 * A @ C @ A.T)
    for rank in range(1, 7):
        torch.testing.assert_close(one[1][:, :rank] @ one[0][:rank], other[1][:, :rank] @ other[0][:rank])
    torch.testing.assert_close(other[2], one[2] * 1e-9**0.5)


def test_a_direction_that_the_data_uses_comes_first() -> None:
    """A large direction that no input reaches against a small one that all inputs do."""
    A = torch.eye(2, 8).double() * torch.tensor([[3.0], [1.0]]).double()
    B = torch.eye(8, 2).double() * torch.tensor([3.0, 1.0]).double()
    inner = torch.diag(torch.tensor([0.0, 1.0])).double()
    new_A, _, values = reweigh_factors(A, B, inner, damping=1e-6)
    assert new_A[0, 1].abs() > 100 * new_A[0, 0].abs()
    assert values[0] > 100 * values[1]


@pytest.mark.parametrize("outer", [False, True])
def test_no_data_at_all_is_no_division_by_zero(outer: bool) -> None:
    torch.manual_seed(0)
    A, B, _ = reorder_factors(torch.randn(4, 9).double(), torch.randn(7, 4).double())
    nothing = torch.zeros(4, 4)
    new_A, new_B, _ = reweigh_factors(A, B, nothing, nothing if outer else None)
    for rank in range(1, 5):
        torch.testing.assert_close(new_B[:, :rank] @ new_A[:rank], B[:, :rank] @ A[:rank])


def test_an_adapter_of_zeros_stays_one_that_can_learn() -> None:
    torch.manual_seed(0)
    A, B, _ = reorder_factors(torch.randn(4, 9), torch.zeros(7, 4))
    new_A, new_B, values = reweigh_factors(A, B, torch.eye(4), torch.zeros(4, 4))
    assert not new_B.any()
    assert not values.any()
    torch.testing.assert_close(new_A.norm(dim=1), torch.ones(4))


def test_experts_are_reweighed_one_by_one() -> None:
    torch.manual_seed(0)
    A, B, _ = reorder_factors(torch.randn(3, 4, 9).double(), torch.randn(3, 7, 4).double())
    C = torch.stack([moment(9, torch.Generator().manual_seed(i)) for i in range(3)])
    inner = A @ C @ A.mT
    together = reweigh_factors(A, B, inner)
    for expert in range(3):
        for one, all_of_them in zip(reweigh_factors(A[expert], B[expert], inner[expert]), together, strict=True):
            torch.testing.assert_close(one, all_of_them[expert])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_full_rank_stays_in_every_dtype(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    A, B, _ = reorder_factors(torch.randn(16, 64).to(dtype), torch.randn(48, 16).to(dtype))
    C, G = (moment(n, torch.Generator().manual_seed(n)) for n in (64, 48))
    wide_A, wide_B = A.double(), B.double()
    new_A, new_B, _ = reweigh_factors(A, B, wide_A @ C @ wide_A.T, wide_B.T @ G @ wide_B)
    assert new_A.dtype == new_B.dtype == dtype
    before, after = wide_B @ wide_A, new_B.double() @ new_A.double()
    assert (after - before).norm() < tolerance * before.norm()
