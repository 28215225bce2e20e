"""Whatever is stopped in the middle of writing, and however: the old folder is there afterwards, or the new one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import an_evaluation
import interrupted
import pytest
import torch
from conftest import nested_llama, tiny_llama
from strangers import lora_file
from tiny_chat import tiny_tokenizer

from matryoshka_lora import Nesting, export, load, reorder
from matryoshka_lora.evaluation.evaluate import write_evaluation
from matryoshka_lora.evaluation.results import Evaluation
from matryoshka_lora.evaluation.store import Store
from matryoshka_lora.files import settle, write_text

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")

NESTING = Nesting([1, 2, 4])
STOPS = {"killed": interrupted.kill, "Ctrl-C": interrupted.interrupt, "full disk": interrupted.fill_the_disk}
Content = dict[str, bytes]


def content(folder: Path) -> Content:
    """All files, but those of a writer."""
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if not file.is_dir()}
    return {name: file.read_bytes() for name, file in files.items() if ".writing" not in name}


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".writing" in path.name]


def points(count: int, how: str) -> list[int]:
    """The last operations put the new files into place: all of them for a kill, else each for one of the two."""
    step = {"killed": 1, "Ctrl-C": 2, "full disk": 2}[how]
    late = range(max(1, count - 26) + (how == "Ctrl-C"), count + 1, step)
    return [*range(1, late[0], 6 * step), *late]


def some_results(seed: int) -> Evaluation:
    examples = an_evaluation.some_examples(questions=10 * seed)
    data = an_evaluation.evaluation(examples)
    about = {key: value for key, value in data.items() if key not in ("format", "ranks", "tasks")}
    return Evaluation(about, data["ranks"], data["tasks"], examples)


class World:
    """Adapters and models that the scenarios write, made once."""

    def __init__(self, folder: Path) -> None:
        self.base = str(folder / "base")
        tiny_llama(num_hidden_layers=1).save_pretrained(self.base)
        tiny_tokenizer().save_pretrained(self.base)
        one = nested_llama(NESTING, layers=1, target_modules=["q_proj", "down_proj"])
        one.save(folder / "paper")
        one.reorder()
        one.save(folder / "one")
        with torch.no_grad():
            for name, parameter in one.model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-3)
        one.save(folder / "two")
        self.folder = folder
        for seed, name in enumerate(("one", "two")):
            lora_file(folder / f"{name}.safetensors", seed)
        export(folder / "two.safetensors", folder / "two-peft", style="peft")
        self.first, self.second = (load(tiny_llama(num_hidden_layers=1), folder / name) for name in ("one", "two"))

    def export(self, name: str, out: Path, rank: int, format: Any, **more: Any) -> None:
        """Without logits, which need no files here."""
        export(self.folder / name, out, rank, format, model=self.base, verify=False, **more)

    def a_run(self, folder: Path) -> None:
        """An adapter in the folder of its run."""
        self.first.save(folder)
        write_text(folder / "train.yaml", "seed: 1\n")
        (folder / "checkpoint-1").mkdir()
        shutil.copy(folder / "adapter_config.json", folder / "checkpoint-1")

    def an_adapter(self, folder: Path) -> None:
        reorder(self.folder / "one", folder)

    def a_model(self, folder: Path) -> None:
        self.export("one", folder, 4, "merged")

    def a_ladder(self, folder: Path) -> None:
        self.export("one", folder, 4, "ladder")

    def a_file(self, folder: Path) -> None:
        folder.mkdir()
        self.export("one", folder / "a.gguf", 4, "gguf")

    def a_gguf_ladder(self, folder: Path) -> None:
        self.export("one", folder, 4, "gguf-ladder")

    def for_mlx(self, folder: Path) -> None:
        self.export("one", folder, 4, "mlx")

    def a_single_file(self, folder: Path) -> None:
        folder.mkdir()
        shutil.copy(self.folder / "one.safetensors", folder / "a.safetensors")

    def cut(self, source: str, target: Path, style: Any) -> None:
        """To a style of a LoRA of an image model: one file, or a folder."""
        export(self.folder / source, target, 2, style=style, overwrite=True)

    def an_evaluation(self, folder: Path) -> None:
        folder.mkdir()
        write_evaluation(some_results(1), folder)
        (folder / "answers.jsonl").write_text("stays")

    def nothing(self, folder: Path) -> None:
        folder.mkdir()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


Step = Callable[[World, Path], object]
SCENARIOS: dict[str, tuple[Step, Step]] = {
    "save over a run's adapter": (World.a_run, lambda w, out: w.second.save(out)),
    "save to a new folder": (World.nothing, lambda w, out: w.second.save(out / "new")),
    "export over an adapter": (World.an_adapter, lambda w, out: w.second.export(out, 2, overwrite=True)),
    "peft over a model": (World.a_model, lambda w, out: w.export("two", out, 2, "peft", overwrite=True)),
    "directions": (World.an_adapter, lambda w, out: w.export("two", out, 2, "directions", overwrite=True)),
    "ladder": (World.a_ladder, lambda w, out: w.export("two", out, 2, "ladder", overwrite=True)),
    "gguf": (World.a_file, lambda w, out: w.export("two", out / "a.gguf", 2, "gguf", overwrite=True)),
    "gguf-ladder": (World.a_gguf_ladder, lambda w, out: w.export("two", out, 2, "gguf-ladder", overwrite=True)),
    "mlx": (World.for_mlx, lambda w, out: w.export("two", out, 2, "mlx", overwrite=True)),
    "file to kohya": (World.a_single_file, lambda w, out: w.cut("two.safetensors", out / "a.safetensors", "kohya")),
    "folder to diffusers": (World.a_single_file, lambda w, out: w.cut("two-peft", out / "a.safetensors", "diffusers")),
    "file to peft": (World.an_adapter, lambda w, out: w.cut("two.safetensors", out, "peft")),
    "reorder a file": (
        World.a_single_file,
        lambda w, out: reorder(w.folder / "two.safetensors", out / "a.safetensors", overwrite=True),
    ),
    "evaluation": (World.an_evaluation, lambda w, out: write_evaluation(some_results(2), out)),
    "reorder": (World.an_adapter, lambda w, out: reorder(w.folder / "paper", out, overwrite=True)),
}


SAMPLED = ("directions", "evaluation", "gguf-ladder", "ladder", "mlx", "reorder")
"""They take long, and are written by the same functions as others: a third of their operations."""


def check_for_plain_readers(now: Mapping[str, bytes], old: Content, new: Content) -> None:
    """Who opens ``adapter_config.json`` or its like first finds none, or all of one state."""
    first = next((name for name in ("adapter_config.json", "config.json", "evaluation.json") if name in now), "")
    weights = {name for name in {*old, *new} if "model" in name or name in ("adapters.safetensors", "examples.jsonl")}
    if first:
        states = [{name: state[name] for name in (first, *weights) if name in state} for state in (old, new)]
        assert {name: now[name] for name in (first, *weights) if name in now} in states


@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_folder_is_the_old_one_or_the_new_one(world: World, tmp_path: Path, name: str, how: str) -> None:
    prepare, write = SCENARIOS[name]
    start, out = tmp_path / "start", tmp_path / "out"
    prepare(world, start)
    shutil.copytree(start, out)
    count = interrupted.run(lambda: write(world, out), out)
    old, new = content(start), content(out)
    assert old != new
    assert not left_over(out)
    seen = set()
    for number in points(count, how)[:: -3 if name in SAMPLED else -1]:
        shutil.rmtree(out)
        shutil.copytree(start, out)
        status = interrupted.run(lambda: write(world, out), out, number, STOPS[how])
        now = content(out)
        check_for_plain_readers(now, old, new)
        if how == "killed":
            assert status == -9
        else:
            assert status in (interrupted.STOPPED, interrupted.DONE), (number, status)
            assert now in (old, new), (number, sorted(now))
            assert status == interrupted.STOPPED or now == new
        settle(out)
        assert content(out) in (old, new), number
        seen.add(content(out) == new)
        if how == "killed" and number % 10 == 0:  # the next writer finds nothing in its way, and leaves nothing
            write(world, out)
            assert content(out) == new
            assert not left_over(out)
    assert seen == {True, False}


@pytest.mark.parametrize("how", STOPS)
def test_answers_that_were_given_stay(tmp_path: Path, how: str) -> None:
    def answer() -> None:
        store = Store(tmp_path / "answers.jsonl", {"adapter": "a"})
        for number in range(len(store), len(store) + 3):
            store.put(str(number), 1, "x")
        store.close()

    answer()
    count = interrupted.run(answer, tmp_path)
    for number in range(1, count + 1):
        before = (tmp_path / "answers.jsonl").read_text()
        interrupted.run(answer, tmp_path, number, STOPS[how])
        assert (tmp_path / "answers.jsonl").read_text().startswith(before)
        store = Store(tmp_path / "answers.jsonl", {"adapter": "a"})
        assert len(store) >= before.count("\n") - 1
        store.close()


@pytest.mark.parametrize("how", STOPS)
def test_a_text_is_the_old_one_or_the_new_one(tmp_path: Path, how: str) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    count = interrupted.run(lambda: write_text(tmp_path / "link", "new"), tmp_path)
    seen = set()
    for number in range(1, count + 1):
        (tmp_path / "real").write_text("old")
        interrupted.run(lambda: write_text(tmp_path / "link", "new"), tmp_path, number, STOPS[how])
        assert set(content(tmp_path).values()) <= {b"old", b"new"}
        assert (tmp_path / "link").is_symlink()
        seen.add((tmp_path / "real").read_text())
    assert seen == {"old", "new"}
    write_text(tmp_path / "link", "new")
    assert not left_over(tmp_path)
