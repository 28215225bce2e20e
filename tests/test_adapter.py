"""A whole model: ranks of rows, orders, copies, and what else PEFT does."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import lora_config, nested_llama, randomize, tiny_llama
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from some_rows import some_rows, trainer_of
from torch import Tensor, nn

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, NotFiniteError, load, nest

NESTING = Nesting((1, 2, 4, 8), "sqrt", 0.7)
RANKS = [1, 8, 2, 0, 5]


def tokens(rows: int = 3, length: int = 6, seed: int = 5) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens() if ids is None else ids).logits
    return found


def reordered_llama(**options: Any) -> NestedAdapter:
    adapter = nested_llama(NESTING, **options)
    adapter.reorder()
    return adapter


@pytest.fixture(scope="module")
def shared_adapter() -> NestedAdapter:
    return reordered_llama()


@pytest.fixture
def adapter(shared_adapter: NestedAdapter) -> NestedAdapter:
    """A reordered adapter; no test changes its factors."""
    shared_adapter.model.eval()
    shared_adapter.model.zero_grad()
    shared_adapter.set_rank(8)
    return shared_adapter


# Ranks of rows.


def one_by_one(adapter: NestedAdapter, ids: Tensor, ranks: list[int]) -> Tensor:
    outputs = []
    for row, rank in zip(ids, ranks, strict=True):
        adapter.set_rank(rank)
        outputs.append(adapter.model(row[None]).logits)
    adapter.set_rank(8)
    return torch.cat(outputs)


def test_rows_are_what_each_would_be_alone(adapter: NestedAdapter) -> None:
    ids = tokens(5)
    with adapter.rows(RANKS):
        mixed = adapter.model(ids).logits
    alone = one_by_one(adapter, ids, RANKS)
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[3], logits(tiny_llama(), ids)[3], rtol=1e-4, atol=1e-4)
    other = one_by_one(adapter, ids, [1 if rank == 8 else 8 for rank in RANKS])
    assert ((mixed - other).abs().amax(dim=(1, 2)) > 0.1).all()
    found = []
    for output in (mixed, alone):
        output.float().square().mean(dim=(1, 2)).sum().backward()
        trained = [p for p in adapter.model.parameters() if p.requires_grad]
        found.append([p.grad.clone() for p in trained])
        adapter.model.zero_grad()
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_generation_is_what_each_row_would_say_alone(
    adapter: NestedAdapter, options: dict[str, Any]
) -> None:
    prompts = [tokens(1, length, seed=length)[0] for length in (4, 9, 6, 3, 7)]

    def generate(rows: list[Tensor]) -> Tensor:
        width = max(len(row) for row in rows)
        pad = [(width - len(row), 0) for row in rows]  # on the left, as for generation
        given = zip(rows, pad, strict=True)
        ids, mask = zip(
            *((nn.functional.pad(r, p), nn.functional.pad(r * 0 + 1, p)) for r, p in given),
            strict=True,
        )
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **options}
        output = adapter.model.generate(
            input_ids=torch.stack(ids), attention_mask=torch.stack(mask), **settings
        )
        return output[:, width:]

    with adapter.rows(RANKS):
        mixed = generate(prompts)
    alone = []
    for row, rank in zip(prompts, RANKS, strict=True):
        adapter.set_rank(rank)
        alone.append(generate([row]))
    assert torch.equal(mixed, torch.cat(alone))
    adapter.set_rank(8)
    differs = (generate(prompts) != mixed).any(dim=1).view(5, -1).any(dim=1)
    assert differs.tolist() == [rank != 8 for rank in RANKS]


@pytest.mark.parametrize("shape", [(1, 6), (2, 6), (4, 6), (6, 6)], ids=str)
def test_another_number_of_rows_is_refused(adapter: NestedAdapter, shape: Any) -> None:
    ids = tokens(*shape)
    with adapter.rows([1, 2, 8]):
        with pytest.raises(MatryoshkaError, match=r"3 rows have a rank each, .* give one rank"):
            adapter.model(ids)
        if shape[0] == 6:  # beams, without gradients
            logits(adapter.model, ids)
        else:
            with pytest.raises(MatryoshkaError, match="3 rows have a rank each"):
                logits(adapter.model, ids)


def test_rows_that_experts_mix_are_refused() -> None:
    """A list of experts gets some tokens of all rows, as a batch without rows."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            return torch.cat([self.experts[0](flat[:3]), self.experts[1](flat[3:])])

    model = get_peft_model(Routed(), LoraConfig(r=2, target_modules=["0", "1"]))
    adapter = nest(model.eval(), rule="lora", deploy="paper")
    with adapter.rows([1, 2, 2]), pytest.raises(MatryoshkaError, match="expert-routed"):
        model(torch.randn(3, 2, 6))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([], "needs one rank for each row"),
        ([1, 16], "rank 16 is too large"),
        ([1, 2.0], "rank 2.0 is not an integer"),
        ([-1], "rank -1 is not positive"),
    ],
)
def test_wrong_ranks_are_refused(adapter: NestedAdapter, ranks: list[Any], message: str) -> None:
    with pytest.raises(MatryoshkaError, match=message), adapter.rows(ranks):
        pytest.fail("the context must not open")
    if ranks:
        with pytest.raises(MatryoshkaError, match=message):
            adapter.set_rank(ranks[-1])
    assert adapter.rank == 8


