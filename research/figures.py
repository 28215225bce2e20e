"""Draw all figures of the documentation from files of the repository::

    python -m research.figures        # into docs/figures; about 20 seconds of one core

Each figure is written twice, NAME-light.svg and NAME-dark.svg. The same files give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matryoshka_lora import Nesting
from research.blocks.reordering import SIZES, TASK_NAMES, divergences
from research.curves import accuracies, curves, of_method
from research.looks import (
    LOOKS,
    LOW_NAMES,
    MODES,
    NAMES,
    TRAINED,
    Look,
    Mode,
    plain_name,
    set_rank_axis,
)
from research.plan import Result
from research.study import LORA_EACH, ROOT, load_study, parse_method

OUTPUT = ROOT / "docs" / "figures"

FACE_METHODS = (TRAINED, "lora-longer/svd", "lora/svd")
FACE_TASKS = {
    "family: an ordinary task": ("low-ordinary", "family_relationships"),
    "facts: truncation fails at low ranks": ("low-256", "facts-256"),
}
LOW_METHODS = ("lora/trained-1.0", TRAINED, "lora/squeezed", "lora/svd")
TASK_METHODS = ("matryoshka/svd", "lora/svd", "lora/prefix", "matryoshka/prefix")

P_DEPLOYMENTS = {
    "matryoshka/prefix": ("P, dropped after training (the paper)", LOOKS["matryoshka/prefix"]),
    "matryoshka/kept": ("P, kept", Look("#B0568C", "#E58BBF", "P")),
    "matryoshka/svd": ("P, then reorder (SVD)", LOOKS["matryoshka/svd"]),
}
"""The deployments of an adapter that P has trained."""

LOW_STUDIES = {
    "256 facts": "low-256",
    "512 facts": "low-512",
    "fewer trainable parameters": "low-capacity",
}

ORDER_LOOKS = {
    ("svd", "uniform"): ("SVD, one rank", LOOKS["lora/svd"]),
    ("svd", "allocated"): ("SVD, ranks by layer", LOOKS["lora/squeezed"]),
    ("128", "allocated"): ("128 examples, ranks by layer", LOOKS[TRAINED]),
    ("other", "allocated"): ("128 other examples, ranks by layer", LOOKS["matryoshka/prefix"]),
}
"""An order and an allocation of `research.reordering`."""

Average = Callable[[Sequence[float]], float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="folder to write (default: docs/figures)"
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, content in files():
        (options.output / name).write_bytes(content)
        print(options.output / name)


def files(*names: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file, of the named figures or of all."""
    for name in names or FIGURES:
        for mode in MODES:
            yield f"{name}-{mode.name}.svg", _draw(FIGURES[name], mode, f"{name}-{mode.name}")


def _draw(draw_figure: Callable[[Any, Mode], None], mode: Mode, hash_salt: str) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_style(mode), "svg.hashsalt": hash_salt}):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        draw_figure(figure, mode)
        svg = BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        return svg.getvalue()


def _style(mode: Mode) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
        "font.size": 11,
        "axes.titlesize": 12,
        "figure.titlesize": 13,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.edgecolor": mode.muted,
        "axes.labelcolor": mode.text,
        "axes.titlecolor": mode.text,
        "text.color": mode.text,
        "xtick.color": mode.text,
        "ytick.color": mode.text,
        "grid.color": mode.grid,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
    }


# Curves of several methods.


def face(figure: Any, mode: Mode) -> None:
    """Draw an adapter at every rank next to other methods, on an ordinary task and on 256 facts."""
    figure.set_size_inches(10.0, 4.9)
    panels = figure.subplots(1, len(FACE_TASKS), sharey=True)
    for axes, (title, (study, task)) in zip(panels, FACE_TASKS.items(), strict=True):
        of_task = [curve for curve in curves(study) if curve.task == task]
        _draw_accuracies(axes, of_task, FACE_METHODS, mode, fmean, LOW_NAMES)
        _draw_single_runs(axes, _single_runs(study, task), mode)
        axes.set_title(title)
    panels[0].set_ylim(-4, 104)
    panels[0].set_ylabel("right answers in %")
    suptitle = _describe_seeds(curves("low-256"), "the mean")
    figure.suptitle(suptitle, color=mode.muted, x=0.01, ha="left", fontsize=10)
    _draw_legend(figure)


