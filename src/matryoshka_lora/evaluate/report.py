"""What people look at: the curve as a picture, and one page with all there is."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from matryoshka_lora.budget import show_bytes
from matryoshka_lora.evaluate.results import Evaluation, with_error

_MOST_EXAMPLES = 200
"""Of each task; ``examples.jsonl`` has all."""

# Okabe and Ito's colours, which differ for every kind of colour vision; markers tell them in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = "osD^vP"

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #8886; text-align: left; vertical-align: top }}
td.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }}
img {{ max-width: 100%; background: white; border-radius: .5rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .85rem }}
.right {{ color: #080 }} .wrong {{ color: #c33 }}
@media (prefers-color-scheme: dark) {{ .right {{ color: #7d7 }} .wrong {{ color: #f88 }} }}
</style>
<h1>{title}</h1>
<p>{about}</p>
<img alt="Each task's first metric against the rank" src="data:image/png;base64,{picture}">
{tables}
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
    for number, name in enumerate(evaluation.shown):
        metric = evaluation.metric(name)
        value, error = (
            [math.nan if (v := metric[kind].get(rank)) is None else v for rank in ranks]
            for kind in ("value", "stderr")
        )
        colour = _COLOURS[number % len(_COLOURS)]
        style = {"color": colour, "marker": _MARKERS[number % len(_MARKERS)], "capsize": 3}
        label = f"{name} ({evaluation.tasks[name]['metric'].partition(',')[0]})"
        axes.errorbar(
            ranks, value, [0 if math.isnan(e) else e for e in error], label=label, **style
        )
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
    told = [about.get(key) for key in ("adapter", "model", "dtype")]
    parts = [part for name in evaluation.shown for part in _task(evaluation, name)]
    return _PAGE.format(
        title=escape(
            f"{Path(about.get('adapter') or 'adapter').name} at {len(evaluation.ranks)} ranks"
        ),
        about=escape(" · ".join(str(each) for each in told if each)),
        picture=base64.b64encode(picture.getvalue()).decode(),
        tables="\n".join(parts),
    )


def _task(evaluation: Evaluation, name: str) -> Iterator[str]:
    task, metric = evaluation.tasks[name], evaluation.metric(name)
    area = "" if task["aurac"] is None else f", area under the curve {task['aurac']:.3f}"
    yield f"<h2>{escape(name)}</h2>"
    yield f"<p>{escape(task['metric'])}, {task['items']} questions{area}.</p>"
    rows = []
    for rank, value in metric["value"].items():
        size = show_bytes(evaluation.bytes[rank]) if rank else ""
        cells = (str(rank) if rank else "none", with_error(value, metric["stderr"].get(rank)), size)
        rows.append([f'<td class="number">{escape(cell)}</td>' for cell in cells])
    yield _table(("rank", task["metric"].partition(",")[0], "size"), rows)
    mine = [e for e in evaluation.examples if name in (e["task"], e.get("group"))]
    apart = [e for e in mine if len({s for r, s in _scores(e, task).items() if r != "0"}) > 1]
    yield f"<h3>Where ranks differ: {len(apart)} of {len(mine)} questions</h3>"
    if len(apart) > _MOST_EXAMPLES:
        yield f"<p>The first {_MOST_EXAMPLES}; examples.jsonl has all.</p>"
    rows = []
    for example in apart[:_MOST_EXAMPLES]:
        scores, answers = _scores(example, task), []
        for rank, answer in example["answers"].items():
            kind = {1.0: "right", 0.0: "wrong"}.get(scores.get(rank, math.nan), "")
            said = escape(f"{rank if rank != '0' else 'none'}: {answer}")
            answers.append(f'<pre class="{kind}">{said}</pre>')
        cells = [f"<pre>{escape(example[key][-600:])}</pre>" for key in ("prompt", "target")]
        rows.append([f"<td>{cell}</td>" for cell in (*cells, "".join(answers))])
    if rows:
        yield _table(("question", "right answer", "answers by rank"), rows)


def _scores(example: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, float]:
    return dict(example["metrics"].get(task["metric"], {}))


def _table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
