"""The blocks of research/README.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from statistics import fmean, geometric_mean

from research import stats
from research.blocks.comparisons import points, trained_minus
from research.blocks.registry import (
    block,
    mean_and_deviation,
    nats,
    percent,
    read,
    table,
    tokens,
)
from research.commonsense import USUAL_METRIC
from research.curves import curves
from research.looks import NAMES, TRAINED, train_ranks_name, trained_method
from research.plan import rates, units
from research.runs import Job
from research.stats import accuracy_at, loss_at
from research.study import LORA_EACH, load_study

NAMES_OF_FACTS = {
    "every128": "128 facts",
    "every256": "256 facts",
    "every512": "512 facts",
    "capacity": "256 facts, two kinds of layers",
}
"""The studies that version 0.4 was tested on."""

ADAPTERS_FILE = "research/runs/peft_adapters.jsonl"
EIGHT = USUAL_METRIC
SEVEN = {task: metric for task, metric in USUAL_METRIC.items() if task != "boolq"}


@block
def orders() -> str:
    """Earlier orders, on adapters that PEFT alone has trained."""
    task_names = ("family_relationships", "chain_sum")
    rows: list[list[str]] = []
    for label, version, order in (
        ("`activations`", "0.1", "activations"),
        ("`loss`", "0.1", "loss"),
        ("`learned`", "0.1", "learned"),
        ("`learned`, again", "0.2", "learned"),
        ("`trained`, again", "0.2", "trained"),
    ):
        cells: list[str] = []
        for task in task_names:
            adapters = [
                adapter
                for adapter in read(ADAPTERS_FILE)
                if adapter["version"] == version and adapter["task"] == task
            ]
            for index in (0, 2, 4):  # of the ranks 1, 2, 4, 8, 16
                differences = [
                    adapter[order]["uniform"][index] - adapter["convert_to_lora"]["uniform"][index]
                    for adapter in adapters
                ]
                cells.append(mean_and_deviation(differences))
        rows.append([label, *cells])
    heading = [f"`{task}`, {rank}" for task in task_names for rank in (1, 4, 16)]
    return table(["loss minus that of `convert_to_lora`, rank", *heading], rows)


@block
def peft_adapters() -> str:
    """Six adapters that were trained by PEFT, without this package."""
    adapters = [adapter for adapter in read(ADAPTERS_FILE) if adapter["version"] == "0.3.0"]
    ranks = (1, 2, 4, 8, 32)
    rows: list[list[str]] = []
    for task in ("chain_sum", "family_relationships"):
        adapters_of_task = [adapter for adapter in adapters if adapter["task"] == task]
        for label, key, unit, digits in (("loss", "loss", 1, 3), ("points", "accuracy", 100, 1)):
            cells: list[str] = []
            for rank in ranks:
                index = adapters[0]["ranks"].index(rank)
                differences = [
                    unit * (adapter["trained"][key][index] - adapter["svd"][key][index])
                    for adapter in adapters_of_task
                ]
                cells.append(mean_and_deviation(differences, digits))
            rows.append([f"`{task}`, {label}", *cells])
    return table(["`train_ranks` minus `reorder`, rank", *map(str, ranks)], rows)


@block
def versions_of_train_ranks() -> str:
    """`train_ranks` of this version minus that of 0.3, on the same seeds."""
    ranks = (1, 2, 3, 4, 8, 32)
    rows: list[list[str]] = []
    for study, label in NAMES_OF_FACTS.items():
        if trained_method(study) != TRAINED:
            continue
        estimates = [trained_minus(study, "lora/trained-0.3", accuracy_at(rank)) for rank in ranks]
        cells = [points(estimate, "+") for estimate in estimates]
        rows.append([label, *cells, str(estimates[0].n)])
    heading = ["0.4 minus 0.3, points", *(f"rank {rank}" for rank in ranks), "seeds"]
    return table(heading, rows)


@block
def defaults() -> str:
    """The validation losses that chose the defaults of each version."""
    old_studies = ("facts128", "facts256", "facts512", "commonsense")
    plain = {study: _validation_losses(study, "lora/svd") for study in old_studies}
    candidates = ("lora-longer/svd", "lora/trained", "matryoshka/trained")
    rows: list[list[str]] = []
    for method in (*candidates, "lora/learned", "lora/svd", "matryoshka/prefix"):
        losses = {study: _validation_losses(study, method) for study in old_studies}
        score = geometric_mean(fmean(losses[study]) / fmean(plain[study]) for study in old_studies)
        largest = max(losses[study][-1] / plain[study][-1] for study in old_studies)
        cells = [f"{score:.2f}", f"{largest:.2f}"]
        method_of_0_3 = method.replace("/trained", "/trained-0.3")
        for name in (method_of_0_3, method):
            for study in ("every128", "every256"):
                is_candidate = method in candidates
                cells.append(
                    f"{fmean(_validation_losses(study, name)):.3f}" if is_candidate else ""
                )
        rows.append([NAMES[method], *cells])
    heading = ["0.2: score", "0.2: at R"]
    heading += [f"{version}: {n} facts" for version in ("0.3", "0.4") for n in (128, 256)]
    return table(["method", *heading], rows)


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
    method = trained_method(study)
    losses = [nats(study, method, loss_at(rank), None, LORA_EACH) for rank in (1, 4)]
    points = [percent(study, method, accuracy_at(rank), None, LORA_EACH) for rank in (1, 4)]
    return (
        f"{train_ranks_name(method)} minus LoRA trained at the rank: the loss differs "
        f"by {losses[0]} nats at rank 1 and {losses[1]} at\nrank 4, the right answers by "
        f"{points[0]} and {points[1]} points."
    )
