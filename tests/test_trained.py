"""Ranks trained one at a step: they lose less, and what is not behind or not better stays."""

from __future__ import annotations

import io
import math
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import nest_as, nested_layer, nested_llama, randomize, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from some_rows import Row, all_factors, collate, loss_of, same_bits, some_rows, trainer_of
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import OPTConfig, OPTForCausalLM

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, NotFiniteError, nest
from matryoshka_lora.files.peft import open_adapter
from matryoshka_lora.reordering import trained
from matryoshka_lora.reordering.data import Data, read_data
from matryoshka_lora.reordering.trained import MUCH, ranks_of_steps, train_ranks

NESTING = Nesting((1, 2, 4, 8), "none", 0.7)


def looked_up(count: int, seed: int = 0) -> list[Row]:
    """Rows of which the last token before the answer alone decides it: rank matters, and others
    can judge."""
    draw, rows = random.Random(99), some_rows(count, seed)
    answers = [[draw.randrange(50, 90) for _ in range(2)] for _ in range(8)]
    for row in rows:
        answer = answers[row["input_ids"][3] % 8]
        row["input_ids"][4:] = row["labels"][4:] = answer
    return rows


TRAIN, HELD_OUT = looked_up(800), looked_up(64, seed=1)


@cache
def trained_factors(rule: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of an adapter whose rank R knows a part of the answers."""
    adapter = untrained(rule)
    randomize(adapter.model, size=0.05)
    factors = [factor for pair in adapter.parameters().values() for factor in pair]
    adam = torch.optim.Adam(factors, lr=5e-3)
    adapter.model.train()
    for step in range(60):
        adam.zero_grad()
        batch = collate([TRAIN[(step * 80 + number) % len(TRAIN)] for number in range(80)])
        adapter.model(**batch).loss.backward()
        adam.step()
    return adapter.factors()


def untrained(rule: str, **lora: Any) -> NestedAdapter:
    """A few layers, since each step takes time by their number."""
    chosen = {"target_modules": ["q_proj", "v_proj", "down_proj"], **lora}
    return nested_llama(NESTING, rule, layers=1, **chosen)


def small(rule: str = "lora", **lora: Any) -> NestedAdapter:
    """An adapter whose small ranks are far behind rank R."""
    adapter = untrained(rule, **lora)
    adapter.put_factors(trained_factors(rule))
    return adapter


def reordered(**lora: Any) -> NestedAdapter:
    adapter = small(**lora)
    adapter.reorder()
    return adapter


def shrunk(share: float) -> NestedAdapter:
    """All columns but the first are so many times as large, so the ranks are less behind."""
    adapter = reordered()
    shares = torch.tensor([1.0] + [share] * 7)
    adapter.put_factors({name: (A, B * shares) for name, (A, B) in adapter.factors().items()})
    adapter.mark_ordered("svd")
    return adapter


def data_for(adapter: NestedAdapter, held_out: list[Row] = HELD_OUT) -> Data:
    """Rows, and others that judge."""
    data = read_data(adapter.model, TRAIN)
    data.quiet, data.held_out = True, read_data(adapter.model, held_out)
    return data


def with_gradients(data: Data) -> list[int]:
    """Return a list that gets the number of rows of each loss with gradients, from now on."""
    seen, loss = [], data.loss

    def watched(batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(len(batch["labels"]))
        return loss(batch)

    data.loss = watched
    return seen


def descend(adapter: NestedAdapter, data: Data, count: int, seed: int = 0) -> None:
    """Train on some rows, without a judge."""
    with trained.descending(adapter):
        trained._descend(adapter, data, range(count), seed)


@pytest.fixture
def accepting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rank R lose what it will, so that few steps are enough to be kept."""
    monkeypatch.setattr(trained, "MOST_LOST", 9.0)


# Which ranks are trained, and for how long.


@given(st.integers(1, 2000), st.integers(1, 16), st.integers(1, 48), st.floats(0, 0.999))
def test_each_rank_comes_as_often_as_its_share(
    steps: int, least: int, more: int, phase: float
) -> None:
    top = least + more
    found = ranks_of_steps(steps, least, top, phase)
    assert found == ranks_of_steps(steps, least, top, phase)
    assert len(found) == steps
    assert set(found) <= set(range(least, top + 1))
    weights = {rank: rank**-1.75 for rank in range(least, top + 1)}
    shares = {rank: 7 / 8 * weight / sum(weights.values()) for rank, weight in weights.items()}
    shares[top] += 1 / 8
    counts = Counter(found)
    for rank, share in shares.items():
        assert abs(counts[rank] - share * steps) <= 3


def test_every_rank_loses_less_on_held_out_rows() -> None:
    """Rank 3 too, which is not nested; and rank R does not lose much more."""
    adapter = reordered()
    before = {rank: loss_of(adapter, HELD_OUT, rank) for rank in range(1, 9)}
    assert train_ranks(adapter, data_for(adapter), 640)
    more = {rank: loss_of(adapter, HELD_OUT, rank) - before[rank] for rank in before}
    assert all(more[rank] < -0.1 for rank in (1, 2, 3, 4))
    assert all(more[rank] <= 0.02 * max(1, before[rank]) for rank in (5, 6, 7, 8))


@pytest.mark.parametrize("why", ["all-is-in-rank-1", "noise"])
def test_what_is_not_behind_is_not_trained(why: str) -> None:
    """The later columns are zeros; or no rank knows the answers, which are drawn at random."""
    adapter = shrunk(0.0 if why == "all-is-in-rank-1" else 1.0)
    noise = some_rows(64, seed=3, answers=range(50, 90))
    data = data_for(adapter, HELD_OUT if why == "all-is-in-rank-1" else noise)
    before, steps = all_factors(adapter), with_gradients(data)
    with pytest.warns(UserWarning, match="no rank is 0.02 nats behind 8, so none is trained"):
        assert not train_ranks(adapter, data, 80)
    assert not steps
    assert same_bits(before, all_factors(adapter))
    assert adapter.order == "svd"


@pytest.mark.filterwarnings("ignore:the trained ranks are not kept")
@pytest.mark.parametrize("share", [1.0, 0.2, 0.05])
def test_what_is_less_behind_is_trained_on_fewer_rows_unless_they_are_said(share: float) -> None:
    adapter = shrunk(share)
    behind = loss_of(adapter, HELD_OUT, 1) - loss_of(adapter, HELD_OUT, 8)
    data, start = data_for(adapter), adapter.factors()
    data.seen, seen = 400, with_gradients(data)
    train_ranks(adapter, data)
    assert sum(seen) == math.ceil(200 * min(behind / MUCH, 1))
    adapter.put_factors(start)
    seen.clear()
    train_ranks(adapter, data, 48)
    assert sum(seen) == 48
    assert (behind > MUCH) == (share == 1)
    assert behind > 0.05


# A step.


@pytest.mark.parametrize(("rank", "many"), [(1, False), (3, False), (8, False), (3, True)])
def test_a_step_moves_the_first_columns_by_a_share_of_their_size(
    monkeypatch: pytest.MonkeyPatch, rank: int, many: bool
) -> None:
    """Adam's first step is as long as its rate where there is a gradient; less in many layers."""
    monkeypatch.setattr(trained, "ranks_of_steps", lambda *_: [rank])
    adapter = reordered()
    before, share = adapter.factors(), 0.05
    if many:
        monkeypatch.setattr(trained, "LAYERS", len(before) / 4)
        share /= 2
    descend(adapter, data_for(adapter), 16)
    for name, factors in adapter.factors().items():
        for old, new in zip(before[name], factors, strict=True):
            columns = old if len(old) == 8 else old.T
            moved = ((new if len(new) == 8 else new.T) - columns).abs()
            size = columns.square().mean(1).sqrt()
            torch.testing.assert_close(moved[:rank].median(1).values, share * size[:rank])
            assert (moved[rank:] <= 1e-6 * columns[rank:].abs()).all()


def test_later_columns_fade_out_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a half to nothing in half of the steps."""
    monkeypatch.setattr(trained, "ranks_of_steps", lambda *_: [2, 8, 3, 1])
    adapter = reordered()
    seen, override = [], adapter.override
    monkeypatch.setattr(adapter, "override", lambda q: seen.append(q.tolist()) or override(q))
    descend(adapter, data_for(adapter), 4 * 16)
    assert seen == [[1.0] * n + [q] * (8 - n) for n, q in ((2, 0.5), (8, 0.25), (3, 0.0), (1, 0.0))]


@pytest.mark.parametrize("both", [False, True], ids=["B", "A-and-B"])
def test_columns_of_zeros_give_no_nan(both: bool) -> None:
    """Where only B is zero, as the SVD leaves what an update lacks, the column still learns."""
    adapter = small()
    first = torch.tensor([1.0] * 4 + [0.0] * 4)
    zeros = {n: (A, B * (0 if "q_proj" in n else first)) for n, (A, B) in adapter.factors().items()}
    adapter.put_factors(zeros)
    adapter.reorder()
    if both:
        kept = {n: (A * (B != 0).any(0)[:, None], B) for n, (A, B) in adapter.factors().items()}
        adapter.put_factors(kept)
    descend(adapter, data_for(adapter), 160)
    for name, (A, B) in adapter.factors().items():
        assert A.isfinite().all()
        assert B.isfinite().all()
        assert (B[:, 0] != 0).any() != (both and "q_proj" in name)
        assert (B[:, 4:] != 0).any() != both


@pytest.mark.parametrize(("factor", "tolerance"), [(1e-6, 0.2), (1.0, 0.02), (1e5, 0.02)])
def test_gradients_in_float16_neither_vanish_nor_overflow(factor: float, tolerance: float) -> None:
    """Those of a tiny loss would be 0 without a scale, those of a huge one infinite with it."""
    found = []
    for dtype in (torch.float32, torch.float16):
        adapter = reordered()
        for pair in adapter.parameters().values():
            for parameter in pair:
                parameter.data = parameter.data.to(dtype)
        data = data_for(adapter)
        loss, times = data.loss, factor if dtype == torch.float16 else 1.0
        data.loss = lambda batch, loss=loss, times=times: loss(batch) * times
        with trained.descending(adapter):
            pairs = trained._gradients(adapter, data, data.batches(range(16)), torch.ones(8))
        found.append(torch.cat([one.flatten() / times for two in pairs.values() for one in two]))
    assert found[1].dtype == torch.float32
    assert torch.dist(*found) < tolerance * found[0].norm()


# What is kept.


@pytest.mark.parametrize(
    ("uphill", "most_lost", "message"),
    [(True, 0.02, "not kept, and the order stays svd"), (False, -9.0, "rank 8's by")],
)
def test_what_loses_more_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, uphill: bool, most_lost: float, message: str
) -> None:
    """Gradients that lead uphill, and a rank R that is given away for the others."""
    adapter = reordered()
    before, data = all_factors(adapter), data_for(adapter)
    downhill = data.loss
    data.loss = lambda batch: downhill(batch) * (-1 if uphill and torch.is_grad_enabled() else 1)
    monkeypatch.setattr(trained, "MOST_LOST", most_lost)
    with pytest.warns(UserWarning, match=message):
        assert not train_ranks(adapter, data, 80)
    assert same_bits(before, all_factors(adapter))


@pytest.mark.usefixtures("accepting")
def test_factors_of_training_are_reordered_first_and_what_is_kept_names_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = small("matryoshka")
    trainer = trainer_of(adapter.model, tmp_path, TRAIN, HELD_OUT)
    ids, before = torch.arange(3, 60)[None], adapter.factors()
    with torch.no_grad():
        whole = adapter.model.train()(input_ids=ids).logits
    with monkeypatch.context() as patched:
        patched.setattr(trained, "ENOUGH", 99.0)
        with pytest.warns(UserWarning, match="so none is trained"):
            adapter.reorder("trained", trainer, rows=16)
    assert adapter.order == "svd"
    with torch.no_grad():
        torch.testing.assert_close(adapter.model(input_ids=ids).logits, whole, rtol=0, atol=1e-3)
    values = adapter.reorder("trained", trainer, rows=160)
    assert adapter.order == "trained"
    assert adapter.model.training
    p = 0.7 * np.array([4, 3, 2, 2, 1, 1, 1, 1])
    for name, (A, B) in before.items():
        wanted = np.linalg.svd((B.double().numpy() * p) @ A.double().numpy(), compute_uv=False)[:8]
        np.testing.assert_allclose(values[name], wanted, rtol=1e-3)


@pytest.mark.usefixtures("accepting")
@pytest.mark.parametrize("kind", ["Embedding", "Conv2d", "Conv1D", "Linear"])
def test_every_kind_of_layer_is_trained(kind: str) -> None:
    """The loss is the distance to rank R in half of the outputs; for the SVD all are alike."""
    layer = nested_layer(kind, Nesting((1, 2, 4)), "lora")
    adapter, x = layer.adapter, layer.kind.batch(16)
    adapter.reorder()

    def half(x: Tensor) -> Tensor:
        found: Tensor = adapter.model(x)
        return found[:, :5] if kind == "Conv2d" else found[..., :5]

    with torch.no_grad():
        wanted = half(x)
        with adapter.override(torch.zeros(4, dtype=torch.float64)):
            size = (half(x) - wanted).square().mean()

    def loss(batch: Any) -> Tensor:
        return (half(batch["x"]) - batch["labels"]).square().mean() / size * 10

    def collated(numbers: list[int]) -> Any:
        return {"x": x[numbers], "labels": wanted[numbers]}

    def loss_of_rank_1() -> float:
        with torch.no_grad(), adapter.override(torch.eye(4, dtype=torch.float64)[0]):
            return float(loss(collated(list(range(16)))))

    data = Data(range(16), collated, loss, x.device, quiet=True)
    data.held_out = Data(range(16), collated, loss, x.device)
    before = loss_of_rank_1()
    assert train_ranks(adapter, data, 640)
    assert loss_of_rank_1() < 0.97 * before


# Whatever happens, the model is as it was.


def failing(data: Data, error: BaseException | None, at: int) -> Data:
    """The same rows, of which the loss draws, and fails at some call; None makes it NaN."""
    loss, calls = data.loss, iter(range(10**6))

    def fail(batch: Any) -> Any:
        torch.rand(1)
        if next(calls) < at:
            return loss(batch)
        if error is not None:
            raise error
        return loss(batch) * float("nan")

    data.loss = fail
    return data


@pytest.mark.usefixtures("accepting")
@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (None, NotFiniteError),
        (RuntimeError("x"), RuntimeError),
        (KeyboardInterrupt(), BaseException),
    ],
    ids=["nan", "error", "ctrl-c"],
)
@pytest.mark.parametrize("at", [2, 16, 23], ids=["judging", "third-step", "judging-again"])
def test_an_end_before_its_time_leaves_everything(at: int, error: Any, wanted: Any) -> None:
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
        train_ranks(adapter, failing(data_for(adapter, HELD_OUT[:32]), error, at), 80)
    assert same_bits(factors, all_factors(adapter))
    assert state() == before
    assert all(parameter.grad is None for parameter in adapter.model.parameters())
    assert train_ranks(adapter, failing(data_for(adapter), None, 10**5), 80)
    assert not same_bits(factors, all_factors(adapter))
    assert state() == before
    assert all(parameter.grad is None for parameter in adapter.model.parameters())


def test_gradients_that_are_not_finite_name_the_way_out() -> None:
    adapter = reordered()
    data = data_for(adapter)
    loss = data.loss
    data.loss = lambda batch: loss(batch) + (loss(batch) - loss(batch).detach()).sqrt()
    with pytest.raises(
        NotFiniteError, match=r"gradients are NaN or infinite: load the base model in"
    ):
        train_ranks(adapter, data, 8)


def test_one_rank_and_few_rows_are_refused() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    one = nest_as(get_peft_model(tiny_llama(), config), Nesting((4,)), "lora")
    with pytest.raises(MatryoshkaError, match="the only nested rank"):
        one.reorder("trained", TRAIN)
    adapter = reordered()
    for rows in (TRAIN[:15], TRAIN[:1] * 40):
        with pytest.raises(MatryoshkaError, match="rows are too few, or too much alike"):
            adapter.reorder("trained", rows)


def test_another_try_that_is_refused_keeps_the_trained_ranks() -> None:
    adapter = reordered()
    adapter.put_factors({name: (A * 1.01, B) for name, (A, B) in adapter.factors().items()})
    adapter.mark_ordered("trained")
    before = all_factors(adapter)
    with pytest.raises(MatryoshkaError, match="rows are too few, or too much alike"):
        adapter.reorder("trained", DataLoader(TRAIN[:15]))  # whose rows count
    assert adapter.order == "trained"
    assert same_bits(before, all_factors(adapter))


def test_after_a_training_few_rows_leave_the_order_of_the_svd(tmp_path: Path) -> None:
    adapter = reordered()
    trainer = trainer_of(adapter.model, tmp_path, TRAIN[:15], max_steps=1)
    trainer.train()
    with pytest.warns(UserWarning, match="no rank is trained, and the order is svd: the 15 rows"):
        adapter.reorder("trained", trainer)
    assert adapter.order == "svd"


def test_dropout_takes_no_part_and_checkpointed_layers_are_computed_again() -> None:
    found = []
    for checkpointing, dropout in ((False, 0.0), (True, 0.0), (False, 0.5), (True, 0.5)):
        adapter = reordered(lora_dropout=dropout)
        before = all_factors(adapter)
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
        descend(adapter, data_for(adapter), 24)
        assert sum(forwards) == 3 * (1 + checkpointing)
        found.append(all_factors(adapter))
        assert not same_bits(before, found[-1])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-5)


def test_layers_that_call_dropout_as_a_function_do_so_no_more() -> None:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    base = OPTForCausalLM(OPTConfig(vocab_size=96, num_attention_heads=4, dropout=0.5, **sizes))
    base.gradient_checkpointing_enable()
    adapter = nest(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])))
    batch = collate(TRAIN[:8])
    with trained.descending(adapter), torch.no_grad():
        assert len({float(adapter.model(**batch).loss) for _ in range(3)}) == 1


@pytest.mark.usefixtures("accepting")
def test_the_same_seed_gives_the_same_bits() -> None:
    """Whatever torch and Python draw meanwhile; another seed gives others."""
    found = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        random.seed(number)
        adapter = reordered()
        assert train_ranks(adapter, data_for(adapter), 80, seed)
        found.append(all_factors(adapter))
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])


def test_trained_ranks_that_a_cast_has_changed_are_said_to_be_lost(tmp_path: Path) -> None:
    adapter = small()
    adapter.reorder()
    adapter.mark_ordered("trained")
    adapter.save(tmp_path / "before")
    adapter.model.bfloat16()
    with pytest.warns(UserWarning, match="its trained ranks are lost: reorder it again"):
        adapter.save(tmp_path / "after")
    orders = [open_adapter(tmp_path / name).order for name in ("before", "after")]
    assert orders == ["trained", "svd"]


def test_half_precision_factors_are_trained_in_float32(tmp_path: Path) -> None:
    """In float16, Adam's epsilon is 0 and its steps are NaN."""
    adapter = small()
    for name, parameter in adapter.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    adapter.reorder()
    before = [loss_of(adapter, HELD_OUT, rank) for rank in NESTING.ranks[:-1]]
    adapter.reorder("trained", trainer_of(adapter.model, tmp_path, TRAIN, HELD_OUT), rows=640)
    after = [loss_of(adapter, HELD_OUT, rank) for rank in NESTING.ranks[:-1]]
    assert adapter.order == "trained"
    assert all(new < old - 0.1 for new, old in zip(after, before, strict=True))
    assert {factor.dtype for factor in all_factors(adapter)} == {torch.float16}


@pytest.mark.filterwarnings("ignore:.*trained ranks")
@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_shown_unless_it_is_to_be_quiet(
    monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    adapter = reordered()
    data = data_for(adapter)
    data.quiet = quiet
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    train_ranks(adapter, data, 16)
    assert ("training ranks" in terminal.getvalue()) != quiet
    told = re.search(r"loss on held-out rows: rank 1 \d\.\d{3} to \d", terminal.getvalue())
    assert bool(told) != quiet


# The rows that judge.


@pytest.mark.filterwarnings("ignore:the trained ranks are not kept")
def test_rows_that_judge_are_never_trained_on(tmp_path: Path) -> None:
    """Five rounds of the data, of which one row comes twice."""
    adapter, data = small(), TRAIN[:64]
    rows = [*data, data[3]]
    trainer = trainer_of(adapter.model, tmp_path, rows)
    adapter.reorder("trained", trainer, rows=5 * len(rows))
    judged, taught = set(trainer.judged), set(trainer.taught)
    assert len(judged) == len(rows) // 8
    assert len(taught) == len(data) - len(judged)
    assert not judged & taught
