"""The curves of the recorded test runs, and of some that only an earlier version can repeat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from research.plan import Result, results
from research.runs import Curve
from research.stats import accuracy_at
from research.study import LORA_EACH, RUNS, load_study

WARMUPS = (0, 5, 20)
"""The studies ``reference-warmup-...``, in % of the steps. Only the best of them is tested."""

LORA_ALONE = {"low-256": "low-256-alone", "low-ordinary": "low-ordinary-alone"}
"""The study with more of a study's LoRA trained at a rank. Its rates are of a finer search."""


@cache
def curves(name: str) -> tuple[Result, ...]:
    """Return every finished curve of a study, and its curves of earlier versions."""
    study = load_study(name)
    of_study = (*results(study, study.load_runs()), *earlier_curves(name))
    return (*of_study, *curves(LORA_ALONE[name])) if name in LORA_ALONE else of_study


def earlier_curves(study: str) -> list[Result]:
    """Return the curves of a study that only an earlier version can repeat.

    A line of ``runs/earlier.jsonl`` has the study, the commit of the version, and the fields of a
    curve. Other results of earlier versions are in ``research/earlier.md``.
    """
    earlier: list[Result] = []
    for line in (RUNS / "earlier.jsonl").read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        if fields.pop("study") == study:
            del fields["commit"]
            curve = Curve(tuple(fields.pop("loss")), tuple(fields.pop("accuracy")))
            earlier.append(Result(**{**fields, "ranks": tuple(fields["ranks"]), "curve": curve}))
    return earlier


def of_method(study: str, method: str, task: str | None = None) -> list[Result]:
    """Return the curves of a method."""
    return [
        curve for curve in curves(study) if curve.method == method and task in (None, curve.task)
    ]


def references_with_best_warmup() -> tuple[int, list[Result]]:
    """Return the warmup that was tested, and its curves of LoRA at the ranks 1 and 2."""
    for warmup in WARMUPS:
        references = of_method(f"reference-warmup-{warmup}", LORA_EACH)
        if references:
            return warmup, references
    raise ValueError("No warmup was tested.")


def reference_accuracies(rank: int) -> list[float]:
    """Return the right answers of LoRA trained at a rank in `every256`, in %, by seed.

    At the ranks 1 and 2 they are from the study of the best warmup, which has a finer grid of rates
    and more validation seeds.
    """
    references = of_method("every256", LORA_EACH)
    if rank <= 2:
        _, references = references_with_best_warmup()
    return accuracies(references, rank)


def accuracies(results_of_method: Sequence[Result], rank: int) -> list[float]:
    """Return the right answers at a rank in %, by seed."""
    return [100 * (accuracy_at(rank)(result) or 0) for result in results_of_method]
