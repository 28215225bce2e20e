"""What people see of an evaluation: a table, a picture and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from matryoshka_lora.evaluation.drawing import part, question
from matryoshka_lora.formats.card import metric_name, with_error

PAGE_NAME = "report.html"

MOST_EXAMPLES = 1000
"""Of each task: a browser is slow with a file of many megabytes. ``examples.jsonl`` has all."""

_PLACE = "{{evaluation}}"

# Okabe and Ito's colours, which differ for every kind of colour vision; a marker of its own tells each curve in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "D", "^", "v", "P")


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
    about = [(name, metric_name(task["metric"]), f"{task['items']} questions, {_shots(task)}") for name, task in tasks]
    made = Group(
        Text(f"{evaluation['adapter']['name']} on {evaluation['model']} ({evaluation['dtype']}, {evaluation['mode']})"),
        found,
        *(Text(f"  {name}: {metric}, {asked}") for name, metric, asked in about),
        Text("  ± is one standard error over the questions"),
    )
    needed = Console(width=1000).measure(found).maximum
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
        label = f"{name} ({metric_name(task['metric'])})"
        axes.errorbar(ranks, values, [error or 0 for error in first["stderr"]], label=label, capsize=4, **style)
        if first["base"] is not None and first["base"]["value"] is not None:
            axes.axhline(first["base"]["value"], color=colour, linestyle="--", linewidth=1.5)
    about = evaluation["adapter"]["name"], evaluation["model"]
    _rank_axis(axes, ranks, f"{about[0]} on {about[1]}: bars are standard errors, dashes the base model")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=15, frameon=False)
    figure.savefig(path)


def _shots(task: Mapping[str, Any]) -> str:
    return f"{task['num_fewshot'] or 0} shots"


def _rank_axis(axes: Any, ranks: Sequence[int], title: str) -> None:
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


def page(evaluation: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    """The text of ``report.html``.

    Args:
        evaluation: The content of ``evaluation.json``.
        examples: The lines of ``examples.jsonl``. Of a task with more than `MOST_EXAMPLES`, those stay that ranks score
            differently, as far as there is room; prompts and answers are shortened.
    """
    by_task: dict[str, list[dict[str, Any]]] = {name: [] for name in evaluation["tasks"]}
    for example in examples:
        metric = evaluation["tasks"][example["task"]]["metric"]
        by_task[example["task"]].append(question(example, metric))
    shown = {name: _those_shown(rows) for name, rows in by_task.items()}
    counts = {name: len(rows) for name, rows in by_task.items()}
    data = json.dumps(
        {"evaluation": evaluation, "examples": shown, "all": counts},
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )
    template = part("page.html")
    for name in ("drawing.css", "drawing.js"):
        template = template.replace(f"{{{{{name}}}}}", part(name).rstrip(), 1)
    # Inside a script element, only "<" can begin something else: "</script>", or "<!--".
    return template.replace(_PLACE, data.replace("<", "\\u003c"), 1)


def _those_shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def agrees(row: dict[str, Any]) -> bool:
        return len({score for rank, score in row["scores"].items() if rank != "0"}) <= 1

    return sorted(sorted(rows, key=agrees)[:MOST_EXAMPLES], key=lambda row: row["id"])
