"""Steps that train one rank: which ranks, which components move and how far, in which mode."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.examples import (
    all_equal,
    collate,
    copy_lora_parameters,
    lookup_examples,
    random_examples,
)
from helpers.models import nested_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from matryoshka_lora import NestedAdapter, Nesting, NotFiniteError, nest
from matryoshka_lora.training.data import TrainingData, read_training_data
from matryoshka_lora.training.factors import FactorMatrices
from matryoshka_lora.training.train_ranks import (
    Hyperparameters,
    PrefixAdam,
    rank_schedule,
    train_prefixes,
    trainable_factors,
)

EXAMPLES = lookup_examples(400)


def ordered_adapter(dropout: float = 0.0) -> NestedAdapter:
    adapter = nested_llama(
        Nesting((1, 2, 4, 8), "none", 0.7),
        "lora",
        layers=1,
        target_modules=["q_proj", "v_proj", "down_proj"],
        lora_dropout=dropout,
    )
    adapter.reorder()
    return adapter


def data_for(adapter: NestedAdapter) -> TrainingData:
    data = read_training_data(adapter.model, EXAMPLES)
    data.show_progress = False
    return data


def train(
    adapter: NestedAdapter,
    num_examples: int,
    data: TrainingData | None = None,
    ranks: Sequence[int] = (1, 2, 3, 4),
    hyperparameters: Hyperparameters | None = None,
) -> FactorMatrices:
    """Return the trained factors."""
    with trainable_factors(adapter.factors):
        trained, examples_by_rank, _ = train_prefixes(
            adapter.factors,
            ranks,
            data or data_for(adapter),
            range(num_examples),
            0,
            hyperparameters or Hyperparameters(),
        )
    assert sum(examples_by_rank.values()) == num_examples
    return trained


def scale_loss(data: TrainingData, scale: float) -> None:
    loss = data.loss
    data.loss = lambda batch: loss(batch) * scale


def components(factors: FactorMatrices) -> list[Tensor]:
    """The rows of A and the columns of B of each layer, as rows."""
    matrices: list[Tensor] = []
    for A, B in factors.values():
        matrices.append(A)
        matrices.append(B.T)
    return matrices


@pytest.mark.parametrize(
    ("rank", "reference_layers", "share"),
    [(1, 14, 0.1), (3, 14, 0.1 * 3**-0.3), (8, 14, 0.1 * 8**-0.3), (1, 0.75, 0.05)],
)
def test_a_step_moves_the_first_components_by_a_share_of_their_size(
    rank: int, reference_layers: float, share: float
) -> None:
    """Adam's first step is as long as its rate; in four times the layers it is half as long."""
    adapter = ordered_adapter()
    before = components(adapter.factors.copy(rank))
    hyperparameters = Hyperparameters(reference_layers=reference_layers)
    trained = train(adapter, 8, ranks=[rank], hyperparameters=hyperparameters)
    for old, new in zip(before, components(trained), strict=True):
        sizes = old.square().mean(dim=1).sqrt()
        step = (new - old).abs().median(dim=1).values
        torch.testing.assert_close(step, share * sizes)


@pytest.mark.parametrize("ranks", [[4, 4, 4], [4, 1, 2, 2, 4, 3, 1]], ids=str)
def test_each_component_is_updated_by_an_adam_of_its_own(ranks: list[int]) -> None:
    """PyTorch's, which only sees the steps that train the component."""
    torch.manual_seed(0)
    A = torch.randn(4, 6)
    B = torch.randn(5, 4)
    gradients = [(torch.randn(4, 6), torch.randn(5, 4)) for _ in ranks]
    optimizer = PrefixAdam({"layer": (A, B)}, epsilon=1e-8)
    expected: list[Tensor] = []
    adams: list[torch.optim.Adam] = []
    for component in (*A, *B.T):
        parameter = component / component.square().mean().sqrt()
        expected.append(parameter)
        adams.append(torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.99)))
    for rank, (grad_A, grad_B) in zip(ranks, gradients, strict=True):
        optimizer.step({"layer": (grad_A[:rank], grad_B[:, :rank])}, learning_rate=0.1)
        for index, gradient in enumerate((*grad_A, *grad_B.T)):
            if index % 4 < rank:
                component = (*A, *B.T)[index]
                expected[index].grad = gradient * component.square().mean().sqrt()
                adams[index].step()
    new_A, new_B = optimizer.factors()["layer"]
    for index, component in enumerate((*A, *B.T)):
        size = component.square().mean().sqrt()
        actual = (*new_A, *new_B.T)[index]
        torch.testing.assert_close(actual, expected[index] * size)


