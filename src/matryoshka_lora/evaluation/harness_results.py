"""Convert what lm-evaluation-harness returns at each rank into the results of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.results import AuracAxis, Example, Metric, TaskResult, aurac

_PROMPT_CHARACTERS = 2000  # kept of a prompt's end; few-shot prompts would fill the disk

HarnessResults = Mapping[str, Any]
"""What ``lm_eval.evaluator.evaluate`` returns."""


def convert_task(name: str, results: Mapping[int, HarnessResults]) -> TaskResult:
    """Return the results of a task or a group.

    Args:
        name: The harness's name of the task or group.
        results: The harness's results by rank, at least one.

    Raises:
        MatryoshkaError: The task has no metric that is a number.
    """
    first = next(iter(results.values()))
    metrics: dict[str, Metric] = {}
    for key, value in first["results"][name].items():
        metric, comma, _ = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, SupportsFloat):
            metrics[key] = _convert_metric(name, key, results)
    if not metrics:
        raise MatryoshkaError(
            f"Task {name} has no metric that is a number. Add one to metric_list in its YAML file."
        )
    primary_metric = _choose_primary_metric(metrics)
    num_examples = first["n-samples"]
    tasks = [name] if name in num_examples else list(num_examples)
    return TaskResult(
        num_examples=sum(num_examples[task]["effective"] for task in tasks),
        num_fewshot=first["n-shot"].get(name),
        primary_metric=primary_metric,
        aurac_log2=metric_aurac(metrics[primary_metric], "log2"),
        aurac_linear=metric_aurac(metrics[primary_metric], "linear"),
        metrics=metrics,
    )


def _convert_metric(task: str, key: str, results: Mapping[int, HarnessResults]) -> Metric:
    name, _, filter_name = key.partition(",")
    values: dict[int, float | None] = {}
    standard_errors: dict[int, float | None] = {}
    for rank, result in results.items():
        by_metric = result["results"][task]
        values[rank] = _finite_number(by_metric[key])
        standard_errors[rank] = _finite_number(by_metric.get(f"{name}_stderr,{filter_name}"))
    first = next(iter(results.values()))
    return Metric(first["higher_is_better"][task].get(name), values, standard_errors)


def _choose_primary_metric(metrics: Mapping[str, Metric]) -> str:
    """Return the first metric that is not 0 at every rank.

    If no answer is correct, which is usual for long answers, the loss is more informative.
    """
    for name, metric in metrics.items():
        if any(metric.values.values()):
            return name
    return next(iter(metrics))


def metric_aurac(metric: Metric, axis: AuracAxis) -> float | None:
    """Return the AURAC, or None if lower is better or a value is missing."""
    if metric.higher_is_better is False:
        return None
    ranks: list[int] = []
    values: list[float] = []
    for rank, value in metric.values.items():
        if rank == 0:
            continue
        if value is None:
            return None
        ranks.append(rank)
        values.append(value)
    return aurac(values, ranks, axis)


def convert_examples(task: str, samples: Mapping[int, Sequence[Any]]) -> list[Example]:
    """Return the examples of a task, sorted by their number.

    Args:
        task: The task's name in the evaluation.
        samples: The harness's samples by rank: one for each example and filter.
    """
    examples: dict[int, Example] = {}
    for rank, rank_samples in samples.items():
        for sample in rank_samples:
            doc_id = sample["doc_id"]
            if doc_id not in examples:
                prompt = str(sample["arguments"][0][0])[-_PROMPT_CHARACTERS:]
                examples[doc_id] = Example(task, doc_id, prompt, _target(sample))
            example = examples[doc_id]
            example.answers.setdefault(rank, _answer(sample))
            for metric in sample["metrics"]:
                value = _finite_number(sample[metric])
                if value is not None:
                    values = example.metrics.setdefault(f"{metric},{sample['filter']}", {})
                    values[rank] = value
    return [examples[doc_id] for doc_id in sorted(examples)]


def _answer(sample: Any) -> str:
    """Return the model's answer: a string, or the choice with the highest log-likelihood."""
    responses = [response[0] for response in sample["resps"]]
    is_choice = len(responses) > 1 and isinstance(responses[0], (tuple, list))
    if not is_choice:
        return str(responses[0])
    logprobs = [logprob for logprob, _ in responses]
    context, continuation = sample["arguments"][logprobs.index(max(logprobs))][:2]
    # In winogrande the contexts are the choices, and the continuation is the same for all.
    continuations = {arguments[1] for arguments in sample["arguments"]}
    return str(continuation if len(continuations) > 1 else context)


def _target(sample: Any) -> str:
    target, choices = sample["target"], sample["arguments"]
    is_index = isinstance(target, int) and len(choices) > 1 and 0 <= target < len(choices)
    return str(choices[target][1] if is_index else target)


def _finite_number(value: Any) -> float | None:
    """Return a number that JSON can hold, or None."""
    if isinstance(value, SupportsFloat) and math.isfinite(value):
        return float(value)
    return None
