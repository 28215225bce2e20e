"""The low-rank update of a linear layer as one differentiable operation, and its plain twin.

``y = x W^T + bias + (x A^T) diag(p) B^T``, with W and the bias frozen. What makes it cheap:

* A and B are cast to the dtype of x, never x to theirs.
* p scales the R-wide activation, never the output.
* Both products are added in place, into the output and into the gradient of x (``addmm``).
* For the backward pass ``(x A^T) diag(p)`` is saved, which is small, and x. Where x is the product of two tensors that
  autograd keeps anyway, as in the gated MLP of a Llama, x is not saved but multiplied again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from matryoshka_lora.unofficial import kept_product, reshaped, saves_freely


def low_rank_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: Tensor
) -> Tensor:
    """The plain twin of `low_rank_linear`: the formula, differentiated by autograd."""
    if p.ndim == 2:
        p = p.view(p.shape[0], *(1,) * (x.ndim - 2), p.shape[1])
    hidden = (linear(x, A.to(x.dtype)) * full_precision(p, x.dtype)).to(x.dtype)
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
    # Under hooks on saved tensors: save little, and ask them for nothing before its time.
    freely = saves_freely()
    left, right = kept_product(x) if freely else (None, None)
    # torch declares `apply` without types.
    output: Tensor
    output, _ = _LowRankLinear.apply(x, weight, bias, A, B, p, left, right, freely)  # type: ignore[no-untyped-call]
    return output


class _LowRankLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        p: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        save_hidden: bool,
    ) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, x.shape[-1])
        hidden = _hidden(tokens, A, _per_token(p, x, tokens))
        output = linear(tokens, weight, bias)
        output.addmm_(hidden, B.to(x.dtype).t())
        # No view in autograd's eyes, or the model could not change its layer's output in place.
        return reshaped(output, (*x.shape[:-1], weight.shape[0])), hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, A, B, p, left, right, save_hidden = inputs
        ctx.save_for_backward(
            x if left is None else None, left, right, weight, A, B, p, output[1] if save_hidden else None
        )
        ctx.set_materialize_grads(False)

    # Only differentiable operations, for second derivatives; in those alone, the hidden activation has a gradient.
    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, more_hidden: Tensor | None) -> tuple[Tensor | None, ...]:
        x, left, right, weight, A, B, p, hidden = ctx.saved_tensors
        x = left * right if x is None else x
        tokens = x.reshape(-1, x.shape[-1])
        scale, A_, B_ = _per_token(p, x, tokens), A.to(x.dtype), B.to(x.dtype)
        if hidden is None:
            hidden = _hidden(tokens, A, scale)
        if grad_output is None:
            grad_output = hidden.new_zeros(*x.shape[:-1], weight.shape[0])
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_hidden = grad @ B_ if more_hidden is None else grad @ B_ + more_hidden
        grad_hidden = grad_hidden.mul_(scale)
        grad_A = grad_hidden.t() @ tokens
        grad_B = grad.t() @ hidden
        grad_x = (grad @ weight).addmm_(grad_hidden, A_).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_A.to(A.dtype), grad_B.to(B.dtype), None, None, None, None


def _hidden(tokens: Tensor, A: Tensor, scale: Tensor) -> Tensor:
    return (tokens @ A.to(tokens.dtype).t()).mul_(scale)


def full_precision(p: Tensor, dtype: torch.dtype) -> Tensor:
    """p for a product with a tensor of this dtype: half precision would round it, a wrong scale for a whole column."""
    return p.to(torch.promote_types(dtype, torch.float32))


def _per_token(p: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
    p = full_precision(p, x.dtype)
    return p if p.ndim == 1 else p.repeat_interleave(len(tokens) // max(len(p), 1), dim=0)
