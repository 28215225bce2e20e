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

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, nest
from research.adalora import AdaLoraTrainer, adalora_config, as_lora, train_peft
from research.config import Study, make_study
from research.objectives import TRAINERS, SandwichTrainer, SumTrainer
from research.plan import Unit, load_runs, missing_jobs, results, units
from research.records import Curve, Job, Run
from research.run import run_job, run_once
from matryoshka_lora.training import TrainConfig, make_config
from matryoshka_lora.training.trainer import CompletionTrainer

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
    return nest(model, Nesting(RANKS), rule=rule, seed=seed)


def pairs_of(adapter: NestedAdapter) -> Pairs:
    layers = {name: module for name, module, _ in adapter._layers()}
    factors = {name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for name, layer in layers.items()}
    return {name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in factors.items()}


def trained(name: str, adapter: NestedAdapter, folder: Path, steps: int, **changes: Any) -> Pairs:
    """The factors after steps of plain gradient descent on all rows, with learning rate 0.1."""
    plain = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    options = {"max_steps": steps, "per_device_train_batch_size": len(ROWS), "gradient_checkpointing": False}
    data = Dataset.from_list([{"input_ids": tokens, "labels": labels_of(tokens, n)} for tokens, n in ROWS])
    trainer = TRAINERS.get(name, CompletionTrainer)(
        model=adapter.model,
        args=SFTConfig(output_dir=str(folder), bf16=False, **{**plain, **quiet, **options, **changes}),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        callbacks=[adapter.callback()],
    )
    trainer.train()
    return pairs_of(adapter)


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
            torch.testing.assert_close(
                one, other.detach(), rtol=0, atol=1e-5 * moved, msg=lambda m, n=name: f"{n}: {m}"
            )


ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
WAYS = [{}, ACCUMULATED, {"gradient_checkpointing": True}]


