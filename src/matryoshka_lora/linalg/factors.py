"""The factors of a LoRA layer: SVD of their product, truncation errors, sums, and a checksum.

The update of a layer is ``s B diag(p) A``, with ``A`` of shape (..., R, in) and ``B`` of shape
(..., out, R). Leading dimensions are experts. The dense (out, in) matrix is never formed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from matryoshka_lora.linalg.arrays import Array, Float64Array, transpose

DAMPING = 1e-2
"""What is added to second moments, relative to their mean: directions that no example shows count a
little, as in the Frobenius norm."""
_MAX_CONDITION = 1e6
"""The condition number of a Gram matrix above which a QR decomposition is computed instead."""


@dataclass(frozen=True)
class SVD:
    """A singular value decomposition ``left diag(values) right``.

    Attributes:
        left: Shape (..., out, R).
        values: Shape (..., R), decreasing.
        right: Shape (..., R, in).
    """

    left: Float64Array
    values: Float64Array
    right: Float64Array

    def factors(self) -> tuple[Float64Array, Float64Array]:
        """Return A and B with ``B A = left diag(values) right``.

        Both factors get the square root. A component with the singular value 0 keeps a unit row in
        A and zeros in B: the product is the same, and unlike a pair of zeros it can still learn.
        """
        root = np.sqrt(self.values)
        A = self.right * np.where(self.values == 0, 1.0, root)[..., :, None]
        return A, self.left * root[..., None, :]


def svd_of_product(A: Array, B: Array, rank: int | None = None) -> SVD:
    """Return the singular value decomposition of ``B A`` without the dense matrix.

    With ``A^T = Q_in R_in`` and ``B = Q_out R_out``, it comes from the SVD of the small core
    ``R_out R_in^T``, at cost O((in + out) R^2). A singular value that is only rounding is 0: one
    far below the product of the norms of both factors.

    Args:
        A: Shape (..., R, in).
        B: Shape (..., out, R).
        rank: The number of singular vectors. All singular values are returned.
    """
    outputs, core, inputs = _core(A, B, rank)
    return SVD(outputs @ core.left, core.values, core.right @ inputs)


def _core(A: Array, B: Array, rank: int | None) -> tuple[Float64Array, SVD, Float64Array]:
    """Return outputs, core and inputs with ``B A = outputs left diag(values) right inputs``.

    Outputs and inputs have the shapes of B and A. The singular vectors of the core have R elements,
    so scaling them costs nothing.
    """
    # float64, because the product of two float32 factors needs more digits than float32, and the
    # SVD of a near-degenerate core would mix columns.
    A, B = A.astype(np.float64, copy=False), B.astype(np.float64, copy=False)
    r_in, r_out = _cholesky_triangle(A), _cholesky_triangle(transpose(B))
    if r_in is not None and r_out is not None:
        u, s, vh = np.linalg.svd(r_out @ transpose(r_in))
        # Q = A^T R^-1, of which only the product with a small matrix is computed.
        left = np.linalg.solve(r_out, u[..., :rank])
        right = transpose(np.linalg.solve(r_in, transpose(vh[..., :rank, :])))
        return B, SVD(left, _without_rounding(s, r_in, r_out), right), A
    q_in, r_in = np.linalg.qr(transpose(A))
    q_out, r_out = np.linalg.qr(B)
    u, s, vh = np.linalg.svd(r_out @ transpose(r_in), full_matrices=False)
    core = SVD(u[..., :rank], _without_rounding(s, r_in, r_out), vh[..., :rank, :])
    return q_out, core, transpose(q_in)


def reorder_factors(
    A: Array, B: Array, p: Float64Array | None = None, rank: int | None = None
) -> tuple[Array, Array, Float64Array]:
    """Return factors of the same product whose every prefix is the best approximation of its rank.

    They are computed from the singular value decomposition of ``B diag(p) A``. By the Eckart-Young
    theorem its first r components are the closest matrix of rank r in the Frobenius norm, at every
    r.

    Args:
        A: Shape (..., R, in), any floating dtype.
        B: Shape (..., out, R), dtype of A.
        p: The diagonal between B and A, shape (R,). Defaults to ones.
        rank: The number of components to return. Defaults to R.

    Returns:
        ``A'`` and ``B'`` with ``B' A' = B diag(p) A`` and the shapes and dtype of A and B, and the
        singular values of the product, shape (..., R), float64, decreasing. Both factors get the
        square root of a singular value. Signs are fixed, so that reordering twice changes nothing
        but the rows of A that belong to the singular value 0.
    """
    rank = A.shape[-2] if rank is None else rank
    outputs, core, inputs = _core(A if p is None else A.astype(np.float64) * p[:, None], B, rank)
    values = core.values[..., :rank]
    core_A, core_B = SVD(core.left, values, core.right).factors()
    new_A = core_A @ inputs
    signs = np.where(-new_A.min(axis=-1) > new_A.max(axis=-1), -1.0, 1.0)
    new_A *= signs[..., :, None]
    new_B = outputs @ (core_B * signs[..., None, :])
    # A layer narrower than R has fewer singular values than R.
    new_A = pad_end(new_A, rank - values.shape[-1], axis=-2).astype(A.dtype, copy=False)
    new_B = pad_end(new_B, rank - values.shape[-1], axis=-1).astype(B.dtype, copy=False)
    return new_A, new_B, pad_end(core.values, A.shape[-2] - core.values.shape[-1], axis=-1)


def reorder_by_moments(
    A: Array, B: Array, input_moments: Float64Array, output_moments: Float64Array
) -> tuple[Array, Array, Float64Array]:
    """Return factors of the same product whose every prefix changes the model's outputs least.

    If a prefix changes the update by D, the expected squared change is ``Tr(D^T G D C)``. C is the
    second moment of the layer's inputs x, and G the second moment of the gradients g with respect
    to the layer's outputs. Their Kronecker product approximates the layer's Fisher information
    matrix (K-FAC, arXiv 1503.05671). D is in the span of the factors, so ``A C A^T`` and
    ``B^T G B`` suffice.

    Args:
        A: Shape (R, in), any floating dtype, ordered by SVD.
        B: Shape (out, R), dtype of A, ordered by SVD.
        input_moments: ``A C A^T``, the second moment of ``A x``, shape (R, R).
        output_moments: ``B^T G B``, the second moment of ``B^T g``, shape (R, R).

    Returns:
        ``A'`` and ``B'`` with ``B' A' = B A`` and the shapes and dtype of A and B; and the weighted
        singular values, shape (R,), decreasing. The expected squared change of rank r is the sum of
        the squares of those after r.
    """
    # Components of zeros are the last ones, and stay as they are.
    rank = int(np.count_nonzero(np.linalg.norm(B.astype(np.float64), axis=0)))
    if rank == 0:
        return A, B, np.zeros(len(A))
    wide_A, wide_B = A[:rank].astype(np.float64), B[:, :rank].astype(np.float64)
    moments = [
        moment + DAMPING * np.trace(moment) / np.trace(gram) * gram
        for moment, gram in (
            (input_moments[:rank, :rank], wide_A @ wide_A.T),
            (output_moments[:rank, :rank], wide_B.T @ wide_B),
        )
    ]
    # A change B (I - M) A has the expected squared change |L_B^T (I - M) L_A|^2, where L is the
    # Cholesky factor of a moment. The best M of rank r comes from the SVD of L_B^T L_A.
    L_A, L_B = np.linalg.cholesky(moments[0]), np.linalg.cholesky(moments[1])
    left, values, right = np.linalg.svd(L_B.T @ L_A)
    new_A = right @ np.linalg.solve(L_A, wide_A)
    new_B = wide_B @ np.linalg.solve(L_B.T, left)
    # Both factors of a component get the same norm.
    norms_A, norms_B = np.linalg.norm(new_A, axis=1), np.linalg.norm(new_B, axis=0)
    new_A *= np.sqrt(values * norms_B / norms_A)[:, None]
    new_B *= np.sqrt(values * norms_A / norms_B)
    new_A = np.concatenate([new_A.astype(A.dtype), A[rank:]])
    new_B = np.concatenate([new_B.astype(B.dtype), B[:, rank:]], axis=1)
    return new_A, new_B, pad_end(values, len(A) - rank, axis=0)


def singular_values(A: Array, B: Array) -> Float64Array:
    """Return the singular values of ``B A``, shape (..., R), float64, decreasing.

    `reorder_factors` returns the same values, but takes longer.
    """
    A, B = A.astype(np.float64, copy=False), B.astype(np.float64, copy=False)
    r_in, r_out = _cholesky_triangle(A), _cholesky_triangle(transpose(B))
    if r_in is None or r_out is None:
        # NumPy's type stubs know only the result of mode="reduced".
        r_in = cast(Float64Array, np.linalg.qr(transpose(A), mode="r"))
        r_out = cast(Float64Array, np.linalg.qr(B, mode="r"))
    s = np.linalg.svd(r_out @ transpose(r_in), compute_uv=False)
    values = _without_rounding(s, r_in, r_out)
    return pad_end(values, A.shape[-2] - values.shape[-1], axis=-1)


def _cholesky_triangle(rows: Float64Array) -> Float64Array | None:
    """Return the R of the QR decomposition of a transposed matrix, or None if it needs a QR.

    It is the Cholesky factor of the Gram matrix of the rows, which is several times faster than a
    QR. The condition number of a Gram matrix is the square of the one of the rows, so ``Q`` is
    orthogonal to about ``eps`` times this number: 2e-10 at `_MAX_CONDITION`, far below the rounding
    of float32. The norms of the rows do not count, because they are divided out first.

    Args:
        rows: Shape (..., R, n).

    Returns:
        Shape (..., R, R), upper triangular.
    """
    gram = rows @ transpose(rows)
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    if not norms.all():
        return None
    try:
        L = np.linalg.cholesky(gram / (norms[..., :, None] * norms[..., None, :]))
    except np.linalg.LinAlgError:
        return None
    # The norm of a correlation matrix is at most R.
    condition = norms.shape[-1] * np.square(np.linalg.inv(L)).sum(axis=(-2, -1))
    if not np.all(condition <= _MAX_CONDITION):
        return None
    return transpose(norms[..., :, None] * L)


def _without_rounding(s: Array, r_in: Array, r_out: Array) -> Float64Array:
    """Return the singular values of ``r_out @ r_in'``, with 0 in place of rounding errors.

    Rounding grows with the norms of the components. The norm of their sum may be much smaller,
    because components can cancel each other.
    """
    sizes = np.linalg.norm(r_in, axis=-2) * np.linalg.norm(r_out, axis=-2)
    threshold = sizes.sum(axis=-1, keepdims=True) * r_in.shape[-1] * np.finfo(np.float64).eps
    return np.where(s <= threshold, 0.0, s)


def squared_tails(singular_values: Float64Array) -> Float64Array:
    """Return the squared error of each rank from 0 to R, shape (R + 1,), summed over experts.

    By the Eckart-Young theorem, rank r misses the singular values from r + 1 on.

    Args:
        singular_values: Shape (..., R), decreasing.
    """
    squares = (singular_values**2).reshape(-1, singular_values.shape[-1]).sum(axis=0)
    return np.cumsum(np.append(squares, 0.0)[::-1])[::-1]


def truncation_errors(A: Array, B: Array, scales: Sequence[float]) -> Float64Array:
    """Return the squared error of each prefix from 0 to R against rank R, summed over experts.

    Args:
        A: Shape (..., R, in).
        B: Shape (..., out, R).
        scales: The scale of each rank from 1 to R.

    Returns:
        ``|s_R B A - s_r B[:, :r] A[:r]|^2`` for r from 0 to R, shape (R + 1,), float64.
    """
    # A row is the difference of the diagonals of rank R and of a rank from 0 on.
    rank = len(scales)
    column_scales = np.array([0.0, *scales])[:, None]
    diagonals = np.where(np.arange(rank) < np.arange(rank + 1)[:, None], column_scales, 0.0)
    A, B = A.astype(np.float64), B.astype(np.float64)
    return _squared_norms(A, B, diagonals[-1] - diagonals)


def approximation_errors(target: tuple[Array, Array], A: Array, B: Array) -> Float64Array:
    """Return the squared error of each prefix of other factors, summed over experts.

    Args:
        target: The factors of the update: A, shape (..., R, in), and B, shape (..., out, R).
        A: Shape (..., k, in).
        B: Shape (..., out, k).

    Returns:
        ``|B_target A_target - B[:, :r] A[:r]|^2`` for r from 0 to k, shape (k + 1,), float64.
    """
    # The difference is the concatenated factors with a diagonal between them.
    all_A, all_B = weighted_sum([target, (A, B)], [1.0, -1.0])
    size, rank = all_A.shape[-2], A.shape[-2]
    diagonals = np.ones((rank + 1, size))
    diagonals[:, size - rank :] = np.tri(rank + 1, rank, -1)
    return _squared_norms(all_A, all_B, diagonals)


def _squared_norms(A: Float64Array, B: Float64Array, diagonals: Float64Array) -> Float64Array:
    """Return ``|B diag(d) A|^2`` for each row d, summed over experts.

    It is ``d^T G d``, with ``G = (B^T B) * (A A^T)`` elementwise.
    """
    gram = (transpose(B) @ B) * (A @ transpose(A))
    gram = gram.reshape(-1, *gram.shape[-2:]).sum(axis=0)
    squares: Float64Array = ((diagonals @ gram) * diagonals).sum(axis=-1)
    return np.maximum(squares, 0.0)  # cancellation may leave small negative numbers


def weighted_sum(
    factors: Iterable[tuple[Array, Array]], weights: Iterable[float]
) -> tuple[Float64Array, Float64Array]:
    """Return factors of ``w_1 B_1 A_1 + w_2 B_2 A_2 + ...``: their concatenation, which is exact.

    The rank is the sum of the ranks. The result is float64.
    """
    scaled = [
        (A.astype(np.float64), B.astype(np.float64) * weight)
        for (A, B), weight in zip(factors, weights, strict=True)
    ]
    new_A = np.concatenate([A for A, _ in scaled], axis=-2)
    new_B = np.concatenate([B for _, B in scaled], axis=-1)
    return new_A, new_B


def inner_products(factors: Sequence[tuple[Array, Array]]) -> Float64Array:
    """Return the Frobenius inner product of each pair of products ``B_i A_i``.

    ``<B_i A_i, B_j A_j>`` is the sum of the elements of ``(B_i^T B_j) * (A_i A_j^T)``, so the dense
    matrices are not formed.

    Args:
        factors: n pairs A and B, of shapes (..., R_i, in) and (..., out, R_i).

    Returns:
        Shape (n, n), symmetric.
    """
    pairs = [(A.astype(np.float64), B.astype(np.float64)) for A, B in factors]
    products = np.empty((len(pairs), len(pairs)))
    for i, (A_i, B_i) in enumerate(pairs):
        for j, (A_j, B_j) in enumerate(pairs[: i + 1]):
            product = (transpose(B_i) @ B_j) * (A_i @ transpose(A_j))
            products[i, j] = products[j, i] = product.sum()
    return products


def relative_error(
    squared_errors: Mapping[str, Float64Array], ranks: int | Mapping[str, int]
) -> float:
    """Return the relative error of a rank: the norm of the difference over the norm of the update.

    Both norms are over all layers.

    Args:
        squared_errors: The squared error of each rank from 0 to R by layer, shape (R + 1,).
        ranks: One rank, or the rank of each layer by its name. A rank above a layer's R is R.
    """
    total = missing = 0.0
    for name, errors in squared_errors.items():
        rank = ranks[name] if isinstance(ranks, Mapping) else ranks
        total += float(errors[0])
        missing += float(errors[min(rank, len(errors) - 1)])
    return math.sqrt(missing / total) if total > 0 else 0.0


def relative_errors(
    squared_errors: Mapping[str, Float64Array], ranks: Iterable[int]
) -> dict[int, float]:
    """Return the relative error of each of several ranks; see `relative_error`."""
    return {rank: relative_error(squared_errors, rank) for rank in ranks}


def compose_errors(first: float, second: float) -> float:
    """Return the relative error of two truncations, the second one of the result of the first.

    It is exact if what the second one drops is orthogonal to what the first one dropped, as in two
    prefixes of an SVD: the norm of the update after the first one is ``sqrt(1 - first^2)``.
    """
    return math.sqrt(first**2 + max(1 - first**2, 0.0) * second**2)


class Checksum:
    """A checksum of factors, to detect that they have changed since they were reordered.

    An order holds only for the factors that were reordered, so their checksum is stored with it.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def update(self, A: Array, B: Array) -> None:
        """Add the factors of one layer, by their bytes. The order of the layers matters."""
        for factor in (A, B):
            self._hash.update(np.ascontiguousarray(factor).view(np.uint8).data)

    def hexdigest(self) -> str:
        """Return the checksum of all factors so far: 32 characters."""
        return self._hash.hexdigest()


def pad_end(array: Array, count: int, axis: int) -> Array:
    """Return an array with zeros after its end along one axis."""
    if count <= 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, count)
    return np.pad(array, widths)
