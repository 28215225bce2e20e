"""Plot the results of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matryoshka_lora.errors import optional_imports
from matryoshka_lora.evaluation.results import Evaluation

# The colors of Okabe and Ito are distinct for every kind of color vision.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = "osD^vPX"  # their number and that of the colors have no common factor: 42 combinations
# The labels of closer ranks would overlap.
_MIN_DISTANCE_OF_LABELS = 0.2  # in log2 of the rank


def plot_evaluation(evaluation: Evaluation, file: Path) -> None:
    """Plot the primary metric of each task against the rank, with standard errors, as a PNG file.

    The value of the base model is a dashed line. If it is so far away that it would flatten the
    curves, it is in the legend instead.

    Args:
        evaluation: The evaluation.
        file: The file to write.
    """
    with optional_imports():
        from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    ranks = evaluation.ranks
    metric_names = [task.primary_metric.removesuffix(",none") for task in evaluation.tasks.values()]
    has_one_metric = len(set(metric_names)) == 1
    lowest, highest = _range_of_values(evaluation)
    height = highest - lowest
    title = "Bars: standard errors."
    for index, (task, metric_name) in enumerate(zip(evaluation.tasks, metric_names, strict=True)):
        color = _COLORS[index % len(_COLORS)]
        metric = evaluation.metric(task)
        values = [metric.values[rank] for rank in ranks]
        label = task if has_one_metric else f"{task}: {metric_name}"
        base_value = metric.values.get(0)
        if base_value is not None:
            if lowest - height <= base_value <= highest + height:
                axes.axhline(base_value, color=color, linestyle="--", linewidth=1)
                title = "Bars: standard errors. Dashed: base model."
            else:
                label += f" (base model: {base_value:.3g})"
        axes.errorbar(
            ranks,
            [math.nan if value is None else value for value in values],
            [metric.standard_errors[rank] or 0.0 for rank in ranks],
            label=label,
            color=color,
            marker=_MARKERS[index % len(_MARKERS)],
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    labeled_ranks = _labeled_ranks(ranks)
    axes.set_xticks(labeled_ranks, [str(rank) for rank in labeled_ranks])
    axes.minorticks_off()
    axes.set_xlabel("rank")
    axes.set_ylabel(metric_names[0] if has_one_metric else "value of the metric")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, format="png")


def _range_of_values(evaluation: Evaluation) -> tuple[float, float]:
    """Return the lowest and the highest value of all tasks, without the base model."""
    values = [
        value
        for task in evaluation.tasks
        for value in evaluation.values(task).values()
        if value is not None
    ]
    return min(values, default=0.0), max(values, default=0.0)


def _labeled_ranks(ranks: Sequence[int]) -> list[int]:
    """Return the ranks whose labels fit on the axis, from the largest one on."""
    labeled_ranks: list[int] = []
    for rank in reversed(ranks):
        if not labeled_ranks or math.log2(labeled_ranks[-1] / rank) >= _MIN_DISTANCE_OF_LABELS:
            labeled_ranks.append(rank)
    return labeled_ranks
