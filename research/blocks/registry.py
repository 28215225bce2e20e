"""What the blocks of all pages share: their registry, cells and tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from research import stats
from research.curves import curves, of_method, reference_accuracies
from research.looks import NAMES
from research.stats import Value, accuracy_at
from research.study import LORA_EACH

ROOT = Path(__file__).parents[2]

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


def median_and_lowest(study: str, method: str, value: Value, task: str | None = None) -> str:
    """Return the median over the seeds in %, and the lowest seed in brackets."""
    values = stats.values(curves(study), method, value, task)
    return format_median([100 * share for share in values.values()])


def format_median(shares: Sequence[float]) -> str:
    """Return the median of shares in %, and the lowest in brackets."""
    return f"{median(shares):.1f} ({min(shares):.1f})" if shares else ""


def tokens(study: str, method: str) -> str:
    """Return the tokens of one curve as a multiple of one run of LoRA."""
    method_tokens = fmean(curve.tokens for curve in of_method(study, method))
    lora_tokens = fmean(curve.tokens for curve in of_method(study, "lora/svd"))
    return f"{method_tokens / lora_tokens:.2f}"


def mean_and_deviation(numbers: Iterable[float], digits: int = 3) -> str:
    """Return the mean ± the standard deviation."""
    values = list(numbers)
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def reference_cells(ranks: Sequence[int]) -> list[str]:
    """Return the medians of LoRA trained at each rank on 256 facts, where the study has it."""
    (trained_ranks,) = {result.ranks for result in of_method("every256", LORA_EACH)}
    return [
        format_median(reference_accuracies(rank)) if rank in trained_ranks else "" for rank in ranks
    ]


def facts_table(study: str, first: str, methods: Sequence[str], ranks: Sequence[int]) -> str:
    """Return right answers by method and rank: the median, the lowest seed, and the tokens."""
    heading = [first, *(f"rank {rank}" for rank in ranks), "tokens", "seeds"]
    rows: list[list[str]] = []
    for method in methods:
        cells = [median_and_lowest(study, method, accuracy_at(rank)) for rank in ranks]
        if (study, method) == ("every256", LORA_EACH):
            cells = reference_cells(ranks)
        seeds = str(len(of_method(study, method)))
        rows.append([NAMES[method], *cells, tokens(study, method), seeds])
    return table(heading, rows)
