"""Second moments of inputs and output gradients, and the order that they give."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.examples import collate, lookup_examples, make_trainer, random_examples
from helpers.models import (
    lora_config,
    nest_as,
    nested_layer,
    nested_llama,
    randomize,
    tiny_llama,
)
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, NotFiniteError, export, load
from matryoshka_lora.formats.safetensors_io import NESTING_KEY
from matryoshka_lora.training.data import TrainingData, read_training_data
from matryoshka_lora.training.moments import second_moments

NESTING = Nesting((1, 2, 4, 8), "none", 0.7)
EXAMPLES = lookup_examples(160)


def half_llama() -> Any:
    """A model of one layer, whose attention gets inputs that are zero in half of the features."""
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 32:] = 0
    return model


def small_update(size: float = 0.1) -> NestedAdapter:
    """An adapter of random factors that changes the outputs a little."""
    config = lora_config(NESTING, target_modules=["q_proj", "v_proj"])
    adapter = nest_as(get_peft_model(half_llama(), config).eval(), NESTING, "lora")
    randomize(adapter.model, size=size)
    return adapter


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Conv1D"])
def test_moments_are_those_of_the_dense_layer(kind: str) -> None:
    """The loss is a sum over outputs with random weights, so its gradients are these weights."""
    layer = nested_layer(kind, Nesting((1, 2, 4)), "lora")
    adapter = layer.adapter
    adapter.reorder()
    inputs = layer.kind.batch(16)
    weights = torch.randn_like(adapter.model.eval()(inputs))
    data = TrainingData(
        range(16),
        lambda indices: {"x": inputs[indices], "weights": weights[indices]},
        lambda batch: (adapter.model(batch["x"]) * batch["weights"]).sum() / len(batch["x"]),
        inputs.device,
        is_causal=False,
    )
    (moments,) = second_moments(adapter.factors, data, 16).values()
    A, B = [factor.detach().flatten(1) for factor in layer.factors]
    x, g = inputs, weights
    if kind == "Conv2d":
        x = torch.nn.functional.unfold(inputs, (3, 2), padding=1, stride=(2, 1)).mT
        g = weights.flatten(2).mT
    h, b = x.flatten(0, -2) @ A.T, g.flatten(0, -2) @ B
    torch.testing.assert_close(torch.tensor(moments.inputs), h.T @ h / len(h))
    torch.testing.assert_close(torch.tensor(moments.outputs), b.T @ b / 16)


def test_gradients_of_a_language_model_have_the_fisher_information_of_its_outputs() -> None:
    """The moment of the head itself is that of the logits, whatever the labels are."""
    adapter = nested_llama(NESTING, "lora", layers=1, target_modules=["lm_head"])
    adapter.reorder()
    data = read_training_data(adapter.model, EXAMPLES)
    ((_, B),) = adapter.layer_factors().values()
    expected = torch.zeros(8, 8, dtype=torch.float64)
    with torch.no_grad():
        logits = adapter.model(**collate(EXAMPLES)).logits[:, 3:5].flatten(0, 1).double()
    for p in logits.softmax(dim=-1):
        fisher = p.diag() - p.outer(p)
        expected += 0.49 * B.T.double() @ fisher @ B.double() / len(logits)
    totals = [
        torch.tensor(moments.outputs)
        for seed in range(40)
        for moments in second_moments(adapter.factors, data, len(EXAMPLES), seed).values()
    ]
    mean = torch.stack(totals).mean(dim=0)
    assert torch.dist(mean, expected) < 0.05 * expected.norm()


def test_gradients_that_are_not_finite_are_an_error() -> None:
    """The adapter is then reordered by the SVD alone."""
    adapter = small_update()
    with torch.no_grad():
        adapter.model.get_base_model().lm_head.weight.mul_(torch.nan)
    with pytest.raises(NotFiniteError):
        adapter.reorder(EXAMPLES)
    assert adapter.order == "svd"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_have_the_same_moments(use_reentrant: bool) -> None:
    adapter = small_update()
    adapter.reorder()
    data = read_training_data(adapter.model, EXAMPLES)
    expected = second_moments(adapter.factors, data, 32)
    base: Any = adapter.model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    adapter.model.enable_input_require_grads()
    actual = second_moments(adapter.factors, data, 32)
    assert actual.keys() == expected.keys()
    for name, moments in expected.items():
        for values, others in zip(moments, actual[name], strict=True):
            torch.testing.assert_close(torch.tensor(values), torch.tensor(others))


def test_no_graph_of_an_earlier_batch_is_kept() -> None:
    """A hook that refers to its own tensor would keep it until the next garbage collection."""
    adapter = small_update()
    adapter.reorder()
    data = read_training_data(adapter.model, EXAMPLES)
    tensors: list[weakref.ref[Tensor]] = []
    (layer, *_) = adapter.layers.values()
    module: Any = layer.lora_A["default"]
    hook = module.register_forward_hook(lambda _, args, h: tensors.append(weakref.ref(h)))
    gc.disable()
    try:
        second_moments(adapter.factors, data, 32)
        assert tensors
        assert not any(tensor() is not None for tensor in tensors)
    finally:
        gc.enable()
        hook.remove()


def divergence(adapter: NestedAdapter, rank: int, reference: Tensor) -> float:
    adapter.set_rank(rank)
    with torch.no_grad():
        logits = adapter.model(**collate(EXAMPLES)).logits[:, 3:5]
    terms = reference.exp() * (reference - logits.log_softmax(-1))
    return float(terms.sum(-1).mean())


@pytest.mark.parametrize("source", ["examples", "trainer"])
def test_a_weighted_order_changes_the_outputs_less(tmp_path: Path, source: str) -> None:
    """Where the changes are small, because the outputs are taken as linear."""
    adapter = small_update()
    with torch.no_grad():
        reference = adapter.model(**collate(EXAMPLES)).logits[:, 3:5].log_softmax(-1)
    errors = adapter.reorder().errors
    before = {rank: divergence(adapter, rank, reference) for rank in (2, 4, 6, 8)}
    data: Any = EXAMPLES
    if source == "trainer":
        data = make_trainer(adapter.model, tmp_path, EXAMPLES)
    result = adapter.reorder(data)
    assert adapter.order == "weighted"
    after = {rank: divergence(adapter, rank, reference) for rank in (2, 4, 6, 8)}
    for rank in (2, 4, 6):
        assert after[rank] < 0.8 * before[rank]
    for rank in (1, 2, 4):
        assert result.errors[rank] > errors[rank]  # the SVD has the smallest error
    assert abs(after[8]) < 1e-5
    adapter.save(tmp_path / "nested")
    lora = ml.open(tmp_path / "nested")
    assert (lora.order, lora.can_choose_ranks) == ("weighted", True)
    assert ml.info(lora).errors[2] == pytest.approx(result.errors[2], rel=1e-4)
    loaded = load(half_llama(), tmp_path / "nested")
    assert (loaded.order, loaded.ranks) == ("weighted", adapter.ranks)
    assert divergence(loaded, 2, reference) == pytest.approx(after[2], rel=1e-4)


def test_ranks_are_chosen_by_the_weighted_values_without_data(tmp_path: Path) -> None:
    adapter = small_update()
    result = adapter.reorder(EXAMPLES)
    adapter.save(tmp_path / "nested")
    lora = ml.open(tmp_path / "nested")
    values = {layer.name: layer.weighted_values for layer in lora.layers}
    assert values.keys() == adapter.layers.keys()
    total = sum((value**2).sum() for value in values.values() if value is not None)
    for rank, error in ml.info(lora).weighted_errors.items():
        tails = [(value[rank:] ** 2).sum() for value in values.values() if value is not None]
        assert error == pytest.approx(np.sqrt(sum(tails) / total), abs=1e-5)
    assert ml.info(lora).weighted_errors[2] == pytest.approx(result.weighted_errors[2], rel=1e-5)

    exported = export(tmp_path / "nested", tmp_path / "small", error=0.3)
    kept = [values[name][:rank] for name, rank in exported.ranks.items()]  # type: ignore[index]
    error = np.sqrt(1 - sum((value**2).sum() for value in kept) / total)
    assert exported.weighted_error == pytest.approx(error, abs=1e-5)
    assert error <= 0.3 < exported.errors[max(exported.ranks.values())]
    smaller = {name: rank - 1 for name, rank in exported.ranks.items()}
    missing = sum((values[name][rank:] ** 2).sum() for name, rank in smaller.items())  # type: ignore[index]
    assert np.sqrt(missing / total) > 0.3
    assert ml.info(lora, error=0.3).rank_for_error(0.3) >= max(exported.ranks.values())
    size = lora.truncate(2).file_size
    fitted = export(lora, tmp_path / "fitted", max_bytes=size)
    assert fitted.weighted_error is not None
    assert fitted.weighted_error <= result.weighted_errors[2] + 1e-5


def test_weighted_values_follow_the_verbs(tmp_path: Path) -> None:
    adapter = small_update()
    adapter.reorder(EXAMPLES)
    lora = adapter.to_lora()
    q, v = lora.layers
    assert q.weighted_values is not None
    assert v.weighted_values is not None
    changed = lora.scale({"*v_proj": -0.5}).drop("*q_proj").cast("bf16").truncate(6).truncate(4)
    (layer,) = changed.layers
    np.testing.assert_allclose(layer.weighted_values, v.weighted_values[:4] / 2)
    adapter.save(tmp_path / "nested")
    loaded = load(half_llama(), tmp_path / "nested").to_lora().layers[0]
    np.testing.assert_allclose(loaded.weighted_values, q.weighted_values, rtol=1e-5)
    adapter.reorder()
    assert not adapter.to_lora().weighted_squared_errors()


@pytest.mark.parametrize("values", [None, {}, {"x": 1}, [[1, 2]]])
def test_damaged_weighted_values_make_it_plain_lora(tmp_path: Path, values: Any) -> None:
    adapter = small_update()
    adapter.reorder(EXAMPLES)
    adapter.save(tmp_path / "nested")
    file = tmp_path / "nested" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        record = json.loads(opened.metadata()[NESTING_KEY])
    record["weighted_values"] = values
    save_file(load_file(file), file, {NESTING_KEY: json.dumps(record)})
    with pytest.warns(UserWarning, match="plain LoRA"):
        assert ml.open(tmp_path / "nested").order is None


@pytest.mark.parametrize("target", ["embed_tokens", "unused"])
def test_every_layer_needs_a_gradient(target: str) -> None:
    model: Any = half_llama()
    model.unused = torch.nn.Linear(4, 4)
    config = lora_config(NESTING, target_modules=["q_proj", target])
    adapter = nest_as(get_peft_model(model, config).eval(), NESTING, "lora")
    randomize(adapter.model)
    with pytest.raises(MatryoshkaError, match=target):
        adapter.reorder(EXAMPLES)
    assert adapter.order == "svd"


def test_the_low_ranks_are_trained_from_a_weighted_order() -> None:
    adapter = small_update(size=0.3)
    adapter.reorder(EXAMPLES)
    factors = adapter.factors.copy()
    result = adapter.train_ranks(EXAMPLES, eval_data=EXAMPLES, max_examples=640)
    assert (result.outcome, adapter.order) == ("kept", "weighted")
    for name, pair in adapter.factors.copy().items():
        assert all(map(torch.equal, pair, factors[name]))


def test_layers_without_an_update_stay_as_they_are() -> None:
    adapter = nested_llama(NESTING, "lora", layers=1, target_modules=["q_proj", "down_proj"])
    _, B = adapter.layer_factors()["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        B[:, 2:] = 0
    adapter.reorder(random_examples(8))
    assert adapter.order == "weighted"
    assert not B[:, 2:].any()
    with torch.no_grad():
        B.zero_()
    adapter.reorder(random_examples(8))
    assert not B.any()


@pytest.mark.parametrize("data", ["missing.jsonl", [], [{"input_ids": [1], "labels": [1]}]])
def test_data_that_cannot_be_used_is_an_error_before_anything_is_changed(data: Any) -> None:
    adapter = small_update()
    with pytest.raises(MatryoshkaError):
        adapter.reorder(data)
    assert adapter.order is None
