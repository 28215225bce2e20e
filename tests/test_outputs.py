"""What is written does not go over another adapter, model or evaluation unasked; and then it leaves nothing of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import an_evaluation
import pytest
import typer
from conftest import LINEAR_LAYERS, randomize, tiny_llama
from peft import LoraConfig, get_peft_model
from strangers import lora_file, output
from tiny_chat import tiny_tokenizer
from transformers import AutoModelForCausalLM

from matryoshka_lora import MatryoshkaError, NestedAdapter, evaluate, export, load, nest, reorder
from matryoshka_lora.cli.main import app
from matryoshka_lora.files import check_free, kinds_in


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs") / "base"
    tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nested(base: Path) -> Path:
    """An adapter that names its base model."""
    folder = base.parent / "nested"
    config = LoraConfig(r=4, lora_alpha=4, target_modules=LINEAR_LAYERS)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomize(model)
    adapter = nest(model)
    adapter.reorder()
    adapter.save(folder)
    return folder


def loaded(nested: Path) -> NestedAdapter:
    return load(tiny_llama(num_hidden_layers=1), nested)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


Write = Callable[[Path, Path, bool], object]


def exporting(rank: int, format: Any) -> Write:
    return lambda nested, out, over: export(nested, out, rank, format, verify=False, overwrite=over)


NEW: dict[str, Write] = {
    "peft": exporting(2, "peft"),
    "merged": exporting(2, "merged"),
    "ladder": exporting(2, "ladder"),
    "directions": exporting(4, "directions"),
    "mlx": exporting(2, "mlx"),
    "gguf-ladder": exporting(2, "gguf-ladder"),
    "reordered": lambda nested, out, over: reorder(nested, out, overwrite=over),
    "from a model": lambda nested, out, over: loaded(nested).export(out, 2, overwrite=over),
}


def evaluated_adapter(nested: Path, out: Path) -> None:
    reorder(nested, out)
    for folder in (out, out / "evaluation"):
        an_evaluation.write(folder, an_evaluation.some_examples())
        for name in ("curve.png", "report.html", "answers.jsonl", "answers.jsonl.lock"):
            (folder / name).write_text("old")


def model_in_shards(nested: Path, out: Path) -> None:
    tiny_llama(seed=7).save_pretrained(out, max_shard_size="100KB")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(out)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2


OLD: dict[str, Callable[[Path, Path], object]] = {
    "adapter": evaluated_adapter,
    "model": model_in_shards,
    "ladder": lambda nested, out: exporting(4, "ladder")(nested, out, False),
    "directions": lambda nested, out: exporting(4, "directions")(nested, out, False),
    "mlx": lambda nested, out: exporting(4, "mlx")(nested, out, False),
    "gguf-ladder": lambda nested, out: exporting(4, "gguf-ladder")(nested, out, False),
}


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("new", NEW)
def test_an_output_replaces_another_only_when_told_and_then_wholly(
    nested: Path, tmp_path: Path, old: str, new: str
) -> None:
    out = tmp_path / "out"
    NEW[new](nested, out, False)
    alone = content(out)
    shutil.rmtree(out)

    OLD[old](nested, out)
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine")
    before = content(out)
    with pytest.raises(MatryoshkaError, match=r"out holds .* already: .*--force.*overwrite=True"):
        NEW[new](nested, out, False)
    assert content(out) == before

    NEW[new](nested, out, True)
    assert content(out) == {**alone, "notes/mine.txt": b"mine"}
    assert not [path for path in out.rglob("*") if path.is_dir() and not any(path.iterdir())]
    if new == "merged":
        merged = AutoModelForCausalLM.from_pretrained(out)
        wanted = loaded(nested)
        wanted.set_rank(2)
        assert (output(merged) - output(wanted.model)).norm() < 1e-5 * output(merged).norm()


@pytest.mark.parametrize("new", NEW)
def test_a_card_that_somebody_wrote_stays(nested: Path, tmp_path: Path, new: str) -> None:
    """A README.md alone is no reason to refuse, and nobody's to throw away."""
    (tmp_path / "README.md").write_text("# My project\n")
    if new.endswith("ladder"):
        with pytest.raises(MatryoshkaError, match=r"README\.md that somebody has written"):
            NEW[new](nested, tmp_path, True)
        assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
        return
    for over in (False, True):
        NEW[new](nested, tmp_path, over)
        assert (tmp_path / "README.md").read_text() == "# My project\n"


RUNS = {"config": "train.yaml", "state": "trainer_state.json", "checkpoint": "checkpoint-3/trainer_state.json"}


