"""The blocks of docs/concepts.md."""

from __future__ import annotations

from matryoshka_lora import Nesting
from research.blocks.shared import (
    THREE_TASKS,
    block,
    in_paper_regime,
    p_kept_minus_dropped,
    p_kept_minus_lora,
    p_kept_rate,
    p_minus_lora,
    points,
    read,
    table,
)
from research.stats import accuracy_at, aurac_log2, loss_at


@block
def singular_layer() -> str:
    """The error of the first four columns of one layer."""
    layer = read("research/runs/singular.json")
    error_before = 100 * layer["trained"]["missing"][4]
    error_after = 100 * layer["svd"]["missing"][4]
    return (
        f"As trained, the first four columns miss {error_before:.0f} % of the norm of the update. "
        f"After `reorder` they miss {error_after:.0f} %."
    )


@block
def p_ratios() -> str:
    """How many times larger P is in training than what is deployed at rank R."""
    rows: list[list[str]] = []
    for max_rank in (32, 256):
        nestings = (
            Nesting.powers_of_two(max_rank, "none", 1.0),
            Nesting.powers_of_two(max_rank, "sqrt", max_rank**-0.5),
            Nesting.powers_of_two(max_rank, "rank", 1 / max_rank),
        )
        cells = [f"{nesting.diagonal()[0] / nesting.scale:.0f}" for nesting in nestings]
        rows.append([f"R = {max_rank}", *cells])
    return table(["p_1 / s_R", "`none`", "`sqrt`", "`rank`"], rows)


@block
def p_kept() -> str:
    """The effect of keeping P, on the same adapters."""
    at_rank_1, at_rank_8, at_rank_32 = (
        points(p_kept_minus_dropped(accuracy_at(rank)), "+") for rank in (1, 8, 32)
    )
    return (
        "On `chain_sum`, keeping P instead of dropping it changes the right answers of the same "
        f"adapters, truncated, by\n{at_rank_1} points at rank 1, {at_rank_8} at rank 8 and "
        f"{at_rank_32} at R = 32 (three seeds)."
    )


@block
def p_orders() -> str:
    """P orders the prefixes; after an SVD it changes little."""
    gain = points(p_kept_minus_lora(accuracy_at(1)), "+")
    loss = p_kept_minus_lora(loss_at(1)).text(sign="+")
    areas = [points(p_minus_lora(aurac_log2, task), "+") for task in THREE_TASKS]
    paper_areas = [
        points(in_paper_regime("matryoshka-authors/svd", "lora-authors/svd", aurac_log2, task), "+")
        for task in ("chain_sum", "facts-128")
    ]
    return (
        f"**P orders the prefixes.** On `chain_sum`, at the learning rate {p_kept_rate():g} for "
        "both, adapters trained with P, truncated to\nrank 1 with P kept, differ from "
        f"plain LoRA, truncated to rank 1, by {gain} points and {loss} nats (three seeds).\n\n"
        "**After an SVD, no gain from P was found** in the mean over the ranks. P minus LoRA, both "
        f"after `reorder`,\nis {areas[0]}, {areas[1]} and {areas[2]} points of AURAC on three "
        "tasks (five seeds, each at its rate). With\n[the paper's settings]"
        f"(results.md#the-papers-own-regime), it is {paper_areas[0]} on `chain_sum` and "
        f"{paper_areas[1]} on 128 facts (three seeds)."
    )
