"""The study before and between its runs: what its YAML file may say, what is to be run next, and the files of runs."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from filelock import FileLock

import matryoshka_lora
import matryoshka_lora.training
from matryoshka_lora import MatryoshkaError, Nesting
from research.__main__ import compare
from research.plan import MOST_RATES, Unit, load_runs, missing_jobs, needed, rates, results
from research.recipes import RECIPES, parse_method
from research.records import Curve, Job, Run
from research.rules import RULES
from research.run import run_once
from research.study import Study, load_study, make_study
from research.tasks import make_task

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "research" / "pages"
SHIPPED = sorted((ROOT / "research" / "configs").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "rank": 4,
    "tasks": {"sums": {"task": "chain_sum"}},
    "methods": ["lora/svd"],
    "seeds": [0, 1],
    "learning_rates": {"grid": [1e-3, 2e-3, 4e-3], "seeds": [100]},
}
FILES = {split: f"nowhere/{split}.jsonl" for split in ("train", "validation", "test")}


def study_of(**changes: Any) -> Study:
    return make_study({**SMALL, **changes})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_studies_of_this_repository(path: Path) -> None:
    written, study = yaml.safe_load(path.read_text()), load_study(path)
    assert study.title == written["title"]
    assert list(study.methods) == written["methods"]
    assert list(study.tasks) == list(written["tasks"])
    assert study.winner == written.get("winner")
    assert set(written["training"].items()) <= set(study.training.items())
    assert (
        study.train_rows("lora")
        == written["training"]["max_steps"] * written["training"]["per_device_train_batch_size"]
    )


def test_the_study_in_the_documentation() -> None:
    text = (PAGES / "study.md").read_text().split("```yaml\n")[1].split("```")[0]
    study = make_study(yaml.safe_load(text))
    assert (study.rank, list(study.tasks), len(study.methods)) == (32, ["mine"], 4)


REPORTS = sorted(path.parent for path in PAGES.glob("*/study.md"))


@pytest.mark.parametrize("folder", REPORTS, ids=lambda folder: folder.name)
def test_the_reports_are_what_the_recorded_runs_say(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of version 0.1 too."""
    monkeypatch.chdir(ROOT)  # to which the files of a study are relative
    study = ROOT / "research" / "configs" / f"{folder.name}.yaml"
    compare(study, tmp_path, PAGES / "runs", minutes=None, report=True)
    assert (tmp_path / "study.md").read_text() == (folder / "study.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "research/pages/study.md"])
def test_every_interval_in_the_documentation_is_in_a_report(name: str) -> None:
    """Those with an interval are in some cell, to the last digit; words may say the sign."""
    reports = " ".join((folder / "study.md").read_text() for folder in REPORTS)
    text = " ".join((ROOT / name).read_text().split())
    found = re.findall(r"[-+]?\d+\.\d+ ± \d+\.\d+", text)
    assert len(found) > 20 or name == "README.md"
    assert [number for number in found if not re.search(rf"[-+ ]{re.escape(number)} ", reports)] == []


PUBLIC = {
    "matryoshka_lora": set(matryoshka_lora.__all__),
    "matryoshka_lora.training": set(matryoshka_lora.training.__all__),
    "matryoshka_lora.rules": {"Rule", "Draw"},
    "matryoshka_lora.models": {"load_model", "load_tokenizer"},
}


@pytest.mark.parametrize("path", sorted(ROOT.glob("research/*.py")), ids=lambda path: path.stem)
def test_the_study_uses_the_public_surface_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("matryoshka_lora")]
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matryoshka_lora"):
            assert {alias.name for alias in node.names} <= PUBLIC.get(str(node.module), set())


