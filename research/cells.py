"""How a number is written in a cell of a table."""

from __future__ import annotations

import math
from functools import partial

from research.stats import Estimate


def _number(found: Estimate | None, unit: float, digits: int, sign: str = "") -> str:
    if found is None:
        return ""
    # Adding zero turns -0.0 into 0.0.
    text = f"{round(unit * found.mean, digits) + 0.0:{sign}.{digits}f}"
    return text if found.half_width is None else f"{text} ± {unit * found.half_width:.{digits}f}"


percent = partial(_number, unit=100, digits=1)
points = partial(_number, unit=100, digits=1, sign="+")
nats = partial(_number, unit=1, digits=3)
more = partial(_number, unit=1, digits=3, sign="+")


def nats_or_diverged(loss: float) -> str:
    """A loss of one run."""
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def count(found: Estimate | None) -> str:
    """Of how many values a mean is."""
    return str(found.n if found else 0)


def written_p(p: float | None) -> str:
    """A p, where there is one."""
    return "" if p is None else f"{p:.5f}"


def reading_of(found: Estimate | None) -> str:
    """What the interval of a difference says."""
    if found is None or found.sign is None:
        return "of one seed"
    return ("undecided" if found.half_width else "the same", "higher", "lower")[found.sign]
