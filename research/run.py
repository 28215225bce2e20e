"""One training run of a study, and what it is worth at every rank in every cut."""

from __future__ import annotations

import json
import math
import tempfile
import time
import warnings
from collections.abc import Collection, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.adapter.factors import get_factors, get_parameters
from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.evaluation.curve import versions
from matryoshka_lora.data.questions import Row, tokenize
from matryoshka_lora.files import write_text
from research.adalora import train_adalora
from research.config import Study
from research.cuts import CUTS, Trained
from research.measure import measure
from research.objectives import TRAINERS, check_objective, copies
from research.plan import cuts, load_runs, measured_ranks, needed, settled
from research.recipes import LEARNED, RECIPES, cut_settings
from research.records import Curve, Job, Run
from matryoshka_lora.training import train
from matryoshka_lora.training.run import load_tokenizer_of
from matryoshka_lora.training.trainer import CompletionTrainer


def run_once(study: Study, job: Job, folder: Path) -> bool:
    """Do a job and write its file, unless another process, of this study or of another one, is at it.

    Returns:
        Whether the job was done here.

    Raises:
        MatryoshkaError: It cannot be done, or its file cannot be written.
    """
    lock = folder / ".locks" / job.path(Path()).as_posix().replace("/", "-")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            path, runs = job.path(folder), load_runs(study, folder)
            wanted = set(needed(study, runs, job))
            if not wanted and settled(study, runs, job):
                return True  # another process has measured a rate again since the job was planned
            if not wanted:
                raise MatryoshkaError(f"{path}: the study asks nothing of this run, or not before its rates are chosen")
            before = Run.read(path) if path.exists() else None
            if before is not None:
                if before.job != job:
                    raise MatryoshkaError(f"{path} holds the run of another job: delete it to run it again")
                if wanted <= before.done():
                    return True
                # Another study may need the others; what other versions have measured is measured again.
                same = before.versions.items() <= versions().items()  # an older run names fewer packages
                wanted = wanted - before.done() if same else wanted | before.done()
            _with_curves_of(before, run_job(study, job, wanted)).write(folder)
            return True
    except Timeout:
        return False


def _with_curves_of(before: Run | None, run: Run) -> Run:
    """A run with the cuts of one of the same job that it has not measured itself."""
    if before is None:
        return run
    curves = {**before.curves, **run.curves}
    names = [name for name in CUTS if name in curves and name not in run.diverged]
    costs = {**before.cost["cuts"], **run.cost["cuts"]}
    hows = {**before.settings.get("cuts", {}), **run.settings["cuts"]}
    return replace(
        run,
        curves={name: curves[name] for name in names},
        cost={**run.cost, "cuts": {name: costs[name] for name in names}},
        settings={**run.settings, "cuts": {name: hows[name] for name in names if name in hows}},
        diverged=tuple(name for name in CUTS if name in {*before.diverged, *run.diverged} and name not in names),
    )


