"""The fused operation against the plain formula that autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from matryoshka_lora.peft.fused import low_rank_linear, low_rank_linear_unfused

ROWS, TOKENS, IN, OUT, RANK = 3, 5, 7, 6, 4


def make_arguments(
    dtype: torch.dtype = torch.float64,
    per_row: bool = False,
    bias: bool = True,
    factor_dtype: torch.dtype | None = None,
) -> list[Any]:
    """Return x, weight, bias, A, B and p."""
    torch.manual_seed(0)
    factor_dtype = factor_dtype or dtype
    x = torch.randn(ROWS, TOKENS, IN, dtype=dtype, requires_grad=True)
    A = torch.randn(RANK, IN, dtype=factor_dtype, requires_grad=True)
    B = torch.randn(OUT, RANK, dtype=factor_dtype, requires_grad=True)
    weight = torch.randn(OUT, IN, dtype=dtype)
    p = torch.rand((ROWS, RANK) if per_row else RANK, dtype=torch.float64) + 0.1
    return [x, weight, torch.randn(OUT, dtype=dtype) if bias else None, A, B, p]


def make_gate_and_up(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return the two tensors whose product a gated MLP passes to its last layer."""
    torch.manual_seed(1)
    gate = torch.randn(ROWS, TOKENS, IN, dtype=dtype, requires_grad=True)
    up = torch.randn(ROWS, TOKENS, IN, dtype=dtype, requires_grad=True)
    return gate, up


def output_and_gradients(function: Callable[..., Tensor], arguments: list[Any]) -> list[Tensor]:
    x, _, _, A, B, _ = arguments
    y = function(*arguments)
    return [y, *torch.autograd.grad(y.square().sum(), [x, A, B])]


def all_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    pairs = zip(actual, expected, strict=True)
    return all((a - e).norm() <= 1e-12 * e.norm() for a, e in pairs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_equals_the_plain_formula(per_row: bool, bias: bool) -> None:
    arguments = make_arguments(per_row=per_row, bias=bias)
    expected = output_and_gradients(low_rank_linear_unfused, arguments)
    assert all_close(output_and_gradients(low_rank_linear, arguments), expected)
    x, weight, bias_vector, A, B, p = arguments
    wrong_p = p * torch.tensor([1.0, 1.0, 1.0, 1.00001])
    wrong_arguments = [x, weight, bias_vector, A, B, wrong_p]
    assert not all_close(output_and_gradients(low_rank_linear, wrong_arguments), expected)
    assert torch.autograd.gradcheck(
        lambda x, A, B: low_rank_linear(x, weight, bias_vector, A, B, p), (x, A, B)
    )


@pytest.mark.parametrize("per_row", [True, False])
def test_half_precision_is_as_accurate_as_the_plain_formula(per_row: bool) -> None:
    """With bf16 activations and fp32 factors, as in training."""
    arguments = make_arguments(torch.bfloat16, per_row, factor_dtype=torch.float32)
    exact_arguments = [a.detach().double().requires_grad_(a.requires_grad) for a in arguments]
    fused = output_and_gradients(low_rank_linear, arguments)
    plain = output_and_gradients(low_rank_linear_unfused, arguments)
    exact = output_and_gradients(low_rank_linear_unfused, exact_arguments)
    dtypes = [tensor.dtype for tensor in fused]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for fused_tensor, plain_tensor, exact_tensor in zip(fused, plain, exact, strict=True):
        error = (fused_tensor.double() - exact_tensor).norm() / exact_tensor.norm()
        plain_error = (plain_tensor.double() - exact_tensor).norm() / exact_tensor.norm()
        assert error < 0.02
        assert error < 2 * plain_error


def test_under_saved_tensor_hooks_only_the_inputs_are_saved() -> None:
    arguments = make_arguments(torch.float32)
    input_pointers = {tensor.untyped_storage().data_ptr() for tensor in arguments}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        low_rank_linear(*arguments)
    assert {tensor.untyped_storage().data_ptr() for tensor in saved} <= input_pointers


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10"), reason="torch 2.8 and 2.9 save the product"
)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_recomputed_rather_than_saved(per_row: bool, dtype: torch.dtype) -> None:
    """The input of a gated MLP's last layer: autograd saves its two factors anyway."""
    _, weight, bias, A, B, p = make_arguments(dtype, per_row, factor_dtype=torch.float32)
    gradients = []
    for is_product in (True, False):
        gate, up = make_gate_and_up(dtype)
        x = torch.nn.functional.silu(gate) * up
        y = low_rank_linear(x if is_product else x.view_as(x), weight, bias, A, B, p)
        node: Any = y.grad_fn
        saved = {t.untyped_storage().data_ptr() for t in node.saved_tensors if t is not None}
        assert (x.untyped_storage().data_ptr() in saved) != is_product
        gradients.append(torch.autograd.grad(y.float().square().sum(), [gate, up, A, B]))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_a_product(use_reentrant: bool) -> None:
    _, weight, bias, A, B, p = make_arguments()
    gate, up = make_gate_and_up()

    def function(gate: Tensor, up: Tensor) -> Tensor:
        return low_rank_linear(gate.sigmoid() * up, weight, bias, A, B, p)

    inputs = [gate, up, A, B]
    expected = torch.autograd.grad(function(gate, up).square().sum(), inputs)
    checkpoint(function, gate, up, use_reentrant=use_reentrant).square().sum().backward()
    assert all(map(torch.equal, expected, [tensor.grad for tensor in inputs]))


@pytest.mark.parametrize("case", ["freed", "factor changed", "product changed", "times a constant"])
def test_a_product_whose_factors_are_not_available_is_saved(case: str) -> None:
    _, weight, bias, A, B, p = make_arguments()
    gate, up = make_gate_and_up()
    left = gate.sigmoid()
    x = left * (2.0 if case == "times a constant" else up)
    if case == "freed":
        x.sum().backward()
    elif case == "factor changed":
        left.detach().zero_()
    elif case == "product changed":
        x.detach().add_(1.0)
    results = []
    for function in (low_rank_linear, low_rank_linear_unfused):
        y = function(x, weight, bias, A, B, p)
        results.append((y, *torch.autograd.grad(y.square().sum(), [A, B])))
    assert all_close(*results)


@pytest.mark.parametrize("shape", [(ROWS, TOKENS), (ROWS,)])
def test_the_output_may_be_modified_in_place(shape: tuple[int, ...]) -> None:
    """Gemma3n does it to the coefficients of its residual streams."""
    arguments = make_arguments()
    arguments[0] = torch.randn(*shape, IN, dtype=torch.float64, requires_grad=True)

    def modified(*arguments: Any) -> Tensor:
        return low_rank_linear(*arguments).mul_(3.0).add_(1.0)

    def modified_reference(*arguments: Any) -> Tensor:
        return low_rank_linear_unfused(*arguments).mul_(3.0).add_(1.0)

    actual = output_and_gradients(modified, arguments)
    assert all_close(actual, output_and_gradients(modified_reference, arguments))
