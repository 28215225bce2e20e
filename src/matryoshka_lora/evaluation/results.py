"""``evaluation.json``: every task at every rank, with what is needed to trust it.

::

    {
      "format": 3,
      "model": "smollm2-135m", "dtype": "bfloat16",
      "adapter": {"name": "matryoshka, reordered by svd", "path": "...", "rule": "matryoshka", "deploy": "reordered",
                  "reordered": "svd", "sha256": "of its weights"},
      "mode": "exact",                    # the harness's own prompts; or "fixed-shots"
      "ranks": [1, 2, 4],                 # all lists below have one entry for each
      "bytes": [115200, ...],             # of the exported adapter's factors
      "latency_ms": [34.1, ...],          # of one generated token with it, on this machine; or null
      "tasks": {
        "arc_challenge-25shot": {
          "kind": "harness",              # or "built-in", "file"
          "items": 1172, "num_fewshot": 25, "task_version": 1.0,
          "prompts": "hash of all requests: equal hashes mean equal prompts",
          "metric": "acc,none",           # the one to look at first; a key of "metrics"
          "aurac": {"log2": 0.41, "linear": 0.42},    # of that metric
          "metrics": {                    # the harness's names: metric,filter
            "acc,none": {"higher_is_better": true, "value": [0.38, ...], "stderr": [0.014, ...],    # each may be null
                         "base": {"value": 0.36, "stderr": 0.014}},     # without the adapter
          }
        }
      },
      "seeds": {...}, "settings": {"num_fewshot": null, "limit": null}, "versions": {...},
      "selected": {"rank": 4, "task": "arc_challenge-25shot", "within": 0.01, ...}    # of select --save, if it ran
    }

The tasks of several commands stand in one file where adapter, base model, dtype, ranks and mode are the same; a task
of an earlier command then has ``settings`` and ``versions`` of its own.

Beside it stands ``examples.jsonl``, one line for each question of each task::

    {"task": "arc_challenge-25shot", "doc_id": 0, "prompt": "...", "target": "...",
     "answers": {"0": "...", "1": "...", ...},      # by rank; 0 is the base model. Of choices: the likeliest one
     "metrics": {"acc,none": {"0": 1.0, "1": 0.0, ...}}}

and ``answers.jsonl``, from which a killed evaluation goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.choice import Measured
from matryoshka_lora.nesting import Nesting

EXAMPLES_NAME = "examples.jsonl"
FORMAT = 3

_PROMPT_CHARACTERS = 2000
"""Of the end of a prompt are kept for the table of examples: few-shot prompts would fill the disk."""


def aurac(accuracies: Sequence[float], ranks: Sequence[int], axis: Literal["log2", "linear"] = "log2") -> float:
    """The area under the rank-accuracy curve, divided by its width (arXiv 2605.07850).

    The trapezoid rule over ``log2(rank)`` or over the rank itself. On the linear axis the largest ranks have nearly
    all the weight (82 % of it on 64 to 256 for powers of two up to 256), so ``"log2"`` is the one to compare by.

    Args:
        accuracies: One accuracy per rank, in the unit the result shall have (share or percent).
        ranks: Strictly increasing positive integers.
        axis: ``"log2"`` or ``"linear"``.

    Returns:
        A number in the unit of the accuracies; for a single rank, its accuracy.

    Raises:
        MatryoshkaError: The lengths differ, the ranks do not increase, an accuracy is not finite, or the axis is
            unknown.
    """
    points = Nesting(ranks).ranks
    if len(accuracies) != len(points):
        raise MatryoshkaError(f"{len(accuracies)} accuracies for {len(points)} ranks; give one for each rank")
    if not all(math.isfinite(a) for a in accuracies):
        raise MatryoshkaError(f"the accuracies are not all finite: {list(accuracies)}")
    if axis not in ("log2", "linear"):
        raise MatryoshkaError(f"axis is {axis!r}; write 'log2' or 'linear'")
    if len(points) == 1:
        return float(accuracies[0])
    x = [math.log2(r) if axis == "log2" else float(r) for r in points]
    area = sum((x[i + 1] - x[i]) * (accuracies[i] + accuracies[i + 1]) / 2 for i in range(len(x) - 1))
    return area / (x[-1] - x[0])


@dataclass
class Evaluation:
    """What `evaluation.json` and `examples.jsonl` hold; see the module.

    Attributes:
        about: Everything that is not a task's.
        ranks: Without the base model, increasing.
        tasks: By name.
        examples: The lines of ``examples.jsonl``.
    """

    about: Mapping[str, Any]
    ranks: Sequence[int]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def values(self, task: str | None = None, metric: str | None = None) -> dict[int, float | None]:
        """A metric at each rank.

        Args:
            task: May be None where there is only one.
            metric: None is the task's first one.

        Raises:
            MatryoshkaError: There is no such task or metric.
        """
        found = self.tasks[self.task_name(task)]
        name = metric or found["metric"]
        # The harness's names have the filter behind a comma.
        full = next((key for key in found["metrics"] if name in (key, key.partition(",")[0])), None)
        if full is None:
            raise MatryoshkaError(f"there is no metric {name!r}; the metrics are {', '.join(found['metrics'])}")
        return dict(zip(self.ranks, found["metrics"][full]["value"], strict=True))

    def task_name(self, wanted: str | None = None) -> str:
        """The name of a task, or of the only one.

        Raises:
            MatryoshkaError: There is no such task, or there are several and none is named.
        """
        names = list(self.tasks)
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted in names:
            return str(wanted)
        problem = f"has {len(names)} tasks" if wanted is None else f"has no task {wanted!r}"
        raise MatryoshkaError(f"the evaluation {problem}; write --task and one of: {', '.join(names)}")

    def measured(self, task: str | None = None) -> Measured:
        """A task's first metric at every rank, and by question.

        Raises:
            MatryoshkaError: There is no such task, or there are several and none is named.
        """
        name = self.task_name(task)
        found = self.tasks[name]
        metric = found["metric"]
        first = found["metrics"][metric]
        return Measured(
            ranks=self.ranks,
            metric=metric,
            items=found["items"],
            values=first["value"],
            errors=first["stderr"],
            bytes=self.about["bytes"],
            latency_ms=self.about["latency_ms"],
            higher_is_better=first["higher_is_better"],
            base=(first.get("base") or {}).get("value"),
            by_question=_by_question(self.examples, name, metric),
        )

    def keep(self, earlier: Evaluation, but: Collection[str] = ()) -> None:
        """Take over the tasks of an earlier evaluation, with the settings and versions that they had.

        Args:
            earlier: Of the same adapter.
            but: Tasks of it that are measured anew.

        Raises:
            MatryoshkaError: It is of another adapter, base model or dtype, or a task that is kept has other ranks.
        """
        differs = [key for key in ("model", "revision", "dtype") if self.about.get(key) != earlier.about.get(key)]
        weights = [evaluation.about.get("adapter", {}).get("sha256") for evaluation in (self, earlier)]
        differs += ["adapter"] * (weights[0] != weights[1])
        if differs:
            raise MatryoshkaError(f"it is the evaluation of another {' and '.join(differs)}")
        kept = {name: task for name, task in earlier.tasks.items() if name not in but}
        names = ", ".join(kept)
        if kept and list(self.ranks) != list(earlier.ranks):
            raise MatryoshkaError(f"it holds {names} at other ranks, {', '.join(map(str, earlier.ranks))}")
        if kept and self.about["mode"] != earlier.about.get("mode"):
            raise MatryoshkaError(f"it holds {names} in another mode, {earlier.about.get('mode')}")
        for name, task in kept.items():
            before = {key: earlier.about.get(key) for key in ("settings", "versions")}
            self.tasks[name] = {**before, **task}
        self.examples += [example for example in earlier.examples if example["task"] in kept]

    def add(self, name: str, task: Mapping[str, Any], examples: Sequence[dict[str, Any]]) -> None:
        """Take over a task, in the place of an earlier one of that name."""
        self.tasks[name] = dict(task)
        self.examples = [example for example in self.examples if example["task"] != name] + list(examples)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``evaluation.json``: plain JSON types, as the module describes them."""
        return {"format": FORMAT, **self.about, "ranks": list(self.ranks), "tasks": self.tasks}

    def example_lines(self) -> str:
        """The text of ``examples.jsonl``."""
        return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in self.examples)


