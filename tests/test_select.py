"""`matryoshka select`: the smallest rank that is good enough, and what speaks for it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from an_evaluation import RANKS, example, some_examples, write
from hypothesis import assume, given
from hypothesis import strategies as st

from matryoshka_lora import MatryoshkaError, select
from matryoshka_lora.cli.main import main
from matryoshka_lora.evaluation.choice import Choice, Measured, Wish, choose
from matryoshka_lora.evaluation.select import parse_share, read_evaluation

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["matryoshka", "select", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return command


@st.composite
def tables(draw: st.DrawFn, questions: bool = False) -> Measured:
    """Any metric at any ranks, with each question's own values or without."""
    ranks = sorted(draw(st.sets(st.integers(1, 512), min_size=1, max_size=6)))
    count = len(ranks)
    each = st.floats(-100, 100).map(lambda value: round(value, 3))
    rows = draw(st.lists(st.lists(each, min_size=count, max_size=count), min_size=2, max_size=12))
    columns = np.array(rows)
    return Measured(
        ranks=ranks,
        metric="m,none",
        items=len(rows),
        values=columns.mean(0).tolist(),
        errors=(columns.std(0, ddof=1) / math.sqrt(len(rows))).tolist(),
        bytes=[100 * rank for rank in ranks],
        latency_ms=draw(st.none() | st.lists(st.floats(1, 99), min_size=count, max_size=count)),
        higher_is_better=draw(st.booleans()),
        by_question=dict(zip(ranks, columns.T.tolist(), strict=True)) if questions else {},
    )


@given(tables(), st.floats(0, 1))
def test_the_chosen_rank_is_within_and_no_smaller_one_is(measured: Measured, within: float) -> None:
    choice = choose(measured, Wish(within=within))
    values = np.array(measured.values) * (1 if measured.higher_is_better else -1)
    allowed = values.max() - within * abs(values.max())
    expected = measured.ranks[int(np.flatnonzero(values >= allowed)[0])]
    assert choice.rank == expected
    assert measured.value(choice.best) == pytest.approx(values.max() * (1 if measured.higher_is_better else -1))


