"""An output is complete or absent, and nothing else is overwritten."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.kill import killed
from helpers.outputs import names_in
from helpers.plain_peft import plain_adapter
from safetensors.torch import save_file

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError
from matryoshka_lora.atomic import (
    CREATED_WITH,
    MANIFEST_NAME,
    check_output,
    create_file,
    create_folder,
    replace_file,
)


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
    assert names_in(output) == ["old"]
    with create_folder(output, force=True) as folder:
        (folder / "new").write_text("new")
    assert names_in(output) == ["new"]
    assert [file.name for file in output.parent.iterdir()] == ["output"]


def test_file_is_overwritten_at_the_end_and_kept_after_a_failure(tmp_path: Path) -> None:
    output = tmp_path / "parent" / "output"
    with create_file(output) as file:
        file.write_text(f"GGUF old. {CREATED_WITH}")

    def fail() -> None:
        with create_file(output, force=True) as file:
            file.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert output.read_text() == f"GGUF old. {CREATED_WITH}"
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
    assert names_in(output) == (["old"] if num_renames == 1 else ["new"])


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("create", [create_file, create_folder])
def test_neither_another_program_s_output_nor_the_computed_one_is_lost(
    tmp_path: Path, create: Any, force: bool
) -> None:
    output = tmp_path / "output"

    def compute() -> None:
        with create(output, force) as path:
            (path / "file" if path.is_dir() else path).write_text("computed")
            output.write_text("of another program")

    with pytest.raises(MatryoshkaError, match="written to"):
        compute()
    assert output.read_text() == "of another program"
    (computed,) = set(tmp_path.iterdir()) - {output}
    assert not computed.name.startswith(".")
    assert (computed / "file" if computed.is_dir() else computed).read_text() == "computed"


def add_file(output: Path) -> None:
    (output / "notes.txt").write_text("text")


def add_nested_file(output: Path) -> None:
    (output / "src" / "data").mkdir(parents=True)
    (output / "src" / "data" / "a.py").write_text("text")


def add_link(output: Path) -> None:
    (output / "data").symlink_to(output.parent)


def edit_file(output: Path) -> None:
    (output / "new" / "weights").write_text("the weights of another program")


def remove_manifest(output: Path) -> None:
    (output / MANIFEST_NAME).unlink()


def damage_manifest(output: Path) -> None:
    (output / MANIFEST_NAME).write_text("[")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (add_file, "notes.txt"),
        (add_nested_file, "src/data/a.py"),
        (add_link, "data"),
        (edit_file, "new/weights"),
        (remove_manifest, "new"),
        (damage_manifest, "new"),
    ],
)
def test_a_folder_with_foreign_files_is_never_replaced(
    tmp_path: Path, change: Callable[[Path], None], named: str
) -> None:
    output = tmp_path / "output"
    with create_folder(output) as folder:
        (folder / "new").mkdir()
        (folder / "new" / "weights").write_text("weights")
    check_output(output, force=True)
    change(output)
    before = sorted(output.rglob("*"))
    with pytest.raises(MatryoshkaError, match=named), create_folder(output, force=True):
        pass
    assert sorted(output.rglob("*")) == before


def make_other_lora(file: Path) -> None:
    save_file({"matryoshka_lora.lora_down.weight": torch.ones(2, 3)}, file)


def make_notes(file: Path) -> None:
    file.write_text(f'{CREATED_WITH} The key is "matryoshka_lora.error".')


def make_picture(file: Path) -> None:
    file.write_bytes(b"\x89PNG\r\n\x1a\n Created with another program.")


def make_pipe(file: Path) -> None:
    os.mkfifo(file)


@pytest.mark.parametrize("make", [make_other_lora, make_notes, make_picture, make_pipe])
def test_a_foreign_file_is_never_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "output")
    for is_file in (False, True):
        with pytest.raises(MatryoshkaError, match="output"):
            check_output(tmp_path / "output", force=True, is_file=is_file)


def test_a_replaced_file_of_an_output_belongs_to_the_output(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with create_folder(output) as folder:
        (folder / "result").write_text("1")
    with replace_file(output / "result") as file:
        file.write_text("1, 2")
    assert (output / "result").read_text() == "1, 2"
    assert check_output(output, force=True) == output
    (output / "notes").write_text("text")
    with replace_file(output / "result") as file:
        file.write_text("1, 2, 3")
    with pytest.raises(MatryoshkaError, match="notes"):
        check_output(output, force=True)


@pytest.mark.parametrize("create", [create_file, create_folder])
def test_output_may_have_the_longest_name(tmp_path: Path, create: Any) -> None:
    output = tmp_path / ("x" * 255)
    with create(output) as path:
        (path / "file" if path.is_dir() else path).write_text("text")
    assert output.exists()


def test_source_on_another_mount_is_not_replaced(tmp_path: Path) -> None:
    for name in ("loras", "mounted"):
        (tmp_path / name).mkdir()
    with create_folder(tmp_path / "loras" / "lora") as folder:
        (folder / "weights").write_text("weights")
    mount = ["mount", "--bind", str(tmp_path / "loras"), str(tmp_path / "mounted")]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount folders")
    try:
        with pytest.raises(MatryoshkaError, match="source"):
            check_output(tmp_path / "mounted" / "lora", True, [tmp_path / "loras" / "lora"])
    finally:
        subprocess.run(["umount", str(tmp_path / "mounted")], check=True)


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


def test_symlink_is_not_replaced(tmp_path: Path) -> None:
    with create_folder(tmp_path / "target") as folder:
        (folder / "weights").write_text("weights")
    output = tmp_path / "output"
    output.symlink_to(tmp_path / "target")
    for force in (False, True):
        with pytest.raises(MatryoshkaError, match="output"):
            check_output(output, force)


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
    shutil.rmtree("../full")
    with create_folder("../full") as folder:
        (folder / "file").write_text(f"GGUF {CREATED_WITH}")
    is_file = output.endswith("file")
    with pytest.raises(MatryoshkaError, match="force"):
        check_output(output, sources=[source], is_file=is_file)
    path = check_output(output, force=True, sources=[source], is_file=is_file)
    assert path == Path(output)
    with pytest.raises(MatryoshkaError, match="folder"):
        check_output(output, force=True, sources=[source], is_file=not is_file)


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
