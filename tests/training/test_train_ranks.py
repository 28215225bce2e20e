"""Training of the low ranks: each gets a lower loss, and what does not help is not kept."""

from __future__ import annotations

import io
import logging
import math
import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.examples import (
    Example,
    all_equal,
    collate,
    copy_lora_parameters,
    lookup_examples,
    loss_at_rank,
    make_trainer,
    random_examples,
)
from helpers.models import lora_config, nested_layer, nested_llama, randomize, tiny_llama
from peft import get_peft_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from matryoshka_lora import (
    MatryoshkaError,
    NestedAdapter,
    Nesting,
    NotFiniteError,
    TrainRanksResult,
    load,
    nest,
)
from matryoshka_lora.formats import peft_folder
from matryoshka_lora.peft.lora_layers import small_factors
from matryoshka_lora.training.data import TrainingData, read_training_data
from matryoshka_lora.training.train_ranks import Hyperparameters, train_ranks

NESTING = Nesting((1, 2, 4, 8), "none", 0.7)
TRAINING = lookup_examples(800)
VALIDATION = lookup_examples(64, seed=1)


def new_adapter(rule: str = "lora", dropout: float = 0.0) -> NestedAdapter:
    """An adapter of a few layers, because each step takes time in proportion to their number."""
    targets = ["q_proj", "v_proj", "down_proj"]
    return nested_llama(NESTING, rule, layers=1, target_modules=targets, lora_dropout=dropout)


