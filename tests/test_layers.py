"""One layer in fp64 against the formula: every kind, every rule, every rank; then slices, merges, quantised and MoE."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.utils.checkpoint
from conftest import NestedLayer, OneLayer, lora_config, nest_as, nested_layer, randomize, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting
from matryoshka_lora.rules import RULES

KINDS = list(oracle.KINDS)
ROWS = 5
RULE_NAMES = list(RULES)


@st.composite
def nestings(draw: st.DrawFn, max_rank: int = 12) -> Nesting:
    ranks = sorted(draw(st.sets(st.integers(1, max_rank), min_size=1, max_size=5)))
    scaling: Any = draw(st.sampled_from(["none", "rank", "sqrt"]))
    return Nesting(ranks, scaling, draw(st.floats(0.2, 4)))


def named(nesting: Nesting) -> tuple[Any, str, float]:
    """What the oracle takes."""
    return nesting.ranks, nesting.scaling, nesting.scale


def deployed_p(nesting: Nesting, rank: int, deploy: str) -> Tensor:
    """Of factors that were not reordered."""
    ranks, scaling, scale = named(nesting)
    return (oracle.prefix_p if deploy == "paper" else oracle.kept_p)(ranks, rank, scaling, scale)


def reordered_p(nesting: Nesting, rank: int) -> Tensor:
    """Of reordered factors: the scale of R on the first entries."""
    return nesting.scale * (torch.arange(nesting.max_rank) < rank).double()


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal to 1e-12 of the largest entry."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float64
    actual, expected = actual.detach(), expected.detach()
    return bool((actual - expected).abs().max() <= 1e-12 * max(1.0, float(expected.abs().max())))


def perturbed(p: Tensor) -> Tensor:
    """A p that is wrong by little in a single place, for negative controls."""
    wrong = p.clone()
    wrong[..., -1] = wrong[..., -1] * (1 + 1e-5) + 1e-5
    return wrong


def random_input(nested: NestedLayer, rows: int = ROWS) -> Tensor:
    x = nested.kind.batch(rows)
    return x.requires_grad_() if x.is_floating_point() else x


def with_gradients(output: Tensor, nested: NestedLayer, x: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of a random linear function of it."""
    A, B = nested.factors
    inputs = {"A": A, "B": B, **({"x": x} if x.requires_grad else {})}
    torch.manual_seed(99)
    grads = torch.autograd.grad(output, list(inputs.values()), torch.randn_like(output))
    return {"y": output.detach(), **dict(zip(inputs, grads, strict=True))}


