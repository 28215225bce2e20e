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


def _divergence(task: str, rank: int, order: str, allocation: str) -> str:
    key = (task, rank, order, allocation)
    estimate = stats.estimate(
        [
            cell["divergence"]
            for cell in read(FILE)
            if (cell["task"], cell["rank"], cell["order"], cell["allocation"]) == key
        ]
    )
    return "" if estimate is None else estimate.text(digits=4)


@block
def reordering_findings() -> str:
    """The divergence of the orders by 128 examples, relative to the SVD with one rank."""
    rows: list[list[str]] = []
    for task, name in TASK_NAMES.items():
        cells = [cell for cell in read(FILE) if cell["task"] == task]
        if not cells:
            continue
        seconds = median(cell["seconds"] for cell in cells if cell["order"] == "16")
        for order, allocation, way in (
            ("128", "uniform", "128 examples, one rank"),
            ("128", "allocated", "128 examples, ranks by layer"),
            ("other", "uniform", "128 other examples, one rank"),
        ):
            row = [name, way]
            for rank in SIZES:
                by_seed = {
                    (cell["seed"], cell["order"], cell["allocation"]): cell["divergence"]
                    for cell in cells
                    if cell["rank"] == rank
                }
                shares = [
                    by_seed[seed, order, allocation] / by_seed[seed, "svd", "uniform"]
                    for seed in {cell["seed"] for cell in cells}
                ]
                row.append(f"{fmean(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")
            rows.append([*row, f"{seconds:.1f}"])
    return table(["task", "order", *SIZES.values(), "seconds of 16 examples"], rows)
