"""The blocks of docs/results.md."""

from __future__ import annotations

from statistics import fmean, median

from research import stats
from research.blocks.comparisons import (
    THREE_TASKS,
    chosen_rate,
    gain_of_one_svd,
    in_paper_regime,
    num_tries,
    other_version,
    p_kept_minus_lora,
    p_kept_rate,
    p_minus_lora,
    parameters_of_squeezed,
    points,
    points_less,
    rate_range,
    relative_seconds,
    spread,
    trained_minus,
)
from research.blocks.registry import (
    block,
    facts_table,
    percent,
    table,
)
from research.curves import curves, of_method, references_with_best_warmup
from research.looks import NAMES, P_TRAINED_0_3, TRAINED, train_ranks_name, trained_method
from research.plan import Result
from research.stats import accuracy_at, aurac_log2
from research.study import LORA_EACH


@block
def facts256() -> str:
    """256 facts, all methods."""
    methods = (
        "matryoshka/prefix",
        "dylora-authors/prefix",
        "matryoshka-authors/svd",
        "lora/svd",
        "lora-longer/svd",
        trained_method("every256"),
        P_TRAINED_0_3,
        "lora/squeezed",
        LORA_EACH,
    )
    return facts_table("every256", "256 facts", methods, (1, 2, 3, 4, 8, 32))


@block
def facts256_findings() -> str:
    """What the table of 256 facts says."""
    method = trained_method("every256")
    trained = of_method("every256", method)
    largest_fall = 100 * max(map(stats.largest_fall, trained))
    rank_1 = median(_accuracies(trained, 1))
    seconds = relative_seconds("every256", method)
    return (
        f"* {train_ranks_name(method)} takes rank 1 from nothing to {rank_1:.1f} % for half a "
        f"run's tokens, and {seconds:.1f} times a run's\n  seconds in all (the median; the machine "
        "is shared): on two layers, a step of 8 examples takes more than\n  a quarter of the time "
        "of one of 32. Its curve is nearly "
        f"monotone: no rank of any seed has more than {largest_fall:.1f} points less than the "
        "next smaller one.\n  That does not make it good at every rank."
    )


@block
def facts256_reference() -> str:
    """How unstable the reference is, and at which rates."""
    warmup, references = references_with_best_warmup()
    ranges: list[str] = []
    for results in (references, of_method("every256", LORA_EACH)):
        for rank in (1, 2):
            shares = _accuracies(results, rank)
            ranges.append(f"{min(shares):.1f} to {max(shares):.1f} %")
    return (
        "* **LoRA trained at the rank** has at the ranks 1 and 2 the best of nine rates and of "
        f"three warmups ({warmup} % of the steps;\n  [studies]"
        "(../research/README.md#lora-at-one-rank-with-three-warmups)). Its seeds have "
        f"{ranges[0]} and {ranges[1]}.\n  In `every256`, with a warmup of 5 %, a coarser grid and "
        f"two validation seeds, they have {ranges[2]} and {ranges[3]}.\n"
        "  `train_ranks` does not reach it at rank 1."
    )


@block
def facts256_paper() -> str:
    """How the paper's deployment does, and at which rates."""
    method = "matryoshka/prefix"
    others = ("every128", "every512", "capacity")
    largest_share = 100 * max(
        max(curve.curve.accuracy) for study in others for curve in of_method(study, method)
    )
    learning_rates = spread([chosen_rate(study, method) for study in ("every256", *others)])
    dropped, kept = (
        percent("paper-regime", f"matryoshka-authors/{kind}", accuracy_at(32), "facts-128")
        for kind in ("prefix", "kept")
    )
    return (
        "* **The paper's deployment** drops P. It answers nothing here, and at most "
        f"{largest_share:.1f} % with 128 or 512 facts and in the\n  next table. This does not "
        f"refute the paper: the rates here are {learning_rates}. Dropping P explains it at the "
        "ranks 16 and 32\n  only. In a pilot with 128 facts, one seed that is not among the runs, "
        "keeping P repaired these ranks. Up to rank 8\n  it hardly answered with P either. In "
        "[the paper's own regime](#the-papers-own-regime), with 128 facts, rank R\n  answers "
        f"{dropped} % with P dropped, and {kept} % with P kept."
    )