def low(figure: Any, mode: Mode) -> None:
    """Draw four methods on three tasks of facts."""
    figure.set_size_inches(12.0, 5.0)
    panels = figure.subplots(1, len(LOW_STUDIES), sharey=True)
    for axes, (title, study) in zip(panels, LOW_STUDIES.items(), strict=True):
        all_curves = curves(study)
        _draw_accuracies(axes, all_curves, LOW_METHODS, mode, median, LOW_NAMES)
        _draw_single_runs(axes, _single_runs(study), mode)
        axes.set_title(f"{title}, {len(of_method(study, TRAINED))} seeds")
    panels[0].set_ylim(-4, 104)
    panels[0].set_ylabel("right answers in %")
    _draw_legend(figure)


def methods(figure: Any, mode: Mode) -> None:
    """Draw five methods on the three tasks of the headline study."""
    figure.set_size_inches(9.6, 4.6)
    all_curves = curves("headline")
    tasks = list(dict.fromkeys(curve.task for curve in all_curves))
    panels = figure.subplots(1, len(tasks), sharey=True)
    for axes, task in zip(panels, tasks, strict=True):
        curves_of_task = [curve for curve in all_curves if curve.task == task]
        _draw_accuracies(axes, curves_of_task, TASK_METHODS, mode, fmean)
        axes.set_title(task)
        axes.set_xlabel("rank")
    largest = max(max(c.curve.accuracy) for c in all_curves if c.method in TASK_METHODS)
    panels[0].set_ylim(-3, min(103, 100 * largest + 4))
    panels[0].set_ylabel("right answers in %")
    title = _describe_seeds(all_curves, "the mean")
    figure.suptitle(title, color=mode.muted, x=0.01, ha="left", fontsize=10)
    _draw_legend(figure)


def _draw_accuracies(
    axes: Any,
    all_curves: Sequence[Result],
    methods: Sequence[str],
    mode: Mode,
    average: Average,
    names: Mapping[str, str] = NAMES,
) -> None:
    """Draw the average of the seeds of each method; the first method is on top."""
    for index, method in enumerate(methods):
        curves_of_method = [curve for curve in all_curves if curve.method == method]
        label = plain_name(method, names)
        _draw_curve(axes, curves_of_method, label, mode, average, z_order=4 - 0.1 * index)
    all_ranks = {rank for curve in all_curves for rank in curve.ranks}
    set_rank_axis(axes, sorted(all_ranks), "rank at which the adapter is used")


def _single_runs(study: str, task: str | None = None) -> dict[int, list[float]]:
    """Return the right answers of LoRA trained at each rank, in %, by seed."""
    runs = of_method(study, LORA_EACH, task)
    return {
        rank: accuracies([run for run in runs if rank in run.ranks], rank)
        for rank in sorted({rank for run in runs for rank in run.ranks})
    }


def _draw_single_runs(
    axes: Any, accuracies_by_rank: Mapping[int, Sequence[float]], mode: Mode
) -> None:
    """Draw a marker for each run, next to each other so that equal ones are visible."""
    look = LOOKS[LORA_EACH]
    color = look.color(mode)
    for rank, shares in accuracies_by_rank.items():
        x = [rank * 2 ** (0.07 + 0.16 * i / len(shares)) for i in range(len(shares))]
        axes.plot(x, shares, look.marker, color=color, markersize=6, zorder=5)
    axes.plot([], [], look.marker, color=color, label=plain_name(LORA_EACH), markersize=7)


def _draw_curve(
    axes: Any,
    all_curves: Sequence[Result],
    label: str,
    mode: Mode,
    average: Average,
    z_order: float,
) -> None:
    """Draw the average of a method over the seeds, and a faint line for each seed."""
    method = all_curves[0].method
    ranks = all_curves[0].ranks
    color = LOOKS[method].color(mode)
    for curve in all_curves:
        shares = [100 * share for share in curve.curve.accuracy]
        axes.plot(ranks, shares, color=color, alpha=0.3, linewidth=1, zorder=z_order - 1)
    axes.plot(
        ranks,
        [average(accuracies(all_curves, rank)) for rank in ranks],
        marker=LOOKS[method].marker,
        color=color,
        label=label,
        linewidth=2.2,
        markersize=6,
        zorder=z_order,
    )


