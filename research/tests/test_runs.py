"""Runs of a study that are really trained: what they measure, and studies that are killed, shared and spread."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from peft import PeftModel
from tiny_chat import save_tiny_chat, tiny_tokenizer
from transformers import AutoModelForCausalLM

from matryoshka_lora import MatryoshkaError, NestedAdapter
from matryoshka_lora.cli.main import main
from matryoshka_lora.data.questions import Row, tokenize
from matryoshka_lora.models import load_tokenizer
from research.config import Study, make_study
from research.cuts import CUTS, Trained
from research.measure import measure
from research.plan import load_runs, missing_jobs, results
from research.records import Curve, Job, Run
from research.run import run_job, run_once
from research.work import run_study
from matryoshka_lora.training import train

NAMES = ("prefix", "keep", "frobenius", "activations", "loss", "para", "budget", "gains", "learned", "distilled")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("model"))


def settings_of(model: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "model": str(model),
        "dtype": "fp32",
        "rank": 4,
        "tasks": {"sums": {"task": "chain_sum"}},
        "methods": ["lora/frobenius", "matryoshka/prefix"],
        "seeds": [0],
        "learning_rates": {"grid": [1e-3, 1e-2, 1e-1], "seed": 100},
        "training": {"max_steps": 3, "per_device_train_batch_size": 2, "disable_tqdm": True},
        "items": {"validation": 4, "test": 4},
    }
    return {**settings, **changes}


def study_of(model: Path, *methods: str, **changes: Any) -> Study:
    return make_study(settings_of(model, **({"methods": list(methods)} if methods else {}), **changes))


def job_of(recipe: str = "lora", rate: float = 3e-2, **changes: Any) -> Job:
    plain = {"recipe": recipe, "task": "sums", "rank": 4, "learning_rate": rate, "seed": 3, "split": "test"}
    return Job(**{**plain, **changes})


def written(model: Path, folder: Path, **changes: Any) -> Path:
    """The study as a YAML file."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(settings_of(model, **changes), sort_keys=False))
    return path


def nowhere(folder: Path) -> dict[str, str]:
    """A task whose files are missing."""
    return {split: str(folder / "nowhere" / f"{split}.jsonl") for split in ("train", "validation", "test")}


def write_rows(file: Path, rows: list[tuple[str, str]]) -> str:
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return str(file)


@pytest.fixture(scope="module")
def all_cuts(model: Path) -> dict[str, Run]:
    """One run of each of two recipes, with every cut that it has."""
    found = {}
    for recipe, cuts in {"lora": [cut for cut in NAMES if cut != "keep"], "matryoshka": NAMES}.items():
        found[recipe] = run_job(study_of(model, *(f"{recipe}/{cut}" for cut in cuts)), job_of(recipe))
        assert list(found[recipe].curves) == list(cuts)
    return found


def test_no_cut_of_lora_changes_its_full_rank(all_cuts: dict[str, Run]) -> None:
    curves = all_cuts["lora"].curves
    assert all_cuts["lora"].ranks == (1, 2, 4)
    for cut, curve in curves.items():
        assert curve.loss[-1] == pytest.approx(curves["prefix"].loss[-1], abs=1e-4), cut
    # At rank 1 they are different adapters.
    assert len({curve.loss[0] for curve in curves.values()}) == len(curves)
    assert curves["frobenius"].loss[0] < curves["prefix"].loss[0]


def test_cuts_of_p_keep_what_was_trained(all_cuts: dict[str, Run]) -> None:
    curves = all_cuts["matryoshka"].curves
    for cut in NAMES[1:]:
        assert curves[cut].loss[-1] == pytest.approx(curves["keep"].loss[-1], abs=1e-4), cut
    # Which is not what the paper deploys: P is 3, 2, 1, 1 there, and all ones here.
    assert abs(curves["keep"].loss[-1] - curves["prefix"].loss[-1]) > 3e-4


