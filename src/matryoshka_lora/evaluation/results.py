"""``evaluation.json``: every task at every rank, with what is needed to trust it.

::

    {
      "format": 2,
      "model": "smollm2-135m", "revision": null, "dtype": "bfloat16",    # of an absolute path, the last part
      "adapter": {"name": "matryoshka-reordered", "path": "...", "rule": "matryoshka", "inference": "prefix",
                  "form": "reordered", "sha256": "of its weights"},
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
            "acc,none": {"higher_is_better": true, "value": [0.38, ...], "stderr": [0.014, ...],    # or nulls
                         "base": {"value": 0.36, "stderr": 0.014}},     # without the adapter
          }
        }
      },
      "seeds": {...}, "settings": {"num_fewshot": null, "limit": null}, "versions": {...}
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
from pathlib import Path
from typing import Any

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.harness import SEEDS, Judged
from matryoshka_lora.evaluation.reading import EXAMPLES_NAME, read_evaluation
from matryoshka_lora.evaluation.selection import Selected
from matryoshka_lora.files import EVALUATION_NAME, settle
from matryoshka_lora.metrics import aurac

ANSWERS_NAME = "answers.jsonl"

_PROMPT_CHARACTERS = 2000
"""Of the end of a prompt are kept for the table of examples: few-shot prompts would fill the disk."""


@dataclass
class Results:
    """What `evaluation.json` and `examples.jsonl` hold; see the module.

    Attributes:
        about: Everything that is not a task's.
        ranks: Without the base model.
        tasks: By name.
        examples: The lines of ``examples.jsonl``.
    """

    about: Mapping[str, Any]
    ranks: Sequence[int]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, selected: Selected, judged: Judged) -> None:
        """Take over what the harness says of a task, or of all tasks of a group."""
        for name, own in _names(selected).items():
            self.tasks[name] = self._task(selected, judged, own)
            self.examples += _examples(name, {rank: found["samples"][own] for rank, found in judged.results.items()})

    def keep(self, folder: Path, selected: Sequence[Selected], overwrite: bool) -> None:
        """Begin with the tasks of the evaluation that is in a folder, but for those that are evaluated again.

        Args:
            folder: Where the results will be written.
            selected: What will be added.
            overwrite: Whether an evaluation that cannot stand beside this one may be dropped.

        Raises:
            MatryoshkaError: It cannot, and may not be dropped; the message says why.
        """
        settle(folder)
        file = folder / EVALUATION_NAME
        if not file.is_file():
            return
        try:
            tasks, examples = self._earlier(file, {name for each in selected for name in _names(each)})
        except MatryoshkaError as error:
            if not overwrite:
                raise MatryoshkaError(f"{error}. Give another folder with --out, or drop it with --force") from error
        else:
            self.tasks.update(tasks)
            self.examples += examples

    def _earlier(self, file: Path, again: Collection[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        data = read_evaluation(file)
        mine = self.to_dict()
        try:
            differs = [key for key in ("model", "dtype") if data[key] != mine[key]]
            differs += ["adapter"] * (data["adapter"].get("sha256") != mine["adapter"]["sha256"])
            if differs:
                raise MatryoshkaError(f"{file} is the evaluation of another {' and '.join(differs)}")
            tasks = {name: task for name, task in data["tasks"].items() if name not in again}
            differs = [key for key in ("ranks", "mode") if data[key] != mine[key]]
            if tasks and differs:
                was = " and ".join(f"{key} {data[key]}" for key in differs)
                raise MatryoshkaError(f"{file} holds {', '.join(tasks)} with other {' and '.join(differs)}: {was}")
            for task in tasks.values():
                for key in ("settings", "versions"):
                    task.setdefault(key, data.get(key))
            beside = file.with_name(EXAMPLES_NAME)
            lines = beside.read_text(encoding="utf-8").splitlines() if beside.is_file() else ()
            examples = [example for example in map(json.loads, lines) if example["task"] in tasks]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, MatryoshkaError):
                raise
            raise MatryoshkaError(f"{file}, or {EXAMPLES_NAME} beside it, is damaged ({error!r:.200})") from error
        return tasks, examples

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as the module describes them."""
        return {"format": 2, **self.about, "ranks": list(self.ranks), "tasks": self.tasks, "seeds": SEEDS}

    def example_lines(self) -> str:
        """The text of ``examples.jsonl``."""
        return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in self.examples)

    def _task(self, selected: Selected, judged: Judged, own: str) -> dict[str, Any]:
        first = judged.results[self.ranks[0]]
        by_rank = {rank: found["results"][own] for rank, found in judged.results.items()}
        metrics: dict[str, Any] = {}
        for key, value in first["results"][own].items():
            name, comma, filtered = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = f"{name}_stderr,{filtered}"
            of = {rank: (_number(found[key]), _number(found.get(error))) for rank, found in by_rank.items()}
            metrics[key] = {
                "higher_is_better": first["higher_is_better"][own].get(name, True),
                "value": [of[rank][0] for rank in self.ranks],
                "stderr": [of[rank][1] for rank in self.ranks],
                "base": dict(zip(("value", "stderr"), of[0], strict=True)) if 0 in of else None,
            }
        headline = selected.metric if selected.metric in metrics else next(iter(metrics), None)
        if headline is None:
            raise MatryoshkaError(f"task {own} has no metric that is a number")
        values = metrics[headline]["value"]
        finite = all(value is not None for value in values)
        area = (
            {"log2": aurac(values, self.ranks), "linear": aurac(values, self.ranks, axis="linear")} if finite else None
        )
        return {
            "kind": selected.kind,
            "items": first["n-samples"][own]["effective"],
            "num_fewshot": first["n-shot"].get(own),
            "task_version": first["versions"].get(own),
            "prompts": judged.prompts,
            "metric": headline,
            "aurac": area,
            "metrics": metrics,
        }


def _names(selected: Selected) -> dict[str, str]:
    """What each task is called in the results, and by the harness."""
    own = [str(task.config.task) for task in selected.tasks]
    return {selected.name: own[0]} if len(own) == 1 else {name: name for name in own}


def _number(value: Any) -> float | None:
    """None where the harness has none, or none that JSON knows."""
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if is_number else None


def _examples(name: str, samples: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
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
