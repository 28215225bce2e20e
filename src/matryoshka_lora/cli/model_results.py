"""Format the results of commands on models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matryoshka_lora.units import pluralize

if TYPE_CHECKING:
    from matryoshka_lora.lora.results import TrainRanksResult


def format_train_ranks(result: TrainRanksResult) -> str:
    """Return whether the ranks were trained. The losses are in the log."""
    if result.outcome == "nothing to train":
        return "All ranks are as good as the largest one already, so nothing was trained."
    if result.outcome == "no examples":
        return "The Trainer's examples cannot be used, so the ranks were not trained."
    if result.outcome == "not better":
        return "Training did not improve the ranks, so the trained factors were not kept."
    return f"The ranks were trained on {pluralize(result.num_examples, 'example')}."
