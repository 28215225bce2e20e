"""`NestedAdapter` in a model: ranks of rows, copies, compilation, and several adapters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.examples import make_trainer, random_examples
from helpers.models import lora_config, nested_llama, randomize, tiny_llama
from helpers.rules import RANK_PER_ROW
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    Mask2FormerConfig,
    Mask2FormerModel,
    SwinConfig,
    XLNetConfig,
    XLNetModel,
)

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, Rule, load, nest
from matryoshka_lora.rules import RULES

NESTING = Nesting((1, 2, 4, 8), "sqrt", 0.7)
RANKS = [1, 8, 2, 0, 5]


def random_ids(rows: int = 3, length: int = 6, seed: int = 5) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    """Return the logits in the model's current mode."""
    with torch.no_grad():
        output: Tensor = model(random_ids() if ids is None else ids).logits
    return output


def reordered_llama(**options: Any) -> NestedAdapter:
    adapter = nested_llama(NESTING, **options)
    adapter.reorder()
    return adapter


@pytest.fixture(scope="module")
def shared_adapter() -> NestedAdapter:
    return reordered_llama()


@pytest.fixture
def adapter(shared_adapter: NestedAdapter) -> NestedAdapter:
    """A reordered adapter, whose factors no test changes."""
    shared_adapter.model.zero_grad()
    shared_adapter.set_rank(8)
    return shared_adapter


# Ranks of rows.


def logits_of_single_rows(adapter: NestedAdapter, ids: Tensor, ranks: list[int]) -> Tensor:
    outputs = []
    for row, rank in zip(ids, ranks, strict=True):
        adapter.set_rank(rank)
        outputs.append(adapter.model(row[None]).logits)
    adapter.set_rank(8)
    return torch.cat(outputs)


def trainable_gradients(adapter: NestedAdapter, output: Tensor) -> list[Tensor]:
    output.float().square().mean(dim=(1, 2)).sum().backward()
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    assert len(gradients) == len(parameters)
    adapter.model.zero_grad()
    return gradients


def test_a_row_is_what_it_would_be_alone(adapter: NestedAdapter) -> None:
    ids = random_ids(5)
    with adapter.rows(RANKS):
        mixed = adapter.model(ids).logits
    single = logits_of_single_rows(adapter, ids, RANKS)
    torch.testing.assert_close(mixed, single, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[3], logits(tiny_llama(), ids)[3], rtol=1e-4, atol=1e-4)
    other_ranks = [1 if rank == 8 else 8 for rank in RANKS]
    other = logits_of_single_rows(adapter, ids, other_ranks)
    assert ((mixed - other).abs().amax(dim=(1, 2)) > 0.1).all()
    gradients = trainable_gradients(adapter, mixed)
    for gradient, expected in zip(gradients, trainable_gradients(adapter, single), strict=True):
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_generation_is_what_it_would_be_alone(
    adapter: NestedAdapter, options: dict[str, Any]
) -> None:
    prompts = [random_ids(1, length, seed=length)[0] for length in (4, 9, 6, 3, 7)]

    def generate(rows: list[Tensor]) -> Tensor:
        """Return the new tokens of some prompts, which are padded on the left."""
        width = max(len(row) for row in rows)
        input_ids = [nn.functional.pad(row, (width - len(row), 0)) for row in rows]
        masks = [nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows]
        sequences: Tensor = adapter.model.generate(
            input_ids=torch.stack(input_ids),
            attention_mask=torch.stack(masks),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            **options,
        )
        return sequences[:, width:]

    repeats = options.get("num_beams", 1)
    with adapter.rows([rank for rank in RANKS for _ in range(repeats)]):
        mixed = generate(prompts)
    single = []
    for prompt, rank in zip(prompts, RANKS, strict=True):
        adapter.set_rank(rank)
        single.append(generate([prompt]))
    assert torch.equal(mixed, torch.cat(single))
    adapter.set_rank(8)
    differs = (generate(prompts) != mixed).any(dim=1).view(5, -1).any(dim=1)
    assert differs.tolist() == [rank != 8 for rank in RANKS]


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_another_number_of_rows_is_rejected(adapter: NestedAdapter, rows: int) -> None:
    ids = random_ids(rows)
    with adapter.rows([1, 2, 8]):
        with pytest.raises(MatryoshkaError, match="3 rows"):
            adapter.model(ids)
        with pytest.raises(MatryoshkaError, match="3 rows"):  # guidance would tile the rows
            logits(adapter.model, ids)


