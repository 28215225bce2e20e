"""SVD of factors, truncation errors and sums against NumPy on the dense product; the checksum."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from matryoshka_lora.linalg.factors import (
    DAMPING,
    Checksum,
    pad_end,
    reorder_by_moments,
    reorder_factors,
    singular_values,
    squared_tails,
    svd_of_product,
    truncation_errors,
    weighted_sum,
)

Array = NDArray[Any]

sizes = st.integers(1, 14)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Array, Array, Array]:
    """A, B and p of any shape, also of a lower rank than R."""
    rank, in_features, out_features = draw(sizes), draw(sizes), draw(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    A = rng.standard_normal((rank, in_features))
    B = rng.standard_normal((out_features, rank))
    B[:, draw(st.integers(0, rank)) :] *= draw(st.sampled_from([0.0, 1.0, 1e-3]))
    if rank > 1 and draw(st.booleans()):
        A[1] = A[0]
    p = rng.random(rank) * 5 + 0.1
    return A, B, p


def normal(*shapes: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in shapes]


def assert_close(actual: Array, expected: Array, size: float = 1.0) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9 * size)


def best_errors(update: Array) -> Array:
    return oracle.best_errors(torch.from_numpy(update)).numpy()


@settings(max_examples=150)
@given(layers())
def test_every_prefix_is_the_best_approximation(layer: tuple[Array, Array, Array]) -> None:
    A, B, p = layer
    rank = len(p)
    update = B @ np.diag(p) @ A
    size = 1 + float(np.linalg.norm(update))
    new_A, new_B, values = reorder_factors(A, B, p)
    assert (new_A.shape, new_B.shape) == (A.shape, B.shape)
    np.testing.assert_allclose(new_B @ new_A, update, rtol=0, atol=1e-12 * size)

    expected_errors = np.append(best_errors(update), np.zeros(rank))[: rank + 1]
    errors = [float(np.linalg.norm(update - new_B[:, :r] @ new_A[:r])) for r in range(rank + 1)]
    np.testing.assert_allclose(errors, expected_errors, rtol=0, atol=1e-7 * size)
    tails = squared_tails(values)
    np.testing.assert_allclose(tails, expected_errors**2, rtol=0, atol=1e-12 * size**2)

    expected_values = np.linalg.svd(update, compute_uv=False)[:rank]
    expected_values = np.append(expected_values, np.zeros(rank - len(expected_values)))
    for actual in (values, singular_values(p[:, None] * A, B)):
        np.testing.assert_allclose(actual, expected_values, rtol=0, atol=1e-12 * size)
        assert (np.diff(actual) <= 0).all()


@settings(max_examples=60)
@given(layers())
def test_reordering_twice_changes_nothing(layer: tuple[Array, Array, Array]) -> None:
    A, B, p = layer
    first_A, first_B, values = reorder_factors(A, B, p)
    second_A, second_B, second_values = reorder_factors(first_A, first_B)
    size = 1 + float(values.max())
    np.testing.assert_allclose(second_values, values, rtol=0, atol=1e-12 * size)
    # A component is determined only as far as its singular value differs from its neighbours'.
    gaps = np.concatenate([[np.inf], -np.diff(values), [np.inf]])
    is_separate = np.minimum(gaps[:-1], gaps[1:]) > 1e-4 * size
    is_determined = is_separate & (values > 1e-6 * size)
    np.testing.assert_allclose(
        second_A[is_determined], first_A[is_determined], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        second_B[:, is_determined], first_B[:, is_determined], rtol=1e-6, atol=1e-6
    )


def test_only_the_product_matters() -> None:
    A, B, M = normal((5, 9), (7, 5), (5, 5))
    expected = reorder_factors(A, B)
    equivalent = ((-A, -B), (M @ A, B @ np.linalg.inv(M)), (A[::-1], B[:, ::-1]))
    for other_A, other_B in equivalent:
        for actual, wanted in zip(reorder_factors(other_A, other_B), expected, strict=True):
            assert_close(actual, wanted)
    _, _, values_with_p = reorder_factors(A, B, np.arange(1.0, 6.0))
    assert not np.allclose(values_with_p, expected[2])


def test_the_factors_share_the_singular_values_evenly() -> None:
    A, B, values = reorder_factors(*normal((4, 9), (7, 4)))
    assert_close(A @ A.T, np.diag(values))
    assert_close(B.T @ B, np.diag(values))


@pytest.mark.parametrize("kind", ["zero", "repeated"])
def test_a_component_without_size_keeps_a_unit_row_of_A(kind: str) -> None:
    """It can still be trained. Rounding must not count as a component either."""
    A, B = normal((6, 10), (8, 6))
    B[:, 3:] = 0 if kind == "zero" else B[:, :3]
    for _ in range(2):
        A, B, values = reorder_factors(A, B)
        assert (values[:3] > 0.1).all()
        assert not values[3:].any()
        assert not B[:, 3:].any()
        gram = A @ A.T
        assert_close(gram[3:, 3:], np.eye(3))
        assert_close(gram[3:, :3], np.zeros((3, 3)))


@pytest.mark.parametrize("stack", [(), (3,)], ids=["layer", "experts"])
def test_factors_that_cancel_each_other_have_no_size(stack: tuple[int, ...]) -> None:
    """What is left of an adapter minus itself is rounding, which has no rank."""
    A, B = normal((*stack, 4, 9), (*stack, 7, 4))
    A, B = np.concatenate([A, A], axis=-2), np.concatenate([0.3 * B, -0.3 * B], axis=-1)
    _, new_B, values = reorder_factors(A, B)
    assert not values.any()
    assert not new_B.any()
    assert not singular_values(A, B).any()


def test_components_of_very_different_sizes_are_kept() -> None:
    """As of factors that were scaled against each other."""
    A, B = normal((4, 9), (7, 4))
    scales = np.array([1e8, 1e-8, 1e8, 1e-8])
    expected = reorder_factors(A, B)[2]
    assert_close(reorder_factors(A * scales[:, None], B / scales)[2], expected)
    assert_close(singular_values(A * scales[:, None], B / scales), expected)


def test_experts_are_reordered_independently() -> None:
    A, B, p = normal((3, 4, 9), (3, 7, 4), (4,))
    p = np.abs(p)
    stacked = reorder_factors(A, B, p)
    tails = np.zeros(5)
    for e in range(3):
        expert = reorder_factors(A[e], B[e], p)
        for actual, expected in zip(stacked, expert, strict=True):
            assert_close(actual[e], expected)
        tails += squared_tails(expert[2])
    assert_close(squared_tails(stacked[2]), tails)
    assert_close(singular_values(A * p[:, None], B), stacked[2])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 1e-6), (ml_dtypes.bfloat16, 2e-2), (np.float16, 2e-3)]
)
def test_the_dtype_only_rounds_the_result(dtype: Any, tolerance: float) -> None:
    A, B = (factor.astype(dtype) for factor in normal((6, 20), (15, 6)))
    p = oracle.trained_p([1, 2, 6], "rank", 4.0).numpy()
    new_A, new_B, values = reorder_factors(A, B, p)
    assert (new_A.dtype, new_B.dtype, values.dtype) == (dtype, dtype, np.float64)
    update = B.astype(np.float64) @ np.diag(p) @ A.astype(np.float64)
    error = np.linalg.norm(new_B.astype(np.float64) @ new_A.astype(np.float64) - update)
    assert error < tolerance * np.linalg.norm(update)


def test_factors_may_differ_by_a_hundred_orders_of_magnitude() -> None:
    A, B = normal((6, 20), (15, 6))
    A *= 10.0 ** -np.arange(0, 12, 2.0)[:, None]
    B *= 1e60
    new_A, new_B, _ = reorder_factors(A, B)
    error = np.linalg.norm(new_B @ new_A - B @ A)
    assert error < 1e-12 * np.linalg.norm(B @ A)


@given(layers(), st.booleans())
def test_truncation_errors_are_those_of_the_dense_products(
    layer: tuple[Array, Array, Array], stacked: bool
) -> None:
    A, B, scales = layer
    rank = len(scales)
    if stacked:
        A, B = np.stack([A, -2 * A]), np.stack([B, B + 1])
    expected = [
        np.sum((scales[-1] * B @ A - (scales[r - 1] if r else 0) * B[..., :r] @ A[..., :r, :]) ** 2)
        for r in range(rank + 1)
    ]
    errors = truncation_errors(A, B, list(scales))
    assert (errors >= 0).all()
    np.testing.assert_allclose(errors, expected, rtol=1e-9, atol=1e-10 * (1 + max(expected)))


def test_a_weighted_sum_is_the_sum_of_the_products() -> None:
    A1, B1, A2, B2 = normal((2, 9), (7, 2), (3, 9), (7, 3))
    A, B = weighted_sum([(A1, B1), (A2.astype(np.float32), B2)], [0.5, -2.0])
    assert (A.shape, B.shape, A.dtype) == ((5, 9), (7, 5), np.float64)
    np.testing.assert_allclose(B @ A, 0.5 * B1 @ A1 - 2 * B2 @ A2, rtol=0, atol=1e-5)


def test_padding_adds_zeros_at_the_end() -> None:
    (A,) = normal((2, 3))
    assert pad_end(A, 0, axis=0) is A
    assert pad_end(A, -1, axis=0) is A
    padded = pad_end(A, 2, axis=-2)
    assert padded.shape == (4, 3)
    np.testing.assert_array_equal(padded[:2], A)
    assert not padded[2:].any()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16])
def test_the_checksum_detects_every_change(dtype: Any) -> None:
    def checksum(*factors: tuple[Array, Array]) -> str:
        digest = Checksum()
        for A, B in factors:
            digest.update(A, B)
        return digest.hexdigest()

    A, B = (factor.astype(dtype) for factor in normal((4, 6), (5, 4)))
    expected = checksum((A, B))
    strided_B = np.asfortranarray(B)
    assert checksum((A.copy(), strided_B)) == expected

    changed_A = A.copy()
    changed_A[2, 3] = np.nextafter(changed_A[2, 3], np.array(9, dtype))
    permutation = [2, 0, 3, 1]  # the same update
    checksums = {
        expected,
        checksum((changed_A, B)),
        checksum((A[permutation], B[:, permutation])),
        checksum((A[:, ::-1], B)),
        checksum((A, B), (A, B)),
        checksum((B, A)),
        checksum((-A, -B)),
    }
    assert len(checksums) == 7


@given(sizes, st.integers(0, 10**6))
def test_every_prefix_has_the_least_expected_change(rank: int, seed: int) -> None:
    """By the SVD of the dense ``G^(1/2) B A C^(1/2)``, with the same damping."""
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((rank, rank + 5)), rng.standard_normal((rank + 3, rank))
    x, g = rng.standard_normal((40, rank + 5)), rng.standard_normal((40, rank + 3))
    C, G = x.T @ x, g.T @ g
    new_A, new_B, values = reorder_by_moments(A, B, A @ C @ A.T, B.T @ G @ B)
    assert_close(new_B @ new_A, B @ A, size=10)
    assert_close(np.linalg.norm(new_A, axis=1), np.linalg.norm(new_B, axis=0))
    C += DAMPING * np.trace(A @ C @ A.T) / np.trace(A @ A.T) * np.eye(len(C))
    G += DAMPING * np.trace(B.T @ G @ B) / np.trace(B.T @ B) * np.eye(len(G))
    root_G, root_C = np.linalg.cholesky(G).T, np.linalg.cholesky(C)
    errors = best_errors(root_G @ B @ A @ root_C)
    for r in range(rank + 1):
        missing = root_G @ (B @ A - new_B[:, :r] @ new_A[:r]) @ root_C
        assert_close(np.linalg.norm(missing), errors[r], size=100)
        assert_close(np.sqrt(np.sum(values[r:] ** 2)), errors[r], size=100)


def with_condition(rows: int, columns: int, condition: float, seed: int) -> Array:
    """A matrix of this condition number, whose rows differ by 14 orders of magnitude in size."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((rows, rows)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, rows)))
    matrix = left * np.geomspace(1, 1 / condition, rows) @ right.T
    sizes = rng.permutation(np.geomspace(1e-14, 1, rows))
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True) * sizes[:, None]


