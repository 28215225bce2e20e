"""Running a study: as many jobs at once as there are workers, in processes of this machine or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import check_writable
from research.config import Study
from research.plan import load_runs, missing_jobs
from research.records import Job, Run

Launcher = Literal["local", "ray"]
Submit = Callable[[Study, Job, Path], "Future[bool]"]

_KILLED = (
    "a worker was killed from outside, perhaps since memory was short: try fewer --workers. Finished runs are kept, "
    "and the same command goes on"
)

_POLL = 5.0
"""Seconds between looks at the folder while other processes have all jobs that are left."""


def run_study(
    study: Study,
    folder: Path,
    workers: int = 1,
    launcher: Launcher = "local",
    on_progress: Callable[[int, int, int], object] | None = None,
    seconds: float | None = None,
) -> dict[Job, Run]:
    """Run what is missing of a study. Every finished run is a file; what is there is not run again.

    Several processes may run the same study, or studies that share runs, in one folder: each job is done once.

    Args:
        study: From `research.config.load_study`.
        folder: Of the runs.
        workers: Jobs at once.
        launcher: ``"local"``: processes. ``"ray"``: the cluster that ``ray.init`` finds, which must see the folder.
        on_progress: Called with the numbers of jobs that are done, running and known to be missing.
        seconds: No job is begun after so long; None means that all are.

    Returns:
        The finished runs, by job.

    Raises:
        MatryoshkaError: A job cannot be done. Those that run beside it are finished and kept; no more are begun.
    """
    check_writable(folder)
    end = time.monotonic() + (float("inf") if seconds is None else seconds)
    running: dict[Future[bool], Job] = {}
    elsewhere: dict[Job, float] = {}
    failed: list[str] = []
    cause: BaseException | None = None
    with _pool(launcher, workers, study.threads) as submit:
        while True:
            runs = load_runs(study, folder)
            missing = [job for job in missing_jobs(study, runs) if job not in running.values()]
            now = time.monotonic()
            ready = [job for job in missing if elsewhere.get(job, 0) <= now]
            if on_progress is not None:
                on_progress(len(runs), len(running), len(missing))
            if now < end and not failed:
                for job in ready[: workers - len(running)]:
                    try:
                        running[submit(study, job, folder)] = job
                    except BrokenExecutor:
                        failed.append(_KILLED)
                        break
            if not running and (failed or not missing or now >= end):
                break
            if not running:
                time.sleep(_POLL)
                continue
            for future in wait(running, timeout=_POLL, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenExecutor):
                    failed.append(_KILLED)
                elif error is not None:
                    error = (
                        getattr(error, "cause", None) or error
                    )  # Ray puts its own around it, with a traceback as text
                    # An error that is not ours may say little without its name.
                    kind = "" if isinstance(error, MatryoshkaError) else f"{type(error).__name__}: "
                    failed.append(f"{job.path(folder)}: {kind}{error}")
                    cause = cause or error
                elif not future.result():
                    elsewhere[job] = time.monotonic() + _POLL
    if failed:
        raise MatryoshkaError("\n".join(dict.fromkeys(failed))) from cause
    return runs


def _job(study: Study, job: Job, folder: Path) -> bool:
    import torch  # in the worker, which alone needs it and the model

    from research.run import run_once

    torch.set_flush_denormal(True)  # tiny numbers take a CPU many times as long
    return run_once(study, job, folder)


@contextmanager
def _pool(launcher: Launcher, workers: int, threads: int) -> Iterator[Submit]:
    if launcher == "ray":
        with _ray_pool(workers, threads) as submit:
            yield submit
        return
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read by the workers
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        yield lambda study, job, folder: pool.submit(_job, study, job, folder)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job for ever, with a model in memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _ray_pool(workers: int, threads: int) -> Iterator[Submit]:
    try:
        import ray
    except ImportError as error:
        raise MatryoshkaError("launcher 'ray' needs Ray: pip install ray") from error
    begun = not ray.is_initialized()
    if begun:
        try:
            ray.init(num_cpus=workers * threads, include_dashboard=False, log_to_driver=False)
        except ValueError:  # a cluster is there, and has CPUs of its own
            ray.init(log_to_driver=False)
    remote: Any = ray.remote(num_cpus=threads)(_job)
    try:
        yield lambda study, job, folder: remote.remote(study, job, folder.absolute()).future()
    finally:
        if begun:
            ray.shutdown()