def test_a_run_depends_on_its_job_alone(model: Path, all_cuts: dict[str, Run]) -> None:
    """In another order, beside other runs, with fewer cuts: the same numbers to the last digit."""
    for recipe, cut in (("matryoshka", "learned"), ("lora", "loss"), ("matryoshka", "frobenius"), ("lora", "prefix")):
        (alone,) = run_job(study_of(model, f"{recipe}/{cut}"), job_of(recipe)).curves.values()
        assert alone == all_cuts[recipe].curves[cut], (recipe, cut)
    other = run_job(study_of(model, "lora/prefix"), job_of(seed=1)).curves["prefix"]
    assert other != all_cuts["lora"].curves["prefix"]


def test_what_a_run_costs(model: Path, all_cuts: dict[str, Run]) -> None:
    study, run = study_of(model), all_cuts["lora"]
    rows = study.tasks["sums"].rows("train", 6, seed=3)  # 3 steps of 2
    tokens = sum(len(row.prompt) + len(row.completion) + 1 for row in rows)  # one a character, and the end
    assert run.cost["tokens"] == tokens
    assert {cut: cost["tokens"] for cut, cost in run.cost["cuts"].items()} == {
        **dict.fromkeys(("prefix", "frobenius", "activations", "loss", "para", "budget", "gains"), 0),
        **dict.fromkeys(("learned", "distilled"), round(tokens / 6 * 40 * 2)),  # 40 batches of 2
    }
    layer = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    assert run.cost["parameters"] == 2 * sum(4 * (inside + outside) for inside, outside in layer)
    assert run.cost["seconds"] > 0


@pytest.mark.parametrize("cut", ["para", "budget"])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_singular_values_of_all_layers_compete_within_a_budget(
    model: Path, tmp_path: Path, share: float, cut: str
) -> None:
    """For `para` by their size, for `budget` by their square per parameter."""
    study = study_of(model)
    adapter = train(study.train_config("lora", 4, 3e-2, 0, "chain_sum", str(tmp_path / "run")))
    for parameter in adapter.model.parameters():
        parameter.requires_grad_(False)
    products = {name: B @ A for name, (A, B) in factors_of(adapter).items()}
    trained = Trained(adapter, load_tokenizer(str(model)), [], 2, 0)
    (trained.keep_above_threshold if cut == "para" else trained.keep_budget)(share)
    kept, dropped, used, whole = [], [], 0, 0
    for name, (A, B) in factors_of(adapter).items():
        U, values, V = torch.linalg.svd(products[name], full_matrices=False)
        width = A.shape[1] + B.shape[0]
        rank = int(B.any(dim=0).sum())
        torch.testing.assert_close(B @ A, (U[:, :rank] * values[:rank]) @ V[:rank], atol=1e-5, rtol=1e-3)
        worth = (values[:4].double() ** 2 / (1 if cut == "para" else width)).tolist()
        kept += worth[:rank]
        dropped += worth[rank:]
        used, whole = used + rank * width, whole + 4 * width
    assert used <= share * whole
    assert used > share * whole - 160  # the widest direction
    if share < 1:
        # In a budget, a wide direction that no longer fits may give way to a smaller one; a threshold is one for all.
        assert sum(worth > min(kept) for worth in dropped) <= (0 if cut == "para" else 2)


def factors_of(adapter: NestedAdapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        name: (module.lora_A[adapter.name].weight.detach(), module.lora_B[adapter.name].weight.detach())
        for name, module, _ in adapter._layers()
    }


