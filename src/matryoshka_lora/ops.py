"""The low-rank update of a linear layer as one differentiable operation, and its plain twin.

``y = x W^T + bias + (x A^T) diag(p) B^T``, with W and the bias frozen. What makes it cheap:

* A and B are cast to the dtype of x, never x to theirs.
* p scales the R-wide activation, never the output.
* Both products are added in place, into the output and into the gradient of x (``addmm``).
* Only x is saved for the backward pass. ``x A^T`` costs R multiplications for each number of x and is made again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def low_rank_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: Tensor
) -> Tensor:
    """The plain twin of `low_rank_linear`: the formula, differentiated by autograd."""
    if p.ndim == 2:
        p = p.view(p.shape[0], *(1,) * (x.ndim - 2), p.shape[1])
    hidden = (linear(x, A.to(x.dtype)) * _full_precision(p, x)).to(x.dtype)
    return linear(x, weight, bias) + linear(hidden, B.to(x.dtype))


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: Tensor) -> Tensor:
    """A frozen linear layer with its low-rank update; gradients go to x, A and B.

    Args:
        x: Shape (rows, ..., in), in the dtype that is computed in.
        weight: Frozen, shape (out, in), dtype of x.
        bias: Frozen, shape (out,), dtype of x, or None.
        A: Shape (R, in), any floating dtype; usually float32 beside a bfloat16 x.
        B: Shape (out, R), dtype of A.
        p: Shape (R,), or (rows, R) for one diagonal per row of x.

    Returns:
        Shape (rows, ..., out), dtype of x.
    """
    # torch declares `apply` without types.
    output: Tensor = _LowRankLinear.apply(x, weight, bias, A, B, p)  # type: ignore[no-untyped-call]
    return output


class _LowRankLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        hidden = (tokens @ A.to(x.dtype).t()).mul_(_per_token(p, x, tokens))
        output = linear(tokens, weight, bias)
        output.addmm_(hidden, B.to(x.dtype).t())
        return output.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, A, B, p = inputs
        ctx.save_for_backward(x, weight, A, B, p)

    # Only differentiable operations, for second derivatives.
    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, A, B, p = ctx.saved_tensors
        tokens = x.reshape(-1, x.shape[-1])
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        left, scale = A.to(x.dtype), _per_token(p, x, tokens)
        grad_hidden = (grad @ B.to(x.dtype)).mul_(scale)
        grad_A = grad_hidden.t() @ tokens
        grad_B = grad.t() @ (tokens @ left.t()).mul_(scale)
        grad_x = (grad @ weight).addmm_(grad_hidden, left).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_A.to(A.dtype), grad_B.to(B.dtype), None


def _full_precision(p: Tensor, x: Tensor) -> Tensor:
    # Half precision would round p, a wrong scale for a whole column, in training only.
    return p.to(torch.promote_types(x.dtype, torch.float32))


def _per_token(p: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
    p = _full_precision(p, x)
    return p if p.ndim == 1 else p.repeat_interleave(len(tokens) // max(len(p), 1), dim=0)
