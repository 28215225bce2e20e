"""Reordering against numpy's SVD of the dense delta, which the package never forms."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import NestedLayer, OneLayer, lora_config, nest_as, nested_layer, nested_llama, randomize, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from matryoshka_lora import MatryoshkaError, Nesting, reorder
from matryoshka_lora.reordering.factors import reorder_factors
from matryoshka_lora.reordering.single import singular_values
from matryoshka_lora.rules import RULES

sizes = st.integers(1, 14)


@st.composite
def factors(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    """A, B, p and a scale, of any shape, among them ones of lower rank than R."""
    R, inside, outside = draw(sizes), draw(sizes), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    A = torch.randn(R, inside, generator=generator, dtype=torch.float64)
    B = torch.randn(outside, R, generator=generator, dtype=torch.float64)
    live = draw(st.integers(0, R))
    B[:, live:] *= draw(st.sampled_from([0.0, 1.0, 1e-3]))
    if R > 1 and draw(st.booleans()):
        A[1] = A[0]
    p = torch.rand(R, generator=generator, dtype=torch.float64) * 5 + 0.1
    return A, B, p, draw(st.floats(0.01, 10))


def errors(delta: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The Frobenius error of each prefix, from rank 0 to R."""
    prefixes = [scale * B[:, :r].double() @ A[:r].double() for r in range(A.shape[0] + 1)]
    return torch.stack([(delta - prefix).norm() for prefix in prefixes])


def padded(best: Tensor, R: int) -> Tensor:
    """numpy knows min(in, out) singular values; beyond them the error is 0."""
    return torch.cat([best, best.new_zeros(max(0, R + 1 - len(best)))])[: R + 1]


@settings(max_examples=150)
@given(factors())
def test_every_prefix_is_numpys_best(given_factors: tuple[Tensor, Tensor, Tensor, float]) -> None:
    A, B, p, scale = given_factors
    R = len(p)
    delta = B @ torch.diag(p) @ A
    new_A, new_B, spectrum = reorder_factors(A, B, p, scale)
    assert new_A.shape == A.shape
    assert new_B.shape == B.shape
    size = 1 + float(delta.norm())
    torch.testing.assert_close(scale * new_B @ new_A, delta, rtol=0, atol=1e-12 * size)
    best = padded(oracle.best_errors(delta), R)
    torch.testing.assert_close(errors(delta, new_A, new_B, scale), best, rtol=0, atol=1e-7 * size)

    singular = np.linalg.svd(delta.numpy(), compute_uv=False)
    expected = padded(torch.from_numpy(singular.copy()), R - 1) if R > 1 else torch.from_numpy(singular[:1].copy())
    torch.testing.assert_close(spectrum, expected, rtol=0, atol=1e-12 * size)
    assert (spectrum.diff() <= 0).all()


@settings(max_examples=60)
@given(factors())
def test_reordering_twice_changes_nothing(given_factors: tuple[Tensor, Tensor, Tensor, float]) -> None:
    A, B, p, scale = given_factors
    first_A, first_B, spectrum = reorder_factors(A, B, p, scale)
    again_A, again_B, again = reorder_factors(first_A, first_B, torch.full_like(p, scale), scale)
    size = 1 + float(spectrum.max())
    torch.testing.assert_close(again, spectrum, rtol=0, atol=1e-12 * size)
    torch.testing.assert_close(again_B @ again_A, first_B @ first_A, rtol=0, atol=1e-12 * size / scale)
    # A direction is known only as far as its singular value stands apart from its neighbours'.
    sure = spectrum > 1e-6 * size
    gap = torch.cat([spectrum.new_full((1,), torch.inf), -spectrum.diff(), spectrum.new_full((1,), torch.inf)])
    sure &= torch.minimum(gap[:-1], gap[1:]) > 1e-4 * size
    torch.testing.assert_close(again_A[sure], first_A[sure], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again_B[:, sure], first_B[:, sure], rtol=1e-6, atol=1e-6)