def test_a_distilled_order_is_nearer_to_full_rank_and_gains_to_the_training_rows(model: Path, tmp_path: Path) -> None:
    steps = {"max_steps": 60, "per_device_train_batch_size": 4, "disable_tqdm": True}
    study = study_of(model, training=steps)
    adapter = train(study.train_config("lora", 4, 1e-2, 0, "chain_sum", str(tmp_path / "run")))
    rows = study.tasks["sums"].rows("train", 48)
    trained = Trained(adapter, load_tokenizer(str(model)), rows, 4, 0)
    for _, module, _ in adapter._layers():
        for factor in (module.lora_A["default"].weight, module.lora_B["default"].weight):
            factor.requires_grad_()
    questions = [tokenize(trained.tokenizer, row) for row in rows]

    def logprobs(rank: int) -> torch.Tensor:
        """At the tokens of the answers."""
        adapter.model.eval()
        with torch.no_grad(), adapter.rows([rank]):
            found = [
                adapter.model(torch.tensor([[*q.context, *q.completion]])).logits[0, len(q.context) - 1 : -1]
                for q in questions
            ]
        return torch.cat(found).log_softmax(-1)

    def distance(rank: int) -> float:
        return float(torch.nn.functional.kl_div(logprobs(rank), full, reduction="sum", log_target=True))

    CUTS["frobenius"](trained)
    full = logprobs(4)
    before, losses = distance(1) + distance(2), measure(adapter, trained.tokenizer, rows, (1, 2, 4)).loss
    CUTS["distilled"](trained)
    torch.testing.assert_close(logprobs(4), full, atol=1e-3, rtol=1e-3)
    assert distance(1) + distance(2) < 0.7 * before
    gained = []
    for make in CUTS["gains"](trained) or ():
        make()
        gained.append(trained.loss())
    assert gained[-1] == pytest.approx(losses[-1], abs=1e-4)
    assert all(new <= old + 1e-6 for new, old in zip(gained, losses, strict=True))
    assert gained[0] < losses[0]


def test_a_longer_run_takes_more_rows(model: Path) -> None:
    study = study_of(model, "lora-longer/prefix", training={"max_steps": 4, "per_device_train_batch_size": 2})
    assert study.steps("lora-longer") == 6
    longer, plain = (run_job(study, job_of(recipe)).cost["tokens"] for recipe in ("lora-longer", "lora"))
    assert longer / plain == pytest.approx(1.5, rel=0.1)


ANSWERS = ["7", "7", "12", "7", "7"]


def test_loss_and_accuracy_are_those_of_plain_peft(model: Path, tmp_path: Path) -> None:
    """Each rank, exported, in transformers: teacher-forced, every token of an answer the likeliest."""
    file = write_rows(tmp_path / "train.jsonl", [(f"{n}+", "7") for n in range(10, 40)])
    held_out = [(f"{'9' * (n + 1)}-", answer) for n, answer in enumerate(ANSWERS)]
    own = {"train": file, "validation": file, "test": write_rows(tmp_path / "test.jsonl", held_out)}
    steps = {"max_steps": 120, "per_device_train_batch_size": 4, "disable_tqdm": True}
    study = study_of(model, "lora/prefix", tasks={"own": own}, training=steps, items={"test": len(held_out)})
    adapter = train(study.train_config("lora", 4, 1e-2, 0, file, str(tmp_path / "run")))
    rows = [Row(*pair) for pair in held_out]
    found = measure(adapter, load_tokenizer(str(model)), rows, (1, 2, 4))
    assert found == run_job(study, job_of(task="own", rate=1e-2, seed=0)).curves["prefix"]

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
        (1e30, 3, ("frobenius", "loss")),  # training itself finds it
        (1e8, 1, ("loss",)),  # the factors are finite, and the gradients at the layers' outputs are not
    ],
)
def test_what_diverges_is_done_and_each_cut_does_alone(
    model: Path, tmp_path: Path, rate: float, steps: int, diverged: tuple[str, ...]
) -> None:
    training = {"max_steps": steps, "per_device_train_batch_size": 2, "max_grad_norm": 0.0, "disable_tqdm": True}
    study = study_of(model, "lora/frobenius", "lora/loss", training=training)
    job = job_of(rate=rate, split="validation")
    assert run_once(study, job, tmp_path)
    run = load_runs(study, tmp_path)[job]
    assert run.diverged == diverged
    assert run.curves == run_job(study_of(model, "lora/frobenius", training=training), job).curves
    assert job not in missing_jobs(study, {job: run})


