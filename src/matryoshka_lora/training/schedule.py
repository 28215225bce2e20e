"""The rank that each step trains: more steps where the loss is further behind that of rank R."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

MAX_RANK_SHARE = 1 / 8
"""Share of the steps for rank R, which has no gap."""
FINAL_MAX_RANK_SHARE = 1 / 3
"""The same in the final steps, which are small and restore what rank R has lost."""
FINAL_STEPS = 1 / 6
"""Share of the final steps."""
_GOLDEN_RATIO = 0.6180339887  # its multiples modulo 1 fill the unit interval evenly


def share_of_max_rank(step: int, num_steps: int) -> float:
    """Return the share of the steps for rank R at a step, from 0."""
    return FINAL_MAX_RANK_SHARE if step >= (1 - FINAL_STEPS) * num_steps else MAX_RANK_SHARE


def rank_shares(
    gaps: Mapping[int, float], max_rank_share: float = MAX_RANK_SHARE
) -> dict[int, float]:
    """Return the share of the steps of each rank to train.

    A nested rank below R gets a share in proportion to the square root of its gap. The ranks
    between two nested ones are trained too, if the larger is at most twice the smaller: together
    they get as much as one nested rank whose gap is between theirs. Rank R gets `MAX_RANK_SHARE`.

    Args:
        gaps: How much the loss of each nested rank exceeds that of rank R, at least 0.
        max_rank_share: The share of rank R.

    Returns:
        The shares of the ranks to train, in increasing order. Their sum is 1.
    """
    *smaller_ranks, max_rank = sorted(gaps)
    weights: dict[int, float] = {}
    for rank, next_rank in zip(smaller_ranks, [*smaller_ranks[1:], max_rank], strict=True):
        weights[rank] = math.sqrt(gaps[rank])
        if next_rank <= 2 * rank:
            for between in range(rank + 1, next_rank):
                position = math.log(between / rank) / math.log(next_rank / rank)
                gap = gaps[rank] * (1 - position) + gaps[next_rank] * position
                weights[between] = math.sqrt(gap) / (next_rank - rank - 1)
    total = sum(weights.values())
    if total == 0:
        return {max_rank: 1.0}
    shares = {rank: (1 - max_rank_share) * weight / total for rank, weight in weights.items()}
    shares[max_rank] = max_rank_share
    return shares


class RankSchedule:
    """Draws ranks so that each gets its share of the steps evenly over time.

    Args:
        seed: Seed of where the schedule begins.
    """

    def __init__(self, seed: int) -> None:
        self._point = random.Random(seed).random()

    def next(self, shares: Mapping[int, float]) -> int:
        """Return the rank of the next step.

        Args:
            shares: The share of each rank; their sum is 1. They may change from step to step.
        """
        point = self._point
        self._point = math.fmod(point + _GOLDEN_RATIO, 1.0)
        for rank, share in shares.items():
            point -= share
            if point < 0:
                return rank
        return max(shares)  # the shares add up to less than 1 by rounding