def _by_question(examples: Sequence[Mapping[str, Any]], task: str, metric: str) -> dict[int, list[float]]:
    """Each rank's metric of every question; a rank that lacks one is left out."""
    mine = [example["metrics"].get(metric, {}) for example in examples if example["task"] == task]
    found: dict[int, list[float]] = {}
    for values in mine:
        for rank, value in values.items():
            if not math.isfinite(value):
                raise MatryoshkaError(f"{EXAMPLES_NAME} holds {value} for {task}: evaluate the adapter again")
            found.setdefault(int(rank), []).append(float(value))
    return {rank: values for rank, values in found.items() if len(values) == len(mine)}


def summed(task: str, kind: str, metric: str | None, judged: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """A task's entry in ``evaluation.json``.

    Args:
        task: The harness's name of it.
        kind: Where it comes from.
        metric: What is to be looked at first; None or an unknown one is the first that the harness names.
        judged: What the harness's ``evaluate`` returned at each rank; 0 is the base model.

    Raises:
        MatryoshkaError: The task has no metric that is a number.
    """
    ranks = sorted(rank for rank in judged if rank)
    first = judged[ranks[0]]
    by_rank = {rank: found["results"][task] for rank, found in judged.items()}
    metrics: dict[str, Any] = {}
    for key, value in first["results"][task].items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = f"{name}_stderr,{filtered}"
        of = {rank: (_number(found[key]), _number(found.get(error))) for rank, found in by_rank.items()}
        metrics[key] = {
            "higher_is_better": first["higher_is_better"][task].get(name),
            "value": [of[rank][0] for rank in ranks],
            "stderr": [of[rank][1] for rank in ranks],
            "base": dict(zip(("value", "stderr"), of[0], strict=True)) if 0 in of else None,
        }
    headline = metric if metric in metrics else next(iter(metrics), None)
    if headline is None:
        raise MatryoshkaError(f"task {task} has no metric that is a number")
    values = metrics[headline]["value"]
    finite = all(value is not None for value in values)
    area = {"log2": aurac(values, ranks), "linear": aurac(values, ranks, axis="linear")} if finite else None
    return {
        "kind": kind,
        "items": first["n-samples"][task]["effective"],
        "num_fewshot": first["n-shot"].get(task),
        "task_version": first["versions"].get(task),
        "metric": headline,
        "aurac": area,
        "metrics": metrics,
    }


def _number(value: Any) -> float | None:
    """None where the harness has none, or none that JSON knows."""
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if is_number else None


def examples_of(name: str, samples: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The lines of ``examples.jsonl`` for a task: the harness's samples of all ranks, by question."""
    found: dict[int, dict[str, Any]] = {}
    for rank, rows in samples.items():
        for row in rows:
            line = found.setdefault(
                row["doc_id"],
                {
                    "task": name,
                    "doc_id": row["doc_id"],
                    "prompt": str(row["arguments"][0][0])[-_PROMPT_CHARACTERS:],
                    "target": _target(row),
                    "answers": {},
                    "metrics": {},
                },
            )
            line["answers"].setdefault(str(rank), _answer(row))
            for metric in row["metrics"]:
                if isinstance(row[metric], (int, float)):
                    line["metrics"].setdefault(f"{metric},{row['filter']}", {})[str(rank)] = float(row[metric])
    return [found[number] for number in sorted(found)]


def _answer(row: Mapping[str, Any]) -> str:
    """What the model said: its text, or the choice that it finds likeliest."""
    first = row["resps"][0][0]
    if isinstance(first, str):
        return first
    if isinstance(first, (tuple, list)) and len(row["resps"]) > 1:
        likeliest = max(range(len(row["resps"])), key=lambda i: row["resps"][i][0][0])
        return str(row["arguments"][likeliest][1])
    return str(first)


def _target(row: Mapping[str, Any]) -> str:
    target = row["target"]
    is_choice = isinstance(target, int) and 0 <= target < len(row["arguments"]) and len(row["arguments"]) > 1
    return str(row["arguments"][target][1] if is_choice else target)
