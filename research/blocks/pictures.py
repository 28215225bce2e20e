"""The blocks on the order of image LoRAs."""

from __future__ import annotations

from statistics import median

from research.blocks.reordering import SIZES
from research.blocks.shared import block, read, table

FILE = "research/runs/pictures.jsonl"
MODEL_NAMES = {"unet": "U-Net", "transformer": "transformer"}
WAYS = {
    ("svd", "uniform"): "SVD, one rank",
    ("svd", "allocated"): "SVD, by layer",
    ("weighted", "uniform"): "weighted, one rank",
    ("weighted", "allocated"): "weighted, by layer",
}
"""The order and the allocation."""

RIVALS = (("svd", "uniform"), ("svd", "allocated"))
WEIGHTED = ("weighted", "allocated")


@block
def pictures() -> str:
    """The distance of each LoRA at equal size, and the medians, which decide."""
    rows: list[list[str]] = []
    for rank, size in SIZES.items():
        for (model, _, style), distances in _distances(rank).items():
            cells = [f"{100 * distances[way]:.1f}" for way in WAYS]
            rows.append([size, f"{MODEL_NAMES[model]}, {style}", *cells])
        medians = [f"**{100 * _median_distance(rank, way):.1f}**" for way in WAYS]
        rows.append([size, "**median**", *medians])
    return table(["size", "LoRA", *WAYS.values()], rows)


@block
def pictures_findings() -> str:
    """The ratios of the rule, and the ratios within each LoRA."""
    ratios: list[str] = []
    paired: list[str] = []
    for rank, size in SIZES.items():
        rival = min(_median_distance(rank, way) for way in RIVALS)
        ratios.append(f"{_median_distance(rank, WEIGHTED) / rival:.2f} at {size}")
        shares = [
            distances[WEIGHTED] / min(distances[way] for way in RIVALS)
            for distances in _distances(rank).values()
        ]
        paired.append(f"{median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) at {size}")
    return (
        "* **Weighted, by layer**, over the lower of the two medians of the SVD: "
        f"{', '.join(ratios)}.\n"
        "* The same ratio within each LoRA, median and range: "
        f"{', '.join(paired)}."
    )


def _distances(rank: int) -> dict[tuple[str, int, str], dict[tuple[str, str], float]]:
    """Return the distance by order and allocation, of each LoRA by model, seed and style."""
    loras: dict[tuple[str, int, str], dict[tuple[str, str], float]] = {}
    for cell in read(FILE):
        if cell["rank"] == rank:
            lora = cell["model"], cell["seed"], cell["style"]
            loras.setdefault(lora, {})[cell["order"], cell["allocation"]] = cell["distance"]
    return dict(sorted(loras.items()))


def _median_distance(rank: int, way: tuple[str, str]) -> float:
    return median(distances[way] for distances in _distances(rank).values())
