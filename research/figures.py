"""Draw all pictures of the documentation from files of the repository::

    python -m research.figures        # into docs/figures; about 20 seconds of one core

Each picture is written twice, NAME-light.svg and NAME-dark.svg. The same files give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matryoshka_lora import Nesting
from research import stats
from research.looks import LOOKS, MODES, Mode, rank_axis
from research.plan import Result, results
from research.stats import Value
from research.study import EACH, load_study

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "figures"

FACE = ("lora/trained", "lora/squeezed", EACH, "lora/svd")
METHODS = (EACH, "matryoshka/svd", "lora/svd", "lora/prefix", "matryoshka/prefix")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, help="the folder to write to (default: docs/figures)"
    )
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for name, data in files():
        (given.out / name).write_bytes(data)
        print(given.out / name)


def files(*names: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file, of all pictures or of these."""
    for name in names or PICTURES:
        for mode in MODES:
            yield _drawn(f"{name}-{mode.name}", PICTURES[name], mode)


def _drawn(name: str, draw: Callable[[Any, Mode], None], mode: Mode) -> tuple[str, bytes]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_style(mode), "svg.hashsalt": name}):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, mode)
        svg = BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        return f"{name}.svg", svg.getvalue()


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
        "grid.color": mode.grid,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"),
            mode.ink,
        ),
        "axes.edgecolor": mode.quiet,
    }


@cache
def curves(study: str) -> tuple[Result, ...]:
    """Return every finished curve of a study, from the recorded runs."""
    read = load_study(study)
    return tuple(results(read, read.load_runs()))


def _json(name: str) -> Any:
    return json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))


# Curves of several methods.


def face(figure: Any, mode: Mode) -> None:
    """Draw one adapter at every rank beside its rivals, on 256 facts."""
    figure.set_size_inches(8.4, 4.9)
    axes = figure.subplots()
    found = list(curves("every256"))
    methods = [method for method in FACE if any(result.method == method for result in found)]
    _accuracies(axes, found, methods, mode, median)
    axes.set_ylim(-4, 104)
    axes.set_ylabel("right answers in %")
    figure.suptitle(
        "256 facts, learned by heart: how many does the adapter know at each rank?",
        x=0.01,
        ha="left",
    )
    axes.set_title(_of_seeds(found, "the median"), color=mode.quiet, fontsize=10)
    _legend(figure)


def methods(figure: Any, mode: Mode) -> None:
    """Draw five methods on the three tasks of the headline study."""
    figure.set_size_inches(9.6, 4.6)
    found = curves("headline")
    tasks = list(dict.fromkeys(result.task for result in found))
    panels = figure.subplots(1, len(tasks), sharey=True)
    for axes, task in zip(panels, tasks, strict=True):
        _accuracies(axes, [result for result in found if result.task == task], METHODS, mode)
        axes.set_title(task)
        axes.set_xlabel("rank")
    top = max(100 * max(result.curve.accuracy) for result in found if result.method in METHODS)
    panels[0].set_ylim(-3, min(103, top + 4))
    panels[0].set_ylabel("right answers in %")
    figure.suptitle(_of_seeds(found, "the mean"), color=mode.quiet, x=0.01, ha="left", fontsize=10)
    _legend(figure)


def _accuracies(
    axes: Any,
    found: Sequence[Result],
    methods: Sequence[str],
    mode: Mode,
    middle: Callable[[Sequence[float]], float] = fmean,
) -> None:
    """Draw the middle of the seeds with a faint line for each, and every separate run."""
    for number, method in enumerate(methods):
        look = LOOKS[method]
        ranks = next(result.ranks for result in found if result.method == method)
        by_rank = [
            [100 * share for share in _values(found, method, stats.accuracy_at(rank))]
            for rank in ranks
        ]
        colour, order = look.colour(mode), 4 - 0.1 * number  # the first method lies on top
        if method == EACH:
            for rank, some in zip(ranks, by_rank, strict=True):
                # Side by side on the right of the curves, so that equal ones are seen.
                places = [rank * 2 ** (0.07 + 0.16 * seed / len(some)) for seed in range(len(some))]
                axes.plot(places, some, look.marker, color=colour, markersize=6, zorder=5)
            axes.plot([], [], look.marker, color=colour, label=look.name, markersize=7)
        else:
            for one in (result for result in found if result.method == method):
                shares = [100 * share for share in one.curve.accuracy]
                axes.plot(ranks, shares, color=colour, alpha=0.3, linewidth=1, zorder=order - 1)
            style = {
                "color": colour,
                "label": look.name,
                "linewidth": 2.2,
                "markersize": 6,
                "zorder": order,
            }
            axes.plot(ranks, list(map(middle, by_rank)), marker=look.marker, **style)
    rank_axis(axes, sorted({rank for result in found for rank in result.ranks}))


