"""The study before and between its runs: what its YAML file may say, what is to be run next, and the files of runs."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.cli.compare import compare
from research.config import Study, load_study, make_study
from research.plan import (
    MOST_RATES,
    Unit,
    diverged,
    load_runs,
    missing_jobs,
    needed,
    rates,
    results,
    units,
)
from research.recipes import LEARNED, RECIPES, cut_settings, parse_method
from research.records import Curve, Job, Run
from research.run import _with_curves_of, run_once
from matryoshka_lora.data.tasks import get_task

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "study"
SHIPPED = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "rank": 4,
    "tasks": {"sums": {"task": "chain_sum"}},
    "methods": ["lora/frobenius"],
    "seeds": [0, 1],
    "learning_rates": {"grid": [1e-3, 2e-3, 4e-3], "seed": 100},
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
    text = (ROOT / "docs" / "study.md").read_text().split("```yaml\n")[1].split("```")[0]
    study = make_study(yaml.safe_load(text))
    assert (study.rank, list(study.tasks), len(study.methods)) == (32, ["mine"], 4)


REPORTS = {
    path.parent: "headline" if path.parent.name == "study" else path.parent.name for path in DOCS.rglob("study.md")
}


@pytest.mark.parametrize("folder", REPORTS, ids=REPORTS.get)
def test_the_reports_are_what_their_runs_say(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # to which the files of a study are relative
    study = ROOT / "configs" / "studies" / f"{REPORTS[folder]}.yaml"
    compare(study, out=tmp_path, runs=DOCS, report=True)
    assert (tmp_path / "study.md").read_text() == (folder / "study.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "docs/study.md"])
def test_every_interval_in_the_documentation_is_in_a_report(name: str) -> None:
    """Those with an interval are in some cell, to the last digit; words may say the sign."""
    reports = " ".join((folder / "study.md").read_text() for folder in REPORTS)
    text = " ".join((ROOT / name).read_text().split())
    found = re.findall(r"[-+]?\d+\.\d+ ± \d+\.\d+", text)
    assert len(found) > 20
    assert [number for number in found if not re.search(rf"[-+ ]{re.escape(number)} ", reports)] == []


def test_there_are_studies_and_a_report_in_this_repository() -> None:
    assert SHIPPED
    assert DOCS in REPORTS


def test_what_a_study_need_not_say() -> None:
    study = make_study({"tasks": SMALL["tasks"], "methods": ["lora-each", "lora/prefix", "lora-each"]})
    assert (study.model, study.dtype, study.rank, study.threads) == ("smollm2-135m", "bf16", 32, 1)
    assert study.methods == ("lora-each", "lora/prefix")
    assert study.winner is None
    assert not set(study.seeds) & {study.rate_seed}
    assert study.nesting(32) == (1, 2, 4, 8, 16, 32)
    assert study.nesting(8) == (8,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1}, "'learning_rate' at the top level; did you mean 'learning_rates'"),
        ({"tasks": None}, "tasks is missing"),
        ({"tasks": ["chain_sum"]}, r"tasks is \['chain_sum'\]; write a mapping"),
        ({"tasks": {"sums": "chain_sum"}}, "tasks.sums is 'chain_sum'; write {task: chain_sum}, or {train:"),
        ({"tasks": {"own": {"train": "a.jsonl", "test": "b.jsonl"}}}, "tasks.own is .*; write .*validation: b.jsonl"),
        ({"tasks": {"own": {**FILES, "task": "chain_sum"}}}, "tasks.own is .*; write {task: chain_sum}, or {train:"),
        ({"tasks": {"own": {**FILES, "dev": "a.jsonl"}}}, "tasks.own: there is no key 'dev'.*the keys are train, val"),
        ({"tasks": {"own": {**FILES, "test": "a.txt"}}}, r"tasks.own: data 'a.txt' is no built-in task.*\.jsonl"),
        ({"tasks": {"sums": {"task": "chain_sun"}}}, "tasks.sums: there is no built-in task.*did you mean 'chain_sum'"),
        ({"tasks": {"sums": {"task": "chain_sum", "max_term": 3}}}, "tasks.sums: .*did you mean 'max_terms'"),
        ({"tasks": {"a/b": {"task": "chain_sum"}}}, "tasks has 'a/b', which cannot name a folder: write letters"),
        ({"tasks": {"..": {"task": "chain_sum"}}}, r"tasks has '\.\.', which cannot name a folder"),
        ({"methods": []}, "methods is missing"),
        ({"methods": "lora/frobenius"}, "methods is 'lora/frobenius'; write a list"),
        ({"methods": ["lora/frobenus"]}, "recipe 'lora' has no cut 'frobenus'; it has prefix, frobenius"),
        ({"methods": ["lora/keep"]}, "recipe 'lora' has no cut 'keep'; it has prefix"),
        ({"methods": ["matrioshka/prefix"]}, "no method 'matrioshka/prefix'; did you mean matryoshka/prefix"),
        ({"methods": ["lora"]}, "no method 'lora'; did you mean lora"),
        ({"methods": [7]}, "no method '7'; did you mean lora-each or"),
        ({"winner": "lora/prefix"}, "winner is 'lora/prefix', which is none of the methods"),
        ({"seeds": []}, r"seeds is \[\]; write different whole numbers"),
        ({"seeds": [3, 3]}, r"seeds is \[3, 3\]; write different"),
        ({"seeds": [0, True]}, r"seeds is \[0, True\]; write different whole numbers"),
        ({"seeds": [-1]}, r"seeds is \[-1\]; write .* from 0 on"),
        ({"seeds": 5}, "seeds is 5; write"),
        ({"learning_rates": [1e-3, 2e-3]}, r"learning_rates is \[0.001, 0.002\]; write a mapping"),
        ({"learning_rates": {"grids": [1, 2]}}, "'grids' in section 'learning_rates'; did you mean 'grid'"),
        ({"learning_rates": {"seed": 1}}, "learning_rates.seed 1 is one of seeds"),
        ({"learning_rates": {"seed": True}}, "learning_rates.seed is True; write a whole number"),
        ({"learning_rates": {"seed": "1"}}, "learning_rates.seed is '1'; write a whole number"),
        *(
            ({"learning_rates": {"grid": grid}}, "learning_rates.grid is .*; write at least two ascending rates")
            for grid in ([1e-3], [2e-3, 1e-3], [1e-3, 1e-3], [0, 1e-3], ["one", 2e-3], [1e-3, math.inf], [True, 2], 1)
        ),
        ({"training": 80}, "training is 80; write a mapping"),
        ({"training": {"learning_rate": 1e-3}}, "training.learning_rate is the study's to set: leave it out"),
        *(
            ({"training": {key: 3}}, f"training.{key} has no place in a study, which counts max_steps")
            for key in ("num_train_epochs", "eval_strategy", "eval_steps", "do_eval")
        ),
        ({"training": {"seed": 1}}, "training.seed is the study's to set"),
        ({"training": {"max_step": 3}}, "'max_step' in section 'training'; did you mean 'max_steps'"),
        ({"training": {"max_steps": "3"}}, "training.max_steps is '3'; write a positive whole number"),
        ({"training": {"max_steps": -1}}, "training.max_steps is -1; write a positive whole number"),
        ({"training": {"gradient_accumulation_steps": 0}}, "training.gradient_accumulation_steps is 0; write a pos"),
        ({"training": {"lr_scheduler_type": "linnear"}}, "refuses a training argument: .*linnear"),
        ({"training": {"weight_decay": "much"}}, "weight_decay is 'much'; expected a number"),
        ({"items": [50]}, r"items is \[50\]; write a mapping"),
        ({"items": {"train": 5}}, "'train' in section 'items'; the keys are validation, test"),
        ({"items": {"test": True}}, "items.test is True; write a positive whole number"),
        ({"items": {"validation": 0}}, "items.validation is 0; write a positive"),
        ({"threads": 0}, "threads is 0; write a positive"),
        ({"rank": 0}, "rank 0 is not positive"),
        ({"rank": True}, "rank True is not an integer"),
        ({"dtype": "float32"}, "dtype is 'float32'; write one of bf16"),
        ({"model": ""}, "model is ''; write a name"),
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


def test_a_missing_file_is_named_when_it_is_read() -> None:
    task = study_of(tasks={"own": FILES}).tasks["own"]
    for split in FILES:
        with pytest.raises(MatryoshkaError, match=f"there is no file nowhere/{split}.jsonl"):
            task.rows(split, None if split == "train" else 3)


def test_a_file_with_too_few_questions_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"prompt": "{n}=", "completion": "{n}"}}\n' for n in range(3)))
    task = study_of(tasks={"own": dict.fromkeys(FILES, str(file))}).tasks["own"]
    assert [(row.prompt, row.completion) for row in task.rows("test", 2)] == [("0=", "0"), ("1=", "1")]
    assert len(task.rows("train", None)) == 3
    with pytest.raises(MatryoshkaError, match=r"a.jsonl has 3 rows, not 4: give more, or lower items.test"):
        task.rows("test", 4)


def test_each_split_has_its_own_questions() -> None:
    built_in = study_of().tasks["sums"]
    as_data = study_of(tasks={"own": dict.fromkeys(FILES, "chain_sum")}).tasks["own"]
    for split in FILES:
        expected = [(one.prompt, one.completion) for one in get_task("chain_sum").examples(split, 5)]
        assert [(r.prompt, r.completion) for r in built_in.rows(split, 5)] == [
            (f"{prompt}\nAnswer:", f" {completion}") for prompt, completion in expected
        ]
        chats = [(r.prompt[0]["content"], r.completion[0]["content"]) for r in as_data.rows(split, 5)]
        assert chats == expected
    assert built_in.rows("train", 5, seed=1) != built_in.rows("train", 5, seed=0)
    assert built_in.rows("test", 5, seed=1) == built_in.rows("test", 5, seed=0)


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


LORA = Unit("lora", "frobenius", "sums", 4)


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
    study = study_of(learning_rates={"grid": grid, "seed": 100})
    runs = finish(study, lambda job, cut: 9 + abs(math.log(job.learning_rate / optimum)))
    assert tried(runs) == pytest.approx(expected, rel=1e-9)
    assert rates(study, runs, LORA).chosen == pytest.approx(optimum)
    assert {job.learning_rate for job in runs if job.split == "test"} == {rates(study, runs, LORA).chosen}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_grid_that_never_ends_is_given_up(sign: int) -> None:
    study = study_of()
    runs = finish(study, lambda job, cut: 90 + sign * math.log(job.learning_rate))
    found = tried(runs)
    assert len(found) == MOST_RATES == 9
    assert found[-3:] == [1e-3, 2e-3, 4e-3] if sign == 1 else found[:3] == [1e-3, 2e-3, 4e-3]
    assert rates(study, runs, LORA).chosen == found[0 if sign == 1 else -1]


def test_where_every_rate_diverges_none_is_chosen() -> None:
    """And no seed is trained for it, and other cuts of the same training do not wait for it."""
    study = study_of(methods=["lora/frobenius", "lora/prefix"])
    runs = finish(study, lambda job, cut: None if cut == "frobenius" else 1 + abs(math.log(job.learning_rate / 2e-3)))
    assert len(tried(runs)) == MOST_RATES
    assert rates(study, runs, LORA).chosen is None
    assert {result.method for result in results(study, runs)} == {"lora/prefix"}
    assert {job.learning_rate for job in runs if job.split == "test"} == {2e-3}


def test_a_job_whose_rate_is_no_longer_the_best_is_left_alone(tmp_path: Path) -> None:
    """As when another process has measured a rate again since the job was planned."""
    study = study_of(model="there/is/no/such/model")
    for job, run in finish(study, lambda job, cut: 1 + abs(math.log(job.learning_rate / 2e-3))).items():
        if job.split == "validation":
            run.write(tmp_path)
    before = sorted(tmp_path.glob("*/*/*.json"))
    assert run_once(study, Job("lora", "sums", 4, 1e-3, 0, "test"), tmp_path)
    assert sorted(tmp_path.glob("*/*/*.json")) == before


def test_a_run_that_diverged_is_infinitely_bad() -> None:
    study = study_of()
    runs = finish(study, lambda job, cut: None if job.learning_rate > 3e-3 else -job.learning_rate)
    assert tried(runs) == [1e-3, 2e-3, 4e-3]
    state = rates(study, runs, LORA)
    assert state.chosen == 2e-3
    assert state.losses[4e-3] == math.inf
    # It is done: nobody trains it again, and it has no curve.
    nothing = finish(study, lambda job, cut: None if job.split == "test" and job.seed == 0 else job.learning_rate)
    assert [result.seed for result in results(study, nothing)] == [1]


def test_each_rank_of_lora_each_has_a_rate_of_its_own() -> None:
    study = study_of(methods=["lora-each", "lora/frobenius"])
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
    study = study_of(methods=["lora-each", "lora/frobenius", "lora/prefix"], seeds=[7])
    best = {"frobenius": 2e-3, "prefix": 4e-3}
    world = lambda job, cut: 9 + abs(math.log(job.learning_rate / best[cut]))  # noqa: E731
    runs = finish(study, world)
    two, four = (Job("lora", "sums", 4, rate, 7, "test") for rate in (2e-3, 4e-3))
    assert needed(study, runs, two) == ["frobenius"]
    assert needed(study, runs, four) == ["prefix"]
    # None before the rates are known, and all of them on validation data.
    assert needed(study, {}, four) == []
    assert needed(study, runs, Job("lora", "sums", 4, 2e-3, 100, "validation")) == ["prefix", "frobenius"]
    # A run that has no more than that is done.
    for job, run in runs.items():
        replace(run, curves={cut: run.curves[cut] for cut in needed(study, runs, job)}).write(tmp_path)
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
        curve = Curve(loss, tuple(1 - x for x in loss))
        cut = {"prefix": {"tokens": 0, "seconds": 0.25}, "learned": {"tokens": 30, "seconds": 2.0}}
        cost = {"tokens": 100 * n, "seconds": 1.0 * n, "parameters": 8 * rank, "cuts": cut}
        runs[job] = replace(runs[job], curves={"prefix": curve, "learned": curve}, cost=cost)
    each, prefix, learned = results(study, runs)
    assert [r.method for r in (each, prefix, learned)] == list(study.methods)
    assert each.ranks == (1, 2, 4)
    assert each.curve == Curve((0.9, 0.7, 0.5), (1 - 0.9, 1 - 0.7, 0.5))
    assert (each.tokens, each.seconds, each.parameters) == (100 + 200 + 300, 1 + 2 + 3 + 3 * 0.25, 8 + 16 + 32)
    assert prefix.curve.loss == learned.curve.loss == (0.8, 0.6, 0.5)
    assert (prefix.tokens, prefix.seconds, prefix.parameters) == (300, 3.25, 32)
    assert (learned.tokens, learned.seconds, learned.parameters) == (330, 5.0, 32)
    for rank in losses:
        fewer = {job: run for job, run in runs.items() if job.rank != rank or job.split != "test"}
        assert "lora-each" not in [r.method for r in results(study, fewer)]


def random_world(number: int, diverging: float = 0.15) -> World:
    """Losses without any order, often equal, so that grids grow at both edges; the same for the same number.

    A run diverges as a whole, or one of its cuts does.
    """

    def world(job: Job, cut: str) -> float | None:
        draw = random.Random(f"{number} {job} {cut}")
        if min(random.Random(f"{number} {job}").random(), draw.random()) < diverging / 2:
            return None
        return draw.randint(10, 16) / 2

    return world


def expected_rates(grid: tuple[float, ...], loss: Callable[[float], float]) -> tuple[list[float], float]:
    """The rule in the words of the study's file: grow at the edge that is best, up to nine rates."""
    rates = list(grid)
    while True:
        best = min(rates, key=loss)
        if len(rates) == 9 or best not in (rates[0], rates[-1]):
            return rates, best
        if best == rates[0]:
            rates.insert(0, float(f"{best * grid[0] / grid[1]:.2e}"))
        else:
            rates.append(float(f"{best * grid[-1] / grid[-2]:.2e}"))