def test_directions_without_size_keep_a_unit_row_in_a() -> None:
    """So that they can learn; which unit rows those are is arbitrary, and only they may change when done twice."""
    torch.manual_seed(0)
    A, B = torch.randn(6, 10).double(), torch.randn(8, 6).double()
    B[:, 3:] = 0
    first_A, first_B, spectrum = reorder_factors(A, B)
    again_A, again_B, _ = reorder_factors(first_A, first_B)
    assert spectrum[3:].count_nonzero() == 0
    torch.testing.assert_close(again_B, first_B, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again_A[:3], first_A[:3], rtol=1e-9, atol=1e-9)
    for new_A, new_B in ((first_A, first_B), (again_A, again_B)):
        assert new_B[:, 3:].count_nonzero() == 0
        gram = new_A @ new_A.T
        torch.testing.assert_close(gram[3:, 3:], torch.eye(3).double(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gram[3:, :3], torch.zeros(3, 3).double(), rtol=1e-9, atol=1e-9)


def test_rounding_is_no_singular_value() -> None:
    """Or a choice of ranks would take directions that do nothing."""
    torch.manual_seed(0)
    A, B = torch.randn(6, 10).double(), torch.randn(8, 6).double()
    B[:, 3:] = B[:, :3]
    for spectrum in (reorder_factors(A, B)[2], singular_values(A, B, 0.5)):
        assert (spectrum[:3] > 0.1).all()
        assert spectrum[3:].count_nonzero() == 0


def test_the_result_depends_on_the_product_alone() -> None:
    torch.manual_seed(0)
    A, B, M = torch.randn(5, 9).double(), torch.randn(7, 5).double(), torch.randn(5, 5).double()
    expected = reorder_factors(A, B)
    for other_A, other_B in ((-A, -B), (M @ A, B @ torch.linalg.inv(M)), (A.flip(0), B.flip(1))):
        for actual, wanted in zip(reorder_factors(other_A, other_B), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(AssertionError):  # p matters
        torch.testing.assert_close(reorder_factors(A, B, torch.arange(1.0, 6.0))[2], expected[2])


def test_the_singular_values_are_shared_evenly() -> None:
    torch.manual_seed(0)
    A, B, spectrum = reorder_factors(torch.randn(4, 9).double(), torch.randn(7, 4).double(), scale=0.25)
    expected = torch.diag(spectrum / 0.25)
    torch.testing.assert_close(A @ A.T, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(B.T @ B, expected, rtol=1e-10, atol=1e-10)


def test_experts_are_reordered_one_by_one() -> None:
    torch.manual_seed(0)
    A, B, p = torch.randn(3, 4, 9).double(), torch.randn(3, 7, 4).double(), torch.rand(4).double() + 0.5
    stacked = reorder_factors(A, B, p, 2.0)
    for e in range(3):
        for actual, wanted in zip(stacked, reorder_factors(A[e], B[e], p, 2.0), strict=True):
            torch.testing.assert_close(actual[e], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_the_dtype_is_kept_and_only_rounds_the_result(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(6, 20).to(dtype), torch.randn(15, 6).to(dtype)
    p = oracle.trained_p([1, 2, 6], "rank", 4.0)
    before = A.clone(), B.clone()
    new_A, new_B, spectrum = reorder_factors(A, B, p, 0.5)
    assert new_A.dtype == new_B.dtype == dtype
    assert spectrum.dtype == torch.float64
    assert torch.equal(A, before[0])
    assert torch.equal(B, before[1])
    delta = B.double() @ torch.diag(p) @ A.double()
    difference = 0.5 * new_B.double() @ new_A.double() - delta
    assert difference.norm() < tolerance * delta.norm()


def test_a_hundred_orders_of_magnitude_are_no_obstacle() -> None:
    torch.manual_seed(0)
    A = torch.randn(6, 20).double() * 10.0 ** -torch.arange(0, 12, 2.0).double()[:, None]
    B = torch.randn(15, 6).double() * 1e60
    new_A, new_B, _ = reorder_factors(A, B, scale=1e-30)
    delta = B @ A
    assert ((1e-30 * new_B) @ new_A - delta).norm() < 1e-12 * delta.norm()


# In an adapter.


def dense(nested: NestedLayer, p: Tensor) -> Tensor:
    """The delta for p as a matrix."""
    A, B = (factor.detach().double().flatten(1) for factor in nested.factors)
    return B @ torch.diag(p) @ A


KINDS = [kind for kind in oracle.KINDS if kind != "Linear-2d-input"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("ranks", [[1, 2, 6], [2, 16]], ids=str)  # the layers are 10 to 12 wide: 16 is wider
def test_what_was_trained_stays_and_every_rank_is_best(kind: str, rule: str, ranks: list[int]) -> None:
    nesting = Nesting(ranks, "sqrt", 0.75)
    R, s_R = nesting.max_rank, 0.75
    nested = nested_layer(kind, nesting, rule)
    trained = oracle.trained_p(ranks, "sqrt", s_R) if rule == "matryoshka" else oracle.prefix_p(ranks, R, "sqrt", s_R)
    delta = dense(nested, trained)
    x = nested.kind.batch(3)
    expected = nested.expected(trained, x).detach()

    spectra = nested.adapter.reorder()
    assert list(spectra) == ["layer"]
    assert spectra["layer"].shape == (R,)
    assert nested.adapter.reordered
    assert nested.adapter.ranks == tuple(range(1, R + 1))
    best = padded(oracle.best_errors(delta), R)
    nested.adapter.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(nested.layer(x), expected, rtol=1e-10, atol=1e-10)
        for rank in range(1, R + 1):
            nested.adapter.set_rank(rank)
            p = (torch.arange(R) < rank).double() * s_R
            error = (delta - dense(nested, p)).norm()
            assert error == pytest.approx(float(best[rank]), rel=1e-9, abs=1e-7)
            torch.testing.assert_close(nested.layer(x), nested.expected(p, x), rtol=1e-12, atol=1e-12)
        # Training goes on as plain LoRA, whatever the rule was.
        nested.adapter.model.train()
        torch.testing.assert_close(nested.layer(x), expected, rtol=1e-10, atol=1e-10)
        nested.adapter.draw(17, rows=3)
        torch.testing.assert_close(nested.layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scaling", ["none", "rank", "sqrt"])
def test_full_rank_of_a_model_is_unchanged_in_fp32(scaling: Any) -> None:
    adapter = nested_llama(Nesting.powers_of_two(8, scaling))
    ids = torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapter.model.train()  # the trained function; there is no dropout
        before = adapter.model(ids).logits
        adapter.reorder()
        adapter.model.eval()
        after = adapter.model(ids).logits
        assert (after - before).norm() < 1e-5 * before.norm()
        adapter.set_rank(7)
        assert (adapter.model(ids).logits - before).norm() > 1e-3 * before.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_of_a_layer_is_unchanged_in_fp32(kind: str) -> None:
    nested = nested_layer(kind, Nesting([1, 2, 4, 8], "rank"), dtype=torch.float32)
    x = nested.kind.batch(4)
    x = x.float() if x.is_floating_point() else x
    with torch.no_grad():
        before = nested.layer(x) - nested.layer.base_layer(x)
        nested.adapter.reorder()
        nested.adapter.model.eval()
        after = nested.layer(x) - nested.layer.base_layer(x)
    assert (after - before).norm() < 1e-5 * before.norm()


def test_the_deployment_before_makes_no_difference_afterwards() -> None:
    outputs = []
    x = oracle.KINDS["Linear"].batch(3)
    for deploy in ("paper", "reordered"):
        nested = nested_layer("Linear", Nesting([1, 2, 6], "sqrt"), deploy=deploy)
        nested.adapter.model.eval()
        trained = [(nested.adapter.set_rank(rank), nested.layer(x))[1] for rank in (1, 2, 6)]
        nested.adapter.reorder()
        outputs.append([(nested.adapter.set_rank(rank), nested.layer(x))[1] for rank in range(1, 7)])
        assert not torch.allclose(trained[0], outputs[-1][0])
    for paper, reordered in zip(*outputs, strict=True):
        assert torch.equal(paper, reordered)


@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv2d"])
def test_twice_is_once(kind: str) -> None:
    nested = nested_layer(kind, Nesting([1, 2, 6], "rank", 5.0))
    first = nested.adapter.reorder()
    before = [factor.detach().clone() for factor in nested.factors]
    second = nested.adapter.reorder()
    torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-12)
    for factor, old in zip(nested.factors, before, strict=True):
        torch.testing.assert_close(factor.detach(), old, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_stays_zero_and_can_still_learn(kind: str) -> None:
    nested = nested_layer(kind, Nesting([1, 4]))
    A, B = nested.factors
    with torch.no_grad():
        B.zero_()
    spectra = nested.adapter.reorder()
    assert spectra["layer"].count_nonzero() == 0
    assert A.isfinite().all()
    x = nested.kind.batch(3)
    assert torch.equal(nested.layer(x), nested.layer.base_layer(x))
    nested.layer(x).square().sum().backward()
    assert (B.grad.flatten(1).norm(dim=0) > 0).all()


def test_dropped_ranks_leave_a_smaller_adapter_that_merges_and_exports(tmp_path: Any) -> None:
    """After reordering, slice, mask, export, merge and rows agree at ranks that were never trained."""
    nested = nested_layer("Linear", Nesting([1, 6], "sqrt", 2.0), "stratified")
    adapter, layer = nested.adapter, nested.layer
    base = copy.deepcopy(layer.base_layer)
    with pytest.raises(MatryoshkaError, match=r"rank 3 was not trained; the trained ranks are 1, 6\. After reorder"):
        adapter.set_rank(3)
    adapter.reorder()
    adapter.model.eval()
    x = nested.kind.batch(3)
    alone = {}
    with torch.no_grad():
        for rank in range(1, 7):
            adapter.set_rank(rank)
            alone[rank] = layer(x)
            adapter.export(tmp_path / str(rank), rank)
            plain: Any = PeftModel.from_pretrained(OneLayer(copy.deepcopy(base)), tmp_path / str(rank)).eval()
            torch.testing.assert_close(plain.base_model.model.layer(x), alone[rank], rtol=1e-12, atol=1e-12)
            adapter.merge(rank)
            torch.testing.assert_close(layer.base_layer(x), alone[rank], rtol=1e-12, atol=1e-12)
            adapter.unmerge()
        with adapter.rows([3, 5, 2]):
            mixed = layer(x)
        for row, rank in enumerate([3, 5, 2]):
            torch.testing.assert_close(mixed[row], alone[rank][row], rtol=1e-12, atol=1e-12)


def test_peft_s_own_scaling_is_kept() -> None:
    nested = nested_layer("Linear", Nesting([1, 2, 6], "sqrt"))
    nested.layer.set_scale("default", 0.5)
    x = nested.kind.batch(3)
    with torch.no_grad():
        before = nested.layer(x)
        nested.adapter.reorder()
        torch.testing.assert_close(nested.layer(x), before, rtol=1e-10, atol=1e-10)


def test_ranks_that_were_chosen_stay_chosen() -> None:
    adapter = nested_llama(Nesting([1, 2, 4]))
    adapter.set_rank({"q_proj": 1})
    before = adapter.rank
    adapter.reorder()
    assert adapter.rank == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_nan_is_refused_and_nothing_is_changed(bad: float, factor: str) -> None:
    adapter = nested_llama(Nesting([1, 2, 4]))
    layer: Any = adapter.model.base_model.model.model.layers[1].mlp.down_proj  # the last one
    with torch.no_grad():
        getattr(layer, factor)["default"].weight[0, 0] = bad
    before = {key: value.clone() for key, value in adapter.model.state_dict().items()}
    with pytest.raises(MatryoshkaError, match=r"layers\.1\.mlp\.down_proj holds NaN or infinity: training diverged"):
        adapter.reorder()
    after = adapter.model.state_dict()
    assert all(torch.equal(after[key].nan_to_num(7.0), value.nan_to_num(7.0)) for key, value in before.items())
    assert not adapter.reordered
    assert adapter.ranks == (1, 2, 4)


def test_a_merged_adapter_is_refused() -> None:
    adapter = nested_llama(Nesting([1, 2]))
    adapter.merge(1)
    with pytest.raises(MatryoshkaError, match="merged into the base weights: unmerge it to reorder it"):
        adapter.reorder()
    adapter.unmerge()
    adapter.reorder()


def test_adapters_in_bf16() -> None:
    nesting = Nesting([1, 2, 4], "sqrt", 0.5)
    model = get_peft_model(tiny_llama().bfloat16(), lora_config(nesting), autocast_adapter_dtype=False)
    randomize(model)
    adapter = nest_as(model, nesting)
    layer: Any = model.base_model.model.model.layers[0].mlp.up_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.dtype == torch.bfloat16
    delta = B.double() @ torch.diag(oracle.trained_p([1, 2, 4], "sqrt", 0.5)) @ A.double()
    adapter.reorder()
    assert layer.lora_A["default"].weight is A
    assert A.dtype == B.dtype == torch.bfloat16
    relative = errors(delta, A, B, 0.5) / delta.norm()
    torch.testing.assert_close(relative, oracle.best_errors(delta)[:5] / delta.norm(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("in_first", [False, True])
def test_experts(in_first: bool) -> None:
    """A stack of experts in both of PEFT's layouts: each expert is reordered for itself."""

    class Experts(nn.Module):
        is_transposed = in_first

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            shape = (3, 8, 6) if in_first else (3, 6, 8)
            self.stack = nn.Parameter(torch.randn(shape, dtype=torch.float64))

        def forward(self) -> Tensor:
            return self.stack * 1

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

    ranks = [1, 2, 5]
    nesting = Nesting(ranks, "sqrt", 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = lora_config(nesting, target_modules=[], target_parameters=["experts.stack"])
        model: Any = get_peft_model(Model(), config)
    randomize(model)
    adapter = nest_as(model, nesting)
    wrapper = model.base_model.model.experts
    A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    assert A.shape == (15, 8)
    assert B.shape == (6, 15)
    deltas = oracle.expert_delta(A.detach(), B.detach(), oracle.trained_p(ranks, "sqrt", 0.9), 3, in_first)
    spectra = adapter.reorder()["experts"]
    assert spectra.shape == (3, 5)
    assert not torch.allclose(spectra[0], spectra[1])
    s_R = 0.9
    for rank in range(1, 6):
        p = (torch.arange(5) < rank).double() * s_R
        after = oracle.expert_delta(A.detach(), B.detach(), p, 3, in_first)
        for e in range(3):
            error = (deltas[e] - after[e]).norm()
            assert error == pytest.approx(float(oracle.best_errors(deltas[e])[rank]), rel=1e-9, abs=1e-7)
            assert error == pytest.approx(float(spectra[e, rank:].norm()), rel=1e-9, abs=1e-7)


# From file to file.


def test_one_layer_of_a_file_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Counted are the tensors that are alive when a layer was computed."""
    tensors = {}
    for i in range(12):
        name = f"base_model.model.layers.{i}.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 6_000)
        tensors[f"{name}.lora_B.weight"] = torch.randn(6_000, 4)
    LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "plain")
    save_file(tensors, tmp_path / "plain" / "adapter_model.safetensors", {"format": "pt"})
    mine = {id(tensor) for tensor in tensors.values()}

    def alive() -> int:
        found = [each for each in gc.get_objects() if type(each) is Tensor and id(each) not in mine]
        return sum(tensor.numel() for tensor in found if tensor.numel() >= 24_000)

    before, seen = alive(), []
    reorder(tmp_path / "plain", tmp_path / "nested", on_layer=lambda: seen.append(alive() - before))
    assert len(seen) == 12
    assert all(seen)  # the count can fail
    assert max(seen) <= 2 * 48_000  # what is read of a layer, and what is made of it
    assert alive() == before