def _of_seeds(found: Sequence[Result], middle: str) -> str:
    counts = sorted(
        {
            len({one.seed for one in found if one.task == task})
            for task in {one.task for one in found}
        }
    )
    seeds = f"{' or '.join(map(str, counts))} seeds"
    return f"{middle} of {seeds}; a faint line is a seed, a star one run"


def _values(found: Sequence[Result], method: str, value: Value) -> list[float]:
    return list(stats.values(found, method, value).values())


def _legend(figure: Any) -> None:
    """Put a legend of what any panel has below the panels."""
    found = {
        label: line
        for axes in figure.axes
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=2, handlelength=2.2
    )


# One adapter.


def singular(figure: Any, mode: Mode) -> None:
    """Draw the directions of one trained layer in two orders."""
    figure.set_size_inches(9.0, 4.2)
    found = _json("singular.json")
    left, right = figure.subplots(1, 2)
    looks = {
        "trained": (LOOKS["lora/prefix"], "as trained"),
        "svd": (LOOKS["lora/svd"], "reordered by SVD"),
    }
    for order, (look, label) in looks.items():
        style = {
            "color": look.colour(mode),
            "marker": look.marker,
            "markersize": 4,
            "linewidth": 2,
            "label": label,
        }
        norms, missing = found[order]["norms"], found[order]["missing"]
        left.plot(range(1, len(norms) + 1), norms, **style)
        right.plot(range(1, len(missing)), [100 * share for share in missing[1:]], **style)
    ranks = Nesting.powers_of_two(len(norms)).ranks
    rank_axis(left, ranks, "direction, in its order")
    rank_axis(right, ranks, "directions in the prefix")
    left.set_title("Norm of each direction")
    right.set_title("What the prefix misses of the update, in %")
    left.set_ylim(0, None)
    right.set_ylim(-3, 103)
    _legend(figure)


# The method.


def method(figure: Any, mode: Mode) -> None:
    """Draw rank 2 of an adapter of rank 8: the first columns of B and rows of A."""
    from matplotlib.patches import Rectangle

    figure.set_size_inches(6.6, 2.7)
    axes = figure.subplots()
    rank, prefix = 8, 2
    on = LOOKS["lora/trained"].colour(mode)
    step = 2 / (rank - 1)
    for number in range(rank):
        style = {"color": on} if number < prefix else {"color": mode.quiet, "alpha": 0.45}
        axes.add_patch(Rectangle((0.6 + step * number, 0.6), 0.2, 2.2, linewidth=0, **style))
        axes.add_patch(Rectangle((3.9, 2.6 - step * number), 3.2, 0.2, linewidth=0, **style))
    middle, words = 1.7, {"va": "center", "ha": "center", "fontsize": 13}
    for x, text in ((0.25, "s ·"), (3.3, "·"), (7.5, "· x")):
        axes.text(x, middle, text, **words)
    axes.text(0.6, 3.05, f"B: {rank} columns")
    axes.text(3.9, 3.05, f"A: {rank} rows")
    axes.text(0.6, 0.15, f"rank {prefix}: the first {prefix} of each", color=on, weight="bold")
    axes.text(3.9, 0.15, f"rank {rank}: all of them")
    axes.set(xlim=(0, 7.9), ylim=(0, 3.4), aspect="equal")
    axes.set_axis_off()


def p(figure: Any, mode: Mode) -> None:
    """Draw the paper's diagonal for R = 32."""
    figure.set_size_inches(8.0, 2.9)
    axes = figure.subplots()
    nesting = Nesting.powers_of_two(32)
    values = nesting.diagonal().tolist()
    axes.bar(
        range(1, len(values) + 1), values, color=LOOKS["matryoshka/svd"].colour(mode), width=0.8
    )
    axes.set_xticks(nesting.ranks)
    axes.set_xlim(0.3, len(values) + 0.7)
    axes.set_yticks(range(int(max(values)) + 1))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("direction (a tick at each nested rank)")
    axes.set_ylabel("entry of P")
    axes.set_title("Entry i of P: to how many of the nested ranks direction i belongs")


PICTURES: Mapping[str, Callable[[Any, Mode], None]] = {
    picture.__name__: picture for picture in (face, method, p, singular, methods)
}

if __name__ == "__main__":
    main()