def expected_jobs(study: Study, world: World) -> tuple[set[Job], dict[Job, list[set[Job]]]]:
    """All jobs of a study in a world; and for each test job, the validation jobs of every choice that leads to it."""
    parts = {(m.split("/")[0], m.split("/")[1], study.rank) for m in study.methods if m != "lora-each"}
    if "lora-each" in study.methods:
        parts |= {("lora", "prefix", rank) for rank in (1, 2, 4)}
    validation: set[Job] = set()
    tests: dict[Job, list[set[Job]]] = {}
    for recipe, cut, rank in parts:
        for task in study.tasks:

            def job_at(rate: float, recipe: str = recipe, task: str = task, rank: int = rank) -> Job:
                return Job(recipe, task, rank, rate, 100, "validation")

            def loss(rate: float, job_at: Callable[[float], Job] = job_at, cut: str = cut) -> float:
                found = world(job_at(rate), cut)
                return math.inf if found is None else found

            some, chosen = expected_rates(study.learning_rates, loss)
            choice = {job_at(rate) for rate in some}
            validation |= choice
            for seed in study.seeds:
                tests.setdefault(Job(recipe, task, rank, chosen, seed, "test"), []).append(choice)
    return validation | set(tests), tests


METHODS = ["lora/frobenius", "matryoshka/keep", "lora-each", "lora/prefix", "matryoshka/learned"]


