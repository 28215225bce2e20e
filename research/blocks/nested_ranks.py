"""What fewer nested ranks give to `train_ranks`: the studies ``capacity-...``."""

from __future__ import annotations

from statistics import fmean

from research.blocks.comparisons import points, trained_minus_study
from research.blocks.registry import block, median_and_lowest, table
from research.curves import of_method
from research.looks import TRAINED
from research.spent import examples_spent
from research.stats import accuracy_at
from research.study import LORA_EACH, load_study


@block
def nesting_controls() -> str:
    """What rank 2 has with fewer nested ranks, and the examples that it gets."""
    studies = {
        "ten nested ranks": "capacity",
        "(1, 2, 32)": "capacity-1-2",
        "(2, 32)": "capacity-2",
        "(2, 32), fewer examples": "capacity-2-equal",
    }
    rows: list[list[str]] = []
    for label, study in studies.items():
        cells = [median_and_lowest(study, TRAINED, accuracy_at(rank)) for rank in (1, 2, 32)]
        cells += [_mean_examples(study, rank) for rank in (1, 2)]
        rows.append([label, *cells, str(len(of_method(study, TRAINED)))])
    heading = ["`train_ranks`, nested ranks", *(f"rank {rank}" for rank in (1, 2, 32))]
    heading += [*(f"examples of rank {rank}" for rank in (1, 2)), "seeds"]
    return table(heading, rows)


def _mean_examples(study_name: str, rank: int) -> str:
    """Return how many examples a rank was trained on; nothing if it is not nested."""
    study = load_study(study_name)
    if rank not in study.ranks:
        return ""
    (task,) = study.tasks
    return f"{fmean(run.examples for run in examples_spent(study_name, TRAINED, task, rank)):,.0f}"


@block
def nesting_controls_findings() -> str:
    """Whether nesting costs anything, and what a user who wants one small rank gains."""
    rank_2 = accuracy_at(2)
    alone = trained_minus_study("capacity-2", TRAINED, "capacity", rank_2)
    to_lora = trained_minus_study("capacity-2", LORA_EACH, "capacity", rank_2)
    to_nested = trained_minus_study("capacity-2-equal", TRAINED, "capacity-1-2", rank_2)
    lora_examples = examples_spent("capacity", LORA_EACH, "facts-256", 2)[0].examples
    return (
        f"* **For one small rank**, nest `(2, 32)`. Its right answers at rank 2 differ from those "
        f"of ten nested ranks by\n  {points(alone, '+')} points, and from those of LoRA trained at "
        f"rank 2 by {points(to_lora, '+')}. That LoRA has {lora_examples:,.0f} examples\n  of rank "
        "2; `(2, 32)` has as many of R, and half as many after them.\n"
        "* **Does nesting cost anything?** With about as many examples for rank 2, rank 2 alone "
        f"minus rank 2 beside\n  rank 1 is {points(to_nested, '+')} points."
    )


@block
def one_small_rank() -> str:
    """What to nest for one small rank."""
    alone, nested = (
        median_and_lowest(study, TRAINED, accuracy_at(2)) for study in ("capacity-2", "capacity")
    )
    return (
        "* **For one small rank**, nest it and R only, `nest(model, ranks=(2, 32))`: all steps go "
        "to them. On 256 facts, with two kinds of\n  layers, rank 2 then has "
        f"{alone} % right answers; among ten nested ranks it has {nested} % ([results]"
        "(results.md#where-rank-matters),\n  medians and the lowest of five seeds)."
    )