@block
def squeeze_tries() -> str:
    """What our variant of LoRA-Squeeze is."""
    num_of_trained, num_of_squeezed = num_tries()
    times = parameters_of_squeezed("every256")
    num_files = len(of_method("every256", "lora/squeezed")[0].ranks)
    return (
        "* **LoRA-Squeeze** ([paper](https://arxiv.org/abs/2602.10993)) is a chained variant of "
        "ours: it truncates and trains on, from rank to rank.\n  No rank is validated, so one "
        f"that training has made worse is kept. It had {num_of_squeezed} tries, and `train_ranks` "
        f"{num_of_trained}. It leaves a file\n  for each of the {num_files} ranks, which are "
        f"{times:.1f} times as large as the adapter. The authors' form, which truncates within the "
        "training,\n  was not run."
    )


def _accuracies(results: list[Result], rank: int) -> list[float]:
    """Return the right answers at a rank in %, by seed."""
    return [100 * (accuracy_at(rank)(result) or 0) for result in results]


@block
def capacity() -> str:
    """Two kinds of layers."""
    first = "256 facts, two kinds of layers"
    return facts_table("capacity", first, _facts_methods("capacity"), (1, 2, 3, 4, 8, 32))


def _facts_methods(study: str) -> tuple[str, ...]:
    """Return the methods that every study of facts has."""
    return "lora/svd", trained_method(study), "lora/squeezed", LORA_EACH


@block
def capacity_findings() -> str:
    """What the table of two kinds of layers says, and of which runs its rows are."""
    at_rank_2 = trained_minus("capacity", LORA_EACH, accuracy_at(2))
    findings = (
        "* **One nested adapter is not as good as a whole run at rank 2.** It has "
        f"{points_less(at_rank_2)} points less than LoRA trained there, which has\n  a whole run "
        "for this rank; `train_ranks` has half a run for ten ranks."
    )
    plain = chosen_rate("capacity", "lora/svd")
    trained = chosen_rate("capacity", trained_method("capacity"))
    if plain != trained:
        findings += (
            "\n* **The rows of `reorder` and `train_ranks` are of different runs of LoRA**, each "
            f"at the\n  rate that is best for it: {plain:g} and {trained:g}."
        )
    return findings


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
        for method in _facts_methods(study):
            shares_by_rank = [
                stats.values(curves(study), method, accuracy_at(rank)).values()
                for rank in (1, 2, 4)
            ]
            medians = [f"{100 * median(shares):.1f}" for shares in shares_by_rank if shares]
            cells.append(", ".join(medians))
        num_seeds = str(len(of_method(study, trained_method(study))))
        rows.append([label + other_version(study), *cells, num_seeds])
    return table(
        ["facts", *(NAMES[method] for method in _facts_methods("every256")), "seeds"], rows
    )


@block
def squeeze_differences() -> str:
    """``train_ranks`` minus LoRA-Squeeze, in all studies that have both."""
    studies = {
        "128 facts": "every128",
        "256 facts": "every256",
        "512 facts": "every512",
        "256 facts, two kinds of layers": "capacity",
        "256 facts, Gemma 3 270M": "gemma256",
        "256 facts, R = 128": "every256-rank128",
    }
    ranks = (1, 2, 3, 4, 8)
    rows: list[list[str]] = []
    for label, study in studies.items():
        estimates = [trained_minus(study, "lora/squeezed", accuracy_at(rank)) for rank in ranks]
        cells = [points(estimate, "+") for estimate in estimates]
        rows.append([label + other_version(study), *cells, str(estimates[0].n)])
    first = f"{train_ranks_name(TRAINED)} minus LoRA-Squeeze, points"
    heading = [first, *(f"rank {rank}" for rank in ranks), "seeds"]
    return table(heading, rows)


