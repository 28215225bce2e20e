"""Forward and backward of a nested layer against the formula: every kind, rule and rank."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import oracle
from helpers.formula import (
    FORMS,
    KINDS,
    ROWS,
    Form,
    deployed_p,
    is_close,
    layer_in_form,
    matches,
    nestings,
    output_and_gradients,
    perturbed,
    random_input,
    trained_p,
)
from helpers.models import OneLayer, nested_layer
from helpers.rules import ANY_RANK, DECREASING, RANK_PER_ROW
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor

from matryoshka_lora import MatryoshkaError, Nesting, Rule
from matryoshka_lora.rules import RULES

ALL_RULES = [*RULES.values(), ANY_RANK, DECREASING, RANK_PER_ROW]


def rule_name(value: object) -> str | None:
    return value.name if isinstance(value, Rule) else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ALL_RULES, ids=rule_name)
@settings(max_examples=3)
@given(nesting=nestings(), seed=st.integers(0, 10**6), step=st.integers(0, 10**6))
def test_training(kind: str, rule: Rule, nesting: Nesting, seed: int, step: int) -> None:
    nested = nested_layer(kind, nesting, rule, seed=seed)
    x = random_input(nested)
    nested.adapter.draw(step, batch_size=ROWS)
    p = torch.from_numpy(rule.sample(nesting, seed, step, ROWS))
    if p.ndim == 2 and kind == "Linear-2d-input":
        with pytest.raises(MatryoshkaError, match="5 rows"):
            nested.layer(x)
        return
    assert matches(nested, p, x)
    assert not matches(nested, perturbed(p), x)
    if rule.name == "matryoshka":
        assert matches(nested, trained_p(nesting), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=2)
@given(nesting=nestings(), seed=st.integers(0, 10**6))
def test_every_rank_in_eval_mode(kind: str, form: Form, nesting: Nesting, seed: int) -> None:
    nested = layer_in_form(kind, nesting, form, seed)
    adapter = nested.adapter
    adapter.model.eval()
    x = random_input(nested)
    max_rank = nesting.max_rank
    expected_ranks = {
        "paper": nesting.ranks,
        "trained": (max_rank,),
        "reordered": tuple(range(1, max_rank + 1)),
    }
    assert adapter.ranks == expected_ranks[form]
    assert adapter.rank == max_rank
    assert matches(nested, deployed_p(nesting, max_rank, form), x)
    for rank in (0, *adapter.ranks):
        adapter.set_rank(rank)
        p = deployed_p(nesting, rank, form)
        assert matches(nested, p, x)
        assert not matches(nested, perturbed(p), x)
    # Train mode has rank R, whatever the rank of eval mode is.
    adapter.model.train()
    p = trained_p(nesting)
    if form == "reordered":
        p = deployed_p(nesting, max_rank, form)
    assert matches(nested, p, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["paper", "reordered"])
@settings(max_examples=2)
@given(nesting=nestings(), seed=st.integers(0, 10**6), data=st.data())
def test_a_rank_for_each_row(
    kind: str, training: bool, form: Form, nesting: Nesting, seed: int, data: st.DataObject
) -> None:
    nested = layer_in_form(kind, nesting, form, seed)
    adapter = nested.adapter
    adapter.model.train(training)
    any_rank = st.sampled_from((0, *adapter.ranks))
    ranks = data.draw(st.lists(any_rank, min_size=ROWS, max_size=ROWS))
    x = random_input(nested)
    if kind == "Linear-2d-input":
        with adapter.rows(ranks), pytest.raises(MatryoshkaError, match="5 rows"):
            nested.layer(x)
        return
    p = torch.stack([deployed_p(nesting, rank, form) for rank in ranks])
    with adapter.rows(ranks):
        assert matches(nested, p, x)
        assert not matches(nested, perturbed(p), x)
        if len(set(ranks)) > 1:
            assert not matches(nested, p.roll(1, dims=0), x)
    p_after = deployed_p(nesting, nesting.max_rank, form)
    if training and form == "paper":
        p_after = trained_p(nesting)
    assert matches(nested, p_after, x)


@pytest.mark.parametrize("kind", ["Linear-2d-input", "Conv1d", "Conv2d", "Conv3d"])
def test_an_input_without_rows_is_rejected(kind: str) -> None:
    """Its first dimension after A is R, which must not pass for a batch of R rows."""
    nested = nested_layer(kind, Nesting((1, 2)), deploy="paper")
    x = nested.kind.batch(1)[0]
    nested.adapter.model.eval()
    with nested.adapter.rows([1, 2]), pytest.raises(MatryoshkaError, match="2 rows"):
        nested.layer(x)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str) -> None:
    """PEFT's layers allow gradient penalties and Hessian products."""
    nested = nested_layer(kind, Nesting((1, 4)))
    x = random_input(nested)
    inputs = [*nested.factors]
    if x.requires_grad:
        inputs.append(x)
    second_derivatives = []
    for output in (nested.layer(x), nested.expected(oracle.trained_p([1, 4]), x)):
        gradients = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        second_derivatives.append(torch.autograd.grad(norm, inputs))
    assert all(map(is_close, *second_derivatives))


# In train mode a linear layer and its update may be a fused operation.


def is_fused(output: Tensor) -> bool:
    return "LowRank" in type(output.grad_fn).__name__


