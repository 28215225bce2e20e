"""Built-in tasks: the splits never meet, are the same everywhere, and the verifier survives any answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.data.tasks import HELD_OUT, Task, get_task

# Of products every seventh question is a repetition, of chain_sum every twentieth.
NAMES = ["family_relationships", "chain_sum", "gsm_symbolic", "products"]


def questions(task: Task, split: str, size: int) -> list[str]:
    return [example.prompt for example in task.examples(split, size)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6)
@given(seed=st.integers(0, 3000), size=st.integers(1, 1500))
def test_splits_are_disjoint_without_repetition(name: str, seed: int, size: int) -> None:
    task = get_task(name, seed=seed)
    train = questions(task, "train", size)
    validation, test = questions(task, "validation", 400), questions(task, "test", 400)
    for split, wanted in ((train, size), (validation, 400), (test, 400)):
        assert len(set(split)) == len(split) == wanted
    assert not set(train) & set(validation)
    assert not set(train) & set(test)
    assert not set(validation) & set(test)


@pytest.mark.parametrize("name", NAMES)
def test_train_avoids_even_the_held_out_questions_that_nobody_asked_for(name: str) -> None:
    train = set(questions(get_task(name, seed=1), "train", 1000))
    other = get_task(name, seed=7)
    for split in ("validation", "test"):
        everything = getattr(other, f"_all_of_{split}")
        assert HELD_OUT / 2 < len(everything) <= HELD_OUT
        assert not train & everything


def test_held_out_questions_do_not_depend_on_the_seed_and_training_ones_do() -> None:
    one, two = get_task("family_relationships", seed=0), get_task("family_relationships", seed=1)
    for split in ("validation", "test"):
        assert one.examples(split, 50) == two.examples(split, 50)
    assert not set(questions(one, "train", 200)) & set(questions(two, "train", 200))


def test_a_smaller_size_is_a_prefix_of_a_larger_one() -> None:
    task = get_task("chain_sum")
    for split in ("train", "validation", "test"):
        assert task.examples(split, 30) == task.examples(split, 300)[:30]


def test_examples_are_the_same_in_another_process() -> None:
    code = (
        "import json\nfrom matryoshka_lora.data.tasks import get_task\n"
        f"print(json.dumps([[e.prompt, e.completion] for n in {NAMES} for s in ('train', 'validation', 'test')"
        " for e in get_task(n, seed=3).examples(s, 40)]))"
    )
    here = [
        [example.prompt, example.completion]
        for name in NAMES
        for split in ("train", "validation", "test")
        for example in get_task(name, seed=3).examples(split, 40)
    ]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(there.stdout.splitlines()[-1]) == here


def test_chain_sum_has_two_terms_of_two_digits_unless_told_otherwise() -> None:
    assert get_task("chain_sum").examples("test", 1)[0].entry["metadata"]["num_terms"] == 2
    longer = get_task({"name": "chain_sum", "min_terms": 4, "max_terms": 4, "max_digits": 3})
    for example in longer.examples("train", 20):
        assert example.entry["metadata"]["num_terms"] == 4
        assert example.entry["metadata"]["num_digits"] in (2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_right_answer_is_correct_and_others_are_not(name: str) -> None:
    task = get_task(name)
    for example in task.examples("test", 20):
        assert task.is_correct(example.completion, example)
        assert task.is_correct(f" {example.completion}\n", example)
        assert not task.is_correct("", example)
        assert not task.is_correct("no idea", example)


@pytest.mark.parametrize("name", [*NAMES, "countdown", "simple_equations", "complex_arithmetic"])
@given(text=st.text())
def test_the_verifier_never_raises(name: str, text: str) -> None:
    task = get_task(name)
    assert task.is_correct(text, task.examples("test", 1)[0]) in (True, False)


@pytest.mark.parametrize("text", ["1/0", "nan", "9" * 5000, "\x00", "((((", "[" * 500, "__import__('os').getcwd()"])
def test_the_verifier_survives_odd_answers(text: str) -> None:
    for name in ("chain_sum", "countdown", "complex_arithmetic", "gsm_symbolic"):
        task = get_task(name)
        assert task.is_correct(text, task.examples("test", 1)[0]) in (True, False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("family_relationship", "did you mean 'family_relationships'"),
        ("xyzzy", "there is no built-in task 'xyzzy'"),
        ({"min_terms": 2}, "there is no built-in task None"),
        ({"name": "chain_sum", "min_term": 2}, "no setting 'min_term'; did you mean 'min_terms'"),
        ({"name": "chain_sum", "seed": 2}, "no setting 'seed'"),
        ({"name": "chain_sum", "min_terms": 3}, "max_terms must be >= min_terms"),
    ],
)
def test_wrong_tasks(spec: object, message: str) -> None:
    with pytest.raises(MatryoshkaError) as caught:
        get_task(spec).examples("test", 5)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize("seed", [-1, True, "1", 1.5])
def test_wrong_seeds(seed: object) -> None:
    with pytest.raises(MatryoshkaError, match="the seed of a task"):
        get_task("chain_sum", seed=seed)  # type: ignore[arg-type]


def test_wrong_splits_and_sizes() -> None:
    task = get_task("chain_sum")
    with pytest.raises(MatryoshkaError, match="split is 'dev'; write one of 'train', 'validation', 'test'"):
        task.examples("dev", 5)  # type: ignore[arg-type]
    for size in (0, -1, True, 2.0, "5"):
        with pytest.raises(MatryoshkaError, match="size is"):
            task.examples("test", size)  # type: ignore[arg-type]


def test_more_questions_than_there_are() -> None:
    with pytest.raises(MatryoshkaError, match=r"different questions for test, not 1001: write size \d+ or less"):
        get_task("chain_sum").examples("test", HELD_OUT + 1)
    with pytest.raises(MatryoshkaError, match="different questions for train"):
        get_task("prime_factorization").examples("train", 1500)


def test_a_generator_that_hangs_on_the_hash_seed_wants_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(MatryoshkaError, match="PYTHONHASHSEED=0"):
        get_task("isomorphic_strings").examples("test", 5)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(get_task("isomorphic_strings").examples("test", 5)) == 5


def test_a_generator_without_answers_cannot_be_trained_on() -> None:
    with pytest.raises(MatryoshkaError, match="no answer in words"):
        get_task("rubiks_cube").examples("test", 5)
