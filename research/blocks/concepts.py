"""The blocks of docs/concepts.md."""

from __future__ import annotations

from matryoshka_lora import Nesting
from research.blocks.registry import block, read, table


@block
def singular_layer() -> str:
    """What the first four columns of one layer miss."""
    layer = read("docs/singular.json")
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
