"""Reordering against numpy's SVD of the dense product; the checksum."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matryoshka_lora.factors import checksum, reorder_factors

sizes = st.integers(1, 14)


@st.composite
def factors(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    """A, B, p and a scale, of any shape, and also of a lower rank than R."""
    R, inside, outside = draw(sizes), draw(sizes), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    A = torch.randn(R, inside, generator=generator, dtype=torch.float64)
    B = torch.randn(outside, R, generator=generator, dtype=torch.float64)
    B[:, draw(st.integers(0, R)) :] *= draw(st.sampled_from([0.0, 1.0, 1e-3]))
    if R > 1 and draw(st.booleans()):
        A[1] = A[0]
    p = torch.rand(R, generator=generator, dtype=torch.float64) * 5 + 0.1
    return A, B, p, draw(st.floats(0.01, 10))


def seeded(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def close(found: Tensor, expected: Tensor, size: float = 1.0) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * size)


@settings(max_examples=150)
@given(factors())
def test_every_prefix_is_numpys_best(given_factors: tuple[Tensor, Tensor, Tensor, float]) -> None:
    A, B, p, scale = given_factors
    R, delta = len(p), B @ torch.diag(p) @ A
    new_A, new_B, spectrum = reorder_factors(A, B, p, scale)
    assert (new_A.shape, new_B.shape) == (A.shape, B.shape)
    size = 1 + float(delta.norm())
    torch.testing.assert_close(scale * new_B @ new_A, delta, rtol=0, atol=1e-12 * size)
    best = torch.cat([oracle.best_errors(delta), torch.zeros(R, dtype=torch.float64)])
    for rank in range(R + 1):
        error = float((delta - scale * new_B[:, :rank] @ new_A[:rank]).norm())
        assert error == pytest.approx(float(best[rank]), abs=1e-7 * size)
    singular = np.zeros(R)
    known = np.linalg.svd(delta.numpy(), compute_uv=False)[:R]
    singular[: len(known)] = known
    torch.testing.assert_close(spectrum, torch.from_numpy(singular), rtol=0, atol=1e-12 * size)
    assert (spectrum.diff() <= 0).all()


@settings(max_examples=60)
@given(factors())
def test_twice_is_once(given_factors: tuple[Tensor, Tensor, Tensor, float]) -> None:
    A, B, p, scale = given_factors
    first_A, first_B, spectrum = reorder_factors(A, B, p, scale)
    again_A, again_B, again = reorder_factors(first_A, first_B, torch.full_like(p, scale), scale)
    size = 1 + float(spectrum.max())
    torch.testing.assert_close(again, spectrum, rtol=0, atol=1e-12 * size)
    # A direction is known only as far as its singular value stands apart from its neighbours'.
    ends = spectrum.new_full((1,), torch.inf)
    gap = torch.cat([ends, -spectrum.diff(), ends])
    apart = torch.minimum(gap[:-1], gap[1:]) > 1e-4 * size
    sure = apart & (spectrum > 1e-6 * size)
    torch.testing.assert_close(again_A[sure], first_A[sure], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again_B[:, sure], first_B[:, sure], rtol=1e-6, atol=1e-6)


def test_the_result_depends_on_the_product_alone() -> None:
    A, B, M = seeded((5, 9), (7, 5), (5, 5))
    expected = reorder_factors(A, B)
    for other in ((-A, -B), (M @ A, B @ torch.linalg.inv(M)), (A.flip(0), B.flip(1))):
        for found, wanted in zip(reorder_factors(*other), expected, strict=True):
            close(found, wanted)
    with pytest.raises(AssertionError):  # p matters
        close(reorder_factors(A, B, torch.arange(1.0, 6.0))[2], expected[2])


def test_the_singular_values_are_shared_evenly() -> None:
    A, B, spectrum = reorder_factors(*seeded((4, 9), (7, 4)), scale=0.25)
    close(A @ A.T, torch.diag(spectrum / 0.25))
    close(B.T @ B, torch.diag(spectrum / 0.25))


@pytest.mark.parametrize("how", ["zero", "repeated"])
def test_a_direction_without_size_keeps_a_unit_row_of_a(how: str) -> None:
    """It can still learn. Rounding must not pass for a direction either."""
    A, B = seeded((6, 10), (8, 6))
    B[:, 3:] = 0 if how == "zero" else B[:, :3]
    for _ in range(2):
        A, B, spectrum = reorder_factors(A, B)
        assert (spectrum[:3] > 0.1).all()
        assert spectrum[3:].count_nonzero() == 0
        assert B[:, 3:].count_nonzero() == 0
        close((A @ A.T)[3:, 3:], torch.eye(3).double())
        close((A @ A.T)[3:, :3], torch.zeros(3, 3).double())


def test_experts_are_reordered_one_by_one() -> None:
    A, B, p = seeded((3, 4, 9), (3, 7, 4), (4,))
    stacked = reorder_factors(A, B, p.abs(), 2.0)
    for e in range(3):
        alone = reorder_factors(A[e], B[e], p.abs(), 2.0)
        for found, wanted in zip(stacked, alone, strict=True):
            close(found[e], wanted)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_the_dtype_only_rounds_the_result(dtype: torch.dtype, tolerance: float) -> None:
    A, B = (factor.to(dtype) for factor in seeded((6, 20), (15, 6)))
    p = oracle.trained_p([1, 2, 6], "rank", 4.0)
    new_A, new_B, spectrum = reorder_factors(A, B, p, 0.5)
    assert (new_A.dtype, new_B.dtype, spectrum.dtype) == (dtype, dtype, torch.float64)
    delta = B.double() @ torch.diag(p) @ A.double()
    assert (0.5 * new_B.double() @ new_A.double() - delta).norm() < tolerance * delta.norm()


def test_a_hundred_orders_of_magnitude_are_no_obstacle() -> None:
    A, B = seeded((6, 20), (15, 6))
    A, B = A * 10.0 ** -torch.arange(0, 12, 2.0).double()[:, None], B * 1e60
    new_A, new_B, _ = reorder_factors(A, B, scale=1e-30)
    assert ((1e-30 * new_B) @ new_A - B @ A).norm() < 1e-12 * (B @ A).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_checksum_sees_every_change(dtype: torch.dtype) -> None:
    A, B = (factor.to(dtype) for factor in seeded((4, 6), (5, 4)))
    strided = B.T.contiguous().T
    assert checksum([(A.clone(), strided)]) == checksum(iter([(A, B)]))
    changed = A.clone()
    changed[2, 3] = torch.nextafter(changed[2, 3], torch.tensor(9.0, dtype=dtype))
    order = [2, 0, 3, 1]  # of the columns: the same numbers in other places
    others = [
        [(changed, B)],
        [(A[order], B[:, order])],
        [(A.flip(1), B)],
        [(A, B), (A, B)],
        [(B, A)],
        [(-A, -B)],
    ]
    found = {checksum(pairs) for pairs in others}
    assert len(found) == len(others)
    assert checksum([(A, B)]) not in found
