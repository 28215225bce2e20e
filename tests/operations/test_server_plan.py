"""The plan of a server of vLLM for a folder. tests/runtimes compares its memory with vLLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.many_adapters import save_adapter

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError, export_folder, info, info_folder
from matryoshka_lora.units import format_size

HIDDEN, KEY_VALUE, BLOCKS = 64, 32, 3
RANKS = {"a": 4, "b": 12, "c": 24, "d": 30}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Adapters of queries and values, and one of another base model."""
    for number, (name, rank) in enumerate(RANKS.items()):
        module, outputs = [("q_proj", HIDDEN), ("v_proj", KEY_VALUE)][number % 2]
        blocks = range(BLOCKS) if number > 1 else [0]
        layers = {f"model.layers.{n}.self_attn.{module}": (HIDDEN, outputs) for n in blocks}
        save_adapter(tmp_path / "loras" / name, layers, rank, "org/base", seed=number)
    layers = {"model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN)}
    save_adapter(tmp_path / "loras" / "other", layers, 32, "org/other")
    return tmp_path / "loras"


@pytest.mark.parametrize("max_error", [0.01, 0.3, 0.7])
def test_the_plan_has_the_smallest_ranks_and_export_follows_it(
    max_error: float, folder: Path, tmp_path: Path
) -> None:
    plan = info_folder(folder, error=max_error).plan
    assert plan is not None
    assert plan.base_model == "org/base"
    assert plan.ranks.keys() == RANKS.keys()
    assert "org/other" in plan.not_served["other"]
    export_folder(folder, tmp_path / "small", error=max_error, for_vllm=True)
    for name, rank in plan.ranks.items():
        errors = {0: 1.0, **info(folder / name).errors}
        smaller = max(value for value in (0, 1, 8, 16, 32) if value < rank)
        assert errors[smaller] > max_error
        assert errors.get(rank, 0.0) <= max_error
        assert set(ml.open(tmp_path / "small" / name).ranks.values()) == {min(rank, RANKS[name])}
    # vLLM fuses queries, keys and values, so a slot has keys too.
    per_rank = 2 * BLOCKS * (2 * HIDDEN + 2 * (HIDDEN + KEY_VALUE))
    assert plan.slot_sizes == {rank: rank * per_rank for rank in sorted(set(plan.ranks.values()))}
    rows = {line.split()[0]: line.split()[1:3] for line in plan.to_lines()[2:-2]}
    assert rows == {
        str(rank): [format_size(size), format_size(len(RANKS) * size)]
        for rank, size in plan.slot_sizes.items()
    }
    assert plan.larger(8) == [name for name, rank in plan.ranks.items() if rank > 8]


def test_the_memory_of_unknown_modules_is_not_guessed(folder: Path) -> None:
    save_adapter(folder / "dense", {"model.layers.0.dense": (8, 8)}, 4, "org/base")
    plan = info_folder(folder).plan
    assert plan is not None
    assert set(plan.slot_sizes.values()) == {None}


@pytest.mark.parametrize(
    "options", [{}, {"rank": 2}, {"error": "10%", "max_bytes": "1MB"}], ids=str
)
def test_a_rank_for_vllm_needs_an_error(options: Any, folder: Path, tmp_path: Path) -> None:
    for export, source in ((ml.export, folder / "a"), (export_folder, folder)):
        with pytest.raises(MatryoshkaError, match=r"for_vllm.*error"):
            export(source, tmp_path / "small", for_vllm=True, **options)  # type: ignore[operator]
