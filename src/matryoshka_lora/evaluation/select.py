"""`select`: the smallest rank that is good enough."""

from __future__ import annotations

import os
import re

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.evaluation.choice import Choice, Wish, choose
from matryoshka_lora.evaluation.reading import read_evaluation
from matryoshka_lora.evaluation.results import Evaluation


def select(
    evaluation: Evaluation | str | os.PathLike[str],
    within: float | str | None = None,
    *,
    max_bytes: int | None = None,
    max_latency: float | None = None,
    task: str | None = None,
) -> Choice:
    """Choose the smallest rank that is good enough, and say what speaks for it.

    Example::

        select("my-adapter", within="1%").rank  # 4

    Args:
        evaluation: What `matryoshka_lora.evaluate` returned or wrote: its file, its folder, or the adapter's folder.
        within: How far below the best rank's value it may be, as a share of that value: ``0.01`` or ``"1%"``. None
            takes the best rank that keeps the limits.
        max_bytes: The most bytes of the exported adapter.
        max_latency: The most milliseconds for one token, on the machine that evaluated.
        task: The task to choose by; may be None where there is only one.

    Returns:
        The rank, the best rank, and their differences: a difference below two standard errors cannot be told apart.

    Raises:
        MatryoshkaError: There is no such evaluation or task, no wish, or no rank that meets it.
    """
    found = evaluation if isinstance(evaluation, Evaluation) else read_evaluation(evaluation)
    wish = Wish(parse_share(within) if isinstance(within, str) else within, max_bytes, max_latency)
    if wish == Wish():
        raise MatryoshkaError("say what the rank must meet: within, such as 1%, max_bytes or max_latency")
    if wish.within is not None and not 0 <= wish.within <= 1:
        raise MatryoshkaError(f"within is {wish.within}; write a share from 0 to 1, such as 0.01, or a text such as 1%")
    return choose(found.measured(task), wish)


def parse_share(text: str) -> float:
    """``"1%"`` as 0.01.

    Raises:
        MatryoshkaError: It is no share in percent.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*%", text.strip())
    if not found or float(found[1]) > 100:
        raise MatryoshkaError(f"within is {text!r}; write a share of the best value in percent, such as 1%")
    return float(found[1]) / 100
