"""The rivals that minimise something else: their gradients from the formulas, AdaLoRA's end, and runs of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import randomize, tiny_llama
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_chat import save_tiny_chat, tiny_tokenizer
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from trl import SFTConfig

from matryoshka_lora import NestedAdapter, nest
from research.adalora import adalora_config, as_lora
from research.records import Job
from research.study import make_study
from research.trainers import TRAINERS, AnswerTrainer, SandwichTrainer, factors_of
from research.training import training

RANKS = (1, 2, 4, 8)
ROWS = [  # of several lengths, with several labels each and one in the middle
    ([5, 9, 11, 40, 2], 3),
    ([7, 30, 31, 8, 9, 10, 22, 2], 5),
    ([50, 51, 12, 2], 1),
    ([60, 61, 62, 5, 6, 7, 2], 6),
]
Pairs = dict[str, tuple[Tensor, Tensor]]
"""A and B of each layer."""


def labels_of(tokens: Sequence[int], prompt: int) -> list[int]:
    return [token if place >= prompt else -100 for place, token in enumerate(tokens)]


def base(seed: int = 0) -> Any:
    return tiny_llama(seed, vocab_size=len(tiny_tokenizer()), num_hidden_layers=1).double()


def adapter_of(seed: int, rule: str = "lora") -> NestedAdapter:
    config = LoraConfig(r=max(RANKS), lora_alpha=max(RANKS), target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base(), config)
    randomize(model, size=0.1)
    return nest(model, RANKS, rule=rule, seed=seed)


def pairs_of(model: Any) -> Pairs:
    """By the names of the base model."""
    names = {name: name.removeprefix("base_model.model.") for name in factors_of(model)}
    return {names[name]: (A.detach().clone(), B.detach().clone()) for name, (A, B) in factors_of(model).items()}


def trained(name: str, adapter: NestedAdapter, folder: Path, steps: int, **changes: Any) -> Pairs:
    """The factors after steps of plain gradient descent on all rows, with learning rate 0.1."""
    plain = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    options = {"max_steps": steps, "per_device_train_batch_size": len(ROWS), "gradient_checkpointing": False}
    data = Dataset.from_list([{"input_ids": tokens, "labels": labels_of(tokens, n)} for tokens, n in ROWS])
    trainer = TRAINERS.get(name, AnswerTrainer)(
        model=adapter.model,
        args=SFTConfig(output_dir=str(folder), bf16=False, seed=7, **{**plain, **quiet, **options, **changes}),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        callbacks=[adapter.callback()],
    )
    trainer.train()
    return pairs_of(adapter.model)


def answers(pairs: Pairs, diagonals: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log probabilities at all labels, and the labels: each row by itself, through dense weights of the plain model."""
    model = base()
    weights = {
        f"{name}.weight": model.get_submodule(name).weight.detach() + (B * diagonals[name]) @ A
        for name, (A, B) in pairs.items()
    }
    found, labels = [], []
    for tokens, prompt in ROWS:
        logits = functional_call(model, weights, (torch.tensor([tokens]),)).logits[0]
        found.append(logits[prompt - 1 : -1].log_softmax(-1))
        labels.append(torch.tensor(tokens[prompt:]))
    return torch.cat(found), torch.cat(labels)


def at_rank(pairs: Pairs, rank: int) -> tuple[Tensor, Tensor]:
    return answers(pairs, dict.fromkeys(pairs, oracle.prefix_p(RANKS, rank)))


def descended(leaves: list[Tensor], loss: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, leaves)
    return [(leaf - 0.1 * gradient).detach().requires_grad_() for leaf, gradient in zip(leaves, gradients, strict=True)]


def descend(pairs: Pairs, loss: Callable[[Pairs, int], Tensor], steps: int) -> Pairs:
    for step in range(steps):
        leaves = [factor.clone().requires_grad_() for pair in pairs.values() for factor in pair]
        some = dict(zip(pairs, zip(leaves[::2], leaves[1::2], strict=True), strict=True))
        new = descended(leaves, loss(some, step))
        pairs = dict(zip(pairs, zip(new[::2], new[1::2], strict=True), strict=True))
    return pairs


def assert_same(found: Pairs, expected: Pairs, before: Pairs) -> None:
    """Equal, to a hundred thousandth of how far training went: TRL's losses are float32 inside."""
    assert list(found) == list(expected)
    assert len(found) == 7
    for name in found:
        for one, other, start in zip(found[name], expected[name], before[name], strict=True):
            moved = (other - start).abs().max().item()
            assert moved > 1e-4, name
            assert float((one - other).abs().max().detach()) < 1e-5 * moved, name


ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
WAYS = [{}, ACCUMULATED, {"gradient_checkpointing": True}]