def test_when_rows_cannot_have_ranks() -> None:
    adapter = reordered_llama(layers=1)
    model: Any = adapter.model
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(MatryoshkaError, match="gradient_checkpointing_disable"):
        adapter.rows([1, 2]).__enter__()
    model.eval()  # where it is not in use
    with adapter.rows([1, 2, 8]):
        logits(model)
    with model.disable_adapter(), pytest.raises(MatryoshkaError, match="or enable it"):
        adapter.rows([1, 2]).__enter__()
    model.add_adapter("other", lora_config(NESTING))
    model.set_adapter("other")
    with pytest.raises(MatryoshkaError, match=r"not active: call model.set_adapter\('default'\)"):
        adapter.rows([1, 2]).__enter__()


# Orders.


def own_loop(adapter: NestedAdapter, folder: Path) -> None:
    adapter.set_rank(1)  # of another order
    model = adapter.model.train()
    adapter.draw(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens()).logits.square().mean().backward()
    optimizer.step()
    model.eval()


def trainer_without_callback(adapter: NestedAdapter, folder: Path) -> None:
    trainer_of(adapter.model, folder, some_rows(4), max_steps=1).train()
    adapter.model.eval()


def hotswap(adapter: NestedAdapter, folder: Path) -> None:
    other = get_peft_model(tiny_llama(), lora_config(NESTING))
    randomize(other, seed=9)
    other.save_pretrained(folder)
    hotswap_adapter(adapter.model, str(folder), adapter_name="default")


@pytest.mark.parametrize("change", [own_loop, trainer_without_callback, hotswap])
def test_an_order_ends_where_the_factors_change(
    change: Callable[[NestedAdapter, Path], None], tmp_path: Path
) -> None:
    adapter = reordered_llama()
    assert (adapter.order, adapter.ranks) == ("svd", (1, 2, 3, 4, 5, 6, 7, 8))
    change(adapter, tmp_path / "changed")
    assert (adapter.order, adapter.ranks, adapter.rank) == (None, (8,), 8)
    with pytest.raises(MatryoshkaError, match=r"rank 2 is not available.*adapter\.reorder\(\)"):
        adapter.set_rank(2)
    full, factors = logits(adapter.model), adapter.factors()
    adapter.save(tmp_path / "saved")
    loaded = load(tiny_llama(), tmp_path / "saved")
    assert loaded.order == "svd"
    torch.testing.assert_close(logits(loaded.model), full, rtol=1e-4, atol=1e-4)
    for name, (A, B) in loaded.factors().items():
        old_A, old_B = factors[name]
        delta = (old_B @ old_A).double()
        best = oracle.best_errors(delta)
        for rank in (1, 2, 5):
            error = float((delta - B[:, :rank].double() @ A[:rank].double()).norm())
            assert error == pytest.approx(float(best[rank]), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused_and_nothing_changes(bad: float) -> None:
    adapter = nested_llama(NESTING)
    _, B = adapter.parameters()["model.layers.1.mlp.down_proj"]
    with torch.no_grad():
        B[3, 2] = bad
    before = {name: A for name, (A, _) in adapter.factors().items()}
    with pytest.raises(NotFiniteError, match="down_proj are not finite: the training diverged"):
        adapter.reorder()
    assert adapter.order is None
    assert all(torch.equal(A, before[name]) for name, (A, _) in adapter.factors().items())


@pytest.mark.parametrize("options", [{"by": "loss"}, {"by": "trained"}, {"data": []}], ids=str)
def test_an_order_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MatryoshkaError, match="'trained' takes data, such as the Trainer, and"):
        nested_llama(NESTING, layers=1).reorder(**options)


# What else PEFT does.


def test_merging_leaves_trained_tokens_trainable() -> None:
    model = get_peft_model(tiny_llama(), lora_config(NESTING, trainable_token_indices=[3, 5, 8]))
    adapter = nest(model.eval(), rule="lora")
    randomize(model)
    delta = model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta
    with torch.no_grad():
        delta["default"].add_(1.0)
    adapter.reorder()
    adapter.set_rank(3)
    ids = torch.tensor([[3, 5, 8, 9]])
    before = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)
    model.train()
    model(ids).logits.square().mean().backward()
    assert delta["default"].grad is not None
    assert delta["default"].grad.count_nonzero() > 0
    model.eval()
    with torch.no_grad():
        delta["default"].add_(1.0)
    assert not torch.equal(logits(model, ids), before)  # they are not merged still