def same(nested: NestedLayer, p: Tensor, x: Tensor, learn: Tensor | None = None) -> bool:
    """Whether output and gradients of the layer are those of the oracle for p."""
    actual = with_gradients(nested.layer(x), nested, x)
    expected = with_gradients(nested.expected(p, x), nested, x)
    if learn is not None:
        R = len(learn)
        expected["A"] = expected["A"] * learn.view(R, *(1,) * (expected["A"].ndim - 1))
        expected["B"] = expected["B"] * learn.view(1, R, *(1,) * (expected["B"].ndim - 2))
    return all(close(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULE_NAMES)
@settings(max_examples=8)
@given(nesting=nestings(), seed=st.integers(0, 10**6), step=st.integers(0, 10**6))
def test_training_equals_the_formula(kind: str, rule: str, nesting: Nesting, seed: int, step: int) -> None:
    nested = nested_layer(kind, nesting, rule, seed=seed)
    nested.adapter.draw(step, rows=ROWS)
    drawn = RULES[rule].draw(nesting, seed, step, ROWS)
    x = random_input(nested)
    assert same(nested, drawn.diagonal, x, drawn.learn)
    assert not same(nested, perturbed(drawn.diagonal), x, drawn.learn)
    if rule == "matryoshka":
        assert same(nested, oracle.trained_p(*named(nesting)), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deploy", ["paper", "reordered"])
@settings(max_examples=5)
@given(nesting=nestings(), seed=st.integers(0, 10**6))
def test_every_deployed_rank_equals_the_formula(kind: str, deploy: Any, nesting: Nesting, seed: int) -> None:
    nested = nested_layer(kind, nesting, "matryoshka", deploy, seed)
    nested.adapter.model.eval()
    x = random_input(nested)
    assert nested.adapter.rank == nesting.max_rank
    for rank in (None, *nesting.ranks, nesting.ranks[0]):
        if rank is not None:
            nested.adapter.set_rank(rank)
        p = deployed_p(nesting, rank or nesting.max_rank, deploy)
        assert same(nested, p, x)
        assert not same(nested, perturbed(p), x)
    # The rank is that of eval mode: training goes by the rule.
    nested.adapter.model.train()
    assert same(nested, oracle.trained_p(*named(nesting)), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
@settings(max_examples=4)
@given(nesting=nestings(), seed=st.integers(0, 10**6), deploy=st.sampled_from(["paper", "reordered"]), data=st.data())
def test_a_rank_per_row_equals_the_formula(
    kind: str, training: bool, nesting: Nesting, seed: int, deploy: Any, data: st.DataObject
) -> None:
    nested = nested_layer(kind, nesting, "matryoshka", deploy, seed)
    nested.adapter.model.train(training)
    ranks = data.draw(st.lists(st.sampled_from(nesting.ranks), min_size=ROWS, max_size=ROWS))
    p = torch.stack([deployed_p(nesting, rank, deploy) for rank in ranks])
    x = random_input(nested)
    with nested.adapter.rows(ranks):
        assert same(nested, p, x)
        assert not same(nested, perturbed(p), x)
        if len(set(ranks)) > 1:
            assert not same(nested, p.roll(1, dims=0), x)
    after = oracle.trained_p(*named(nesting)) if training else deployed_p(nesting, nesting.max_rank, deploy)
    assert same(nested, after, x)


def test_gradients_by_hand() -> None:
    """``dA = diag(p) B^T G x^T`` and ``dB = G x^T A^T diag(p)``."""
    nesting = Nesting([1, 3, 4], "sqrt", 0.8)
    nested = nested_layer("Linear-2d-input", nesting)
    A, B = nested.factors
    x, G = nested.kind.batch(ROWS), torch.randn(ROWS, 10, dtype=torch.float64)
    nested.layer(x).backward(G)
    D = torch.diag(oracle.trained_p(*named(nesting)))
    assert A.grad is not None
    assert B.grad is not None
    assert close(A.grad, D @ B.T @ G.T @ x)
    assert close(B.grad, G.T @ x @ A.T @ D)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding", "Conv2d"])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradcheck(kind: str, per_row: bool) -> None:
    nested = nested_layer(kind, Nesting([1, 2, 3], "rank", 0.7))
    names = [name for name, parameter in nested.layer.named_parameters() if parameter.requires_grad]
    factors = [dict(nested.layer.named_parameters())[name].detach().clone().requires_grad_() for name in names]
    x = random_input(nested, 3)

    def function(x: Tensor, *factors: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(nested.layer, dict(zip(names, factors, strict=True)), (x,))
        return output

    assert len(names) == 2
    if per_row:
        with nested.adapter.rows([2, 3, 1]):
            assert torch.autograd.gradcheck(function, (x, *factors))
    else:
        assert torch.autograd.gradcheck(function, (x, *factors))


# In training a linear layer and its update may be one operation; PEFT's own forward must give the same.

LINEAR = ["Linear", "Linear-no-bias", "Linear-2d-input"]


def is_fused(output: Tensor) -> bool:
    return "LowRank" in type(output.grad_fn).__name__


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("per_row", [False, True])
def test_fused_and_not_fused_are_one(kind: str, per_row: bool) -> None:
    nesting = Nesting([1, 3, 6], "sqrt", 0.8)
    nested = nested_layer(kind, nesting, "stratified" if per_row else "matryoshka")
    nested.adapter.draw(0, rows=ROWS)
    x = random_input(nested)
    assert is_fused(nested.layer(x))
    fused = with_gradients(nested.layer(x), nested, x)
    seen = []
    hook = nested.layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    plain = with_gradients(nested.layer(x), nested, x)
    assert seen == [1]  # hooks of the factors are called, as FSDP's must be
    hook.remove()
    assert all(close(fused[key], plain[key]) for key in plain)
    with torch.no_grad():
        assert close(nested.layer(x), fused["y"])
    nested.layer.set_scale("default", 0.5)
    assert is_fused(nested.layer(x))
    p = RULES["stratified" if per_row else "matryoshka"].draw(nesting, 0, 0, ROWS).diagonal
    assert same(nested, p * 0.5, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_passes(kind: str, training: bool) -> None:
    """A list of experts gives an empty one to an expert that no token is routed to."""
    nested = nested_layer(kind, Nesting([1, 4]))
    nested.adapter.model.train(training)
    x = nested.kind.batch(1)[:0]
    output = nested.layer(x)
    assert output.shape == nested.layer.base_layer(x).shape
    output.sum().backward()
    assert all(factor.grad is not None and factor.grad.count_nonzero() == 0 for factor in nested.factors)


@pytest.mark.parametrize("kind", LINEAR)
def test_unusual_strides_and_gradients(kind: str) -> None:
    nested = nested_layer(kind, Nesting([1, 4]))
    p = oracle.trained_p([1, 4])
    wide = torch.randn(*nested.kind.batch(ROWS).shape, 2, dtype=torch.float64)
    x = wide[..., 0].requires_grad_()
    assert not x.is_contiguous()
    assert same(nested, p, x)
    # A gradient of stride 0.
    ours = torch.autograd.grad(nested.layer(x).sum(), [x, *nested.factors])
    theirs = torch.autograd.grad(nested.expected(p, x).sum(), [x, *nested.factors])
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str) -> None:
    """Gradient penalties and Hessian products, which PEFT's layers allow."""
    nested = nested_layer(kind, Nesting([1, 4]))
    x = random_input(nested)
    inputs = [*nested.factors, *([x] if x.requires_grad else [])]
    seconds = []
    for output in (nested.layer(x), nested.expected(oracle.trained_p([1, 4]), x)):
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), inputs))
    assert all(close(a, b) for a, b in zip(*seconds, strict=True))


@pytest.mark.parametrize("what", ["weight", "bias", "only A", "only B"])
def test_whatever_else_is_trainable_gets_its_gradient(what: str) -> None:
    nested = nested_layer("Linear", Nesting([1, 4]))
    A, B = nested.factors
    base = nested.layer.base_layer
    trained = {"weight": base.weight, "bias": base.bias, "only A": A, "only B": B}[what]
    if what.startswith("only"):
        A.requires_grad_(what == "only A")
        B.requires_grad_(what == "only B")
    trained.requires_grad_()
    x, G = nested.kind.batch(ROWS), torch.randn(ROWS, 3, 10, dtype=torch.float64)
    (actual,) = torch.autograd.grad(nested.layer(x), trained, G)
    D = torch.diag(oracle.trained_p([1, 4]))
    flat_x, flat_G = x.flatten(0, 1), G.flatten(0, 1)
    expected = {
        "weight": flat_G.T @ flat_x,
        "bias": flat_G.sum(dim=0),
        "only A": D @ B.T @ flat_G.T @ flat_x,
        "only B": flat_G.T @ flat_x @ A.T @ D,
    }[what]
    assert close(actual, expected)


@pytest.mark.parametrize("training", [True, False])
def test_vmap_over_a_layer(training: bool) -> None:
    nested = nested_layer("Linear", Nesting([1, 4]))
    nested.adapter.model.train(training)
    x = nested.kind.batch(ROWS)
    assert close(torch.vmap(nested.layer)(x), nested.layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding", "Conv2d"])
@pytest.mark.parametrize("rule", ["matryoshka", "stratified"])
def test_training_on_a_half_precision_base_agrees_to_its_rounding(kind: str, dtype: torch.dtype, rule: str) -> None:
    nesting = Nesting([1, 2, 4], "sqrt", 0.5)
    nested = nested_layer(kind, nesting, rule, dtype=dtype)
    A, B = nested.factors
    assert A.dtype == B.dtype == torch.float32
    nested.adapter.draw(0, rows=ROWS)
    p = RULES[rule].draw(nesting, 0, 0, ROWS).diagonal
    x = nested.kind.batch(ROWS)
    x = x.to(dtype) if x.is_floating_point() else x
    output = nested.layer(x)
    assert output.dtype == dtype
    G = torch.randn_like(output)
    exact_x = x.double() if x.is_floating_point() else x
    exact_A, exact_B = (factor.detach().double().requires_grad_() for factor in (A, B))
    base = copy.deepcopy(nested.layer.get_base_layer()).double()
    exact = nested.kind.forward(base, exact_A, exact_B, p, exact_x)
    ours = [output, *torch.autograd.grad(output, (A, B), G)]
    theirs = [exact, *torch.autograd.grad(exact, (exact_A, exact_B), G.double())]
    assert ours[1].dtype == ours[2].dtype == torch.float32
    for actual, expected in zip(ours, theirs, strict=True):
        assert (actual.double() - expected).abs().max() < 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_p_is_not_rounded_to_the_precision_of_the_base() -> None:
    """In bf16 each product rounds, one way or the other; a rounded p would be off by the same for every token."""
    nesting = Nesting([1, 2], "sqrt", 1.294)
    nested = nested_layer("Linear", nesting, dtype=torch.bfloat16)
    p = oracle.trained_p(*named(nesting))
    assert ((p.bfloat16().double() - p).abs() > 3e-4 * p).all()
    A, B = nested.factors
    with torch.no_grad():
        nested.layer.base_layer.weight.zero_()
        nested.layer.base_layer.bias.zero_()
        for column in range(2):
            A.zero_()
            B.zero_()
            A[column, 0] = B[0, column] = 1
            x = torch.randn(4096, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
            with torch.enable_grad():
                output = nested.layer(x)
            assert is_fused(output)
            y, x_0 = output[:, 0].double(), x[:, 0].double()
            assert float((y @ x_0) / (x_0 @ x_0)) == pytest.approx(float(p[column]), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_columns_receive_exactly_nothing(kind: str) -> None:
    nesting = Nesting([2, 6])
    nested = nested_layer(kind, nesting, "dylora-frozen")
    x = random_input(nested)
    seen = set()
    for step in range(12):
        nested.adapter.draw(step)
        drawn = RULES["dylora-frozen"].draw(nesting, 0, step)
        b = int(drawn.diagonal.count_nonzero())
        seen.add(b)
        grads = with_gradients(nested.layer(x), nested, x)
        dA, dB = grads["A"].flatten(1), grads["B"].flatten(1)
        others = [i for i in range(6) if i != b - 1]
        assert dA[others].count_nonzero() == 0
        assert dB[:, others].count_nonzero() == 0
        assert dA[b - 1].abs().max() > 1e-3
        assert dB[:, b - 1].abs().max() > 1e-3
        if "x" in grads:  # the input's gradient passes through all b columns
            free = with_gradients(nested.expected(drawn.diagonal, x), nested, x)
            assert close(grads["x"], free["x"])
    assert len(seen) > 2


def test_one_optimizer_step_moves_only_the_drawn_column() -> None:
    nested = nested_layer("Linear", Nesting([1, 4]), "dylora-frozen")
    A, B = nested.factors
    before = A.detach().clone(), B.detach().clone()
    nested.adapter.draw(3)
    b = int(RULES["dylora-frozen"].draw(Nesting([1, 4]), 0, 3).diagonal.count_nonzero())
    nested.layer(nested.kind.batch(2)).square().sum().backward()
    torch.optim.SGD([A, B], lr=0.1).step()
    assert (before[0] != A).any(dim=1).nonzero().flatten().tolist() == [b - 1]
    assert (before[1] != B).any(dim=0).nonzero().flatten().tolist() == [b - 1]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(
    nesting=nestings(),
    seed=st.integers(0, 10**6),
    deploy=st.sampled_from(["paper", "reordered"]),
    safe=st.booleans(),
    data=st.data(),
)
def test_slice_mask_export_and_merge_are_one(
    kind: str, nesting: Nesting, seed: int, deploy: Any, safe: bool, data: st.DataObject
) -> None:
    nested = nested_layer(kind, nesting, "matryoshka", deploy, seed)
    adapter, layer = nested.adapter, nested.layer
    base = copy.deepcopy(layer.get_base_layer())
    if deploy == "reordered":
        adapter.reorder()
    rank = data.draw(st.sampled_from(adapter.ranks))
    x = nested.kind.batch(ROWS)
    adapter.model.eval()
    adapter.set_rank(rank)
    with torch.no_grad():
        masked = layer(x)
        A, B = nested.factors
        p = deployed_p(nesting, rank, "paper") if deploy == "paper" else reordered_p(nesting, rank)
        sliced = nested.kind.forward(base, A[:rank], B[:, :rank], p[:rank], x)
        assert close(masked, sliced)

        with tempfile.TemporaryDirectory() as folder:
            adapter.export(folder, rank)
            plain = PeftModel.from_pretrained(OneLayer(copy.deepcopy(base)), folder).eval()
        exported = plain.base_model.model.layer
        assert type(exported).__module__.startswith("peft.")
        assert exported.r["default"] == rank
        assert exported.lora_variant == {}
        assert close(exported(x), masked)

        adapter.merge(rank) if not safe else adapter.model.merge_adapter(safe_merge=True)
        assert close(layer.base_layer(x), masked)
        assert close(layer(x), masked)
        assert close(layer.base_layer.weight, base.weight + nested.kind.delta(base, A, B, p))
        adapter.unmerge()
        assert close(layer.base_layer.weight, base.weight)
        assert close(layer(x), masked)
        assert not close(layer.base_layer(x), masked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=5)
@given(nesting=nestings(), seed=st.integers(0, 10**6))
def test_full_rank_is_plain_peft_to_the_last_bit(kind: str, dtype: torch.dtype, nesting: Nesting, seed: int) -> None:
    """Eval mode with no rank chosen, and the exported slice, are what PEFT alone computes."""
    nested = nested_layer(kind, nesting, seed=seed, dtype=dtype)
    base = copy.deepcopy(nested.layer.get_base_layer())
    plain: Any = get_peft_model(OneLayer(base), copy.deepcopy(nested.adapter.model.peft_config["default"]))
    plain.load_state_dict(nested.adapter.model.state_dict())
    x = nested.kind.batch(ROWS)
    x = x.to(dtype) if x.is_floating_point() else x
    nested.adapter.model.eval()
    assert torch.equal(nested.layer(x), plain.eval().base_model.model.layer(x))
    with tempfile.TemporaryDirectory() as folder:
        nested.adapter.export(folder, nesting.max_rank)
        exported: Any = PeftModel.from_pretrained(OneLayer(copy.deepcopy(base)), folder).eval()
    assert torch.equal(exported.base_model.model.layer(x), nested.layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*was not reordered after training")
def test_a_rank_of_factors_that_were_never_reordered_is_exported_as_the_best_of_its_rank(kind: str) -> None:
    nesting = Nesting([1, 3, 6], "sqrt", 0.8)
    nested = nested_layer(kind, nesting, deploy="reordered")
    base = copy.deepcopy(nested.layer.get_base_layer())
    A, B = (factor.detach().clone() for factor in nested.factors)
    trained = nested.kind.delta(base, A, B, oracle.trained_p(*named(nesting)))
    errors = oracle.best_errors(trained.flatten(1))
    for rank in (1, 2, 3, 6):  # any, since the copy is reordered
        with tempfile.TemporaryDirectory() as folder:
            nested.adapter.export(folder, rank)
            plain: Any = PeftModel.from_pretrained(OneLayer(copy.deepcopy(base)), folder)
        found = plain.base_model.model.layer.get_delta_weight("default")
        assert torch.linalg.matrix_rank(found.flatten(1)) <= rank
        assert float((found - trained).norm()) == pytest.approx(float(errors[rank]), rel=1e-9, abs=1e-12)
    assert all(map(torch.equal, nested.factors, (A, B)))
    x = random_input(nested)
    assert same(nested, oracle.trained_p(*named(nesting)), x)  # training goes on as it was


@pytest.mark.parametrize("kind", KINDS)
def test_merge_takes_each_rank_in_turn(kind: str) -> None:
    nesting = Nesting([1, 3, 6], "rank", 0.7)
    nested = nested_layer(kind, nesting, deploy="reordered")
    adapter, layer = nested.adapter, nested.layer
    before = layer.base_layer.weight.detach().clone()
    for rank in (1, 6, 3):
        adapter.merge(rank)  # in training mode too, merging is of the deployed rank
        delta = nested.kind.delta(layer.base_layer, *nested.factors, deployed_p(nesting, rank, "reordered"))
        assert close(layer.base_layer.weight.detach(), before + delta.detach())
        adapter.unmerge()
        assert close(layer.base_layer.weight.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding", "Conv2d"])
def test_half_precision_bases_agree_to_their_rounding(kind: str, dtype: torch.dtype) -> None:
    """Adapters in fp32, as PEFT makes them, on a base of another dtype."""
    nesting = Nesting([1, 2, 4], "sqrt", 0.5)
    nested = nested_layer(kind, nesting, dtype=dtype)
    A, B = nested.factors
    assert A.dtype == B.dtype == torch.float32
    adapter = nested.adapter
    adapter.model.eval()
    x = nested.kind.batch(ROWS)
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        for rank in nesting.ranks:
            adapter.set_rank(rank)
            p = deployed_p(nesting, rank, "paper")
            base = copy.deepcopy(nested.layer.get_base_layer()).double()
            exact = nested.kind.forward(base, A.double(), B.double(), p, x.double() if x.is_floating_point() else x)
            size = torch.finfo(dtype).eps * exact.abs().max()
            output = nested.layer(x)
            assert output.dtype == dtype
            assert (output.double() - exact).abs().max() < 4 * size
            adapter.merge(rank)
            assert (nested.layer(x).double() - exact).abs().max() < 16 * size
            adapter.unmerge()


# Quantised layers.


def quantized_llama(folder: Path, bits: int) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    tiny_llama(num_hidden_layers=1, intermediate_size=128).save_pretrained(folder)
    options: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    model: nn.Module = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32, device_map="cpu"
    )
    return model


def nested_quantized(folder: Path, bits: int, nesting: Nesting, deploy: Any, training: bool) -> NestedAdapter:
    model = get_peft_model(quantized_llama(folder, bits), lora_config(nesting))
    randomize(model, size=0.1)
    model.train(training)
    return nest_as(model, nesting, deploy=deploy)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("deploy", ["paper", "reordered"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_quantized_layers_compute_the_formula(bits: int, deploy: Any, tmp_path: Path) -> None:
    nesting = Nesting([1, 2, 6], "sqrt", 1.25)
    adapter = nested_quantized(tmp_path / "base", bits, nesting, deploy, training=False)
    model: Any = adapter.model
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == ("Linear4bit" if bits == 4 else "Linear8bitLt")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.manual_seed(0)
    x, ids = torch.randn(3, 4, 64), torch.randint(3, 96, (3, 8))

    def check(p: Tensor) -> None:
        expected = (x.double() @ A.double().T * p @ B.double().T).float()
        torch.testing.assert_close(layer(x) - layer.base_layer(x), expected, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        for rank in nesting.ranks:
            adapter.set_rank(rank)
            check(deployed_p(nesting, rank, deploy))
        with adapter.rows([6, 1, 2]):
            check(torch.stack([deployed_p(nesting, rank, deploy) for rank in (6, 1, 2)])[:, None])
        model.train()
        check(oracle.trained_p(*named(nesting)))
        model.eval()

        if deploy == "reordered":
            adapter.reorder()
        adapter.export(tmp_path / "slice", 2)
        plain = PeftModel.from_pretrained(quantized_llama(tmp_path / "base", bits), tmp_path / "slice").eval()
        adapter.set_rank(2)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)
        adapter.set_rank(6)
        assert (model(ids).logits - plain(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_train(bits: int, tmp_path: Path) -> None:
    nesting = Nesting([1, 2, 6], "sqrt", 1.25)
    adapter = nested_quantized(tmp_path, bits, nesting, "paper", training=True)
    layer: Any = adapter.model.base_model.model.model.layers[0].mlp.up_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, G = torch.randn(3, 4, 64), torch.randn(3, 4, 128)
    layer(x).backward(G)
    p = oracle.trained_p(*named(nesting)).float()
    expected_A = torch.einsum("r,or,bto,bti->ri", p, B, G, x)
    expected_B = torch.einsum("bto,bti,ri,r->or", G, x, A, p)
    torch.testing.assert_close(A.grad, expected_A.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(B.grad, expected_B.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("after", ["training-nest", "nest", "forward"])
@pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module", "ignore:MatMul8bitLt")
def test_quantized_layers_merge_to_their_rounding_or_not_at_all(bits: int, after: str, tmp_path: Path) -> None:
    """After a forward in eval mode bitsandbytes packs 4-bit weights for the CPU, and dequantises them wrongly."""
    nesting = Nesting([1, 2, 6], "sqrt", 1.25)
    adapter = nested_quantized(tmp_path, bits, nesting, "reordered", training=after == "training-nest")
    model: Any = adapter.model.eval()
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    exact = dict(tiny_llama(num_hidden_layers=1, intermediate_size=128).named_modules())
    names = {id(m): name.removeprefix("base_model.model.") for name, m in model.named_modules()}
    if after == "forward":
        with torch.no_grad():
            model(torch.randint(3, 96, (2, 5)))

    def computed(layer: Any) -> Tensor:
        """What the base layer multiplies by; in training mode, as that packs nothing."""
        layer.base_layer.train()
        with torch.no_grad():
            weight: Tensor = layer.base_layer(torch.eye(layer.in_features)).T
        layer.base_layer.eval()
        return weight

    try:
        adapter.merge(2)
    except MatryoshkaError:
        merged = False
    else:
        merged = True
    assert adapter.rank == (2 if merged else 6)
    for layer in layers:
        A, B = (getattr(layer, f"lora_{f}")["default"].weight.detach() for f in "AB")
        weight = exact[names[id(layer)]].weight.detach()
        delta = (B * oracle.kept_p([1, 2, 6], 2, "sqrt", 1.25).float()) @ A
        assert delta.norm() > 0.2 * weight.norm()
        target = weight + delta if merged else weight
        assert (computed(layer) - target).norm() < 0.18 * target.norm()
    if merged:
        adapter.unmerge()
        for layer in layers:
            weight = exact[names[id(layer)]].weight.detach()
            assert (computed(layer) - weight).norm() < 0.3 * weight.norm()


@pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module")
def test_a_forward_between_merge_and_unmerge_spoils_no_4_bit_weight(tmp_path: Path) -> None:
    adapter = nested_quantized(tmp_path, 4, Nesting([1, 2]), "paper", training=True)
    model: Any = adapter.model.eval()
    ids = torch.randint(3, 96, (2, 5))
    adapter.merge(1)
    with torch.no_grad():
        merged = model(ids).logits
        try:
            adapter.unmerge()
        except MatryoshkaError:
            assert torch.equal(model(ids).logits, merged)
        else:
            adapter.set_rank(1)
            assert (model(ids).logits - merged).norm() < 0.5 * merged.norm()


# Experts: LoRA on bare parameters.


def moe(layout: str) -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    if layout == "out-in":
        config = Qwen3MoeConfig(**common, moe_intermediate_size=12, num_experts=3)
        model = Qwen3MoeForCausalLM(config)
    else:
        model = GptOssForCausalLM(GptOssConfig(**common, num_local_experts=3))
        for name, parameter in model.named_parameters():  # some of its parameters are created without values
            if "experts" in name or "sinks" in name:
                nn.init.normal_(parameter, std=0.2)
    model.set_experts_implementation("eager")
    double: nn.Module = model.double().eval()
    return double


EXPERTS = ["gate_up_proj", "down_proj"]


def nested_moe(layout: str, nesting: Nesting, **options: Any) -> NestedAdapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = lora_config(
            nesting, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{name}" for name in EXPERTS]
        )
        model = get_peft_model(moe(layout), config, autocast_adapter_dtype=False)
    randomize(model)
    return nest_as(model.eval(), nesting, **options)


def expert_wrappers(model: nn.Module) -> dict[str, Any]:
    """PEFT's wrapper of each parameter of the experts, by the parameter's name."""
    return {str(m.parameter_name): m for m in model.modules() if hasattr(m, "parameter_name")}


def in_first(wrapper: Any) -> bool:
    """Whether the stack counts as (experts, in, out); PEFT 0.18 takes every one so."""
    return not getattr(wrapper, "_did_swap_in_out_features", False)


def expert_call(experts: nn.Module) -> Tensor:
    torch.manual_seed(1)
    hidden = torch.randn(7, 16, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(3)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, dtype=torch.float64)
    output: Tensor = experts(hidden, chosen, weights)
    return output


def expected_experts(model: nn.Module, p: Tensor) -> Tensor:
    """The experts' output with their dense deltas added, differentiable in the factors."""
    wrappers = expert_wrappers(model)
    base = wrappers["gate_up_proj"].get_base_layer()
    weights = {
        name: getattr(base, name).detach()
        + oracle.expert_delta(
            wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight, p, 3, in_first(wrapper)
        )
        for name, wrapper in wrappers.items()
    }

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = base

        def forward(self) -> Tensor:
            return expert_call(self.experts)

    output: Tensor = torch.func.functional_call(Call(), {f"experts.{k}": v for k, v in weights.items()}, ())
    return output


@pytest.mark.parametrize("layout", ["out-in", "in-out"])
@pytest.mark.parametrize("deploy", ["paper", "reordered"])
def test_experts_equal_the_formula(layout: str, deploy: Any) -> None:
    nesting = Nesting([1, 2, 4], "sqrt", 1.5)
    adapter = nested_moe(layout, nesting, deploy=deploy)
    model: Any = adapter.model
    experts = model.base_model.model.model.layers[0].mlp.experts
    assert set(expert_wrappers(model)) == set(EXPERTS)
    with torch.no_grad():
        for rank in nesting.ranks:
            adapter.set_rank(rank)
            p = deployed_p(nesting, rank, deploy)
            assert close(expert_call(experts), expected_experts(model, p))
            assert not close(expert_call(experts), expected_experts(model, perturbed(p)))
    model.train()
    p = oracle.trained_p(*named(nesting))
    factors = [q for wrapper in expert_wrappers(model).values() for q in wrapper.parameters() if q.requires_grad]
    assert len(factors) >= 4
    actual, expected = expert_call(experts), expected_experts(model, p)
    assert close(actual.detach(), expected.detach())
    G = torch.randn_like(actual)
    factors = [
        getattr(wrapper, f"lora_{f}")["default"].weight for wrapper in expert_wrappers(model).values() for f in "AB"
    ]
    for a, e in zip(torch.autograd.grad(actual, factors, G), torch.autograd.grad(expected, factors, G), strict=True):
        assert a.abs().max() > 1e-3
        assert close(a, e)


@pytest.mark.parametrize("layout", ["out-in", "in-out"])
@pytest.mark.parametrize("rule", ["dylora", "dylora-all", "lora"])
def test_experts_train_by_the_rule(layout: str, rule: str) -> None:
    nesting = Nesting([1, 2, 4], "rank", 0.75)
    adapter = nested_moe(layout, nesting, rule=rule)
    adapter.model.train()
    model: Any = adapter.model
    for step in range(4):
        adapter.draw(step)
        p = RULES[rule].draw(nesting, 0, step).diagonal
        actual = expert_call(model.base_model.model.model.layers[0].mlp.experts)
        assert close(actual.detach(), expected_experts(model, p).detach())


@pytest.mark.parametrize("layout", ["out-in", "in-out"])
@pytest.mark.parametrize("deploy", ["paper", "reordered"])
def test_experts_slice_mask_export_and_merge_are_one(layout: str, deploy: Any, tmp_path: Path) -> None:
    nesting = Nesting([1, 3, 4], "rank", 0.75)
    adapter = nested_moe(layout, nesting, deploy=deploy)
    if deploy == "reordered":
        adapter.reorder()
    model: Any = adapter.model
    experts = model.base_model.model.model.layers[0].mlp.experts
    stacks = {name: getattr(expert_wrappers(model)["down_proj"].get_base_layer(), name) for name in EXPERTS}
    before = {name: stack.detach().clone() for name, stack in stacks.items()}
    with torch.no_grad():
        for rank in adapter.ranks:
            adapter.set_rank(rank)
            masked = expert_call(experts)
            adapter.export(tmp_path / str(rank), rank)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plain: Any = PeftModel.from_pretrained(moe(layout), tmp_path / str(rank), autocast_adapter_dtype=False)
            assert close(expert_call(plain.eval().base_model.model.model.layers[0].mlp.experts), masked)
            p = deployed_p(nesting, rank, "paper") if deploy == "paper" else reordered_p(nesting, rank)
            adapter.merge(rank)
            for name, wrapper in expert_wrappers(model).items():
                A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
                delta = oracle.expert_delta(A, B, p, 3, in_first(wrapper))
                assert close(getattr(wrapper.get_base_layer(), name), before[name] + delta)
            assert close(expert_call(experts), masked)
            adapter.unmerge()
            for name in EXPERTS:
                assert close(getattr(expert_wrappers(model)["down_proj"].get_base_layer(), name), before[name])
            assert close(expert_call(experts), masked)


def test_experts_have_no_rows() -> None:
    adapter = nested_moe("out-in", Nesting([1, 4]))
    before = expert_call(adapter.model.base_model.model.model.layers[0].mlp.experts)
    with pytest.raises(MatryoshkaError, match=r"tokens of .*mlp\.experts.* are routed to experts.*: use set_rank"):
        adapter.rows([1, 4]).__enter__()
    assert close(expert_call(adapter.model.base_model.model.model.layers[0].mlp.experts), before)
    for rule in ("stratified", "dylora-frozen"):
        with pytest.raises(MatryoshkaError, match=f"target_parameters give one delta .*; rule '{rule}' needs them"):
            nested_moe("out-in", Nesting([1, 4]), rule=rule)


@pytest.mark.parametrize("layout", ["out-in", "in-out"])
def test_unmerging_experts_takes_out_what_was_put_in(layout: str) -> None:
    adapter = nested_moe(layout, Nesting([1, 4]), deploy="paper")
    wrapper = expert_wrappers(adapter.model)["down_proj"]
    before = wrapper.get_param().detach().clone()
    with rescale_adapter_scale(adapter.model, multiplier=0.5):
        adapter.merge(1)
        delta = oracle.expert_delta(
            wrapper.lora_A["default"].weight,
            wrapper.lora_B["default"].weight,
            oracle.prefix_p([1, 4], 1) * 0.5,
            3,
            in_first(wrapper),
        )
        assert close(wrapper.get_param(), before + delta)
    adapter.unmerge()
    assert close(wrapper.get_param(), before)


@pytest.mark.parametrize("layout", ["out-in", "in-out"])
def test_a_new_draw_before_the_checkpointed_backward_of_experts_is_never_silently_wrong(layout: str) -> None:
    adapter = nested_moe(layout, Nesting([1, 2, 4]), rule="dylora")
    model: Any = adapter.model.train()
    experts = model.base_model.model.model.layers[0].mlp.experts
    factor = expert_wrappers(model)["down_proj"].lora_B["default"].weight
    ranks = [int(RULES["dylora"].draw(Nesting([1, 2, 4]), 0, step).diagonal.count_nonzero()) for step in range(9)]
    other = next(step for step, rank in enumerate(ranks) if rank != ranks[0])
    adapter.draw(0)
    (expected,) = torch.autograd.grad(expert_call(experts).square().sum(), factor)
    output = torch.utils.checkpoint.checkpoint(lambda: expert_call(experts), use_reentrant=False).square().sum()
    adapter.draw(other)
    try:
        (actual,) = torch.autograd.grad(output, factor)
    except MatryoshkaError:
        return
    assert close(actual, expected)
