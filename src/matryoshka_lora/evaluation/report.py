"""What people see of an evaluation: a table, a picture, a file, a sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.curve import Curve, Evaluation
from matryoshka_lora.evaluation.reading import EXAMPLES_NAME
from matryoshka_lora.files import EVALUATION_NAME, PICTURE_NAME, replace_directory
from matryoshka_lora.metrics import aurac, with_error

# Okabe and Ito's colours, which differ for every kind of colour vision; a marker of its own tells each curve in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "D", "^", "v", "P")


def write_evaluation(
    evaluation: Evaluation,
    folder: str | PathLike[str],
    deployed: Mapping[str, Any] | None = None,
    examples: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write ``evaluation.json`` and ``curve.png`` into a folder; its other files stay.

    Args:
        evaluation: All curves.
        folder: Where to write.
        deployed: That curve in the form of ``matryoshka eval``, beside all of them: `Evaluation.deployed`.
        examples: The lines of ``examples.jsonl`` for it.

    Raises:
        MatryoshkaError: The folder cannot be written.
    """
    with replace_directory(folder) as unfinished:
        text = json.dumps({**(deployed or {}), **evaluation.to_dict()}, indent=2, allow_nan=False) + "\n"
        (unfinished / EVALUATION_NAME).write_text(text, encoding="utf-8")
        if examples:
            lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
            (unfinished / EXAMPLES_NAME).write_text(lines, encoding="utf-8")
        draw(evaluation, unfinished / PICTURE_NAME)


def accuracy_table(evaluation: Evaluation) -> Group:
    """The accuracy of every curve at every rank, in percent, and what sums a curve up."""
    found, ranks = _table(evaluation, ("AURAC", "linear", "mean", "gap"))
    for name, curve in evaluation.curves.items():
        by_rank = dict(zip(curve.ranks, map(_percent, curve.accuracy), strict=True))
        summary = (*curve.aurac.values(), curve.mean_accuracy, curve.worst_rank_gap)
        found.add_row(name, *(by_rank.get(rank, "") for rank in ranks), *map(_percent, summary))
    return Group(
        Text(f"Accuracy in % at each rank; {evaluation.items} questions of {evaluation.task} ({evaluation.split})"),
        found,
        f"base model without adapter: {_percent(evaluation.base.accuracy)}",
        "AURAC: mean height of the curve over log2(rank); linear: over the rank",
        "gap: from the largest rank down to the worst one",
    )


def loss_table(evaluation: Evaluation) -> Group:
    """The held-out loss of every curve at every rank, in nats per token."""
    found, ranks = _table(evaluation, ())
    for name, curve in evaluation.curves.items():
        by_rank = {rank: f"{loss:.3f}" for rank, loss in zip(curve.ranks, curve.loss, strict=True)}
        found.add_row(name, *(by_rank.get(rank, "") for rank in ranks))
    base = f"base model without adapter: {evaluation.base.loss:.3f}"
    return Group("Held-out loss at each rank, in nats per token", found, base)


def print_tables(evaluation: Evaluation) -> None:
    """Print both tables, as wide as they need to be."""
    for made in (accuracy_table(evaluation), loss_table(evaluation)):
        needed = Console(width=1000).measure(made).minimum
        Console(width=max(Console().width, needed), highlight=False).print(made, "")


