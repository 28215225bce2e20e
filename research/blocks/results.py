"""The blocks of docs/results.md and docs/reorder.md, but for the paper's own regime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from matryoshka_lora import aurac
from research import stats
from research.blocks.shared import (
    THREE_TASKS,
    block,
    chosen_rate,
    difference,
    facts_table,
    in_paper_regime,
    nats,
    p_kept_minus_lora,
    p_kept_rate,
    p_minus_lora,
    percent,
    points,
    price,
    read,
    spread,
    table,
)
from research.curves import (
    accuracies,
    of_method,
    references_with_best_warmup,
)
from research.looks import LOW_NAMES, NAMES, TRAINED
from research.stats import Estimate, accuracy_at, aurac_linear, aurac_log2, loss_at, mean_loss
from research.study import LORA_EACH, load_study


@block
def facts256() -> str:
    """256 facts: the paper, DyLoRA and longer training."""
    methods = (
        "matryoshka/prefix",
        "dylora-authors/prefix",
        "matryoshka-authors/svd",
        "lora/svd",
        "lora-longer/svd",
        LORA_EACH,
    )
    return facts_table("every256", "256 facts", methods, (1, 2, 3, 4, 8, 32))


@block
def low_256() -> str:
    """256 facts, with the `train_ranks` of version 0.5."""
    ranks = (1, 2, 3, 4, 6, 8, 32)
    trained = ("lora/trained-0.25", TRAINED, "lora/trained-1.0")
    methods = ("lora/svd", *trained, "lora/squeezed", LORA_EACH)
    return facts_table("low-256", "256 facts", methods, ranks, LOW_NAMES)


@block
def low_256_findings() -> str:
    """`train_ranks` of version 0.5 against LoRA-Squeeze, the SVD and LoRA trained at rank 1."""
    minus_squeezed, minus_svd = (
        [
            points(difference("low-256", TRAINED, accuracy_at(rank), other), "+")
            for rank in (1, 2, 3, 4, 6)
        ]
        for other in ("lora/squeezed", "lora/svd")
    )
    trained = of_method("low-256", TRAINED)
    of_more = of_method("low-256", "lora/trained-1.0")
    lowest = min(min(accuracies(of_more, rank)) for rank in of_more[0].ranks)
    largest_fall = 100 * max(map(stats.largest_fall, trained))
    references = accuracies(of_method("low-256-alone", LORA_EACH), 1)
    return (
        f"* `train_ranks` minus LoRA-Squeeze at the ranks 1, 2, 3, 4 and 6, on the same seeds: "
        f"{', '.join(minus_squeezed)} points. Minus `reorder`:\n  {', '.join(minus_svd)}. No rank "
        f"of any seed has more than {largest_fall:.1f} points less than the next smaller one.\n"
        f"* With half a run's examples, rank 1 has {fmean(accuracies(trained, 1)):.1f} % in the "
        f"mean. With as many examples as the run, no rank\n  of "
        f"any seed has less than {lowest:.1f} %. LoRA trained at rank 1 has "
        f"{min(references):.1f} to {max(references):.1f} % in the\n  same seeds."
    )


@block
def low_512() -> str:
    """512 facts, with the `train_ranks` of version 0.5."""
    return _harder_facts("low-512", "512 facts")


@block
def low_capacity() -> str:
    """Fewer trainable parameters, with the `train_ranks` of version 0.5."""
    return _harder_facts("low-capacity", "256 facts, fewer trainable parameters")


def _harder_facts(study: str, heading: str) -> str:
    ranks = (1, 2, 3, 4, 6, 8, 32)
    methods = ("lora/svd", TRAINED, "lora/trained-1.0", "lora/squeezed", LORA_EACH)
    return facts_table(study, heading, methods, ranks, LOW_NAMES)


@block
def low_differences() -> str:
    """Differences of `train_ranks` from LoRA-Squeeze and from LoRA trained at the rank."""
    ranks = (1, 2, 4)
    studies = {
        "256 facts": ("low-256", ["lora/squeezed", LORA_EACH]),
        "512 facts": ("low-512", ["lora/squeezed", LORA_EACH]),
        "fewer trainable parameters": ("low-capacity", ["lora/squeezed", LORA_EACH]),
    }
    names = {"lora/squeezed": "LoRA-Squeeze", LORA_EACH: "LoRA trained at the rank"}
    differences = {
        f"{label} | {share} | {names[other]}": [
            difference(study, method, accuracy_at(rank), other) for rank in ranks
        ]
        for label, (study, others) in studies.items()
        for other in others
        for method, share in ((TRAINED, "half a run"), ("lora/trained-1.0", "a run"))
    }
    heading = ["points", "examples of `train_ranks`", "minus"]
    return _differences_table([*heading, *(f"rank {rank}" for rank in ranks)], differences)


@block
def facts256_reference() -> str:
    """How unstable the reference is, and at which rates."""
    warmup, references = references_with_best_warmup()
    ranges: list[str] = []
    for results in (references, of_method("every256", LORA_EACH)):
        for rank in (1, 2):
            shares = accuracies(results, rank)
            ranges.append(f"{min(shares):.1f} to {max(shares):.1f} %")
    return (
        "* **LoRA trained at the rank** has at the ranks 1 and 2 the best of nine rates and of "
        f"three warmups ({warmup} % of the steps;\n  [studies]"
        "(../research/README.md#lora-at-one-rank-with-three-warmups)). Its seeds have "
        f"{ranges[0]} and {ranges[1]}.\n  In `every256`, with a warmup of 5 %, a coarser grid and "
        f"two validation seeds, they have {ranges[2]} and {ranges[3]}."
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
    """A description of our variant of LoRA-Squeeze."""
    num_tries = {"train_ranks": 0, "squeezed": 0}
    for line in read("research/runs/tries.jsonl"):
        if line["kind"] in ("squeeze", "squeezed"):
            # Those of version 0.4 are only for comparison.
            num_tries["squeezed"] += line["tries"] if line["version"] == "0.3" else 0
        elif line["kind"] not in ("svd", "alone", "continued LoRA"):
            num_tries["train_ranks"] += line["tries"]
    squeezed = of_method("every256", "lora/squeezed")
    parameters_of_lora = fmean(curve.parameters for curve in of_method("every256", "lora/svd"))
    times = fmean(curve.parameters for curve in squeezed) / parameters_of_lora
    return (
        "* **LoRA-Squeeze** ([paper](https://arxiv.org/abs/2602.10993)) is a chained variant of "
        "ours: it truncates and trains on, from rank to rank.\n  No rank is validated, and it has "
        "the learning rate that is best for it, so it starts from another adapter than "
        "`train_ranks` does. It "
        f"had {num_tries['squeezed']} tries, and "
        f"`train_ranks` {num_tries['train_ranks']}. It leaves a file\n  for each of the "
        f"{len(squeezed[0].ranks)} ranks, which are {times:.1f} times as large as the adapter. The "
        "authors' form, which truncates within the training,\n  was not run."
    )


def _differences_table(heading: Sequence[str], differences: Mapping[str, list[Estimate]]) -> str:
    """Return a row of differences in points, and the number of seeds, for each label."""
    rows = [
        [label, *(points(estimate, "+") for estimate in estimates), str(estimates[0].n)]
        for label, estimates in differences.items()
    ]
    return table([*heading, "seeds"], rows)


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
        "lora/learned-0.1",
    )
    rows = [
        [NAMES[method], *(percent("headline", method, aurac_log2, task) for task in THREE_TASKS)]
        for method in methods
    ]
    return table(["AURAC (log2) in %", *(f"`{task}`" for task in THREE_TASKS)], rows)


@block
def three_tasks_findings() -> str:
    """Findings of the table of three tasks."""
    gains = [_gain_of_one_svd(task) for task in THREE_TASKS]
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
def ordinary_low_ranks() -> str:
    """How far rank 1 is behind after ``reorder``, on ordinary tasks."""
    gaps: list[str] = []
    for task in THREE_TASKS:
        shares = [
            100 * ((accuracy_at(1)(curve) or 0) - (accuracy_at(32)(curve) or 0))
            for curve in of_method("headline", "lora/svd", task)
        ]
        estimate = stats.estimate(shares)
        if estimate is None:
            raise ValueError(f"{task} has no runs.")
        gaps.append(f"{estimate.text(1, 1, '+')} on `{task}`")
    behind = nats("headline", "lora/svd", loss_at(1), "chain_sum", LORA_EACH)
    return (
        f"  After `reorder`, rank 1 minus R is, in points of right answers, {', '.join(gaps)}.\n"
        f"  On `chain_sum`, its loss is {behind} nats above that of LoRA trained at rank 1, "
        "so rank 1 can still improve there."
    )


def _gain_of_one_svd(task: str) -> str:
    """Return the AURAC that one SVD adds to the same adapters of plain LoRA, truncated."""
    study = load_study("headline")
    rate = chosen_rate("headline", "lora/svd", task)
    gains: list[float] = []
    for job, run in study.load_runs().items():
        key = (job.recipe, job.task, job.rank, job.learning_rate, job.split)
        if key == ("lora", task, study.rank, rate, "test") and job.seed in study.seeds:
            truncated = aurac(run.curves["prefix"].accuracy, run.ranks)
            gains.append(aurac(run.curves["svd"].accuracy, run.ranks) - truncated)
    estimate = stats.estimate(gains)
    if estimate is None:
        raise ValueError(f"No adapter of {task} has both deployments.")
    return points(estimate)


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
    rates_of_p, rates_of_dylora = (
        spread([chosen_rate("headline", method, task) for task in THREE_TASKS])
        for method in ("matryoshka/prefix", "dylora/prefix")
    )
    kept = [
        points(
            in_paper_regime("matryoshka-authors/kept", "dylora-authors/prefix", area, "chain_sum"),
            "+",
        )
        for area in (aurac_log2, aurac_linear)
    ]
    return (
        "* **The paper has P ahead of DyLoRA.** Here, with P *dropped* after training and with "
        f"DyLoRA, AURAC is\n  {'; '.join(areas)} %. The rates are {rates_of_p} for P and "
        f"{rates_of_dylora} for DyLoRA;\n  the paper's are 5e-6 to 1e-3. In [its own regime]"
        "(#the-papers-own-regime), P dropped minus DyLoRA is at rank 1\n  "
        f"{' and '.join(differences)} points on `chain_sum` and 128 facts. **With P kept**, P is "
        f"ahead there on `chain_sum`\n  by {kept[1]} points of the AURAC over the linear rank, "
        f"where large ranks count more, and by {kept[0]} over log2."
    )


@block
def p_at_ranks() -> str:
    """P minus plain LoRA at each rank, which AURAC hides."""
    ranks = (1, 2, 4, 8, 16, 32)
    columns = [*(accuracy_at(rank) for rank in ranks), aurac_log2]
    label = f"`chain_sum`, truncated, both at the rate {p_kept_rate():g}"
    differences = {label: [p_kept_minus_lora(value) for value in columns]}
    for task in THREE_TASKS:
        differences[f"`{task}`, `reorder`"] = [p_minus_lora(value, task) for value in columns]
    heading = ["P minus LoRA, points", *(f"rank {rank}" for rank in ranks), "AURAC"]
    return _differences_table(heading, differences)


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


# Ordinary tasks, where rank hardly matters: the study ``ordinary``.

LONGER = "lora-longer/svd"
_PRICE = ("tokens", "seconds", "seeds")


@block
def ordinary_tasks() -> str:
    """Losses minus the losses of ``reorder``, for each task and way."""
    values = {"mean": mean_loss, "rank 1": loss_at(1), "rank 4": loss_at(4), "R": loss_at(32)}
    rows: list[list[str]] = []
    for task in load_study("low-ordinary").tasks:
        for study, method in (
            ("low-ordinary", TRAINED),
            ("low-ordinary", "lora/trained-1.0"),
            ("ordinary", LONGER),
        ):
            cells = [nats(study, method, value, task, "lora/svd") for value in values.values()]
            num_seeds = str(len(of_method(study, method, task)))
            rows.append([f"`{task}`", LOW_NAMES[method], *cells, *price(study, method), num_seeds])
    return table(["task", "change of the loss from `reorder`, nats", *values, *_PRICE], rows)


@block
def ordinary_findings() -> str:
    """How often the trained ranks are kept, what they cost, and what a longer run needs."""
    kept: list[str] = []
    runs = read("research/runs/low-ordinary.jsonl")
    for task in load_study("low-ordinary").tasks:
        cuts = [run["cost"]["cuts"] for run in runs if run["job"]["task"] == task]
        cuts = [cut for cut in cuts if "trained" in cut]
        num_kept = sum(cut["trained"]["outcome"] == "kept" for cut in cuts)
        kept.append(f"{num_kept} of {len(cuts)} on `{task}`")
    again, longer_run = (
        nats("rest", method, mean_loss, "chain_sum", "lora/svd")
        for method in ("lora-again/svd", LONGER)
    )
    return (
        f"* The trained ranks were kept in {' and '.join(kept)}.\n"
        "* **A longer run needs no new examples for its gain**: on `chain_sum`, half as many steps "
        "again on the *same* examples, in one run,\n  change the mean loss by "
        f"{again} nats, and with new examples by {longer_run} (three seeds, version 0.1). "
        "Where R itself can still\n  improve, train longer from the start: once the learning rate "
        "has fallen to 0, more steps for R, or of plain LoRA, did\n  less than that on one "
        "validation seed ([tries](../research/earlier.md#what-was-tried))."
    )