def test_diagonals_by_hand() -> None:
    """The paper's P for the ranks 1, 2, 4 is 3, 2, 1, 1."""
    nesting = Nesting((1, 2, 4))
    found = {name: rule.trained_diagonal(nesting).tolist() for name, rule in RULES.items()}
    assert found["mean"] == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3])
    assert found["reversed"] == [1, 1, 2, 3]
    assert sorted(found["random"]) == [1, 1, 2, 3]
    assert found["random"] == RULES["random"].trained_diagonal(nesting).tolist()
    assert found["geometric-0.8"] == pytest.approx([0.8**n * 4 / (1 + 0.8 + 0.64 + 0.512) for n in range(4)])
    assert all(recipe.rule in {*RULES, *matryoshka_lora.rules.RULES} for recipe in RECIPES.values())


@pytest.mark.parametrize(
    ("recipe", "scales"),
    [
        ("matryoshka", {1: 1, 4: 1}),
        ("matryoshka-rank", {1: 1, 4: 1 / 4}),
        ("matryoshka-sqrt", {1: 1, 4: 1 / 2}),
        ("rslora", {1: 16, 4: 8}),
        ("dylora-alpha", {1: 16, 4: 4}),
    ],
)
def test_the_scale_of_a_rank(recipe: str, scales: dict[int, float]) -> None:
    nesting = study_of().train_config(recipe, 4, 1e-3, 0, "unused").nesting
    assert nesting.ranks == (1, 2, 4)
    assert {rank: nesting.scale_at(rank) for rank in scales} == pytest.approx(scales)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1}, "the study has no key 'learning_rate'; did you mean 'learning_rates'"),
        ({"tasks": None}, "tasks is missing"),
        ({"tasks": ["chain_sum"]}, r"tasks is \['chain_sum'\]; write a mapping"),
        ({"tasks": {"sums": "chain_sum"}}, "tasks.sums is 'chain_sum'; write {task: chain_sum}, or {train:"),
        ({"tasks": {"own": {"train": "a.jsonl", "test": "b.jsonl"}}}, "tasks.own is .*; write .*validation: b.jsonl"),
        ({"tasks": {"own": {**FILES, "test": "a.txt"}}}, r"tasks.own: data 'a.txt' is no built-in task.*\.jsonl"),
        ({"tasks": {"sums": {"task": "chain_sun"}}}, "tasks.sums: there is no built-in task.*did you mean 'chain_sum'"),
        ({"tasks": {"..": {"task": "chain_sum"}}}, r"tasks has '\.\.', which cannot name a folder"),
        ({"methods": "lora/svd"}, "methods is 'lora/svd'; write a list"),
        ({"methods": ["lora/sdv"]}, "recipe 'lora' has no cut 'sdv'; it has prefix, svd"),
        ({"methods": ["lora/keep"]}, "recipe 'lora' has no cut 'keep'; it has prefix"),
        ({"methods": ["matrioshka/prefix"]}, "no method 'matrioshka/prefix'; did you mean matryoshka/prefix"),
        ({"methods": ["adalora/prefix"]}, "no method 'adalora/prefix'; did you mean "),
        ({"winner": "lora/prefix"}, "winner is 'lora/prefix', which is none of the methods"),
        ({"seeds": [3, 3]}, r"seeds is \[3, 3\]; write a list of different"),
        ({"seeds": [0, True]}, "one of seeds is True; write a whole number"),
        ({"learning_rates": {"grids": [1, 2]}}, "learning_rates has no key 'grids'; did you mean 'grid'"),
        ({"learning_rates": {"seeds": [1]}}, "learning_rates.seeds has 1, one of seeds too"),
        *(
            ({"learning_rates": {"grid": grid}}, "learning_rates.grid is .*; write at least two ascending rates")
            for grid in ([1e-3], [2e-3, 1e-3], [0, 1e-3], ["1e-3", 2e-3], [1e-3, math.inf], 1)
        ),
        ({"training": {"learning_rate": 1e-3}}, "training.learning_rate has no place in a study"),
        ({"training": {"eval_strategy": "steps"}}, "training.eval_strategy has no place in a study"),
        ({"training": {"hub_token": "secret"}}, "training.hub_token stands in every run's file"),
        ({"training": {"hub_model_id": "me/mine"}}, "training.hub_model_id stands in every run's file"),
        ({"training": {"max_step": 3}}, "training has no key 'max_step'; did you mean 'max_steps'"),
        ({"training": {"max_steps": "3"}}, "training.max_steps is '3'; write a positive whole number"),
        ({"training": {"lr_scheduler_type": "linnear"}}, "refuses a training argument: .*linnear"),
        ({"training": {"packing": True}}, "training.packing is True, which a study cannot do"),
        ({"items": {"train": 5}}, "items has no key 'train'; the keys are validation, test"),
        ({"items": {"test": True}}, "items.test is True; write a positive whole number"),
        ({"rank": 0}, "rank 0 is not positive"),
        ({"rank": 8, "ranks": [1, 4]}, "the last of ranks is 4, and rank is 8"),
        ({"ranks": [4, 1, 32]}, "ranks"),
        ({"dtype": "float32"}, "dtype is 'float32'; write one of bf16"),
        ({"methods": ["p-rates/svd"], "training": {"weight_decay": 0.1}}, "weight_decay is 0.1, which p-rates"),
        ({"methods": ["adalora-each"], "training": {"max_steps": 1}}, "max_steps is 1, and adalora needs 2"),
    ],
    ids=str,
)
def test_a_wrong_study(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        study_of(**changes)
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    with pytest.raises(MatryoshkaError, match=f"wrong.yaml: .*{message}"):
        load_study(path)


def test_a_file_with_too_few_questions_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"prompt": "{n}=", "completion": "{n}"}}\n' for n in range(3)))
    task = study_of(tasks={"own": dict.fromkeys(FILES, str(file))}).tasks["own"]
    assert task.rows("test", 2) == [{"prompt": f"{n}=", "completion": str(n)} for n in range(2)]
    assert len(task.rows("train", None)) == 3
    with pytest.raises(MatryoshkaError, match=r"a.jsonl has 3 rows, not 4: give more, or lower items.test"):
        task.rows("test", 4)