@given(st.integers(0, 10**6))
def test_jobs_finish_in_any_order(number: int) -> None:
    """No test job is due before its rate is known, nothing is asked for twice, and in the end all is there."""
    study = study_of(methods=METHODS, tasks={"a": {"task": "chain_sum"}, "b": {"task": "chain_sum"}})
    world, draw = random_world(number), random.Random(number)
    everything, before = expected_jobs(study, world)
    runs: dict[Job, Run] = {}
    while missing := missing_jobs(study, runs):
        assert len(set(missing)) == len(missing)
        assert not set(missing) & set(runs)
        assert set(missing) <= everything
        for job in missing:
            assert job.split == "validation" or all(choice <= set(runs) for choice in before[job])
        assert [job.task for job in missing] == sorted(job.task for job in missing)
        for job in draw.sample(missing, draw.randint(1, len(missing))):
            runs[job] = run_of(study, job, needed(study, runs, job), world)
    assert set(runs) == everything
    # What a test run measured when it was due is what is asked of it when all is known.
    assert all(run.done() == set(needed(study, runs, job)) for job, run in runs.items())
    assert not any(rates(study, runs, Unit("lora", "prefix", "a", rank)).missing for rank in (1, 2, 4))
    gone = draw.choice(sorted(runs, key=str))
    assert missing_jobs(study, {job: run for job, run in runs.items() if job != gone}) == [gone]


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_test_data_choose_no_learning_rate(number: int, other: int) -> None:
    study = study_of(methods=["lora/frobenius", "lora/prefix"])
    validation, tempting = random_world(number), random_world(other, diverging=0)
    runs = finish(study, validation)
    chosen = {cut: rates(study, runs, Unit("lora", cut, "sums", 4)) for cut in ("frobenius", "prefix")}
    for rate in [*tried(runs), 1e-9, 1.0]:
        for seed in (*study.seeds, study.rate_seed):
            for split in ("test", "validation"):
                if (split, seed) != ("validation", study.rate_seed):  # the only ones that may choose
                    job = Job("lora", "sums", 4, rate, seed, split)
                    runs[job] = run_of(study, job, chosen, lambda job, cut: tempting(job, cut) / 1000)
    for cut, state in chosen.items():
        assert rates(study, runs, Unit("lora", cut, "sums", 4)) == state
        assert state.losses[state.chosen] == min(state.losses.values())
    assert not missing_jobs(study, runs)


