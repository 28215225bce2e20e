"""One rank per row of the batch, and one rank per layer: each equals what it would be on its own."""

from __future__ import annotations

import asyncio
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.utils.checkpoint
from conftest import lora_config, nested_layer, nested_llama, randomize, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, load, nest
from matryoshka_lora.rules import RULES

NESTING = Nesting([1, 2, 4, 8], "sqrt", 0.7)
RANKS = [1, 8, 2, 8, 4]


@pytest.fixture(scope="module")
def adapter() -> NestedAdapter:
    """A nested Llama; tests leave it as they found it."""
    return nested_llama(NESTING)


@pytest.fixture(autouse=True)
def unchanged(adapter: NestedAdapter) -> Iterator[None]:
    adapter.model.eval()
    adapter.set_rank(8)
    yield
    adapter.model.eval()
    adapter.model.zero_grad()


def tokens(rows: int, length: int = 7, seed: int = 3) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def deployed(deploy: str) -> NestedAdapter:
    return nested_llama(NESTING, deploy=deploy)


def one_by_one(adapter: NestedAdapter, ids: Tensor, ranks: list[int]) -> Tensor:
    outputs = []
    for row, rank in zip(ids, ranks, strict=True):
        adapter.set_rank(rank)
        outputs.append(adapter.model(row[None]).logits)
    adapter.set_rank(8)
    return torch.cat(outputs)


@settings(max_examples=10)
@given(
    ranks=st.lists(st.sampled_from(NESTING.ranks), min_size=1, max_size=6),
    deploy=st.sampled_from(["paper", "reordered"]),
)
def test_forward_equals_the_rows_one_by_one(ranks: list[int], deploy: str) -> None:
    adapter = deployed(deploy)
    ids = tokens(len(ranks))
    with torch.no_grad():
        with adapter.rows(ranks):
            mixed = adapter.model(ids).logits
        alone = one_by_one(adapter, ids, ranks)
        other = one_by_one(adapter, ids, [1 if rank == 8 else 8 for rank in ranks])
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-4)
    assert ((mixed - other).abs().amax(dim=(1, 2)) > 0.1).all()


def loss(logits: Tensor) -> Tensor:
    return logits.float().square().mean(dim=(1, 2)).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    assert grads
    return grads


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max(float((actual[k] - expected[k]).norm() / expected[k].norm()) for k in expected if expected[k].norm() > 0)


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_equal_the_sum_over_the_rows(adapter: NestedAdapter, exact: bool) -> None:
    ids = tokens(len(RANKS))
    with adapter.rows(RANKS, exact):
        loss(adapter.model(ids).logits).backward()
    mixed = gradients(adapter.model)
    loss(one_by_one(adapter, ids, RANKS)).backward()
    assert relative_error(mixed, gradients(adapter.model)) < 1e-4
    loss(one_by_one(adapter, ids, [*RANKS[::-1][:4], 1])).backward()
    assert relative_error(mixed, gradients(adapter.model)) > 1e-2


def test_columns_beyond_every_rows_rank_get_no_gradient(adapter: NestedAdapter) -> None:
    adapter.model.train()
    with adapter.rows([1, 2]):
        loss(adapter.model(tokens(2)).logits).backward()
    for name, grad in gradients(adapter.model).items():
        beyond = grad[2:] if "lora_A" in name else grad[:, 2:]
        within = grad[:2] if "lora_A" in name else grad[:, :2]
        assert beyond.count_nonzero() == 0
        assert within.count_nonzero() > 0


# Generation. Left-padded prompts of different lengths, as batches of prompts are.

LENGTHS = [4, 9, 6, 3, 7]


