"""The private parts of torch, PEFT and transformers do what the package takes them to do."""

from __future__ import annotations

import inspect

import oracle
import pytest
import torch
from conftest import one_layer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from matryoshka_lora import Nesting, unofficial


def layer(kind: str = "Linear") -> LoraLayer:
    found: LoraLayer = one_layer(kind, Nesting([1, 2])).base_model.model.layer
    return found


def test_torch_tells_when_a_forward_runs_inside_backward() -> None:
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append(unofficial.backward_node())
        return x * 2

    before = unofficial.next_node()
    checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=True).sum().backward()
    first, again = seen
    assert first is None
    assert again is not None
    assert again >= before


def test_nodes_are_numbered_in_the_order_of_the_forward_pass() -> None:
    x = torch.ones(2, requires_grad=True)
    number = unofficial.next_node()
    y = x * 2
    assert y.grad_fn._sequence_nr() == number
    assert unofficial.next_node() == number + 1


def test_torch_tells_of_hooks_on_saved_tensors() -> None:
    assert unofficial.saves_freely()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert not unofficial.saves_freely()


def test_torch_hands_out_the_factors_of_a_product() -> None:
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    left, right = unofficial.kept_product(a * b)
    assert left is not None
    assert left.data_ptr() == a.data_ptr()
    assert right is not None
    assert right.data_ptr() == b.data_ptr()
    assert unofficial.kept_product(a + b) == (None, None)


def test_a_reshaped_output_may_be_changed_in_place() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> tuple[Tensor, Tensor]:
            return unofficial.reshaped(x * 2, (4,)), x

        @staticmethod
        def backward(ctx: object, *gradients: Tensor) -> Tensor:
            return gradients[0].view(2, 2) * 2

    x = torch.ones(2, 2, requires_grad=True)
    output, _ = Doubled.apply(x)
    output += 1  # autograd refuses this for a view that was made in a function of several outputs
    output.sum().backward()
    assert x.grad.tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_a_module_s_hooks_are_seen() -> None:
    module = nn.Linear(2, 2)
    assert not unofficial.has_hooks(module)
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(module, register)(lambda *_: None)
        assert unofficial.has_hooks(module)
        handle.remove()
        assert not unofficial.has_hooks(module)


@pytest.mark.parametrize("kind", sorted(oracle.KINDS))
def test_peft_s_convolutions_have_one_class(kind: str) -> None:
    assert unofficial.is_conv(layer(kind)) == (kind.startswith("Conv") and kind != "Conv1D")


def test_one_layer_s_adapter_is_switched() -> None:
    module = layer()
    active = list(module.active_adapters)
    module.enable_adapters(False)
    with unofficial.only_active(module, "default"):
        assert module.active_adapters == ["default"]
        assert not module.disable_adapters
    assert module.disable_adapters
    assert list(module.active_adapters) == active


def test_peft_s_embedding_can_have_another_weight() -> None:
    module = layer("Embedding")
    weight, tokens = torch.randn(module.weight.shape, dtype=torch.float64), torch.tensor([[0, 2]])
    torch.testing.assert_close(unofficial.embedded(module, tokens, weight), weight[tokens])
    assert unofficial.embed_scale(module) is None
    assert float(unofficial.embed_scale(layer("Embedding-scaled"))) != 1


def test_the_trainer_has_the_parts_that_are_called() -> None:
    assert list(inspect.signature(Trainer._prepare_inputs).parameters) == ["self", "inputs"]
    assert list(inspect.signature(Trainer._load_best_model).parameters) == ["self"]
    removed = inspect.signature(Trainer._get_collator_with_removed_columns).parameters
    assert list(removed)[:2] == ["self", "data_collator"]
