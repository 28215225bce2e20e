"""Learning the order of directions: the product never changes, and the prefixes lose less."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import nest_as, nested_layer, nested_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from some_rows import all_factors, loss_of, same_bits, some_rows, trainer_of
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from matryoshka_lora import NestedAdapter, Nesting
from matryoshka_lora.reordering.learned import OrderOptimizer, _with_ranks, learn
from matryoshka_lora.reordering.rows import Rows, read_data

NESTING = Nesting((1, 2, 4, 8))
TRAIN, HELD_OUT = some_rows(64), some_rows(32, seed=1)


def factors(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator).double() for shape in ((rank, 9), (7, rank)))
    return A, B


def noise(pair: tuple[Tensor, Tensor], seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(factor.shape, generator=generator).double() for factor in pair)


@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(1e-4, 0.3))
def test_the_product_never_changes(rank: int, seed: int, rate: float) -> None:
    A, B = factors(rank, seed)
    optimizer = OrderOptimizer([(A, B)], range(1, rank + 1), rate)
    for step in range(5):
        optimizer.step([noise((A, B), seed + step)])
    for new_A, new_B in (*optimizer.pairs, *optimizer.finished()):
        assert rank == 1 or not torch.allclose(new_A, A)
        torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-9, atol=1e-9)


def test_the_first_step_goes_down_the_gradient_of_the_order() -> None:
    """Adam's first step is the sign of the gradient; autograd differentiates exp(D) at D = 0."""
    A, B = factors(4, 0)
    target = torch.randn(7, 9, generator=torch.Generator().manual_seed(3)).double()

    def loss(A: Tensor, B: Tensor) -> Any:
        return sum(((B[:, :r] @ A[:r] - target) ** 2).sum() for r in (1, 3))

    D = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    loss(torch.matrix_exp(D) @ A, B @ torch.matrix_exp(-D)).backward()
    leaf_A, leaf_B = A.clone().requires_grad_(), B.clone().requires_grad_()
    loss(leaf_A, leaf_B).backward()
    optimizer = OrderOptimizer([(A, B)], [1, 3, 4], 1e-3 * 8 / 32)
    optimizer.step([(leaf_A.grad, leaf_B.grad)])  # type: ignore[list-item]
    assert D.grad is not None
    # Directions 2 and 3 may mix as they like: no prefix of the loss sees it.
    block = torch.tensor([0, 1, 1, 2])
    assert D.grad[block[:, None] == block].abs().max() < 1e-9 * D.grad.abs().max()
    wanted = torch.matrix_exp(-1e-3 * D.grad.sign() * (block[:, None] != block)) @ A
    torch.testing.assert_close(optimizer.pairs[0][0], wanted, rtol=1e-6, atol=1e-8)


def test_it_finds_the_prefix_that_the_svd_misses() -> None:
    """A loss asks for the smaller of two directions first: the order turns, and the whole stays."""
    A, B = torch.eye(2, 5).double() * 2, torch.eye(5, 2).double()
    A[1] /= 4
    wanted = B[:, 1:] @ A[1:]
    A[0, 1] = B[1, 0] = 0.1  # exactly at right angles, the gradient would be zero
    optimizer, product = OrderOptimizer([(A, B)], [1, 2], 0.0125), B @ A
    for _ in range(200):
        leaf_A, leaf_B = (factor.clone().requires_grad_() for factor in optimizer.pairs[0])
        ((leaf_B[:, :1] @ leaf_A[:1] - wanted) ** 2).sum().backward()
        optimizer.step([(leaf_A.grad, leaf_B.grad)])  # type: ignore[list-item]
    A, B = optimizer.pairs[0]
    assert ((B[:, :1] @ A[:1] - wanted) ** 2).sum() < 0.05 * (wanted**2).sum()
    torch.testing.assert_close(B @ A, product)


def test_ranks_between_nested_ones_are_the_best_of_their_block() -> None:
    optimizer = OrderOptimizer([factors(6, 1)], [2, 6], 0.1)
    optimizer.step([noise(factors(6, 1), 2)])
    ((now_A, now_B),), ((A, B),) = optimizer.pairs, optimizer.finished()
    for rank in (2, 6):
        torch.testing.assert_close(B[:, :rank] @ A[:rank], now_B[:, :rank] @ now_A[:rank])
    block = now_B[:, 2:] @ now_A[2:]
    values = torch.linalg.svdvals(block)
    for rank in (3, 4, 5):
        left = block - B[:, 2:rank] @ A[2:rank]
        torch.testing.assert_close(left.norm(), values[rank - 2 :].norm(), rtol=1e-9, atol=1e-9)


# On a model.


def reordered(dtype: torch.dtype = torch.float32, **lora: Any) -> NestedAdapter:
    chosen = {"target_modules": ["q_proj", "v_proj", "down_proj"], **lora}
    adapter = nested_llama(NESTING, "lora", layers=1, **chosen)
    for name, parameter in adapter.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    adapter.reorder()
    return adapter


def rows_for(adapter: NestedAdapter) -> Rows:
    rows = read_data(adapter.model, TRAIN)
    rows.held_out, rows.quiet = read_data(adapter.model, HELD_OUT), True
    return rows


