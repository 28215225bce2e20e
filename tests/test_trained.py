"""Each rank trained by itself: it loses less, and what no rank trains stays as it was."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import nest_as, nested_layer, nested_llama, randomize, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from some_rows import all_factors, loss_of, products, same_bits, some_rows, trainer_of
from torch import Tensor

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, NotFiniteError
from matryoshka_lora.reordering import trained
from matryoshka_lora.reordering.rows import Rows, read_data
from matryoshka_lora.reordering.trained import share_out, train_ranks

NESTING = Nesting((1, 2, 4, 8), "none", 0.7)
TRAIN, HELD_OUT = some_rows(64), some_rows(32, seed=1)


def small(**lora: Any) -> NestedAdapter:
    """A few layers, since each step takes time by their number."""
    chosen = {"target_modules": ["q_proj", "v_proj", "down_proj"], **lora}
    return nested_llama(NESTING, "lora", layers=1, **chosen)


def reordered(**lora: Any) -> NestedAdapter:
    adapter = small(**lora)
    adapter.reorder()
    return adapter


def rows_for(adapter: NestedAdapter, rate: float = 2e-2) -> Rows:
    """Rows with others that judge, at a rate that shows in few steps."""
    rows = read_data(adapter.model, TRAIN)
    rows.rate, rows.quiet = rate, True
    rows.held_out = read_data(adapter.model, HELD_OUT)
    return rows


@given(st.integers(1, 500), st.integers(1, 8))
def test_steps_are_shared_out(steps: int, count: int) -> None:
    """Each rank gets 0.6 times what the one before has, but for rounding, and nothing is lost."""
    found = share_out(steps, [2**number for number in range(count)])
    assert list(found) == [2**number for number in range(count)]
    assert [step for share in found.values() for step in share] == list(range(steps))
    first = steps * 0.4 / (1 - 0.6**count)
    for number, share in enumerate(found.values()):
        assert abs(len(share) - first * 0.6**number) <= 1 + 1e-6


@pytest.fixture(scope="module")
def before_and_after() -> tuple[Any, NestedAdapter, dict[int, float]]:
    """An adapter before and after, and the held-out losses before."""
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    before = {rank: products(adapter, rank) for rank in range(1, 9)}
    losses = {rank: loss_of(adapter, HELD_OUT, rank) for rank in NESTING.ranks}
    assert train_ranks(adapter, rows_for(adapter), 320)
    return before, adapter, losses


def test_every_trained_rank_loses_less_on_held_out_rows(before_and_after: Any) -> None:
    _, adapter, losses = before_and_after
    for rank in NESTING.ranks[:-1]:
        assert loss_of(adapter, HELD_OUT, rank) < losses[rank] - 0.1


def test_the_full_rank_loses_its_smallest_directions_alone(before_and_after: Any) -> None:
    """The last block is the best that its columns can do for what the others leave."""
    before, adapter, _ = before_and_after
    moved = 0.0
    for name, found in products(adapter, 8).items():
        below, whole = products(adapter, 4)[name], before[8][name]
        u, s, v = np.linalg.svd(whole - below)
        np.testing.assert_allclose(found - below, (u[:, :4] * s[:4]) @ v[:4], atol=1e-4)
        moved = max(moved, float(np.abs(below - before[4][name]).max()))
    assert moved > 1e-2


def test_ranks_between_nested_ones_are_the_best_of_their_block(before_and_after: Any) -> None:
    _, adapter, _ = before_and_after
    three, two, four = (products(adapter, rank) for rank in (3, 2, 4))
    for name in three:
        u, s, v = np.linalg.svd(four[name] - two[name])
        best = s[0] * np.outer(u[:, 0], v[0])
        np.testing.assert_allclose(three[name] - two[name], best, atol=1e-4)


def test_without_a_rate_it_is_the_svd() -> None:
    """A block begins as the best of what is left, so at rate 0 nothing changes."""
    adapter = reordered()
    rows = rows_for(adapter, 0.0)
    run = trained._Run(adapter, rows, range(16), rows.batches(range(2)))
    before = {rank: products(adapter, rank) for rank in NESTING.ranks}
    with trained.descending(adapter):
        run.train({1: range(1), 2: range(1, 2), 4: range(2, 2)})
    for rank in NESTING.ranks:
        for name, found in products(adapter, rank).items():
            np.testing.assert_allclose(found, before[rank][name], atol=1e-4)


@pytest.mark.parametrize(
    ("uphill", "most_lost", "message"),
    [(True, 0.02, "not kept: on rows that they were not trained on"), (False, -9.0, "rank 8 by")],
)
def test_what_loses_more_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, uphill: bool, most_lost: float, message: str
) -> None:
    """Gradients that lead uphill, and a rank R that is given away for the others."""
    adapter = reordered()
    before, rows = all_factors(adapter), rows_for(adapter)
    downhill = rows.loss
    rows.loss = lambda batch: downhill(batch) * (-1 if uphill and torch.is_grad_enabled() else 1)
    monkeypatch.setattr(trained, "MOST_LOST", most_lost)
    with pytest.warns(UserWarning, match=message):
        assert not train_ranks(adapter, rows, 80)
    assert same_bits(before, all_factors(adapter))


def test_factors_of_training_are_reordered_first_and_what_is_kept_names_the_order(
    tmp_path: Path,
) -> None:
    adapter = nested_llama(NESTING, "matryoshka", layers=1)
    trainer = trainer_of(adapter.model, tmp_path, TRAIN, HELD_OUT, learning_rate=0.0)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        whole = adapter.model.train()(input_ids=ids).logits
    with pytest.warns(UserWarning, match="not kept"):
        adapter.reorder("trained", trainer, rows=16)
    assert adapter.order == "svd"
    with torch.no_grad():
        torch.testing.assert_close(adapter.model(input_ids=ids).logits, whole, rtol=0, atol=1e-3)
    trainer.args.learning_rate, before = 2e-2, products(adapter, 8)
    values = adapter.reorder("trained", trainer, rows=160)
    assert adapter.order == "trained"
    assert adapter.model.training
    for name, update in before.items():
        wanted = np.linalg.svd(update, compute_uv=False)[:8] * 0.7
        np.testing.assert_allclose(values[name], wanted, rtol=1e-3)


@pytest.mark.parametrize("kind", ["Embedding", "Conv2d", "Conv1D", "Linear"])
def test_every_kind_of_layer_is_trained(kind: str) -> None:
    """Towards random outputs: the prefixes come nearer to them."""
    layer = nested_layer(kind, Nesting((1, 2, 4)), "lora")
    layer.adapter.reorder()
    x = layer.kind.batch(16)
    with torch.no_grad():
        outputs = layer.adapter.model(x)
    target = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)

    def loss(batch: Any) -> Tensor:
        error = layer.adapter.model(batch["x"]) - batch["labels"]
        return (error**2).mean()

    def collate(numbers: list[int]) -> Any:
        return {"x": x[numbers], "labels": target[numbers]}

    rows = Rows(range(16), collate, loss, x.device, rate=0.05, quiet=True)
    rows.held_out = Rows(range(16), collate, loss, x.device)
    (before,) = products(layer.adapter, 1).values()
    assert train_ranks(layer.adapter, rows, 80)
    (after,) = products(layer.adapter, 1).values()
    assert np.abs(after - before).max() > 1e-2


# Whatever happens, the model is as it was.


def failing(rows: Rows, error: BaseException | None, at: int) -> Rows:
    """The same rows, of which the loss fails at some call; None makes it NaN."""
    loss, calls = rows.loss, iter(range(10**6))

    def fail(batch: Any) -> Any:
        if next(calls) < at:
            return loss(batch)
        if error is not None:
            raise error
        return loss(batch) * float("nan")

    rows.loss = fail
    return rows


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (None, NotFiniteError),
        (RuntimeError("x"), RuntimeError),
        (KeyboardInterrupt(), BaseException),
    ],
    ids=["nan", "error", "ctrl-c"],
)
@pytest.mark.parametrize("at", [2, 16])
def test_an_end_before_its_time_leaves_everything(at: int, error: Any, wanted: Any) -> None:
    """While the rows are judged, and in the second step."""
    adapter = reordered(lora_dropout=0.1)
    adapter.model.train()
    adapter.model.get_base_model().model.layers[0].eval()
    frozen = next(p for n, p in adapter.model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)

    def state() -> Any:
        modes = [module.training for module in adapter.model.modules()]
        flags = [parameter.requires_grad for parameter in adapter.model.parameters()]
        return modes, flags, torch.get_rng_state().tolist(), random.getstate()

    before, factors = state(), all_factors(adapter)
    with pytest.raises(wanted):
        train_ranks(adapter, failing(rows_for(adapter), error, at), 80)
    assert same_bits(factors, all_factors(adapter))
    assert state() == before
    assert all(parameter.grad is None for parameter in adapter.model.parameters())
    train_ranks(adapter, rows_for(adapter), 80)
    assert not same_bits(factors, all_factors(adapter))
    assert state() == before


def test_gradients_that_are_not_finite_name_the_way_out() -> None:
    adapter = reordered()
    rows = rows_for(adapter)
    loss = rows.loss
    rows.loss = lambda batch: loss(batch) + (loss(batch) - loss(batch).detach()).sqrt()
    with pytest.raises(
        NotFiniteError, match=r"gradients are NaN or infinite: load the base model in"
    ):
        train_ranks(adapter, rows, 8)


def test_one_rank_and_few_rows_are_refused() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    one = nest_as(get_peft_model(tiny_llama(), config), Nesting((4,)), "lora")
    with pytest.raises(MatryoshkaError, match="the only nested rank"):
        one.reorder("trained", TRAIN)
    adapter = reordered()
    for rows in (TRAIN[:15], TRAIN[:1] * 40):
        with pytest.raises(MatryoshkaError, match="rows are too few, or too much alike"):
            adapter.reorder("trained", rows)


def test_dropout_takes_no_part_and_checkpointed_layers_are_computed_again() -> None:
    found = []
    for checkpointing, dropout in ((False, 0.0), (True, 0.0), (False, 0.5), (True, 0.5)):
        adapter = reordered(lora_dropout=dropout)
        base: Any = adapter.model.get_base_model()
        for layer in base.model.layers:
            layer.self_attn.attention_dropout = dropout
        if checkpointing:
            base.gradient_checkpointing_enable()
            adapter.model.enable_input_require_grads()
        forwards: list[int] = []
        norm = base.model.layers[0].input_layernorm
        norm.register_forward_hook(lambda *_, seen=forwards: seen.append(torch.is_grad_enabled()))
        adapter.model.train()
        train_ranks(adapter, rows_for(adapter), 24)
        assert sum(forwards) == 3 * (1 + checkpointing)
        found.append(all_factors(adapter))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-5)


def test_half_precision_factors_are_trained_in_float32(tmp_path: Path) -> None:
    """In float16, Adam's epsilon is 0 and its steps are NaN."""
    adapter = small()
    for name, parameter in adapter.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    adapter.reorder()
    before = [loss_of(adapter, HELD_OUT, rank) for rank in NESTING.ranks[:-1]]
    adapter.reorder("trained", trainer_of(adapter.model, tmp_path, TRAIN, HELD_OUT), rows=160)
    after = [loss_of(adapter, HELD_OUT, rank) for rank in NESTING.ranks[:-1]]
    assert adapter.order == "trained"
    assert all(new < old - 0.1 for new, old in zip(after, before, strict=True))
    assert {factor.dtype for factor in all_factors(adapter)} == {torch.float16}


