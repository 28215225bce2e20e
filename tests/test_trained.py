"""Each rank trained by itself: it loses less, and what no rank trains stays as it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import nest_as, nested_llama, randomize, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from some_rows import all_factors, loss_of, products, same_bits, some_rows, trainer_of

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, NotFiniteError
from matryoshka_lora.reordering import descent, trained
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
    assert sum(found.values()) == steps
    first = steps * 0.4 / (1 - 0.6**count)
    for number, share in enumerate(found.values()):
        assert abs(share - first * 0.6**number) <= 1 + 1e-6


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
    run = trained._Run(adapter, rows_for(adapter, 0.0), list(range(16)), [0, 1])
    before = {rank: products(adapter, rank) for rank in NESTING.ranks}
    with descent.descending(adapter):
        run.train({1: 1, 2: 1, 4: 0})
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


def test_the_order_is_named_by_what_is_kept(tmp_path: Path) -> None:
    adapter = small()
    trainer = trainer_of(adapter.model, tmp_path, TRAIN, HELD_OUT)
    adapter.reorder("trained", trainer, rows=160)
    assert adapter.order == "trained"
    trainer.args.learning_rate = 0.0
    with pytest.warns(UserWarning, match="not kept"):
        adapter.reorder("trained", trainer, rows=16)
    assert adapter.order == "svd"


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
@pytest.mark.parametrize("order", ["learned", "trained"])
def test_an_end_before_its_time_leaves_everything(order: str, error: Any, wanted: Any) -> None:
    from matryoshka_lora.reordering.learned import learn

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
        (learn if order == "learned" else train_ranks)(
            adapter, failing(rows_for(adapter), error, at=12), 80
        )
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
    judged, learned = set(trainer.judged), set(trainer.learned)
    assert len(judged) == len(rows) // 8
    assert len(learned) == len(TRAIN) - len(judged)
    assert not judged & learned


def test_noise_is_not_accepted(tmp_path: Path) -> None:
    """Its answers are drawn at random, so that they can be learned by heart alone."""
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
    trainer.learned.clear()
    adapter.reorder("trained", trainer)
    assert len(trainer.learned) == 4 * 8 // 2


# The checkpoint.


def trained_to(
    kill_at: int | None, file: Path | None, rate: float = 2e-2, size: float = 0.3
) -> tuple[list[Any], int]:
    """What 20 steps make of an adapter, and how many of them were made."""
    adapter = small()
    randomize(adapter.model, size=size)
    adapter.reorder()
    rows, steps = rows_for(adapter, rate), []
    loss = rows.loss

    def counted(batch: Any) -> Any:
        if torch.is_grad_enabled():
            steps.append(1)
            if len(steps) == kill_at:
                raise KeyboardInterrupt
        return loss(batch)

    rows.loss = counted
    try:
        train_ranks(adapter, rows, 160, checkpoint=file)
    except KeyboardInterrupt:
        assert kill_at is not None
    return all_factors(adapter), len(steps)


@pytest.fixture(scope="module")
def unbroken() -> list[Any]:
    return trained_to(None, None)[0]


@pytest.mark.parametrize(
    ("seconds", "kill_at", "left"),
    [(0.0, 2, 19), (0.0, 11, 10), (0.0, 20, 1), (1e9, 10, 20), (1e9, 18, 20 - 16)],
)
def test_a_killed_training_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: Any, unbroken: Any, seconds: float, kill_at: int, left: int
) -> None:
    """With a file of each step, or of each block: they have 10, 6 and 4 steps."""
    monkeypatch.setattr(trained, "SECONDS", seconds)
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)
    trained_to(kill_at, tmp_path / "file")
    found, steps = trained_to(None, tmp_path / "file")
    assert steps == left
    assert same_bits(found, unbroken)
    assert not list(tmp_path.glob("*new"))


@pytest.mark.filterwarnings("ignore:the trained ranks")
@pytest.mark.parametrize("other", [{"rate": 1e-2}, {"size": 0.31}], ids=["rate", "factors"])
def test_the_checkpoint_of_other_settings_or_factors_counts_as_none(
    tmp_path: Path, unbroken: Any, other: Any
) -> None:
    trained_to(3, tmp_path / "file", **other)
    with pytest.warns(UserWarning, match="file is of other rows, settings or factors"):
        found, steps = trained_to(None, tmp_path / "file")
    assert steps == 20
    assert same_bits(found, unbroken)


@pytest.mark.filterwarnings("ignore:.* is of other rows", "ignore:(the|these) trained ranks")
def test_a_checkpoint_of_permuted_labels_is_not_taken(tmp_path: Path) -> None:
    """The rows that judge are the same."""
    steps = []
    for answers in ((50, 51), (60, 61)):
        adapter = small()
        rows = some_rows(64, answers=answers)
        trainer = trainer_of(adapter.model, tmp_path, rows, HELD_OUT, learning_rate=1e-3)
        adapter.reorder("trained", trainer, rows=80, checkpoint=tmp_path / "file")
        steps.append(len(trainer.__dict__.get("learned", ())))
    assert steps == [80, 80]


def test_a_file_that_is_no_checkpoint_stays(tmp_path: Path) -> None:
    adapter, file = reordered(), tmp_path / "file"
    for write in (
        lambda: file.write_bytes(b"no tensors"),
        lambda: save_file({"weight": torch.ones(2)}, file),
    ):
        write()
        before = file.read_bytes()
        with pytest.raises(MatryoshkaError, match="file is no checkpoint of 'trained'"):
            train_ranks(adapter, rows_for(adapter), 80, checkpoint=file)
        assert file.read_bytes() == before
    assert list(load_file(file)) == ["weight"]


KILLED = """
import os, signal, sys
from pathlib import Path
from matryoshka_lora.reordering import descent, trained
from test_trained import trained_to

trained.SECONDS, save, times = 0.0, trained._Run._save, []

def killed(*arguments):
    save(*arguments)
    times.append(0)
    if len(times) == 7:
        os.kill(os.getpid(), signal.SIGKILL)

trained._Run._save = killed
trained_to(None, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_checkpoint(tmp_path: Path, unbroken: Any) -> None:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "file")]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert ended.returncode == -signal.SIGKILL
    found, steps = trained_to(None, tmp_path / "file")
    assert steps == 20 - 7
    assert same_bits(found, unbroken)
