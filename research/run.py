"""Run what is missing of a study. Each finished run is appended to a file at once."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from matryoshka_lora import NotFiniteError
from research.commonsense import answer_choices, mean_accuracies
from research.deployments import FUNCTIONS
from research.plan import missing_jobs
from research.runs import Curve, Job, Run, append_line
from research.study import Study
from research.tasks import choices_folder
from research.training import AnswerTrainer, Trained, score, trainer_of

PACKAGES = ("matryoshka-lora", "torch", "transformers", "peft", "trl", "reasoning-gym")


def set_up(threads: int) -> None:
    """Set the number of threads, and compute with denormal numbers as zero, which is faster.

    It holds for the whole process, so only programs call it, and no function that a test calls.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def run_study(
    study: Study,
    runs: Mapping[Job, Run],
    file: Path,
    max_seconds: float = float("inf"),
    on_run: Callable[[int, int], object] | None = None,
) -> dict[Job, Run]:
    """Run what is missing of a study.

    Args:
        study: The study.
        runs: The finished runs.
        file: New runs are appended to it.
        max_seconds: No run begins later than this.
        on_run: Called before each run with the number of finished runs, and of those that are known
            to be missing.

    Returns:
        All runs, by job.

    Raises:
        MatryoshkaError: A job cannot be run. Finished runs are kept.
    """
    all_runs = dict(runs)
    end = time.monotonic() + max_seconds
    while missing := missing_jobs(study, all_runs):
        if on_run is not None:
            on_run(len(all_runs), len(missing))
        if time.monotonic() >= end:
            break
        job, deployments = next(iter(missing.items()))
        run = run_job(study, job, deployments)
        append_line(file, run.to_line())
        all_runs[job] = all_runs[job].merge(run) if job in all_runs else run
    return all_runs


def run_job(study: Study, job: Job, deployments: Collection[str]) -> Run:
    """Train, deploy and measure. A deployment without a finite loss has no curve."""
    names = [name for name in FUNCTIONS if name in deployments]
    package_versions = versions()  # an error if a package is missing, before the training
    curves: dict[str, Curve] = {}
    deployment_costs: dict[str, dict[str, Any]] = {}
    cost: dict[str, Any] = {"tokens": 0, "seconds": 0.0, "parameters": 0, "cuts": deployment_costs}
    with trainer_of(study, job) as (adapter, trainer, measured), suppress(NotFiniteError):
        start = time.perf_counter()
        tokens_before = AnswerTrainer.num_tokens
        trainer.train()
        cost["tokens"] = AnswerTrainer.num_tokens - tokens_before
        trained = Trained(study, job, adapter.factors.copy(), trainer, measured)
        cost["seconds"] = round(time.perf_counter() - start, 2)
        cost["parameters"] = trained.num_parameters
        for name in names:
            # The decomposition of what is not finite raises LinAlgError.
            with suppress(NotFiniteError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                tokens_before = AnswerTrainer.num_tokens
                curves[name], seconds = _measure(study, job, name, trained, curves)
                deployment_costs[name] = {
                    "tokens": AnswerTrainer.num_tokens - tokens_before,
                    "seconds": round(seconds, 2),
                    **trained.details.get(name, {}),
                }
    diverged = tuple(name for name in names if name not in curves)
    settings = study.settings(job.task, job.recipe)
    return Run(
        job, study.nested_ranks(job.rank), curves, cost, settings, package_versions, diverged
    )


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _measure(
    study: Study, job: Job, deployment: str, trained: Trained, curves: Mapping[str, Curve]
) -> tuple[Curve, float]:
    """Return the curve of a deployment, and the seconds that the deployment took."""
    losses: list[float] = []
    accuracies: list[float] = []
    seconds = 0.0
    start = time.perf_counter()
    for adapter, rank in FUNCTIONS[deployment](trained):
        seconds += time.perf_counter() - start
        adapter.set_rank(rank)
        loss, accuracy = score(adapter.model, trained.trainer, trained.measured)
        if loss != loss:
            raise NotFiniteError(f"The loss at rank {rank} is not finite.")
        losses.append(loss)
        accuracies.append(accuracy)
        start = time.perf_counter()
    folder = choices_folder(study, job.task)
    if folder is None or job.split != "test":
        return Curve(tuple(losses), tuple(accuracies)), seconds
    for curve in curves.values():
        if curve.loss == tuple(losses):  # the adapter is the same, and questions take long
            return curve, seconds
    shares = answer_choices(
        adapter,
        trained.ranks,
        folder / "test",
        tokenizer=trained.trainer.processing_class,
        limit=study.tasks[job.task].get("limit"),
    )
    return Curve(tuple(losses), tuple(mean_accuracies(shares)[1:]), shares), seconds