def test_rows_that_experts_mix_are_rejected() -> None:
    """A list of experts gets tokens of all rows, as a batch without rows."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(0, 1)
            return torch.cat([self.experts[0](tokens[:3]), self.experts[1](tokens[3:])])

    model = get_peft_model(Routed(), LoraConfig(r=2, target_modules=["0", "1"]))
    adapter = nest(model.eval(), rule="matryoshka", deploy="paper")
    with adapter.rows([1, 2, 2]), pytest.raises(MatryoshkaError, match="expert"):
        model(torch.randn(3, 2, 6))


@pytest.mark.parametrize(
    "ranks",
    [[], {1, 2}, 4, None, [1, 16], [1, 2.5], [1, "2"], [-1], [2.0], [0.0], [True], [False]],
    ids=str,
)
def test_wrong_ranks_are_rejected(adapter: NestedAdapter, ranks: Any) -> None:
    with pytest.raises(MatryoshkaError, match="rank"), adapter.rows(ranks):
        pytest.fail("the context must not open")
    if isinstance(ranks, list) and ranks:
        with pytest.raises(MatryoshkaError, match="rank"):
            adapter.set_rank(ranks[-1])
    assert adapter.rank == 8


def test_where_rows_cannot_have_ranks() -> None:
    adapter = reordered_llama(layers=1)
    model: Any = adapter.model
    model.gradient_checkpointing_enable()
    with adapter.rows([1, 2, 8]):
        model.train()
        with pytest.raises(MatryoshkaError, match="gradient_checkpointing"):
            model(random_ids(3))
    model.eval()  # where checkpointing is not in use
    with adapter.rows([1, 2, 8]):
        logits(model)
    with (
        model.disable_adapter(),
        pytest.raises(MatryoshkaError, match="active"),
        adapter.rows([1, 2]),
    ):
        pytest.fail("the context must not open")
    model.add_adapter("other", lora_config(NESTING))
    model.set_adapter("other")
    with pytest.raises(MatryoshkaError, match="set_adapter"), adapter.rows([1, 2]):
        pytest.fail("the context must not open")


def test_an_adapter_is_shown_by_its_ranks_and_settings() -> None:
    """In a few lines, whatever the size of the model."""
    adapter = nested_llama(NESTING, "matryoshka")
    for expected in ("14 layers", "1, 2, 4, 8", "reorder()", "matryoshka", "sqrt"):
        assert expected in repr(adapter)
    adapter.reorder()
    adapter.set_rank(2)
    text = repr(adapter)
    for expected in ("svd", "rank          2 of 8"):
        assert expected in text
    assert len(text) < 300


def xlnet() -> Any:
    return XLNetModel(XLNetConfig(vocab_size=96, d_model=16, n_layer=1, n_head=2, d_inner=24))


def mask2former() -> Any:
    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=3,
    )
    return Mask2FormerModel(config)


@pytest.mark.parametrize(
    ("build", "layer"), [(xlnet, "layer_1"), (mask2former, "fc1")], ids=["xlnet", "mask2former"]
)
def test_rows_of_a_time_major_model_are_rejected(build: Callable[[], Any], layer: str) -> None:
    """With as many rows as tokens, its layers would take time for rows."""
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=[layer]))
    adapter = nest(model, rule=RANK_PER_ROW)
    with pytest.raises(MatryoshkaError, match=build.__name__), adapter.rows([1, 2, 2]):
        pytest.fail("the context must not open")
    with pytest.raises(MatryoshkaError, match=build.__name__):
        adapter.draw(0, batch_size=3)


def test_a_layer_of_relative_positions_is_rejected() -> None:
    """DeBERTa's query_proj also gets positions, of shape (1, positions, features)."""
    config = DebertaV2Config(
        vocab_size=96,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_buckets=4,
    )
    lora = LoraConfig(r=2, target_modules=["query_proj", "value_proj"])
    model = get_peft_model(DebertaV2Model(config), lora)
    adapter = nest(model, rule=RANK_PER_ROW)
    adapter.draw(0, batch_size=3)
    with pytest.raises(MatryoshkaError, match=r"\[1, 8, 16\]"):
        model(input_ids=random_ids())
    model(input_ids=random_ids(rows=1))  # the same row everywhere


