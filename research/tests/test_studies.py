"""The studies: their tables, what is run next, and which examples may decide what."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import matryoshka_lora
from matryoshka_lora import MatryoshkaError
from research import commonsense, stats, tasks
from research.__main__ import TABLES, main, select
from research.curves import earlier_curves
from research.facts import facts
from research.plan import missing_jobs, num_missing, rates, results, units
from research.report import comparison, tables
from research.runs import Curve, Job, Run, append_line, read_runs
from research.study import (
    ROOT,
    STUDIES,
    Study,
    load_study,
    make_study,
    parse_method,
)

SMALL: dict[str, Any] = {
    "title": "Small",
    "layers": 1,
    "rank": 4,
    "tasks": {"facts-8": {"facts": 8}},
    "methods": ["lora/svd", "lora/trained"],
    "seeds": [0, 1],
    "learning_rates": {"grid": [1e-3, 2e-3, 4e-3], "seeds": [100]},
    "training": {"max_steps": 2, "per_device_train_batch_size": 4},
    "items": {"validation": 8, "test": 8},
}


def small_study(**changes: Any) -> Study:
    return make_study("small", {**SMALL, **changes})


def make_run(study: Study, job: Job, deployments: Iterable[str], loss: float = 1.0) -> Run:
    """Return a run with the same loss at every rank."""
    names = list(deployments)
    ranks = study.nested_ranks(job.rank)
    curve = Curve((loss,) * len(ranks), (0.5,) * len(ranks))
    cost = {"tokens": 10, "seconds": 1.0}
    costs = {**cost, "parameters": 4, "cuts": dict.fromkeys(names, cost)}
    settings = study.settings(job.task, job.recipe)
    return Run(job, ranks, dict.fromkeys(names, curve), costs, settings, {"torch": "2"})


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_tables_are_those_of_the_runs(path: Path) -> None:
    study = load_study(path.stem)
    runs = study.load_runs()
    if any(results(study, runs)):
        written = (TABLES / f"{study.name}.md").read_text(encoding="utf-8")
        assert written == tables(study, runs), "run python -m research"


def test_interval_of_three_values() -> None:
    estimate = stats.estimate([1.0, 2.0, 3.0])
    assert estimate is not None
    # The 0.975 quantile of t with two degrees of freedom is 4.3027.
    assert estimate.mean == 2.0
    assert estimate.half_width == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert estimate.text(100, 1, "+") == "+200.0 ± 248.4"


def test_rates_come_first_and_the_grid_grows() -> None:
    study = small_study()
    runs: dict[Job, Run] = {}
    best_rate = 8e-3  # above the grid, which ends at 4e-3
    for _ in range(5):
        missing = missing_jobs(study, runs)
        if any(job.split == "test" for job in missing):
            break
        for job, deployments in missing.items():
            loss = abs(job.learning_rate - best_rate)
            runs[job] = make_run(study, job, deployments, loss)
    assert {job.learning_rate for job in runs} == {1e-3, 2e-3, 4e-3, 8e-3, 16e-3}
    assert rates(study, runs, units(study, "lora/svd", "facts-8")[0]).chosen == best_rate
    # One training run of each seed serves both deployments.
    assert {(job.seed, job.learning_rate): names for job, names in missing.items()} == {
        (seed, best_rate): {"svd", "trained"} for seed in (0, 1)
    }


def test_rates_within_a_tolerance_of_the_best() -> None:
    """The lowest rate that every seed has tried is chosen, if its mean loss is near the best."""
    learning_rates = {"grid": [1e-3, 2e-3, 4e-3, 8e-3], "seeds": [100, 101], "within": 0.01}
    study = small_study(learning_rates=learning_rates, methods=["lora/svd"])
    losses = {1e-3: 2.0, 2e-3: 1.005, 4e-3: 1.0, 8e-3: 2.0}
    runs: dict[Job, Run] = {}
    for _ in range(2):
        for job, deployments in missing_jobs(study, runs).items():
            runs[job] = make_run(study, job, deployments, losses[job.learning_rate])
    assert rates(study, runs, units(study, "lora/svd", "facts-8")[0]).chosen == 2e-3


@pytest.mark.parametrize(
    ("changes", "keyword"),
    [
        ({"learning_rates": {"grid": [1e-3], "seeds": [100]}}, "grid"),
        ({"learning_rates": {"grid": [2e-3, 1e-3], "seeds": [100]}}, "grid"),
        ({"learning_rates": {"grid": [1e-3, 2e-3], "seeds": [0]}}, "seeds"),
        ({"ranks": [1, 2]}, "rank"),
        ({"methods": ["unknown/svd"]}, "unknown"),
        ({"methods": ["lora/learned"]}, "lora/learned"),
        ({"tasks": {"sums": {"generated": "chain_sum"}}}, "items.judge"),
        ({"methods": ["lora/kept"], "tasks": {"c": {"choices": "folder"}}}, "choices"),
    ],
)
def test_studies_that_are_not_valid(changes: dict[str, Any], keyword: str) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        small_study(**changes)


def test_a_test_run_measures_all_cheap_deployments() -> None:
    """They compare the same adapters, though each deployment has chosen another rate."""
    study = small_study(methods=["matryoshka/prefix", "matryoshka/svd", "matryoshka/trained"])
    best_rates = {"prefix": 2e-3, "svd": 1e-3, "trained": 2e-3}
    runs: dict[Job, Run] = {}
    assert num_missing(study, runs) == 3 + 2
    missing = missing_jobs(study, runs)
    while any(job.split == "validation" for job in missing):
        for job, names in missing.items():
            for name in names:
                loss = abs(job.learning_rate - best_rates[name])
                run = make_run(study, job, [name], loss)
                runs[job] = runs[job].merge(run) if job in runs else run
        missing = missing_jobs(study, runs)
    assert {(job.learning_rate, job.seed): names for job, names in missing.items()} == {
        (rate, seed): names
        for rate, names in ((2e-3, {"prefix", "svd", "trained"}), (1e-3, {"prefix", "svd"}))
        for seed in (0, 1)
    }
    assert num_missing(study, runs) == 4


def test_deployments_that_are_recorded_are_not_repeated() -> None:
    """The runs have ``svd`` and ``squeezed``; only ``trained`` is missing."""
    runs: dict[Job, Run] = {}
    for job, run in load_study("capacity").load_runs().items():
        curves = {name: curve for name, curve in run.curves.items() if name != "trained"}
        diverged = tuple(name for name in run.diverged if name != "trained")
        runs[job] = replace(run, curves=curves, diverged=diverged)
    study = load_study("capacity")
    methods = "lora/trained,lora/squeezed,lora/svd"
    tests = select(study, methods, "200,201,202,203,204")
    rates_only = replace(tests, seeds=())

    missing = missing_jobs(rates_only, runs)
    assert {(job.recipe, job.rank, job.seed, job.split) for job in missing} == {
        ("lora", 32, 100, "validation")
    }
    assert [job.learning_rate for job in missing] == [4e-3, 8e-3, 16e-3]
    assert all(names == {"trained"} for names in missing.values())

    for job, run in runs.items():  # the rate of ``svd``, at which both others are recorded
        if job.split == "validation" and "svd" in run.curves:
            runs[job] = replace(run, curves={**run.curves, "trained": run.curves["svd"]})
    assert missing_jobs(rates_only, runs) == {}
    missing = missing_jobs(tests, runs)
    assert [(job.seed, job.split) for job in missing] == [(s, "test") for s in range(200, 205)]
    assert all(names == {"trained"} for names in missing.values())


def test_an_unknown_method_cannot_be_selected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capacity", "--methods", "lora/trained-0.3"]) == 1
    assert "lora/trained-0.3" in capsys.readouterr().err


def test_tables_have_the_curves_of_earlier_versions() -> None:
    study = load_study("gemma256")
    assert len(earlier_curves("gemma256")) == 3
    assert "| lora/trained-0.3 | 3 |" in tables(study, {})


def test_a_killed_study_continues(tmp_path: Path) -> None:
    """An incomplete line is ignored, and the next run replaces it."""
    study = small_study()
    file = tmp_path / "runs.jsonl"
    first, second = (Job("lora", "facts-8", 4, 1e-3, seed, "test") for seed in (0, 1))
    append_line(file, make_run(study, first, ["svd"]).to_line())
    complete_text = file.read_text()
    append_line(file, make_run(study, second, ["svd"]).to_line())
    file.write_text(file.read_text()[:-20])
    assert list(read_runs([file])) == [first]
    append_line(file, make_run(study, second, ["svd"]).to_line())
    append_line(file, make_run(study, first, ["trained"]).to_line())
    assert file.read_text().startswith(complete_text)
    assert {job: sorted(run.curves) for job, run in read_runs([file]).items()} == {
        first: ["svd", "trained"],
        second: ["svd"],
    }


@pytest.mark.slow
def test_runs_are_appended_and_reproducible(tmp_path: Path) -> None:
    from research.run import run_study

    study = small_study()
    file = tmp_path / "runs.jsonl"
    runs = run_study(study, {}, file)
    lines = file.read_text().splitlines()
    assert len(lines) == len(runs) > 3
    assert missing_jobs(study, runs) == {}
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:50])  # killed in the last line
    repeated = run_study(study, read_runs([file]), file)
    last = Run.from_line(lines[-1])
    assert repeated[last.job].curves == last.curves
    text = comparison(study, list(results(study, runs)), list(results(study, repeated)))
    assert "overlap" in text
    assert "differ" not in text


@pytest.mark.slow
def test_p_kept_is_the_trained_function() -> None:
    """At rank R, the SVD computes the trained function too. Without P it is another function."""
    from research.run import run_job

    study = small_study(
        methods=["matryoshka/prefix", "matryoshka/kept", "matryoshka/svd"],
        training={"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
        dtype="fp32",
    )
    job = Job("matryoshka", "facts-8", 4, 1e-2, 0, "test")
    curves = run_job(study, job, ["prefix", "kept", "svd"]).curves
    assert curves["kept"].loss[-1] == pytest.approx(curves["svd"].loss[-1], abs=1e-5)
    assert abs(curves["kept"].loss[-1] - curves["prefix"].loss[-1]) > 1e-3


@pytest.mark.slow
def test_the_methods_of_the_papers_regime_run() -> None:
    from research.run import run_job

    regime = load_study("paper-regime")
    study = small_study(
        methods=regime.methods, training={"max_steps": 2, "per_device_train_batch_size": 8}
    )
    names: dict[str, set[str]] = {}
    for recipe, deployment in map(parse_method, regime.methods):
        names.setdefault(recipe, set()).add(deployment)
    for recipe, deployments in names.items():
        run = run_job(study, Job(recipe, "facts-8", 4, 1e-3, 0, "test"), deployments)
        assert set(run.curves) == deployments
        assert not run.diverged


@pytest.mark.parametrize("change", [{"training": {"max_steps": 3}}, {"max_examples": 3}], ids=str)
def test_runs_with_other_settings_are_refused(change: dict[str, Any]) -> None:
    study = small_study()
    job = Job("lora", "facts-8", 4, 1e-3, 0, "test")
    other = replace(study, **change)
    with pytest.raises(MatryoshkaError, match="settings"):
        study.select_runs({job: make_run(other, job, ["svd"])})


def test_the_line_of_a_damaged_run_is_in_the_message(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text('{"job": 1}\n')
    with pytest.raises(MatryoshkaError, match="line 1"):
        read_runs([file])


def write_choices(folder: Path) -> dict[str, Any]:
    """Write examples as `research.commonsense` does, and return the source of the task."""
    for split in ("validation", "test"):
        for task in commonsense.TASKS:
            names = [fact["prompt"][:-1] for fact in facts(3, f"{split} {task}")]
            questions = [
                {"contexts": [f"{name}a:", f"{name}o:"], "continuations": ["Ba", "Do"], "gold": 0}
                for name in names
            ]
            commonsense.write_task(task, questions, folder / split)
    lines = [json.dumps(fact) + "\n" for fact in facts(50, "train")]
    (folder / "train.jsonl").write_text("".join(lines))
    return {"choices": str(folder)}


SOURCES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "choices": write_choices,
    "wordnet": lambda folder: {"wordnet": "research/studies/wordnet"},
    "chain_sum": lambda folder: {"generated": "chain_sum"},
}
ITEMS = {"judge": 12, "validation": 8, "test": 8}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_examples_of_a_run_are_disjoint(kind: str, split: str, tmp_path: Path) -> None:
    """In the first commonsense study, some test examples decided which ranks were kept."""
    study = small_study(tasks={"task": SOURCES[kind](tmp_path)}, items=ITEMS)
    training = tasks.training_examples(study, "task", "lora", 0)
    held_out = tasks.held_out_examples(study, "task", "lora", 0)
    measured = tasks.measured_examples(study, "task", split, 0)
    assert len(held_out) == 12
    assert len(measured) == 8
    training_prompts, held_out_prompts, measured_prompts = (
        {example["prompt"] for example in examples} for examples in (training, held_out, measured)
    )
    assert training_prompts.isdisjoint(held_out_prompts)
    assert training_prompts.isdisjoint(measured_prompts)
    assert held_out_prompts.isdisjoint(measured_prompts)


@pytest.mark.slow
def test_no_deployment_sees_a_measured_example() -> None:
    from research.training import trainer_of

    study = small_study(tasks={"sums": {"generated": "chain_sum"}}, items=ITEMS, layers=None)
    job = Job("lora", "sums", 4, 1e-3, 0, "test")
    with trainer_of(study, job) as (_, trainer, measured):
        held_out_ids = [example["input_ids"] for example in trainer.eval_dataset]
        measured_ids = [example["input_ids"] for example in measured]
    assert len(held_out_ids) == 12
    assert len(measured_ids) == 8
    assert not [ids for ids in held_out_ids if ids in measured_ids]


@pytest.mark.slow
def test_parts_of_a_batch_have_the_gradient_of_micro_batches() -> None:
    from research.training import trainer_of

    job = Job("dylora-authors", "facts-8", 4, 1e-3, 0, "test")
    with trainer_of(small_study(dtype="fp32"), job) as (adapter, trainer, _):
        examples = list(trainer.train_dataset)
        num_tokens = sum(label != -100 for row in examples for label in row["labels"])

        def add_gradients(rows: list[Any]) -> None:
            batch = trainer.data_collator(rows)
            trainer.compute_loss(adapter.model, batch, num_items_in_batch=num_tokens).backward()

        def pop_gradients() -> list[torch.Tensor]:
            gradients: list[torch.Tensor] = []
            for _, B in adapter.layer_factors().values():
                assert B.grad is not None
                gradients.append(B.grad.clone())
            adapter.model.zero_grad()
            return gradients

        adapter.draw(0, batch_size=len(examples))
        add_gradients(examples)
        gradients = pop_gradients()
        diagonals = adapter.rule.sample(adapter.nesting, job.seed, 0, len(examples))
        ranks = [int(np.count_nonzero(diagonal)) for diagonal in diagonals]
        assert len(set(ranks)) > 1
        for row, rank in zip(examples, ranks, strict=True):
            with adapter.rows([rank]):
                add_gradients([row])
    for gradient, sum_of_rows in zip(gradients, pop_gradients(), strict=True):
        torch.testing.assert_close(gradient, sum_of_rows, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_choices_are_answered_at_every_rank(tmp_path: Path) -> None:
    from research.training import nested_adapter

    write_choices(tmp_path)
    job = Job("lora", "facts-8", 4, 1e-3, 0, "test")
    adapter, tokenizer = nested_adapter(small_study(), job)
    adapter.reorder()
    shares = commonsense.answer_choices(adapter, [1, 4], tmp_path / "test", tokenizer)
    assert set(shares) == set(commonsense.TASKS)
    # B is zero before training, so every rank is the base model.
    for metrics in shares.values():
        for values in metrics.values():
            assert len(values) == 3
            assert len(set(values)) == 1
    assert len(commonsense.mean_accuracies(shares)) == 3


PUBLIC_NAMES = {
    "matryoshka_lora": set(matryoshka_lora.__all__),
    "matryoshka_lora.peft.base_model": {"load_model", "load_tokenizer"},
}


@pytest.mark.parametrize(
    "path",
    sorted(path for path in ROOT.glob("research/**/*.py") if "tests" not in path.parts),
    ids=lambda path: path.stem,
)
def test_research_imports_public_names_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not [name for name in node.names if name.name.startswith("matryoshka_lora")]
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matryoshka_lora"):
            names = {alias.name for alias in node.names}
            assert names <= PUBLIC_NAMES.get(str(node.module), set())