def test_studies_that_share_a_folder_keep_each_others_cuts(model: Path, tmp_path: Path) -> None:
    one, other = study_of(model, "lora/prefix"), study_of(model, "lora/frobenius")
    job = job_of(split="validation")
    for study, cut in ((one, "prefix"), (other, "frobenius")):
        found = load_runs(study, tmp_path).get(job)
        assert set(found.curves if found else ()) == ({"prefix"} - {cut})
        assert run_once(study, job, tmp_path)
    before = job.path(tmp_path).stat().st_mtime_ns
    for study in (one, other):
        assert set(load_runs(study, tmp_path)[job].curves) == {"prefix", "frobenius"}
        assert run_once(study, job, tmp_path)
    assert job.path(tmp_path).stat().st_mtime_ns == before
    # A curve that is there is kept, unless other versions have measured it.
    run = Run.read(job.path(tmp_path))
    kept = replace(run, curves={**run.curves, "prefix": Curve((9.0,) * 3, (0.0,) * 3)})
    fewer = replace(kept, versions={"torch": run.versions["torch"]})  # as of a program that named fewer packages
    for changed, prefix in ((kept, kept), (fewer, kept), (replace(kept, versions={"torch": "0.1"}), run)):
        changed.write(tmp_path)
        assert run_once(study_of(model, "lora/loss"), job, tmp_path)
        now = Run.read(job.path(tmp_path))
        assert now.curves["prefix"] == prefix.curves["prefix"]
        assert now.curves["frobenius"] == run.curves["frobenius"]
        assert list(now.curves) == list(now.cost["cuts"]) == ["prefix", "frobenius", "loss"]


# Whole studies. A job takes a second, a process ten until it has imported everything.


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


@pytest.fixture(scope="module")
def study(model: Path) -> Study:
    return study_of(model)


