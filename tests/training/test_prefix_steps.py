"""Steps that train one rank: which ranks, which components move and how far, in which mode."""

from __future__ import annotations

from collections import Counter
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
from matryoshka_lora.training import prefix_steps
from matryoshka_lora.training.data import TrainingData, read_training_data
from matryoshka_lora.training.prefix_steps import rank_schedule, train_prefixes, trainable_factors

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


def train(adapter: NestedAdapter, num_examples: int, data: TrainingData | None = None) -> None:
    with trainable_factors(adapter.layers):
        train_prefixes(adapter.layers, data or data_for(adapter), range(num_examples), seed=0)


def scale_loss(data: TrainingData, scale: float) -> None:
    loss = data.loss
    data.loss = lambda batch: loss(batch) * scale


def fix_schedule(monkeypatch: pytest.MonkeyPatch, ranks: list[int]) -> None:
    monkeypatch.setattr(prefix_steps, "rank_schedule", lambda *args: ranks)


def components(adapter: NestedAdapter) -> list[Tensor]:
    """The rows of A and the columns of B of each layer, as rows."""
    matrices: list[Tensor] = []
    for A, B in adapter.layers.copy_factors().values():
        matrices.append(A)
        matrices.append(B.T)
    return matrices


@given(st.integers(1, 2000), st.integers(1, 16), st.integers(1, 48), st.floats(0, 0.999))
def test_each_rank_gets_its_share_of_the_steps(
    num_steps: int, min_rank: int, num_more: int, phase: float
) -> None:
    max_rank = min_rank + num_more
    ranks = range(min_rank, max_rank + 1)
    schedule = rank_schedule(num_steps, min_rank, max_rank, phase)
    assert schedule == rank_schedule(num_steps, min_rank, max_rank, phase)
    assert len(schedule) == num_steps
    assert set(schedule) <= set(ranks)
    counts = Counter(schedule)
    total_weight = sum(rank**-1.75 for rank in ranks)
    for rank in ranks:
        share = 7 / 8 * rank**-1.75 / total_weight
        if rank == max_rank:
            share += 1 / 8
        assert abs(counts[rank] - share * num_steps) <= 3


@pytest.mark.parametrize(
    ("rank", "reference_layers", "share"),
    [(1, 14, 0.05), (3, 14, 0.05), (8, 14, 0.05), (3, 0.75, 0.025)],
)
def test_a_step_moves_the_first_components_by_a_share_of_their_size(
    monkeypatch: pytest.MonkeyPatch, rank: int, reference_layers: float, share: float
) -> None:
    """Adam's first step is as long as its rate; in four times the layers it is half as long."""
    fix_schedule(monkeypatch, [rank])
    monkeypatch.setattr(prefix_steps, "REFERENCE_LAYERS", reference_layers)
    adapter = ordered_adapter()
    before = components(adapter)
    train(adapter, 16)
    for old, new in zip(before, components(adapter), strict=True):
        sizes = old.square().mean(dim=1).sqrt()
        step = (new - old).abs().median(dim=1).values
        torch.testing.assert_close(step[:rank], share * sizes[:rank])
        torch.testing.assert_close(new[rank:], old[rank:], rtol=1e-6, atol=0)


def test_later_components_fade_out_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a half to nothing in half of the steps."""
    fix_schedule(monkeypatch, [2, 8, 3, 1])
    adapter = ordered_adapter()
    diagonals: list[list[float]] = []
    data = data_for(adapter)
    data.batch_size = 16
    loss = data.loss

    def recording_loss(batch: Any) -> Tensor:
        diagonals.append(adapter.layers.state.overrides[-1].q.tolist())
        return loss(batch)

    data.loss = recording_loss
    train(adapter, 4 * 16, data)
    assert diagonals == [
        [1.0] * 2 + [0.5] * 6,
        [1.0] * 8,
        [1.0] * 3 + [0.0] * 5,
        [1.0] + [0.0] * 7,
    ]


@pytest.mark.parametrize("are_A_zero", [False, True])
def test_components_of_zeros_do_not_become_nan(are_A_zero: bool) -> None:
    """If only B is zero, as after an SVD of a smaller rank, the component still learns."""
    adapter = ordered_adapter()
    factors = adapter.layers.copy_factors()
    for name, (A, B) in factors.items():
        num_nonzero = 0 if "q_proj" in name else 4
        B[:, num_nonzero:] = 0
        if are_A_zero:
            A[num_nonzero:] = 0
    adapter.layers.write_factors(factors)
    train(adapter, 160)
    for name, (A, B) in adapter.layers.copy_factors().items():
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
    """Those of a tiny loss would be 0 without a scale, and those of a huge one infinite with it."""
    fix_schedule(monkeypatch, [8])
    gradients: list[Tensor] = []

    class RecordingAdam(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:
            parameters = self.param_groups[0]["params"]
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))

    monkeypatch.setattr(torch.optim, "Adam", RecordingAdam)
    for dtype in (torch.float32, torch.float16):
        adapter = ordered_adapter()
        for A, B in adapter.layer_factors().values():
            A.data = A.data.to(dtype)
            B.data = B.data.to(dtype)
        data = data_for(adapter)
        scale_loss(data, scale if dtype == torch.float16 else 1.0)
        train(adapter, 16, data)
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
        train(adapter, 24)
        assert num_forwards["norm"] == (6 if checkpointing else 3)
        results.append(copy_lora_parameters(adapter))
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
    with trainable_factors(adapter.layers), torch.no_grad():
        losses = {float(adapter.model(**batch).loss) for _ in range(3)}
    assert len(losses) == 1


@pytest.mark.parametrize("error_type", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_the_factors_are_as_before(error_type: type[BaseException]) -> None:
    adapter = ordered_adapter()
    before = copy_lora_parameters(adapter)

    def train_and_fail() -> None:
        with trainable_factors(adapter.layers):
            train_prefixes(adapter.layers, data_for(adapter), range(32), seed=0)
            assert not all_equal(before, copy_lora_parameters(adapter))
            raise error_type

    with pytest.raises(error_type):
        train_and_fail()
    assert all_equal(before, copy_lora_parameters(adapter))
