"""Reordering an adapter in memory, and the draws of a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.formula import KINDS, deployed_p, matches, random_input, trained_p
from helpers.models import nested_layer, nested_llama
from helpers.rules import RANK_PER_ROW

from matryoshka_lora import MatryoshkaError, Nesting, NotFiniteError
from matryoshka_lora.linalg.factors import Checksum
from matryoshka_lora.rules import RULES

NESTING = Nesting((1, 2, 4, 8), "sqrt", 0.7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ranks", [(1, 2, 6), (2, 16)], ids=str)  # layers are 10 to 12 wide
def test_reordering_keeps_the_function_and_makes_every_rank_the_best(
    kind: str, rule: str, ranks: tuple[int, ...]
) -> None:
    nesting = Nesting(ranks, "sqrt", 0.8)
    nested = nested_layer(kind, nesting, rule)
    A, B = (factor.detach().flatten(1).clone() for factor in nested.factors)
    plain_p = deployed_p(nesting, nesting.max_rank, "reordered")
    delta = B @ torch.diag(trained_p(nesting) if rule == "matryoshka" else plain_p) @ A
    result = nested.adapter.reorder()
    best_errors = oracle.best_errors(delta)
    A, B = (factor.detach().flatten(1) for factor in nested.factors)
    for rank in range(nesting.max_rank + 1):
        error = float((delta - nesting.scale * B[:, :rank] @ A[:rank]).norm())
        expected = float(best_errors[rank]) if rank < len(best_errors) else 0.0
        assert error == pytest.approx(expected, abs=1e-7 * float(delta.norm()))
        if rank in nesting.ranks:
            relative_error = expected / float(delta.norm())
            assert result.errors[rank] == pytest.approx(relative_error, abs=1e-7)
    values = result.singular_values["layer"]
    assert values.shape == (nesting.max_rank,)
    tails = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1])[: len(best_errors) - 1]
    np.testing.assert_allclose(tails, best_errors[: len(tails)], atol=1e-7 * float(delta.norm()))
    # Training continues as plain LoRA, in every column.
    assert matches(nested, plain_p, random_input(nested))


@pytest.mark.parametrize("bad_value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_rejected(bad_value: float) -> None:
    adapter = nested_llama(NESTING)
    _, B = adapter.layer_factors()["model.layers.1.mlp.down_proj"]
    with torch.no_grad():
        B[3, 2] = bad_value
    before = adapter.factors.copy()
    with pytest.raises(NotFiniteError, match="down_proj"):
        adapter.reorder()
    assert adapter.order is None
    for name, (A, _) in adapter.factors.copy().items():
        assert torch.equal(A, before[name][0])


@pytest.mark.parametrize("rule", ["lora", "matryoshka"])
def test_an_interrupted_reordering_changes_nothing(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = nested_llama(NESTING, rule)
    ids = torch.arange(3, 11).reshape(1, 8)
    adapter.model.eval()
    expected = adapter.model(input_ids=ids).logits

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checksum, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            adapter.reorder()
    assert (adapter.order, adapter.rule.name) == (None, rule)
    assert torch.equal(adapter.model(input_ids=ids).logits, expected)


# The draws of a step.


@pytest.mark.parametrize("rule", [RULES["dylora"], RANK_PER_ROW], ids=lambda rule: rule.name)
def test_training_before_the_first_draw_is_an_error(rule: str) -> None:
    nested = nested_layer("Linear", NESTING, rule)
    assert nested.adapter.ranks == NESTING.ranks  # each is trained with its own scale
    with pytest.raises(MatryoshkaError, match=r"callback\(\)"):
        nested.layer(nested.kind.batch(2))


def test_a_draw_after_another_rank_in_eval_mode() -> None:
    nested = nested_layer("Linear", NESTING, "dylora")
    nested.adapter.set_rank(NESTING.ranks[0])  # and the model is in eval mode
    nested.adapter.draw(3)
    x = random_input(nested)
    assert matches(nested, torch.from_numpy(RULES["dylora"].sample(NESTING, 0, 3)), x)
    nested.adapter.set_rank(NESTING.ranks[0])
    nested.adapter.model.merge_adapter()
    with pytest.raises(MatryoshkaError, match="merged"):
        nested.adapter.draw(4)  # unmerging would subtract another rank
    fixed = nested_layer("Linear", NESTING, "lora")
    fixed.adapter.model.merge_adapter()
    with pytest.raises(MatryoshkaError, match="merged"):
        fixed.adapter.draw(0)


def test_processes_share_the_rows_of_one_draw() -> None:
    nested = nested_layer("Linear", NESTING, RANK_PER_ROW)
    p = torch.from_numpy(RANK_PER_ROW.sample(NESTING, seed=0, step=5, batch_size=6))
    x = random_input(nested, rows=2)
    for index in range(3):
        nested.adapter.draw(5, batch_size=2, process_index=index, num_processes=3)
        assert matches(nested, p[2 * index : 2 * index + 2], x)
        assert matches(nested, p[2 * index : 2 * index + 1], x[:1])  # the last batch of an epoch
    with pytest.raises(MatryoshkaError, match="2 rows"):
        nested.adapter.model(nested.kind.batch(4))


def test_a_rule_with_a_diagonal_per_row_needs_the_batch_size() -> None:
    nested = nested_layer("Linear", NESTING, RANK_PER_ROW)
    nested.adapter.set_rank(1)
    with pytest.raises(MatryoshkaError, match="batch_size"):
        nested.adapter.draw(0)
    assert (nested.adapter.rank, nested.adapter.model.training) == (1, False)
