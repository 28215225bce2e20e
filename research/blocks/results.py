"""The blocks of docs/results.md."""

from __future__ import annotations

from statistics import fmean, median

from research import stats
from research.blocks.registry import (
    block,
    facts_table,
    nats,
    of_method,
    percent,
    read,
    table,
)
from research.figures import curves
from research.looks import NAMES
from research.plan import Result
from research.stats import accuracy_at, aurac_log2, loss_at
from research.study import LORA_EACH

FACTS_METHODS = ("lora/svd", "lora/trained", "lora/squeezed", LORA_EACH)
THREE_TASKS = ("chain_sum", "wordnet", "family_relationships")


@block
def facts256() -> str:
    """256 facts, all methods."""
    methods = (
        "matryoshka/prefix",
        "dylora-authors/prefix",
        "matryoshka-authors/svd",
        "lora/svd",
        "lora-longer/svd",
        "lora/trained",
        "matryoshka/trained",
        "lora/squeezed",
        LORA_EACH,
    )
    return facts_table("every256", "256 facts", methods, (1, 2, 3, 4, 8, 32))


@block
def facts256_findings() -> str:
    """What the table of 256 facts says."""
    trained = of_method("every256", "lora/trained")
    largest_fall = 100 * max(map(stats.largest_fall, trained))
    rank_1 = median(_accuracies(trained, 1))
    plain_seconds = fmean(curve.seconds for curve in of_method("every256", "lora/svd"))
    seconds = fmean(curve.seconds for curve in trained) / plain_seconds
    references = of_method("every256", LORA_EACH)
    reference_1 = _accuracies(references, 1)
    reference_2 = _accuracies(references, 2)
    paper = 100 * max(
        max(curve.curve.accuracy)
        for study in ("capacity", "every128", "every512")
        for curve in of_method(study, "matryoshka/prefix")
    )
    return "\n".join(
        [
            f"* `train_ranks` takes rank 1 from nothing to {rank_1:.1f} % for half a run's tokens, "
            f"and {seconds:.1f} times a run's seconds in\n  all. Its curve is nearly monotone: no "
            f"rank of any seed has more than {largest_fall:.1f} points less than the next smaller "
            "one.",
            "* LoRA trained at the rank is unstable at the ranks 1 and 2: its seeds have "
            f"{min(reference_1):.1f} to {max(reference_1):.1f} % and\n  {min(reference_2):.1f} to "
            f"{max(reference_2):.1f} %. Against its better seeds, `train_ranks` is behind at both "
            "ranks.",
            "* The paper's deployment drops P. It answers nothing here, and at most "
            f"{paper:.1f} % with 128 or 512 facts and\n  in the next table.",
        ]
    )


def _accuracies(results: list[Result], rank: int) -> list[float]:
    """Return the right answers at a rank in %, by seed."""
    return [100 * (accuracy_at(rank)(result) or 0) for result in results]


@block
def capacity() -> str:
    """Two kinds of layers."""
    first = "256 facts, two kinds of layers"
    return facts_table("capacity", first, FACTS_METHODS, (1, 2, 3, 4, 8, 32))


@block
def other_sizes() -> str:
    """Medians at the ranks 1, 2 and 4 for other numbers of facts, model and R."""
    studies = {
        "[128](../research/tables/every128.md), 200 steps": "every128",
        "[512](../research/tables/every512.md), 800 steps": "every512",
        "[256](../research/tables/gemma256.md), Gemma 3 270M": "gemma256",
        "[256](../research/tables/every256-rank128.md), R = 128": "every256-rank128",
    }
    rows: list[list[str]] = []
    for label, study in studies.items():
        cells: list[str] = []
        for method in FACTS_METHODS:
            shares_by_rank = [
                stats.values(curves(study), method, accuracy_at(rank)).values()
                for rank in (1, 2, 4)
            ]
            medians = [f"{100 * median(shares):.1f}" for shares in shares_by_rank if shares]
            cells.append(", ".join(medians))
        rows.append([label, *cells, str(len(of_method(study, "lora/trained")))])
    return table(["facts", *(NAMES[method] for method in FACTS_METHODS), "seeds"], rows)


@block
def three_tasks() -> str:
    """AURAC of three tasks."""
    methods = (
        "lora/prefix",
        "matryoshka/prefix",
        "lora/svd",
        "matryoshka/svd",
        "lora-longer/svd",
        LORA_EACH,
    )
    rows = [
        [NAMES[method], *(percent("headline", method, aurac_log2, task) for task in THREE_TASKS)]
        for method in methods
    ]
    return table(["AURAC (log2) in %", *(f"`{task}`" for task in THREE_TASKS)], rows)


@block
def three_tasks_findings() -> str:
    """What the table of three tasks says."""
    gains = [
        percent("headline", "lora/svd", aurac_log2, task, "lora/prefix") for task in THREE_TASKS
    ]
    family = "family_relationships"
    longer = percent("headline", "lora-longer/svd", aurac_log2, family, "lora/svd")
    loss = nats("hardly", "lora/trained", loss_at(1), family, "lora/svd")
    shares = [
        100 * run["cost"]["cuts"]["trained"]["tokens"] / run["cost"]["tokens"]
        for run in read("research/runs/hardly.jsonl")
        if run["job"]["split"] == "test" and "trained" in run["cost"]["cuts"]
    ]
    return "\n".join(
        [
            f"* **Reordering does the work.** LoRA, then `reorder`, has {gains[0]}, {gains[1]} and "
            f"{gains[2]} points more than LoRA, truncated.\n  Each method has its own learning "
            "rate.",
            "* **New examples are worth more than any order** on `family_relationships`: half a "
            f"run more adds {longer} points.",
            f"* **`train_ranks`** takes up to {max(shares):.1f} % of a run's tokens here. On "
            f"`family_relationships` it changes the loss at rank 1 by\n  {loss} nats.",
        ]
    )
