"""Plot the results of an evaluation."""

from __future__ import annotations

import math
from pathlib import Path

from matryoshka_lora.errors import optional_imports
from matryoshka_lora.evaluation.results import Evaluation

# The colors of Okabe and Ito are distinct for every kind of color vision.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = "osD^vPX"  # their number and that of the colors have no common factor: 42 combinations


def plot_evaluation(evaluation: Evaluation, file: Path) -> None:
    """Plot the primary metric of each task against the rank, with standard errors, as a PNG file.

    Args:
        evaluation: The evaluation.
        file: The file to write.
    """
    with optional_imports():
        from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    ranks = evaluation.ranks
    for index, (name, task) in enumerate(evaluation.tasks.items()):
        color = _COLORS[index % len(_COLORS)]
        metric = evaluation.metric(name)
        values = [metric.values[rank] for rank in ranks]
        axes.errorbar(
            ranks,
            [math.nan if value is None else value for value in values],
            [metric.standard_errors[rank] or 0.0 for rank in ranks],
            label=f"{name}: {task.primary_metric.removesuffix(',none')}",
            color=color,
            marker=_MARKERS[index % len(_MARKERS)],
            capsize=3,
        )
        base_value = metric.values.get(0)
        if base_value is not None:
            axes.axhline(base_value, color=color, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlabel("rank")
    axes.set_ylabel("value of the metric")
    axes.set_title("Bars: standard errors. Dashed: base model.", loc="left", fontsize=11)
    axes.grid(color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, format="png")