def test_later_components_fade_out_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a half to nothing in half of the steps."""
    adapter = ordered_adapter()
    data = data_for(adapter)
    loss = data.loss
    _, B = next(iter(adapter.layer_factors().values()))
    before = B.detach().clone()
    weights: list[list[float]] = []

    def recording_loss(batch: Any) -> Tensor:
        weights.append((B.detach() / before).median(dim=0).values.tolist())
        return loss(batch)

    data.loss = recording_loss
    ranks = iter([2, 8, 3, 1])
    monkeypatch.setattr("matryoshka_lora.training.train_ranks.rank_schedule", lambda *args: ranks)
    options = Hyperparameters(learning_rate=0.0)
    train(adapter, 4 * 8, data, range(1, 9), options)
    torch.testing.assert_close(
        weights,
        [[1.0] * 2 + [0.5] * 6, [1.0] * 8, [1.0] * 3 + [0.0] * 5, [1.0] + [0.0] * 7],
    )


@pytest.mark.parametrize("are_A_zero", [False, True])
def test_components_of_zeros_do_not_become_nan(are_A_zero: bool) -> None:
    """If only B is zero, as after an SVD of a smaller rank, the component still learns."""
    adapter = ordered_adapter()
    factors = adapter.factors.copy()
    for name, (A, B) in factors.items():
        num_nonzero = 0 if "q_proj" in name else 4
        B[:, num_nonzero:] = 0
        if are_A_zero:
            A[num_nonzero:] = 0
    adapter.factors.write(factors)
    for name, (A, B) in train(adapter, 160, ranks=range(1, 9)).items():
        assert A.isfinite().all()
        assert B.isfinite().all()
        learns_first = not (are_A_zero and "q_proj" in name)
        assert bool((B[:, 0] != 0).any()) == learns_first
        assert bool((B[:, 4:] != 0).any()) == (not are_A_zero)


@pytest.mark.parametrize(
    ("scale", "tolerance"), [(1e-6, 0.2), (1.0, 0.02), (1e5, 0.02)], ids=["tiny", "one", "huge"]
)
def test_gradients_in_float16_neither_vanish_nor_overflow(
    monkeypatch: pytest.MonkeyPatch, scale: float, tolerance: float
) -> None:
    """Without a scale, a tiny loss has gradients of 0; with it, a huge loss has infinite ones."""
    gradients: list[Tensor] = []

    def record_step(optimizer: PrefixAdam, factors: Any, learning_rate: float) -> None:
        gradients.append(torch.cat([grad.flatten() for pair in factors.values() for grad in pair]))

    monkeypatch.setattr(PrefixAdam, "step", record_step)
    for dtype in (torch.float32, torch.float16):
        adapter = ordered_adapter()
        for A, B in adapter.layer_factors().values():
            A.data = A.data.to(dtype)
            B.data = B.data.to(dtype)
        data = data_for(adapter)
        scale_loss(data, scale if dtype == torch.float16 else 1.0)
        train(adapter, 8, data, ranks=[8])
    expected, actual = gradients
    assert actual.dtype == torch.float32
    assert torch.dist(actual / scale, expected) < tolerance * expected.norm()


@pytest.mark.parametrize("kind", ["loss", "Gradients"])
def test_a_loss_or_gradient_that_is_not_finite_is_an_error(kind: str) -> None:
    adapter = ordered_adapter()
    before = copy_lora_parameters(adapter)
    data = data_for(adapter)
    loss = data.loss

    def broken_loss(batch: Any) -> Tensor:
        value = loss(batch)
        if kind == "loss":
            return value * float("inf")
        return value + (value - value.detach()).sqrt()  # the derivative at 0 is infinite

    data.loss = broken_loss
    with pytest.raises(NotFiniteError, match=kind):
        train(adapter, 16, data)
    assert all_equal(before, copy_lora_parameters(adapter))


# Modes


def test_dropout_is_off_and_checkpointed_layers_are_computed_again() -> None:
    results: list[list[Tensor]] = []
    for checkpointing, dropout in ((False, 0.0), (True, 0.0), (False, 0.5), (True, 0.5)):
        adapter = ordered_adapter(dropout)
        before = copy_lora_parameters(adapter)
        base: Any = adapter.model.get_base_model()
        for layer in base.model.layers:
            layer.self_attn.attention_dropout = dropout
        if checkpointing:
            base.gradient_checkpointing_enable()
            adapter.model.enable_input_require_grads()
        num_forwards = Counter[str]()
        norm = base.model.layers[0].input_layernorm
        norm.register_forward_hook(lambda *args, counter=num_forwards: counter.update(["norm"]))
        adapter.model.train()
        trained = train(adapter, 24)
        assert num_forwards["norm"] == (6 if checkpointing else 3)
        assert all_equal(before, copy_lora_parameters(adapter))
        results.append([factor for pair in trained.values() for factor in pair])
        assert not all_equal(before, results[-1])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_layers_that_call_dropout_as_a_function_are_deterministic() -> None:
    config = OPTConfig(
        vocab_size=96,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        dropout=0.5,
    )
    base = OPTForCausalLM(config)
    base.gradient_checkpointing_enable()
    adapter = nest(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])))
    batch = collate(random_examples(8))
    with trainable_factors(adapter.factors), torch.no_grad():
        losses = {float(adapter.model(**batch).loss) for _ in range(3)}
    assert len(losses) == 1


# Which rank each step trains


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(1, 1000), st.integers(0, 99))
def test_each_rank_gets_its_share_of_the_steps(
    weights: list[float], num_steps: int, seed: int
) -> None:
    total = sum(weights) + 0.1
    shares = {rank: weight / total for rank, weight in enumerate([*weights, 0.1], 1)}
    schedule = rank_schedule(shares, seed)
    counts = Counter(itertools.islice(schedule, num_steps))
    assert set(counts) <= set(shares)
    for rank, share in shares.items():
        assert abs(counts[rank] - share * num_steps) <= 4
