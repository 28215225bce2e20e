"""Make a low-rank pair nested: after `reorder_factors`, every prefix is the best one of its rank."""

from __future__ import annotations

import torch
from torch import Tensor


def reorder_factors(A: Tensor, B: Tensor, p: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of the same product, ordered so that each prefix of r columns is its best rank-r approximation.

    QR of ``diag(p) A`` transposed and of B, then the SVD of the small core: the singular value decomposition of
    ``B diag(p) A`` at cost O((in + out) R^2), without ever forming the (out, in) matrix. By Eckart-Young the first r
    columns are the closest matrix of rank r in the Frobenius norm, at every r at once.

    Args:
        A: Shape (..., R, in). Leading dimensions are experts.
        B: Shape (..., out, R), same dtype and device as A.
        p: The diagonal between them, shape (R,); None means ones.
        scale: The factor s that the result will be used with: ``s B' A' = B diag(p) A``.

    Returns:
        ``A'``, ``B'`` with the shapes and dtype of A and B, and the singular values of the product, shape (..., R),
        float64, decreasing; of a direction without size, 0. They are shared evenly between both factors; the sign is
        fixed, so that reordering twice changes nothing but the rows of A that belong to directions without size.
    """
    rank = A.shape[-2]
    # float64, because a product of two fp32 factors has more digits than fp32 and the SVD of a near-degenerate core
    # would mix columns; MPS has no float64.
    work = torch.float32 if A.device.type == "mps" else torch.float64
    wide_A, tall_B = A.detach().to(work), B.detach().to(work)
    if p is not None:
        wide_A = wide_A * p.to(A.device, work)[:, None]
    q_in, r_in = torch.linalg.qr(wide_A.mT)
    q_out, r_out = torch.linalg.qr(tall_B)
    u, s, vh = torch.linalg.svd(r_out @ r_in.mT, full_matrices=False)
    left, right = q_out @ u, vh @ q_in.mT

    largest = right.gather(-1, right.abs().argmax(dim=-1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(work)
    left, right = left * sign.mT, right * sign

    # A direction of no size keeps its unit row in A and gets zeros in B: the product is the same, and unlike a pair
    # of zeros it can still learn. Where a layer is narrower than R, such directions fill up the missing columns.
    dead = is_dead(s, rank)
    s = torch.where(dead, 0.0, s)
    half = (s / scale).sqrt()
    new_A = right * torch.where(dead, torch.ones_like(s), half)[..., :, None]
    new_B = left * half[..., None, :]
    missing = rank - s.shape[-1]
    if missing:
        new_A = torch.nn.functional.pad(new_A, (0, 0, 0, missing))
        new_B = torch.nn.functional.pad(new_B, (0, missing))
        s = torch.nn.functional.pad(s, (0, missing))
    return new_A.to(A.dtype), new_B.to(B.dtype), s


def is_dead(values: Tensor, rank: int) -> Tensor:
    """Which singular values of a layer are nothing but the rounding of a matrix of this rank."""
    return values <= values.amax(dim=-1, keepdim=True) * rank * torch.finfo(values.dtype).eps


DAMPING = 1e-2
"""What `reweigh_factors` adds to all eigenvalues of a moment, as a share of their mean: a few samples say little."""


def reweigh_factors(
    A: Tensor, B: Tensor, inner: Tensor, outer: Tensor | None = None, damping: float = DAMPING
) -> tuple[Tensor, Tensor, Tensor]:
    """Reorder factors of `reorder_factors` once more, by what their directions do to data instead of by their size.

    With inputs x of second moment ``C = E[x x^T]`` and weights ``G`` on the outputs (the identity, or the second moment
    of their gradients), each prefix becomes the matrix D' of its rank that minimises ``|G^1/2 (B A - D') C^1/2|`` in
    the Frobenius norm. Without G that is ``E |(B A - D') x|^2``. The full product stays as it is.

    The minimiser lies in the span of the given factors, so only moments of size (R, R) are needed: those of ``A x``
    and of ``B^T g``. In the orthonormal bases that `reorder_factors` made, the problem is the SVD of an R x R core.

    Args:
        A: Shape (..., R, in), rows orthogonal to each other, as `reorder_factors` returns them.
        B: Shape (..., out, R), columns orthogonal to each other.
        inner: ``E[(A x) (A x)^T]``, shape (..., R, R), in any unit: only its proportions matter.
        outer: ``E[(B^T g) (B^T g)^T]`` of the outputs' gradients g, shape (..., R, R); None means ``G = 1``.
        damping: Each moment gets this share of its mean eigenvalue in every direction.

    Returns:
        ``A'``, ``B'`` and the singular values in this metric, shape (..., R), float64, decreasing. Each row of A' is
        as long as its column of B'.
    """
    work = torch.float32 if A.device.type == "mps" else torch.float64
    tall_B, wide_A = B.detach().to(work), A.detach().to(work)
    long_A, long_B = wide_A.norm(dim=-1), tall_B.norm(dim=-2)
    size = long_A * long_B
    alive = size > 0
    # Dead directions keep their place at the end: their size is 0 whatever they are multiplied by.
    left = tall_B / torch.where(alive, long_B, 1.0)[..., None, :]
    right = wide_A / torch.where(alive, long_A, 1.0)[..., :, None]
    root_in = _root(inner.to(work), torch.where(alive, long_A, 0.0), alive, damping)
    outside = torch.diag_embed(long_B**2) if outer is None else outer.to(work)
    root_out = _root(outside, torch.where(alive, long_B, 0.0), alive, 0.0 if outer is None else damping)
    u, s, vh = torch.linalg.svd(root_out.mT * size[..., None, :] @ root_in)
    new_B = torch.linalg.solve_triangular(root_out.mT, u, upper=True)
    new_A = torch.linalg.solve_triangular(root_in, vh, upper=False, left=False)
    new_A, new_B = new_A @ right, left @ new_B
    dead = is_dead(s, s.shape[-1])
    # Any split of s is the same product; even lengths round best.
    lengths = new_A.norm(dim=-1).clamp_min(torch.finfo(work).tiny), new_B.norm(dim=-2)
    half = torch.where(dead, 0.0, (s * lengths[0] * lengths[1]).sqrt())
    new_A = new_A / lengths[0][..., :, None] * torch.where(dead, 1.0, half)[..., :, None]
    new_B = new_B * (half / torch.where(dead, 1.0, lengths[1]))[..., None, :]
    return new_A.to(A.dtype), new_B.to(B.dtype), torch.where(dead, 0.0, s)


def _root(moment: Tensor, lengths: Tensor, alive: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of a moment in the orthonormal basis of the living directions; 1 for the dead."""
    inverse = torch.where(alive, 1 / torch.where(alive, lengths, 1.0), 0.0)
    normal = moment * inverse[..., :, None] * inverse[..., None, :]
    mean = normal.diagonal(dim1=-2, dim2=-1).sum(-1) / alive.sum(-1).clamp_min(1)
    # Where the data never reached the layer, every direction counts alike.
    mean = torch.where(mean > 0, mean, 1.0)
    known = normal / mean[..., None, None] + torch.diag_embed(torch.where(alive, damping, 1.0).to(normal.dtype))
    untouched = known.diagonal(dim1=-2, dim2=-1) <= 0
    root: Tensor = torch.linalg.cholesky(known + torch.diag_embed(untouched.to(known.dtype)))
    return root * mean.sqrt()[..., None, None]
