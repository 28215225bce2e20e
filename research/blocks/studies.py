"""The blocks of research/README.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from statistics import fmean, geometric_mean

from research import stats
from research.blocks.registry import (
    block,
    mean_and_deviation,
    nats,
    of_method,
    percent,
    read,
    table,
    tokens,
)
from research.commonsense import USUAL_METRIC
from research.figures import curves
from research.looks import NAMES
from research.plan import rates, units
from research.runs import Job
from research.stats import accuracy_at, loss_at
from research.study import LORA_EACH, load_study

ADAPTERS_FILE = "research/runs/peft_adapters.jsonl"
EIGHT = USUAL_METRIC
SEVEN = {task: metric for task, metric in USUAL_METRIC.items() if task != "boolq"}


@block
def orders_family() -> str:
    """Earlier orders on one task."""
    return _losses_of_orders("family_relationships")


@block
def orders_chain() -> str:
    """Earlier orders on the other task."""
    return _losses_of_orders("chain_sum")


def _losses_of_orders(task: str) -> str:
    """Return the losses of earlier orders minus that of PEFT's ``convert_to_lora``."""
    rows: list[list[str]] = []
    for label, version, order in (
        ("`activations`", "0.1", "activations"),
        ("`loss`", "0.1", "loss"),
        ("`learned`", "0.1", "learned"),
        ("`learned`, again", "0.2", "learned"),
        ("`trained`, again", "0.2", "trained"),
    ):
        adapters = [
            adapter
            for adapter in read(ADAPTERS_FILE)
            if adapter["version"] == version and adapter["task"] == task
        ]
        cells: list[str] = []
        for index in range(5):
            differences = [
                adapter[order]["uniform"][index] - adapter["convert_to_lora"]["uniform"][index]
                for adapter in adapters
            ]
            cells.append(mean_and_deviation(differences))
        rows.append([label, *cells])
    return table([f"`{task}`, rank", "1", "2", "4", "8", "16"], rows)


@block
def peft_adapters() -> str:
    """Six adapters that were trained by PEFT, without this package."""
    adapters = [adapter for adapter in read(ADAPTERS_FILE) if adapter["version"] == "0.3.0"]
    ranks = adapters[0]["ranks"]
    rows: list[list[str]] = []
    for task in ("chain_sum", "family_relationships"):
        adapters_of_task = [adapter for adapter in adapters if adapter["task"] == task]
        for label, key, unit, digits in (("loss", "loss", 1, 3), ("points", "accuracy", 100, 1)):
            cells: list[str] = []
            for index in range(len(ranks)):
                differences = [
                    unit * (adapter["trained"][key][index] - adapter["svd"][key][index])
                    for adapter in adapters_of_task
                ]
                cells.append(mean_and_deviation(differences, digits))
            rows.append([f"`{task}`, {label}", *cells])
    return table(["`train_ranks` minus `reorder`, rank", *map(str, ranks)], rows)


@block
def hardly() -> str:
    """Where rank hardly matters."""
    rows: list[list[str]] = []
    for task in ("chain_sum", "family_relationships"):
        for method in ("lora/svd", "lora/trained", LORA_EACH):
            results = of_method("hardly", method, task)
            losses = [
                fmean(loss_at(rank)(result) or 0 for result in results) for rank in (1, 4, 32)
            ]
            rows.append([f"`{task}`, {NAMES[method]}", *(f"{loss:.3f}" for loss in losses)])
    return table(["loss on test questions, rank", "1", "4", "32"], rows)


@block
def default_rule() -> str:
    """The validation losses that chose the default of version 0.3."""
    rows: list[list[str]] = []
    for method in ("lora-longer/svd", "lora/trained", "matryoshka/trained"):
        losses = [fmean(_validation_losses(study, method)) for study in ("every128", "every256")]
        rows.append([NAMES[method], *(f"{loss:.3f}" for loss in losses)])
    return table(["validation loss", "128 facts", "256 facts"], rows)


@block
def default_rule_02() -> str:
    """The scores that chose the default of version 0.2."""
    studies = ("facts128", "facts256", "facts512", "commonsense")
    rows: list[list[str]] = []
    for method in (
        "matryoshka/trained",
        "lora/trained",
        "lora/learned",
        "lora-longer/svd",
        "lora/svd",
        "matryoshka/prefix",
    ):
        losses = {study: _validation_losses(study, method) for study in studies}
        plain = {study: _validation_losses(study, "lora/svd") for study in studies}
        means = [fmean(losses[study]) / fmean(plain[study]) for study in studies]
        largest = max(losses[study][-1] / plain[study][-1] for study in studies)
        cells = [f"{value:.2f}" for value in (*means, geometric_mean(means), largest)]
        rows.append([NAMES[method], *cells])
    return table(["method", *studies, "score", "at rank R"], rows)


@cache
def _validation_losses(name: str, method: str) -> list[float]:
    """Return a method's validation loss at each rank, at its rate: means over the seeds."""
    study = load_study(name)
    (task,) = study.tasks
    (unit,) = units(study, method, task)
    runs = study.load_runs()
    rate = rates(study, runs, unit).chosen or 0.0
    losses_by_seed: list[tuple[float, ...]] = []
    for seed in study.rate_seeds:
        job = Job(unit.recipe, task, unit.rank, rate, seed, "validation")
        losses_by_seed.append(runs[job].curves[unit.deployment].loss)
    return [fmean(losses) for losses in zip(*losses_by_seed, strict=True)]


@block
def commonsense() -> str:
    """The commonsense benchmark, version 0.2."""
    return _commonsense_table(
        "commonsense",
        (
            "lora/svd",
            "matryoshka-longer/prefix",
            "dylora-longer/prefix",
            "lora-quarter-longer/learned",
            "lora/trained",
            "matryoshka/trained",
            "lora-longer/svd",
            LORA_EACH,
        ),
    )


@block
def commonsense_judged() -> str:
    """The same with version 0.3, whose validation examples are not measured."""
    return _commonsense_table("commonsense-judged", ("lora/svd", "lora/trained", LORA_EACH))


def _commonsense_table(study: str, methods: Sequence[str]) -> str:
    """Return the right answers of the eight tasks, and of the seven without BoolQ."""
    heading = ["right answers of the eight (of seven) in %, rank", "1", "4", "32", "tokens"]
    first_result = curves(study)[0]
    base_eight = 100 * (stats.choices_at(EIGHT, 0)(first_result) or 0)
    base_seven = 100 * (stats.choices_at(SEVEN, 0)(first_result) or 0)
    rows = [["*the base model*", *[f"{base_eight:.1f} ({base_seven:.1f})"] * 3, ""]]
    for method in methods:
        cells: list[str] = []
        for rank in (1, 4, 32):
            eight = percent(study, method, stats.choices_at(EIGHT, rank))
            seven = percent(study, method, stats.choices_at(SEVEN, rank))
            cells.append(f"{eight} ({seven})" if eight else "")
        rows.append([NAMES[method], *cells, tokens(study, method)])
    return table(heading, rows)


@block
def commonsense_judged_differences() -> str:
    """Differences to LoRA trained at the rank."""
    study = "commonsense-judged"
    losses = [nats(study, "lora/trained", loss_at(rank), None, LORA_EACH) for rank in (1, 4)]
    points = [percent(study, "lora/trained", accuracy_at(rank), None, LORA_EACH) for rank in (1, 4)]
    return (
        f"`train_ranks` minus LoRA trained at the rank: the loss differs by {losses[0]} nats at "
        f"rank 1 and {losses[1]} at rank 4, the right\nanswers by {points[0]} and {points[1]} "
        "points."
    )