def test_the_last_batch_of_an_epoch_may_be_smaller() -> None:
    """Of one step, by keyword, and in any order."""
    adapter = nested_llama(NESTING, RANK_PER_ROW)
    adapter.draw(0, batch_size=4)
    assert adapter.state.train_diagonal is not None
    q = adapter.state.train_diagonal.q
    assert len(q.unique(dim=0)) > 1
    for rows in (4, 3, 4):
        ids = random_ids(rows)
        actual = adapter.model(input_ids=ids).logits
        for row in range(rows):
            with adapter.use_diagonal(q[row]):
                expected = adapter.model(ids[row][None]).logits[0]
            torch.testing.assert_close(actual[row], expected, rtol=1e-4, atol=1e-4)


# Orders.


def train_without_callback(adapter: NestedAdapter, folder: Path) -> None:
    make_trainer(adapter.model, folder, random_examples(4), max_steps=1).train()
    adapter.model.eval()


def train_in_a_loop(adapter: NestedAdapter, folder: Path) -> None:
    adapter.set_rank(1)
    model = adapter.model.train()
    adapter.draw(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(random_ids()).logits.square().mean().backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("change", [train_in_a_loop, train_without_callback])
def test_an_order_ends_where_the_factors_change(
    change: Callable[[NestedAdapter, Path], None], tmp_path: Path
) -> None:
    adapter = reordered_llama()
    assert (adapter.order, adapter.ranks) == ("svd", (1, 2, 3, 4, 5, 6, 7, 8))
    change(adapter, tmp_path / "changed")
    assert (adapter.order, adapter.ranks, adapter.rank) == (None, (8,), 8)
    with pytest.raises(MatryoshkaError, match="reorder"):
        adapter.set_rank(2)
    expected = logits(adapter.model)
    adapter.save(tmp_path / "saved")  # reordered on the way
    loaded = load(tiny_llama(), tmp_path / "saved")
    assert loaded.order == "svd"
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-4, atol=1e-4)
    adapter.reorder()
    for rank in (1, 2, 5):
        adapter.set_rank(rank)
        loaded.set_rank(rank)
        expected = logits(adapter.model)
        torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-4, atol=1e-4)


# Other functions of PEFT.


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
    assert not torch.equal(logits(model, ids), before)  # they are no longer merged


def test_two_nested_adapters_have_their_own_ranks() -> None:
    first = nested_llama(NESTING, "lora")
    model: Any = first.model
    model.add_adapter("second", lora_config(Nesting((1, 2)), target_modules=["q_proj", "lm_head"]))
    second = nest(model, [1, 2], adapter_name="second")
    randomize(model)
    first.reorder()
    weights = {key: value for key, value in model.state_dict().items() if "default" in key}
    assert all(torch.equal(value, model.get_parameter(key)) for key, value in weights.items())
    first.set_rank(8)
    logits_of_first = logits(model)
    model.set_adapter("second")
    logits_of_second = logits(model)
    second.reorder()
    second.set_rank(1)
    assert first.rank == 8
    assert (logits(model) - logits_of_second).abs().max() > 0.01
    model.set_adapter("default")
    assert torch.equal(logits(model), logits_of_first)
    # Where both are active they add up.
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 64)
    expected = layer.base_layer(x)
    for name, rank in (("default", 8), ("second", 1)):
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        expected = expected + x @ A[:rank].T @ B[:, :rank].T * layer.scaling[name]
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    model.delete_adapter("second")
    assert torch.equal(logits(model), logits_of_first)
    with pytest.raises(MatryoshkaError, match="second"):
        NestedAdapter(model, "second")