def test_two_nested_adapters_have_ranks_of_their_own() -> None:
    first = nested_llama(NESTING, "lora")
    model: Any = first.model
    first.reorder()
    model.add_adapter("second", lora_config(Nesting((1, 2)), target_modules=["q_proj", "lm_head"]))
    second = nest(model, [1, 2], adapter="second")
    randomize(model)
    first.reorder()
    kept = {key: value for key, value in model.state_dict().items() if "default" in key}
    assert all(torch.equal(value, model.get_parameter(key)) for key, value in kept.items())
    found = {}
    for rank in (1, 8):
        first.set_rank(rank)
        found[rank] = logits(model)
    model.set_adapter("second")
    alone = logits(model)
    assert first.rank == 8
    second.reorder()
    second.set_rank(1)
    assert (logits(model) - alone).abs().max() > 0.01
    model.set_adapter("default")
    assert torch.equal(logits(model), found[8])
    # Both at once add up, in training too.
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 64)
    expected = layer.base_layer(x)
    for adapter, rank in (("default", 8), ("second", 1)):
        A, B = (getattr(layer, f"lora_{f}")[adapter].weight for f in "AB")
        expected = expected + x @ A[:rank].T @ B[:, :rank].T * layer.scaling[adapter]
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    model.delete_adapter("second")
    assert torch.equal(logits(model), found[8])
    with pytest.raises(MatryoshkaError, match="'second' is not nested"):
        NestedAdapter(model, "second")


def test_an_adapter_that_peft_makes_anew_is_plain_until_it_is_nested_again() -> None:
    adapter = nested_llama(NESTING)
    model: Any = adapter.model
    model.delete_adapter("default")
    model.add_adapter("default", lora_config(NESTING))
    model.set_adapter("default")
    randomize(model)
    plain = get_peft_model(tiny_llama(), lora_config(NESTING))
    randomize(plain)
    assert torch.equal(logits(model.eval()), logits(plain.eval()))
    with pytest.raises(MatryoshkaError, match="not nested in every layer: call nest"):
        adapter.set_rank(1)
    assert torch.equal(logits(nest(model, rule="lora").model), logits(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_to_half_precision_after_nesting(dtype: torch.dtype) -> None:
    adapter = nested_llama(NESTING)
    adapter.model.to(dtype)
    adapter.reorder()
    plain = get_peft_model(tiny_llama(), lora_config(NESTING)).to(dtype).eval()
    plain.load_state_dict(adapter.model.state_dict())
    assert torch.equal(logits(adapter.model), logits(plain))
    with adapter.rows([1, 2, 8]):
        assert logits(adapter.model).dtype == dtype
    assert logits(adapter.model.train()).dtype == dtype


# Copies and compilation.


def by_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch_save]
)
@pytest.mark.parametrize("rule", ["matryoshka", "stratified"])
def test_a_copy_is_independent(duplicate: Callable[[Any], Any], rule: str) -> None:
    options = {"target_modules": ["embed_tokens", "q_proj", "up_proj"]}
    adapter = nested_llama(NESTING, rule, **options)
    adapter.draw(0, rows=3)
    before = [logits(adapter.model.train(training)) for training in (True, False)]
    clone = NestedAdapter(duplicate(adapter.model))
    state = clone.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in adapter.model.state_dict().items())
    for training, expected in zip((True, False), before, strict=True):
        assert torch.equal(logits(clone.model.train(training)), expected)
    clone.reorder()
    clone.set_rank(1)
    assert not torch.equal(logits(clone.model), before[1])
    assert (adapter.rank, adapter.order, adapter.rule.name) == (8, None, rule)
    for training, expected in zip((True, False), before, strict=True):
        assert torch.equal(logits(adapter.model.train(training)), expected)
    assert torch.equal(logits(NestedAdapter(adapter.model).model), before[1])


@pytest.fixture
def compiled() -> Any:
    """Compile a model in one graph, which must not be compiled again."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda model: torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens", "o_proj"]], ids=str)
def test_compiled_once_for_all_ranks(compiled: Any, targets: list[str]) -> None:
    adapter = reordered_llama(layers=1, target_modules=targets)
    fast = compiled(adapter.model)
    seen = []
    for rank in (8, 1, 4, 2, 8):
        adapter.set_rank(rank)
        seen.append(logits(fast))
        assert torch.equal(logits(fast), seen[-1])
        torch.testing.assert_close(seen[-1], logits(adapter.model), rtol=1e-4, atol=1e-4)
    assert (seen[0] - seen[1]).abs().max() > 0.05


@pytest.mark.slow
def test_compiled_once_for_all_rows(compiled: Any) -> None:
    adapter = reordered_llama(layers=1)
    fast = compiled(adapter.model)
    for ranks in ([1, 2, 4], [8, 8, 1], [2, 4, 0]):
        with adapter.rows(ranks):
            torch.testing.assert_close(logits(fast), logits(adapter.model), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["matryoshka", "dylora", "stratified"])
def test_compiled_once_for_all_draws(compiled: Any, rule: str) -> None:
    adapter = nested_llama(NESTING, rule, layers=1)
    fast = compiled(adapter.model.train())
    for step in range(4):
        adapter.draw(step, rows=3)
        found = []
        for model in (fast, adapter.model):
            model(tokens()).logits.square().mean().backward()
            found.append([p.grad.clone() for p in adapter.model.parameters() if p.requires_grad])
            adapter.model.zero_grad()
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
