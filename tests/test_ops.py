"""The fused operation against its plain twin, and both against an fp64 evaluation of the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from matryoshka_lora.ops import low_rank_linear, low_rank_linear_reference

ROWS, TOKENS, IN, OUT, RANK = 3, 5, 7, 6, 4


def case(dtype: torch.dtype, per_row: bool, bias: bool, factor_dtype: torch.dtype | None = None) -> list[Tensor | None]:
    torch.manual_seed(0)
    factors = factor_dtype or dtype
    x = torch.randn(ROWS, TOKENS, IN, dtype=dtype, requires_grad=True)
    A = torch.randn(RANK, IN, dtype=factors, requires_grad=True)
    B = torch.randn(OUT, RANK, dtype=factors, requires_grad=True)
    weight = torch.randn(OUT, IN, dtype=dtype)
    p = torch.rand((ROWS, RANK) if per_row else RANK, dtype=torch.float64) + 0.1
    return [x, weight, torch.randn(OUT, dtype=dtype) if bias else None, A, B, p]


def outputs(function: object, arguments: list[Tensor | None]) -> list[Tensor]:
    x, _, _, A, B, _ = arguments
    y = function(*arguments)  # type: ignore[operator]
    return [y, *torch.autograd.grad(y.square().sum(), [x, A, B])]  # type: ignore[list-item]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_gradcheck(per_row: bool, bias: bool) -> None:
    x, weight, b, A, B, p = case(torch.float64, per_row, bias)
    assert torch.autograd.gradcheck(lambda x, A, B: low_rank_linear(x, weight, b, A, B, p), (x, A, B))


@settings(deadline=None, max_examples=40)
@given(st.booleans(), st.booleans(), st.booleans())
def test_it_is_its_twin(per_row: bool, bias: bool, flat: bool) -> None:
    arguments = case(torch.float64, per_row, bias)
    if flat and not per_row:
        arguments[0] = arguments[0].detach().flatten(0, 1).requires_grad_()
    for ours, plain in zip(
        outputs(low_rank_linear, arguments), outputs(low_rank_linear_reference, arguments), strict=True
    ):
        assert (ours - plain).norm() <= 1e-12 * plain.norm()


def test_another_diagonal_is_seen() -> None:
    arguments = case(torch.float64, per_row=False, bias=False)
    other = [*arguments[:5], arguments[5] * torch.tensor([1.0, 1.0, 1.0, 1.001])]
    for ours, wrong in zip(outputs(low_rank_linear, arguments), outputs(low_rank_linear_reference, other), strict=True):
        assert (ours - wrong).norm() > 1e-6 * wrong.norm()


@pytest.mark.parametrize("per_row", [True, False])
def test_half_precision_is_no_further_from_the_formula_than_its_twin(per_row: bool) -> None:
    """bf16 activations beside fp32 factors, as in training."""
    arguments = case(torch.bfloat16, per_row, bias=True, factor_dtype=torch.float32)
    exact = [a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else None for a in arguments]
    found = outputs(low_rank_linear, arguments)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for ours, plain, right in zip(
        found, outputs(low_rank_linear_reference, arguments), outputs(low_rank_linear_reference, exact), strict=True
    ):
        error, twin = ((a.double() - right).norm() / right.norm() for a in (ours, plain))
        assert error < 0.02
        assert error < 2 * twin


def saved_by(output: Tensor) -> set[int]:
    """The addresses of what a node of autograd keeps, without hooks."""
    return {t.untyped_storage().data_ptr() for t in output.grad_fn.saved_tensors if t is not None}  # type: ignore[union-attr]


def test_under_hooks_only_x_is_saved() -> None:
    arguments = case(torch.float32, per_row=False, bias=True)
    known = {a.untyped_storage().data_ptr() for a in arguments if a is not None}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        low_rank_linear(*arguments)  # type: ignore[arg-type]
    assert {a.untyped_storage().data_ptr() for a in saved} <= known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_row", [True, False])
def test_a_product_is_not_saved_but_made_again(per_row: bool, dtype: torch.dtype) -> None:
    """The input of a gated MLP's last layer: autograd keeps both factors for their own gradients."""
    _, weight, bias, A, B, p = case(dtype, per_row, bias=True, factor_dtype=torch.float32)
    found = []
    for as_product in (True, False):
        torch.manual_seed(1)
        gate, up = (torch.randn(ROWS, TOKENS, IN, dtype=dtype, requires_grad=True) for _ in range(2))
        x = torch.nn.functional.silu(gate) * up
        y = low_rank_linear(x if as_product else x.view_as(x), weight, bias, A, B, p)
        assert (x.untyped_storage().data_ptr() in saved_by(y)) != as_product
        found.append(torch.autograd.grad(y.float().square().sum(), [gate, up, A, B]))
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)


