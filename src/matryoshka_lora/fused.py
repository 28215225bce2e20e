"""Compute a frozen linear layer and its low-rank update as one differentiable operation.

``y = x W^T + bias + (x A^T) diag(p) B^T``, with W and the bias frozen. It is cheap because:

* A and B are cast to the dtype of x, and x is never cast.
* p scales the R-wide activation, never the output.
* Both products are added in place, into the output and into the gradient of x (``addmm``).
* The backward pass needs x and ``(x A^T) diag(p)``, which is small. Where x is the product of two
  tensors that autograd keeps anyway, as in the gated MLP of a Llama, the backward pass
  recomputes x.

`matryoshka_lora.variant` decides where this operation may replace PEFT's forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


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
        # A compiler fuses the plain formula, and chooses what to save, by itself.
        return low_rank_linear_reference(x, weight, bias, A, B, p)
    # Saved-tensor hooks mean checkpointing or offloading: keep no intermediates under them.
    freely = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    left, right = _saved_product(x) if freely else (None, None)
    # torch declares `apply` without types.
    output: Tensor
    output, _ = _LowRankLinear.apply(x, weight, bias, A, B, p, left, right, freely)  # type: ignore[no-untyped-call]
    return output


def low_rank_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: Tensor
) -> Tensor:
    """Return the same result by the plain formula, differentiated by autograd."""
    if p.ndim == 2:
        p = p.view(p.shape[0], *(1,) * (x.ndim - 2), p.shape[1])
    hidden = (linear(x, A.to(x.dtype)) * at_least_float32(p, x.dtype)).to(x.dtype)
    return linear(x, weight, bias) + linear(hidden, B.to(x.dtype))


def at_least_float32(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor in its own dtype or another one, but in no less than float32.

    As a diagonal in half precision it would mis-scale whole columns.
    """
    return tensor.to(torch.promote_types(dtype or tensor.dtype, torch.float32))


def is_plain_linear(module: Any) -> bool:
    """Return whether a module is torch's linear layer on ordinary tensors and without hooks.

    A sharded module gathers its weights in hooks or holds DTensors, and a quantised one is a
    subclass. The fused operation bypasses both, so it must not run there.
    """
    hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return plain and not hooks and "forward" not in vars(module)


class _LowRankLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, x.shape[-1])
        hidden = _hidden(tokens, A, _per_token(p, x, tokens))
        output = linear(tokens, weight, bias)
        output.addmm_(hidden, B.to(x.dtype).t())
        # The output must not be a view, so that models may modify it in place.
        shaped = torch.ops.aten._unsafe_view(output, (*x.shape[:-1], weight.shape[0]))
        return shaped, hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, A, B, p, left, right, save_hidden = inputs
        hidden = output[1] if save_hidden else None
        ctx.save_for_backward(x if left is None else None, left, right, weight, A, B, p, hidden)
        ctx.set_materialize_grads(False)

    # Use differentiable operations only, for second derivatives. In those alone, the hidden
    # activation has a gradient.
    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, more_hidden: Tensor | None
    ) -> tuple[Tensor | None, ...]:
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
        grad_A = (grad_hidden.t() @ tokens).to(A.dtype)
        grad_B = (grad.t() @ hidden).to(B.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_hidden, A_).view(x.shape)
        return grad_x, None, None, grad_A, grad_B, None, None, None, None


def _hidden(tokens: Tensor, A: Tensor, scale: Tensor) -> Tensor:
    return (tokens @ A.to(tokens.dtype).t()).mul_(scale)


def _per_token(p: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
    p = at_least_float32(p, x.dtype)
    return p if p.ndim == 1 else p.repeat_interleave(len(tokens) // max(len(p), 1), dim=0)


def _saved_product(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the two tensors that autograd saved for the product x, or (None, None)."""
    node: Any = x.grad_fn
    if type(node).__name__ != "MulBackward0":
        return None, None
    saved = (node._raw_saved_self, node._raw_saved_other)
    # A saved-tensor hook packed them: leave unpacking to the backward pass.
    if any(getattr(tensor, "unpack_hook", True) is not None for tensor in saved):
        return None, None
    try:
        left, right = node._saved_self, node._saved_other
    except RuntimeError:  # a backward pass has freed them, or they were changed in place
        return None, None
    alike = all(t is not None and (t.shape, t.dtype) == (x.shape, x.dtype) for t in (left, right))
    return (left, right) if alike else (None, None)
