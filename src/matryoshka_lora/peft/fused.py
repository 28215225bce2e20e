"""Compute a frozen linear layer and its low-rank update as one differentiable operation.

``y = x W^T + bias + (x A^T) diag(p) B^T``, with W and the bias frozen. It is cheap because:

* A and B are cast to the dtype of x, and x is never cast.
* p scales the activation of width R, never the output.
* Both products are added in place, into the output and into the gradient of x (``addmm``).
* The backward pass needs x and ``(x A^T) diag(p)``, which is small. If x is the product of two
  tensors that autograd saves anyway, as in the gated MLP of a Llama, the backward pass recomputes
  x from them.

`matryoshka_lora.peft.variant` decides where this operation may replace PEFT's forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from matryoshka_lora.tensors import at_least_float32


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: Tensor
) -> Tensor:
    """Return a frozen linear layer's output with its low-rank update; gradients go to x, A and B.

    Args:
        x: Shape (rows, ..., in), in the compute dtype.
        weight: Frozen, shape (out, in), dtype of x.
        bias: Frozen, shape (out,), dtype of x, or None.
        A: Shape (R, in), any floating dtype; usually float32 with a bfloat16 x.
        B: Shape (out, R), dtype of A.
        p: The diagonal with the scale, shape (R,), or (rows, R) for one diagonal per row of x.

    Returns:
        Shape (rows, ..., out), dtype of x.
    """
    if torch.compiler.is_compiling():
        # A compiler fuses the plain formula and chooses the saved tensors by itself.
        return low_rank_linear_unfused(x, weight, bias, A, B, p)
    # Saved-tensor hooks imply checkpointing or offloading, so save no intermediates.
    save_intermediates = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    left = right = None
    if save_intermediates:
        left, right = _saved_multiplicands(x)
    # torch declares `apply` without types.
    output: Tensor
    output, _ = _LowRankLinear.apply(  # type: ignore[no-untyped-call,unused-ignore]
        x, weight, bias, A, B, p, left, right, save_intermediates
    )
    return output


def low_rank_linear_unfused(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: Tensor
) -> Tensor:
    """Return the same result by the plain formula, differentiated by autograd."""
    if p.ndim == 2:
        p = p.view(p.shape[0], *(1,) * (x.ndim - 2), p.shape[1])
    hidden = (linear(x, A.to(x.dtype)) * at_least_float32(p, x.dtype)).to(x.dtype)
    return linear(x, weight, bias) + linear(hidden, B.to(x.dtype))


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module is torch's linear layer on ordinary tensors and without hooks.

    A sharded module gathers its weights in hooks or holds DTensors, and a quantized one is a
    subclass. The fused operation bypasses both, so it must not run there.
    """
    has_hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    if has_hooks or "forward" in vars(module):
        return False
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


class _LowRankLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: Tensor, *_: object
    ) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, x.shape[-1])
        hidden = _hidden(tokens, A, _scale_per_token(p, x, tokens))
        output = linear(tokens, weight, bias)
        output.addmm_(hidden, B.to(x.dtype).t())
        # The output must not be a view, so that models may modify it in place.
        output = torch.ops.aten._unsafe_view(output, (*x.shape[:-1], weight.shape[0]))
        return output, hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, A, B, p, left, right, save_intermediates = inputs
        saved_x = x if left is None else None
        saved_hidden = output[1] if save_intermediates else None
        ctx.save_for_backward(saved_x, left, right, weight, A, B, p, saved_hidden)
        ctx.set_materialize_grads(False)

    # Uses differentiable operations only, to support double backward; only there does the second
    # output get a gradient.
    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_hidden_output: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, left, right, weight, A, B, p, hidden = ctx.saved_tensors
        if x is None:
            x = left * right
        tokens = x.reshape(-1, x.shape[-1])
        scale = _scale_per_token(p, x, tokens)
        if hidden is None:
            hidden = _hidden(tokens, A, scale)
        if grad_output is None:
            grad_output = hidden.new_zeros(*x.shape[:-1], weight.shape[0])
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_hidden = grad @ B.to(x.dtype)
        if grad_hidden_output is not None:
            grad_hidden = grad_hidden + grad_hidden_output
        grad_hidden = grad_hidden.mul_(scale)
        grad_A = (grad_hidden.t() @ tokens).to(A.dtype)
        grad_B = (grad.t() @ hidden).to(B.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_hidden, A.to(x.dtype)).view(x.shape)
        return grad_x, None, None, grad_A, grad_B, None, None, None, None


def _hidden(tokens: Tensor, A: Tensor, scale: Tensor) -> Tensor:
    return (tokens @ A.to(tokens.dtype).t()).mul_(scale)


def _scale_per_token(p: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
    """Return p with the shape (R,), or (tokens, R) if each row has its own."""
    p = at_least_float32(p, x.dtype)
    if p.ndim == 1:
        return p
    tokens_per_row = len(tokens) // max(len(p), 1)
    return p.repeat_interleave(tokens_per_row, dim=0)


def _saved_multiplicands(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the two tensors that autograd saved for the product x, or (None, None)."""
    node: Any = x.grad_fn
    # A product that was changed in place, under no_grad(), no longer equals its factors.
    if type(node).__name__ != "MulBackward0" or x._version > 0:
        return None, None
    for saved in (node._raw_saved_self, node._raw_saved_other):
        # A hook has packed the tensor: leave unpacking to the backward pass.
        if getattr(saved, "unpack_hook", True) is not None:
            return None, None
    try:
        left, right = node._saved_self, node._saved_other
    except RuntimeError:  # a backward pass has freed them, or they were changed in place
        return None, None
    for factor in (left, right):
        if factor is None or factor.shape != x.shape or factor.dtype != x.dtype:
            return None, None
    return left, right