@cache
def trained_factors(rule: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors that have learned a part of the completions at rank R."""
    adapter = new_adapter(rule)
    randomize(adapter.model, size=0.05)
    parameters = [factor for pair in adapter.layer_factors().values() for factor in pair]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    adapter.model.train()
    for step in range(60):
        optimizer.zero_grad()
        batch = [TRAINING[(step * 80 + i) % len(TRAINING)] for i in range(80)]
        adapter.model(**collate(batch)).loss.backward()
        optimizer.step()
    return adapter.factors.copy()


def trained_adapter(rule: str = "lora", dropout: float = 0.0) -> NestedAdapter:
    """An adapter whose small ranks are far behind rank R."""
    adapter = new_adapter(rule, dropout)
    adapter.factors.write(trained_factors(rule))
    return adapter


def ordered_adapter(dropout: float = 0.0) -> NestedAdapter:
    adapter = trained_adapter(dropout=dropout)
    adapter.reorder()
    return adapter


def shrunk_adapter(share: float) -> NestedAdapter:
    """An adapter whose components after the first are smaller, so small ranks are less behind."""
    adapter = ordered_adapter()
    shares = torch.tensor([1.0] + [share] * 7)
    factors = adapter.factors.copy()
    adapter.factors.write({name: (A, B * shares) for name, (A, B) in factors.items()})
    adapter.mark_ordered("svd")
    return adapter


def data_for(adapter: NestedAdapter, validation: list[Example] = VALIDATION) -> TrainingData:
    data = read_training_data(adapter.model, TRAINING, eval_data=validation)
    data.show_progress = False
    return data


def train(
    adapter: NestedAdapter,
    data: TrainingData,
    max_examples: int | float | None = None,
    hyperparameters: Hyperparameters | None = None,
    seed: int = 0,
) -> TrainRanksResult:
    ranks = adapter.nesting.ranks
    result, small = train_ranks(adapter.factors, ranks, data, max_examples, seed, hyperparameters)
    assert (small is not None) == (result.outcome == "kept")
    if small is not None:
        adapter.set_small_factors(small)
    return result


# Which ranks are trained, and on how many examples


def test_low_ranks_get_a_lower_loss_and_the_others_stay_bit_for_bit() -> None:
    """Rank 3 too, which is not nested."""
    adapter = ordered_adapter()
    factors = copy_lora_parameters(adapter)
    before = {rank: loss_at_rank(adapter, VALIDATION, rank) for rank in range(1, 9)}
    data = data_for(adapter)
    assert data.validation is not None
    data.validation.batch_size = 16  # divides the number of examples, so all of them validate
    result = train(adapter, data, 640)
    assert all_equal(factors, copy_lora_parameters(adapter))
    after = {rank: loss_at_rank(adapter, VALIDATION, rank) for rank in range(1, 9)}
    assert (result.path, result.outcome, result.num_examples) == (None, "kept", 640)
    assert (result.small_rank, set(result.examples_by_rank)) == (4, {1, 2, 3, 4})
    assert result.examples_by_rank[1] == pytest.approx(4 * result.examples_by_rank[4], rel=0.25)
    assert result.losses_before == pytest.approx({rank: before[rank] for rank in (1, 2, 4, 8)})
    assert result.losses_after == pytest.approx({rank: after[rank] for rank in (1, 2, 4)})
    for rank in (1, 2, 3, 4):
        assert after[rank] < before[rank] - 0.1
    for rank in (5, 6, 7, 8):
        assert after[rank] == before[rank]


@pytest.mark.parametrize(
    ("ranks", "trained_ranks"),
    [
        ((1, 2, 4, 8), {1, 2, 3, 4}),
        ((2, 8), {2}),
        ((3, 6, 8), {3, 4, 5, 6}),
        ((1, 7, 8), {*range(1, 8)}),
    ],
    ids=str,
)
def test_ranks_between_nested_ranks_are_trained_too(
    ranks: tuple[int, ...], trained_ranks: set[int]
) -> None:
    """From the smallest nested rank to the first one that is about as good as rank R."""
    adapter = ordered_adapter()
    result, _ = train_ranks(adapter.factors, ranks, data_for(adapter), 320)
    assert set(result.examples_by_rank) == trained_ranks


def test_nothing_is_trained_where_no_rank_is_behind(caplog: pytest.LogCaptureFixture) -> None:
    """The later components are zeros."""
    adapter = shrunk_adapter(0.0)
    data = data_for(adapter)
    before = copy_lora_parameters(adapter)
    with caplog.at_level(logging.INFO, "matryoshka_lora"):
        result = train(adapter, data, 80)
    assert "nothing to train" in caplog.text
    assert (result.outcome, result.num_examples, result.small_rank) == ("nothing to train", 0, 0)
    assert result.losses_after == {}
    assert set(result.losses_before) == {1, 2, 4, 8}
    assert result.base_loss == pytest.approx(loss_at_rank(adapter, VALIDATION, 0), rel=0.01)
    assert result.max_gap == pytest.approx(0.02 * (result.base_loss - result.losses_before[8]))
    assert all_equal(before, copy_lora_parameters(adapter))
    assert adapter.order == "svd"


@pytest.mark.parametrize("base_loss", [1000.0, -1000.0])
def test_no_loss_of_the_base_model_prevents_training(base_loss: float) -> None:
    """Two percent of the gain would be 20 nats, and no rank as far behind; or less than nothing."""
    adapter = ordered_adapter()
    data = data_for(adapter)
    loss = data.loss
    _, B = next(iter(adapter.layer_factors().values()))
    data.loss = lambda batch: loss(batch) if bool(B.any()) else torch.tensor(base_loss)
    assert train(adapter, data, 640).outcome == "kept"


@pytest.mark.filterwarnings("ignore:The trained ranks")
@pytest.mark.parametrize(
    ("num_seen", "max_examples", "expected"),
    [(400, None, 200), (400, 48, 48), (None, 40, 40), (400, 1.0, 400), (8, 0.25, 8)],
)
def test_half_the_examples_of_the_run_are_trained_on(
    num_seen: int | None, max_examples: int | float | None, expected: int
) -> None:
    adapter = ordered_adapter()
    data = data_for(adapter)
    data.num_examples_seen = num_seen
    num_trained: list[int] = []
    loss = data.loss

    def counting_loss(batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            num_trained.append(len(batch["labels"]))
        return loss(batch)

    data.loss = counting_loss
    result = train(adapter, data, max_examples)
    assert sum(num_trained) == result.num_examples == expected


@pytest.mark.filterwarnings("ignore:The trained ranks")
@pytest.mark.parametrize("has_evaluation_set", [True, False])
def test_no_training_example_is_withheld(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, has_evaluation_set: bool
) -> None:
    """The adapter's own training may know them by heart, so those withheld would favor it."""
    adapter = trained_adapter()
    examples = TRAINING[:64]
    trainer = make_trainer(
        adapter.model, tmp_path, examples, VALIDATION if has_evaluation_set else None
    )
    data = read_training_data(adapter.model, trainer)
    trainer.validated_on.clear()  # of what shows that the Trainer can compute a loss
    train(adapter, data, 2 * len(examples))
    validated_on = set(trainer.validated_on)
    trained_on = set(trainer.trained_on)
    assert len(trained_on) == len(examples)
    assert len(validated_on) == Hyperparameters().num_validation
    assert (validated_on <= trained_on) == (not has_evaluation_set)
    assert ("no evaluation set" in caplog.text) == (not has_evaluation_set)


@pytest.mark.parametrize("has_evaluation_set", [True, False])
@pytest.mark.parametrize("task", ["by-heart", "generalizes"])
def test_ranks_are_kept_after_a_run_of_many_epochs(
    tmp_path: Path, task: str, has_evaluation_set: bool
) -> None:
    """The run knows its examples by heart, or what it has learned holds for other ones too."""
    adapter = new_adapter()
    randomize(adapter.model, size=0.05)
    examples = random_examples(160, seed=5) if task == "by-heart" else TRAINING[:160]
    evaluation_set = examples if task == "by-heart" else VALIDATION
    trainer = make_trainer(
        adapter.model,
        tmp_path,
        examples,
        evaluation_set if has_evaluation_set else None,
        max_steps=400,
        learning_rate=1e-2,
    )
    trainer.train()
    adapter.reorder()
    losses = {rank: loss_at_rank(adapter, evaluation_set, rank) for rank in (1, 8)}
    assert losses[8] < losses[1] - 0.5
    assert adapter.train_ranks(trainer).outcome == "kept"
    assert loss_at_rank(adapter, evaluation_set, 1) < losses[1] - 0.5
    assert loss_at_rank(adapter, evaluation_set, 8) == losses[8]


def test_nesting_after_plain_training_gives_the_same_ranks(tmp_path: Path) -> None:
    """With the default rule, nothing is done before or during the training."""
    adapters: list[NestedAdapter] = []
    for is_nested_before in (True, False):
        base = tiny_llama(num_hidden_layers=1)
        model = get_peft_model(base, lora_config(NESTING, target_modules=["q_proj", "down_proj"]))
        randomize(model, size=0.05)
        if is_nested_before:
            adapters.append(nest(model))
        trainer = make_trainer(
            model, tmp_path, TRAINING, VALIDATION, max_steps=60, learning_rate=1e-2
        )
        if is_nested_before:
            trainer.add_callback(adapters[0].callback())
        trainer.train()
        if not is_nested_before:
            adapters.append(nest(trainer.model))
        assert adapters[-1].train_ranks(trainer, max_examples=320).outcome == "kept"
    before, after = adapters
    assert before.small_rank == after.small_rank > 0
    for rank in range(1, 9):
        losses = [loss_at_rank(adapter, VALIDATION, rank) for adapter in adapters]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    after.save(tmp_path / "adapter")
    loaded = load(tiny_llama(num_hidden_layers=1), tmp_path / "adapter", rank=1)
    assert loss_at_rank(loaded, VALIDATION, 1) == loss_at_rank(after, VALIDATION, 1)


# What is kept


def test_one_validation_example_is_enough() -> None:
    adapter = ordered_adapter()
    result = train(adapter, data_for(adapter, VALIDATION[:1]), 320)
    assert result.outcome == "kept"


def test_worse_ranks_are_not_kept() -> None:
    """Gradients that lead uphill."""
    adapter = ordered_adapter()
    data = data_for(adapter)
    loss = data.loss
    data.loss = lambda batch: loss(batch) * (-1 if torch.is_grad_enabled() else 1)
    before = copy_lora_parameters(adapter)
    with pytest.warns(UserWarning, match="not kept"):
        result = train(adapter, data, 80)
    assert (result.outcome, result.small_rank, result.num_examples) == ("not better", 0, 80)
    assert result.losses_after[1] > result.losses_before[1]
    assert all_equal(before, copy_lora_parameters(adapter))
    assert adapter.order == "svd"


def test_the_small_adapter_ends_below_the_first_rank_that_is_worse() -> None:
    """So no nested rank is worse than after the SVD."""
    adapter = ordered_adapter()
    data = data_for(adapter)
    loss = data.loss
    _, B = next(iter(adapter.layer_factors().values()))
    before = B.detach().clone()

    def loss_of_changed_rank(batch: Any) -> Tensor:
        is_rank_4 = bool(B[:, 3].any()) and not B[:, 4].any()
        is_worse = is_rank_4 and not torch.equal(B[:, :4], before[:, :4])
        return loss(batch) + 9.0 * (is_worse and not torch.is_grad_enabled())

    data.loss = loss_of_changed_rank
    result = train(adapter, data, 640)
    assert (result.outcome, result.small_rank) == ("kept", 2)
    assert result.losses_after[4] > result.losses_before[4]


@pytest.mark.filterwarnings("ignore:The trained ranks")
def test_an_earlier_small_adapter_stays_unless_the_new_one_is_kept(tmp_path: Path) -> None:
    adapter = ordered_adapter()
    trainer = make_trainer(adapter.model, tmp_path, TRAINING, VALIDATION)
    assert adapter.train_ranks(trainer, max_examples=640).outcome == "kept"
    expected = loss_at_rank(adapter, VALIDATION, 1)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (  # type: ignore[method-assign]
        compute_loss(*args, **kwargs) * (-1 if torch.is_grad_enabled() else 1)
    )
    assert adapter.train_ranks(trainer, max_examples=80).outcome == "not better"
    assert loss_at_rank(adapter, VALIDATION, 1) == expected


def test_factors_without_an_order_are_reordered_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained_adapter("matryoshka")
    trainer = make_trainer(adapter.model, tmp_path, TRAINING, VALIDATION)
    factors = adapter.factors.copy()
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected_logits = adapter.model.train()(input_ids=tokens).logits
    compute_loss = trainer.compute_loss

    def stop_after_reordering(*args: Any, **kwargs: Any) -> Any:
        if adapter.order is not None:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "compute_loss", stop_after_reordering)
        with pytest.raises(KeyboardInterrupt):
            adapter.train_ranks(trainer)
    assert adapter.order == "svd"
    with torch.no_grad():
        logits = adapter.model(input_ids=tokens).logits
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-3)
    p = oracle.trained_p(NESTING.ranks, "none", 0.7).numpy()
    for name, (A, B) in adapter.factors.copy().items():
        old_A, old_B = (factor.double().numpy() for factor in factors[name])
        expected = np.linalg.svd((old_B * p) @ old_A, compute_uv=False)[:8]
        columns = B.double().norm(dim=0) * A.double().norm(dim=1) * 0.7
        np.testing.assert_allclose(columns, expected, rtol=1e-3)
    assert adapter.train_ranks(trainer, max_examples=640).outcome == "kept"
    assert (adapter.order, adapter.small_rank) == ("svd", 4)
    assert adapter.model.training