@pytest.fixture(scope="module")
def alone(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that one process has run from beginning to end, one job after the other."""
    folder = tmp_path_factory.mktemp("alone")
    while missing := missing_jobs(study, load_runs(study, folder)):
        assert run_once(study, missing[0], folder)
    return folder


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*/*/*.json")}


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_killed_and_finished_by_two_at_once(model: Path, study: Study, alone: Path, tmp_path: Path) -> None:
    config, folder = written(model, tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "matryoshka_lora", "compare", str(config), "--out", str(folder)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: files(folder))
        workers = psutil.Process(killed.pid).children(recursive=True)
        killed.kill()
        killed.wait()
        # Nobody has told the worker, which has a job at hand.
        wait_for(lambda: not any(map(is_alive, workers)), 20)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(killed.pid, signal.SIGKILL)
    before = files(folder)
    assert 1 <= len(before) < len(numbers(alone))

    progress: list[tuple[int, int, int]] = []
    watched = {"on_progress": lambda *now: progress.append(now)}
    other = threading.Thread(target=run_study, args=(study, folder), kwargs=watched)
    other.start()
    wait_for(lambda: len(files(folder)) > len(before))
    while missing := missing_jobs(study, load_runs(study, folder)):
        if not any(run_once(study, job, folder) for job in missing):
            time.sleep(0.05)
    other.join()
    assert numbers(folder) == numbers(alone)
    assert progress[0][0] == len(before)
    assert progress[-1] == (len(numbers(alone)), 0, 0)
    after = files(folder)
    assert {path: after[path] for path in before} == before
    assert not [path for path in folder.rglob("*") if "writing" in path.name]


CLUSTER = """
import ray
found = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
print(found.address_info["address"], flush=True)
input()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray cluster that another process has started; its address."""
    pytest.importorskip("ray")
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token below the home folder
        process = subprocess.Popen([sys.executable, "-c", CLUSTER], text=True, **streams)
        try:
            yield process.stdout.readline().strip()
        finally:
            process.communicate("\n", timeout=60)


@pytest.mark.slow
def test_two_workers_of_ray(model: Path, study: Study, alone: Path, cluster: str, tmp_path: Path) -> None:
    import ray

    running, own = [], nowhere(tmp_path)
    ray.init(address=cluster, log_to_driver=False)
    try:
        run_study(study, tmp_path, workers=2, launcher="ray", on_progress=lambda *now: running.append(now[1]))
        assert numbers(tmp_path) == numbers(alone)
        assert max(running) == 2
        with pytest.raises(MatryoshkaError) as caught:
            run_study(study_of(model, tasks={"own": own}), tmp_path, launcher="ray")
        path = job_of(task="own", rate=1e-3, seed=100, split="validation").path(tmp_path)
        reason = f"there is no file {own['train']}; write its path from here, or the whole path"
        assert str(caught.value) == f"{path}: {reason}"  # without Ray's traceback
        assert ray.is_initialized()
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_ray_with_and_without_a_cluster(
    study: Study, alone: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    for address in (cluster, ""):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert len(run_study(study, alone, workers=2, launcher="ray")) == len(numbers(alone))
        assert not ray.is_initialized()


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``matryoshka compare`` in this process: exit status, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["matryoshka", "compare", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return command


@pytest.mark.slow
def test_a_job_that_fails_leaves_the_others_done(model: Path, alone: Path, tmp_path: Path, compare: Command) -> None:
    tasks = {"sums": {"task": "chain_sum"}, "own": nowhere(tmp_path)}
    config = written(model, tmp_path, tasks=tasks, methods=["lora/frobenius"])
    others = {path: run for path, run in numbers(alone).items() if "lora" in path}
    code, out, err = compare(config, "--out", tmp_path / "out")
    assert code == 1
    assert err.startswith(f"error: {tmp_path}/out/validation/own/lora-r4-lr0.001-seed100.json: there is no file ")
    assert f"{tmp_path}/nowhere/train.jsonl; write its path" in err
    assert "Traceback" not in err + out
    assert numbers(tmp_path / "out") == others

    # What is there can be reported, and the last line says what is next.
    code, out, _ = compare(config, "--out", tmp_path / "out", "--report")
    assert code == 0
    assert (tmp_path / "out" / "study.md").read_text().count("lora/frobenius") > 1
    assert out.splitlines()[-2:] == [
        f"The report is in {tmp_path / 'out'}: study.md, study.html, study.png",
        f"{len(others)} runs are there, 3 or more are missing. Next: the same command without --report",
    ]


def test_the_report_of_a_study_that_is_done(
    model: Path, study: Study, alone: Path, tmp_path: Path, compare: Command
) -> None:
    before = files(alone)
    code, out, _ = compare(written(model, tmp_path), "--out", alone, "--report")
    assert code == 0
    assert out.splitlines()[-1] == f"The report is in {alone}: study.md, study.html, study.png"
    assert files(alone) == before
    report = (alone / "study.md").read_text()
    for result in results(study, load_runs(study, alone)):
        assert result.method in report
        assert f"{result.curve.loss[0]:.3f}" in report
    for name in ("study.html", "study.png"):
        assert (alone / name).stat().st_size > 1000
    # The model is named, and no folder of this machine.
    assert f" {model.name}, fp32" in report
    for file in (file for file in alone.rglob("*") if file.is_file()):
        assert str(model.parent).encode() not in file.read_bytes(), file


def test_there_is_nothing_to_report(model: Path, tmp_path: Path, compare: Command) -> None:
    code, out, err = compare(written(model, tmp_path), "--out", tmp_path / "out", "--report")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "No method has a test run yet: there is nothing to report.",
        "0 runs are there, 6 or more are missing. Next: the same command without --report",
    ]
    assert not (tmp_path / "out").exists()


def test_no_run_is_begun_after_the_time(model: Path, tmp_path: Path, compare: Command) -> None:
    code, out, _ = compare(written(model, tmp_path), "--out", tmp_path / "out", "--minutes", 0)
    assert code == 0
    assert out.splitlines()[-1] == "0 runs are there, 6 or more are missing. Next: the same command again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [lora/frobenius\n", "cannot read the config"),
        ("- a\n", "holds no keys"),
        ("tasks: {sums: {task: chain_sum}}\nmethods: [lora/keep]\n", "recipe 'lora' has no cut 'keep'"),
    ],
)
def test_a_wrong_file_is_an_error_without_traceback(tmp_path: Path, compare: Command, text: str, message: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    code, out, err = compare(tmp_path / "wrong.yaml", "--out", tmp_path / "out")
    assert code == 1
    assert err.startswith("error: ")
    assert f"{tmp_path / 'wrong.yaml'}" in err
    assert message in err
    assert "Traceback" not in err + out
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path, compare: Command) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = compare(written(model, tmp_path), "--out", tmp_path / "file" / "out")
    assert code == 1
    assert err.startswith(f"error: cannot write {tmp_path / 'file' / 'out'}")