@given(
    rank=st.integers(2, 8),
    log_condition=st.floats(0, 12),
    is_bf16=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cholesky_factors_give_the_svd_of_qr(
    rank: int, log_condition: float, is_bf16: bool, seed: int
) -> None:
    """Where the condition allows them; otherwise it is the same code."""
    A = with_condition(rank, 24, 10**log_condition, seed)
    B = with_condition(rank, 20, 10 ** (log_condition / 2), seed + 1).T
    if is_bf16:
        A, B = A.astype(ml_dtypes.bfloat16), B.astype(ml_dtypes.bfloat16)
    svd = svd_of_product(A, B)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matryoshka_lora.linalg.factors._MAX_CONDITION", 0.0)
        expected = svd_of_product(A, B)
    scale = expected.values[0]
    np.testing.assert_allclose(svd.values, expected.values, rtol=1e-9, atol=1e-14 * scale)
    np.testing.assert_allclose(singular_values(A, B), svd.values, rtol=1e-9, atol=1e-14 * scale)
    np.testing.assert_allclose(
        svd.left * svd.values @ svd.right,
        expected.left * expected.values @ expected.right,
        rtol=0,
        atol=1e-9 * scale,
    )
    for vectors in (svd.left, svd.right.T):
        used = vectors[:, svd.values > 0]
        np.testing.assert_allclose(used.T @ used, np.eye(used.shape[1]), atol=1e-8)
    first = svd_of_product(A, B, rank - 1)
    np.testing.assert_array_equal(first.values, svd.values)
    assert first.left.shape[1] == first.right.shape[0] == rank - 1


def test_ordinary_factors_need_no_qr(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 8, 40)), rng.standard_normal((2, 30, 8))
    monkeypatch.setattr(np.linalg, "qr", None)
    reorder_factors(A, B)
    singular_values(A, B)
    with pytest.raises(TypeError):  # a component twice
        singular_values(np.concatenate([A, A], axis=1), np.concatenate([B, B], axis=2))
