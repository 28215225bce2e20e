"""Kernels that bypass the nested layers, and a chosen rank whose order has ended."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from helpers.examples import lookup_examples
from helpers.models import lora_config, nest_as, nested_llama, randomize, tiny_llama
from helpers.plain_peft import IDS
from peft import get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting

NESTING = Nesting((1, 2, 4))


def compute_layer(layer: Any, x: Tensor) -> Tensor:
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    output: Tensor = layer.base_layer(x) + x @ A.T @ B.T * layer.scaling["default"]
    return output


def kernel(mlp: Any, x: Tensor) -> Tensor:
    """Compute an MLP from its factors, as Unsloth and Axolotl do."""
    gate, up = compute_layer(mlp.gate_proj, x), compute_layer(mlp.up_proj, x)
    return compute_layer(mlp.down_proj, nn.functional.silu(gate) * up)


def patch_instances(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, LlamaMLP):
            module.forward = MethodType(kernel, module)


def patch_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", kernel)


def block_kernel(block: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """Compute a block, without calling its MLP."""
    attended, _ = block.self_attn(hidden_states=block.input_layernorm(x), **kwargs)
    x = x + attended
    return x + kernel(block.mlp, block.post_attention_layernorm(x))


def patch_blocks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaDecoderLayer, "forward", block_kernel)


InstallKernels = Callable[[Any, pytest.MonkeyPatch], None]


def forward(adapter: NestedAdapter) -> Tensor:
    output: Tensor = adapter.model(input_ids=IDS).logits
    return output


def generate(adapter: NestedAdapter) -> Tensor:
    output: Tensor = adapter.model.generate(input_ids=IDS, max_new_tokens=2)
    return output


@pytest.mark.parametrize("install_kernels", [patch_instances, patch_class, patch_blocks])
@pytest.mark.parametrize("run", [forward, generate])
def test_kernels_that_bypass_the_layers_are_an_error(
    run: Callable[[NestedAdapter], Tensor],
    install_kernels: InstallKernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = nested_llama(NESTING, "lora")
    install_kernels(adapter.model, monkeypatch)
    adapter.reorder()
    run(adapter)  # rank R is plain LoRA
    adapter.set_rank(1)
    for _ in range(2):  # not only the first time
        with pytest.raises(MatryoshkaError, match="gate_proj"):
            run(adapter)
    with pytest.raises(MatryoshkaError, match="gate_proj"), adapter.rows([1, 4]):
        run(adapter)


@pytest.mark.parametrize("rule", ["matryoshka", "dylora"])
def test_training_with_such_kernels_is_an_error(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = nested_llama(NESTING, rule)
    patch_instances(adapter.model, monkeypatch)
    adapter.draw(0)
    with pytest.raises(MatryoshkaError, match="gate_proj"):
        forward(adapter)
    plain = nested_llama(NESTING, "lora")
    patch_instances(plain.model, monkeypatch)
    plain.draw(0)
    forward(plain)


def test_ranks_are_trained_with_such_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training the ranks needs A and B, and no diagonal."""
    results = []
    for is_patched in (False, True):
        adapter = nested_llama(NESTING, "lora", layers=1)
        if is_patched:
            patch_instances(adapter.model, monkeypatch)
        examples = lookup_examples(64)
        results.append(adapter.train_ranks(examples, eval_data=examples, max_examples=64))
    expected, actual = results
    assert actual.losses_before == pytest.approx(expected.losses_before, rel=1e-4)
    assert actual.losses_after == pytest.approx(expected.losses_after, rel=1e-3)


def test_modules_without_input_are_no_error() -> None:
    """As the image tower in a batch of text; or after an error in the middle of a forward."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = nn.ModuleDict({"fc": nn.Linear(4, 4)})
            self.image = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.text["fc"](x)
            return output

    model = get_peft_model(Towers(), lora_config(NESTING, target_modules=["fc", "0"]))
    adapter = nest_as(model, NESTING)
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 3))
    assert model(torch.ones(2, 4)).shape == (2, 4)
    adapter.reorder()
    adapter.set_rank(2)
    for usable_model in (copy.deepcopy(model), model.merge_and_unload()):
        assert usable_model(torch.ones(2, 4)).shape == (2, 4)


def test_layers_that_the_model_itself_does_not_call_are_no_error() -> None:
    """As Longformer's global queries without global attention."""

    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.used(x)
            return output

    model = get_peft_model(Conditional(), lora_config(NESTING, target_modules=["used", "unused"]))
    adapter = nest_as(model, NESTING)
    randomize(model)
    adapter.reorder()
    adapter.set_rank(2)
    assert model(torch.ones(2, 4)).shape == (2, 4)


def test_unloading_leaves_no_hooks() -> None:
    adapter = nested_llama(NESTING)
    adapter.reorder()
    adapter.set_rank(2)
    with torch.no_grad():
        adapter.layer_factors()["model.layers.1.mlp.up_proj"][1].add_(1)
    base_model: Any = adapter.model.unload()
    base_model(input_ids=IDS)  # another rank would be an error
    assert not base_model._forward_pre_hooks
    assert not base_model._forward_hooks


def test_a_forward_after_an_interrupted_one_is_checked() -> None:
    adapter = nested_llama(NESTING)
    adapter.reorder()
    adapter.set_rank(2)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = adapter.model.get_output_embeddings().register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        forward(adapter)
    handle.remove()
    forward(adapter)
    assert not torch.nn.modules.module._global_forward_pre_hooks
    write_one_layer(adapter, Path())
    with pytest.raises(MatryoshkaError, match="reorder"):
        forward(adapter)


# A chosen rank whose order has ended.


def train(adapter: NestedAdapter, folder: Path) -> None:
    """A training loop without draw(), with an optimizer that no version counter shows."""
    model = adapter.model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = parameters[2:]  # not of the first layer
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    forward(adapter).square().mean().backward()
    optimizer.step()
    model.eval()


def write_one_layer(adapter: NestedAdapter, folder: Path) -> None:
    _, B = adapter.layer_factors()["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        B[0, 0] += 1


def hotswap(adapter: NestedAdapter, folder: Path) -> None:
    other = get_peft_model(tiny_llama(), lora_config(NESTING))
    randomize(other, seed=9)
    other.save_pretrained(folder)
    hotswap_adapter(adapter.model, str(folder), adapter_name="default")


@pytest.mark.parametrize("change", [train, write_one_layer, hotswap])
def test_a_rank_does_not_outlive_its_order(
    change: Callable[[NestedAdapter, Path], None], tmp_path: Path
) -> None:
    adapter = nested_llama(NESTING)
    model: Any = adapter.model
    adapter.reorder()
    adapter.set_rank(2)
    forward(adapter)
    change(adapter, tmp_path / "other")
    for use in (lambda: forward(adapter), model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MatryoshkaError, match=r"reorder\(\)"):
            use()
    adapter.set_rank(4)
    forward(adapter)
    adapter.reorder()
    adapter.set_rank(2)
    forward(adapter)
    model.merge_adapter()


def test_a_change_that_is_undone_does_not_end_the_order() -> None:
    adapter = nested_llama(NESTING)
    adapter.reorder()
    adapter.set_rank(2)
    expected = forward(adapter)
    for A, _ in adapter.layer_factors().values():
        A.data = A.data * 2
        with torch.no_grad():
            A.mul_(0.5)
    assert torch.equal(forward(adapter), expected)
