"""The numbers of an evaluation, and their files.

``evaluation.json`` holds the fields of `Evaluation` but for the examples. Rank 0 is the base model.
``examples.jsonl`` has a line for each question, with the answers and metrics by rank.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple, SupportsFloat

from matryoshka_lora.budget import show_bytes
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.nesting import Nesting

NAME, EXAMPLES_NAME = "evaluation.json", "examples.jsonl"

_PROMPT_CHARACTERS = 2000  # of a prompt's end are kept; few-shot prompts would fill the disk


def aurac(
    accuracies: Sequence[float], ranks: Sequence[int], axis: Literal["log2", "linear"] = "log2"
) -> float:
    """Return the area under the rank-accuracy curve, divided by its width (arXiv 2605.07850).

    It is the trapezoid rule over ``log2(rank)``, or over the rank itself. On the linear axis the
    largest ranks have nearly all the weight, so ``"log2"`` is the one to compare by.

    Args:
        accuracies: One for each rank, in the unit that the result shall have.
        ranks: Increasing positive integers.
        axis: ``"log2"`` or ``"linear"``.

    Returns:
        A number in the unit of the accuracies; for a single rank, its accuracy.

    Raises:
        MatryoshkaError: The ranks do not increase, or there is no finite accuracy for each.
    """
    points = Nesting(tuple(ranks)).ranks
    if len(accuracies) != len(points) or not all(map(math.isfinite, accuracies)):
        raise MatryoshkaError(f"{list(accuracies)} is not one finite accuracy for each rank")
    if axis not in ("log2", "linear"):
        raise MatryoshkaError(f"axis is {axis!r}; write 'log2' or 'linear'")
    if len(points) == 1:
        return float(accuracies[0])
    x = [math.log2(rank) if axis == "log2" else float(rank) for rank in points]
    steps = range(len(x) - 1)
    area = sum((x[i + 1] - x[i]) * (accuracies[i] + accuracies[i + 1]) / 2 for i in steps)
    return area / (x[-1] - x[0])


class Difference(NamedTuple):
    """How much better one rank is than another, in the metric's unit, and the standard error.

    The value is positive where it is better, and the error is None where it is unknown.
    """

    value: float
    error: float | None


@dataclass
class Evaluation:
    """The numbers of an adapter at several ranks.

    Attributes:
        about: Adapter, model, dtype and what was asked.
        ranks: Increasing, without the base model.
        bytes: The size of the exported adapter at each rank.
        tasks: By name; see the module.
        examples: The lines of ``examples.jsonl``.
    """

    about: dict[str, Any]
    ranks: tuple[int, ...]
    bytes: dict[int, int]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def task(self, wanted: str | None = None) -> str:
        """Return the name of a task, or of the only one.

        Raises:
            MatryoshkaError: There is no such task, or there are several and none is named.
        """
        if wanted is None and len(self.tasks) == 1:
            return next(iter(self.tasks))
        if wanted in self.tasks:
            return str(wanted)
        problem = "has several tasks" if wanted is None else f"has no task {wanted!r}"
        names = ", ".join(self.tasks)
        raise MatryoshkaError(f"the evaluation {problem}; name one with task (--task): {names}")

    def metric(self, task: str | None = None) -> dict[str, Any]:
        """Return a task's first metric: ``higher_is_better``, ``value`` and ``stderr`` by rank.

        The task may be None where there is only one. Raises: as `task`.
        """
        found = self.tasks[self.task(task)]
        return dict(found["metrics"][found["metric"]])

    def values(self, task: str | None = None) -> dict[int, float | None]:
        """Return a task's first metric at each rank, without the base model; see `metric`."""
        values = self.metric(task)["value"]
        return {rank: values[rank] for rank in self.ranks}

    def difference(self, task: str | None, rank: int, other: int) -> Difference | None:
        """Return how much better a rank is than another one; None where a value is missing.

        The error is that of the mean difference at each question, where the questions' numbers are
        known and their mean is the metric. Otherwise the two values count as independent, so the
        error is too large where both ranks fail at the same questions.
        """
        task = self.task(task)
        name, metric = self.tasks[task]["metric"], self.metric(task)
        first, second = (metric["value"].get(each) for each in (rank, other))
        if first is None or second is None:
            return None
        better = (first - second) * (-1 if metric["higher_is_better"] is False else 1)
        scores = [e["metrics"].get(name, {}) for e in self.examples if e["task"] == task]
        pairs = [(s[str(rank)], s[str(other)]) for s in scores if {str(rank), str(other)} <= {*s}]
        means = map(fmean, zip(*pairs, strict=True))
        both = zip(means, (first, second), strict=False)  # without examples there are no means
        near = [math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in both]
        if len(pairs) > 1 and all(near):  # a perplexity or an F1 is no mean of the questions
            return Difference(better, stdev(a - b for a, b in pairs) / math.sqrt(len(pairs)))
        errors = [metric["stderr"].get(each) for each in (rank, other)]
        return Difference(better, None if None in errors else math.hypot(*errors))

    def lines(self) -> list[str]:
        """Return a table: one task's metrics by rank, or the first one of each of several tasks."""
        metrics = {task: self.metric(task) for task in self.tasks}
        if len(metrics) == 1:
            only = self.tasks[self.task()]["metrics"]
            metrics = {key.removesuffix(",none"): metric for key, metric in only.items()}
        rows = [["rank", "size", *metrics]]
        for rank in (0, *self.ranks):
            shown = [(m["value"].get(rank), m["stderr"].get(rank)) for m in metrics.values()]
            cells = [with_error(*each) for each in shown]
            if rank:
                rows.append([str(rank), show_bytes(self.bytes[rank]), *cells])
            elif any(cells):
                rows.append(["base", "", *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
        for name, task in self.tasks.items():
            shots = task["num_fewshot"] or 0
            lines.append(f"{name}: {task['metric']}, {task['items']} questions, {shots} shots")
        return [*lines, "± is one standard error over the questions."]

    def write(self, folder: Path) -> None:
        """Write ``evaluation.json`` and ``examples.jsonl`` into a folder."""
        plain = {key: value for key, value in vars(self).items() if key != "examples"}
        text = json.dumps(plain, indent=1, allow_nan=False) + "\n"
        (folder / NAME).write_text(text, encoding="utf-8")
        lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in self.examples]
        (folder / EXAMPLES_NAME).write_text("".join(lines), encoding="utf-8")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Return what `write` has written.

        Args:
            path: The folder, or an adapter with such a folder beside it.

        Raises:
            MatryoshkaError: There is none, or it is damaged.
        """
        places = (Path(path, NAME), Path(f"{Path(path)}-evaluation", NAME))
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise MatryoshkaError(
                f"there is no evaluation in {path}: write matryoshka eval ADAPTER --tasks arc_easy"
            )
        examples = file.with_name(EXAMPLES_NAME)
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            for task in data["tasks"].values():
                for metric in task["metrics"].values():
                    metric |= {kind: _by_rank(metric[kind]) for kind in ("value", "stderr")}
            # Not splitlines(), which splits inside of texts too.
            text = examples.read_text(encoding="utf-8") if examples.is_file() else ""
            lines = [json.loads(line) for line in text.split("\n") if line]
            sizes = _by_rank(data["bytes"])
            return cls(data["about"], tuple(data["ranks"]), sizes, data["tasks"], lines)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MatryoshkaError(
                f"{file} is no evaluation, or damaged: give what `matryoshka eval` has written"
            ) from error


def with_error(value: float | None, error: float | None) -> str:
    """Return a value as people read it; empty where there is none."""
    if value is None:
        return ""
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def summary(task: str, judged: Mapping[int, Any]) -> dict[str, Any]:
    """Return a task's or a group's entry, from what the harness' ``evaluate`` returned by rank.

    Raises:
        MatryoshkaError: The task has no metric that is a number.
    """
    first = next(iter(judged.values()))
    rows = {rank: found["results"][task] for rank, found in judged.items()}
    metrics: dict[str, Any] = {}
    for key, value in first["results"][task].items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, SupportsFloat):
            continue
        error = f"{name}_stderr,{filtered}"
        metrics[key] = {
            "higher_is_better": first["higher_is_better"][task].get(name),
            "value": {rank: _number(row[key]) for rank, row in rows.items()},
            "stderr": {rank: _number(row.get(error)) for rank, row in rows.items()},
        }
    if not metrics:
        raise MatryoshkaError(f"task {task} has no metric that is a number")
    # Where no answer is right, which is usual for long ones, the loss says more.
    chosen = next((k for k, m in metrics.items() if any(m["value"].values())), next(iter(metrics)))
    values = {rank: value for rank, value in metrics[chosen]["value"].items() if rank}
    is_share = None not in values.values() and metrics[chosen]["higher_is_better"] is not False
    area = aurac([*values.values()], [*values]) if is_share else None
    counts = first["n-samples"]
    parts = [task] if task in counts else list(counts)
    return {
        "items": sum(counts[part]["effective"] for part in parts),
        "num_fewshot": first["n-shot"].get(task),
        "metric": chosen,
        "aurac": area,
        "metrics": metrics,
    }


def examples(name: str, samples: Mapping[int, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return the lines of ``examples.jsonl`` for a task, from the harness' samples at each rank."""
    found: dict[int, dict[str, Any]] = {}
    for rank, rows in samples.items():
        for row in rows:
            prompt = str(row["arguments"][0][0])[-_PROMPT_CHARACTERS:]
            line = {"task": name, "doc_id": row["doc_id"], "prompt": prompt, "target": _target(row)}
            line = found.setdefault(row["doc_id"], line | {"answers": {}, "metrics": {}})
            line["answers"].setdefault(str(rank), _answer(row))
            for metric in row["metrics"]:
                if _number(row[metric]) is not None:
                    by_rank = line["metrics"].setdefault(f"{metric},{row['filter']}", {})
                    by_rank[str(rank)] = float(row[metric])
    return [found[number] for number in sorted(found)]


def _answer(row: Any) -> str:
    """Return what the model said: its text, or the choice that it finds likeliest."""
    first = row["resps"][0][0]
    if isinstance(first, (tuple, list)) and len(row["resps"]) > 1:
        best = max(range(len(row["resps"])), key=lambda i: row["resps"][i][0][0])
        context, said = row["arguments"][best][:2]  # in winogrande the contexts are the choices
        return str(said if len({x[1] for x in row["arguments"]}) > 1 else context)
    return str(first)


def _target(row: Any) -> str:
    target, choices = row["target"], row["arguments"]
    is_choice = isinstance(target, int) and 0 <= target < len(choices) and len(choices) > 1
    return str(choices[target][1] if is_choice else target)


def _number(value: Any) -> float | None:
    """Return a number that JSON knows, or None."""
    return float(value) if isinstance(value, SupportsFloat) and math.isfinite(value) else None


def _by_rank(numbers: Mapping[str, Any]) -> dict[int, Any]:
    return {int(rank): value for rank, value in numbers.items()}


# Okabe and Ito's colours, which differ for every kind of colour vision; markers tell them in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = "osD^vPX"  # one more than colours: 42 tasks differ


def draw(evaluation: Evaluation, file: Path) -> None:
    """Draw each task's first metric against the rank, with standard errors, as a PNG picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes: Any = figure.subplots()
    ranks = evaluation.ranks
    for number, (name, task) in enumerate(evaluation.tasks.items()):
        metric, colour = evaluation.metric(name), _COLOURS[number % len(_COLOURS)]
        value = [math.nan if (v := metric["value"][rank]) is None else v for rank in ranks]
        error = [metric["stderr"][rank] or 0 for rank in ranks]
        style = {"color": colour, "marker": _MARKERS[number % len(_MARKERS)], "capsize": 3}
        axes.errorbar(ranks, value, error, label=f"{name}: {task['metric']}", **style)
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