@given(st.integers(0, 10**6))
def test_other_methods_change_no_choice(number: int) -> None:
    """The same rates and curves, whether a method is alone or shares its training runs."""
    world = random_world(number)
    study = study_of(methods=METHODS)
    together = finish(study, world)
    for method in METHODS:
        alone = study_of(methods=[method])
        runs = finish(alone, world)
        assert set(runs) <= set(together)
        assert [r for r in results(study, together) if r.method == method] == list(results(alone, runs))


def test_in_which_order_things_are_run() -> None:
    """A study that is stopped early has whole seeds of one task."""
    tasks = {"b": {"task": "chain_sum"}, "a": {"task": "chain_sum"}}
    study = study_of(tasks=tasks, methods=["lora/frobenius", "matryoshka/prefix"], seeds=[5, 3])
    runs: dict[Job, Run] = {}
    order = []
    while missing := missing_jobs(study, runs):
        order.append(missing[0])
        runs[missing[0]] = run_of(study, missing[0], all_cuts(study, missing[0]), lambda job, cut: job.learning_rate)
    assert [job.task for job in order] == ["b"] * (len(order) // 2) + ["a"] * (len(order) // 2)
    first = [(job.split, job.seed) for job in order[: len(order) // 2]]
    assert first == [*[("validation", 100)] * 18, ("test", 3), ("test", 3), ("test", 5), ("test", 5)]


# Files.

texts = st.text(string.ascii_letters + string.digits + "-_äß", min_size=1, max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def any_run(draw: st.DrawFn) -> Run:
    rate = draw(st.floats(1e-9, 1e3))
    job = Job(draw(texts), draw(texts), draw(st.integers(1, 512)), rate, draw(st.integers(0, 2**31)), "test")
    ranks = tuple(sorted(draw(st.sets(st.integers(1, 512), min_size=1, max_size=5))))
    curve = st.lists(numbers, min_size=len(ranks), max_size=len(ranks)).map(tuple)
    curves = draw(st.dictionaries(texts, st.builds(Curve, curve, curve), max_size=3))
    settings, cost = (draw(st.dictionaries(st.text(max_size=5), values, max_size=3)) for _ in range(2))
    diverged = tuple(draw(st.lists(texts, max_size=2)))
    return Run(job, ranks, curves, cost, settings, draw(st.dictionaries(texts, texts, max_size=3)), diverged)


@given(any_run(), st.data())
def test_a_run_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, run: Run, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run")
    run.write(folder)
    (path,) = (path for path in folder.rglob("*") if path.is_file())
    assert path == run.job.path(folder)
    assert path.parts[-3:-1] == (run.job.split, run.job.task)
    assert Run.read(path) == run
    # Cut off anywhere, it is no run.
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 2))])
    with pytest.raises(MatryoshkaError, match=r"is no run of a study .*: delete it to run it again"):
        Run.read(path)


