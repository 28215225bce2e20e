"""`matryoshka demo` runs to its end, and its claims about the ranks hold."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from matryoshka_lora import load
from matryoshka_lora.demo import (
    EXPORT_RANK,
    MAX_RANK,
    NUM_DIGITS,
    QUERY_RANKS,
    RANKS,
    SAMPLE_COUNTRIES,
    answer_queries,
    collate,
    country_numbers,
    demo,
    generate_numbers,
    save_base_model,
    train_adapter,
    typed_queries,
)
from matryoshka_lora.peft.base_model import load_model, load_tokenizer


def test_the_table_has_short_names_and_numbers_of_three_digits() -> None:
    numbers = country_numbers()
    assert 240 <= len(numbers) <= 300
    assert all(len(number) == NUM_DIGITS and number.isdigit() for number in numbers.values())
    assert len(set(numbers.values())) == len(numbers)
    assert len({name.lower() for name in numbers}) == len(numbers)  # queries ignore the case
    assert numbers["Kenya"] == "404"
    assert numbers["Bolivia"] == "068"
    assert numbers["Korea, Republic of"] == "410"  # "Korea" alone would be ambiguous
    assert set(SAMPLE_COUNTRIES) <= set(numbers)


class FakeAdapter:
    """Stands for an adapter that knows every number from rank 4 on."""

    def __init__(self) -> None:
        self.model = self
        self.ranks: Sequence[int] = ()

    @contextmanager
    def rows(self, ranks: Sequence[int]) -> Iterator[None]:
        self.ranks = ranks
        yield

    def generate_numbers(self, model: object, tokenizer: object, names: list[str]) -> list[str]:
        numbers = country_numbers()
        return [
            numbers[name] if rank >= 4 else "999"
            for name, rank in zip(names, self.ranks, strict=True)
        ]


@pytest.fixture
def fake_adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    adapter = FakeAdapter()
    monkeypatch.setattr("matryoshka_lora.demo.generate_numbers", adapter.generate_numbers)
    return adapter


def test_known_countries_are_answered_at_several_ranks_and_others_get_suggestions(
    fake_adapter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_queries(fake_adapter, None, country_numbers(), ["kenya", "Keny", "qqq"])  # type: ignore[arg-type]
    known, similar, unknown = capsys.readouterr().out.splitlines()
    for rank in QUERY_RANKS:
        assert f"rank {rank}: {'404' if rank >= 4 else '999'}" in known
    assert "Try Kenya" in similar
    assert f"Try {', '.join(SAMPLE_COUNTRIES)}" in unknown


@pytest.mark.parametrize("end", ["", EOFError(), KeyboardInterrupt()])
def test_queries_end_with_an_empty_line_or_a_signal(
    end: str | BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["Kenya ", end, "Peru"])

    def fake_input(prompt: str) -> str:
        text = next(typed)
        if isinstance(text, BaseException):
            raise text
        return text

    monkeypatch.setattr("builtins.input", fake_input)
    assert list(typed_queries()) == ["Kenya"]


@pytest.mark.slow
def test_the_demo_writes_what_it_announces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Mali\n"))  # not a terminal, so nothing is read
    output = tmp_path / "new" / "demo"
    demo(output, num_steps=2)
    text = capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {"base", "adapter", "rank-4"}
    table_ranks = [line.split()[0] for line in text.splitlines() if line.count("%") == 3]
    assert table_ranks == [str(rank) for rank in (0, *RANKS)]
    assert text.count("(correct: ") == len(SAMPLE_COUNTRIES)
    assert "Mali" not in text
    lines = text.replace(str(output), "runs/demo").splitlines()
    assert all(len(line) <= 80 for line in lines if "[WARNING]" not in line)  # DeepSpeed's

    # PEFT alone computes what the rank of the nested adapter does.
    batch = load_tokenizer(str(output / "base"))("Kenya: ", return_tensors="pt")
    base_model = partial(load_model, str(output / "base"), torch.float32)
    plain_model = PeftModel.from_pretrained(base_model(), output / f"rank-{EXPORT_RANK}")
    nested_model = load(base_model(), output / "adapter", EXPORT_RANK).model
    with torch.no_grad():
        plain_logits = plain_model(**batch).logits
        nested_logits = nested_model(**batch).logits
    torch.testing.assert_close(plain_logits, nested_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # minutes on a quiet machine, on one thread
def test_larger_ranks_know_more_of_the_table(tmp_path: Path) -> None:
    numbers = country_numbers()
    save_base_model(tmp_path / "base")
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    batch = collate(tokenizer, [f"{name}: {number}" for name, number in numbers.items()])
    assert tokenizer.batch_decode(batch["labels"]) == list(numbers.values())  # a token per digit
    torch.set_num_threads(1)
    adapter, accuracies_by_method = train_adapter(tmp_path / "base", tokenizer, numbers)
    truncated, reordered, trained = accuracies_by_method.values()
    for accuracies in (truncated, reordered, trained):
        assert accuracies[0] == 0
        assert accuracies[MAX_RANK] > 98
    for accuracies in (truncated, reordered):
        shown = [round(accuracy) for accuracy in accuracies.values()]
        assert shown == sorted(shown)
    for smaller, larger in itertools.pairwise(trained.values()):
        assert larger > smaller - 1  # training changes rank R, too; a number is 0.4 points
    for rank in RANKS:
        assert truncated[rank] <= reordered[rank]
    assert reordered[1] + 10 < trained[1] <= trained[MAX_RANK]
    assert adapter.small_rank > 0
    with adapter.rows([MAX_RANK] * len(SAMPLE_COUNTRIES)):
        answers = generate_numbers(adapter.model, tokenizer, SAMPLE_COUNTRIES)
    assert answers == [numbers[name] for name in SAMPLE_COUNTRIES]