def _describe_seeds(all_curves: Sequence[Result], average: str) -> str:
    seeds_by_task: dict[str, set[int]] = {}
    for curve in all_curves:
        seeds_by_task.setdefault(curve.task, set()).add(curve.seed)
    counts = sorted({len(seeds) for seeds in seeds_by_task.values()})
    seeds = " or ".join(map(str, counts))
    return f"{average} of {seeds} seeds; a faint line is a seed, a star is a single run"


def _draw_legend(figure: Any, num_columns: int = 2) -> None:
    """Draw the legend of all panels below them."""
    lines_by_label: dict[str, Any] = {}
    for axes in figure.axes:
        lines, labels = axes.get_legend_handles_labels()
        lines_by_label.update(zip(labels, lines, strict=True))
    figure.legend(
        lines_by_label.values(),
        lines_by_label.keys(),
        loc="outside lower center",
        ncols=num_columns,
        handlelength=2.2,
    )


def deployments_of_p(figure: Any, mode: Mode) -> None:
    """Draw a line for each adapter that was tested in all deployments, and a dot for other seeds.

    The dots are of the rate that was chosen for the deployment.
    """
    figure.set_size_inches(7.0, 4.6)
    axes = figure.subplots()
    study = load_study("rest")
    deployments = {parse_method(method)[1]: method for method in P_DEPLOYMENTS}
    runs = [
        run
        for job, run in study.load_runs().items()
        if (job.recipe, job.split) == ("matryoshka", "test") and deployments.keys() <= {*run.curves}
    ]
    runs.sort(key=lambda run: -run.job.learning_rate)
    for method, (label, look) in P_DEPLOYMENTS.items():
        color = look.color(mode)
        for run, line in zip(runs, ("-", "--"), strict=True):
            shares = [100 * share for share in run.curves[parse_method(method)[1]].accuracy]
            axes.plot(run.ranks, shares, look.marker, ls=line, color=color, markersize=5)
        for curve in curves("rest"):
            if curve.method == method and curve.seed != runs[0].job.seed:
                shares = [100 * share for share in curve.curve.accuracy]
                axes.plot(curve.ranks, shares, ".", color=color, alpha=0.55, markersize=7)
        axes.plot([], [], look.marker, ls="-", color=color, label=label)
    rate, dashed_rate = (run.job.learning_rate for run in runs)
    axes.plot([], [], ".", color=mode.muted, label="other seeds, at the chosen rate")
    set_rank_axis(axes, runs[0].ranks, "rank at which the adapter is used")
    axes.set_ylim(-2, None)
    axes.set_ylabel("right answers in %")
    axes.set_title(f"chain_sum, P, rate {rate:g} (dashed: {dashed_rate:g})")
    _draw_legend(figure)


def reordering(figure: Any, mode: Mode) -> None:
    """Draw the divergence of each order against the size, with a dot for each adapter."""
    figure.set_size_inches(12.0, 4.2)
    panels = figure.subplots(1, len(TASK_NAMES), sharey=True)
    for axes, (task, name) in zip(panels, TASK_NAMES.items(), strict=True):
        for (order, allocation), (label, look) in ORDER_LOOKS.items():
            color = look.color(mode)
            values_by_rank = {rank: divergences(task, rank, order, allocation) for rank in SIZES}
            for rank, values in values_by_rank.items():
                axes.plot([rank] * len(values), values, ".", color=color, markersize=7)
            medians = [median(values) for values in values_by_rank.values()]
            axes.plot([*SIZES], medians, color=color, linewidth=1.8, label=label)
        set_rank_axis(axes, [*SIZES], "size")
        axes.set_xticks([*SIZES], [*SIZES.values()])
        axes.set_yscale("log")
        axes.set_title(name.replace("`", "").replace(", ", ",\n"), fontsize=10)
    panels[0].set_ylabel("divergence from the whole LoRA,\nnats per token")
    _draw_legend(figure, num_columns=4)