def wrote(folder: Path, study: Study, cuts: Iterable[str] = ("frobenius",), **changes: Any) -> Path:
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
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"format": 1, ', ""),
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


def test_another_format_says_so(tmp_path: Path) -> None:
    path = wrote(tmp_path, study_of())
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(MatryoshkaError, match="format 2, and this version reads 1"):
        load_runs(study_of(), tmp_path)


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


def test_a_run_s_file_holds_no_token_and_no_path_of_the_machine(tmp_path: Path) -> None:
    """And still tells two places of one name apart."""
    write_files(tmp_path / "home_of_alice" / "one")
    write_files(tmp_path / "home_of_alice" / "two")
    token = "hf_" + "Ab" * 17

    def own(place: str, **options: Any) -> Study:
        files = {split: str(tmp_path / "home_of_alice" / place / file) for split, file in FILES.items()}
        training = {"model_init_kwargs": {"cache_dir": "/srv/home_of_alice/cache", **options}, "hub_token": token}
        return study_of(model="/srv/home_of_alice/tiny", tasks={"sums": files}, training=training)

    path = wrote(tmp_path / "runs", own("one", token=token))
    written = path.read_text()
    assert token not in written
    assert "home_of_alice" not in written
    assert "train.jsonl" in written
    assert len(load_runs(own("one", token="hf_" + "xY" * 17), tmp_path / "runs")) == 1
    with pytest.raises(MatryoshkaError, match="was run with another source than"):
        load_runs(own("two"), tmp_path / "runs")
    # An older version wrote whole paths.
    old = json.loads(written)
    source = {split: str(tmp_path / "home_of_alice" / "one" / file) for split, file in FILES.items()}
    path.write_text(json.dumps({**old, "settings": {**old["settings"], "source": source}}))
    assert len(load_runs(own("one"), tmp_path / "runs")) == 1