def prompts() -> list[Tensor]:
    return [tokens(1, length, seed=length)[0] for length in LENGTHS]


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def generate(adapter: NestedAdapter, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """The new tokens only."""
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    output = adapter.model.generate(**inputs, **settings)
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_generation_equals_the_rows_one_by_one(adapter: NestedAdapter, options: dict[str, Any]) -> None:
    with adapter.rows(RANKS):
        mixed = generate(adapter, padded(prompts()), **options)
    alone = []
    for row, rank in zip(prompts(), RANKS, strict=True):
        adapter.set_rank(rank)
        alone.append(generate(adapter, padded([row]), **options))
    assert torch.equal(mixed, torch.cat(alone))
    # The ranks do matter for what is said.
    adapter.set_rank(8)
    full = generate(adapter, padded(prompts()), **options)
    differs = (full != mixed).any(dim=1).view(len(RANKS), -1).any(dim=1)
    assert differs.tolist() == [rank != 8 for rank in RANKS]


def test_sampled_sequences_of_a_row_share_its_rank(adapter: NestedAdapter) -> None:
    """With top_k=1 sampling is greedy, so each returned sequence must be the greedy one of its row."""
    with adapter.rows(RANKS):
        greedy = generate(adapter, padded(prompts()))
        sampled = generate(adapter, padded(prompts()), do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(sampled, greedy.repeat_interleave(3, dim=0))


def test_sampled_sequences_of_a_prompt_may_have_ranks_of_their_own(adapter: NestedAdapter) -> None:
    prompt = padded([prompts()[0]])
    with adapter.rows(RANKS):
        sampled = generate(adapter, prompt, do_sample=True, top_k=1, num_return_sequences=len(RANKS))
    for answer, rank in zip(sampled, RANKS, strict=True):
        adapter.set_rank(rank)
        assert torch.equal(answer[None], generate(adapter, prompt))


# What is not a batch of rows is refused.


@pytest.mark.parametrize("name", ["input_ids", "inputs", None, "inputs_embeds"])
def test_generation_from_another_number_of_prompts_is_refused(adapter: NestedAdapter, name: str | None) -> None:
    """Twice as many would pass for two beams of each."""
    prompts, options = tokens(4), {"max_new_tokens": 2, "pad_token_id": 0}
    given = adapter.model.get_input_embeddings()(prompts) if name == "inputs_embeds" else prompts
    with adapter.rows([1, 8]):
        with pytest.raises(MatryoshkaError, match="2 rows have a rank, but a layer got 4 rows: give one rank"):
            adapter.model.generate(*((given,) if name is None else ()), **({name: given} if name else {}), **options)
        with adapter.model.disable_adapter():
            adapter.model.generate(prompts, **options)
    with adapter.rows([1, 1, 8, 8]):
        adapter.model.generate(prompts, **options)


@pytest.mark.parametrize("generates", [True, False])
def test_an_interrupt_leaves_no_number_of_rows(adapter: NestedAdapter, generates: bool) -> None:
    model: Any = adapter.model

    def interrupted(call: Callable[[Tensor], Tensor], rows: int) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = model.base_model.model.model.layers[0].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(tokens(rows))
        handle.remove()

    def with_beams(ids: Tensor) -> Tensor:
        return generate(adapter, {"input_ids": ids}, num_beams=2)

    def forward(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids).logits
        return logits

    first, then = (with_beams, forward) if generates else (forward, with_beams)
    with torch.no_grad():
        with adapter.rows([1, 8]):
            expected = then(tokens(2))
        interrupted(first, 3)
        with adapter.rows([1, 8]):
            assert torch.equal(then(tokens(2)), expected)
            interrupted(first, 2)
            assert torch.equal(then(tokens(2)), expected)


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_another_number_of_rows_is_refused(adapter: NestedAdapter, rows: int) -> None:
    with (
        adapter.rows([1, 2, 8]),
        pytest.raises(MatryoshkaError, match=f"3 rows have a rank, but a layer got {rows} rows: give one rank"),
    ):
        adapter.model(tokens(rows))


@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv1d", "Conv2d"])
def test_flattened_rows_are_refused_by_each_kind_of_layer(kind: str) -> None:
    nested = nested_layer(kind, Nesting([1, 2]))
    x = nested.kind.batch(2)
    with nested.adapter.rows([1, 2]):
        if kind in ("Linear", "Embedding"):
            for flat in (x.flatten(0, 1), x.flatten(0, 1)[None]):
                with pytest.raises(MatryoshkaError, match=r"2 rows have a rank.* turn packing and padding_free off"):
                    nested.layer(flat)
        else:
            with pytest.raises(MatryoshkaError, match="2 rows have a rank"):
                nested.layer(x[:1])


@pytest.mark.parametrize("kind", ["Linear-2d-input", "Conv1d", "Conv2d"])
@pytest.mark.parametrize("training", [True, False])
def test_an_input_without_a_batch_is_refused(kind: str, training: bool) -> None:
    """Its leading dimension is R after A, which must not be taken for a batch of R rows."""
    nested = nested_layer(kind, Nesting([1, 2]))
    nested.adapter.model.train(training)
    with nested.adapter.rows([1, 2]), pytest.raises(MatryoshkaError, match="rows"):
        nested.layer(nested.kind.batch(1)[0])


def test_a_packed_batch_is_refused(adapter: NestedAdapter) -> None:
    with adapter.rows([1, 2]), pytest.raises(MatryoshkaError, match="Packed, padding-free or flattened"):
        adapter.model(tokens(1, 14), position_ids=torch.arange(7).repeat(2)[None])


def test_training_draws_may_be_longer_but_not_shorter_than_the_batch() -> None:
    nested = nested_layer("Linear", NESTING, "stratified")
    nested.adapter.draw(0, rows=4)
    nested.layer(nested.kind.batch(3))  # the last batch of an epoch
    for rows in (5, 8):
        with pytest.raises(MatryoshkaError, match=f"4 rows have a rank, but a layer got {rows} rows"):
            nested.layer(nested.kind.batch(rows))


class Routed(nn.Module):
    """Experts as a list of layers, each of which gets some tokens of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        first = tokens[:, 0] > 0
        out = torch.empty_like(tokens)
        out[first], out[~first] = self.experts[0](tokens[first]), self.experts[1](tokens[~first])
        return self.head(out.view_as(x))


def routed(targets: str, rule: str = "matryoshka") -> NestedAdapter:
    nesting = Nesting([1, 2])
    model = get_peft_model(Routed(), lora_config(nesting, target_modules=targets))
    randomize(model)
    return nest(model, nesting.ranks, rule=rule)


def test_rows_with_experts_are_refused_at_once() -> None:
    adapter = routed(r".*experts\.\d|.*head")
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    before = adapter.model(x)
    with (
        pytest.raises(MatryoshkaError, match=r"tokens of experts\.0 are routed to experts.*: use set_rank"),
        adapter.rows([1, 2]),
    ):
        pytest.fail("the context must not open")
    assert torch.equal(adapter.model(x), before)
    with pytest.raises(MatryoshkaError, match=r"experts\.0 cannot be nested: .*'stratified' needs them: take another"):
        routed(r".*experts\.\d", "stratified")
    head_only = routed(".*head")
    with head_only.rows([1, 2]):
        head_only.model(x)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([], "rows\\(\\) needs one rank for each row of the batch; the list is empty"),
        ([1, 3], "rank 3 was not trained; the trained ranks are 1, 2, 4, 8"),
        ([1, 16], "rank 16 is above the largest rank 8"),
        ([1, 2.0], "rank 2.0 is not an integer"),
        ([-1], "rank -1 is not positive"),
        (4, r"rows\(\) takes a rank for each row of the batch, as \[1, 8\] for two, and not 4: .*use set_rank"),
    ],
)
def test_wrong_ranks_are_refused(adapter: NestedAdapter, ranks: Any, message: str) -> None:
    with pytest.raises(MatryoshkaError, match=message), adapter.rows(ranks):
        pytest.fail("the context must not open")


def test_any_sequence_of_integers_is_taken(adapter: NestedAdapter) -> None:
    import numpy as np

    with torch.no_grad():
        with adapter.rows(RANKS):
            expected = adapter.model(tokens(5)).logits
        for ranks in (tuple(RANKS), np.array(RANKS)):
            with adapter.rows(ranks):
                assert torch.equal(adapter.model(tokens(5)).logits, expected)


def test_the_context_ends_however_it_is_left(adapter: NestedAdapter) -> None:
    ids = tokens(2)
    with torch.no_grad():
        before = adapter.model(ids).logits
        with pytest.raises(RuntimeError, match="mine"), adapter.rows([1, 2]):
            raise RuntimeError("mine")
        assert torch.equal(adapter.model(ids).logits, before)
        with adapter.rows([1, 2]):
            outer = adapter.model(ids).logits
            with adapter.rows([2, 1]):
                assert not torch.equal(adapter.model(ids).logits, outer)
            assert torch.equal(adapter.model(ids).logits, outer)
            adapter.set_rank(4)  # of effect once the context ends
            assert torch.equal(adapter.model(ids).logits, outer)
        adapter.set_rank(8)
        assert torch.equal(adapter.model(ids).logits, before)
        assert not torch.equal(outer, before)


def test_contexts_may_end_in_any_order(adapter: NestedAdapter) -> None:
    """As those of generators and of asynchronous functions do."""
    ids = tokens(2)

    def opened(ranks: list[int]) -> Iterator[None]:
        with adapter.rows(ranks):
            yield

    def logits() -> Tensor:
        with torch.no_grad():
            return adapter.model(ids).logits

    full, one_by_rank = logits(), {}
    for rank in (1, 2):
        with adapter.rows([rank, rank]):
            one_by_rank[rank] = logits()
    first, second = opened([1, 1]), opened([2, 2])
    next(first)
    next(second)
    assert torch.equal(logits(), one_by_rank[2])
    next(first, None)
    assert torch.equal(logits(), one_by_rank[2])
    next(second, None)
    assert torch.equal(logits(), full)


def test_contexts_of_two_threads_are_refused(adapter: NestedAdapter) -> None:
    ids = tokens(2)
    with torch.no_grad():
        full = adapter.model(ids).logits
        with ThreadPoolExecutor(1) as other:
            with adapter.rows([1, 2]):
                expected = adapter.model(ids).logits
                with pytest.raises(MatryoshkaError, match="another thread has a `with adapter"):
                    other.submit(adapter.rows([2, 1]).__enter__).result()
                assert torch.equal(adapter.model(ids).logits, expected)
            assert torch.equal(adapter.model(ids).logits, full)
            context = adapter.rows([1, 2])
            other.submit(context.__enter__).result()
            with pytest.raises(MatryoshkaError, match="another thread has"), adapter.rows([2, 1]):
                pytest.fail("the context must not open")
            other.submit(context.__exit__, None, None, None).result()
        assert torch.equal(adapter.model(ids).logits, full)


def logits_of(adapter: NestedAdapter, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = adapter.model(ids).logits
        return logits


def at_rank(adapter: NestedAdapter, ids: Tensor, rank: int) -> Tensor:
    with adapter.rows([rank]):
        return logits_of(adapter, ids)


@pytest.mark.parametrize("computes_in", ["thread", "task"])
def test_contexts_of_two_tasks_of_one_thread_are_refused(adapter: NestedAdapter, computes_in: str) -> None:
    """As those of two requests to an asynchronous server are."""
    ids = tokens(1)
    expected = {rank: at_rank(adapter, ids, rank) for rank in (1, 8)}

    async def answer(rank: int) -> Tensor:
        with adapter.rows([rank]):
            await asyncio.sleep(0)
            if computes_in == "thread":
                return await asyncio.to_thread(logits_of, adapter, ids)
            return logits_of(adapter, ids)

    async def both() -> list[Any]:
        return await asyncio.gather(answer(1), answer(8), return_exceptions=True)

    first, second = asyncio.run(both())
    assert torch.equal(first, expected[1])
    with pytest.raises(MatryoshkaError, match=r"another task has a `with adapter\.rows.* by an asyncio\.Lock"):
        raise second

    async def one_by_one() -> list[Tensor]:
        lock = asyncio.Lock()

        async def locked(rank: int) -> Tensor:
            async with lock:
                return await answer(rank)

        return await asyncio.gather(locked(1), locked(8))

    assert all(torch.equal(got, expected[rank]) for got, rank in zip(asyncio.run(one_by_one()), (1, 8), strict=True))


def test_a_call_of_a_thread_or_task_that_opened_nothing_is_refused(adapter: NestedAdapter) -> None:
    ids = tokens(1)
    full, low = logits_of(adapter, ids), at_rank(adapter, ids, 1)
    model: Any = adapter.model
    with ThreadPoolExecutor(1) as other:
        with adapter.rows([1]):
            for call in (model, lambda ids: model.generate(ids, max_new_tokens=2, pad_token_id=0)):
                with pytest.raises(MatryoshkaError, match="another thread has a `with adapter"):
                    other.submit(call, ids).result()
            assert torch.equal(logits_of(adapter, ids), low)
        assert torch.equal(other.submit(logits_of, adapter, ids).result(), full)

    async def opens() -> None:
        with adapter.rows([1]):
            await asyncio.sleep(0)
            inner = asyncio.create_task(asyncio.to_thread(logits_of, adapter, ids))
            assert torch.equal(await inner, low)

    async def served() -> None:
        task = asyncio.create_task(opens())
        await asyncio.sleep(0)
        with pytest.raises(MatryoshkaError, match="another task has a `with adapter"):
            logits_of(adapter, ids)
        await task

    asyncio.run(served())
    assert torch.equal(logits_of(adapter, ids), full)


def test_a_task_within_a_context_does_not_change_the_ranks_of_its_caller(adapter: NestedAdapter) -> None:
    ids = tokens(1)
    low, full = at_rank(adapter, ids, 1), at_rank(adapter, ids, 8)

    async def opens() -> None:
        with adapter.rows([8]):
            assert torch.equal(logits_of(adapter, ids), full)
            await asyncio.sleep(0)

    async def serve() -> None:
        with adapter.rows([1]):
            task = asyncio.create_task(opens())
            await asyncio.sleep(0)
            with pytest.raises(MatryoshkaError, match="another task has"):
                logits_of(adapter, ids)
            await task
            assert torch.equal(logits_of(adapter, ids), low)

    asyncio.run(serve())


def test_rows_are_those_of_an_active_adapter(tmp_path: Path) -> None:
    first = nested_llama(NESTING)
    first.save(tmp_path)
    second = load(first.model, tmp_path, adapter="second")
    with pytest.raises(MatryoshkaError, match=r"'second' is not active, default is: call .*set_adapter\('second'\)"):
        second.rows([1, 2]).__enter__()
    second.model.set_adapter("second")
    with second.rows([1, 2]):
        second.model(tokens(2))


@pytest.mark.parametrize("more", [{"modules_to_save": ["norm"]}, {"bias": "all"}], ids=str)
def test_rank_zero_is_refused_where_the_base_model_was_trained_too(more: dict[str, Any]) -> None:
    adapter = nested_llama(NESTING, **more)
    assert not adapter.has_base
    with adapter.rows([1, 2]):
        adapter.model(tokens(2))
    with pytest.raises(MatryoshkaError, match=rf"rank 0 is not the base model here: {next(iter(more))} changed"):
        adapter.rows([0, 2]).__enter__()


def test_a_merged_adapter_has_no_rows(adapter: NestedAdapter) -> None:
    adapter.merge(8)
    try:
        with pytest.raises(MatryoshkaError, match="merged into the base weights: unmerge it to give each row a rank"):
            adapter.rows([1, 2]).__enter__()
    finally:
        adapter.unmerge()


# Gradient checkpointing runs the forward again inside backward.


def checkpointed(adapter: NestedAdapter, reentrant: bool) -> nn.Module:
    adapter.model.train()
    adapter.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapter.model.enable_input_require_grads()
    return adapter.model


@pytest.fixture
def own() -> NestedAdapter:
    """An adapter of the test's own, since checkpointing leaves hooks behind."""
    return nested_llama(NESTING)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_inside_the_context_are_right(own: NestedAdapter, reentrant: bool) -> None:
    ids = tokens(len(RANKS))
    own.model.train()
    with own.rows(RANKS):
        loss(own.model(ids).logits).backward()
    expected = gradients(own.model)
    model = checkpointed(own, reentrant)
    assert model.base_model.model.is_gradient_checkpointing
    with own.rows(RANKS):
        loss(model(ids).logits).backward()
        assert relative_error(gradients(model), expected) < 1e-5
        loss(model(ids).logits).backward()  # a second one in the same context
    assert relative_error(gradients(model), expected) < 1e-5
    with own.rows(RANKS[::-1]):
        loss(model(ids).logits).backward()
    assert relative_error(gradients(model), expected) > 1e-2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_backward_outside_the_context_is_refused(own: NestedAdapter, reentrant: bool) -> None:
    model = checkpointed(own, reentrant)
    with own.rows(RANKS):
        output = loss(model(tokens(len(RANKS))).logits)
    with pytest.raises(MatryoshkaError, match=r"other ranks than its forward had: .*call backward\(\) inside"):
        output.backward()
    # Nothing is left behind: the next step is right.
    model.zero_grad()
    loss(model(tokens(2)).logits).backward()
    after = gradients(model)
    model.base_model.model.gradient_checkpointing_disable()
    loss(model(tokens(2)).logits).backward()
    assert relative_error(after, gradients(model)) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_backward_in_another_context_is_refused(own: NestedAdapter, reentrant: bool) -> None:
    model = checkpointed(own, reentrant)
    with own.rows([1, 2]):
        output = loss(model(tokens(2)).logits)
    with own.rows([8, 4]), pytest.raises(MatryoshkaError, match="other ranks than its forward had"):
        output.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_backward_through_two_contexts_is_never_silently_wrong(
    own: NestedAdapter, reentrant: bool
) -> None:
    """Two forwards with different ranks, then one backward: the right gradient, or an error."""

    def both() -> Tensor:
        with own.rows([1, 2]):
            first = loss(own.model(tokens(2)).logits)
        with own.rows([8, 4]):
            return first + loss(own.model(tokens(2, seed=4)).logits)

    own.model.train()
    both().backward()
    expected = gradients(own.model)
    checkpointed(own, reentrant)
    with own.rows([1, 2]):
        first = loss(own.model(tokens(2)).logits)
    with own.rows([8, 4]):
        total = first + loss(own.model(tokens(2, seed=4)).logits)
        try:
            total.backward()
        except MatryoshkaError:
            return
    assert relative_error(gradients(own.model), expected) < 1e-4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rule", ["matryoshka", "dylora", "dylora-frozen", "stratified"])
def test_checkpointing_changes_no_rules_gradient(rule: str, reentrant: bool) -> None:
    ids = tokens(4)
    adapter = nested_llama(NESTING, rule)
    adapter.model.train()
    expected = []
    for step in range(2):
        adapter.draw(step, rows=4)
        loss(adapter.model(ids).logits).backward()
        expected.append(gradients(adapter.model))
    model = checkpointed(adapter, reentrant)
    for step in range(2):
        adapter.draw(step, rows=4)
        loss(model(ids).logits).backward()
        assert relative_error(gradients(model), expected[step]) < 1e-5


def test_a_new_draw_before_a_checkpointed_backward_is_refused() -> None:
    adapter = nested_llama(NESTING, "stratified")
    model = checkpointed(adapter, False)
    adapter.draw(0, rows=2)
    output = loss(model(tokens(2)).logits)
    adapter.draw(1, rows=2)
    with pytest.raises(MatryoshkaError, match="other ranks than its forward had"):
        output.backward()


def accumulated(adapter: NestedAdapter, call: Any) -> None:
    """A backward in the first context, another forward there, and the backward of that one in the second context."""
    with adapter.rows([1, 2]):
        call(0).backward()
        first = call(1)
    with adapter.rows([8, 4]):
        (first + call(2)).backward()


def drawn_twice(adapter: NestedAdapter, call: Any) -> None:
    """A sandwich of ranks by hand: two draws, then one backward."""
    adapter.draw(0)
    first = call(0)
    adapter.draw(1)
    (first + call(1)).backward()


def one_context_after_another(adapter: NestedAdapter, call: Any) -> None:
    with adapter.rows([1, 2]):
        first = call(0)
    with adapter.rows([8, 4]):
        (first + call(1)).backward()


def never_backward(adapter: NestedAdapter, call: Any) -> None:
    """A loss that is only looked at; what follows is in order."""
    with adapter.rows([1, 2]):
        call(0)
    with adapter.rows([8, 4]):
        call(1).backward()


def inner_context(adapter: NestedAdapter, call: Any) -> None:
    """Each backward in the context of its forward, one context within the other."""
    with adapter.rows([1, 2]):
        first = call(0)
        with adapter.rows([8, 4]):
            call(1).backward()
        first.backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", [accumulated, drawn_twice, one_context_after_another, never_backward, inner_context])
@pytest.mark.parametrize("by_hand", [True, False])
def test_checkpointing_is_never_silently_wrong(way: Any, reentrant: bool, by_hand: bool) -> None:
    """By torch's own function, as in models that are not of transformers, and by transformers'."""
    if by_hand:
        nested = nested_layer("Linear", NESTING, "dylora")
        adapter, inputs = nested.adapter, [nested.kind.batch(2).requires_grad_() for _ in range(3)]
    else:
        adapter = nested_llama(NESTING, "dylora", layers=1)
        adapter.model.train()
    ranks = {int((RULES["dylora"].draw(NESTING, adapter.state.seed, step).diagonal > 0).sum()) for step in (0, 1)}
    assert len(ranks) == 2
    adapter.draw(0)

    def plain(i: int) -> Tensor:
        return nested.layer(inputs[i]).square().sum() if by_hand else loss(adapter.model(tokens(2, seed=i)).logits)

    def checkpoint(i: int) -> Tensor:
        if not by_hand:
            return plain(i)
        return torch.utils.checkpoint.checkpoint(nested.layer, inputs[i], use_reentrant=reentrant).square().sum()

    way(adapter, plain)
    expected = gradients(adapter.model)
    if not by_hand:
        checkpointed(adapter, reentrant)
    in_order = way in (never_backward, inner_context)
    try:
        way(adapter, checkpoint)
    except (MatryoshkaError, torch.utils.checkpoint.CheckpointError):
        assert not in_order, "an error where nothing was wrong"
        return
    assert relative_error(gradients(adapter.model), expected) < 1e-4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_by_hand_in_eval_mode_is_never_silently_wrong(reentrant: bool) -> None:
    nested = nested_layer("Linear", Nesting([1, 4]))
    nested.adapter.model.eval()
    x = nested.kind.batch(2).requires_grad_()
    A, _ = nested.factors

    with nested.adapter.rows([1, 4]):
        nested.layer(x).square().sum().backward()
        expected, A.grad = A.grad, None
        output = torch.utils.checkpoint.checkpoint(nested.layer, x, use_reentrant=reentrant).square().sum()
    try:
        output.backward()
    except (MatryoshkaError, torch.utils.checkpoint.CheckpointError):
        return
    torch.testing.assert_close(A.grad, expected)


def test_without_checkpointing_backward_may_come_later(own: NestedAdapter) -> None:
    own.model.train()
    with own.rows(RANKS):
        loss(own.model(tokens(5)).logits).backward()
        expected = gradients(own.model)
        output = loss(own.model(tokens(5)).logits)
    output.backward()
    assert relative_error(gradients(own.model), expected) == 0


# One rank per layer.


def by_hand(mapping: dict[str, int]) -> Any:
    """p for a layer's name: that of the first pattern that ends it, else of the largest rank."""

    def p(name: str) -> Tensor:
        found = [rank for end, rank in mapping.items() if re.search(rf"(^|\.){end}$", name)]
        return oracle.prefix_p(NESTING.ranks, found[0] if found else 8, "sqrt", 0.7)

    return p


@pytest.mark.parametrize(
    "mapping",
    [
        {"q_proj": 1},
        {"q_proj": 1, "mlp.up_proj": 2},
        {r"layers\.0\..*": 2, "down_proj": 4},
        {r"layers\.1\.self_attn\.(q|k)_proj": 1, r"self_attn\.\w+": 4, ".*": 2},
        {"model.layers.0.mlp.gate_proj": 1},
    ],
    ids=str,
)
def test_a_rank_per_layer_equals_zeroed_columns(adapter: NestedAdapter, mapping: dict[str, int]) -> None:
    ids = tokens(3)
    tensors = get_peft_model_state_dict(adapter.model)
    base = tiny_llama()
    with torch.no_grad():
        adapter.set_rank(mapping)
        expected = oracle.fold(base, tensors, by_hand(mapping))(ids).logits
        torch.testing.assert_close(adapter.model(ids).logits, expected, rtol=1e-3, atol=1e-3)
        full = oracle.fold(base, tensors, by_hand({}))(ids).logits
        assert (full - expected).abs().max() > 0.05
        ranks = adapter.rank
        if mapping.keys() == {"q_proj"}:
            assert isinstance(ranks, dict)
            assert ranks["model.layers.1.self_attn.q_proj"] == 1
            assert ranks["model.layers.1.self_attn.k_proj"] == 8
        adapter.set_rank({"down_proj": 2})  # the others keep theirs
        again = adapter.rank
        assert isinstance(again, dict)
        before = ranks if isinstance(ranks, dict) else dict.fromkeys(again, ranks)
        assert again == {name: 2 if name.endswith("down_proj") else rank for name, rank in before.items()}
        adapter.set_rank(8)
        assert adapter.rank == 8
        torch.testing.assert_close(adapter.model(ids).logits, full, rtol=1e-3, atol=1e-3)


def test_a_rank_per_layer_is_merged_as_it_is(adapter: NestedAdapter) -> None:
    ids = tokens(3)
    with torch.no_grad():
        adapter.set_rank({"q_proj": 1, "up_proj": 2})
        expected = adapter.model(ids).logits
        adapter.model.merge_adapter()
        torch.testing.assert_close(adapter.model(ids).logits, expected, rtol=1e-3, atol=1e-3)
        adapter.unmerge()


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"q_porj": 1}, "no layer's name ends in 'q_porj'; layers are named like model.layers.0"),
        ({"proj": 1}, "no layer's name ends in 'proj'"),  # only whole parts of a name count
        ({"q_proj": 1, "lm_head": 2}, "no layer's name ends in 'lm_head'"),
        ({"q_proj": 3}, "rank 3 was not trained; the trained ranks are 1, 2, 4, 8"),
        ({"q_proj": 1, "k_proj": 9}, "rank 9 is above the largest rank 8"),
        ({"q_proj": True}, "rank True is not an integer"),
        ({"q_(proj": 1}, r"q_\(proj"),  # no regular expression
    ],
    ids=str,
)
def test_a_wrong_mapping_is_refused_and_changes_nothing(
    adapter: NestedAdapter, mapping: dict[str, int], message: str
) -> None:
    adapter.set_rank({"v_proj": 4})
    before = adapter.rank
    with pytest.raises(MatryoshkaError, match=message):
        adapter.set_rank(mapping)
    assert adapter.rank == before