def test_a_product_with_a_constant_is_saved() -> None:
    """Autograd keeps the constant alone: x cannot be made from it."""
    x, weight, bias, A, B, p = case(torch.float64, per_row=False, bias=True)
    scaled = x * torch.full((), 2.0, dtype=torch.float64)
    assert scaled.untyped_storage().data_ptr() in saved_by(low_rank_linear(scaled, weight, bias, A, B, p))


def test_second_derivatives_through_a_product() -> None:
    _, weight, bias, A, B, p = case(torch.float64, per_row=False, bias=True)
    gate, up = (torch.randn(ROWS, TOKENS, IN, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(gate: Tensor, up: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return low_rank_linear(gate.sigmoid() * up, weight, bias, A, B, p)

    assert torch.autograd.gradgradcheck(function, (gate, up, A, B))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_a_product(use_reentrant: bool) -> None:
    _, weight, bias, A, B, p = case(torch.float64, per_row=False, bias=True)
    gate, up = (torch.randn(ROWS, TOKENS, IN, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(gate: Tensor, up: Tensor) -> Tensor:
        return low_rank_linear(gate.sigmoid() * up, weight, bias, A, B, p)

    plain = torch.autograd.grad(function(gate, up).square().sum(), [gate, up, A, B])
    checkpoint(function, gate, up, use_reentrant=use_reentrant).square().sum().backward()
    for expected, tensor in zip(plain, (gate, up, A, B), strict=True):
        assert torch.equal(expected, tensor.grad)


@pytest.mark.parametrize("how", ["freed", "changed in place"])
def test_a_product_that_autograd_no_longer_has(how: str) -> None:
    """The plain formula then still gives the gradients of A and B."""
    _, weight, bias, A, B, p = case(torch.float64, per_row=False, bias=True)
    gate, up = (torch.randn(ROWS, TOKENS, IN, dtype=torch.float64, requires_grad=True) for _ in range(2))
    left = gate.sigmoid()
    x = left * up
    if how == "freed":
        x.sum().backward()
    else:
        left.detach().zero_()
    found = []
    for function in (low_rank_linear, low_rank_linear_reference):
        y = function(x, weight, bias, A, B, p)
        found.append((y, *torch.autograd.grad(y.square().sum(), [A, B])))
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).norm() <= 1e-12 * plain.norm()


def test_what_a_hook_has_packed_is_not_unpacked_before_the_backward_pass() -> None:
    """As TRL's activation offloading does, whose hooks ask for the node that runs backward."""
    _, weight, bias, A, B, p = case(torch.float64, per_row=False, bias=True)
    gate, up = (torch.randn(ROWS, TOKENS, IN, dtype=torch.float64, requires_grad=True) for _ in range(2))
    unpacked = []

    def unpack(tensor: Tensor) -> Tensor:
        assert torch._C._current_autograd_node() is not None
        unpacked.append(tensor)
        return tensor

    found = []
    for function in (low_rank_linear, low_rank_linear_reference):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            x = gate.sigmoid() * up
        y = function(x, weight, bias, A, B, p)
        assert not unpacked
        found.append(torch.autograd.grad(y.square().sum(), [gate, up, A, B]))
        assert unpacked
        unpacked.clear()
    for ours, plain in zip(*found, strict=True):
        assert (ours - plain).norm() <= 1e-12 * plain.norm()


@pytest.mark.parametrize("tokens", [(ROWS, TOKENS), (ROWS,)])
def test_a_model_may_change_the_output_in_place(tokens: tuple[int, ...]) -> None:
    """As Gemma3n does with the coefficients of its residual streams."""
    arguments = case(torch.float64, per_row=False, bias=True)
    arguments[0] = torch.randn(*tokens, IN, dtype=torch.float64, requires_grad=True)

    def changed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: function(*given).mul_(3.0).add_(1.0)

    for ours, plain in zip(
        outputs(changed(low_rank_linear), arguments),
        outputs(changed(low_rank_linear_reference), arguments),
        strict=True,
    ):
        assert (ours - plain).norm() <= 1e-12 * plain.norm()