# Runs that nobody trained: a world says what each job would give.

World = Callable[[Job, str], "float | None"]
"""The mean loss of a job in one cut; None where its training diverges."""


def run_of(study: Study, job: Job, cuts: Iterable[str], world: World) -> Run:
    """A finished job with the losses that a world gives it."""
    ranks = study.nesting(job.rank)
    losses = {cut: world(job, cut) for cut in cuts}
    curves = {
        # Not flat, so that the mean over the ranks is what counts and no single one.
        cut: Curve(tuple(loss + n - (len(ranks) - 1) / 2 for n in range(len(ranks))), (0.5,) * len(ranks))
        for cut, loss in losses.items()
        if loss is not None
    }
    cost = {"tokens": 1, "seconds": 1.0, "parameters": 1, "cuts": {c: {"tokens": 0, "seconds": 0.0} for c in losses}}
    diverged = tuple(cut for cut, loss in losses.items() if loss is None)
    return Run(job, ranks, curves, cost, study.settings(job.task, job.recipe), {}, diverged)


def all_cuts(study: Study, job: Job) -> list[str]:
    """What the study measures of a job, from the methods' names."""
    found = [m.split("/")[1] for m in study.methods if m.split("/")[0] == job.recipe and job.rank == study.rank]
    return [*found, "prefix"] if "lora-each" in study.methods and job.recipe == "lora" else found


def finish(study: Study, world: World) -> dict[Job, Run]:
    """All runs of a study, one after the other."""
    runs: dict[Job, Run] = {}
    while missing := missing_jobs(study, runs):
        runs[missing[0]] = run_of(study, missing[0], all_cuts(study, missing[0]), world)
    return runs


def tried(runs: Mapping[Job, Run], recipe: str = "lora") -> list[float]:
    return sorted(job.learning_rate for job in runs if job.split == "validation" and job.recipe == recipe)


LORA = Unit("lora", "svd", "sums", 4)


