"""Learning the order of directions: the product never changes, and the prefixes lose less."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import nest_as, nested_layer, nested_llama, randomize, tiny_llama, tiny_mixtral
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_chat import tiny_tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, nest
from matryoshka_lora.adapter.in_model import InModel
from matryoshka_lora.data.questions import Row
from matryoshka_lora.reordering.descent import gradients_at, learning
from matryoshka_lora.reordering.learned import JUDGED, ROWS, learn_order
from matryoshka_lora.reordering.model import Part
from matryoshka_lora.reordering.order import OrderOptimizer

NESTING = Nesting([1, 2, 4, 8])


def factors(rank: int, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lead = (experts,) if experts else ()
    A = torch.randn(*lead, rank, 9, generator=generator, dtype=torch.float64)
    return A, torch.randn(*lead, 7, rank, generator=generator, dtype=torch.float64)


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 10**6), st.floats(1e-4, 0.3))
def test_the_product_never_changes(rank: int, experts: int, seed: int, rate: float) -> None:
    A, B = factors(rank, experts, seed)
    optimizer = OrderOptimizer([(A, B)], range(1, rank + 1), rate)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(5):
        gradients = [torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in (A, B)]
        optimizer.step([(gradients[0], gradients[1])])
    ((new_A, new_B),) = optimizer.pairs
    assert rank == 1 or not torch.allclose(new_A, A)
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-9, atol=1e-9)


def test_the_first_step_goes_down_the_gradient_of_the_order() -> None:
    """Adam's first step is the sign of the gradient; autograd differentiates exp(D) at D = 0 for the oracle."""
    A, B = factors(4, 0, 0)
    target = torch.randn(7, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss(A: Tensor, B: Tensor) -> Tensor:
        return sum(((B[:, :r] @ A[:r] - target) ** 2).sum() for r in (1, 3))  # type: ignore[return-value]

    D = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    loss(torch.matrix_exp(D) @ A, B @ torch.matrix_exp(-D)).backward()
    leaf_A, leaf_B = A.clone().requires_grad_(), B.clone().requires_grad_()
    loss(leaf_A, leaf_B).backward()
    optimizer = OrderOptimizer([(A, B)], [1, 3, 4], 1e-3)
    optimizer.step([(leaf_A.grad, leaf_B.grad)])  # type: ignore[list-item]
    assert D.grad is not None
    # Directions 2 and 3 may mix as they like: no prefix of the loss sees it.
    block = torch.tensor([0, 1, 1, 2])
    assert D.grad[block[:, None] == block].abs().max() < 1e-9 * D.grad.abs().max()
    wanted = torch.matrix_exp(-1e-3 * D.grad.sign() * (block[:, None] != block)) @ A
    torch.testing.assert_close(optimizer.pairs[0][0], wanted, rtol=1e-6, atol=1e-8)


def test_it_finds_the_prefix_that_the_svd_misses() -> None:
    """A loss that asks for the smaller of two directions first: the order turns, and the whole stays."""
    A, B = torch.eye(2, 5).double() * 2, torch.eye(5, 2).double()
    A[1] /= 4
    wanted = B[:, 1:] @ A[1:]
    A[0, 1] = B[1, 0] = 0.1  # exactly at right angles, the gradient would be zero
    optimizer, product = OrderOptimizer([(A, B)], [1, 2], 0.05), B @ A
    for _ in range(200):
        leaves = [f.clone().requires_grad_() for f in optimizer.pairs[0]]
        ((leaves[1][:, :1] @ leaves[0][:1] - wanted) ** 2).sum().backward()
        optimizer.step([(leaves[0].grad, leaves[1].grad)])  # type: ignore[list-item]
    A, B = optimizer.pairs[0]
    assert ((B[:, :1] @ A[:1] - wanted) ** 2).sum() < 0.05 * (wanted**2).sum()
    torch.testing.assert_close(B @ A, product)


def test_ranks_between_nested_ones_are_the_best_of_their_block() -> None:
    A, B = factors(6, 0, 1)
    optimizer = OrderOptimizer([(A, B)], [2, 6], 0.1)
    generator = torch.Generator().manual_seed(2)
    optimizer.step([tuple(torch.randn(f.shape, generator=generator).double() for f in (A, B))])  # type: ignore[list-item]
    ((now_A, now_B),), ((A, B),) = optimizer.pairs, optimizer.finished()
    for rank in (2, 6):
        torch.testing.assert_close(B[:, :rank] @ A[:rank], now_B[:, :rank] @ now_A[:rank])
    block = now_B[:, 2:] @ now_A[2:]
    values = torch.linalg.svdvals(block)
    for rank in (3, 4, 5):
        left = block - B[:, 2:rank] @ A[2:rank]
        torch.testing.assert_close(left.norm(), values[rank - 2 :].norm(), rtol=1e-9, atol=1e-9)


class Given:
    """Data whose steps are given; the last one stands for all that follow."""

    quiet, held_out = True, None

    def __init__(self, *steps: list[Part]) -> None:
        self._steps = steps

    def __len__(self) -> int:
        return sum(part.rows for parts in self._steps for part in parts)

    def steps(self, rows: int, at_once: int, seed: int) -> Iterator[list[Part]]:
        return islice(chain(self._steps, repeat(self._steps[-1])), rows // at_once)


def learn(adapter: NestedAdapter, data: Given, steps: int, **more: Any) -> bool:
    return learn_order(InModel(adapter.model, adapter.name), data, steps, **more)


def some_rows(adapter: NestedAdapter, rows: int = 6) -> Given:
    """Random tokens; what follows them is learned."""
    ids = torch.randint(3, 90, (rows, 12), generator=torch.Generator().manual_seed(0))
    return Given([Part(rows, 1.0, None, lambda: adapter.model(input_ids=ids, labels=ids).loss)])


def all_factors(adapter: NestedAdapter) -> list[Tensor]:
    """Copies."""
    return [factor for pair in InModel(adapter.model, adapter.name).factors().values() for factor in pair]


def losses(adapter: NestedAdapter) -> list[float]:
    ((part,),) = some_rows(adapter).steps(ROWS, ROWS, 0)
    found = []
    with torch.no_grad():
        for rank in NESTING.ranks:
            adapter.set_rank(rank)
            found.append(part.loss().item())
    return found


def test_prefixes_lose_less_and_the_whole_stays() -> None:
    adapter = nested_llama(NESTING, "lora")
    ids = torch.arange(3, 60)[None]
    adapter.reorder()
    whole = adapter.model(input_ids=ids).logits.detach()
    before = losses(adapter)
    learn(adapter, some_rows(adapter), 30, learning_rate=0.0075)
    after = losses(adapter)
    adapter.set_rank(8)
    # The whole drifts by the rounding of its float32 factors alone.
    assert (adapter.model(input_ids=ids).logits - whole).norm() < 1e-5 * whole.norm()
    assert abs(after[-1] - before[-1]) < 1e-4
    assert all(new < old - 0.02 for new, old in zip(after[:-1], before[:-1], strict=True))


def dropping(dropout: float, seed: int = 0) -> NestedAdapter:
    """With dropout before the factors and in the attention."""
    adapter = nested_llama(NESTING, "lora", lora_dropout=dropout, seed=seed)
    for layer in adapter.model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = dropout
    adapter.reorder()
    return adapter


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_has_no_part_in_an_order(checkpointing: bool) -> None:
    found = []
    for dropout in (0.0, 0.5):
        adapter = dropping(dropout)
        model: Any = adapter.model.get_base_model()
        if checkpointing:
            model.gradient_checkpointing_enable()
        adapter.model.train()
        model.model.layers[0].eval()
        modes = [module.training for module in adapter.model.modules()]
        forwards: list[int] = []
        handle = model.model.layers[1].input_layernorm.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        learn(adapter, some_rows(adapter), 3, learning_rate=0.0075)
        handle.remove()
        assert [module.training for module in adapter.model.modules()] == modes
        assert len(forwards) == 3 * (1 + checkpointing) + 2 * JUDGED  # memory is saved as in training
        found.append(all_factors(adapter))
    start = all_factors(dropping(0.0))
    assert not any(torch.allclose(a, b) for a, b in zip(found[0], start, strict=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error:the learned order is not kept")
def test_dropout_decides_of_no_order() -> None:
    """Small steps make the prefixes a little better, which the noise of two masks would hide."""
    for seed in range(6):
        adapter = dropping(0.1, seed)
        before = losses(adapter)
        learn(adapter, some_rows(adapter), 4, learning_rate=2e-4)
        assert sum(losses(adapter)[:-1]) < sum(before[:-1])


def test_a_step_in_parts_is_the_step() -> None:
    """Six rows at once, or four and two, weighted by their tokens."""
    ids = torch.randint(3, 90, (6, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for sizes in ((6,), (4, 2)):
        adapter = nested_llama(NESTING, "lora")
        adapter.reorder()

        def part(start: int, rows: int, adapter: NestedAdapter = adapter) -> Part:
            some = ids[start : start + rows]
            return Part(rows, some.numel(), None, lambda: adapter.model(input_ids=some, labels=some).loss)

        learn(adapter, Given([part(sum(sizes[:n]), size) for n, size in enumerate(sizes)]), 3)
        adapter.set_rank(2)
        with torch.no_grad():
            found.append(adapter.model(input_ids=ids).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-2)


def test_small_and_large_gradients_pass_through_float16() -> None:
    """Small ones would be zero, and large ones infinite."""
    ids = torch.randint(3, 90, (6, 12), generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in (torch.float32, torch.float16):
        adapter = nested_llama(NESTING, "lora")
        adapter.model.get_base_model().to(dtype)
        for parameter in InModel(adapter.model, adapter.name).parameters():
            parameter.data = parameter.data.float()
        for size in (2.0**-12, 1.0, 2.0**9):
            part = Part(
                6, 1.0, None, lambda model=adapter.model, size=size: model(input_ids=ids, labels=ids).loss * size
            )
            with learning(InModel(adapter.model, adapter.name)):
                pairs = gradients_at(InModel(adapter.model, adapter.name), [part], [2] * 6)
            found[dtype, size] = torch.cat([gradient.flatten() for pair in pairs.values() for gradient in pair])
    for size in (2.0**-12, 1.0, 2.0**9):
        right = found[torch.float32, size]
        assert (found[torch.float16, size] - right).norm() < 0.02 * right.norm()


def test_gradients_that_are_not_finite_leave_the_order() -> None:
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    before = all_factors(adapter)
    ((good,),) = some_rows(adapter).steps(ROWS, ROWS, 0)

    def steep() -> Tensor:
        loss = good.loss()
        return loss + (loss - loss.detach()).sqrt()  # its value is finite, its slope is not

    with pytest.raises(MatryoshkaError, match="gradients are NaN or infinity"):
        learn(adapter, Given([good], [good._replace(loss=steep)]), 3)
    assert all(torch.equal(a, b) for a, b in zip(before, all_factors(adapter), strict=True))


def test_processes_share_a_step(tmp_path: Path) -> None:
    """Four parts to learn: of three processes, two lack one and pass through the model all the same."""
    processes = 3
    command = [sys.executable, str(Path(__file__).with_name("shared_step.py")), str(tmp_path / "meeting")]
    started = [
        subprocess.Popen([*command, str(rank), str(processes)], stdout=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    for process in started:
        out, _ = process.communicate(timeout=120)
        found = json.loads(out)
        assert found["passes"] == 2
        assert found["gradients"] < 1e-5
        assert found["loss"] < 1e-5 < found["size"]


def test_factors_as_they_are_trained_are_reordered_first() -> None:
    """So that the function of training stays; and a learned order begins anew at each call."""
    tokenizer = tiny_tokenizer()
    model = get_peft_model(tiny_llama(vocab_size=len(tokenizer)), LoraConfig(r=8, target_modules=["q_proj", "up_proj"]))
    randomize(model)
    adapter = nest_as(model, NESTING, "matryoshka", deploy="reordered")
    ids, rows = torch.arange(3, 60)[None], [Row("a" * n, "bc" * n) for n in range(1, 7)]
    model.train()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
    found = []
    for _ in range(2):
        spectra = adapter.reorder("learned", rows, tokenizer, rows=24)
        assert adapter.state.reordered == "learned"
        assert model.training
        assert all(bool((values.diff() <= 0).all()) for values in spectra.values())
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, trained, rtol=0, atol=1e-4)
        found.append(all_factors(adapter))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    adapter.reorder()
    svd = all_factors(adapter)
    assert not any(torch.allclose(one, other, atol=1e-3) for one, other in zip(found[0], svd, strict=True))


def test_a_loss_that_is_not_finite_leaves_the_order() -> None:
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    before = all_factors(adapter)
    (good,) = some_rows(adapter).steps(ROWS, ROWS, 0)
    bad = [good[0]._replace(loss=lambda: good[0].loss() * float("nan"))]
    with pytest.raises(MatryoshkaError, match="NaN or infinity"):
        learn(adapter, Given(good, good, bad), 3)
    after = all_factors(adapter)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_order_that_loses_more_is_not_kept() -> None:
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    before = all_factors(adapter)
    ((part,),) = some_rows(adapter).steps(ROWS, ROWS, 0)
    uphill = part._replace(loss=lambda: -part.loss())
    with pytest.warns(
        UserWarning, match=r"the learned order is not kept: on rows that are only looked at it loses \d.*lower learning"
    ):
        assert not learn(adapter, Given(*[[uphill]] * 10, [part]), 10)
    after = all_factors(adapter)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not adapter.model.training


def test_rows_that_are_only_looked_at_decide() -> None:
    """They come after those of the steps; an order that loses more on the last of these alone is kept."""
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    ((part,),) = some_rows(adapter).steps(ROWS, ROWS, 0)
    uphill = part._replace(loss=lambda: -part.loss())
    assert learn(adapter, Given(*[[part]] * 20, [uphill], [part]), 21, learning_rate=0.0075)


def test_what_is_not_kept_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter says how it is ordered: by its SVD. The steps lead uphill here, and are judged downhill."""
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: backward(-loss))
    adapter = nested_llama(NESTING, "lora")
    tokenizer, rows = tiny_tokenizer(), [Row("a" * n, "bc" * n) for n in range(1, 7)]
    for by in ("learned", "trained"):
        with pytest.warns(UserWarning, match="not kept"):
            adapter.reorder(by, rows, tokenizer, rows=96)
        assert adapter.state.reordered == "svd"


def test_frozen_factors_learn_and_stay_frozen() -> None:
    adapter = nested_llama(NESTING, "lora")
    adapter.reorder()
    adapter.model.requires_grad_(False)
    before = losses(adapter)
    learn(adapter, some_rows(adapter), 10, learning_rate=0.0075)
    assert losses(adapter)[0] < before[0]
    assert not any(parameter.requires_grad for parameter in adapter.model.parameters())


@pytest.mark.parametrize("rank", [16, 64])
def test_a_direction_moves_as_far_whatever_r_is(rank: int) -> None:
    """The change of M's first rows in a step, summed over what flows into them."""
    moved = []
    for r in (32, rank):
        nesting = Nesting.powers_of_two(r)
        adapter = nested_llama(nesting, "lora", target_modules=["gate_proj"])
        adapter.reorder()
        before = all_factors(adapter)[::2]
        learn(adapter, some_rows(adapter), 1, learning_rate=1e-4)
        after = all_factors(adapter)[::2]
        M = [new @ torch.linalg.pinv(old) for new, old in zip(after, before, strict=True)]
        moved.append(sum(float((m[0] - torch.eye(r)[0]).detach().abs().sum()) for m in M))
    assert moved[0] == pytest.approx(32 * 1e-4 * len(M), rel=0.1)
    assert moved[1] == pytest.approx(moved[0], rel=0.1)


def test_one_rank_has_no_order() -> None:
    adapter = nested_llama(Nesting([8]), "lora")
    with pytest.raises(MatryoshkaError, match="one nested rank"):
        learn(adapter, some_rows(adapter), 1)


def test_experts_that_tokens_are_routed_to_have_one_rank_a_batch() -> None:
    config = LoraConfig(r=8, lora_alpha=8, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    model = get_peft_model(tiny_mixtral(), config)
    randomize(model)
    adapter = nest_as(model, NESTING, "lora")
    adapter.reorder()
    adapter.model.eval()
    before = losses(adapter)
    learn(adapter, some_rows(adapter), 30, learning_rate=0.0075)
    after = losses(adapter)
    assert abs(after[-1] - before[-1]) < 1e-3
    assert sum(after[:-1]) < sum(before[:-1]) - 0.02


@pytest.mark.parametrize("kind", ["Embedding", "Conv2d", "Conv1D", "Linear"])
def test_other_kinds_of_layers(kind: str) -> None:
    layer = nested_layer(kind, Nesting([1, 2, 4]), "lora")
    layer.adapter.reorder()
    x = layer.kind.batch(5)
    with torch.no_grad(), layer.adapter.rows([4] * 5):
        whole = layer.adapter.model(x)
    target = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0), dtype=whole.dtype)

    def loss() -> Tensor:
        return ((layer.adapter.model(x) - target) ** 2).mean()

    before = [f.clone() for f in layer.factors]
    learn(layer.adapter, Given([Part(5, 1.0, None, loss)]), 4)
    assert not torch.equal(layer.factors[0], before[0])
    with torch.no_grad(), layer.adapter.rows([4] * 5):
        torch.testing.assert_close(layer.adapter.model(x), whole, rtol=1e-9, atol=1e-9)


# What people give as data.

ROWS_OF_TEXT = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4"}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DatasetDict(train=Dataset.from_list(ROWS_OF_TEXT)), "data is a DatasetDict of train; give a Trainer, a datas"),
        ({"prompt": ["1"], "completion": ["2"]}, "data is a dict of prompt, completion; give a Trainer"),
        (pd.DataFrame(ROWS_OF_TEXT), "data, row 1 is 'prompt'; expected a mapping with prompt and completion"),
        (["a", "b"], "data, row 1 is 'a'; expected a mapping"),
        ([*ROWS_OF_TEXT, None], "data, row 3 is None; expected a mapping"),
        ([{"prompt": "a", "completion": None}], "data, row 1 has no answer to compare with"),
        ([{"prompt": "a"}], "data, row 1 has no answer to compare with"),
        ([{"prompt": "a", "completion": 3}], "row 1: prompt is 'a' and completion 3; expected two texts"),
        ([{"prompt": [{"role": "user"}], "completion": "a"}], "expected two texts, or two lists of messages"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_are_no_rows_is_refused_before_the_adapter_is_touched(data: Any, message: str) -> None:
    adapter = nested_llama(Nesting([1, 2]), deploy="reordered", layers=1)
    before = all_factors(adapter)
    with pytest.raises(MatryoshkaError, match=message):
        adapter.reorder("loss", data, tiny_tokenizer())
    assert not adapter.reordered
    assert all(map(torch.equal, before, all_factors(adapter)))


@pytest.mark.parametrize("rows", [8.0, "8", 0])
def test_a_number_of_rows_is_a_whole_number(rows: Any) -> None:
    adapter = nested_llama(Nesting([1, 2]), deploy="reordered", layers=1)
    with pytest.raises(MatryoshkaError, match=f"rows is {rows!r}; take 1 or more"):
        adapter.reorder("loss", ROWS_OF_TEXT, tiny_tokenizer(), rows=rows)
    assert not adapter.reordered


def plain_trainer(model: Any, rows: Any, collator: Any, folder: Path) -> Trainer:
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=2, use_cpu=True, report_to="none")
    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)


@pytest.mark.parametrize("by", ["activations", "loss", "learned", "trained"])
def test_a_trainer_whose_rows_still_have_their_text(by: Any, tmp_path: Path) -> None:
    """Its training leaves out what the model does not take."""
    adapter = nested_llama(Nesting([1, 2]), deploy="reordered", layers=1)
    rows = [{"input_ids": [5, 6, 7, n], "labels": [-100, 6, 7, n], "text": "hello"} for n in range(8, 24)]
    collator = DataCollatorForSeq2Seq(tiny_tokenizer())
    for data in (rows, Dataset.from_list(rows)):
        adapter.reorder(by, plain_trainer(adapter.model, data, collator, tmp_path), rows=12)
        assert adapter.reordered


def test_a_trainer_that_loads_its_data_itself_keeps_its_columns(tmp_path: Path) -> None:
    class Weighted(Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            weight = inputs.pop("weight")
            return model(**inputs).loss * weight.mean()

    adapter = nested_llama(Nesting([1, 2]), deploy="reordered", layers=1)
    rows = [{"input_ids": [5, 6, 7, n], "labels": [-100, 6, 7, n], "weight": n / 8} for n in range(8, 24)]
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to="none")
    trainer = Weighted(adapter.model, arguments, train_dataset=rows, data_collator=default_data_collator)
    adapter.reorder("learned", trainer, rows=12)
    assert adapter.reordered


@pytest.mark.parametrize("by", ["activations", "loss", "learned", "trained"])
def test_a_trainer_of_images(by: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
    adapter = nest(get_peft_model(base, LoraConfig(r=4, target_modules=["fc1", "fc2"], modules_to_save=["classifier"])))
    randomize(adapter.model)
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": n % 3} for n in range(16)]
    adapter.reorder(by, plain_trainer(adapter.model, rows, default_data_collator, tmp_path), rows=12)
    assert adapter.reordered


def test_a_trainer_whose_collator_makes_no_batch(tmp_path: Path) -> None:
    adapter = nested_llama(Nesting([1, 2]), deploy="reordered", layers=1)
    trainer = plain_trainer(adapter.model, [{"input_ids": [5], "labels": "a"}], default_data_collator, tmp_path)
    trainer.data_collator = lambda rows: {}["rows"]
    with pytest.raises(MatryoshkaError, match="the Trainer's collator makes no batch of a row of its data"):
        adapter.reorder("loss", trainer)
    trainer.data_collator = lambda rows: {"labels": [row["labels"] for row in rows]}
    with pytest.raises(MatryoshkaError, match="the rows of Trainer have no labels"):
        adapter.reorder("loss", trainer)
    assert not adapter.reordered