@pytest.mark.parametrize("kind", ["Embedding", "Conv2d", "Conv1D", "Linear"])
def test_every_kind_of_layer_is_trained(kind: str) -> None:
    """The loss is the distance to rank R in half of the outputs; for the SVD all are equal."""
    layer = nested_layer(kind, Nesting((1, 2, 4)), "lora")
    adapter = layer.adapter
    inputs = layer.kind.batch(16)
    adapter.reorder()

    def half_output(x: Tensor) -> Tensor:
        output: Tensor = adapter.model(x)
        return output[:, :5] if kind == "Conv2d" else output[..., :5]

    with torch.no_grad():
        targets = half_output(inputs)
        with adapter.use_diagonal(torch.zeros(4)):
            size = (half_output(inputs) - targets).square().mean()

    def loss(batch: Any) -> Tensor:
        return (half_output(batch["x"]) - batch["labels"]).square().mean() / size * 10

    def collate_indices(indices: list[int]) -> Any:
        return {"x": inputs[indices], "labels": targets[indices]}

    def make_data() -> TrainingData:
        return TrainingData(
            range(16), collate_indices, loss, inputs.device, show_progress=False, is_causal=False
        )

    data = make_data()
    data.validation = make_data()
    result = train(adapter, data, 1280)
    assert result.outcome == "kept"
    assert result.losses_after[1] < 0.97 * result.losses_before[1]