@pytest.mark.parametrize(
    ("grid", "optimum", "expected"),
    [
        ([1e-3, 2e-3, 4e-3], 2e-3, [1e-3, 2e-3, 4e-3]),
        ([1e-3, 2e-3, 4e-3], 1.6e-2, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]),
        ([1e-3, 2e-3, 4e-3], 2.5e-4, [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]),
        ([1e-3, 2e-3], 2e-3, [1e-3, 2e-3, 4e-3]),
        ([1e-3, 2e-3], 1e-3, [5e-4, 1e-3, 2e-3]),
        # Each edge grows by the factor that it has.
        ([1e-3, 3e-3, 3e-2], 0.3, [1e-3, 3e-3, 3e-2, 0.3, 3.0]),
        ([1e-3, 3e-3, 3e-2], 1.11e-4, [3.7e-5, 1.11e-4, 3.33e-4, 1e-3, 3e-3, 3e-2]),
    ],
)
def test_the_grid_grows_until_its_best_rate_is_inside(grid: list[float], optimum: float, expected: list[float]) -> None:
    study = study_of(learning_rates={"grid": grid, "seeds": [100]})
    runs = finish(study, lambda job, cut: 9 + abs(math.log(job.learning_rate / optimum)))
    assert tried(runs) == pytest.approx(expected, rel=1e-9)
    assert rates(study, runs, LORA).chosen == pytest.approx(optimum)
    assert {job.learning_rate for job in runs if job.split == "test"} == {rates(study, runs, LORA).chosen}


def test_the_two_best_rates_are_tried_with_every_seed() -> None:
    """Of 8e-3, best with the first seed, another seed diverges: the next is asked in its place."""
    study = study_of(learning_rates={"grid": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "seeds": [100, 101, 102]})
    first = {1e-3: 5.0, 2e-3: 3.0, 4e-3: 2.0, 8e-3: 1.0, 1.6e-2: 9.0}
    others = {2e-3: 1.0, 4e-3: 4.0, 8e-3: None}
    world = lambda job, cut: first[job.learning_rate] if job.seed == 100 else others.get(job.learning_rate, 1)  # noqa: E731
    runs = finish(study, world)
    asked = {(job.learning_rate, job.seed) for job in runs if job.split == "validation"}
    assert asked == {(rate, 100) for rate in first} | {(rate, seed) for rate in others for seed in (101, 102)}
    state = rates(study, runs, LORA)
    assert state.losses[2e-3] == pytest.approx((3 + 1 + 1) / 3)
    assert state.losses[4e-3] == pytest.approx((2 + 4 + 4) / 3)
    assert state.chosen == 2e-3
    assert {job.learning_rate for job in runs if job.split == "test"} == {2e-3}


def test_where_every_rate_diverges_none_is_chosen() -> None:
    """And no seed is trained for it, and other cuts of the same training do not wait for it."""
    study = study_of(methods=["lora/svd", "lora/prefix"])
    runs = finish(study, lambda job, cut: None if cut == "svd" else 1 + abs(math.log(job.learning_rate / 2e-3)))
    assert len(tried(runs)) == MOST_RATES
    assert rates(study, runs, LORA).chosen is None
    assert {result.method for result in results(study, runs)} == {"lora/prefix"}
    assert {job.learning_rate for job in runs if job.split == "test"} == {2e-3}


def test_each_rank_of_lora_each_has_a_rate_of_its_own() -> None:
    study = study_of(methods=["lora-each", "lora/svd"])
    best = {1: 4e-3, 2: 2e-3, 4: 1e-3}

    def world(job: Job, cut: str) -> float:
        return 9 + abs(math.log(job.learning_rate / (best[job.rank] if cut == "prefix" else 8e-3)))

    runs = finish(study, world)
    tests = {(job.rank, job.learning_rate) for job in runs if job.split == "test"}
    assert tests == {(1, 4e-3), (2, 2e-3), (4, 1e-3), (4, 8e-3)}
    each, one = (next(r for r in results(study, runs) if r.method == method) for method in study.methods)
    assert each.ranks == one.ranks == (1, 2, 4)
    assert each.learning_rates == (4e-3, 2e-3, 1e-3)
    assert one.learning_rates == (8e-3,) * 3


