"""The blocks of docs/reorder.md."""

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
    heading += [f"{name}, by layer" for name in list(ORDERS.values())[:3]]
    rows: list[list[str]] = []
    for task, name in TASK_NAMES.items():
        for rank, size in SIZES.items():
            cells = [_divergence(task, rank, order, "uniform") for order in ORDERS]
            cells += [_divergence(task, rank, order, "allocated") for order in ("svd", "16", "128")]
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
    """The ratio of the divergences, and the seconds."""
    lines: list[str] = []
    for task, name in TASK_NAMES.items():
        cells = [cell for cell in read(FILE) if cell["task"] == task]
        if not cells:
            continue
        ratios: list[str] = []
        for rank, size in SIZES.items():
            by_seed = {
                (cell["seed"], cell["order"], cell["allocation"]): cell["divergence"]
                for cell in cells
                if cell["rank"] == rank
            }
            shares = [
                by_seed[seed, "128", "allocated"] / by_seed[seed, "svd", "allocated"]
                for seed in {cell["seed"] for cell in cells}
            ]
            ratios.append(f"{fmean(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) at {size}")
        seconds = median(cell["seconds"] for cell in cells if cell["order"] == "16")
        lines.append(
            f"* {name}: 128 examples have {', '.join(ratios)} of the SVD's divergence, both with "
            f"ranks by layer. 16 examples take {seconds:.1f} s."
        )
    return "\n".join(lines)