# The rows that judge.


def test_rows_that_judge_are_never_trained_on(tmp_path: Path) -> None:
    """Five rounds of the data, of which one row comes twice."""
    adapter = small()
    rows = [*TRAIN, TRAIN[3]]
    trainer = trainer_of(adapter.model, tmp_path, rows)
    adapter.reorder("trained", trainer, rows=5 * len(rows))
    judged, taught = set(trainer.judged), set(trainer.taught)
    assert len(judged) == len(rows) // 8
    assert len(taught) == len(TRAIN) - len(judged)
    assert not judged & taught


def test_noise_is_not_accepted(tmp_path: Path) -> None:
    """Its answers are drawn at random, so that nothing but themselves can be known."""
    base = tiny_llama(initializer_range=0.02, num_hidden_layers=1)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    randomize(model, size=0.02)
    adapter = nest_as(model, Nesting((1, 2, 4, 8)), "lora")
    noise = some_rows(100, seed=3, answers=range(96))
    trainer = trainer_of(model, tmp_path, noise, learning_rate=3e-2)
    with pytest.warns(UserWarning, match="not kept"):
        adapter.reorder("trained", trainer, rows=800)
    assert adapter.order == "svd"


def test_half_of_the_rows_of_training_are_taken(tmp_path: Path) -> None:
    adapter = small()
    trainer = trainer_of(adapter.model, tmp_path, TRAIN, HELD_OUT, max_steps=4)
    trainer.train()
    trainer.taught.clear()
    adapter.reorder("trained", trainer)
    assert len(trainer.taught) == 4 * 8 // 2