def test_runs_with_other_rows_or_of_another_recipe_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are the same: what they name has changed."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    own = lambda: study_of(tasks={"sums": FILES}, methods=["lora/learned"])  # noqa: E731
    path = wrote(tmp_path, own(), ["learned"])
    kept = json.loads(path.read_text())
    path.write_text(
        json.dumps({**kept, "settings": {**kept["settings"], "cuts": {"learned": cut_settings("learned")}}})
    )
    assert len(load_runs(own(), tmp_path)) == 1
    with monkeypatch.context() as patch:
        patch.setitem(LEARNED, "learned", (7, 0.5))
        with pytest.raises(MatryoshkaError, match="was run with another cut learned than"):
            load_runs(own(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(RECIPES, "lora", replace(RECIPES["lora"], length=2.0))
        with pytest.raises(MatryoshkaError, match="was run with another recipe than"):
            load_runs(own(), tmp_path)
    (tmp_path / FILES["train"]).write_text('{"prompt": "2=", "completion": "2"}\n')
    with pytest.raises(MatryoshkaError, match="was run with another files than"):
        load_runs(own(), tmp_path)
    (tmp_path / FILES["train"]).unlink()
    with pytest.raises(MatryoshkaError, match=r"tasks.sums.train: cannot read nowhere/train.jsonl \(No such file"):
        load_runs(own(), tmp_path)


def test_what_diverged_is_named() -> None:
    study = study_of(methods=["lora/frobenius", "lora/prefix", "lora-each"])

    def world(job: Job, cut: str) -> float | None:
        bad = job.split == "test" and job.seed == 1 and (cut == "frobenius" or job.rank == 2)
        return None if bad else 9 + abs(math.log(job.learning_rate / 2e-3))

    runs = finish(study, world)
    assert diverged(study, runs) == ["lora/frobenius on sums, seed 1, R = 4", "lora-each on sums, seed 1, R = 2"]
    assert {(r.method, r.seed) for r in results(study, runs)} == {
        *(("lora/frobenius", 0), ("lora/prefix", 0), ("lora/prefix", 1), ("lora-each", 0)),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"title": "Another title"},
        {"seeds": [5, 6, 7]},
        {"winner": "lora/frobenius"},
        {"learning_rates": {"grid": [5e-4, 1e-3]}},
        {"tasks": {"more": {"task": "family_relationships"}, "sums": {"task": "chain_sum"}}},
        {"methods": ["stratified/prefix", "lora-each", "lora/frobenius"]},
    ],
    ids=str,
)
def test_runs_are_kept_when_a_study_grows(tmp_path: Path, changes: dict[str, Any]) -> None:
    wrote(tmp_path, study_of(), ["prefix", "frobenius"])
    assert len(load_runs(study_of(**changes), tmp_path)) == 1


