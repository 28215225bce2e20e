"""One layer in fp64 against the formula, to 1e-12: every kind, every rule, every rank, merges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import (
    NestedLayer,
    OneLayer,
    lora_config,
    nest_as,
    nested_layer,
    randomize,
    tiny_llama,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting
from matryoshka_lora.nesting import RULES

KINDS = list(oracle.KINDS)
ROWS = 5
FORMS = ["paper", "trained", "reordered"]
"""How a rank is in eval mode: P dropped; P kept, since nothing is reordered yet; reordered."""


@st.composite
def nestings(draw: st.DrawFn) -> Nesting:
    ranks = sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=5)))
    scaling: Any = draw(st.sampled_from(["none", "rank", "sqrt"]))
    return Nesting(tuple(ranks), scaling, draw(st.floats(0.2, 4)))


def trained_p(nesting: Nesting) -> Tensor:
    return oracle.trained_p(nesting.ranks, nesting.scaling, nesting.scale)


def deployed_p(nesting: Nesting, rank: int, form: str = "trained") -> Tensor:
    """Return what stands between the factors in eval mode under rule matryoshka."""
    if form == "paper":
        return oracle.prefix_p(nesting.ranks, rank, nesting.scaling, nesting.scale)
    first = (torch.arange(nesting.max_rank) < rank).double()
    return first * (trained_p(nesting) if form == "trained" else nesting.scale)


def in_form(kind: str, nesting: Nesting, form: str, seed: int = 0) -> NestedLayer:
    deploy = "paper" if form == "paper" else "reordered"
    nested = nested_layer(kind, nesting, "matryoshka", deploy, seed)
    if form == "reordered":
        nested.adapter.reorder()
    return nested


def close(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal to 1e-12 of the largest entry."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float64
    actual, expected = actual.detach(), expected.detach()
    return bool((actual - expected).abs().max() <= 1e-12 * max(1.0, float(expected.abs().max())))


def perturbed(p: Tensor) -> Tensor:
    """Return a p that is wrong by little in a single place, for negative controls.

    It is the first: in a layer narrower than R, reordering makes the last columns zero.
    """
    wrong = p.clone()
    wrong[..., 0] = wrong[..., 0] * (1 + 1e-5) + 1e-5
    return wrong


def random_input(nested: NestedLayer, rows: int = ROWS) -> Tensor:
    x = nested.kind.batch(rows)
    return x.requires_grad_() if x.is_floating_point() else x


def with_gradients(output: Tensor, nested: NestedLayer, x: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of a random linear function of it."""
    A, B = nested.factors
    inputs = {"A": A, "B": B, **({"x": x} if x.requires_grad else {})}
    torch.manual_seed(99)
    grads = torch.autograd.grad(output, list(inputs.values()), torch.randn_like(output))
    return {"y": output.detach(), **dict(zip(inputs, grads, strict=True))}


def same(nested: NestedLayer, p: Tensor, x: Tensor, learn: int | None = None) -> bool:
    """Return whether output and gradients of the layer are those of the oracle for p.

    Args:
        nested: The layer.
        p: What stands between its factors.
        x: The input.
        learn: The only column that learns; None for all.
    """
    actual = with_gradients(nested.layer(x), nested, x)
    expected = with_gradients(nested.expected(p, x), nested, x)
    if learn is not None:
        others = torch.arange(p.shape[-1])[torch.arange(p.shape[-1]) != learn]
        for name, dimension in (("A", 0), ("B", 1)):
            assert actual[name].index_select(dimension, others).count_nonzero() == 0
            expected[name].index_fill_(dimension, others, 0)
    return all(close(actual[key], expected[key]) for key in expected)


