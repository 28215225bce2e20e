"""The deployments of a trained adapter: their records."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from matryoshka_lora import TrainRanksResult
from research.deployments import trained_ranks
from research.training import Trained


class FakeAdapter:
    """Has trained some ranks."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(eval=lambda: None)

    def train_ranks(self, trainer: Any, max_examples: int, seed: int) -> TrainRanksResult:
        assert max_examples == 24
        return TrainRanksResult(None, "kept", 2, {1: 16, 2: 8}, {1: 1.0, 4: 0.5}, {1: 0.6})


def test_trained_ranks_record_their_outcome_and_examples() -> None:
    adapter = FakeAdapter()
    trained = SimpleNamespace(
        study=SimpleNamespace(max_examples=24),
        ranks=(1, 4),
        trainer=SimpleNamespace(args=SimpleNamespace(seed=0)),
        details={},
        new_adapter=lambda: adapter,
    )
    adapters: list[Any] = list(trained_ranks(cast("Trained", trained)))
    assert adapters == [(adapter, 1), (adapter, 4)]
    assert trained.details == {
        "trained": {"outcome": "kept", "small_rank": 2, "examples_by_rank": {"1": 16, "2": 8}}
    }
