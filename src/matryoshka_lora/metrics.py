"""AURAC: one number for the whole rank-accuracy curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.nesting import Nesting


def aurac(accuracies: Sequence[float], ranks: Sequence[int], axis: Literal["log2", "linear"] = "log2") -> float:
    """The area under the rank-accuracy curve, divided by its width (arXiv 2605.07850).

    The trapezoid rule over ``log2(rank)`` or over the rank itself. On the linear axis the largest ranks have nearly
    all the weight (82 % of it on 64 to 256 for powers of two up to 256), so ``"log2"`` is the one to compare by.

    Args:
        accuracies: One accuracy per rank, in the unit the result shall have (share or percent).
        ranks: Strictly increasing positive integers.
        axis: ``"log2"`` or ``"linear"``.

    Returns:
        A number in the unit of the accuracies; for a single rank, its accuracy.

    Raises:
        MatryoshkaError: The lengths differ, the ranks do not increase, an accuracy is not finite, or the axis is
            unknown.
    """
    points = Nesting(ranks).ranks
    if len(accuracies) != len(points):
        raise MatryoshkaError(f"{len(accuracies)} accuracies for {len(points)} ranks; give one for each rank")
    if not all(math.isfinite(a) for a in accuracies):
        raise MatryoshkaError(f"the accuracies are not all finite: {list(accuracies)}")
    if axis not in ("log2", "linear"):
        raise MatryoshkaError(f"axis is {axis!r}; write 'log2' or 'linear'")
    if len(points) == 1:
        return float(accuracies[0])
    x = [math.log2(r) if axis == "log2" else float(r) for r in points]
    area = sum((x[i + 1] - x[i]) * (accuracies[i] + accuracies[i + 1]) / 2 for i in range(len(x) - 1))
    return area / (x[-1] - x[0])


def with_error(value: float | None, error: float | None) -> str:
    """A metric as people read it, with its standard error where there is one; ``"?"`` where there is no value."""
    if value is None:
        return "?"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