def test_half_precision_factors_are_trained_in_float32(tmp_path: Path) -> None:
    """In float16, Adam's epsilon is 0 and its steps are NaN."""
    adapter = trained_adapter()
    for name, parameter in adapter.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    trainer = make_trainer(adapter.model, tmp_path, TRAINING, VALIDATION)
    result = adapter.train_ranks(trainer, max_examples=640)
    assert result.outcome == "kept"
    for rank in (1, 2, 4):
        assert loss_at_rank(adapter, VALIDATION, rank) < result.losses_before[rank] - 0.1
    assert {factor.dtype for factor in copy_lora_parameters(adapter)} == {torch.float16}


def test_the_same_seed_gives_the_same_bits() -> None:
    """Whatever torch and Python draw in the meantime."""
    results: list[list[Tensor]] = []
    for global_seed, seed in enumerate((3, 3, 4)):
        torch.manual_seed(global_seed)
        random.seed(global_seed)
        adapter = ordered_adapter()
        assert train(adapter, data_for(adapter), 80, seed=seed).outcome == "kept"
        pairs = [small_factors(layer, "default") for layer in adapter.layers.values()]
        results.append([factor for pair in pairs for factor in pair])
    assert all_equal(results[0], results[1])
    assert not all_equal(results[0], results[2])


