"""What people look at: the curve as a picture, and one page with all there is."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from matryoshka_lora.budget import show_bytes
from matryoshka_lora.evaluate.results import Evaluation, with_error

_MOST_EXAMPLES = 200  # of each task; examples.jsonl has all

# Okabe and Ito's colours, which differ for every kind of colour vision; markers tell them in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = "osD^vP"

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #8886; vertical-align: top }}
th {{ text-align: left }}
img {{ max-width: 100%; background: white; border-radius: .5rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .85rem }}
.right {{ color: light-dark(#080, #7d7) }} .wrong {{ color: light-dark(#b22, #f88) }}
</style>
<h1>{title}</h1>
<p>{about}</p>
<img alt="Each task's first metric against the rank" src="data:image/png;base64,{picture}">
{tasks}
</html>
"""


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
        axes.errorbar(ranks, value, error, label=f"{name} ({_short(evaluation, name)})", **style)
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


def page(evaluation: Evaluation) -> str:
    """Return the text of ``report.html``, which needs no other file."""
    picture, about = BytesIO(), evaluation.about
    draw(evaluation, picture)
    name = Path(about.get("adapter") or "adapter").name
    told = [about.get(key) for key in ("adapter", "model", "dtype")]
    return _PAGE.format(
        title=escape(f"{name} at {len(evaluation.ranks)} ranks"),
        about=escape(" · ".join(str(each) for each in told if each)),
        picture=base64.b64encode(picture.getvalue()).decode(),
        tasks="\n".join(part for name in evaluation.tasks for part in _task(evaluation, name)),
    )


def _short(evaluation: Evaluation, task: str) -> str:
    return str(evaluation.tasks[task]["metric"]).partition(",")[0]


def _task(evaluation: Evaluation, name: str) -> Iterator[str]:
    task, metric = evaluation.tasks[name], evaluation.metric(name)
    area = "" if task["aurac"] is None else f", area under the curve {task['aurac']:.3f}"
    yield f"<h2>{escape(name)}</h2><p>{task['items']} questions{area}.</p>"
    rows: list[tuple[str, ...]] = []
    for rank, value in metric["value"].items():
        size = show_bytes(evaluation.bytes[rank]) if rank else ""
        rows.append((str(rank or "none"), with_error(value, metric["stderr"][rank]), size))
    yield _table(("rank", _short(evaluation, name), "size"), rows)
    mine = [e for e in evaluation.examples if e["task"] == name]
    scores = [e["metrics"].get(task["metric"], {}) for e in mine]
    apart = [
        (example, own)
        for example, own in zip(mine, scores, strict=True)
        if len({score for rank, score in own.items() if rank != "0"}) > 1
    ]
    yield f"<h3>Where ranks differ: {len(apart)} of {len(mine)} questions</h3>"
    rows = []
    for example, own in apart[:_MOST_EXAMPLES]:
        answers = [
            f'<pre class="{ {1.0: "right", 0.0: "wrong"}.get(own.get(rank, 2.0), "") }">'
            f"{'none' if rank == '0' else rank}: {escape(answer)}</pre>"
            for rank, answer in example["answers"].items()
        ]
        texts = [f"<pre>{escape(example[key][-600:])}</pre>" for key in ("prompt", "target")]
        rows.append((*texts, "".join(answers)))
    yield _table(("question (its end)", "right answer", "answers by rank"), rows)
    if len(apart) > _MOST_EXAMPLES:
        yield f"<p>These are the first {_MOST_EXAMPLES}; examples.jsonl has all.</p>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose heads and cells are HTML."""
    head = "".join(f"<th>{each}</th>" for each in heads)
    body = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{each}</tr>' for each in body)}</table>"
