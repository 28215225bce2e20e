"""The curve as a picture."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import Any

from matryoshka_lora.evaluation.results import Evaluation

# Okabe and Ito's colours, which differ for every kind of colour vision; markers tell them in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = "osD^vP"


def draw(evaluation: Evaluation, file: Path | BytesIO) -> None:
    """Draw each task's first metric against the rank, with standard errors, as a PNG picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    ranks = evaluation.ranks
    for number, name in enumerate(evaluation.tasks):
        metric, colour = evaluation.metric(name), _COLOURS[number % len(_COLOURS)]
        value = [math.nan if (v := metric["value"][rank]) is None else v for rank in ranks]
        error = [metric["stderr"][rank] or 0 for rank in ranks]
        style = {"color": colour, "marker": _MARKERS[number % len(_MARKERS)], "capsize": 3}
        axes.errorbar(ranks, value, error, label=name, **style)
        if metric["value"].get(0) is not None:
            axes.axhline(metric["value"][0], color=colour, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, list(map(str, ranks)))
    axes.minorticks_off()
    axes.set_xlabel("rank at which the adapter is used")
    axes.set_title("bars are standard errors, dashes the base model", loc="left", fontsize=11)
    axes.grid(color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, format="png")