# Errors


def model_state(adapter: NestedAdapter) -> Any:
    modes = [module.training for module in adapter.model.modules()]
    requires_grad = [parameter.requires_grad for parameter in adapter.model.parameters()]
    has_gradients = [parameter.grad is not None for parameter in adapter.model.parameters()]
    random_state = (torch.get_rng_state().tolist(), random.getstate())
    return modes, requires_grad, has_gradients, random_state


@pytest.mark.parametrize("error_type", [NotFiniteError, RuntimeError, KeyboardInterrupt, None])
@pytest.mark.parametrize("num_losses", [2, 16, 23], ids=["before", "third-step", "after"])
def test_the_model_is_as_before_whatever_happens(
    num_losses: int, error_type: type[BaseException] | None
) -> None:
    """Modes, frozen parameters, random states and factors."""
    adapter = ordered_adapter(dropout=0.1)
    adapter.model.train()
    adapter.model.get_base_model().model.layers[0].eval()
    frozen = next(iter(adapter.layer_factors().values()))[0]
    frozen.requires_grad_(False)
    data = data_for(adapter, VALIDATION[:32])
    loss = data.loss
    calls: list[None] = []

    def failing_loss(batch: Any) -> Tensor:
        torch.rand(1)
        calls.append(None)
        if len(calls) <= num_losses or error_type is None:
            return loss(batch)
        if error_type is NotFiniteError:
            return loss(batch) * float("nan")
        raise error_type

    data.loss = failing_loss
    before = model_state(adapter)
    factors = copy_lora_parameters(adapter)
    if error_type is None:
        assert train(adapter, data, 80).outcome == "kept"
    else:
        with pytest.raises(error_type):
            train(adapter, data, 80)
    assert all_equal(factors, copy_lora_parameters(adapter))
    assert adapter.order == "svd"
    assert model_state(adapter) == before


def test_a_single_nested_rank_has_no_ranks_to_train() -> None:
    """It is no error, which would stop a script between training and saving."""
    adapter = nested_llama(Nesting((4,)), "lora", layers=1, target_modules=["q_proj"])
    result = adapter.train_ranks(TRAINING)
    assert (result.outcome, result.num_examples, adapter.order) == ("nothing to train", 0, "svd")


def merge(model: Any) -> None:
    model.merge_adapter()


def activate_another(model: Any) -> None:
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")


