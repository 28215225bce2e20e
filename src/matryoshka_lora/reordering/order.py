"""Learn in which order a low-rank update gives its rank away, without changing the update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matryoshka_lora.reordering.factors import reorder_factors


class OrderOptimizer:
    """Moves pairs of factors along ``A -> M A``, ``B -> B M^-1``, on which their product ``B A`` never changes.

    What M does change is every prefix: ``B[:, :r] A[:r]`` becomes ``B M^-1 diag(1, ..., 1, 0, ..., 0) M A``. The SVD is
    one choice of M, the best for the Frobenius norm. This one descends the gradient of a loss of prefixes.

    A step of M is ``exp(D) M``, so M stays invertible, and D follows the gradient in the R x R matrix that stands left
    of A and, inverted, right of B: ``dL/dA A^T - B^T dL/dB``. Adam (torch's) gives D its size. With few steps of a few
    hundredths, M stays near the order that it starts from; R^2 numbers for each layer have little to overfit with.

    Directions between two nested ranks form a block. An M that mixes a block within itself changes no nested prefix, so
    its gradient is zero but for rounding, which Adam would blow up: those entries of D stay zero.

    Args:
        pairs: A of shape (..., R, in) and B of shape (..., out, R) for each layer, as they are now. Copied.
        ranks: The nested ranks, increasing; the last one is R.
        learning_rate: The size of a step of D's entries, without unit.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], ranks: Sequence[int], learning_rate: float) -> None:
        self.start = [(A.detach().clone(), B.detach().clone()) for A, B in pairs]
        # float64 but where there is none: the product is to stay the same.
        self._work = [torch.float32 if A.device.type == "mps" else torch.float64 for A, _ in pairs]
        eyes = [
            torch.eye(A.shape[-2], dtype=work, device=A.device).expand(*A.shape[:-2], -1, -1)
            for (A, _), work in zip(pairs, self._work, strict=True)
        ]
        self.M, self.inverse = [eye.clone() for eye in eyes], [eye.clone() for eye in eyes]
        self.ranks = tuple(ranks)
        block = torch.searchsorted(torch.tensor(self.ranks), torch.arange(1, self.ranks[-1] + 1))
        self._moves = block[:, None] != block
        self._D = [torch.zeros_like(eye).requires_grad_() for eye in self.M]
        self.adam = torch.optim.Adam(self._D, learning_rate, betas=(0.9, 0.99))

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The factors as they are now, in the shapes and dtypes that were given."""
        return [
            ((M @ A.to(M.dtype)).to(A.dtype), (B.to(M.dtype) @ inverse).to(B.dtype))
            for (A, B), M, inverse in zip(self.start, self.M, self.inverse, strict=True)
        ]

    @torch.no_grad()
    def step(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """One step down.

        Args:
            gradients: Of the loss, by A and by B of each layer, at `pairs`.
        """
        for D, (A, B), (grad_A, grad_B) in zip(self._D, self.pairs, gradients, strict=True):
            work = D.dtype
            full = grad_A.to(work) @ A.to(work).mT - B.to(work).mT @ grad_B.to(work)
            D.grad = full * self._moves.to(D.device)
        self.adam.step()
        for number, D in enumerate(self._D):
            self.M[number] = torch.matrix_exp(D) @ self.M[number]
            self.inverse[number] = self.inverse[number] @ torch.matrix_exp(-D)
            D.zero_()

    def finished(self) -> list[tuple[Tensor, Tensor]]:
        """`pairs` with each block in the order of its own SVD: the ranks between two nested ones become good too."""
        found = []
        for A, B in self.pairs:
            edges = zip((0, *self.ranks), self.ranks, strict=False)
            blocks = [reorder_factors(A[..., low:high, :], B[..., low:high]) for low, high in edges]
            found.append((torch.cat([a for a, _, _ in blocks], dim=-2), torch.cat([b for _, b, _ in blocks], dim=-1)))
        return found
