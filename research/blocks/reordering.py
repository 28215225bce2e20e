"""The blocks of docs/reorder.md and docs/results.md on `reorder` with examples."""

from __future__ import annotations

from statistics import fmean, median

from research import stats
from research.blocks.shared import block, read, table

FILE = "research/runs/reordering.jsonl"
TASK_NAMES = {
    "chain_sum": "`chain_sum`",
    "family_relationships": "`family_relationships`",
    "facts-256": "256 facts",
    "facts-512": "512 facts",
    "capacity": "256 facts, two kinds of layers",
}
ORDERS = {
    "svd": "SVD",
    "16": "16 examples",
    "128": "128 examples",
    "other": "128 other examples",
}
SIZES = {2: "6 %", 4: "12.5 %", 8: "25 %"}
"""The share of the parameters of rank 32, by the rank."""


@block
def reordering() -> str:
    """The divergence of each order at equal size, with one rank and with ranks by layer."""
    heading = ["task", "size", *(f"{name}, one rank" for name in ORDERS.values())]
    heading += [f"{name}, by layer" for name in ORDERS.values()]
    rows: list[list[str]] = []
    for task, name in TASK_NAMES.items():
        for rank, size in SIZES.items():
            cells = [_divergence(task, rank, order, "uniform") for order in ORDERS]
            cells += [_divergence(task, rank, order, "allocated") for order in ORDERS]
            if any(cells):
                rows.append([name, size, *cells])
    return table(heading, rows)


def divergences(task: str, rank: int, order: str, allocation: str) -> list[float]:
    """Return the divergence of each adapter, in the order of the seeds."""
    key = (task, rank, order, allocation)
    return [
        cell["divergence"]
        for cell in read(FILE)
        if (cell["task"], cell["rank"], cell["order"], cell["allocation"]) == key
    ]


def _divergence(task: str, rank: int, order: str, allocation: str) -> str:
    estimate = stats.estimate(divergences(task, rank, order, allocation))
    return "" if estimate is None else estimate.text(digits=4)


@block
def reordering_findings() -> str:
    """The divergence of the orders by 128 examples, relative to the SVD with one rank."""
    rows: list[list[str]] = []
    for task, name in TASK_NAMES.items():
        seconds = [
            cell["seconds"] for cell in read(FILE) if cell["task"] == task and cell["order"] == "16"
        ]
        for order, allocation, way in (
            ("128", "uniform", "128 examples, one rank"),
            ("128", "allocated", "128 examples, ranks by layer"),
            ("other", "uniform", "128 other examples, one rank"),
        ):
            row = [name, way]
            for rank in SIZES:
                by_svd = divergences(task, rank, "svd", "uniform")
                by_order = divergences(task, rank, order, allocation)
                ratios = [a / b for a, b in zip(by_order, by_svd, strict=True)]
                row.append(f"{fmean(ratios):.2f}")
                if len(ratios) > 1:
                    row[-1] += f" ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append([*row, f"{median(seconds):.1f}"])
    return table(["task", "order", *SIZES.values(), "seconds of 16 examples"], rows)
