"""Products of factors that have a low rank: elementwise (LoHa) and Kronecker (LoKr)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.linalg.factors import SVD


def elementwise_product(
    B_1: Float64Array, A_1: Float64Array, B_2: Float64Array, A_2: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Return factors A and B of the elementwise product ``(B_1 A_1) * (B_2 A_2)``.

    Its exact rank is at most r_1 r_2: each column of B is the product of a column of B_1 and one of
    B_2, and the same for the rows of A (Khatri-Rao). Where the layer is narrower than r_1 r_2, the
    dense product is smaller than these factors, and is one of the two.

    Args:
        B_1: Shape (out, r_1).
        A_1: Shape (r_1, in).
        B_2: Shape (out, r_2).
        A_2: Shape (r_2, in).

    Returns:
        A of shape (R, in) and B of shape (out, R), with R = min(r_1 r_2, in, out).
    """
    num_outputs, num_inputs = len(B_1), A_1.shape[1]
    if len(A_1) * len(A_2) <= min(num_inputs, num_outputs):
        A = (A_1[:, None, :] * A_2[None, :, :]).reshape(-1, num_inputs)
        B = (B_1[:, :, None] * B_2[:, None, :]).reshape(num_outputs, -1)
        return A, B
    dense = (B_1 @ A_1) * (B_2 @ A_2)
    if num_outputs <= num_inputs:
        return dense, np.eye(num_outputs)
    return np.eye(num_inputs), dense


@dataclass(frozen=True)
class KroneckerSVD:
    """The singular value decomposition of a Kronecker product of two matrices.

    Its singular values are the products of a singular value of each matrix, and its singular
    vectors are the Kronecker products of the corresponding vectors. So the largest singular values
    are known without the dense matrix.

    Attributes:
        first: The decomposition of the first matrix.
        second: The decomposition of the second matrix.
    """

    first: SVD
    second: SVD

    @property
    def values(self) -> Float64Array:
        """All singular values, decreasing, shape (R,), with R = R_1 R_2."""
        return np.sort(self._products())[::-1]

    def factors(self, rank: int) -> tuple[Float64Array, Float64Array]:
        """Return A and B of the closest product ``B A`` of a rank.

        Both factors get the square root of the singular values.
        """
        products = self._products()
        largest = np.argsort(-products, kind="stable")[:rank]
        i, j = np.divmod(largest, len(self.second.values))
        left = self.first.left[:, None, i] * self.second.left[None, :, j]
        right = self.first.right[i, :, None] * self.second.right[j, None, :]
        svd = SVD(
            left.reshape(-1, len(largest)), products[largest], right.reshape(len(largest), -1)
        )
        return svd.factors()

    def scaled(self, factor: float) -> KroneckerSVD:
        """Return the decomposition of the matrix times a number."""
        left = np.copysign(1.0, factor) * self.first.left
        first = SVD(left, abs(factor) * self.first.values, self.first.right)
        return replace(self, first=first)

    def _products(self) -> Float64Array:
        return np.outer(self.first.values, self.second.values).ravel()
