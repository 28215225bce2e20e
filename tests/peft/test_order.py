"""When the order of the factors ends."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.models import nested_llama
from torch import Tensor

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting
from matryoshka_lora.linalg.factors import Checksum

NESTING = Nesting((1, 2, 4, 8), "sqrt", 0.7)


@pytest.fixture
def ordered() -> NestedAdapter:
    adapter = nested_llama(NESTING, layers=1)
    adapter.reorder()
    return adapter


def write_one_value(parameter: Tensor) -> None:
    parameter[3, 2] += 1


def write_through_data(parameter: Tensor) -> None:
    parameter.data.mul_(2)


def replace_data(parameter: Tensor) -> None:
    parameter.data = parameter.data * 2


def step_fused_optimizer(parameter: Tensor) -> None:
    """It does not count as an in-place operation."""
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=1e-6, fused=True).step()


@pytest.mark.parametrize(
    "change", [write_one_value, write_through_data, replace_data, step_fused_optimizer]
)
def test_an_order_ends_where_a_factor_changes(
    change: Callable[[Tensor], None], ordered: NestedAdapter
) -> None:
    _, B = ordered.layer_factors()["model.layers.0.mlp.up_proj"]
    original = B.detach().clone()
    with torch.no_grad():
        change(B)
    assert (ordered.order, ordered.ranks) == (None, (8,))
    with pytest.raises(MatryoshkaError, match="reorder"):
        ordered.set_rank(2)
    with torch.no_grad():  # undone, as where training of the ranks did not help
        B.copy_(original)
    assert (ordered.order, ordered.ranks) == ("svd", tuple(range(1, 9)))


def test_saving_verifies_the_order(ordered: NestedAdapter) -> None:
    """A single value that is written through `.data` may show in the checksum alone."""
    A, _ = ordered.layer_factors()["model.layers.0.mlp.up_proj"]
    A.data[0, 1] += 1
    assert ordered.to_lora().order is None
    assert ordered.order is None
    A.data[0, 1] -= 1
    assert ordered.to_lora().order == ordered.order


def test_the_order_is_known_without_a_checksum(
    ordered: NestedAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checksum, "update", lambda *_: pytest.fail("computed"))
    ordered.model.train()
    ordered.set_rank(3)
    with ordered.rows([1, 2]):
        assert ordered.order == "svd"
    assert NestedAdapter(ordered.model).order == "svd"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_does_not_end_the_order(dtype: torch.dtype, ordered: NestedAdapter) -> None:
    """But a change after it does."""
    clone = NestedAdapter(copy.deepcopy(ordered.model))
    clone.set_rank(2)
    clone.model.to(dtype)
    ids = torch.arange(3, 11).reshape(1, 8)
    clone.model(input_ids=ids)
    clone.model.float()
    clone.model(input_ids=ids)
    assert clone.order == "svd"
    _, B = clone.layer_factors()["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        B[0, 0] += 1
    assert (clone.order, ordered.order) == (None, "svd")


# Training.


def forward(adapter: NestedAdapter) -> Tensor:
    output: Tensor = adapter.model(input_ids=torch.arange(3, 11).reshape(1, 8)).logits
    return output


@pytest.mark.parametrize("training", [True, False], ids=["train mode", "eval mode"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_training_ends_the_order(training: bool, fused: bool, ordered: NestedAdapter) -> None:
    """In train mode, also where the optimizer shows in no counter and in no sampled value."""
    parameters = [factor for pair in ordered.layer_factors().values() for factor in pair]
    ordered.model.train(training)
    optimizer = torch.optim.AdamW(parameters[2:] if training else parameters, fused=fused)
    forward(ordered).square().mean().backward()
    optimizer.step()
    ordered.model.eval()
    assert ordered.state.order.current(quick=True) is None


def test_a_step_that_changes_nothing_does_not_end_the_order(ordered: NestedAdapter) -> None:
    parameters = [factor for pair in ordered.layer_factors().values() for factor in pair]
    ordered.model.train()
    forward(ordered).square().mean().backward()
    torch.optim.SGD(parameters, lr=0.0).step()
    assert ordered.order == "svd"


def test_a_forward_without_gradients_needs_no_checksum(
    ordered: NestedAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checksum, "update", lambda *_: pytest.fail("computed"))
    with torch.no_grad():
        forward(ordered)
        ordered.model.train()
        forward(ordered)
    ordered.set_rank(3)
    forward(ordered)  # in eval mode
    assert ordered.order == "svd"


def test_factors_that_were_created_in_inference_mode_have_an_order() -> None:
    with torch.inference_mode():
        adapter = nested_llama(NESTING, layers=1)
        adapter.reorder()
        adapter.set_rank(2)
        forward(adapter)
        assert adapter.order == "svd"
        _, B = adapter.layer_factors()["model.layers.0.mlp.up_proj"]
        B.mul_(2)
        assert adapter.order is None