def test_test_questions_are_asked_of_a_cut_at_its_own_rate_alone(tmp_path: Path) -> None:
    study = study_of(methods=["lora-each", "lora/svd", "lora/prefix"], seeds=[7])
    best = {"svd": 2e-3, "prefix": 4e-3}
    world = lambda job, cut: 9 + abs(math.log(job.learning_rate / best[cut]))  # noqa: E731
    runs = finish(study, world)
    two, four = (Job("lora", "sums", 4, rate, 7, "test") for rate in (2e-3, 4e-3))
    assert needed(study, runs, two) == ["svd"]
    assert needed(study, runs, four) == ["prefix"]
    # None before the rates are known. On validation data all of them, but where one alone is still at the edge.
    assert needed(study, {}, four) == []
    tried = Job("lora", "sums", 4, 2e-3, 100, "validation")
    assert needed(study, {}, tried) == ["prefix", "svd"]
    assert needed(study, runs, tried) == []
    edge = replace(tried, learning_rate=8e-3)
    assert needed(study, {job: run for job, run in runs.items() if job != edge}, edge) == ["prefix"]
    for job, run in runs.items():
        replace(run, curves={cut: run.curves[cut] for cut in needed(study, runs, job) or run.curves}).write(tmp_path)
    assert load_runs(study, tmp_path).keys() == runs.keys()
    assert {r.method for r in results(study, load_runs(study, tmp_path))} == set(study.methods)
    replace(runs[two], curves={"prefix": runs[two].curves["prefix"]}).write(tmp_path)
    assert missing_jobs(study, load_runs(study, tmp_path)) == [two]


def test_a_curve_of_lora_each_is_put_together_from_a_run_for_each_rank() -> None:
    study = study_of(methods=["lora-each", "lora/prefix", "lora/learned"], seeds=[7])
    runs = finish(study, lambda job, cut: 9 + abs(math.log(job.learning_rate / 2e-3)))
    losses = {1: (0.9,), 2: (0.7,), 4: (0.8, 0.6, 0.5)}
    for n, (rank, loss) in enumerate(losses.items(), start=1):
        job = Job("lora", "sums", rank, 2e-3, 7, "test")
        curve = Curve(loss, tuple(1 - x for x in loss), {"piqa": {"acc": [0.25, *loss]}})
        cut = {"prefix": {"tokens": 0, "seconds": 0.25}, "learned": {"tokens": 30, "seconds": 2.0}}
        cost = {"tokens": 100 * n, "seconds": 1.0 * n, "parameters": 8 * rank, "cuts": cut}
        runs[job] = replace(runs[job], curves={"prefix": curve, "learned": curve}, cost=cost)
    each, prefix, learned = results(study, runs)
    assert [r.method for r in (each, prefix, learned)] == list(study.methods)
    assert each.ranks == (1, 2, 4)
    chosen = {"piqa": {"acc": [0.25, 0.9, 0.7, 0.5]}}
    assert each.curve == Curve((0.9, 0.7, 0.5), (1 - 0.9, 1 - 0.7, 0.5), chosen)
    assert prefix.curve.parts == {"piqa": {"acc": [0.25, 0.8, 0.6, 0.5]}}
    assert (each.tokens, each.seconds, each.parameters) == (100 + 200 + 300, 1 + 2 + 3 + 3 * 0.25, 8 + 16 + 32)
    assert prefix.curve.loss == learned.curve.loss == (0.8, 0.6, 0.5)
    assert (prefix.tokens, prefix.seconds, prefix.parameters) == (300, 3.25, 32)
    assert (learned.tokens, learned.seconds, learned.parameters) == (330, 5.0, 32)
    for rank in losses:
        fewer = {job: run for job, run in runs.items() if job.rank != rank or job.split != "test"}
        assert "lora-each" not in [r.method for r in results(study, fewer)]


