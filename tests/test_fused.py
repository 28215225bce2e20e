"""The fused operation against the plain formula that autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from matryoshka_lora.fused import low_rank_linear, low_rank_linear_reference

ROWS, TOKENS, IN, OUT, RANK = 3, 5, 7, 6, 4


def case(
    dtype: torch.dtype = torch.float64,
    per_row: bool = False,
    bias: bool = True,
    factors: torch.dtype | None = None,
) -> list[Any]:
    torch.manual_seed(0)
    x = torch.randn(ROWS, TOKENS, IN, dtype=dtype, requires_grad=True)
    A = torch.randn(RANK, IN, dtype=factors or dtype, requires_grad=True)
    B = torch.randn(OUT, RANK, dtype=factors or dtype, requires_grad=True)
    weight = torch.randn(OUT, IN, dtype=dtype)
    p = torch.rand((ROWS, RANK) if per_row else RANK, dtype=torch.float64) + 0.1
    return [x, weight, torch.randn(OUT, dtype=dtype) if bias else None, A, B, p]


def gate_and_up(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    gate, up = (torch.randn(ROWS, TOKENS, IN, dtype=dtype, requires_grad=True) for _ in range(2))
    return gate, up


def outputs(function: Callable[..., Tensor], arguments: list[Any]) -> list[Tensor]:
    x, _, _, A, B, _ = arguments
    y = function(*arguments)
    return [y, *torch.autograd.grad(y.square().sum(), [x, A, B])]


def close(found: Any, expected: Any) -> bool:
    pairs = zip(found, expected, strict=True)
    return all((ours - plain).norm() <= 1e-12 * plain.norm() for ours, plain in pairs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_it_is_the_plain_formula(per_row: bool, bias: bool) -> None:
    x, weight, b, A, B, p = arguments = case(per_row=per_row, bias=bias)
    expected = outputs(low_rank_linear_reference, arguments)
    assert close(outputs(low_rank_linear, arguments), expected)
    wrong = [*arguments[:5], p * torch.tensor([1.0, 1.0, 1.0, 1.00001])]
    assert not close(outputs(low_rank_linear, wrong), expected)
    assert torch.autograd.gradcheck(
        lambda x, A, B: low_rank_linear(x, weight, b, A, B, p), (x, A, B)
    )


@pytest.mark.parametrize("per_row", [True, False])
def test_half_precision_is_no_further_from_the_formula(per_row: bool) -> None:
    """bf16 activations beside fp32 factors, as in training."""
    arguments = case(torch.bfloat16, per_row, factors=torch.float32)
    exact = [a.detach().double().requires_grad_(a.requires_grad) for a in arguments]
    found = outputs(low_rank_linear, arguments)
    dtypes = [tensor.dtype for tensor in found]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    plain, right = (outputs(low_rank_linear_reference, given) for given in (arguments, exact))
    for ours, theirs, wanted in zip(found, plain, right, strict=True):
        error, other = ((a.double() - wanted).norm() / wanted.norm() for a in (ours, theirs))
        assert error < 0.02
        assert error < 2 * other


def test_under_hooks_only_the_inputs_are_saved() -> None:
    arguments = case(torch.float32)
    known = {a.untyped_storage().data_ptr() for a in arguments}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        low_rank_linear(*arguments)
    assert {a.untyped_storage().data_ptr() for a in saved} <= known


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10"), reason="torch 2.8 and 2.9 save the product"
)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_not_saved_but_multiplied_again(per_row: bool, dtype: torch.dtype) -> None:
    """The input of a gated MLP's last layer: autograd keeps both of its factors anyway."""
    _, weight, bias, A, B, p = case(dtype, per_row, factors=torch.float32)
    found = []
    for as_product in (True, False):
        gate, up = gate_and_up(dtype)
        x = torch.nn.functional.silu(gate) * up
        y = low_rank_linear(x if as_product else x.view_as(x), weight, bias, A, B, p)
        node: Any = y.grad_fn
        saved = {t.untyped_storage().data_ptr() for t in node.saved_tensors if t is not None}
        assert (x.untyped_storage().data_ptr() in saved) != as_product
        found.append(torch.autograd.grad(y.float().square().sum(), [gate, up, A, B]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_a_product(use_reentrant: bool) -> None:
    _, weight, bias, A, B, p = case()
    gate, up = gate_and_up()

    def function(gate: Tensor, up: Tensor) -> Tensor:
        return low_rank_linear(gate.sigmoid() * up, weight, bias, A, B, p)

    plain = torch.autograd.grad(function(gate, up).square().sum(), [gate, up, A, B])
    checkpoint(function, gate, up, use_reentrant=use_reentrant).square().sum().backward()
    assert all(map(torch.equal, plain, (t.grad for t in (gate, up, A, B))))


@pytest.mark.parametrize("how", ["freed", "changed in place", "times a constant"])
def test_a_product_that_autograd_has_not_is_saved(how: str) -> None:
    _, weight, bias, A, B, p = case()
    gate, up = gate_and_up()
    left = gate.sigmoid()
    x = left * (2.0 if how == "times a constant" else up)
    if how == "freed":
        x.sum().backward()
    elif how == "changed in place":
        left.detach().zero_()
    found = []
    for function in (low_rank_linear, low_rank_linear_reference):
        y = function(x, weight, bias, A, B, p)
        found.append((y, *torch.autograd.grad(y.square().sum(), [A, B])))
    assert close(*found)


@pytest.mark.parametrize("tokens", [(ROWS, TOKENS), (ROWS,)])
def test_a_model_may_change_the_output_in_place(tokens: tuple[int, ...]) -> None:
    """Gemma3n does it to the coefficients of its residual streams."""
    arguments = case()
    arguments[0] = torch.randn(*tokens, IN, dtype=torch.float64, requires_grad=True)

    def changed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: function(*given).mul_(3.0).add_(1.0)

    ours, plain = (
        outputs(changed(f), arguments) for f in (low_rank_linear, low_rank_linear_reference)
    )
    assert close(ours, plain)