def test_prefixes_lose_less_and_the_whole_stays() -> None:
    adapter = reordered()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        whole = adapter.model(input_ids=ids).logits
    before = [loss_of(adapter, HELD_OUT, rank) for rank in NESTING.ranks]
    assert learn(adapter, rows_for(adapter))
    after = [loss_of(adapter, HELD_OUT, rank) for rank in NESTING.ranks]
    with torch.no_grad():  # the whole drifts by the rounding of its float32 factors alone
        assert (adapter.model(input_ids=ids).logits - whole).norm() < 1e-5 * whole.norm()
    assert abs(after[-1] - before[-1]) < 1e-4
    assert sum(after[:-1]) < sum(before[:-1]) - 0.3


def test_an_order_that_loses_more_is_not_kept() -> None:
    """Its gradients lead uphill."""
    adapter = reordered()
    before, rows = all_factors(adapter), rows_for(adapter)
    downhill = rows.loss
    rows.loss = lambda batch: downhill(batch) * (-1 if torch.is_grad_enabled() else 1)
    with pytest.warns(UserWarning, match=r"the learned order is not kept: on rows that it was not"):
        assert not learn(adapter, rows, 120)
    assert same_bits(before, all_factors(adapter))


@pytest.mark.parametrize(("count", "least"), [(12, 4), (8, 2), (2, 0)])
def test_every_rank_below_r_has_as_many_rows(count: int, least: int) -> None:
    rows = rows_for(reordered())
    found = _with_ranks(rows, range(20, 20 + count), (1, 2, 4), random.Random(0))
    sizes = {rank: len(batch["labels"]) for batch, rank in found}
    assert sum(sizes.values()) == count
    assert set(sizes.values()) <= {least, least + 1}
    assert list(sizes) == sorted(sizes)


def test_training_factors_are_reordered_first_and_a_second_call_begins_anew(tmp_path: Path) -> None:
    adapter = nested_llama(NESTING, "matryoshka", layers=1)
    trainer = trainer_of(adapter.model, tmp_path, TRAIN, HELD_OUT)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        whole = adapter.model.train()(input_ids=ids).logits
    found = []
    for _ in range(2):
        adapter.reorder("learned", trainer, rows=24)
        assert adapter.order == "learned"
        assert adapter.model.training
        with torch.no_grad():
            torch.testing.assert_close(
                adapter.model(input_ids=ids).logits, whole, rtol=0, atol=1e-3
            )
        found.append(all_factors(adapter))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_rows_that_judge_are_never_learned_from(tmp_path: Path) -> None:
    adapter = reordered()
    trainer = trainer_of(adapter.model, tmp_path, TRAIN)
    adapter.reorder("learned", trainer, rows=240)
    assert len(set(trainer.judged)) == 8
    assert not set(trainer.judged) & set(trainer.learned)


def test_half_precision_factors_keep_their_dtype() -> None:
    adapter = reordered(torch.float16)
    before = sum(loss_of(adapter, HELD_OUT, rank) for rank in NESTING.ranks[:-1])
    assert learn(adapter, rows_for(adapter))
    assert sum(loss_of(adapter, HELD_OUT, rank) for rank in NESTING.ranks[:-1]) < before - 0.3
    assert {factor.dtype for factor in all_factors(adapter)} == {torch.float16}


def test_layers_that_flatten_their_rows_learn_too() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = OPTForCausalLM(OPTConfig(vocab_size=96, **sizes, dropout=0.5, init_std=0.3))
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["fc1"], lora_dropout=0.5))
    adapter = nest_as(model, NESTING, "lora")
    with torch.no_grad():
        for A, B in adapter.parameters().values():
            A.normal_(std=0.3)
            B.normal_(std=0.3)
    adapter.reorder()
    before = [loss_of(adapter, HELD_OUT, rank) for rank in NESTING.ranks]
    assert learn(adapter, rows_for(adapter))
    after = [loss_of(adapter, HELD_OUT, rank) for rank in NESTING.ranks]
    assert sum(after[:-1]) < sum(before[:-1])


@pytest.mark.parametrize("kind", ["Embedding", "Conv2d", "Conv1D", "Linear"])
def test_other_kinds_of_layers(kind: str) -> None:
    layer = nested_layer(kind, Nesting((1, 2, 4)), "lora")
    layer.adapter.reorder()
    x = layer.kind.batch(16)
    with torch.no_grad():
        whole = layer.adapter.model(x)
    target = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0)).to(whole)

    def loss(batch: Any) -> Tensor:
        error = layer.adapter.model(batch["x"]) - batch["labels"]
        return (error**2).mean()

    def collate(numbers: list[int]) -> Any:
        return {"x": x[numbers], "labels": target[numbers]}

    before = [factor.detach().clone() for factor in layer.factors]
    rows = Rows(range(16), collate, loss, x.device, quiet=True)
    rows.held_out = Rows(range(16), collate, loss, x.device)
    assert learn(layer.adapter, rows, 48)
    assert not torch.equal(layer.factors[0], before[0])
    with torch.no_grad():
        torch.testing.assert_close(layer.adapter.model(x), whole, rtol=1e-9, atol=1e-9)