def run_job(study: Study, job: Job, wanted: Collection[str] | None = None) -> Run:
    """Train, then cut and measure on the job's split. A run that diverges has no curves, and each cut diverges alone.

    Args:
        study: Of the job.
        job: What to do.
        wanted: Cuts of the recipe; None means all that the study has.

    Raises:
        MatryoshkaError: It cannot be done.
    """
    if torch.cuda.device_count() > 1:
        raise MatryoshkaError(
            "the Trainer would give every GPU a batch of its own, and a study counts one: set CUDA_VISIBLE_DEVICES=0"
        )
    torch.set_num_threads(study.threads)
    # The data are of no importance here.
    config = study.train_config(job.recipe, job.rank, job.learning_rate, job.seed, "chain_sum", "unused")
    tokenizer, rows = load_tokenizer_of(config), study.train_set(job.recipe, job.task, job.seed)
    held_out = study.tasks[job.task].rows(job.split, study.items[job.split])
    used, steps = study.train_rows(job.recipe), study.steps(job.recipe)
    passes = copies(RECIPES[job.recipe].objective, study.nesting(job.rank))
    curves: dict[str, Curve] = {}
    cost: dict[str, Any] = {"tokens": passes * _tokens(tokenizer, rows, used), "cuts": {}}
    cost |= {"seconds": 0.0, "parameters": 0}
    wanted = cuts(study, job) if wanted is None else wanted
    names = [name for name in CUTS if name in wanted]
    begin = time.perf_counter()
    with suppress(NotFiniteError):
        try:
            adapter = train_job(study, job, rows)
        finally:
            cost["seconds"] = round(time.perf_counter() - begin, 2)
        cost["parameters"] = _require_gradients(adapter)
        trained = Trained(adapter, tokenizer, rows, used // steps, job.seed)
        for name in names:
            # A decomposition of what is not finite has an error of its own.
            with suppress(NotFiniteError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                curve, seconds = _cut_and_measure(name, trained, held_out)
                if all(map(math.isfinite, curve.loss)):
                    more = _tokens(tokenizer, rows, LEARNED.get(name, (0,))[0] * used // steps)
                    cost["cuts"][name], curves[name] = {"tokens": more, "seconds": round(seconds, 2)}, curve
    settings = study.settings(job.task, job.recipe)
    settings["cuts"] = {name: how for name in curves if (how := cut_settings(name)) is not None}
    diverged = tuple(name for name in names if name not in curves)
    return Run(job, measured_ranks(study, job), curves, cost, settings, versions(), diverged)


def train_job(
    study: Study, job: Job, rows: Sequence[Row], trainer_class: type[CompletionTrainer] | None = None
) -> NestedAdapter:
    """Train a job's adapter, without a word; its factors are raw and in memory only.

    Args:
        study: Of the job.
        job: What to do; its split is not looked at.
        rows: `Study.train_set`'s.
        trainer_class: What trains, where it is not the recipe's own.

    Raises:
        MatryoshkaError: It cannot be done, or the loss is not finite.
    """
    objective = RECIPES[job.recipe].objective
    with tempfile.TemporaryDirectory() as folder, _silent():
        data = Path(folder) / "train.jsonl"
        write_text(data, "".join(json.dumps({"prompt": r.prompt, "completion": r.completion}) + "\n" for r in rows))
        output = str(Path(folder) / "run")
        config = study.train_config(job.recipe, job.rank, job.learning_rate, job.seed, str(data), output)
        check_objective(objective, config)
        if objective == "adalora":
            return train_adalora(config)
        return train(config, trainer_class or TRAINERS.get(objective or ""))


def _cut_and_measure(name: str, trained: Trained, rows: Sequence[Row]) -> tuple[Curve, float]:
    """A cut's curve, and the seconds that the cut took."""
    adapter, tokenizer, begin = trained.adapter, trained.tokenizer, time.perf_counter()
    each_rank = CUTS[name](trained)
    seconds = time.perf_counter() - begin
    if each_rank is None:
        return measure(adapter, tokenizer, rows, adapter.nesting.ranks), seconds
    points = []
    for make in each_rank:
        begin = time.perf_counter()
        make()
        seconds += time.perf_counter() - begin
        points.append(measure(adapter, tokenizer, rows, (adapter.nesting.max_rank,)))
    return Curve(tuple(one.loss[0] for one in points), tuple(one.accuracy[0] for one in points)), seconds


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], count: int) -> int:
    """How many tokens so many rows have, without padding."""
    lengths = [len(q.context) + len(q.completion) for q in (tokenize(tokenizer, row) for row in rows)]
    return round(sum(lengths) / len(lengths) * count)


def _require_gradients(adapter: NestedAdapter) -> int:
    """Of all factors, as a cut may need them; returns how many numbers they have, without padding of zeros."""
    count = 0
    for _, module, _ in adapter._layers():
        for parameter in get_parameters(module, adapter.name):
            parameter.requires_grad_()
        A, B = get_factors(module, adapter.name)
        count += int(A.any(dim=-1).sum()) * (A.shape[-1] + B.shape[-2])
    return count


@contextmanager
def _silent() -> Any:
    """Without the Trainer's lines and bars: many runs share one screen."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other
        yield