def test_a_method_that_joins_later_hides_no_result() -> None:
    study, more = (study_of(methods=["lora/frobenius", "lora-each", *new]) for new in ([], ["lora/loss"]))
    runs = finish(study, lambda job, cut: 9 + abs(math.log(job.learning_rate / 2e-3)))
    without = {}
    for job, run in runs.items():
        without[job] = replace(run, curves={cut: run.curves[cut] for cut in needed(study, runs, job)})
    assert list(results(more, without)) == list(results(study, runs))
    # First its learning rates, whose runs are there for the others.
    first = missing_jobs(more, without)
    assert {(job.split, job.rank) for job in first} == {("validation", 4)}
    assert len(first) == len(study.learning_rates)


def test_runs_of_other_studies_in_the_folder_do_not_count(tmp_path: Path) -> None:
    wrote(tmp_path, study_of(threads=3))
    for changes in (
        {"tasks": {"other": {"task": "chain_sum"}}},
        {"methods": ["stratified/prefix"]},
        {"rank": 8},
    ):
        assert load_runs(study_of(**changes), tmp_path) == {}


def test_a_run_that_lacks_a_cut_is_due_again(tmp_path: Path) -> None:
    study = study_of(methods=["lora/frobenius", "lora/loss"])
    job = Job("lora", "sums", 4, 1e-3, 100, "validation")
    wrote(tmp_path, study, ["frobenius"])
    assert job in missing_jobs(study, load_runs(study, tmp_path))
    wrote(tmp_path, study, ["frobenius", "prefix", "loss"])
    assert job not in missing_jobs(study, load_runs(study, tmp_path))
    # What diverged would again.
    for cuts, lost in (([], ("frobenius", "loss")), (["frobenius"], ("loss",))):
        wrote(tmp_path, study, cuts, diverged=lost)
        assert set(load_runs(study, tmp_path)[job].curves) == set(cuts)
        assert job not in missing_jobs(study, load_runs(study, tmp_path))


def test_what_is_measured_again_replaces_what_was_there() -> None:
    study, job = study_of(), Job("lora", "sums", 4, 1e-3, 100, "validation")
    before = replace(run_of(study, job, ["prefix", "frobenius"], lambda job, cut: 1.5), diverged=("loss",))
    again = run_of(study, job, ["frobenius", "loss"], lambda job, cut: None if cut == "frobenius" else 2.5)
    again = replace(again, settings={**again.settings, "cuts": {}})
    merged = _with_curves_of(before, again)
    assert list(merged.curves) == list(merged.cost["cuts"]) == ["prefix", "loss"]
    assert merged.curves == {"prefix": before.curves["prefix"], "loss": again.curves["loss"]}
    assert merged.diverged == ("frobenius",)


def test_a_file_with_the_run_of_another_job_is_no_endless_loop(tmp_path: Path) -> None:
    study = study_of()
    path = wrote(tmp_path, study)
    job = Job("lora", "sums", 4, 2e-3, 100, "validation")
    shutil.copy(path, job.path(tmp_path))
    assert missing_jobs(study, load_runs(study, tmp_path))[0] == job
    with pytest.raises(MatryoshkaError, match=r"lr0.002-seed100.json holds the run of another job: delete it"):
        run_once(study, job, tmp_path)


def test_no_test_question_is_asked_before_the_rates_are_chosen(tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="or not before its rates are chosen"):
        run_once(study_of(), Job("lora", "sums", 4, 1e-3, 0, "test"), tmp_path)
    assert not list(tmp_path.glob("test/*/*"))


def test_a_run_that_is_there_is_not_run_again(tmp_path: Path) -> None:
    study = study_of(model="there/is/no/such/model")
    path = wrote(tmp_path, study)
    before = path.stat().st_mtime_ns
    assert run_once(study, Job("lora", "sums", 4, 1e-3, 100, "validation"), tmp_path)
    assert path.stat().st_mtime_ns == before


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
        run = run_of(study, job, ["frobenius"], lambda job, cut: 1.0)
        replace(run, curves={"frobenius": Curve(loss, (0.0,) * 3)}).write(tmp_path)
    state = rates(study, load_runs(study, tmp_path), LORA)
    assert state.losses == {rate: pytest.approx(fmean(loss)) for rate, loss in losses.items()}
    assert state.chosen == 2e-3
    assert json.loads(job.path(tmp_path).read_text())["curves"]["frobenius"]["loss"] == [5.0, 5.0, 0.1]