def test_a_pattern_behind_one_that_takes_all_its_layers_is_not_called_missing(adapter: NestedAdapter) -> None:
    """The first match counts, so 'q_proj' never applies; that may be an error, but layers of that name do exist."""
    try:
        adapter.set_rank({".*_proj": 4, "q_proj": 1})
    except MatryoshkaError as error:
        assert "no layer's name ends in 'q_proj'" not in str(error)  # noqa: PT017
        assert adapter.rank == 8
    else:
        assert adapter.rank == 4


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (3, "rank 3 was not trained; the trained ranks are 1, 2, 4, 8. After reorder"),
        (16, "rank 16 is above the largest rank 8"),
        (0, "rank 0 is not positive"),
        (1.0, r"rank 1\.0 is not an integer"),
        (None, "rank None is not an integer"),
        ("q_proj", "rank 'q_proj' is not an integer"),
    ],
)
def test_a_wrong_rank_is_refused_and_changes_nothing(adapter: NestedAdapter, rank: Any, message: str) -> None:
    with torch.no_grad():
        adapter.set_rank(2)
        before = adapter.model(tokens(1)).logits
        with pytest.raises(MatryoshkaError, match=message):
            adapter.set_rank(rank)
        assert adapter.rank == 2
        assert torch.equal(adapter.model(tokens(1)).logits, before)


def test_the_rank_of_a_merged_adapter_is_fixed(adapter: NestedAdapter) -> None:
    adapter.merge(2)
    try:
        for change in (lambda: adapter.set_rank(4), lambda: adapter.merge(4)):
            with pytest.raises(MatryoshkaError, match="merged into the base weights: unmerge it to change its rank"):
                change()
    finally:
        adapter.unmerge()
    adapter.set_rank(4)


def test_rows_are_refused_where_a_parameter_is_targeted() -> None:
    """target_parameters give all rows one delta."""
    nesting = Nesting([1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = lora_config(nesting, target_modules=[], target_parameters=["head.weight"])
        adapter = nest(get_peft_model(Routed(), config), nesting.ranks)
    x = torch.ones(2, 3, 6)
    adapter.model(x)
    with adapter.rows([1, 2]), pytest.raises(MatryoshkaError, match="'weight' is a parameter that all rows share"):
        adapter.model(x)