def is_fused(output: Tensor) -> bool:
    return "LowRank" in type(output.grad_fn).__name__


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=3)
@given(nesting=nestings(), seed=st.integers(0, 10**6), step=st.integers(0, 10**6))
def test_training_is_the_formula(
    kind: str, rule: str, nesting: Nesting, seed: int, step: int
) -> None:
    nested = nested_layer(kind, nesting, rule, seed=seed)
    x = random_input(nested)
    nested.adapter.draw(step, rows=ROWS)
    p = RULES[rule].draw(nesting, seed, step, ROWS)
    if RULES[rule].per_row and kind == "Linear-2d-input":
        with pytest.raises(MatryoshkaError, match="5 rows have a rank each"):
            nested.layer(x)
        return
    learn = int(p.count_nonzero()) - 1 if RULES[rule].one_column else None
    assert same(nested, p, x, learn)
    assert not same(nested, perturbed(p), x, learn)
    if rule == "matryoshka":
        assert same(nested, trained_p(nesting), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=2)
@given(nesting=nestings(), seed=st.integers(0, 10**6))
def test_every_rank_is_the_formula(kind: str, form: str, nesting: Nesting, seed: int) -> None:
    nested = in_form(kind, nesting, form, seed)
    adapter = nested.adapter
    adapter.model.eval()
    x = random_input(nested)
    whole = nesting.max_rank
    assert adapter.rank == whole
    reordered = range(1, whole + 1)
    ranks = {"paper": nesting.ranks, "trained": [whole], "reordered": reordered}[form]
    assert adapter.ranks == tuple(ranks)
    assert same(nested, deployed_p(nesting, whole, form), x)
    for rank in (0, *ranks):
        adapter.set_rank(rank)
        p = deployed_p(nesting, rank, form) if rank else torch.zeros(whole).double()
        assert same(nested, p, x)
        assert not same(nested, perturbed(p), x)
    # The rank is that of eval mode: training goes by the rule, which is plain LoRA once reordered.
    adapter.model.train()
    p = deployed_p(nesting, whole, "reordered") if form == "reordered" else trained_p(nesting)
    assert same(nested, p, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["paper", "reordered"])
@settings(max_examples=2)
@given(nesting=nestings(), seed=st.integers(0, 10**6), data=st.data())
def test_a_rank_for_each_row_is_the_formula(
    kind: str, training: bool, form: str, nesting: Nesting, seed: int, data: st.DataObject
) -> None:
    nested = in_form(kind, nesting, form, seed)
    nested.adapter.model.train(training)
    choice = st.sampled_from((0, *nested.adapter.ranks))
    ranks = data.draw(st.lists(choice, min_size=ROWS, max_size=ROWS))
    zero = torch.zeros(nesting.max_rank).double()
    p = torch.stack([deployed_p(nesting, rank, form) if rank else zero for rank in ranks])
    x = random_input(nested)
    if kind == "Linear-2d-input":
        with nested.adapter.rows(ranks), pytest.raises(MatryoshkaError, match="5 rows have a rank"):
            nested.layer(x)
        return
    with nested.adapter.rows(ranks):
        assert same(nested, p, x)
        assert not same(nested, perturbed(p), x)
        if len(set(ranks)) > 1:
            assert not same(nested, p.roll(1, dims=0), x)
    after = nesting.max_rank
    p = trained_p(nesting) if training and form == "paper" else deployed_p(nesting, after, form)
    assert same(nested, p, x)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str) -> None:
    """PEFT's layers allow gradient penalties and Hessian products."""
    nested = nested_layer(kind, Nesting((1, 4)))
    x = random_input(nested)
    inputs = [*nested.factors, *([x] if x.requires_grad else [])]
    seconds = []
    for output in (nested.layer(x), nested.expected(oracle.trained_p([1, 4]), x)):
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        norm = torch.stack([g.square().sum() for g in first]).sum()
        seconds.append(torch.autograd.grad(norm, inputs))
    assert all(map(close, *seconds))


@pytest.mark.parametrize("kind", ["Linear-2d-input", "Conv1d", "Conv2d", "Conv3d"])
def test_an_input_without_rows_is_refused(kind: str) -> None:
    """Its first dimension after A is R, which must not pass for a batch of R rows."""
    nested = nested_layer(kind, Nesting((1, 2)), deploy="paper")
    x = nested.kind.batch(1)[0]
    nested.adapter.model.eval()
    with nested.adapter.rows([1, 2]), pytest.raises(MatryoshkaError, match="2 rows have a rank"):
        nested.layer(x)


