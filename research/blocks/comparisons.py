"""Comparisons of methods that the blocks of several pages state."""

from __future__ import annotations

from statistics import fmean, median

from matryoshka_lora import aurac
from research import stats
from research.blocks.registry import read
from research.curves import curves, of_method
from research.looks import TRAINED, train_ranks_name, trained_method
from research.plan import rates, units
from research.stats import Estimate, Value
from research.study import load_study, parse_method

THREE_TASKS = ("chain_sum", "wordnet", "family_relationships")

P_KEPT = "matryoshka/keep"
"""P, kept and truncated; the recorded runs have the first name of the deployment ``kept``."""


def chosen_rate(study_name: str, method: str, task: str | None = None) -> float:
    """Return the learning rate at which a method was tested, on a task or on the only one."""
    study = load_study(study_name)
    (unit,) = units(study, method, task or next(iter(study.tasks)))
    rate = rates(study, study.load_runs(), unit).chosen
    if rate is None:
        raise ValueError(f"{method} of {study_name} has no rate.")
    return rate


def rate_range(study_name: str, method: str) -> str:
    """Return the lowest and the highest rate of a method over the tasks of a study."""
    return spread([chosen_rate(study_name, method, task) for task in load_study(study_name).tasks])


def spread(numbers: list[float]) -> str:
    """Return the lowest and the highest of some numbers, or one number if they are equal."""
    if min(numbers) == max(numbers):
        return f"{min(numbers):g}"
    return f"{min(numbers):g} to {max(numbers):g}"


def p_kept_minus_lora(value: Value) -> Estimate:
    """Return P, kept and truncated, minus LoRA, truncated, at the same rate, on ``chain_sum``."""
    if p_kept_rate() != chosen_rate("rest", "lora/prefix"):
        raise ValueError("P and LoRA were tested at different rates.")
    return _estimate("rest", P_KEPT, value, "lora/prefix")


def p_kept_minus_dropped(value: Value) -> Estimate:
    """Return P, kept and truncated, minus P dropped, of the same adapters, on ``chain_sum``."""
    if p_kept_rate() != chosen_rate("rest", "matryoshka/prefix"):
        raise ValueError("The two deployments are of different adapters.")
    return _estimate("rest", P_KEPT, value, "matryoshka/prefix")


def p_kept_rate() -> float:
    """Return the rate of the two comparisons above."""
    return chosen_rate("rest", P_KEPT)


def p_minus_lora(value: Value, task: str) -> Estimate:
    """Return P, then ``reorder``, minus LoRA, then ``reorder``, each at its rate."""
    return _estimate("headline", "matryoshka/svd", value, "lora/svd", task)


def in_paper_regime(method: str, minus: str, value: Value, task: str) -> Estimate:
    """Return the difference of two methods as the paper's authors train, each at its best rate."""
    return _estimate("paper-regime", method, value, minus, task)


def gain_of_one_svd(task: str) -> Estimate:
    """Return the AURAC that one SVD adds to the same adapters of plain LoRA, truncated."""
    study = load_study("headline")
    rate = chosen_rate("headline", "lora/svd", task)
    gains: list[float] = []
    for job, run in study.load_runs().items():
        key = (job.recipe, job.task, job.rank, job.learning_rate, job.split)
        if key == ("lora", task, study.rank, rate, "test") and job.seed in study.seeds:
            truncated = aurac(run.curves["prefix"].accuracy, run.ranks)
            gains.append(aurac(run.curves["svd"].accuracy, run.ranks) - truncated)
    estimate = stats.estimate(gains)
    if estimate is None:
        raise ValueError(f"No adapter of {task} has both deployments.")
    return estimate


def trained_minus(study: str, other: str, value: Value) -> Estimate:
    """Return LoRA, then ``train_ranks``, minus another method on the same seeds."""
    return _estimate(study, trained_method(study), value, other)


def trained_minus_study(study: str, method: str, other_study: str, value: Value) -> Estimate:
    """Return LoRA, then ``train_ranks``, minus a method of another study, on the same seeds."""
    values = stats.values(curves(study), TRAINED, value)
    values_of_other = stats.values(curves(other_study), method, value)
    common = values.keys() & values_of_other.keys()
    estimate = stats.estimate([values[key] - values_of_other[key] for key in sorted(common)])
    if estimate is None:
        raise ValueError(f"{study} and {other_study} have no common seed.")
    return estimate


def other_version(study: str) -> str:
    """Return the name of a study's `train_ranks` for a label, if it is not that of `TRAINED`."""
    method = trained_method(study)
    return "" if method == TRAINED else f", {train_ranks_name(method)}"


def num_tries() -> tuple[int, int]:
    """Return the tries of ``train_ranks`` so far, and those of our variant of LoRA-Squeeze."""
    kinds = [line["kind"] for line in read("research/runs/trained-tries.jsonl")]
    num_of_trained = sum(kind in ("inter", "seq", "trained") for kind in kinds)
    loops = [line["loop"] for line in read("research/runs/allocation-tries.jsonl")]
    loops_of_other_methods = ("svd", "squeezed", "continued LoRA")
    num_of_trained += sum(loop not in loops_of_other_methods for loop in loops)
    num_of_squeezed = sum(kind in ("squeeze", "squeezed") for kind in kinds)
    return num_of_trained, num_of_squeezed


def relative_seconds(study: str, method: str) -> float:
    """Return the seconds of a run and a deployment of it, as a multiple of the run's: the median.

    Both are of the same process, because the machine is shared.
    """
    recipe, deployment = parse_method(method)
    multiples: list[float] = []
    for run in read(f"research/runs/{study}.jsonl"):
        cost = run["cost"]
        if run["job"]["recipe"] == recipe and deployment in cost["cuts"]:
            multiples.append(1 + cost["cuts"][deployment]["seconds"] / cost["seconds"])
    return median(multiples)


def parameters_of_squeezed(study: str) -> float:
    """Return the parameters of the files of LoRA-Squeeze, as a multiple of one adapter's."""
    squeezed = fmean(curve.parameters for curve in of_method(study, "lora/squeezed"))
    return squeezed / fmean(curve.parameters for curve in of_method(study, "lora/svd"))


def points(estimate: Estimate, sign: str = "") -> str:
    """Return a difference of shares in points of %, with its interval."""
    return estimate.text(100, 1, sign)


def points_less(estimate: Estimate) -> str:
    """Return a negative difference as "… points less", without its sign."""
    if estimate.mean >= 0 or estimate.half_width is None:
        raise ValueError(f"{estimate} is not less.")
    return f"{-100 * estimate.mean:.1f} ± {100 * estimate.half_width:.1f}"


def _estimate(
    study: str, method: str, value: Value, minus: str, task: str | None = None
) -> Estimate:
    estimate = stats.mean(curves(study), method, value, task, minus)
    if estimate is None:
        raise ValueError(f"{method} and {minus} have no common seed in {study}.")
    return estimate