@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_sum_is_the_mean_of_the_losses_of_all_ranks(tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = adapter_of(seed=0)
    before = pairs_of(adapter)

    def loss(pairs: Pairs, step: int) -> Tensor:
        return sum(functional.nll_loss(*at_rank(pairs, rank)) for rank in RANKS) / len(RANKS)  # type: ignore[return-value]

    found = trained("sum", adapter, tmp_path, 2, **changes)
    assert_same(found, descend(before, loss, 2), before)


@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_sandwich_teaches_the_smaller_ranks_what_the_largest_says(tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = adapter_of(seed=7)
    before = pairs_of(adapter)
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
    before = pairs_of(adapter)
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
        before = pairs_of(nested)
        with torch.no_grad():
            for _, module, _ in plain._layers():
                module.lora_B["default"].weight *= p
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


@pytest.mark.parametrize("ranks", [(3,), (2, 5), (1, 2, 4)], ids=str)
def test_a_sandwich_of_few_ranks_has_each_once(ranks: tuple[int, ...]) -> None:
    assert SandwichTrainer.copies(ranks, 0, 0) == SumTrainer.copies(ranks, 0, 0) == ranks


# AdaLoRA.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("model"))


def config_of(model: Path, folder: Path, rank: int = 2, **changes: Any) -> TrainConfig:
    settings = {
        "model": str(model),
        "dtype": "fp32",
        "data": {"task": "chain_sum", "size": 8},
        "output_dir": str(folder),
        "max_steps": 12,
        "save_strategy": "no",
        "logging_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-2,
        "disable_tqdm": True,
        "nesting": {"ranks": [rank], "rule": "lora"},
    }
    return make_config({**settings, **changes})


def logits_of(model: PeftModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found: Tensor = model(torch.randint(4, 90, (3, 12), generator=generator)).logits
    return found


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_adalora_ends_as_lora_of_the_same_function_and_budget(model: Path, tmp_path: Path, rank: int) -> None:
    config = config_of(model, tmp_path, rank)
    theirs = train_peft(config)
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

    adapter = as_lora(theirs, config)
    torch.testing.assert_close(logits_of(adapter.model), expected, rtol=0, atol=1e-5)
    assert adapter.ranks == (max(kept.values()),)
    of_layers = {name: torch.linalg.matrix_rank(B @ A).item() for name, (A, B) in pairs_of(adapter).items()}
    assert of_layers == kept
    modules = [type(module).__module__ for module in adapter.model.modules()]
    assert not [name for name in modules if "adalora" in name]


def test_adalora_is_down_to_its_ranks_after_half_of_the_steps(model: Path, tmp_path: Path) -> None:
    schedule = adalora_config(config_of(model, tmp_path, 3), 80)
    assert (schedule.init_r, schedule.target_r, schedule.lora_alpha) == (5, 3, 5)
    assert (schedule.tinit, schedule.total_step - schedule.tfinal, schedule.total_step) == (8, 40, 80)
    for steps in (2, 3, 5):  # however few there are, no masked direction comes back
        theirs = train_peft(config_of(model, tmp_path, 3, max_steps=steps))
        pattern = theirs.peft_config["default"].rank_pattern
        assert sum(map(sum, pattern.values())) == 3 * 14, steps
        for name, module in theirs.base_model.model.named_modules():
            if hasattr(module, "lora_E"):
                assert (module.lora_E["default"].flatten() != 0).tolist() == pattern[f"{name}.lora_E.default"]


def test_adalora_is_regularised(tmp_path: Path) -> None:
    """At the start E is zero, so nothing but the regularisation moves A and B: its gradient in closed form."""
    settings = {"nesting": {"ranks": [2], "rule": "lora"}, "data": "chain_sum", "dtype": "fp32"}
    config = make_config({**settings, "output_dir": str(tmp_path)})
    theirs = get_peft_model(base().float(), adalora_config(config, 2))
    layers = [module for module in theirs.modules() if hasattr(module, "lora_E")]
    before = [(layer.lora_A["default"].detach().clone(), layer.lora_B["default"].detach().clone()) for layer in layers]
    plain = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no"}
    AdaLoraTrainer(
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
        return 0.5 / 14 * 2 * error @ rows / error.norm()

    for layer, (A, B) in zip(layers, before, strict=True):
        assert gradient(A).abs().max() > 1e-4
        torch.testing.assert_close(layer.lora_A["default"].detach(), A - gradient(A), rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.lora_B["default"].detach(), B - gradient(B.T).T, rtol=0, atol=1e-6)
        assert layer.lora_E["default"].abs().max() > 1e-4


def test_what_adalora_refuses(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="max_steps is 1, and adalora needs 2"):
        train_peft(config_of(model, tmp_path, max_steps=1))
    with pytest.raises(MatryoshkaError, match=r"no quantised model: leave training.quantization out"):
        train_peft(config_of(model, tmp_path, quantization="nf4"))


# Runs.


def study_of(model: Path, *methods: str, **training: Any) -> Study:
    plain = {"max_steps": 3, "per_device_train_batch_size": 2, "disable_tqdm": True}
    return make_study(
        {
            "model": str(model),
            "dtype": "fp32",
            "rank": 4,
            "tasks": {"sums": {"task": "chain_sum"}},
            "methods": list(methods),
            "seeds": [0],
            "learning_rates": {"grid": [1e-3, 1e-2, 1e-1], "seed": 100},
            "training": {**plain, **training},
            "items": {"validation": 4, "test": 4},
        }
    )


def job_of(recipe: str, rate: float = 3e-2, rank: int = 4, split: str = "test") -> Job:
    return Job(recipe, "sums", rank, rate, 0, split)


CUTS = ("prefix", "frobenius", "loss", "learned")
LAYER = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
"""Inputs and outputs of the linear layers of a block, of which there are two."""


@pytest.fixture(scope="module")
def runs(model: Path) -> dict[str, Run]:
    recipes = ("lora", "matryoshka", "stratified", "sum", "sandwich", "p-learned")
    return {
        recipe: run_job(study_of(model, *(f"{recipe}/{cut}" for cut in CUTS)), job_of(recipe)) for recipe in recipes
    }


@pytest.mark.parametrize("recipe", ["sum", "sandwich", "p-learned"])
def test_a_run_of_each(runs: dict[str, Run], recipe: str) -> None:
    run = runs[recipe]
    assert run.ranks == (1, 2, 4)
    assert list(run.curves) == list(CUTS)
    assert all(math.isfinite(loss) and loss > 0 for curve in run.curves.values() for loss in curve.loss)
    # Cuts other than the prefix reorder the same adapter.
    for cut in CUTS:
        assert run.curves[cut].loss[-1] == pytest.approx(run.curves["prefix"].loss[-1], abs=1e-4)
    assert run.curves["frobenius"].loss[0] != run.curves["prefix"].loss[0]
    # It was trained in a way of its own, from the same start on the same rows.
    for other in set(runs) - {recipe}:
        assert all(a != b for a, b in zip(run.curves["prefix"].loss, runs[other].curves["prefix"].loss, strict=True))
    assert run.cost["parameters"] == runs["lora"].cost["parameters"]


def test_tokens_count_the_copies(runs: dict[str, Run]) -> None:
    tokens = {recipe: run.cost["tokens"] for recipe, run in runs.items()}
    plain = tokens["lora"]
    assert plain > 0
    assert tokens == {"lora": plain, "matryoshka": plain, "stratified": plain, "p-learned": plain} | {
        "sum": 3 * plain,
        "sandwich": 3 * plain,
    }
    # Learning an order takes the same rows of each.
    assert len({run.cost["cuts"]["learned"]["tokens"] for run in runs.values()}) == 1


def test_tokens_of_more_ranks(model: Path) -> None:
    """Of six ranks, sum sees all at each step and sandwich three."""
    found = {}
    for recipe in ("lora", "sum", "sandwich"):
        settings = {"rank": 32, "model": str(model), "dtype": "fp32", "tasks": {"sums": {"task": "chain_sum"}}}
        training = {"max_steps": 1, "per_device_train_batch_size": 1, "disable_tqdm": True}
        study = make_study(
            {**settings, "methods": [f"{recipe}/prefix"], "training": training, "items": {"test": 1, "validation": 1}}
        )
        found[recipe] = run_job(study, job_of(recipe, rank=32)).cost["tokens"]
    assert found == {"lora": found["lora"], "sum": 6 * found["lora"], "sandwich": 3 * found["lora"]}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_run_of_adalora_is_measured_at_its_rank_alone(model: Path, tmp_path: Path, rank: int) -> None:
    study, job = study_of(model, "adalora-each", max_steps=6), job_of("adalora", rank=rank, split="validation")
    assert run_once(study, job, tmp_path)
    (run,) = load_runs(study, tmp_path).values()
    assert (run.job, run.ranks, list(run.curves)) == (job, (rank,), ["prefix"])
    assert len(run.curves["prefix"].loss) == len(run.curves["prefix"].accuracy) == 1
    plain = run_job(study_of(model, "lora-each", max_steps=6), job_of("lora", rank=rank, split="validation"))
    assert run.curves["prefix"].loss[0] != plain.curves["prefix"].loss[-1]
    assert run.cost["tokens"] == plain.cost["tokens"]
    # As many directions as LoRA of the rank, wherever they went.
    smallest, largest = (one(inside + outside for inside, outside in LAYER) for one in (min, max))
    assert rank * 14 * smallest <= run.cost["parameters"] <= rank * 14 * largest


def test_accumulated_gradients_have_the_regularisation_of_adalora_once(model: Path, tmp_path: Path) -> None:
    """Four micro-batches of one row are the batch of four."""
    found = []
    for batch, accumulated in ((4, 1), (1, 4)):
        training = {"max_steps": 6, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        study = study_of(model, "adalora-each", **training)
        config = study.train_config("adalora", 2, 1e-2, 0, "chain_sum", str(tmp_path / "run"))
        model_of = train_peft(config)
        found.append([p.detach().clone() for n, p in model_of.named_parameters() if "lora_" in n])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_the_parameters_of_adalora_are_those_that_are_left(model: Path, tmp_path: Path) -> None:
    study, job = study_of(model, "adalora-each", max_steps=6), job_of("adalora", rank=2)
    rows = study.tasks["sums"].rows("train", study.train_rows("adalora"), 0)
    data = tmp_path / "rows.jsonl"
    Dataset.from_list([{"prompt": r.prompt, "completion": r.completion} for r in rows]).to_json(data)
    theirs = train_peft(study.train_config("adalora", 2, job.learning_rate, 0, str(data), str(tmp_path)))
    pattern = theirs.peft_config["default"].rank_pattern
    sizes = {
        name: sum(module.base_layer.weight.shape)
        for name, module in theirs.base_model.model.named_modules()
        if hasattr(module, "lora_E")
    }
    expected = sum(sum(flags) * sizes[name.removesuffix(".lora_E.default")] for name, flags in pattern.items())
    assert run_job(study, job).cost["parameters"] == expected


@pytest.mark.parametrize("recipe", ["sum", "sandwich", "p-learned", "adalora"])
def test_a_run_that_diverges_has_no_curves(model: Path, recipe: str) -> None:
    method = "adalora-each" if recipe == "adalora" else f"{recipe}/prefix"
    assert run_job(study_of(model, method), job_of(recipe, rate=1e30)).curves == {}


def test_adalora_is_a_method_of_a_run_for_each_rank(model: Path) -> None:
    study = study_of(model, "adalora-each", "lora-each", "sum/frobenius")
    assert units(study, "adalora-each", "sums") == [Unit("adalora", "prefix", "sums", rank, True) for rank in (1, 2, 4)]
    found: dict[Job, Run] = {}
    while missing := missing_jobs(study, found):
        for job in missing:
            ranks = (job.rank,) if job.recipe == "adalora" else study.nesting(job.rank)
            curve = Curve((2.0 + abs(math.log(job.learning_rate / 1e-2)),) * len(ranks), (job.rank / 8,) * len(ranks))
            cuts = {"prefix": curve, "frobenius": curve}
            cost = {"tokens": 10, "seconds": 1.0, "parameters": job.rank}
            cost |= {"cuts": {cut: {"tokens": 0, "seconds": 0.0} for cut in cuts}}
            found[job] = Run(job, ranks, cuts, cost, study.settings("sums", "adalora"), {})
    each = next(result for result in results(study, found) if result.method == "adalora-each")
    assert (each.ranks, each.curve.accuracy) == ((1, 2, 4), (1 / 8, 2 / 8, 4 / 8))
    assert (each.tokens, each.parameters) == (30, 1 + 2 + 4)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["adalora/prefix"], "no method 'adalora/prefix'; did you mean "),
        (["adalora"], "no method 'adalora'; did you mean adalora-each"),
        (["sandwich"], "no method 'sandwich'; did you mean sandwich/"),
        (["sum/keep"], "recipe 'sum' has no cut 'keep'; it has prefix, frobenius"),
    ],
    ids=str,
)
def test_wrong_methods(model: Path, methods: list[str], message: str) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        study_of(model, *methods)


@pytest.mark.parametrize(
    "training",
    [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"packing": True}, {"padding_free": True}],
    ids=str,
)
@pytest.mark.parametrize("method", ["sum/prefix", "sandwich/prefix", "p-learned/prefix", "adalora-each"])
def test_what_the_rivals_cannot_do(model: Path, training: dict[str, Any], method: str) -> None:
    """It is said when the study is read."""
    with pytest.raises(MatryoshkaError, match=f"training.{next(iter(training))} is .*, which not every method can do"):
        study_of(model, method, **training)