# In training a linear layer and its update may be one operation; PEFT's own forward gives the same.


@pytest.mark.parametrize("kind", ["Linear", "Linear-no-bias"])
@pytest.mark.parametrize("rule", ["matryoshka", "stratified"])
def test_fused_and_not_fused_are_one(kind: str, rule: str) -> None:
    nesting = Nesting((1, 3, 6), "sqrt", 0.8)
    nested = nested_layer(kind, nesting, rule)
    nested.adapter.draw(0, rows=ROWS)
    x = random_input(nested)
    assert is_fused(nested.layer(x))
    fused = with_gradients(nested.layer(x), nested, x)
    seen = []
    hook = nested.layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    plain = with_gradients(nested.layer(x), nested, x)
    assert seen == [1]  # FSDP gathers weights in such hooks
    hook.remove()
    assert all(close(fused[key], plain[key]) for key in plain)
    with torch.no_grad():  # TRL compares log-probabilities with gradients and without
        assert torch.equal(nested.layer(x), fused["y"])
    nested.layer.set_scale("default", 0.5)
    assert same(nested, RULES[rule].draw(nesting, 0, 0, ROWS) * 0.5, x)


@pytest.mark.parametrize("what", ["weight", "bias", "only A", "only B"])
def test_whatever_else_is_trainable_gets_its_gradient(what: str) -> None:
    nested = nested_layer("Linear", Nesting((1, 4)))
    A, B = nested.factors
    base = nested.layer.base_layer
    for parameter in (A, B):
        parameter.requires_grad_(not what.startswith("only"))
    chosen = {"weight": base.weight, "bias": base.bias, "only A": A, "only B": B}[what]
    chosen.requires_grad_()
    x, G = nested.kind.batch(ROWS), torch.randn(ROWS, 3, 10, dtype=torch.float64)
    (actual,) = torch.autograd.grad(nested.layer(x), chosen, G)
    D = torch.diag(oracle.trained_p([1, 4]))
    flat_x, flat_G = x.flatten(0, 1), G.flatten(0, 1)
    expected = {
        "weight": flat_G.T @ flat_x,
        "bias": flat_G.sum(dim=0),
        "only A": D @ B.T @ flat_G.T @ flat_x,
        "only B": flat_G.T @ flat_x @ A.T @ D,
    }[what]
    assert close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding", "Conv2d"])
@pytest.mark.parametrize("rule", ["matryoshka", "stratified"])
def test_a_half_precision_base_agrees_to_its_rounding(
    kind: str, dtype: torch.dtype, rule: str
) -> None:
    nesting = Nesting((1, 2, 4), "sqrt", 0.5)
    nested = nested_layer(kind, nesting, rule, dtype=dtype)
    A, B = nested.factors
    assert A.dtype == B.dtype == torch.float32
    nested.adapter.draw(0, rows=ROWS)
    p = RULES[rule].draw(nesting, 0, 0, ROWS)
    x = nested.kind.batch(ROWS)
    x = x.to(dtype) if x.is_floating_point() else x
    output = nested.layer(x)
    assert output.dtype == dtype
    G = torch.randn_like(output)
    exact_x = x.double() if x.is_floating_point() else x
    factors = [factor.detach().double().requires_grad_() for factor in (A, B)]
    base = copy.deepcopy(nested.layer.get_base_layer()).double()
    exact = nested.kind.forward(base, *factors, p, exact_x)
    ours = [output, *torch.autograd.grad(output, (A, B), G)]
    theirs = [exact, *torch.autograd.grad(exact, factors, G.double())]
    for actual, expected in zip(ours, theirs, strict=True):
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error < 8 * torch.finfo(dtype).eps


def test_p_is_not_rounded_to_the_precision_of_the_base() -> None:
    """bf16 rounds each product one way or the other; a rounded p would be off for every token."""
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


