"""What people look at: the curve as a picture, and one page with all there is."""

from __future__ import annotations

import base64
import math
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from matryoshka_lora.evaluation.results import Evaluation

# Okabe and Ito's colours, which differ for every kind of colour vision; markers tell them in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = "osD^vP"

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem }}
pre {{ overflow-x: auto }}
img {{ max-width: 100%; background: white; border-radius: .5rem }}
</style>
<h1>{title}</h1>
<p>{about}</p>
<img alt="Each task's first metric against the rank" src="data:image/png;base64,{picture}">
<pre>{table}</pre>
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
        table=escape("\n".join(evaluation.lines())),
    )


def _short(evaluation: Evaluation, task: str) -> str:
    return str(evaluation.tasks[task]["metric"]).partition(",")[0]