def compare(first: Curve, second: Curve, by: Literal["aurac", "loss"] = "aurac") -> tuple[float, float]:
    """How much more AURAC (log2), or mean loss over the ranks, the first curve has, and the standard error of that.

    Both are measured on the same questions, so the error is that of the mean of each question's own difference: AURAC
    is linear in the accuracies. It is about other questions of this kind, and says nothing of other training seeds.

    Raises:
        MatryoshkaError: The curves have other ranks or another number of questions.
    """
    questions = {len(scores.correct) for curve in (first, second) for scores in curve.scores}
    if first.ranks != second.ranks or len(questions) != 1:
        raise MatryoshkaError("only curves over the same ranks and the same questions can be compared")
    values = _aurac_by_question if by == "aurac" else _loss_by_question
    differences = [a - b for a, b in zip(values(first), values(second), strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return fmean(differences), error


def in_words(evaluation: Evaluation) -> str:
    """What the numbers say, in words: the best curve by accuracy and by loss, and whether it is more than chance."""
    curves = evaluation.curves
    if len(curves) == 1:
        (name, curve) = next(iter(curves.items()))
        return f"{name} has AURAC {_percent(curve.aurac['log2'])} %."
    best = max(curves, key=lambda name: curves[name].aurac["log2"])
    lowest = min(curves, key=lambda name: fmean(curves[name].loss))
    accuracy = {name: compare(curves[best], curve) for name, curve in curves.items() if name != best}
    loss = {name: compare(curves[lowest], curve, by="loss") for name, curve in curves.items() if name != lowest}
    return (
        f"By accuracy, {best} is best, with AURAC (log2) {_percent(curves[best].aurac['log2'])} %: "
        f"{_against(accuracy, 100, '.1f')}.\n"
        f"By loss, {lowest} is best, with {fmean(curves[lowest].loss):.3f} in the mean over the ranks: "
        f"{_against(loss, 1, '.3f')}.\n"
        f"In brackets: the difference, ± two standard errors over the {evaluation.items} questions. One training run "
        "each: another seed may change more."
    )


def draw(evaluation: Evaluation, path: Path) -> None:
    """Draw accuracy and loss against rank as a picture of 1600 x 760 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator

    layout = ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.15)
    figure = Figure(figsize=(16, 7.6), dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{evaluation.task}: one adapter, every rank   ({evaluation.model}, {evaluation.items} {evaluation.split} "
        "questions)",
        fontsize=18,
    )
    panels: Any = figure.subplots(1, 2)
    curves = evaluation.curves.items()
    accuracies = [(name, curve.ranks, [100 * a for a in curve.accuracy]) for name, curve in curves]
    error = 50 / math.sqrt(evaluation.items)
    title = f"Accuracy (%), higher is better; standard error up to {error:.1f}"
    _panel(panels[0], title, accuracies, 100 * evaluation.base.accuracy)
    panels[0].set_ylim(bottom=min(0.0, panels[0].get_ylim()[0]))
    losses = [(name, curve.ranks, curve.loss) for name, curve in curves]
    _panel(panels[1], "Held-out loss (nats per token, log scale), lower is better", losses, evaluation.base.loss)
    # The base model's loss is often ten times that of the best ranks, whose differences would vanish.
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panels[1].yaxis.set_major_formatter("{x:g}")
    panels[1].minorticks_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=15, frameon=False)
    figure.savefig(path)


def print_tasks(evaluation: Mapping[str, Any]) -> None:
    """Print each task's first metric at every rank, with its standard error; ``evaluation`` is the file's content."""
    found = Table(box=SIMPLE, padding=0, pad_edge=False, collapse_padding=True)
    for heading in ("rank", *evaluation["tasks"]):
        found.add_column(heading, justify="right", no_wrap=True)
    firsts = [task["metrics"][task["metric"]] for task in evaluation["tasks"].values()]
    base = [with_error(first["base"]["value"], first["base"]["stderr"]) if first["base"] else "" for first in firsts]
    found.add_row("none", *base)
    for number, rank in enumerate(evaluation["ranks"]):
        found.add_row(str(rank), *(with_error(first["value"][number], first["stderr"][number]) for first in firsts))
    tasks = evaluation["tasks"].items()
    lines = [f"  {name}: {task['metric']}, {task['items']} questions, {_shots(task)}" for name, task in tasks]
    made = Group(
        Text(f"{evaluation['adapter']['name']} on {evaluation['model']} ({evaluation['dtype']}, {evaluation['mode']})"),
        found,
        *map(Text, lines),
        Text("  ± is one standard error over the questions"),
    )
    needed = Console(width=1000).measure(made).minimum
    Console(width=max(Console().width, needed), highlight=False).print(made, "")


def draw_tasks(evaluation: Mapping[str, Any], path: Path) -> None:
    """Draw each task's first metric against rank, with its standard error; 1600 x 760 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    ranks = evaluation["ranks"]
    for number, (name, task) in enumerate(evaluation["tasks"].items()):
        first, colour = task["metrics"][task["metric"]], _COLOURS[number % len(_COLOURS)]
        values = [math.nan if value is None else value for value in first["value"]]
        style = {"color": colour, "marker": _MARKERS[number % len(_MARKERS)], "linewidth": 2.5, "markersize": 12}
        label = f"{name} ({task['metric']})"
        axes.errorbar(ranks, values, [error or 0 for error in first["stderr"]], label=label, capsize=4, **style)
        if first["base"] is not None and first["base"]["value"] is not None:
            axes.axhline(first["base"]["value"], color=colour, linestyle="--", linewidth=1.5)
    about = evaluation["adapter"]["name"], evaluation["model"]
    rank_axis(axes, ranks, f"{about[0]} on {about[1]}: bars are standard errors, dashes the base model")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=15, frameon=False)
    figure.savefig(path)


def _shots(task: Mapping[str, Any]) -> str:
    return f"{task['num_fewshot'] or 0} shots"


def _table(evaluation: Evaluation, summary: Sequence[str]) -> tuple[Table, list[int]]:
    ranks = sorted({rank for curve in evaluation.curves.values() for rank in curve.ranks})
    found = Table(box=SIMPLE, padding=0, pad_edge=False)
    found.add_column("", no_wrap=True)
    for heading in (*map(str, ranks), *summary):
        found.add_column(heading, justify="right", no_wrap=True)
    return found, ranks


def _panel(axes: Any, title: str, curves: Sequence[tuple[str, Sequence[int], Sequence[float]]], base: float) -> None:
    for number, (name, ranks, values) in enumerate(curves):
        axes.plot(
            ranks,
            values,
            label=name,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linewidth=2.5,
            # Where curves meet, the markers of the first still show behind those of the last.
            markersize=14 - 1.5 * (number % len(_MARKERS)),
            markeredgecolor="white",
        )
    axes.axhline(base, color="#555555", linestyle="--", linewidth=2, label="base model")
    rank_axis(axes, sorted({rank for _, ranks, _ in curves for rank in ranks}), title)


def rank_axis(axes: Any, ranks: Sequence[int], title: str) -> None:
    """Give matplotlib's axes their title, a grid, and a horizontal axis of these ranks, by powers of two."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.tick_params(labelsize=14)
    axes.minorticks_off()
    axes.set_xlabel("rank at which the adapter is used", fontsize=15)
    axes.set_title(title, fontsize=16, loc="left")
    axes.grid(color="#DDDDDD", linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _aurac_by_question(curve: Curve) -> list[float]:
    rows = zip(*(scores.correct for scores in curve.scores), strict=True)
    return [aurac([float(correct) for correct in row], curve.ranks) for row in rows]


def _loss_by_question(curve: Curve) -> list[float]:
    """Each question's part of the loss, scaled so that their mean is the mean loss over the ranks."""
    tokens = curve.scores[0].tokens / len(curve.scores[0].nll)
    return [fmean(row) / tokens for row in zip(*(scores.nll for scores in curve.scores), strict=True)]


def _against(differences: dict[str, tuple[float, float]], unit: float, digits: str) -> str:
    groups: dict[str, list[str]] = {"ahead of": [], "not surely ahead of": []}
    for name, (difference, error) in sorted(differences.items(), key=lambda item: abs(item[1][0])):
        group = groups["ahead of" if abs(difference) > 2 * error else "not surely ahead of"]
        group.append(f"{name} ({unit * difference:+{digits}} ± {2 * unit * error:{digits}})")
    return "; ".join(f"{words} {', '.join(names)}" for words, names in groups.items() if names)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
