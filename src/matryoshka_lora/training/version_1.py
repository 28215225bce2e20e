"""The words that configs of version 0.1 had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matryoshka_lora.errors import MatryoshkaError

_NOW = {
    "alpha": "the scale of the largest rank is lora.lora_alpha / r: for scaling 'rank' write alpha as lora.lora_alpha, "
    "for 'sqrt' alpha * sqrt(r), and for 'none' leave both out",
    "inference": "leave it out. inference: prefix with reorder: false is nesting.deploy: paper",
}


def refuse_old_words(config: Mapping[str, Any]) -> None:
    """Raises MatryoshkaError for a word of version 0.1, with the one that has its place."""
    nesting = config.get("nesting")
    for key, now in _NOW.items():
        if isinstance(nesting, Mapping) and key in nesting:
            raise MatryoshkaError(f"nesting.{key} is of version 0.1: {now}")
    if "recipe" in config:
        raise MatryoshkaError(
            "recipe is of version 0.1: write nesting.deploy: paper for recipe: paper, and nothing for recipe: default"
        )


def in_new_words(written: Mapping[str, Any]) -> dict[str, Any]:
    """The ``train.yaml`` of a run, by whichever version: what it says, in the words of today.

    Factors that were saved with P in them and not reordered have no word now; their ``reorder`` stays False.
    """
    config, nesting = dict(written), written.get("nesting")
    if not isinstance(nesting, Mapping) or "inference" not in nesting:
        return config
    new = {key: value for key, value in nesting.items() if key not in _NOW}
    is_paper = nesting["inference"] == "prefix" and nesting.get("reorder") is False
    new |= {"deploy": "paper", "reorder": None} if is_paper else {"deploy": "reordered"}
    return {**config, "nesting": new}
