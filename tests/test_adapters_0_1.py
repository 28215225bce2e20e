"""What version 0.1 has written is read to the function that it had there, at every rank that it had.

``adapters_0_1`` holds its files and what its code computed and printed; ``make.py`` there has made them.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from matryoshka_lora import MatryoshkaError, evaluate, export, load, reorder, select
from matryoshka_lora.evaluation.report import page
from matryoshka_lora.evaluation.select import read_evaluation
from matryoshka_lora.formats.card import write_card
from matryoshka_lora.formats.opened import OpenedAdapter, open_adapter
from matryoshka_lora.serving.info import describe
from matryoshka_lora.training import load_config, make_config, train
from matryoshka_lora.training.resume import plan

MADE = Path(__file__).with_name("adapters_0_1")
PROMPT = torch.tensor([[5, 40, 17, 62, 8]])
LOGITS = load_file(MADE / "expected.safetensors")
SAID = json.loads((MADE / "expected.json").read_text())

NAMES = sorted({name.partition("/")[0] for name in LOGITS} - {"mean-checkpoint"})
# P of training stands beside the factors, or in them, and no prefix was deployed without it.
NOT_DEPLOYED = {
    *(f"{kind}-{scaling}" for kind in ("keep", "checkpoint") for scaling in ("none", "rank", "sqrt")),
    *("lora", "lora-checkpoint", "mean", "run-kept"),
}
# The prefixes have dropped the P that was trained.
PAPER = {"prefix-none", "prefix-rank", "prefix-sqrt", "prefix-none-alpha", "checkpoint-prefix", "run-paper"}
BY = {"frobenius": "svd"}


def ranks_of(name: str) -> list[int]:
    """Those that version 0.1 had."""
    found = (key.partition("/")[2] for key in LOGITS if key.startswith(f"{name}/"))
    return sorted(int(rank) for rank in found if rank.isdigit())


@pytest.fixture(autouse=True)
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in; the adapters name their base model as the folder ``base`` in it."""
    shutil.copytree(MADE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


BASE = AutoModelForCausalLM.from_pretrained(MADE / "base", dtype=torch.float32).eval()
BASE.config._name_or_path = BASE.name_or_path = "base"  # as the adapters call it


def base() -> Any:
    return copy.deepcopy(BASE)


def assert_says(model: Any, key: str) -> None:
    with torch.no_grad():
        found = model(input_ids=PROMPT).logits[0, -1]
    assert (found - LOGITS[key]).abs().max() < 1e-5 * LOGITS[key].abs().max(), key


def with_weights(adapter: OpenedAdapter, diagonal: Tensor, rank: int | None = None) -> Any:
    """The base model with ``B diag(p) A`` in its weights, or with the closest matrix of a rank to it."""
    model = base()
    for layer in adapter.layers:
        A, B = (factor.double() for factor in adapter.factors(layer))
        u, s, vh = torch.linalg.svd(B @ torch.diag(diagonal) @ A, full_matrices=False)
        s[len(s) if rank is None else rank :] = 0
        weight = model.get_submodule(layer.name).weight
        weight.data += (u @ torch.diag(s) @ vh).to(weight.dtype)
    return model


def said_to_be_reordered(name: str) -> Any:
    return pytest.warns(UserWarning, match="not reordered after training") if name in NOT_DEPLOYED else nullcontext()


def test_the_comparison_can_fail() -> None:
    """Ranks, and the training of those without P, differ by far more than the tolerance."""
    for name in NAMES:
        keys = [f"{name}/{rank}" for rank in ranks_of(name)] + ([f"{name}/training"] if name in PAPER else [])
        for i, key in enumerate(keys):
            for other in keys[:i]:
                assert (LOGITS[key] - LOGITS[other]).abs().max() > 2e-4 * LOGITS[key].abs().max(), (key, other)


@pytest.mark.parametrize("name", NAMES)
def test_load(name: str) -> None:
    adapter = load(base(), name)
    assert list(adapter.ranks) == ranks_of(name)
    for rank in adapter.ranks:
        adapter.set_rank(rank)
        assert_says(adapter.model, f"{name}/{rank}")


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_with_the_same_function(name: str) -> None:
    adapter = load(base(), name, trainable=True)
    adapter.draw(step=3, rows=1)
    assert adapter.model.training
    assert_says(adapter.model, f"{name}/training")


@pytest.mark.parametrize("name", NAMES)
def test_open_adapter_says_what_stands_between_the_factors(name: str) -> None:
    adapter = open_adapter(name)
    for rank in ranks_of(name):
        assert_says(with_weights(adapter, adapter.nested.diagonal(rank)), f"{name}/{rank}")


@pytest.mark.parametrize("name", NAMES)
def test_export(name: str, old: Path) -> None:
    """Each rank is what it was. What was not reordered is reordered, with a warning, and full rank is what it was."""
    top = ranks_of(name)[-1]
    for rank in ranks_of(name):
        with said_to_be_reordered(name):
            made = export(name, old / "new" / f"{rank}", rank)
        assert made.verified is not None
        plain = PeftModel.from_pretrained(base(), old / "new" / f"{rank}").eval()
        if rank == top or name not in NOT_DEPLOYED:
            assert_says(plain, f"{name}/{rank}")
        adapter = open_adapter(name)
        if name in NOT_DEPLOYED:
            assert_same(plain, with_weights(adapter, adapter.diagonal(adapter.layers[0]), rank))


def assert_same(model: Any, other: Any) -> None:
    with torch.no_grad():
        found, expected = (each(input_ids=PROMPT).logits for each in (model, other))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_reorder(name: str, old: Path) -> None:
    """Full rank is the function that was trained; of the paper's deployment, that is another than rank R had."""
    before, top = open_adapter(name), ranks_of(name)[-1]
    reorder(name, old / "new")
    adapter = load(base(), old / "new")
    assert adapter.ranks == tuple(range(1, top + 1))
    assert_says(adapter.model, f"{name}/{'training' if name in PAPER else top}")
    for rank in adapter.ranks:
        adapter.set_rank(rank)
        assert_same(adapter.model, with_weights(before, before.diagonal(before.layers[0]), rank))


def test_the_p_that_was_trained() -> None:
    """By the formula, from what the files of version 0.1 say themselves."""
    for scaling, whole in (("none", 1.0), ("rank", 3.0 / 4), ("sqrt", 1.7 / 2)):
        for kind in ("prefix", "checkpoint"):
            found = open_adapter(f"{kind}-{scaling}").nested.trained_diagonal()
            torch.testing.assert_close(found, oracle.trained_p([1, 2, 4], scaling, whole))


@pytest.mark.parametrize("name", NAMES)
def test_save_writes_it_in_the_words_of_today(name: str, old: Path) -> None:
    adapter = load(base(), name)
    with said_to_be_reordered(name):
        adapter.save(old / "new")
    assert json.loads((old / "new" / "nesting.json").read_text())["format_version"] == 2
    again = load(base(), old / "new")
    for rank in ranks_of(name):
        again.set_rank(rank)
        if rank == ranks_of(name)[-1] or name not in NOT_DEPLOYED:
            assert_says(again.model, f"{name}/{rank}")


@pytest.mark.parametrize("name", NAMES)
def test_info(name: str) -> None:
    found, said = describe(name), SAID[name]
    text = "\n".join(found.lines())
    reordered = found.adapter.nested.reordered
    if name.startswith("run-"):
        # Which order `matryoshka train` has made stands in its config only.
        assert reordered == {"run-learned": "learned", "run-svd": "svd"}.get(name)
    elif reordered:
        assert reordered == BY.get(said["by"], said["by"])
    if reordered:
        assert f"reordered by {reordered}: any rank may be used" in text
    assert ("drops P: low ranks are poor" in text) == (name in PAPER)
    if name not in PAPER:  # of which it now tells what reordering would make of it
        for rank, kept in said["kept"].items():
            assert found.kept(int(rank)) == pytest.approx(kept, rel=1e-5)


def test_a_rule_without_p_is_not_said_to_drop_it(old: Path) -> None:
    for name in ("stratified", "dylora-all"):
        adapter = open_adapter(name)
        assert "rank r is its first r columns" in describe(name).kind
        write_card(old / name, adapter.config, adapter.nested)
        assert "P is dropped" not in (old / name / "README.md").read_text()


def test_a_rule_of_studies_is_refused_where_its_p_is_needed() -> None:
    for read in (open_adapter, describe, lambda path: load(base(), path)):
        with pytest.raises(MatryoshkaError, match=r"rule 'mean' .* for studies.*Reorder the adapter with .* 0\.1"):
            read("mean-checkpoint")


def test_the_first_directions_only() -> None:
    adapter = load(base(), "directions", max_rank=2)
    assert adapter.ranks == (1, 2)
    for rank in (1, 2):
        adapter.set_rank(rank)
        assert_says(adapter.model, f"directions/{rank}")


# Evaluations


def test_select() -> None:
    assert {str(rank): value for rank, value in read_evaluation("loss").values().items()} == SAID["values"]
    for within, expected in SAID["choices"].items():
        choice = select("loss", within=float(within))
        assert (choice.rank, choice.best, choice.ties) == (expected["rank"], expected["best"], expected["ties"])


def test_an_evaluation_of_other_weights_is_noticed() -> None:
    shutil.copy("activations/adapter_model.safetensors", "loss/adapter_model.safetensors")
    with pytest.raises(MatryoshkaError, match="measured on other weights"):
        select("loss", within=0.1)


def test_an_evaluation_is_added_to() -> None:
    """Its answers are not taken over, and the way out that is named keeps its tasks."""
    rows = [{"prompt": f"{n} + 1 =", "completion": str(n + 1)} for n in range(2)]
    options: Any = {"data": rows, "ranks": [1, 2, 4], "dtype": "fp32", "latency": False}
    with pytest.raises(MatryoshkaError, match=r"answers of another adapter, or of version 0\.1.*--force"):
        evaluate("loss", **options)
    assert list(evaluate("loss", **options, overwrite=True).tasks) == ["letters.yaml", "data"]
    assert list(read_evaluation("loss").tasks) == ["letters.yaml", "data"]
    assert {str(rank): value for rank, value in read_evaluation("loss").values("letters.yaml").items()} == SAID[
        "values"
    ]


def test_an_evaluation_is_shown(old: Path) -> None:
    found = read_evaluation("loss")
    assert "letters.yaml" in page(found.to_dict(), found.examples)
    adapter = open_adapter("loss")
    write_card(old / "loss", adapter.config, adapter.nested, measured=True)
    card = (old / "loss" / "README.md").read_text()
    assert "| letters.yaml: acc, 24 questions |" in card
    assert "reordered (`loss`)" in card


# Runs

# The configs of the runs, in the words of today.
RUNS: dict[str, dict[str, Any]] = {
    "run-learned": {"nesting": {"ranks": [1, 2, 4], "reorder": "learned"}},
    "run-svd": {"nesting": {"ranks": [1, 2, 4], "scaling": "sqrt", "reorder": "svd"}, "lora": {"lora_alpha": 3.4}},
    "run-paper": {"nesting": {"ranks": [1, 2, 4], "scaling": "rank", "deploy": "paper"}, "lora": {"lora_alpha": 4}},
}


def config_of(name: str, **changes: Any) -> Any:
    given = {**RUNS.get(name, {"nesting": {"ranks": [1, 2, 4]}}), **changes}
    settings = {
        "model": "base",
        "dtype": "fp32",
        "data": {"task": "chain_sum", "size": 20},
        "output_dir": name,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
    }
    lora = {"target_modules": ["q_proj", "down_proj"], **given.pop("lora", {})}
    return make_config({**settings, "lora": lora, **given})


@contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    yield
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_finished(name: str, old: Path) -> None:
    assert plan(config_of(name)).finished
    with nothing_written(old / name):
        adapter = train(config_of(name))
    assert_says(adapter.model, f"{name}/4")


def test_a_finished_run_that_is_asked_for_in_another_way(old: Path) -> None:
    # It has a checkpoint, from which another order is made.
    assert not plan(config_of("run-learned", nesting={"ranks": [1, 2, 4], "reorder": "svd"})).finished
    for name, changes, message in (
        ("run-svd", {"lora": {}}, "lora.lora_alpha was 3.4 and is now 4"),
        ("run-svd", {"nesting": {"ranks": [1, 2, 4], "scaling": "rank"}}, "nesting.scaling was sqrt and is now rank"),
        ("run-paper", {"nesting": {"ranks": [1, 2, 4], "scaling": "rank"}}, "finished run without checkpoints"),
        # P in the factors and no order: today there is no word for it.
        ("run-kept", {}, "finished run without checkpoints"),
    ):
        with nothing_written(old / name), pytest.raises(MatryoshkaError, match=message):
            train(config_of(name, **changes))


def test_a_run_that_was_stopped_goes_on(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a checkpoint of version 0.1, to the function that version 0.1 has trained."""
    for file in (old / "run-learned").iterdir():
        if file.is_file() and file.name != "train.yaml":
            file.unlink()
    assert plan(config_of("run-learned")).step == 2
    adapter = train(config_of("run-learned"))
    assert "after 2 steps" in capsys.readouterr().out
    assert_says(adapter.model, "run-learned/4")
    assert_says(load(base(), "run-learned").model, "run-learned/4")


@pytest.mark.parametrize("name", [*RUNS, "run-kept"])
def test_a_config_of_version_0_1_is_told_the_words_of_today(name: str) -> None:
    with pytest.raises(MatryoshkaError, match=r"nesting\.alpha is of version 0\.1.*lora\.lora_alpha"):
        load_config(f"{name}/train.yaml")
