"""The registry of blocks, and the cells, tables and comparisons that several pages share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from statistics import median
from typing import Any

from research import stats
from research.curves import curves, of_method, reference_accuracies
from research.looks import NAMES
from research.plan import Result, rates, units
from research.stats import Estimate, Value, accuracy_at
from research.study import LORA_EACH, ROOT, load_study, parse_method

BLOCKS: dict[str, Callable[[], str]] = {}


def block(function: Callable[[], str]) -> Callable[[], str]:
    """Register a block under the name of its function."""
    BLOCKS[function.__name__] = function
    return function


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (heading, *rows)]
    lines.insert(1, "|---" * len(heading) + "|")
    return "\n" + "\n".join(lines) + "\n"


@cache
def read(path: str) -> Any:
    """Return the content of a file of JSON or of JSON lines."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith("jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def percent(
    study: str, method: str, value: Value, task: str | None = None, minus: str | None = None
) -> str:
    """Return the mean of a share, or of its difference to another method, in %, with ±."""
    estimate = stats.mean(curves(study), method, value, task, minus)
    return "" if estimate is None else estimate.text(100, 1)


def nats(
    study: str, method: str, value: Value, task: str | None = None, minus: str | None = None
) -> str:
    """Return the mean of a loss, or of its difference to another method, with ±."""
    estimate = stats.mean(curves(study), method, value, task, minus)
    return "" if estimate is None else estimate.text()


def format_median(shares: Sequence[float]) -> str:
    """Return the median of shares in %, and the lowest in brackets."""
    return f"{median(shares):.1f} ({min(shares):.1f})" if shares else ""


def price(study: str, method: str) -> tuple[str, str]:
    """Return the tokens and the seconds of one curve as multiples of one run of LoRA.

    The seconds are those of the deployments of one run, in one process: other runs were on other
    machines.
    """
    of_lora, of_curve = of_method(study, "lora/svd"), of_method(study, method)
    tokens = _mean_tokens(of_curve) / _mean_tokens(of_lora)
    is_of_one_run = method.startswith("lora/") and method in load_study(study).methods
    seconds = f"{relative_seconds(study, method):.1f}" if is_of_one_run else ""
    return f"{tokens:.2f}", seconds


def _mean_tokens(results: Sequence[Result]) -> float:
    """Return the tokens of a seed. It has several results where two studies share the ranks."""
    seeds = {(result.task, result.seed) for result in results}
    return sum(result.tokens for result in results) / len(seeds)


def facts_table(
    study: str,
    first: str,
    methods: Sequence[str],
    ranks: Sequence[int],
    names: Mapping[str, str] = NAMES,
) -> str:
    """Return right answers by method and rank, the median and the lowest seed, and the price."""
    heading = [first, *(f"rank {rank}" for rank in ranks), "tokens", "seconds", "seeds"]
    rows: list[list[str]] = []
    for method in methods:
        shares_by_rank = [stats.values(curves(study), method, accuracy_at(rank)) for rank in ranks]
        cells = [format_median([100 * s for s in shares.values()]) for shares in shares_by_rank]
        if (study, method) == ("every256", LORA_EACH):
            (trained_ranks,) = {result.ranks for result in of_method(study, method)}
            cells = [
                format_median(reference_accuracies(rank)) if rank in trained_ranks else ""
                for rank in ranks
            ]
        seeds = str(len({result.seed for result in of_method(study, method)}))
        rows.append([names[method], *cells, *price(study, method), seeds])
    return table(heading, rows)


# Comparisons of methods.

THREE_TASKS = ("chain_sum", "wordnet", "family_relationships")

P_KEPT = "matryoshka/kept"
"""P, kept and truncated."""


def chosen_rate(study_name: str, method: str, task: str | None = None) -> float:
    """Return the learning rate at which a method was tested, on a task or on the only one."""
    study = load_study(study_name)
    (unit,) = units(study, method, task or next(iter(study.tasks)))
    rate = rates(study, study.load_runs(), unit).chosen
    if rate is None:
        raise ValueError(f"{method} of {study_name} has no rate.")
    return rate


def spread(numbers: list[float]) -> str:
    """Return the lowest and the highest of some numbers, or one number if they are equal."""
    if min(numbers) == max(numbers):
        return f"{min(numbers):g}"
    return f"{min(numbers):g} to {max(numbers):g}"


def p_kept_minus_lora(value: Value) -> Estimate:
    """Return P, kept and truncated, minus LoRA, truncated, at the same rate, on ``chain_sum``."""
    if p_kept_rate() != chosen_rate("rest", "lora/prefix"):
        raise ValueError("P and LoRA were tested at different rates.")
    return difference("rest", P_KEPT, value, "lora/prefix")


def p_kept_minus_dropped(value: Value) -> Estimate:
    """Return P, kept and truncated, minus P dropped, of the same adapters, on ``chain_sum``."""
    if p_kept_rate() != chosen_rate("rest", "matryoshka/prefix"):
        raise ValueError("The two deployments are of different adapters.")
    return difference("rest", P_KEPT, value, "matryoshka/prefix")


def p_kept_rate() -> float:
    """Return the rate of the two comparisons above."""
    return chosen_rate("rest", P_KEPT)


def p_minus_lora(value: Value, task: str) -> Estimate:
    """Return P, then ``reorder``, minus LoRA, then ``reorder``, each at its rate."""
    return difference("headline", "matryoshka/svd", value, "lora/svd", task)


def in_paper_regime(method: str, minus: str, value: Value, task: str) -> Estimate:
    """Return the difference of two methods as the paper's authors train, each at its best rate."""
    return difference("paper-regime", method, value, minus, task)


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


def points(estimate: Estimate, sign: str = "") -> str:
    """Return a difference of shares in points of %, with its interval."""
    return estimate.text(100, 1, sign)


def difference(
    study: str, method: str, value: Value, minus: str, task: str | None = None
) -> Estimate:
    """Return the mean difference of two methods of a study, on the same tasks and seeds."""
    estimate = stats.mean(curves(study), method, value, task, minus)
    if estimate is None:
        raise ValueError(f"{method} and {minus} have no common seed in {study}.")
    return estimate
