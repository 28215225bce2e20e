"""Running a study: one training run after the other, each of which is a file as soon as it has ended.

Several processes, of this machine or of others, may run the same study, or studies that share runs, in one folder: each
run is done once.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from matryoshka_lora import MatryoshkaError, NestedAdapter, NotFiniteError
from research.commonsense import Chosen, choose, mean_accuracies
from research.cuts import MAKERS, SAME_AT_ALL_RANKS
from research.measure import measure
from research.plan import cuts, load_runs, measured_ranks, missing_jobs, needed, settled
from research.recipes import CUTS, RECIPES, learning_rows
from research.records import Curve, Job, Run
from research.study import Study
from research.trainers import copies
from research.training import Trained, token_count, train, training

_POLL = 5.0
"""Seconds between looks at the folder while other processes have all jobs that are left."""


def run_study(
    study: Study,
    folder: Path,
    seconds: float | None = None,
    on_run: Callable[[int, int], object] = lambda done, missing: None,
) -> dict[Job, Run]:
    """Run what is missing of a study; what is there is not run again.

    Args:
        study: From `research.study.load_study`.
        folder: Of the runs.
        seconds: No run is begun after so long; None means that all are.
        on_run: Called with the numbers of runs that are there and of those that are known to be missing.

    Returns:
        The finished runs, by job.

    Raises:
        MatryoshkaError: A job cannot be done. Finished runs are kept.
    """
    end = time.monotonic() + (float("inf") if seconds is None else seconds)
    while True:
        runs = load_runs(study, folder)
        missing = missing_jobs(study, runs)
        on_run(len(runs), len(missing))
        if not missing or time.monotonic() >= end:
            return runs
        if not any(run_once(study, job, folder) for job in missing):
            time.sleep(_POLL)


def run_once(study: Study, job: Job, folder: Path) -> bool:
    """Do a job and write its file, unless another process is at it.

    Returns:
        Whether the job is done.

    Raises:
        MatryoshkaError: It cannot be done, or its file cannot be written.
    """
    path = job.path(folder)
    lock = folder / ".locks" / job.path(Path()).as_posix().replace("/", "-")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MatryoshkaError(f"cannot write {lock.parent}: {error.strerror or error}") from error
    try:
        with FileLock(lock, timeout=0):
            runs = load_runs(study, folder)
            wanted = set(needed(study, runs, job))
            if not wanted and (job in runs or settled(study, runs, job)):
                return True  # another process has done it, or measured a rate, since the job was planned
            if not wanted:
                raise MatryoshkaError(f"{path}: the study asks nothing of this run, or not before its rates are chosen")
            before = Run.read(path) if path.exists() else None
            if before is not None:
                if before.job != job:
                    raise MatryoshkaError(f"{path} holds the run of another job: delete it to run it again")
                wanted -= before.done()
                if not wanted:
                    return True
                if before.versions != versions():
                    raise MatryoshkaError(
                        f"{path} lacks {', '.join(sorted(wanted))} and is of other versions than these: delete it, or "
                        "take another folder with --runs"
                    )

            def keep(run: Run) -> None:
                (run if before is None else _joined(before, run)).write(folder)

            keep(run_job(study, job, wanted, on_cut=keep))
            return True
    except Timeout:
        return False


def run_job(
    study: Study,
    job: Job,
    wanted: Collection[str] | None = None,
    on_cut: Callable[[Run], object] = lambda run: None,
) -> Run:
    """Train, then cut and measure on the job's split. A run that diverges has no curves, and each cut diverges alone.

    Args:
        study: Of the job.
        job: What to do.
        wanted: Cuts of the recipe; None means all that the study has.
        on_cut: Called after each cut, which may take long, with the run so far.

    Raises:
        MatryoshkaError: It cannot be done.
    """
    if torch.cuda.device_count() > 1:
        raise MatryoshkaError(
            "the Trainer would give every GPU a batch of its own, and a study counts one: set CUDA_VISIBLE_DEVICES=0"
        )
    torch.set_num_threads(study.threads)
    torch.set_flush_denormal(True)  # tiny numbers take a CPU many times as long
    rows = study.train_set(job.recipe, job.task, job.seed)
    held_out = study.tasks[job.task].held_out(job.split, study.items[job.split], job.seed)
    wanted = cuts(study, job) if wanted is None else wanted
    names = [name for name in CUTS if name in wanted]
    curves: dict[str, Curve] = {}
    cost: dict[str, Any] = {"seconds": 0.0, "parameters": 0, "cuts": {}}

    def run_of(done: Sequence[str]) -> Run:
        settings = study.settings(job.task, job.recipe)
        settings["cuts"] = {name: CUTS[name] for name in curves if CUTS[name] is not None}
        spent = {**cost, "cuts": dict(cost["cuts"])}
        diverged = tuple(name for name in done if name not in curves)
        return Run(job, measured_ranks(study, job), dict(curves), spent, settings, versions(), diverged)

    with training(study, job, rows, held_out) as trainer:
        passes = copies(RECIPES[job.recipe].objective, study.nesting(job.rank))
        cost["tokens"] = passes * token_count(trainer.train_dataset, study.train_rows(job.recipe))
        begin = time.perf_counter()
        with suppress(NotFiniteError):
            trained = train(trainer, study, job)
            cost["seconds"], cost["parameters"] = round(time.perf_counter() - begin, 2), trained.parameters
            for number, name in enumerate(names):
                # A decomposition of what is not finite has an error of its own.
                with suppress(NotFiniteError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                    curves[name], seconds = _cut_and_measure(study, job, name, trained)
                    learned = token_count(trainer.train_dataset, learning_rows(name, study.train_rows(job.recipe)))
                    cost["cuts"][name] = {"tokens": learned, "seconds": round(seconds, 2)}
                on_cut(run_of(names[: number + 1]))
    return run_of(names)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    packages = ("matryoshka-lora", "torch", "transformers", "peft", "trl", "reasoning-gym")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _cut_and_measure(study: Study, job: Job, name: str, trained: Trained) -> tuple[Curve, float]:
    """A cut's curve, and the seconds that the cut took.

    Raises:
        NotFiniteError: The cut or its loss is not finite.
    """
    losses, accuracies, chosen, seconds, begin = [], [], [], 0.0, time.perf_counter()
    folder = study.tasks[job.task].choices
    for adapter, rank in MAKERS[name](trained):
        seconds += time.perf_counter() - begin
        loss, accuracy = measure(adapter, trained.trainer, rank)
        losses.append(loss)
        accuracies.append(accuracy)
        if folder is not None and job.split == "test" and name not in SAME_AT_ALL_RANKS:
            chosen.append(_choose(study, job, folder, trained, adapter, [rank]))
        begin = time.perf_counter()
    if folder is None or job.split != "test":
        return Curve(tuple(losses), tuple(accuracies)), seconds
    if not chosen:
        chosen = [_choose(study, job, folder, trained, adapter, trained.ranks)]
    parts = {
        task: {
            metric: [chosen[0][task][metric][0], *(value for part in chosen for value in part[task][metric][1:])]
            for metric in chosen[0][task]
        }
        for task in chosen[0]
    }
    return Curve(tuple(losses), tuple(mean_accuracies(parts)[1:]), parts), seconds


def _choose(
    study: Study, job: Job, folder: Path, trained: Trained, adapter: NestedAdapter, ranks: Sequence[int]
) -> Chosen:
    earlier = _chosen_earlier(study.model, study.dtype, study.threads, folder)
    chosen = choose(adapter, ranks, folder / job.split, trained.trainer.processing_class, earlier or None)
    earlier.update(chosen)
    return chosen


@cache
def _chosen_earlier(model: str, dtype: str, threads: int, folder: Path) -> Chosen:
    """What was last chosen in this process, which knows the base model's answers."""
    return {}


def _joined(before: Run, run: Run) -> Run:
    """A run with the cuts of an earlier one of the same job and versions."""
    both = [*before.done(), *run.done()]
    curves, costs = {**before.curves, **run.curves}, {**before.cost["cuts"], **run.cost["cuts"]}
    return replace(
        run,
        curves={name: curves[name] for name in CUTS if name in curves},
        cost={**run.cost, "cuts": {name: costs[name] for name in CUTS if name in costs}},
        settings={**run.settings, "cuts": {**before.settings["cuts"], **run.settings["cuts"]}},
        diverged=tuple(name for name in CUTS if name in both and name not in curves),
    )
