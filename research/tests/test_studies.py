"""The studies: their tables, what is run next, and which rows may decide what."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import matryoshka_lora
from matryoshka_lora import MatryoshkaError
from research import commonsense, stats, tasks
from research.__main__ import TABLES
from research.facts import facts
from research.plan import missing_jobs, rates, results, units
from research.report import comparison, tables
from research.runs import Curve, Job, Run, append, read
from research.study import ROOT, STUDIES, Study, load_study, make_study, may_be_run

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


def small(**changes: Any) -> Study:
    return make_study("small", {**SMALL, **changes})


def done(study: Study, job: Job, cuts: Any, loss: float = 1.0) -> Run:
    """Return a run as it might have been, with the same loss at every rank."""
    ranks = study.measured(job)
    curve = Curve((loss,) * len(ranks), (0.5,) * len(ranks))
    spent = {"tokens": 10, "seconds": 1.0}
    cost = {**spent, "parameters": 4, "cuts": dict.fromkeys(cuts, spent)}
    settings = study.settings(job.task, job.recipe)
    return Run(job, ranks, dict.fromkeys(cuts, curve), cost, settings, {"torch": "2"})


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_tables_are_what_the_runs_say(path: Path) -> None:
    study = load_study(path.stem)
    runs = study.load_runs()
    if any(results(study, runs)):
        written = (TABLES / f"{study.name}.md").read_text(encoding="utf-8")
        assert written == tables(study, runs), "run python -m research"


def test_interval_by_hand() -> None:
    found = stats.estimate([1.0, 2.0, 3.0])
    assert found is not None
    # The 0.975 quantile of t with two degrees of freedom is 4.3027.
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert found.text(100, 1, "+") == "+200.0 ± 248.4"


def test_rates_come_first_and_the_grid_grows_at_its_edge() -> None:
    study = small()
    runs: dict[Job, Run] = {}
    best = 8e-3  # above the grid, which ends at 4e-3
    for _ in range(5):
        missing = missing_jobs(study, runs)
        if any(job.split == "test" for job in missing):
            break
        for job, cuts in missing.items():
            runs[job] = done(study, job, cuts, abs(job.learning_rate - best))
    assert {job.learning_rate for job in runs} == {1e-3, 2e-3, 4e-3, 8e-3, 16e-3}
    assert rates(study, runs, units(study, "lora/svd", "facts-8")[0]).chosen == best
    # One training run of each seed serves both cuts.
    assert {(job.seed, job.learning_rate): cuts for job, cuts in missing.items()} == {
        (seed, best): {"svd", "trained"} for seed in (0, 1)
    }


def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    """What a kill leaves of a line is passed over, and the next run takes its place."""
    study, file = small(), tmp_path / "runs.jsonl"
    one, two = (Job("lora", "facts-8", 4, 1e-3, seed, "test") for seed in (0, 1))
    append(file, done(study, one, ["svd"]))
    whole = file.read_text()
    append(file, done(study, two, ["svd"]))
    file.write_text(file.read_text()[:-20])
    assert list(read([file])) == [one]
    append(file, done(study, two, ["svd"]))
    append(file, done(study, one, ["trained"]))
    found = read([file])
    assert file.read_text().startswith(whole)
    assert {job: sorted(run.curves) for job, run in found.items()} == {
        one: ["svd", "trained"],
        two: ["svd"],
    }


@pytest.mark.slow
def test_runs_are_made_appended_and_the_same_again(tmp_path: Path) -> None:
    from research.run import run_study

    study, file = small(), tmp_path / "runs.jsonl"
    found = run_study(study, {}, file)
    lines = file.read_text().splitlines()
    assert len(lines) == len(found) > 3
    assert missing_jobs(study, found) == {}
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:50])  # killed in the last line
    again = run_study(study, read([file]), file)
    last = Run.from_line(lines[-1])
    assert again[last.job].curves == last.curves
    said = comparison(study, list(results(study, found)), list(results(study, again)))
    assert "meet" in said
    assert "differ" not in said


def test_runs_with_other_settings_are_refused() -> None:
    study = small()
    job = Job("lora", "facts-8", 4, 1e-3, 0, "test")
    other = replace(study, training={**study.training, "max_steps": 3})
    with pytest.raises(MatryoshkaError, match="other settings"):
        study.its_own({job: done(other, job, ["svd"])})


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text('{"job": 1}\n')
    with pytest.raises(MatryoshkaError, match=r"runs\.jsonl, line 1 is no run"):
        read([file])


def choices(folder: Path) -> dict[str, Any]:
    """Write rows of the form of `research.commonsense`."""
    for split in ("validation", "test"):
        for task in commonsense.TASKS:
            asked = [
                {"contexts": [f"{name}a:", f"{name}o:"], "continuations": ["Ba", "Do"], "gold": 0}
                for name in (fact["prompt"][:-1] for fact in facts(3, f"{split} {task}"))
            ]
            commonsense.write_task(task, asked, folder / split)
    text = "".join(json.dumps(row) + "\n" for row in facts(50, "train"))
    (folder / "train.jsonl").write_text(text)
    return {"choices": str(folder)}


SOURCES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "choices": choices,
    "wordnet": lambda folder: {"wordnet": "research/studies/wordnet"},
    "chain_sum": lambda folder: {"generated": "chain_sum"},
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_rows_that_judge_are_neither_trained_nor_measured(
    kind: str, split: str, tmp_path: Path
) -> None:
    """The rows of the commonsense study that were measured once decided what was kept, too."""
    items = {"judge": 12, "validation": 8, "test": 8}
    study = small(tasks={"task": SOURCES[kind](tmp_path)}, items=items)
    trained = tasks.train_rows(study, "task", "lora", 0)
    judging = tasks.judge_rows(study, "task", "lora", 0)
    measured = tasks.measured_rows(study, "task", split, 0)
    parts = [{row["prompt"] for row in rows} for rows in (trained, judging, measured)]
    assert [len(judging), len(measured)] == [12, 8]
    assert all(one.isdisjoint(two) for one, two in zip(parts, [*parts[1:], parts[0]], strict=True))


@pytest.mark.slow
def test_no_cut_finds_a_measured_row_in_the_trainer() -> None:
    from research.training import trainer_of

    items = {"judge": 12, "validation": 8, "test": 8}
    study = small(tasks={"sums": {"generated": "chain_sum"}}, items=items, layers=None)
    job = Job("lora", "sums", 4, 1e-3, 0, "test")
    with trainer_of(study, job) as (_, trainer, measured):
        judging, asked = ([row["input_ids"] for row in d] for d in (trainer.eval_dataset, measured))
    assert [len(judging), len(asked)] == [12, 8]
    assert not [row for row in judging if row in asked]


@pytest.mark.slow
def test_choices_are_asked_at_every_rank(tmp_path: Path) -> None:
    from research.training import nested

    choices(tmp_path)
    adapter, tokenizer = nested(small(), Job("lora", "facts-8", 4, 1e-3, 0, "test"))
    adapter.reorder()
    found = commonsense.choose(adapter, [1, 4], tmp_path / "test", tokenizer)
    assert set(found) == set(commonsense.TASKS)
    # B is zero before training, so every rank is the base model.
    assert all(len(v) == 3 and len(set(v)) == 1 for of in found.values() for v in of.values())
    assert len(commonsense.mean_accuracies(found)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"sums": {"generated": "chain_sum"}}}, "write items.judge"),
        ({"methods": ["lora/budget"]}, "lora/budget is settled"),
        ({"methods": ["sum/prefix"]}, "sum/prefix is settled"),
        ({"settled": "it was wrong"}, "only reported: it was wrong"),
    ],
)
def test_what_is_not_run(changes: dict[str, Any], message: str) -> None:
    may_be_run(small())
    with pytest.raises(MatryoshkaError, match=message):
        may_be_run(small(**changes))


PUBLIC = {
    "matryoshka_lora": set(matryoshka_lora.__all__),
    "matryoshka_lora.models": {"load_model", "load_tokenizer"},
    "matryoshka_lora.reordering.trained": {"ENOUGH", "JUDGES", "ROWS"},
}


@pytest.mark.parametrize("path", sorted(ROOT.glob("research/*.py")), ids=lambda path: path.stem)
def test_research_uses_public_names_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not [name for name in node.names if name.name.startswith("matryoshka_lora")]
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matryoshka_lora"):
            assert {alias.name for alias in node.names} <= PUBLIC.get(str(node.module), set())
