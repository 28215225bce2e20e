"""Plot the results of an evaluation."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from matryoshka_lora.errors import printable
from matryoshka_lora.evaluation.results import Evaluation

# The colors of Okabe and Ito are distinct for every kind of color vision.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = "osD^vPX"  # 6 colors and 7 markers make 42 combinations


def plot_evaluation(evaluation: Evaluation, file: Path) -> None:
    """Plot the primary metric of each task against the rank, with standard errors, as a PNG file.

    The axis of the values contains 0, so that small differences look small. The value of the base
    model is a dashed line. If it is so far away that it would flatten the curves, it is in the
    legend instead.
    """
    ranks = evaluation.ranks
    names = [result.metric_name for result in evaluation.tasks.values()]
    has_one_metric = len(set(names)) == 1
    values_by_task = [evaluation.values(task).values() for task in evaluation.tasks]
    all_values = [v for values in values_by_task for v in values if v is not None]
    lowest, highest = min([0.0, *all_values]), max([0.0, *all_values])
    height = highest - lowest

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    title = "Bars: standard errors."
    for index, (task, name) in enumerate(zip(evaluation.tasks, names, strict=True)):
        color = _COLORS[index % len(_COLORS)]
        metric = evaluation.metric(task)
        label = printable(task if has_one_metric else f"{task}: {name}")
        base_value = metric.values.get(0)
        if base_value is not None:
            if lowest - height <= base_value <= highest + height:
                axes.axhline(base_value, color=color, linestyle="--", linewidth=1)
                title = "Bars: standard errors. Dashed: base model."
            else:
                label += f" (base model: {base_value:.3g})"
        values = [metric.values[rank] for rank in ranks]
        axes.errorbar(
            ranks,
            [math.nan if value is None else value for value in values],
            [metric.standard_errors[rank] or 0.0 for rank in ranks],
            label=label,
            color=color,
            marker=_MARKERS[index % len(_MARKERS)],
            capsize=3,
            clip_on=False,  # a marker at 0 would be cut in half
        )

    labeled_ranks: list[int] = []
    for rank in reversed(ranks):
        # The labels of closer ranks would overlap.
        if not labeled_ranks or math.log2(labeled_ranks[-1] / rank) >= 0.2:
            labeled_ranks.append(rank)
    axes.set_xscale("log", base=2)
    axes.set_xticks(labeled_ranks, [str(rank) for rank in labeled_ranks])
    axes.minorticks_off()
    if lowest == 0:
        axes.set_ylim(bottom=0)
    elif highest == 0:
        axes.set_ylim(top=0)
    axes.set_xlabel("rank")
    axes.set_ylabel(names[0] if has_one_metric else "value of the metric", parse_math=False)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)  # the name of a file may have dollar signs
    figure.savefig(file, format="png")