METHODS = ["lora/svd", "matryoshka/keep", "lora-each", "lora/prefix", "matryoshka/learned"]


# Files.


def wrote(folder: Path, study: Study, cuts: Iterable[str] = ("svd",), **changes: Any) -> Path:
    """The file of one validation run, with some of its fields replaced."""
    job = Job("lora", "sums", 4, 1e-3, 100, "validation")
    replace(run_of(study, job, cuts, lambda job, cut: 1.5), **changes).write(folder)
    return job.path(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "7",
        lambda text: text.replace('"format": 2', '"format": 3'),
        lambda text: text.replace('"format": 2, ', ""),
        lambda text: text.replace('"task"', '"tusk"'),
        lambda text: text.replace('"curves": {', '"curves": 3, "other": {'),
        lambda text: text.replace('"loss"', '"less"'),
        lambda text: text.replace('"settings"', '"setting"'),
        lambda text: text + "x",
        lambda text: text + "ß",
    ],
)
def test_a_file_that_is_no_run(tmp_path: Path, damage: Callable[[str], str]) -> None:
    study = study_of()
    path = wrote(tmp_path, study)
    assert len(load_runs(study, tmp_path)) == 1
    path.write_text(damage(path.read_text()), encoding="latin-1")
    with pytest.raises(MatryoshkaError) as caught:
        load_runs(study, tmp_path)
    assert str(path) in str(caught.value)
    assert "delete it to run it again" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model": "other"}, "model"),
        ({"dtype": "fp32"}, "dtype"),
        ({"training": {"max_steps": 81}}, "training"),
        ({"training": {"weight_decay": 0.1}}, "training"),
        ({"items": {"validation": 51}}, "items"),
        ({"items": {"test": 7}}, "items"),
        ({"threads": 2}, "threads"),
        ({"tasks": {"sums": {"task": "chain_sum", "max_terms": 3}}}, "source"),
        ({"tasks": {"sums": FILES}}, "source, files"),
        ({"model": "other", "threads": 2}, "model, threads"),
        ({"rank": 8, "methods": ["lora-each"]}, "rank"),
    ],
    ids=str,
)
def test_runs_with_other_settings_are_refused(
    tmp_path: Path, changes: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    path = wrote(tmp_path, study_of())
    with pytest.raises(MatryoshkaError) as caught:
        load_runs(study_of(**changes), tmp_path)
    assert f"{path} was run with another {name} than this study has: take another folder" in str(caught.value)


def write_files(folder: Path) -> None:
    for file in FILES.values():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"prompt": "1=", "completion": "1"}\n')


@pytest.mark.parametrize(
    "changes",
    [
        {"title": "Another title"},
        {"seeds": [5, 6, 7]},
        {"winner": "lora/svd"},
        {"learning_rates": {"grid": [5e-4, 1e-3]}},
        {"tasks": {"more": {"task": "family_relationships"}, "sums": {"task": "chain_sum"}}},
        {"methods": ["stratified/prefix", "lora-each", "lora/svd"]},
    ],
    ids=str,
)
def test_runs_are_kept_when_a_study_grows(tmp_path: Path, changes: dict[str, Any]) -> None:
    wrote(tmp_path, study_of(), ["prefix", "svd"])
    assert len(load_runs(study_of(**changes), tmp_path)) == 1


def test_a_run_that_lacks_a_cut_is_due_again(tmp_path: Path) -> None:
    study = study_of(methods=["lora/svd", "lora/loss"])
    job = Job("lora", "sums", 4, 1e-3, 100, "validation")
    wrote(tmp_path, study, ["svd"])
    assert job in missing_jobs(study, load_runs(study, tmp_path))
    wrote(tmp_path, study, ["svd", "prefix", "loss"])
    assert job not in missing_jobs(study, load_runs(study, tmp_path))
    # What diverged would again.
    for cuts, lost in (([], ("svd", "loss")), (["svd"], ("loss",))):
        wrote(tmp_path, study, cuts, diverged=lost)
        assert set(load_runs(study, tmp_path)[job].curves) == set(cuts)
        assert job not in missing_jobs(study, load_runs(study, tmp_path))