def test_the_rate_of_one_rank_alone_is_chosen_by_that_rank() -> None:
    """The run at R serves lora/prefix too, whose other ranks say nothing about LoRA trained at R."""
    study = study_of(methods=["lora/prefix", "lora-each"], learning_rates={"grid": [1e-3, 2e-3, 4e-3], "seed": 100})
    curves = {1e-3: (0.9, 0.8, 0.5), 2e-3: (0.7, 0.6, 0.4), 4e-3: (0.5, 0.4, 0.6), 8e-3: (0.9, 0.9, 0.9)}
    runs = {}
    for rate, losses in curves.items():
        job = Job("lora", "sums", 4, rate, 100, "validation")
        runs[job] = Run(job, (1, 2, 4), {"prefix": Curve(losses, losses)}, {}, study.settings("sums", "lora"), {})
    (whole,), alone = units(study, "lora/prefix", "sums"), units(study, "lora-each", "sums")[-1]
    assert rates(study, runs, whole).chosen == 4e-3
    assert rates(study, runs, alone).chosen == 2e-3


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_no_held_out_question_of_these_studies_is_trained_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    for task in study.tasks.values():
        rows = {split: task.rows(split, study.items[split]) for split in ("validation", "test")}
        longest = max((parse_method(method)[0] for method in study.methods), key=study.train_rows)
        seeds = (*study.seeds, study.rate_seed)
        trained = {row.prompt for seed in seeds for row in study.train_set(longest, task.name, seed)}
        assert not trained & {row.prompt for found in rows.values() for row in found}
        assert not {row.prompt for row in rows["validation"]} & {row.prompt for row in rows["test"]}
        assert {split: len(found) for split, found in rows.items()} == study.items


def test_no_gloss_of_wordnet_shares_half_of_its_words_with_one_of_another_split() -> None:
    """Sister terms do, and would give their class away."""
    words = {}
    for split in FILES:
        lines = (ROOT / "configs" / "studies" / "wordnet" / f"{split}.jsonl").read_text().splitlines()
        glosses = [json.loads(line)["prompt"].removeprefix("Definition: ").removesuffix("\nClass:") for line in lines]
        words[split] = [{word for word in re.findall("[a-z]+", gloss.lower()) if len(word) > 3} for gloss in glosses]
    for one, other in combinations(words, 2):
        for mine, theirs in product(words[one], words[other]):
            assert 2 * len(mine & theirs) < min(len(mine), len(theirs))


def test_a_longer_recipe_takes_new_questions_or_the_same_again() -> None:
    study = study_of()
    plain, longer, again = (study.train_set(recipe, "sums", 0) for recipe in ("lora", "lora-longer", "lora-again"))
    assert (len(plain), len(longer)) == (960, 1440)
    assert longer[:960] == plain == again
    assert study.steps("lora-longer") == study.steps("lora-again") == 120
    assert study.train_rows("lora-longer") == study.train_rows("lora-again") == 1440
    odd = study_of(training={"max_steps": 81})
    assert odd.train_set("lora-again", "sums", 0) == odd.train_set("lora", "sums", 0)


def test_files_are_found_at_home_and_their_digests_are_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_files(tmp_path)
    task = study_of(tasks={"sums": {split: f"~/{file}" for split, file in FILES.items()}}).tasks["sums"]
    before = task.digests
    assert len(task.rows("train", None)) == 1
    (tmp_path / FILES["train"]).write_text('{"prompt": "two", "completion": "2"}\n')
    after = task.digests
    assert [split for split in FILES if before[split] != after[split]] == ["train"]


@pytest.mark.parametrize(
    ("methods", "training", "message"),
    [
        (["lora/frobenius", "p-rates/frobenius"], {"weight_decay": 0.1}, "training.weight_decay is 0.1, which p-rates"),
        (["lora/frobenius", "adalora-each"], {"max_steps": 1}, "max_steps is 1, and adalora needs 2"),
        (["lora/frobenius", "sum/prefix"], {"packing": True}, "training.packing is True, which not every method"),
    ],
)
def test_what_one_recipe_refuses_is_said_before_the_first_run(
    methods: list[str], training: dict[str, Any], message: str
) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        study_of(methods=methods, training=training)


def test_wordnet_has_every_class_as_often() -> None:
    for split, count in {"train": 16, "validation": 2, "test": 4}.items():
        lines = (ROOT / "configs" / "studies" / "wordnet" / f"{split}.jsonl").read_text().splitlines()
        classes = Counter(json.loads(line)["completion"] for line in lines)
        assert set(classes.values()) == {count}
        assert len(classes) == 25
