"""Run what is missing of a study. Each finished run is appended to a file at once."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from matryoshka_lora import NotFiniteError
from research.commonsense import choose, mean_accuracies
from research.cuts import MAKERS, SAME_AT_ALL_RANKS
from research.plan import missing_jobs
from research.runs import Curve, Job, Run, append
from research.study import Study, may_be_run
from research.tasks import choices
from research.training import AnswerTrainer, Trained, score, trainer_of

PACKAGES = ("matryoshka-lora", "torch", "transformers", "peft", "trl", "reasoning-gym")


def set_up(threads: int) -> None:
    """Compute with so many threads, and with tiny numbers as zero: they take a CPU far longer.

    It holds for the whole process, so only a program calls it, and no function that a test calls.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def run_study(
    study: Study,
    runs: Mapping[Job, Run],
    file: Path,
    seconds: float = float("inf"),
    on_run: Callable[[int, int], object] = lambda done, missing: None,
) -> dict[Job, Run]:
    """Run what is missing of a study.

    Args:
        study: The study.
        runs: What is there already.
        file: Finished runs are appended to it.
        seconds: No run begins after so long.
        on_run: Called with the numbers of runs that are there, and of those that are known to be
            missing.

    Returns:
        All runs, by job.

    Raises:
        MatryoshkaError: The study is settled, or a job cannot be done. Finished runs are kept.
    """
    may_be_run(study)
    found, end = dict(runs), time.monotonic() + seconds
    while missing := missing_jobs(study, found):
        on_run(len(found), len(missing))
        if time.monotonic() >= end:
            break
        job, cuts = next(iter(missing.items()))
        run = run_job(study, job, cuts)
        append(file, run)
        found[job] = found[job].joined(run) if job in found else run
    return found


def run_job(study: Study, job: Job, cuts: Collection[str]) -> Run:
    """Train, deploy by each cut, and measure; a cut without a finite number has no curve."""
    curves: dict[str, Curve] = {}
    cost: dict[str, Any] = {"tokens": 0, "seconds": 0.0, "parameters": 0, "cuts": {}}
    with trainer_of(study, job) as (adapter, trainer, measured), suppress(NotFiniteError):
        begin, tokens = time.perf_counter(), AnswerTrainer.tokens
        trainer.train()
        cost["tokens"] = AnswerTrainer.tokens - tokens
        trained = Trained(study, job, adapter.factors(), trainer, measured)
        cost["seconds"] = round(time.perf_counter() - begin, 2)
        cost["parameters"] = trained.parameters
        for cut in (name for name in MAKERS if name in cuts):
            # A decomposition of what is not finite has an error of its own.
            with suppress(NotFiniteError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                tokens = AnswerTrainer.tokens
                curves[cut], seconds = _measured(study, job, cut, trained, curves)
                learned = AnswerTrainer.tokens - tokens
                cost["cuts"][cut] = {"tokens": learned, "seconds": round(seconds, 2)}
    lost = tuple(cut for cut in MAKERS if cut in cuts and cut not in curves)
    settings = study.settings(job.task, job.recipe)
    return Run(job, study.measured(job), curves, cost, settings, versions(), lost)


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _measured(
    study: Study, job: Job, cut: str, trained: Trained, others: Mapping[str, Curve]
) -> tuple[Curve, float]:
    """Return a cut's curve, and the seconds that the cut took."""
    losses, accuracies, chosen, seconds = [], [], [], 0.0
    folder, limit = choices(study, job.task), study.tasks[job.task].get("limit")
    ask = None
    if folder is not None and job.split == "test":
        tokenizer = trained.trainer.processing_class
        ask = partial(choose, folder=folder / "test", tokenizer=tokenizer, limit=limit)
    begin = time.perf_counter()
    for adapter, rank in MAKERS[cut](trained):
        seconds += time.perf_counter() - begin
        adapter.set_rank(rank)
        loss, accuracy = score(adapter.model, trained.trainer, trained.measured)
        if loss != loss:
            raise NotFiniteError(f"the loss at rank {rank} is not finite")
        losses.append(loss)
        accuracies.append(accuracy)
        if ask is not None and cut not in SAME_AT_ALL_RANKS:
            chosen.append(ask(adapter, [rank]))
        begin = time.perf_counter()
    if ask is None:
        return Curve(tuple(losses), tuple(accuracies)), seconds
    for other in others.values():
        if other.loss == tuple(losses):  # the adapter is the same, and questions take long
            return other, seconds
    if not chosen:
        chosen = [ask(adapter, list(trained.ranks))]
    parts = {
        task: {
            metric: [base, *(share for part in chosen for share in part[task][metric][1:])]
            for metric, (base, *_) in metrics.items()
        }
        for task, metrics in chosen[0].items()
    }
    return Curve(tuple(losses), tuple(mean_accuracies(parts)[1:]), parts), seconds