# Eval mode at R is plain PEFT; reordering; merging.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["matryoshka", "lora", "stratified"])
def test_eval_at_full_rank_is_plain_peft_to_the_last_bit(
    kind: str, dtype: torch.dtype, rule: str
) -> None:
    nested = nested_layer(kind, Nesting((1, 3, 6), "sqrt", 0.8), rule, dtype=dtype)
    if rule == "matryoshka":
        nested.adapter.reorder()
    base = OneLayer(copy.deepcopy(nested.layer.get_base_layer()))
    plain = get_peft_model(base, copy.deepcopy(nested.adapter.model.peft_config["default"]))
    plain.load_state_dict(nested.adapter.model.state_dict())
    x = nested.kind.batch(ROWS)
    x = x.to(dtype) if x.is_floating_point() else x
    assert torch.equal(nested.adapter.model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ranks", [(1, 2, 6), (2, 16)], ids=str)  # layers are 10 to 12 wide
def test_reordering_keeps_the_function_and_makes_every_rank_the_best(
    kind: str, rule: str, ranks: tuple[int, ...]
) -> None:
    nesting = Nesting(ranks, "sqrt", 0.8)
    nested = nested_layer(kind, nesting, rule)
    A, B = (factor.detach().flatten(1).clone() for factor in nested.factors)
    whole = deployed_p(nesting, nesting.max_rank, "reordered")
    delta = B @ torch.diag(trained_p(nesting) if rule == "matryoshka" else whole) @ A
    values = nested.adapter.reorder()
    best = oracle.best_errors(delta)
    A, B = (factor.detach().flatten(1) for factor in nested.factors)
    for rank in range(nesting.max_rank + 1):
        error = float((delta - nesting.scale * B[:, :rank] @ A[:rank]).norm())
        expected = float(best[rank]) if rank < len(best) else 0.0
        assert error == pytest.approx(expected, abs=1e-7 * float(delta.norm()))
    squares = values["layer"].square().flip(0).cumsum(0).flip(0).sqrt()
    torch.testing.assert_close(squares[: len(best) - 1], best[:-1][: len(squares)])
    # Training goes on as plain LoRA, in every column.
    x = random_input(nested)
    assert same(nested, whole, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("safe", [True, False])
def test_merging_takes_each_rank_in_turn(kind: str, form: str, safe: bool) -> None:
    nested = in_form(kind, Nesting((1, 3, 6), "rank", 0.7), form)
    adapter, layer = nested.adapter, nested.layer
    adapter.model.eval()
    x = nested.kind.batch(ROWS)
    before = layer.base_layer.weight.detach().clone()
    for rank in {"paper": (1, 6, 3), "trained": (6,), "reordered": (1, 5, 6)}[form]:
        adapter.set_rank(rank)
        masked = layer(x)
        adapter.model.merge_adapter(safe_merge=safe)
        p = deployed_p(adapter.nesting, rank, form)
        delta = nested.kind.delta(layer.base_layer, *nested.factors, p)
        assert close(layer.base_layer.weight, before + delta)
        assert close(layer(x), masked)
        for refused in (lambda: adapter.set_rank(6), adapter.reorder, adapter.rows([1]).__enter__):
            with pytest.raises(MatryoshkaError, match=r"merged: unmerge it|not available"):
                refused()
        adapter.model.unmerge_adapter()
        assert close(layer.base_layer.weight, before)
        assert close(layer(x), masked)
    adapter.set_rank(6)
    full = layer(x)
    assert close(adapter.model.merge_and_unload()(x), full)


@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv2d"])
@pytest.mark.parametrize("training", [False, True])
def test_pefts_scaling_functions_keep_their_effect(kind: str, training: bool) -> None:
    nesting = Nesting((1, 3, 6), "sqrt", 0.8)
    nested = nested_layer(kind, nesting)
    nested.adapter.model.train(training)
    layer, x, p = nested.layer, random_input(nested), trained_p(nesting)
    layer.set_scale("default", 0.5)
    assert same(nested, p * 0.5, x)
    if kind != "Embedding":  # PEFT's embeddings ignore the others
        layer.scale_layer(3.0)
        assert same(nested, p * 1.5, x)
        layer.unscale_layer(None)
        assert same(nested, p, x)
    layer.set_scale("default", 1.0)
    with rescale_adapter_scale(nested.adapter.model, multiplier=0.25):
        assert same(nested, p * 0.25, x)
        nested.adapter.model.merge_adapter()
        delta = nested.kind.delta(layer.base_layer, *nested.factors, p * 0.25)
        merged = layer.base_layer.weight.detach().clone()
        nested.adapter.model.unmerge_adapter()
        assert close(merged, layer.base_layer.weight + delta)
    assert same(nested, p, x)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_mixed_adapters(kind: str) -> None:
    """Nested, plain and base rows in one batch, at a rank below R."""
    nested = in_form(kind, Nesting((1, 3, 6), "sqrt", 0.8), "reordered")
    model = nested.adapter.model
    model.add_adapter("plain", model.peft_config["default"])
    randomize(model, seed=4)
    nested.adapter.reorder()
    nested.adapter.set_rank(2)
    model.eval()
    x = nested.kind.batch(4)
    found = nested.layer(x, adapter_names=["default", "__base__", "plain", "default"])
    expected = nested.expected(deployed_p(nested.adapter.nesting, 2, "reordered"), x)
    assert close(found[[0, 3]], expected[[0, 3]])
    assert close(found[1], nested.layer.base_layer(x)[1])
    model.set_adapter("plain")
    assert close(found[2], nested.layer(x)[2])


# Quantised layers.


def nested_quantized(folder: Path, bits: int, nesting: Nesting) -> NestedAdapter:
    tiny_llama(num_hidden_layers=1, intermediate_size=128).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    options = {"quantization_config": config, "dtype": torch.float32, "device_map": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(folder, **options)
    model = get_peft_model(base, lora_config(nesting))
    adapter = nest_as(model, nesting, deploy="paper")
    randomize(model)
    return adapter


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:Merge lora", "ignore:Unmerge lora")
def test_quantized_layers(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    nesting = Nesting((1, 2, 6), "sqrt", 1.25)
    adapter = nested_quantized(tmp_path, bits, nesting)
    adapter.model.train()  # in eval mode bitsandbytes packs 4-bit weights for the CPU
    layer: Any = adapter.model.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == ("Linear4bit" if bits == 4 else "Linear8bitLt")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.manual_seed(0)
    x, G = torch.randn(3, 4, 64), torch.randn(3, 4, 128)
    p = trained_p(nesting).float()
    layer(x).backward(G)
    expected = torch.einsum("r,or,bto,bti->ri", p, B, G, x)
    torch.testing.assert_close(A.grad, expected.detach(), rtol=1e-4, atol=1e-4)

    def update(p: Tensor) -> Tensor:
        return (x.double() @ A.double().T * p @ B.double().T).float()

    with torch.no_grad():
        base = layer.base_layer(x)
        torch.testing.assert_close(layer(x) - base, update(p), rtol=1e-4, atol=1e-4)
        adapter.set_rank(2)
        adapter.model.train()
        low = deployed_p(nesting, 2, "paper")
        layer.merge()
        error = (layer.base_layer(x) - base - update(low)).norm()
        assert error < 0.2 * (base + update(low)).norm()
        assert update(low).norm() > 0.5 * base.norm()
        layer.unmerge()
        assert (layer.base_layer(x) - base).norm() < 0.3 * base.norm()
        adapter.model.eval()
        base = layer.base_layer(x)
        for rank in nesting.ranks:
            adapter.set_rank(rank)
            expected = update(deployed_p(nesting, rank, "paper"))
            torch.testing.assert_close(layer(x) - base, expected, rtol=1e-4, atol=1e-4)
        with adapter.rows([6, 1, 2]):
            rows = torch.stack([deployed_p(nesting, rank, "paper") for rank in (6, 1, 2)])
            found = layer(x) - base
        torch.testing.assert_close(found, update(rows[:, None]), rtol=1e-4, atol=1e-4)
