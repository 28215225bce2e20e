"""`matryoshka demo`: it runs to its end, and what it says about ranks is so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.demo import (
    LINES,
    count_right,
    demo,
    encode,
    save_base,
    table,
    train_adapter,
)
from matryoshka_lora.models import load_tokenizer


def test_the_table_is_the_same_each_time_and_has_no_name_twice() -> None:
    assert table() == table()
    assert len(table()) == LINES
    assert set(table(8, seed=1).items()).isdisjoint(table(8).items())


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="exists already"):
        demo(tmp_path)


@pytest.mark.slow
def test_the_demo_makes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo(tmp_path / "demo", steps=2)
    said = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"base", "adapter", "rank-8"}
    rows = [line.split()[0] for line in said.splitlines() if " MB " in line]
    assert rows == ["1", "2", "4", "8", "16", "32"]
    assert said.count("(right: ") == 3


@pytest.mark.slow
def test_more_rank_knows_more_of_the_table(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    tokens, mask = encode(load_tokenizer(str(tmp_path / "base")), table())
    # The digits are what is asked: one token each, at the end of a line.
    assert all(len(set(row[-4:])) <= 4 for row in tokens.tolist())
    torch.set_num_threads(1)
    adapter = train_adapter(tmp_path / "base", tokens, mask)
    right = [count_right(adapter, tokens, mask, rank) / LINES for rank in (1, 2, 4, 8, 32)]
    assert right == sorted(right)
    assert right[0] < 0.2
    assert right[-1] > 0.9