def test_no_test_question_is_asked_before_the_rates_are_chosen(tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="or not before its rates are chosen"):
        run_once(study_of(), Job("lora", "sums", 4, 1e-3, 0, "test"), tmp_path)
    assert not list(tmp_path.glob("test/*/*"))


def test_a_job_that_another_process_has_is_left_to_it(tmp_path: Path) -> None:
    study, job = study_of(model="there/is/no/such/model"), Job("lora", "sums", 4, 1e-3, 100, "validation")
    path = wrote(tmp_path, study)
    assert run_once(study, job, tmp_path)
    (lock,) = (tmp_path / ".locks").iterdir()
    path.unlink()
    with FileLock(lock):
        assert not run_once(study, job, tmp_path)
    with pytest.raises(MatryoshkaError, match="there/is/no/such/model"):
        run_once(study, job, tmp_path)
    assert not path.exists()


def test_the_mean_over_the_ranks_chooses(tmp_path: Path) -> None:
    study = study_of()
    losses = {1e-3: (0.1, 5.0, 5.0), 2e-3: (2.0, 2.0, 2.0), 4e-3: (5.0, 5.0, 0.1)}
    for rate, loss in losses.items():
        job = Job("lora", "sums", 4, rate, 100, "validation")
        run = run_of(study, job, ["svd"], lambda job, cut: 1.0)
        replace(run, curves={"svd": Curve(loss, (0.0,) * 3)}).write(tmp_path)
    state = rates(study, load_runs(study, tmp_path), LORA)
    assert state.losses == {rate: pytest.approx(fmean(loss)) for rate, loss in losses.items()}
    assert state.chosen == 2e-3
    assert json.loads(job.path(tmp_path).read_text())["curves"]["svd"]["loss"] == [5.0, 5.0, 0.1]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_no_held_out_question_of_these_studies_is_trained_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    for task in study.tasks.values():
        if task.is_memory or task.choices is not None:  # the one asks what was trained; see test_runs for the other
            continue
        rows = {split: task.rows(split, study.items[split]) for split in ("validation", "test")}
        longest = max((parse_method(method)[0] for method in study.methods), key=study.train_rows)
        seeds = (*study.seeds, *study.rate_seeds)
        trained = {row["prompt"] for seed in seeds for row in study.train_set(longest, task.name, seed)}
        assert not trained & {row["prompt"] for found in rows.values() for row in found}
        assert not {row["prompt"] for row in rows["validation"]} & {row["prompt"] for row in rows["test"]}
        assert {split: len(found) for split, found in rows.items()} == study.items


def test_a_longer_recipe_takes_new_questions_or_the_same_again() -> None:
    study = study_of()
    plain, longer, again = (study.train_set(recipe, "sums", 0) for recipe in ("lora", "lora-longer", "lora-again"))
    assert (len(plain), len(longer)) == (960, 1440)
    assert longer[:960] == plain == again
    assert study.steps("lora-longer") == study.steps("lora-again") == 120
    assert study.train_rows("lora-longer") == study.train_rows("lora-again") == 1440
    odd = study_of(training={"max_steps": 81})
    assert odd.train_set("lora-again", "sums", 0) == odd.train_set("lora", "sums", 0)


def test_a_memory_task_asks_what_its_run_was_trained_on() -> None:
    task = make_task("facts", {"facts": 20})
    trained = task.rows("train", None, 3)
    assert len(trained) == len({row["prompt"] for row in trained}) == 20
    assert task.held_out("test", 20, 3) == trained
    assert not {row["prompt"] for row in task.held_out("validation", 20, 100)} & {row["prompt"] for row in trained}
    with pytest.raises(MatryoshkaError, match=r"tasks\.facts\.facts is 0; write a number of facts"):
        make_task("facts", {"facts": 0})