@given(tables(), st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_share_never_chooses_a_smaller_rank(measured: Measured, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert choose(measured, Wish(within=low)).rank >= choose(measured, Wish(within=high)).rank


@given(tables(), st.integers(1, 60_000), st.floats(1, 99))
def test_limits_are_kept_and_the_best_of_what_is_left_is_chosen(measured: Measured, size: int, time: float) -> None:
    assume(measured.latency_ms is not None)
    sign = 1 if measured.higher_is_better else -1
    rows = zip(measured.ranks, measured.values, measured.bytes, measured.latency_ms or [], strict=True)
    left = [(sign * value, -rank) for rank, value, b, ms in rows if value is not None and b <= size and ms <= time]
    wish = Wish(max_bytes=size, max_latency=time)
    if left:
        assert choose(measured, wish).rank == -max(left)[1]
    else:
        with pytest.raises(MatryoshkaError, match="no rank meets the wish"):
            choose(measured, wish)


@given(tables(questions=True))
def test_paired_differences_are_those_of_the_questions(measured: Measured) -> None:
    first, last = measured.ranks[0], measured.ranks[-1]
    assume(first != last)
    difference = measured.difference(first, last)
    assert difference is not None
    assert difference.paired
    columns = [np.array(measured.by_question[rank]) for rank in (first, last)]
    each = (columns[0] - columns[1]) * (1 if measured.higher_is_better else -1)
    assert difference.value == pytest.approx(each.mean(), abs=1e-9)
    assert difference.error == pytest.approx(each.std(ddof=1) / math.sqrt(len(each)), abs=1e-9)
    mirrored = measured.difference(last, first)
    assert mirrored is not None
    assert mirrored.value == -difference.value
    assert mirrored.is_sure == difference.is_sure


def table(values: list[float | None], errors: list[float | None], **other: object) -> Measured:
    ranks = [2**number for number in range(len(values))]
    return Measured(ranks, "acc,none", 100, values, errors, bytes=[10 * rank for rank in ranks], **other)  # type: ignore[arg-type]


def chosen(measured: Measured, within: float = 0.01) -> Choice:
    return choose(measured, Wish(within=within))


def test_without_questions_the_errors_count_as_independent() -> None:
    difference = table([0.5, 0.9], [0.03, 0.04]).difference(2, 1)
    assert difference is not None
    assert difference.value == pytest.approx(0.4)
    assert difference.error == pytest.approx(0.05)
    assert not difference.paired
    assert difference.is_sure


def test_examples_whose_mean_is_not_the_metric_are_not_paired() -> None:
    of = {1: [0.0, 1.0] * 50, 2: [1.0, 1.0] * 50}
    assert table([0.5, 1.0], [0.1, 0.1], by_question=of).difference(1, 2).paired  # type: ignore[union-attr]
    assert not table([0.4, 1.0], [0.1, 0.1], by_question=of).difference(1, 2).paired  # type: ignore[union-attr]
    fewer = {rank: values[:50] for rank, values in of.items()}
    assert not table([0.5, 1.0], [0.1, 0.1], by_question=fewer).difference(1, 2).paired  # type: ignore[union-attr]


def test_pairing_tells_ranks_apart_that_their_errors_do_not() -> None:
    # The larger rank is right wherever the smaller one is, and at ten questions more.
    of = {1: [1.0] * 40 + [0.0] * 60, 2: [1.0] * 50 + [0.0] * 50}
    errors: list[float | None] = [0.049, 0.050]
    assert chosen(table([0.4, 0.5], errors, by_question=of)).ties == []
    assert chosen(table([0.4, 0.5], errors)).ties == [1]


def test_it_says_when_the_chosen_rank_may_be_farther_away() -> None:
    assert not chosen(table([0.50, 0.504], [0.05, 0.05])).is_sure
    assert chosen(table([0.50, 0.504], [0.0001, 0.0001])).is_sure
    assert not chosen(table([0.50, 0.504], [None, None])).is_sure
    assert chosen(table([0.3, 0.504], [0.05, 0.05])).is_sure  # the best itself


def test_a_rank_without_a_value_is_never_chosen() -> None:
    choice = chosen(table([None, 0.5, 0.1], [None, 0.1, 0.1]))
    assert choice.rank == 2
    assert set(choice.differences) == {4}
    with pytest.raises(MatryoshkaError, match="no value at any rank"):
        chosen(table([None, None], [None, None]))


def test_the_files_are_read_back_with_their_questions(tmp_path: Path) -> None:
    found = read_evaluation(write(tmp_path, some_examples()))
    assert found.task_name() == "family"
    measured = found.measured()
    assert set(measured.by_question) == {0, *RANKS}
    difference = measured.difference(4, 8)
    assert difference is not None
    assert difference.paired
    assert difference.value == pytest.approx(-1 / 60)
    assert not read_evaluation(write(tmp_path / "alone", None)).measured().by_question


def test_in_python_it_takes_what_was_returned_or_written(tmp_path: Path) -> None:
    file = write(tmp_path / "evaluation", some_examples())
    for given_as in (file, file.parent, str(tmp_path), read_evaluation(file)):
        choice = select(given_as, within="5%")
        assert (choice.rank, choice.best) == (4, 8)
        assert choice == select(given_as, 0.05) == select(given_as, " 5 % ", task="family")
    assert select(file, max_bytes=300_000).rank == select(file, max_bytes="0.3MB").rank == 2
    assert select(file, max_latency=34.1).rank == 1
    with pytest.raises(MatryoshkaError, match="say what the rank must meet: within, such as 1%, max_bytes or"):
        select(file)
    # Five is no share: whoever writes it means percent.
    for share in (5, -0.1, math.nan):
        with pytest.raises(MatryoshkaError, match=r"within is .*; write a share from 0 to 1, such as 0\.01"):
            select(file, within=share)


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0 %", 0), ("2.5%", 0.025), (".5%", 0.005), ("100%", 1)])
def test_shares_in_percent(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["1", "%", "-1%", "101%", "1%%", "nan%", "0.01", "1,5%"])
def test_texts_that_are_no_share(text: str) -> None:
    with pytest.raises(MatryoshkaError, match="write a share of the best value in percent, such as 1%"):
        parse_share(text)


def test_files_of_version_0_1_are_read(tmp_path: Path) -> None:
    """Format 2, whose words for the adapter were others."""
    before = {"name": "matryoshka-prefix", "path": "runs/demo/adapter", "inference": "prefix", "form": "raw"}
    found = read_evaluation(write(tmp_path, some_examples(), format=2, adapter=before))
    assert choose(found.measured(), Wish(0.05)).rank == 4


def test_the_command_chooses_and_gives_its_evidence(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "evaluation", some_examples())
    for given_as in (file, file.parent, tmp_path):
        code, out, err = run(given_as, "--within", "5%")
        assert (code, err) == (0, "")
        assert (
            "Rank 4 is the smallest that is within 5 % of the best (0.950 at rank 8, so at least 0.902): 0.933" in out
        )
        assert "0.933 ± 0.032" in out
        # One question of 60 is not more than chance.
        assert "Cannot be told apart from it by these 60 questions: rank 8 (within two standard errors, question" in out
        assert "Next: matryoshka export runs/demo/adapter --rank 4 -o adapter-rank-4" in out
    assert "Rank 8 is" in run(file, "--within", "0%")[1]
    assert "Rank 2 is the best that keeps the limit: 0.667" in run(file, "--max-bytes", 300_000)[1]
    assert "Rank 1 is the best that keeps the limit: 0.333" in run(file, "--max-latency", 34.1)[1]
    assert "Rank 4 is the smallest" in run(file, "--within", "5 %", "--max-bytes", "500 kB")[1]


@pytest.mark.parametrize(("base", "said"), [(0.0, False), (0.95, True), (None, False)])
def test_a_rank_that_is_not_better_than_the_base_model_is_said(
    run: Run, tmp_path: Path, base: float | None, said: bool
) -> None:
    file = write(tmp_path, some_examples())
    data = json.loads(file.read_text())
    data["tasks"]["family"]["metrics"]["acc,none"]["base"] = base if base is None else {"value": base, "stderr": 0.0}
    file.write_text(json.dumps(data))
    assert ("not better than the base model without the adapter" in run(tmp_path, "--within", "5%")[1]) == said


def test_without_examples_it_says_so(run: Run, tmp_path: Path) -> None:
    out = run(write(tmp_path, None), "--within", "5%")[1]
    assert "from the standard errors of both, as if they were independent" in out


def test_a_metric_to_be_low_is_chosen_and_shown_as_it_is(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path, some_examples())
    data = json.loads(file.read_text())
    data["tasks"]["family"]["metrics"]["acc,none"]["higher_is_better"] = False
    file.write_text(json.dumps(data))
    out = run(tmp_path, "--within", "1%")[1]
    assert "Rank 1 is the smallest that is within 1 % of the best (0.333 at rank 1, so at most 0.337)" in out
    assert "+0.333 ± " in out  # rank 2 has a larger value


def test_a_metric_that_does_not_say_which_is_better_chooses_nothing(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path, some_examples())
    data = json.loads(file.read_text())
    data["tasks"]["family"]["metrics"]["acc,none"]["higher_is_better"] = None
    file.write_text(json.dumps(data))
    code, _, err = run(tmp_path, "--within", "1%")
    assert code == 1
    assert "does not say whether more of acc,none is better: write higher_is_better" in err


def test_no_difference_has_no_sign_of_a_loss(run: Run, tmp_path: Path) -> None:
    rows = [example("t", n, {0: 0.0, 1: 0.0, 2: 0.0, 4: float(n > 3), 8: float(n > 3)}) for n in range(9)]
    write(tmp_path, rows)
    out = run(tmp_path, "--within", "1%")[1]
    assert "+0.000 ± 0.000" in out
    assert "-0.000" not in out


def test_ranks_that_follow_each_other_are_named_by_the_first_and_the_last(run: Run, tmp_path: Path) -> None:
    write(tmp_path, [example("t", number, dict.fromkeys((0, 1, 2, 4, 8), float(number > 3))) for number in range(9)])
    assert "by these 9 questions: rank 2 to 8 (within" in run(tmp_path, "--within", "1%")[1]


def test_several_tasks_need_a_name(run: Run, tmp_path: Path) -> None:
    write(tmp_path, some_examples("family") + some_examples("arc"))
    assert run(tmp_path, "--within", "5%", "--task", "arc")[1].startswith("arc: acc, 60 questions")
    for arguments in ([], ["--task", "hellaswag"]):
        code, _, err = run(tmp_path, "--within", "5%", *arguments)
        assert code == 1
        assert "write --task and one of: family, arc" in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is no evaluation"),
        ('{"format": 1}', "has format 1, and format 3 is needed"),
        ('{"format": 4}', "has format 4, and format 3 is needed"),
        ('{"format": 3}', "is damaged"),
        ('{"format": 3, "ranks": [1], "tasks": {"t": {}}}', "is damaged"),
        ('{"format": 3, "ranks": [1], "tasks": [1]}', "is damaged"),
        ('{"format": 3, "ranks": [1], "tasks": {}}', "holds no task"),
    ],
)
def test_a_file_that_is_no_evaluation(run: Run, tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(content)
    code, _, err = run(file, "--within", "1%")
    assert code == 1
    assert err.startswith("error: ")
    assert str(file) in err
    assert said in err


def test_what_cannot_be_chosen_is_explained(run: Run, tmp_path: Path) -> None:
    def explained(*arguments: object) -> str:
        code, _, err = run(*arguments)
        assert code == 1
        assert err.startswith("error: ")
        return err

    assert "does not exist" in explained(tmp_path / "absent", "--within", "1%")
    (tmp_path / "adapter").mkdir()
    assert "there is no evaluation.json in" in explained(tmp_path / "adapter", "--within", "1%")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    never = explained(tmp_path / "adapter", "--within", "1%")
    assert "never evaluated" in never
    assert f"matryoshka eval {tmp_path / 'adapter'} --tasks" in never

    file = write(tmp_path / "evaluation", some_examples())
    assert "the smallest has 115,200 bytes and 5 are allowed" in explained(file, "--max-bytes", 5)
    assert "the fastest takes 34.1 ms and 1 are allowed" in explained(file, "--max-latency", 1)
    far = explained(file, "--within", "1%", "--max-bytes", 300_000)
    assert "is within 1 % of the best, 0.950 at rank 8; the best of them has 0.667, at rank 2" in far
    untimed = write(tmp_path / "untimed", some_examples(), latency_ms=None)
    assert "no latency" in explained(untimed, "--max-latency", 50)
    assert run(untimed, "--within", "1%")[0] == 0
    (file.parent / "examples.jsonl").write_text("{\n")
    assert "examples.jsonl is damaged" in explained(file, "--within", "1%")
