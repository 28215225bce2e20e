"""A whole model: what `nest` refuses, ranks of rows, orders, copies, and what else PEFT does."""

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
from conftest import (
    lora_config,
    nest_as,
    nested_layer,
    nested_llama,
    one_layer,
    randomize,
    tiny_llama,
    tiny_mixtral,
)
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, NotFiniteError, load, nest
from matryoshka_lora.nesting import RULES

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


# nest().


def test_nesting_swaps_no_class_and_keeps_names_config_and_numbers() -> None:
    plain, model = (get_peft_model(tiny_llama(), lora_config(NESTING)) for _ in range(2))
    nest_as(model, NESTING)
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs)
    assert repr(model) == repr(plain)
    assert model.peft_config["default"].to_dict() == plain.peft_config["default"].to_dict()
    assert model.state_dict().keys() == plain.state_dict().keys()
    names = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, plain)]
    assert names[0] == names[1]


def conv(groups: int) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["0"])
    return get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 1, groups=groups)), config)


def llama(**lora: Any) -> PeftModel:
    return get_peft_model(tiny_llama(num_hidden_layers=1), lora_config(NESTING, **lora))


def changed(model: PeftModel, change: Callable[[PeftModel], Any]) -> PeftModel:
    change(model)
    return model


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no PEFT model": (tiny_llama, {}, "call peft.get_peft_model"),
    "no LoRA": (
        lambda: get_peft_model(
            tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        ),
        {},
        "no LoRA adapter 'default'",
    ),
    "no such adapter": (llama, {"adapter": "mine"}, "no LoRA adapter 'mine'; .* default"),
    "DoRA": (lambda: llama(use_dora=True), {}, "DoRA"),
    "rank_pattern": (lambda: llama(rank_pattern={"q_proj": 4}), {}, "rank_pattern"),
    "alpha_pattern": (lambda: llama(alpha_pattern={"q_proj": 4}), {}, "alpha_pattern"),
    "lora_bias": (lambda: llama(lora_bias=True), {}, "Set lora_bias=False"),
    "groups": (lambda: conv(2), {}, "grouped convolution"),
    "attention": (
        lambda: get_peft_model(
            nn.Sequential(nn.MultiheadAttention(8, 2)), LoraConfig(r=8, target_modules=["0"])
        ),
        {},
        "MultiheadAttention has no place for P",
    ),
    "experts": (
        lambda: get_peft_model(tiny_mixtral(), lora_config(NESTING, **EXPERTS)),
        {},
        "has no place for P",
    ),
    "trained": (lambda: changed(llama(), randomize), {}, "Use rule='lora'"),
    "pissa": (lambda: llama(init_lora_weights="pissa"), {}, "Use rule='lora'"),
    "twice": (lambda: changed(llama(), nest), {}, "nested already: NestedAdapter"),
    "merged": (lambda: changed(llama(), lambda m: m.merge_adapter()), {}, "unmerge_adapter"),
    "ranks": (llama, {"ranks": [1, 4]}, r"LoraConfig has r=8, .* largest nested rank is 4"),
    "order of ranks": (llama, {"ranks": [8, 4]}, "ranks must increase"),
    "rule": (llama, {"rule": "dyloro"}, "did you mean 'dylora'"),
    "scaling": (llama, {"scaling": "rslora"}, "scaling is 'rslora'"),
    "deploy": (llama, {"deploy": "papers"}, "write 'reordered' or 'paper'"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_nest_refuses_and_leaves_the_model(case: str) -> None:
    build, options, message = REFUSED[case]
    model = build()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    state = [dict(vars(module)) for module in model.modules()]
    variants = [dict(getattr(module, "lora_variant", {})) for module in model.modules()]
    with pytest.raises(MatryoshkaError, match=message):
        nest(model, **options)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert [dict(vars(module)) for module in model.modules()] == state
    assert [dict(getattr(m, "lora_variant", {})) for m in model.modules()] == variants


def test_rule_lora_takes_an_adapter_that_is_trained() -> None:
    model = changed(llama(), randomize).eval()
    before = logits(model)
    adapter = nest(model, rule="lora")
    assert torch.equal(logits(model), before)
    adapter.reorder()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert adapter.order == "svd"


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.fixed])
def test_training_before_the_first_draw_is_an_error(rule: str) -> None:
    adapter = nested_llama(NESTING, rule, layers=1)
    assert adapter.ranks == NESTING.ranks  # each was trained with the scale of its own
    adapter.model.train()
    with pytest.raises(MatryoshkaError, match=r"give adapter\.callback\(\) to the Trainer"):
        logits(adapter.model)