def test_an_adapter_that_peft_creates_anew_is_plain() -> None:
    adapter = nested_llama(NESTING)
    model: Any = adapter.model
    model.delete_adapter("default")
    model.add_adapter("default", lora_config(NESTING))
    model.set_adapter("default")
    randomize(model)
    plain_model = get_peft_model(tiny_llama(), lora_config(NESTING))
    randomize(plain_model)
    expected = logits(plain_model.eval())
    assert torch.equal(logits(model.eval()), expected)
    with pytest.raises(MatryoshkaError, match="nest"):
        adapter.set_rank(1)
    assert torch.equal(logits(nest(model, rule="lora").model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_after_nesting(dtype: torch.dtype) -> None:
    adapter = nested_llama(NESTING)
    adapter.model.to(dtype)
    adapter.reorder()
    plain_model = get_peft_model(tiny_llama(), lora_config(NESTING)).to(dtype).eval()
    plain_model.load_state_dict(adapter.model.state_dict())
    assert torch.equal(logits(adapter.model), logits(plain_model))
    with adapter.rows([1, 2, 8]):
        assert logits(adapter.model).dtype == dtype
    assert logits(adapter.model.train()).dtype == dtype


# Copies and compilation.


def copy_with_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copy_with_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, copy_with_pickle, copy_with_torch_save])
@pytest.mark.parametrize("rule", [RULES["matryoshka"], RANK_PER_ROW], ids=lambda rule: rule.name)
def test_a_copy_is_independent(make_copy: Callable[[Any], Any], rule: Rule) -> None:
    adapter = nested_llama(NESTING, rule, target_modules=["embed_tokens", "q_proj", "up_proj"])
    adapter.draw(0, batch_size=3)
    train_logits = logits(adapter.model.train())
    eval_logits = logits(adapter.model.eval())
    clone = NestedAdapter(make_copy(adapter.model))
    state_dict = clone.model.state_dict()
    for key, value in adapter.model.state_dict().items():
        assert torch.equal(value, state_dict[key])
    assert torch.equal(logits(clone.model.train()), train_logits)
    assert torch.equal(logits(clone.model.eval()), eval_logits)
    clone.reorder()
    clone.set_rank(1)
    assert not torch.equal(logits(clone.model), eval_logits)
    assert (adapter.rank, adapter.order, adapter.rule) == (8, None, rule)
    assert torch.equal(logits(adapter.model.train()), train_logits)
    assert torch.equal(logits(adapter.model.eval()), eval_logits)


@pytest.fixture
def compiled() -> Any:
    """A function that compiles a model to a single graph, which must not be compiled again."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield lambda model: torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens", "o_proj"]], ids=str)
def test_all_ranks_are_compiled_once(compiled: Any, targets: list[str]) -> None:
    adapter = reordered_llama(layers=1, target_modules=targets)
    compiled_model = compiled(adapter.model)
    outputs = {}
    for rank in (8, 1, 4, 2, 8):
        adapter.set_rank(rank)
        outputs[rank] = logits(compiled_model)
        assert torch.equal(logits(compiled_model), outputs[rank])
        torch.testing.assert_close(outputs[rank], logits(adapter.model), rtol=1e-4, atol=1e-4)
    assert (outputs[8] - outputs[1]).abs().max() > 0.05


@pytest.mark.slow
def test_all_rows_are_compiled_once(compiled: Any) -> None:
    adapter = reordered_llama(layers=1)
    compiled_model = compiled(adapter.model)
    for ranks in ([1, 2, 4], [8, 8, 1], [2, 4, 0]):
        with adapter.rows(ranks):
            actual, expected = logits(compiled_model), logits(adapter.model)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [RULES["matryoshka"], RULES["dylora"], RANK_PER_ROW], ids=lambda rule: rule.name
)
def test_all_draws_are_compiled_once(compiled: Any, rule: Rule) -> None:
    adapter = nested_llama(NESTING, rule, layers=1)
    compiled_model = compiled(adapter.model.train())
    for step in range(4):
        adapter.draw(step, batch_size=3)
        actual = trainable_gradients(adapter, compiled_model(random_ids()).logits)
        expected = trainable_gradients(adapter, adapter.model(random_ids()).logits)
        for gradient, expected_gradient in zip(actual, expected, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)
