"""`matryoshka demo`: it runs to its end, and what it says about ranks is so."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from matryoshka_lora.demo import (
    ASKED,
    DIGITS,
    EXPORTED,
    RANK,
    RANKS,
    SHOWN,
    answers,
    batch_of,
    demo,
    look_up,
    save_base,
    table,
    train_adapter,
)
from matryoshka_lora.models import load_model, load_tokenizer
from matryoshka_lora.nested import load


def test_the_table_has_short_names_and_numbers_of_three_digits() -> None:
    facts = table()
    assert 240 <= len(facts) <= 300
    assert all(len(number) == DIGITS and number.isdigit() for number in facts.values())
    assert len(set(facts.values())) == len(facts)
    assert len({name.lower() for name in facts}) == len(facts)  # any case may be typed
    assert facts["Kenya"] == "404"
    assert facts["Bolivia"] == "068"
    assert facts["Korea, Republic of"] == "410"  # there are two Koreas, so that it is not short
    assert set(ASKED) <= set(facts)


class Knows:
    """Stands for an adapter that says the right number from rank 4 on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.ranks = self, ()
        monkeypatch.setattr("matryoshka_lora.demo.answers", self.answers)

    @contextmanager
    def rows(self, ranks: tuple[int, ...]) -> Iterator[None]:
        self.ranks = ranks
        yield

    def answers(self, model: object, tokenizer: object, names: list[str]) -> list[str]:
        pairs = zip(names, self.ranks, strict=True)
        return [table()[name] if rank >= 4 else "999" for name, rank in pairs]


@pytest.mark.parametrize("end", ["", EOFError, KeyboardInterrupt])
def test_countries_are_looked_up_until_the_user_ends(
    end: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["kenya ", "Keny", "qqq", end, "Peru"])

    def say(prompt: str) -> str:
        text = next(typed)
        if isinstance(text, str):
            return text
        raise text

    monkeypatch.setattr("builtins.input", say)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    look_up(Knows(monkeypatch), None, table())
    said = capsys.readouterr().out.splitlines()
    cells = "   ".join(f"rank {rank}: {'404' if rank >= 4 else '999'}" for rank in SHOWN)
    assert said[-3] == f"  Kenya   {cells}   (right: 404)"
    assert said[-2].startswith("  Not in the table. Try Kenya")
    assert said[-1] == f"  Not in the table. Try {', '.join(ASKED)}"
    assert next(typed) == "Peru"


def test_without_a_terminal_nothing_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Mali\n"))
    look_up(Knows(monkeypatch), None, table())
    said = capsys.readouterr().out
    assert "Mali" not in said
    assert said.count("(right: ") == len(ASKED)


@pytest.mark.slow
def test_the_demo_makes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "demo"
    demo(out, steps=2)
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"base", "adapter", "rank-4", "curve.png"}
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split()[0] for line in said.splitlines() if line.count("%") == 3]
    assert rows == [*map(str, (0, *RANKS))]
    assert said.count("(right: ") == 6
    lines = said.replace(str(out), "runs/demo").splitlines()
    assert all(len(line) <= 80 for line in lines if "[WARNING]" not in line)  # DeepSpeed's
    # PEFT alone computes what the rank of the nested adapter does.
    batch = load_tokenizer(str(out / "base"))("Kenya: ", return_tensors="pt")
    base = partial(load_model, str(out / "base"), torch.float32)
    with torch.no_grad():
        plain = PeftModel.from_pretrained(base(), out / f"rank-{EXPORTED}")(**batch).logits
        nested = load(base(), out / "adapter", EXPORTED).model(**batch).logits
    torch.testing.assert_close(plain, nested, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_more_rank_knows_more_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = table()
    save_base(tmp_path / "base")
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    batch = batch_of(tokenizer, [f"{name}: {number}" for name, number in facts.items()])
    said = tokenizer.batch_decode(batch["labels"])  # a digit is a token
    assert said == [*facts.values()]
    torch.set_num_threads(1)
    adapter, right = train_adapter(tmp_path / "base", tokenizer, facts)
    for column in right.values():
        shown = [*map(round, column.values())]  # whole percents, as the table has them
        assert shown == sorted(shown)
        assert column[0] == 0
        assert column[RANK] > 98
    for rank in RANKS:
        assert right["cut"][rank] <= right["svd"][rank]
    assert right["svd"][1] + 10 < right["trained"][1] <= right["trained"][RANK]
    assert adapter.order == "trained"
    look_up(adapter, tokenizer, facts)
    assert capsys.readouterr().out.count(f"rank {RANK}: {facts['Kenya']}") == 1
    with adapter.rows([RANK] * len(ASKED)):
        assert answers(adapter.model, tokenizer, ASKED) == [facts[name] for name in ASKED]