# One adapter.


def singular(figure: Any, mode: Mode) -> None:
    """Draw the components of a trained layer, as trained and reordered."""
    figure.set_size_inches(9.0, 4.2)
    layer = json.loads((ROOT / "research" / "runs" / "singular.json").read_text(encoding="utf-8"))
    left, right = figure.subplots(1, 2)
    for order, method, label in (
        ("trained", "lora/prefix", "as trained"),
        ("svd", "lora/svd", "reordered by SVD"),
    ):
        norms = layer[order]["norms"]
        errors = [100 * error for error in layer[order]["missing"][1:]]
        components = range(1, len(norms) + 1)
        for axes, values in ((left, norms), (right, errors)):
            axes.plot(
                components,
                values,
                color=LOOKS[method].color(mode),
                marker=LOOKS[method].marker,
                markersize=4,
                linewidth=2,
                label=label,
            )
    ranks = Nesting.powers_of_two(len(layer["svd"]["norms"])).ranks
    set_rank_axis(left, ranks, "component, in its order")
    set_rank_axis(right, ranks, "rank of the prefix")
    left.set_title("Norm of each component")
    right.set_title("Relative error of the prefix, in %")
    left.set_ylim(0, None)
    right.set_ylim(-3, 103)
    _draw_legend(figure)


# The method.


def method(figure: Any, mode: Mode) -> None:
    """Draw rank 2 of an adapter of rank 8: the first columns of B and rows of A."""
    from matplotlib.patches import Rectangle

    figure.set_size_inches(6.6, 2.7)
    axes = figure.subplots()
    max_rank = 8
    rank = 2
    prefix_color = LOOKS[TRAINED].color(mode)
    distance = 2 / (max_rank - 1)
    for index in range(max_rank):
        in_prefix = index < rank
        color = prefix_color if in_prefix else mode.muted
        alpha = 1.0 if in_prefix else 0.45
        column = Rectangle((0.6 + distance * index, 0.6), 0.2, 2.2)
        row = Rectangle((3.9, 2.6 - distance * index), 3.2, 0.2)
        for rectangle in (column, row):
            rectangle.set(color=color, alpha=alpha, linewidth=0)
            axes.add_patch(rectangle)
    for x, text in ((0.25, "s ·"), (3.3, "·"), (7.5, "· x")):
        axes.text(x, 1.7, text, va="center", ha="center", fontsize=13)
    axes.text(0.6, 3.05, f"B: {max_rank} columns")
    axes.text(3.9, 3.05, f"A: {max_rank} rows")
    axes.text(
        0.6, 0.15, f"rank {rank}: the first {rank} of each", color=prefix_color, weight="bold"
    )
    axes.text(3.9, 0.15, f"rank {max_rank}: all of them")
    axes.set(xlim=(0, 7.9), ylim=(0, 3.4), aspect="equal")
    axes.set_axis_off()


def p(figure: Any, mode: Mode) -> None:
    """Draw the paper's diagonal for R = 32."""
    figure.set_size_inches(8.0, 2.9)
    axes = figure.subplots()
    nesting = Nesting.powers_of_two(32)
    values = nesting.diagonal().tolist()
    color = LOOKS["matryoshka/svd"].color(mode)
    axes.bar(range(1, len(values) + 1), values, color=color, width=0.8)
    axes.set_xticks(nesting.ranks)
    axes.set_xlim(0.3, len(values) + 0.7)
    axes.set_yticks(range(int(max(values)) + 1))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("component (a tick at each nested rank)")
    axes.set_ylabel("entry of P")
    axes.set_title("Entry i of P: the number of nested ranks that have component i")


FIGURES: Mapping[str, Callable[[Any, Mode], None]] = {
    "face": face,
    "method": method,
    "p": p,
    "singular": singular,
    "low": low,
    "methods": methods,
    "reordering": reordering,
    "deployments_of_p": deployments_of_p,
}

if __name__ == "__main__":
    main()