@block
def three_tasks() -> str:
    """AURAC of three tasks."""
    methods = (
        "lora/prefix",
        "matryoshka/prefix",
        "dylora/prefix",
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
    gains = [points(gain_of_one_svd(task)) for task in THREE_TASKS]
    family = "family_relationships"
    longer = percent("headline", "lora-longer/svd", aurac_log2, family, "lora/svd")
    return "\n".join(
        [
            f"* **Reordering does most of it.** One SVD adds {gains[0]}, {gains[1]} and {gains[2]} "
            "points to the same adapters of plain LoRA,\n  truncated, at the rate that is best "
            "for `reorder`. In the table, each row has the rate that is best for it.",
            "* **A longer run adds more** on `family_relationships`, after `reorder`: half a run "
            f"more adds {longer} points.",
        ]
    )


@block
def dylora_and_p() -> str:
    """The paper's comparison with DyLoRA, in our data."""
    areas: list[str] = []
    for task in THREE_TASKS:
        dropped, dylora = (
            100 * fmean(map(aurac_log2, of_method("headline", method, task)))
            for method in ("matryoshka/prefix", "dylora/prefix")
        )
        areas.append(f"{dropped:.1f} and {dylora:.1f}")
    differences = [
        points(
            in_paper_regime(
                "matryoshka-authors/prefix", "dylora-authors/prefix", accuracy_at(1), task
            ),
            "+",
        )
        for task in ("chain_sum", "facts-128")
    ]
    return (
        "* **The paper has P ahead of DyLoRA. Here it is the other way round**: with P, dropped "
        f"after training, and with\n  DyLoRA, AURAC is {'; '.join(areas)} %. The rates are "
        f"{rate_range('headline', 'matryoshka/prefix')} for P and\n  "
        f"{rate_range('headline', 'dylora/prefix')} for DyLoRA; the paper's are 5e-6 to 1e-3. In "
        "[its own regime](#the-papers-own-regime), P dropped\n  minus DyLoRA is at rank 1 "
        f"{' and '.join(differences)} points on `chain_sum` and 128 facts."
    )


@block
def p_at_ranks() -> str:
    """P minus plain LoRA at each rank, which AURAC hides."""
    ranks = (1, 2, 4, 8, 16, 32)
    columns = [*(accuracy_at(rank) for rank in ranks), aurac_log2]
    kept = [points(p_kept_minus_lora(value), "+") for value in columns]
    num_seeds = str(p_kept_minus_lora(aurac_log2).n)
    label = f"`chain_sum`, truncated, both at the rate {p_kept_rate():g}"
    rows = [[label, *kept, num_seeds]]
    for task in THREE_TASKS:
        cells = [points(p_minus_lora(value, task), "+") for value in columns]
        num_seeds = str(p_minus_lora(aurac_log2, task).n)
        rows.append([f"`{task}`, `reorder`", *cells, num_seeds])
    heading = ["P minus LoRA, points", *(f"rank {rank}" for rank in ranks), "AURAC", "seeds"]
    return table(heading, rows)


@block
def p_at_ranks_findings() -> str:
    """Where the intervals after ``reorder`` do not contain 0."""
    clear: list[str] = []
    for task in THREE_TASKS:
        for rank in (1, 2, 4, 8, 16, 32):
            estimate = p_minus_lora(accuracy_at(rank), task)
            if abs(estimate.mean) > (estimate.half_width or 0):
                clear.append(f"{points(estimate, '+')} at rank {rank} of `{task}`")
    return (
        "After `reorder`, these intervals do not contain 0. They are not corrected for their "
        "number:\n\n" + "\n".join(f"* {text}" for text in clear)
    )
