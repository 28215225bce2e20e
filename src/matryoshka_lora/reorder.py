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
        float64, decreasing. The singular values are shared evenly between both factors; the sign is fixed, so that
        reordering twice changes nothing but the rows of A that belong to directions without size.
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
    dead = s <= s.amax(dim=-1, keepdim=True) * rank * torch.finfo(work).eps
    half = torch.where(dead, torch.zeros_like(s), (s / scale).sqrt())
    new_A = right * torch.where(dead, torch.ones_like(s), half)[..., :, None]
    new_B = left * half[..., None, :]
    missing = rank - s.shape[-1]
    if missing:
        new_A = torch.nn.functional.pad(new_A, (0, 0, 0, missing))
        new_B = torch.nn.functional.pad(new_B, (0, missing))
        s = torch.nn.functional.pad(s, (0, missing))
    return new_A.to(A.dtype), new_B.to(B.dtype), s