@pytest.mark.parametrize(("change", "keyword"), [(merge, "merged"), (activate_another, "active")])
def test_an_adapter_that_cannot_be_trained_is_not_reordered(
    change: Callable[[Any], None], keyword: str
) -> None:
    adapter = trained_adapter()
    change(adapter.model)
    with pytest.raises(MatryoshkaError, match=keyword):
        adapter.train_ranks(TRAINING)
    assert adapter.order is None


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group, as sharded parameters need."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_sharded_factors_are_trained_as_others(one_process: None, tmp_path: Path) -> None:
    """By FSDP 2: the same ranks and factors, and rank R stays as it is, bit for bit."""
    adapters = [trained_adapter(), trained_adapter()]
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(adapters[1].model, mesh=mesh)
    assert adapters[1].factors.are_sharded
    with pytest.raises(MatryoshkaError, match="matryoshka reorder"):
        adapters[1].reorder(TRAINING)
    for adapter in adapters:
        adapter.reorder()
    before = adapters[1].factors.copy()
    results = [
        adapter.train_ranks(TRAINING, eval_data=VALIDATION, max_examples=160)
        for adapter in adapters
    ]
    assert results[0].small_rank == results[1].small_rank > 0
    assert results[0].losses_after == pytest.approx(results[1].losses_after, rel=1e-4)
    for name, pair in adapters[1].factors.copy().items():
        assert all(map(torch.equal, pair, before[name]))
    for adapter in adapters:
        adapter.save(tmp_path / str(adapter is adapters[0]))
    plain, sharded = [peft_folder.read(tmp_path / name) for name in ("True", "False")]
    assert sharded.order == plain.order == "svd"
    for rank in (1, 8):
        factors = [lora.at_rank(rank).layers[0].read() for lora in (plain, sharded)]
        np.testing.assert_allclose(*[pair.B @ pair.A for pair in factors], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_examples", [0, -16, 0.0, -0.5, math.nan, True, 0.5], ids=str)
def test_the_number_of_examples_is_positive(max_examples: Any) -> None:
    """A share needs a Trainer, which knows how many examples it has seen."""
    adapter = trained_adapter()
    with pytest.raises(MatryoshkaError, match="max_examples"):
        adapter.train_ranks(TRAINING, max_examples=max_examples)
    assert adapter.small_rank == 0


# Output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.filterwarnings("ignore:The trained ranks")
@pytest.mark.parametrize("show_progress", [False, True])
@pytest.mark.parametrize("stream", [Terminal, io.StringIO], ids=["terminal", "file"])
def test_a_progress_bar_shows_rank_and_loss_unless_it_is_disabled(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], show_progress: bool
) -> None:
    """In a notebook or a file too, where stderr is no terminal."""
    adapter = ordered_adapter()
    data = data_for(adapter)
    data.show_progress = show_progress
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    train(adapter, data, 16)
    lines = [line for line in stderr.getvalue().split("\r") if "training ranks: 100%" in line]
    assert bool(lines) == ("%|" in stderr.getvalue()) == show_progress
    if show_progress:
        assert "rank=" in lines[-1]
        assert "loss=" in lines[-1]


@pytest.mark.filterwarnings("ignore:The trained ranks")
def test_an_estimate_is_logged_before_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    adapter = ordered_adapter()
    data = data_for(adapter)
    loss = data.loss

    def stop_at_first_step(batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            raise KeyboardInterrupt
        return loss(batch)

    data.loss = stop_at_first_step
    with caplog.at_level(logging.INFO, "matryoshka_lora"), pytest.raises(KeyboardInterrupt):
        train(adapter, data, 1600)
    (message,) = [record.message for record in caplog.records if "stimate" in record.message]
    assert "1600 examples, 2.0 passes over 800, about 9,600 tokens" in message
    assert re.search(r"time: \d\d:\d\d", message)


@pytest.mark.filterwarnings("ignore:The trained ranks")
def test_a_trainer_logs_the_losses_of_each_rank_at_later_steps(tmp_path: Path) -> None:
    adapter = trained_adapter()
    trainer = make_trainer(adapter.model, tmp_path, TRAINING, VALIDATION, max_steps=3)
    trainer.train()
    num_entries = len(trainer.state.log_history)
    result = adapter.train_ranks(trainer, max_examples=64 * 8)
    first, *training, last = trainer.state.log_history[num_entries:]
    for entry, losses, step in ((first, result.losses_before, 3), (last, result.losses_after, 67)):
        assert entry["step"] == step
        for rank, loss in losses.items():
            assert entry[f"train_ranks/rank_{rank}_validation_loss"] == loss
    assert [entry["step"] for entry in training] == [3 + step for step in (*range(4, 65, 4),)]
    keys = {key for entry in training for key in entry if key.startswith("train_ranks/")}
    assert keys == {f"train_ranks/rank_{rank}_loss" for rank in result.examples_by_rank}
    assert trainer.state.global_step == 3