@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_sum_is_the_mean_of_the_losses_of_all_ranks(tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = adapter_of(seed=0)
    before = pairs_of(adapter.model)

    def loss(pairs: Pairs, step: int) -> Tensor:
        return sum(functional.nll_loss(*at_rank(pairs, rank)) for rank in RANKS) / len(RANKS)  # type: ignore[return-value]

    found = trained("sum", adapter, tmp_path, 2, **changes)
    assert_same(found, descend(before, loss, 2), before)


@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_sandwich_teaches_the_smaller_ranks_what_the_largest_says(tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = adapter_of(seed=7)
    before = pairs_of(adapter.model)
    drawn = [SandwichTrainer.copies(RANKS, 7, step) for step in range(3)]
    # Else a draw that ignores the step, or the seed, would pass.
    assert drawn == [(1, 4, 8), (1, 2, 8), (1, 4, 8)]

    def loss(pairs: Pairs, step: int) -> Tensor:
        smallest, middle, largest = drawn[step]
        assert (smallest, largest) == (1, 8)
        teacher, labels = at_rank(pairs, largest)
        total = -teacher[torch.arange(len(labels)), labels].mean()
        for rank in (smallest, middle):
            student, _ = at_rank(pairs, rank)
            fixed = teacher.detach()
            total = total + (fixed.exp() * (fixed - student)).sum(dim=1).mean()
        return total / 3

    found = trained("sandwich", adapter, tmp_path, 3, **changes)
    assert_same(found, descend(before, loss, 3), before)


def test_a_learned_diagonal_learns_with_its_factors(tmp_path: Path) -> None:
    adapter = adapter_of(seed=0)
    before = pairs_of(adapter.model)
    leaves = [factor.clone().requires_grad_() for pair in before.values() for factor in pair]
    diagonals = [oracle.trained_p(RANKS).requires_grad_() for _ in before]
    for _ in range(2):
        pairs = dict(zip(before, zip(leaves[::2], leaves[1::2], strict=True), strict=True))
        loss = functional.nll_loss(*answers(pairs, dict(zip(before, diagonals, strict=True))))
        new = descended([*leaves, *diagonals], loss)
        leaves, diagonals = new[: len(leaves)], new[len(leaves) :]
    assert not any(torch.equal(diagonal, oracle.trained_p(RANKS)) for diagonal in diagonals)
    folded = zip(leaves[::2], leaves[1::2], diagonals, strict=True)
    expected = dict(zip(before, ((A, B * p) for A, B, p in folded), strict=True))
    assert_same(trained("p-learned", adapter, tmp_path, 2), expected, before)
    assert not [name for name, _ in adapter.model.named_parameters() if "diagonal" in name]
    # What is left is a plain adapter of the rule lora, whose largest rank is what was trained.
    tokens, prompt = ROWS[1]
    with torch.no_grad():
        logits = adapter.model.eval()(torch.tensor([tokens])).logits[0, prompt - 1 : -1].log_softmax(-1)
    start = sum(len(some) - n for some, n in ROWS[:1])
    torch.testing.assert_close(logits, at_rank(expected, 8)[0].detach()[start : start + len(logits)], rtol=0, atol=1e-5)


def test_p_is_a_learning_rate_for_each_column_under_adam(tmp_path: Path) -> None:
    p = oracle.trained_p(RANKS)
    found = {}
    for optimizer in ("adamw_torch", "sgd"):
        nested, plain = adapter_of(0, "matryoshka"), adapter_of(0)
        before = pairs_of(nested.model)
        with torch.no_grad():
            for _, B in factors_of(plain.model).values():
                B.mul_(p)
        options = {"optim": optimizer, "adam_epsilon": 1e-300, "learning_rate": 1e-2}
        with_p = trained("matryoshka", nested, tmp_path / f"p-{optimizer}", 5, **options)
        rates = trained("p-rates", plain, tmp_path / f"rates-{optimizer}", 5, **options)
        found[optimizer] = max(float((with_p[name][1] * p - rates[name][1]).abs().max()) for name in before)
        assert max(float((with_p[name][1] - before[name][1]).abs().max()) for name in before) > 1e-3
    assert found["adamw_torch"] < 1e-9
    assert found["sgd"] > 1e-3  # whose steps do depend on the size of the gradients


def test_the_ranks_of_a_sandwich_are_a_function_of_seed_and_step() -> None:
    draws = {(seed, step): SandwichTrainer.copies(RANKS, seed, step) for seed in range(4) for step in range(50)}
    torch.manual_seed(7)
    assert draws == {(seed, step): SandwichTrainer.copies(RANKS, seed, step) for seed, step in reversed(draws)}
    assert {drawn[::2] for drawn in draws.values()} == {(1, 8)}
    for seed in range(4):
        middles = [draws[seed, step][1] for step in range(50)]
        assert min(middles.count(rank) for rank in (2, 4)) > 12
    assert len({tuple(draws[seed, step] for step in range(50)) for seed in range(4)}) == 4


# AdaLoRA.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("model"))


def trained_adalora(model: Path, rank: int, **more: int) -> PeftModel:
    """PEFT's own model, after 12 steps."""
    study = make_study(
        {
            "model": str(model),
            "dtype": "fp32",
            "rank": 8,
            "tasks": {"sums": {"task": "chain_sum"}},
            "methods": ["adalora-each"],
            "training": {"max_steps": 12, "per_device_train_batch_size": 4, **more},
        }
    )
    job = Job("adalora", "sums", rank, 5e-2, 0, "test")
    rows = study.train_set("adalora", "sums", 0)
    with training(study, job, rows, rows[:2]) as trainer:
        trainer.train()
        found: PeftModel = trainer.model.eval()
    return found


def logits_of(model: PeftModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found: Tensor = model(torch.randint(4, 90, (3, 12), generator=generator)).logits
    return found


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_adalora_ends_as_lora_of_the_same_function_and_budget(model: Path, rank: int) -> None:
    theirs = trained_adalora(model, rank)
    for module in theirs.modules():
        if hasattr(module, "lora_E"):
            assert module.scaling["default"] == module.r["default"] == math.ceil(1.5 * rank)
            module.scaling["default"] = 2.0  # else it is so near to 1 that it could be left out
    with theirs.disable_adapter():
        plain = logits_of(theirs)
    expected = logits_of(theirs)
    assert (expected - plain).abs().max() > 0.1
    kept = {
        name.removesuffix(".lora_E.default"): sum(flags)
        for name, flags in theirs.peft_config["default"].rank_pattern.items()
    }
    assert sum(kept.values()) == rank * len(kept) == rank * 14
    assert len(set(kept.values())) > 1

    plain_lora = as_lora(theirs)
    torch.testing.assert_close(logits_of(plain_lora), expected, rtol=0, atol=1e-5)
    assert plain_lora.peft_config["default"].r == max(kept.values())
    of_layers = {name: torch.linalg.matrix_rank(B @ A).item() for name, (A, B) in pairs_of(plain_lora).items()}
    assert of_layers == kept
    modules = [type(module).__module__ for module in plain_lora.modules()]
    assert not [name for name in modules if "adalora" in name]


def test_accumulated_gradients_have_the_regularisation_of_adalora_once(model: Path) -> None:
    """Four micro-batches of one row are the batch of four."""
    ways: tuple[dict[str, int], ...] = ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})
    found = [trained_adalora(model, 2, max_steps=6, **way) for way in ways]
    one, other = ([p for name, p in each.named_parameters() if "lora_" in name] for each in found)
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


def test_adalora_is_regularised(tmp_path: Path) -> None:
    """At the start E is zero, so nothing but the regularisation moves A and B: its gradient in closed form."""
    study = make_study({"tasks": {"sums": {"task": "chain_sum"}}, "methods": ["adalora-each"], "dtype": "fp32"})
    config = study.train_config("adalora", 2, 1e-3, 0, str(tmp_path))
    theirs = get_peft_model(base().float(), adalora_config(config))
    layers = [module for module in theirs.modules() if hasattr(module, "lora_E")]
    before = [(layer.lora_A["default"].detach().clone(), layer.lora_B["default"].detach().clone()) for layer in layers]
    plain = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no"}
    AnswerTrainer(
        model=theirs,
        args=SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, **plain, **options
        ),
        train_dataset=Dataset.from_list([{"input_ids": t, "labels": labels_of(t, n)} for t, n in ROWS]),
        processing_class=tiny_tokenizer(),
    ).train()
    assert len(layers) == 7

    def gradient(rows: Tensor) -> Tensor:
        """Of half the mean over 2 * 7 factors of ``|M M^T - 1|``."""
        error = rows @ rows.T - torch.eye(len(rows))
        size: Tensor = torch.linalg.norm(error)
        return 0.5 / 14 * 2 * error @ rows / size

    for layer, (A, B) in zip(layers, before, strict=True):
        assert gradient(A).abs().max() > 1e-4
        torch.testing.assert_close(layer.lora_A["default"].detach(), A - gradient(A), rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.lora_B["default"].detach(), B - gradient(B.T).T, rtol=0, atol=1e-6)
        assert layer.lora_E["default"].abs().max() > 1e-4