def test_a_step_of_dylora_frozen_moves_one_column() -> None:
    """Until the adapter is reordered: from then on all columns learn, as in plain LoRA."""
    nested = nested_layer("Linear", Nesting((1, 4)), "dylora-frozen")
    A, B = nested.factors

    def moved(step: int) -> list[list[int]]:
        before = A.detach().clone(), B.detach().clone()
        nested.adapter.draw(step)
        optimizer = torch.optim.SGD([A, B], lr=0.1)
        optimizer.zero_grad()
        nested.layer(nested.kind.batch(2)).square().sum().backward()
        optimizer.step()
        rows, columns = (before[0] != A).any(dim=1), (before[1] != B).any(dim=0)
        return [rows.nonzero().flatten().tolist(), columns.nonzero().flatten().tolist()]

    for step in range(4):
        last = int(RULES["dylora-frozen"].draw(Nesting((1, 4)), 0, step).count_nonzero()) - 1
        assert moved(step) == [[last], [last]]
    nested.adapter.reorder()
    assert moved(4) == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_processes_share_one_draw_over_all_their_rows() -> None:
    nested = nested_layer("Linear", NESTING, "stratified")
    whole = RULES["stratified"].draw(NESTING, 0, 5, 6)
    x = nested.kind.batch(2)
    for index in range(3):
        nested.adapter.draw(5, rows=2, share=(index, 3))
        expected = nested.expected(whole[2 * index : 2 * index + 2], x)
        torch.testing.assert_close(nested.layer(x), expected, rtol=1e-12, atol=1e-12)
        last = nested.layer(x[:1])  # the last batch of an epoch
        torch.testing.assert_close(last, expected[:1], rtol=1e-12, atol=1e-12)
    with pytest.raises(MatryoshkaError, match="2 rows have a rank each"):
        nested.layer(nested.kind.batch(4))


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
        with pytest.raises(MatryoshkaError, match="3 rows have a rank each, .* give one rank"):
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
        ([1, 16], "rank 16 is above the largest rank"),
        ([1, 2.0], "rank 2.0 is not an integer"),
        ([-1], "rank -1 is not positive"),
        ([False], "rank False is not an integer"),
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
    model.add_adapter("other", lora_config(NESTING))
    model.set_adapter("other")
    with pytest.raises(MatryoshkaError, match=r"not active: call model.set_adapter\('default'\)"):
        adapter.rows([1, 2]).__enter__()


def test_contexts_nest_and_end_however_they_are_left(adapter: NestedAdapter) -> None:
    before = logits(adapter.model)
    with adapter.rows([1, 1, 1]):
        outer = logits(adapter.model)
        with pytest.raises(KeyboardInterrupt), adapter.rows([2, 2, 2]):
            assert not torch.equal(logits(adapter.model), outer)
            raise KeyboardInterrupt
        assert torch.equal(logits(adapter.model), outer)
    assert torch.equal(logits(adapter.model), before)
    with adapter.model.disable_adapter():
        assert torch.equal(logits(adapter.model), logits(tiny_llama()))


# Orders.


def own_loop(adapter: NestedAdapter, folder: Path) -> None:
    model = adapter.model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens()).logits.square().mean().backward()
    optimizer.step()
    model.eval()


def trainer_without_callback(adapter: NestedAdapter, folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = TrainingArguments(
        str(folder), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    Trainer(adapter.model, arguments, train_dataset=rows).train()
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
    assert (adapter.order, adapter.ranks) == (None, (8,))
    with pytest.raises(MatryoshkaError, match=r"rank 2 is not in order yet.*adapter\.reorder\(\)"):
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "loss"}, "no order 'loss'; write 'svd', 'learned' or 'trained'"),
        ({"by": "learned"}, "order 'learned' takes data"),
        ({"data": []}, "order 'svd' takes no data"),
    ],
)
def test_an_order_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MatryoshkaError, match=message):
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


@pytest.mark.parametrize("rank", [0, 1, 5, 8])
def test_merge_and_unload_gives_a_plain_model_of_that_rank(rank: int) -> None:
    adapter = reordered_llama()
    adapter.set_rank(rank)
    expected = logits(adapter.model)
    merged = adapter.model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


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
    with pytest.raises(MatryoshkaError, match="not active"), second.rows([1, 1, 1]):
        pass
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


@pytest.mark.parametrize("name", ["linear", "cat", "svd"])
def test_sums_of_reordered_adapters(name: str) -> None:
    adapter = reordered_llama(layers=1)
    model: Any = adapter.model
    model.add_weighted_adapter(["default", "default"], [0.5, 1.0], "sum", combination_type=name)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    whole = layer.get_delta_weight("default")
    found = layer.get_delta_weight("sum")
    if name == "linear":  # of the factors, not of the products
        assert found.norm() > whole.norm()
    else:
        torch.testing.assert_close(found, 1.5 * whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rule", ["lora", "matryoshka"])
def test_autocast_in_bf16(rule: str) -> None:
    adapter = nested_llama(NESTING, rule)
    plain = get_peft_model(tiny_llama(), lora_config(NESTING))
    plain.load_state_dict(adapter.model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = logits(adapter.model), logits(plain.eval())
        if rule == "lora":
            assert torch.equal(found, expected)
        assert (found - expected).norm() < 0.1 * expected.norm()
        loss = adapter.model.train()(tokens()).logits.float().square().mean()
    loss.backward()
    A, _ = next(iter(adapter.parameters().values()))
    assert A.grad is not None
    assert A.grad.dtype == torch.float32


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


def test_the_handle_needs_a_nested_adapter() -> None:
    with pytest.raises(MatryoshkaError, match="not nested in every layer"):
        NestedAdapter(one_layer("Linear", Nesting((1, 2))))