@pytest.mark.parametrize("sign", RUNS)
@pytest.mark.parametrize("new", NEW)
def test_a_training_run_is_not_replaced(nested: Path, tmp_path: Path, new: str, sign: str) -> None:
    adapter = loaded(nested)
    adapter.save(tmp_path)
    (tmp_path / RUNS[sign]).parent.mkdir(exist_ok=True)
    (tmp_path / RUNS[sign]).write_text("{}")
    before = content(tmp_path)
    for over in (False, True):
        with pytest.raises(MatryoshkaError, match=r"holds a training run.*choose another folder"):
            NEW[new](nested, tmp_path, over)
    assert content(tmp_path) == before
    adapter.save(tmp_path)  # which is the run's own verb


def test_the_ladder_that_holds_the_adapter_is_not_replaced(nested: Path, tmp_path: Path) -> None:
    export(nested, tmp_path, format="ladder", verify=False)
    for over in (False, True):
        for write in (reorder, lambda source, target, **more: export(source, target, 1, **more)):
            with pytest.raises(MatryoshkaError, match="holds the adapter itself"):
                write(tmp_path / "rank-4", tmp_path, overwrite=over)


def test_the_commands_ask_too(nested: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> None:
        app([str(argument) for argument in arguments], standalone_mode=False)

    single = lora_file(tmp_path / "single.safetensors")
    for name, command in {
        "reordered": ["reorder", nested],
        "rank": ["export", nested, "--rank", 2],
        "merged": ["export", nested, "--rank", 2, "--format", "merged"],
        "ladder": ["export", nested, "--format", "ladder"],
        "directions": ["export", nested, "--format", "directions"],
        "file.gguf": ["export", nested, "--rank", 2, "--format", "gguf"],
        "gguf-ladder": ["export", nested, "--format", "gguf-ladder"],
        "mlx": ["export", nested, "--rank", 2, "--format", "mlx"],
        "kohya.safetensors": ["export", single, "--style", "kohya"],
        "peft": ["export", single, "--rank", 2, "--style", "peft"],
        "diffusers.safetensors": ["export", tmp_path / "peft", "--rank", 1, "--style", "diffusers"],
        "small.safetensors": ["export", single, "--rank", 2],
        "ordered.safetensors": ["reorder", single],
    }.items():
        out = tmp_path / name
        run(*command, "-o", out)
        before = content(tmp_path)
        with pytest.raises(MatryoshkaError, match=rf"{name} (holds|exists).*--force"):
            run(*command, "-o", out)
        assert content(tmp_path) == before
        run(*command, "-o", out, "--force")
        assert content(tmp_path).keys() == before.keys()
    with pytest.raises(MatryoshkaError, match="is the adapter itself"):
        run("export", nested, "--rank", 2, "-o", nested, "--force")


def test_an_empty_name_is_not_the_current_folder(nested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``-o "$OUT"`` gives where the variable was never set."""
    single = lora_file(tmp_path / "single.safetensors")
    (tmp_path / "model.safetensors").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = content(tmp_path)
    verbs = (["reorder", nested], ["export", nested, "--rank", "2"], ["export", single, "--rank", "2"])
    for command in (*verbs, ["eval", nested, "--tasks", "chain_sum"]):
        with pytest.raises(typer.BadParameter, match="name of the output is empty"):
            app([*map(str, command), "-o", "", "--force"], standalone_mode=False)
    for write in (
        lambda: reorder(nested, "", overwrite=True),
        lambda: export(nested, "", 2, overwrite=True),
        lambda: export(single, "", 2, style="peft", overwrite=True),
        lambda: evaluate(nested, "chain_sum", out="", overwrite=True),
        lambda: loaded(nested).save(""),
        lambda: loaded(nested).export("", 2, overwrite=True),
        lambda: loaded(nested).model.save_pretrained(""),
    ):
        with pytest.raises(MatryoshkaError, match="name of the output is empty"):
            write()
    assert content(tmp_path) == before


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_no_file_of_the_adapter_is_replaced(tmp_path: Path, style: Any) -> None:
    export(lora_file(tmp_path / "single.safetensors"), tmp_path / "folder", 2, style="peft")
    before = content(tmp_path)
    with pytest.raises(MatryoshkaError, match="is the adapter itself"):
        export(tmp_path / "folder", tmp_path / "folder/adapter_model.safetensors", 1, style=style, overwrite=True)
    assert content(tmp_path) == before


def test_a_folder_that_has_the_file_is_not_replaced(tmp_path: Path) -> None:
    file = lora_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(MatryoshkaError, match="holds the adapter itself"):
        export(file, tmp_path, 2, style="peft", overwrite=True)
    assert list(content(tmp_path)) == [file.name]


def test_what_is_nobody_s_output_is_free(tmp_path: Path) -> None:
    check_free(tmp_path / "absent", overwrite=False)
    for name in ("notes.txt", "data.json", "weights.safetensors", "evaluation", "rank-4"):
        (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("{}")
    check_free(tmp_path, overwrite=False)
    assert kinds_in(tmp_path) == []
