"""The picture of a study: each task's accuracy and loss against rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matryoshka_lora import MatryoshkaError
from research.looks import LIGHT, LOOKS, Look, rank_axis
from research.recipes import EACH
from research.records import Result
from research.stats import accuracy_at, loss_at, mean, ranking

# A logarithmic axis has no zero.
_LEAST_LOSS = 1e-6

MOST_METHODS = 8
"""Methods that a picture can tell apart."""


def draw(results: Sequence[Result], path: Path, *, title: str, methods: Sequence[str]) -> None:
    """Draw each task as a row of two panels, 1600 pixels wide: the methods' means over seeds, bars for the intervals.

    Args:
        results: Any curves; those of a task have the same ranks.
        path: The PNG's.
        title: Of the whole picture.
        methods: Which to draw, in the legend's order; on a task, those that have results.

    Raises:
        MatryoshkaError: These are no methods, or more than `MOST_METHODS`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not 0 < len(methods) <= MOST_METHODS:
        raise MatryoshkaError(f"a picture cannot tell {len(methods)} methods apart; name 1 to {MOST_METHODS}")
    spare = iter([look for method, look in reversed(LOOKS.items()) if method not in methods])
    # What has no look of its own borrows that of a method that is not drawn.
    styles = {method: _style(LOOKS.get(method) or next(spare)) for method in methods}
    styles[EACH] = {**_style(LOOKS[EACH]), "linestyle": "--"}
    tasks = sorted({result.task for result in results})
    figure = Figure(figsize=(16, 2 + 5.5 * len(tasks)), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.15))
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}   (bars: 95 % intervals over the seeds)", fontsize=18)
    panels: Any = figure.subplots(len(tasks), 2, squeeze=False)
    shown: dict[str, Any] = {}
    for (left, right), task in zip(panels, tasks, strict=True):
        ranks = next(result.ranks for result in results if result.task == task)
        here = {result.method for result in results if result.task == task}
        for method in (method for method in methods if method in here):
            # Side by side around the rank, so that bars do not hide each other.
            x = [rank * 2 ** (0.05 * (methods.index(method) - (len(methods) - 1) / 2)) for rank in ranks]
            for axes, value, unit in ((left, accuracy_at, 100), (right, loss_at, 1)):
                curve = [point for rank in ranks if (point := mean(results, method, value(rank), task))]
                means = [max(unit * point.mean, _LEAST_LOSS) for point in curve]
                bars = [unit * (point.half_width or 0) for point in curve]
                shown[method] = axes.errorbar(x, means, bars, **styles[method])
        _rank_axis(left, ranks, f"{task}: accuracy, higher is better")
        _rank_axis(right, ranks, f"{task}: loss, lower is better")
        left.set_ylabel("% of the questions", fontsize=15)
        right.set_ylabel("nats per token, log scale", fontsize=15)
        _scale(left, right, [result for result in results if result.task == task and result.method in methods])
    names = [method for method in methods if method in shown]
    lines = [shown[name] for name in names]
    figure.legend(lines, names, loc="outside lower center", ncols=min(len(names), 4), fontsize=15, frameon=False)
    figure.savefig(path)


def legible(results: Sequence[Result], winner: str | None = None) -> list[str]:
    """Methods for one picture, best first: `EACH`, the winner, and as many others as can be told apart.

    Those that come first in the results, which have the order of the study's list: whoever wrote it knows which.
    """
    order, listed = ranking(results), [result.method for result in results]
    kept = [name for name in dict.fromkeys((EACH, winner, *listed)) if name in order][:MOST_METHODS]
    return [name for name in order if name in kept]


def _rank_axis(axes: Any, ranks: Sequence[int], title: str) -> None:
    rank_axis(axes, ranks)
    axes.xaxis.label.set_size(15)
    axes.tick_params(labelsize=14)
    axes.set_title(title, fontsize=16, loc="left")
    axes.grid(color="#DDDDDD", linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _style(look: Look) -> Mapping[str, Any]:
    return {
        "color": look.colour(LIGHT),
        "marker": look.marker,
        "linewidth": 2,
        "markersize": 10,
        "elinewidth": 1.2,
        "capsize": 3,
    }


def _scale(left: Any, right: Any, results: Sequence[Result]) -> None:
    """Limits by the curves: intervals of two seeds can be wide, and may end at the frame."""
    from matplotlib.ticker import LogLocator

    accuracies = [100 * share for result in results for share in result.curve.accuracy]
    losses = [max(loss, _LEAST_LOSS) for result in results for loss in result.curve.loss]
    low, high = left.get_ylim()
    left.set_ylim(max(low, min(accuracies) - 10), min(high, max(accuracies) + 10))
    right.set_yscale("log", nonpositive="clip")
    right.set_ylim(min(losses) / 1.3, max(losses) * 1.3)
    wide = max(losses) > 100 * min(losses)
    right.yaxis.set_major_locator(LogLocator(subs=(1, 3) if wide else (1, 1.5, 2, 3, 5, 7)))
    right.yaxis.set_major_formatter("{x:g}")
    right.minorticks_off()