@pytest.mark.parametrize("kind", ["Linear", "Linear-no-bias"])
@pytest.mark.parametrize("rule", [RULES["matryoshka"], RANK_PER_ROW], ids=rule_name)
def test_the_fused_operation_equals_the_modules(kind: str, rule: Rule) -> None:
    nesting = Nesting((1, 3, 6), "sqrt", 0.8)
    nested = nested_layer(kind, nesting, rule)
    nested.adapter.draw(0, batch_size=ROWS)
    x = random_input(nested)
    assert is_fused(nested.layer(x))
    fused = output_and_gradients(nested.layer(x), nested, x)
    hook_calls: list[None] = []
    hook = nested.layer.lora_A["default"].register_forward_hook(lambda *_: hook_calls.append(None))
    unfused = output_and_gradients(nested.layer(x), nested, x)
    assert len(hook_calls) == 1  # FSDP gathers weights in such hooks
    hook.remove()
    assert all(map(is_close, fused, unfused))
    with torch.no_grad():  # TRL compares log-probabilities with gradients and without
        assert torch.equal(nested.layer(x), fused[0])
    nested.layer.set_scale("default", 0.5)
    assert matches(nested, torch.from_numpy(rule.sample(nesting, 0, 0, ROWS)) * 0.5, x)


@pytest.mark.parametrize("trainable", ["weight", "bias", "only A", "only B"])
def test_other_trainable_parameters_get_their_gradient(trainable: str) -> None:
    nested = nested_layer("Linear", Nesting((1, 4)))
    A, B = nested.factors
    base_layer = nested.layer.base_layer
    for factor in (A, B):
        factor.requires_grad_(not trainable.startswith("only"))
    parameters = {"weight": base_layer.weight, "bias": base_layer.bias, "only A": A, "only B": B}
    parameter = parameters[trainable].requires_grad_()
    x, G = nested.kind.batch(ROWS), torch.randn(ROWS, 3, 10, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(nested.layer(x), parameter, G)
    P = torch.diag(oracle.trained_p([1, 4]))
    flat_x, flat_G = x.flatten(0, 1), G.flatten(0, 1)
    expected = {
        "weight": flat_G.T @ flat_x,
        "bias": flat_G.sum(dim=0),
        "only A": P @ B.T @ flat_G.T @ flat_x,
        "only B": flat_G.T @ flat_x @ A.T @ P,
    }
    assert is_close(gradient, expected[trainable])


# Half precision.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding", "Conv2d"])
@pytest.mark.parametrize("rule", [RULES["matryoshka"], RANK_PER_ROW], ids=rule_name)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_half_precision_is_accurate_to_its_rounding(
    kind: str, dtype: torch.dtype, rule: Rule, autocast: bool
) -> None:
    nesting = Nesting((1, 2, 4), "sqrt", 0.5)
    nested = nested_layer(kind, nesting, rule, dtype=dtype)
    A, B = nested.factors
    assert A.dtype == B.dtype == torch.float32
    nested.adapter.draw(0, batch_size=ROWS)
    p = torch.from_numpy(rule.sample(nesting, 0, 0, ROWS))
    x = nested.kind.batch(ROWS)
    if x.is_floating_point():
        x = x.to(dtype)
    compute_dtype = torch.bfloat16 if autocast else dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = nested.layer(x)
        base_output = nested.layer.get_base_layer()(x)
    assert output.dtype == base_output.dtype
    assert is_fused(output) == (kind == "Linear")
    G = torch.randn_like(output)
    exact_x = x.double() if x.is_floating_point() else x
    exact_factors = [factor.detach().double().requires_grad_() for factor in (A, B)]
    exact_base = copy.deepcopy(nested.layer.get_base_layer()).double()
    exact_output = nested.kind.forward(exact_base, *exact_factors, p, exact_x)
    actual = [output, *torch.autograd.grad(output, (A, B), G)]
    exact = [exact_output, *torch.autograd.grad(exact_output, exact_factors, G.double())]
    for actual_tensor, exact_tensor in zip(actual, exact, strict=True):
        error = (actual_tensor.double() - exact_tensor).abs().max() / exact_tensor.abs().max()
        assert error < 8 * torch.finfo(compute_dtype).eps


def test_p_is_not_rounded_to_bfloat16() -> None:
    """Rounding products goes up and down; a rounded p would be off for every token."""
    nesting = Nesting((1, 2), "sqrt", 1.294)
    nested = nested_layer("Linear-2d-input", nesting, dtype=torch.bfloat16)
    p = trained_p(nesting)
    assert ((p.bfloat16().double() - p).abs() > 3e-4 * p).all()
    A, B = nested.factors
    x = torch.randn(4096, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        nested.layer.base_layer.weight.zero_()
        nested.layer.base_layer.bias.zero_()
        for column in range(2):
            A.zero_()
            B.zero_()
            A[column, 0] = B[0, column] = 1
            y, x_0 = nested.layer(x)[:, 0].double(), x[:, 0].double()
            assert float((y @ x_0) / (x_0 @ x_0)) == pytest.approx(float(p[column]), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [*RULES.values(), RANK_PER_ROW], ids=rule_name)
def test_eval_mode_at_rank_R_is_plain_peft_to_the_last_bit(
    kind: str, dtype: torch.dtype, rule: Rule
) -> None:
    nested = nested_layer(kind, Nesting((1, 3, 6), "sqrt", 0.8), rule, dtype=dtype)
    model = nested.adapter.model
    if rule.name == "matryoshka":
        nested.adapter.reorder()
    base_model = OneLayer(copy.deepcopy(nested.layer.get_base_layer()))
    plain_model = get_peft_model(base_model, copy.deepcopy(model.peft_config["default"]))
    plain_model.load_state_dict(model.state_dict())
    x = nested.kind.batch(ROWS)
    if x.is_floating_point():
        x = x.to(dtype)
    assert torch.equal(model.eval()(x), plain_model.eval()(x))
