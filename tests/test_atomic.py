"""An output is complete or absent, and nothing else is overwritten."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.kill import killed
from helpers.plain_peft import plain_adapter
from safetensors.torch import save_file

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError
from matryoshka_lora.atomic import check_output, create_file, create_folder


def test_folder_is_overwritten_at_the_end_and_kept_after_a_failure(tmp_path: Path) -> None:
    output = tmp_path / "parent" / "output"
    with create_folder(output) as folder:
        (folder / "old").write_text("old")

    def fail(error: Exception) -> None:
        with create_folder(output, force=True) as folder:
            (folder / "new").write_text("new")
            raise error

    with pytest.raises(KeyError):
        fail(KeyError())
    with pytest.raises(MatryoshkaError, match="No space"):
        fail(OSError(28, os.strerror(28)))
    assert [file.name for file in output.iterdir()] == ["old"]
    with create_folder(output, force=True) as folder:
        (folder / "new").write_text("new")
    assert [file.name for file in output.iterdir()] == ["new"]
    assert [file.name for file in output.parent.iterdir()] == ["output"]


def test_file_is_overwritten_at_the_end_and_kept_after_a_failure(tmp_path: Path) -> None:
    output = tmp_path / "parent" / "output"
    with create_file(output) as file:
        file.write_text("old")

    def fail() -> None:
        with create_file(output, force=True) as file:
            file.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert output.read_text() == "old"
    with create_file(output, force=True) as file:
        file.write_text("new")
    assert output.read_text() == "new"
    assert [file.name for file in output.parent.iterdir()] == ["output"]


@pytest.mark.parametrize("num_renames", [1, 2])
def test_ctrl_c_between_two_renames_keeps_a_complete_output(
    tmp_path: Path, num_renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    with create_folder(output) as folder:
        (folder / "old").write_text("old")
    rename = os.rename
    targets: list[Path] = []

    def interrupted_rename(source: Path, target: Path) -> None:
        rename(source, target)
        targets.append(target)
        if len(targets) == num_renames:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted_rename)
    with pytest.raises(KeyboardInterrupt), create_folder(output, force=True) as folder:
        (folder / "new").write_text("new")
    names = [file.name for file in output.iterdir()]
    assert names == (["old"] if num_renames == 1 else ["new"])


def test_output_that_another_program_creates_in_the_meantime_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "output"

    def create() -> None:
        with create_file(output) as file:
            file.write_text("new")
            output.write_text("of another program")

    with pytest.raises(MatryoshkaError, match="force"):
        create()
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert output.read_text() == "of another program"


@pytest.mark.parametrize("force", [False, True])
def test_file_does_not_replace_a_folder(source: Path, force: bool) -> None:
    for output in ("../empty", "../full"):
        with pytest.raises(MatryoshkaError, match="folder"), create_file(output, force):
            pass


def test_error_of_another_file_is_not_reported_as_one_of_the_output(source: Path) -> None:
    with pytest.raises(FileNotFoundError), create_folder("output"):
        Path("../full/missing").read_text()
    with pytest.raises(MatryoshkaError, match="Cannot write"), create_folder("output") as folder:
        (folder / "missing" / "file").write_text("text")
    assert not Path("output").exists()


def test_symlink_is_overwritten_and_its_target_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis").write_text("text")
    output = tmp_path / "output"
    output.symlink_to(target)
    with pytest.raises(MatryoshkaError, match="force"):
        check_output(output)
    with create_folder(output, force=True) as folder:
        (folder / "new").write_text("new")
    assert not output.is_symlink()
    assert (output / "new").is_file()
    assert (target / "thesis").read_text() == "text"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is a symlink, as in the hub's cache; the current folder is `work`."""
    for folder in ("lora", "blobs", "work", "full", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "blobs" / "blob").write_text("weights")
    (tmp_path / "full" / "file").write_text("text")
    source = tmp_path / "lora" / "adapter_model.safetensors"
    source.symlink_to(tmp_path / "blobs" / "blob")
    monkeypatch.chdir(tmp_path / "work")
    return source


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "output",
    [
        "",
        ".",
        "..",
        "../work",
        "../lora",
        "../lora/",
        "../lora/adapter_model.safetensors",
        "../blobs",
    ],
)
def test_source_and_current_folder_cannot_be_overwritten(
    source: Path, output: str, force: bool
) -> None:
    with pytest.raises(MatryoshkaError, match="source"):
        check_output(output, force, [source, str(source)])


@pytest.mark.parametrize("output", ["../full", "../full/file"])
def test_existing_output_needs_force(source: Path, output: str) -> None:
    with pytest.raises(MatryoshkaError, match="force"):
        check_output(output, sources=[source])
    assert check_output(output, force=True, sources=[source]) == Path(output)


@pytest.mark.parametrize("output", ["../empty", "../new", "../new/child", "../lora/child"])
def test_free_output(source: Path, output: str) -> None:
    assert check_output(output, sources=[source]) == Path(output)


@pytest.mark.parametrize("output", ["a\0b", "\ud800"])
def test_output_that_is_no_path(output: str) -> None:
    with pytest.raises(MatryoshkaError, match="Cannot write"):
        check_output(output)


@pytest.mark.parametrize("missing", ["owner/name", "a\0b", "\ud800", "x" * 5000])
def test_source_that_does_not_exist_does_not_count(source: Path, missing: str) -> None:
    assert check_output("owner", sources=[missing]) == Path("owner")


def test_parent_that_is_a_file_is_reported(source: Path) -> None:
    with (
        pytest.raises(MatryoshkaError, match="Cannot write"),
        create_folder("../full/file/child"),
    ):
        pass


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_killed_write_leaves_the_old_output_or_the_new_one(
    suffix: str, force: bool, tmp_path: Path
) -> None:
    """Kill it before every operation on the disk."""
    source = tmp_path / f"source{suffix}"
    if suffix:
        pair = {"a.lora_down.weight": torch.randn(8, 9), "a.lora_up.weight": torch.randn(9, 8)}
        save_file(pair, source)
    else:
        plain_adapter(source, target_modules=["q_proj"])
    lora = ml.open(source)
    output = tmp_path / "parent" / f"output{suffix}"
    for number in itertools.count(1):
        shutil.rmtree(output.parent, ignore_errors=True)
        output.parent.mkdir()
        if force:
            lora.truncate(4).save(output)
        if not killed(lambda: lora.truncate(2).save(output, force=force), output.parent, number):
            break
        if output.exists():
            assert ml.open(output).max_rank in ((2, 4) if force else (2,))
        elif force:  # between the two renames of a folder, both are complete next to the output
            assert not suffix
            assert sorted(ml.open(path).max_rank for path in output.parent.iterdir()) == [2, 4]
    assert number > 2
    assert ml.open(output).max_rank == 2
