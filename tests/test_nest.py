"""What `nest` changes and refuses, and the draws of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    lora_config,
    nest_as,
    nested_layer,
    nested_llama,
    randomize,
    tiny_llama,
    tiny_mixtral,
)
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from strangers import plain_adapter
from test_adapter import NESTING, logits
from torch import nn

from matryoshka_lora import MatryoshkaError, Nesting, load, nest
from matryoshka_lora.nesting import RULES


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


P = {"rule": "matryoshka"}

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
    "DoRA": (lambda: llama(use_dora=True), {}, "use_dora its layers are more"),
    "rank_pattern": (lambda: llama(rank_pattern={"q_proj": 4}), {}, "rank_pattern"),
    "alpha_pattern": (lambda: llama(alpha_pattern={"q_proj": 4}), {}, "alpha_pattern"),
    "lora_bias": (lambda: llama(lora_bias=True), {}, "with lora_bias"),
    "groups": (lambda: conv(2), {}, "grouped convolution"),
    "attention": (
        lambda: get_peft_model(
            nn.Sequential(nn.MultiheadAttention(8, 2)), LoraConfig(r=8, target_modules=["0"])
        ),
        {},
        "MultiheadAttention cannot be nested",
    ),
    "experts": (
        lambda: get_peft_model(tiny_mixtral(), lora_config(NESTING, **EXPERTS)),
        {},
        "cannot be nested",
    ),
    "trained": (lambda: changed(llama(), randomize), P, "Use rule='lora'"),
    "pissa": (lambda: llama(init_lora_weights="pissa"), {}, "path_initial_model"),
    "twice": (lambda: changed(llama(), nest), {}, "nested already: NestedAdapter"),
    "merged": (lambda: changed(llama(), lambda m: m.merge_adapter()), {}, "unmerge_adapter"),
    "ranks": (llama, {"ranks": [1, 4]}, r"LoraConfig has r=8, .* largest nested rank is 4"),
    "rule": (llama, {"rule": "dyloro"}, "the rules are lora"),
    "scaling": (llama, {"scaling": "rslora"}, "scaling is 'rslora'"),
    "deploy": (llama, {"deploy": "papers"}, "write 'reordered' or 'paper'"),
}


@pytest.mark.parametrize("targets", [[], ["q_proj"]])
def test_load_names_what_can_be_done_with_experts(targets: list[str], tmp_path: Path) -> None:
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"target_modules": targets, "target_parameters": experts}
    plain_adapter(tmp_path / "a", tiny_mixtral(), **options)
    with pytest.raises(MatryoshkaError, match=r"cannot be nested.* export FOLDER --rank"):
        load(tiny_mixtral(), tmp_path / "a")


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


def test_a_look_at_a_rank_does_not_end_the_draws() -> None:
    nested = nested_layer("Linear", NESTING, "dylora")
    nested.adapter.set_rank(NESTING.ranks[0])  # and the model is in eval mode
    nested.adapter.draw(3)
    x = nested.kind.batch(2)
    expected = nested.expected(RULES["dylora"].draw(NESTING, 0, 3), x)
    torch.testing.assert_close(nested.layer(x), expected, rtol=1e-12, atol=1e-12)
    nested.adapter.set_rank(NESTING.ranks[0])
    nested.adapter.model.merge_adapter()
    with pytest.raises(MatryoshkaError, match="is merged: unmerge it"):
        nested.adapter.draw(4)  # else, unmerging would subtract another rank


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
