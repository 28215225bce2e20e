"""Low-rank algebra on factors: the reordering that makes every prefix good, and a checksum."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad


def reorder_factors(
    A: Tensor, B: Tensor, p: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors of the same product whose every prefix is its best approximation of that rank.

    QR of ``diag(p) A`` transposed and of B, then the SVD of the small core: the singular value
    decomposition of ``B diag(p) A`` at cost O((in + out) R^2), without ever forming the (out, in)
    matrix. By Eckart-Young the first r columns are the closest matrix of rank r in the Frobenius
    norm, at every r at once.

    Args:
        A: Shape (..., R, in). Leading dimensions are experts.
        B: Shape (..., out, R), same dtype and device as A.
        p: The diagonal between B and A, shape (R,); None means ones.
        scale: The scale s of the result: ``s B' A' = B diag(p) A``.

    Returns:
        ``A'``, ``B'`` with the shapes and dtype of A and B, and the singular values of the product,
        shape (..., R), float64, decreasing; one below rounding is 0. They are shared
        evenly between both factors. The sign is fixed, so that reordering twice changes nothing but
        the rows of A that belong to singular value 0.
    """
    rank = A.shape[-2]
    # float64, because a product of two fp32 factors needs more digits than fp32 and the SVD of a
    # near-degenerate core would mix columns. MPS has no float64.
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

    # A direction with singular value 0 keeps a unit row in A, zeros in B: the product is the same,
    # and unlike a pair of zeros it can still learn. Where a layer is narrower than R, such
    # directions fill up the missing columns.
    dead = s <= s.amax(dim=-1, keepdim=True) * rank * torch.finfo(s.dtype).eps
    s = torch.where(dead, 0.0, s)
    half = (s / scale).sqrt()
    new_A = right * torch.where(dead, torch.ones_like(s), half)[..., :, None]
    new_B = left * half[..., None, :]
    missing = rank - s.shape[-1]
    new_A, new_B = pad(new_A, (0, 0, 0, missing)), pad(new_B, (0, missing))
    return new_A.to(A.dtype), new_B.to(B.dtype), pad(s, (0, missing))


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Return those of ``B A``, shape (..., R), float64, as `reorder_factors` does, in less time."""
    r_in, r_out = (torch.linalg.qr(tall.double(), mode="r").R for tall in (A.mT, B))
    values = torch.linalg.svdvals(r_out @ r_in.mT)
    return pad(values, (0, A.shape[-2] - values.shape[-1]))


def checksum(factors: Iterable[tuple[Tensor, Tensor]]) -> str:
    """Return a checksum of pairs of factors, to detect changes.

    An order holds only for the factors that were reordered, so the checksum is stored with it. The
    sums run on the factors' device. This is not a cryptographic hash.
    """
    total = 0
    for pair in factors:
        for tensor in pair:
            bits = tensor.detach().flatten(1).contiguous().view(_WORD[tensor.element_size()])
            # Weights by row, so that an exchange of rows shows too.
            rows = bits.sum(dim=1, dtype=torch.int64)
            weights = torch.arange(1, len(rows) + 1, device=rows.device)
            columns = bits.sum(dim=0, dtype=torch.int64)
            other = torch.arange(1, len(columns) + 1, device=rows.device)
            for value in ((rows * weights).sum(), (columns * other).sum()):
                total = (total * 1_000_003 + int(value)) % (1 << 64)
    return f"{total:016x}"


# Words of 64 bits would overflow the sums, and a change of many signs would go unseen.
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
