"""Writing is all or nothing, and its errors name the place and the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import check_writable, replace_directory, write_text


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def fill(folder: Path, version: str) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json", "nesting.json"):
        (folder / name).write_text(version)


def test_write_text_makes_parents_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_text(path, "one\n")
    write_text(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()
    assert content(tmp_path) == {"a/b.json": "zwölf\n"}


def test_write_text_to_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="folder stands where a file is needed"):
        write_text(tmp_path, "text")
    assert content(tmp_path) == {}


def test_a_new_directory_appears_at_once_with_ordinary_permissions(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "adapter"
    with replace_directory(target) as folder:
        fill(folder, "new")
        assert not target.exists()
    assert set(content(tmp_path)) == {f"deep/adapter/{name}" for name in content(target)}
    assert target.stat().st_mode == target.parent.stat().st_mode


def test_an_existing_directory_keeps_its_other_files(tmp_path: Path) -> None:
    fill(tmp_path, "old")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "nesting.json").write_text("old")
    with replace_directory(tmp_path) as folder:
        fill(folder, "new")
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("new")
    found = content(tmp_path)
    assert found.pop("checkpoint-3/nesting.json") == "old"
    assert len(found) == 4
    assert set(found.values()) == {"new"}


def test_new_weights_never_lie_beside_an_old_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "old")
    seen = []
    replace = os.replace

    def watch(source: Path, destination: Path) -> None:
        replace(source, destination)
        seen.append({name: text for name, text in content(tmp_path).items() if ".writing" not in name})

    monkeypatch.setattr(os, "replace", watch)
    with replace_directory(tmp_path) as folder:
        fill(folder, "new")
    assert len(seen) == 6
    assert all(len(set(state.values())) <= 1 for state in seen)
    assert set(seen[-1].values()) == {"new"}


@pytest.mark.parametrize("last_good", range(6))
def test_a_failure_while_moving_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_good: int) -> None:
    fill(tmp_path, "old")
    calls = 0
    replace = os.replace

    def fail_once(source: Path, destination: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == last_good + 1:
            raise PermissionError(13, "the file is in use")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(MatryoshkaError, match="the file is in use"), replace_directory(tmp_path) as folder:
        fill(folder, "new")
    found = content(tmp_path)
    assert len(found) == 3
    assert set(found.values()) == {"old"}


def test_a_slice_over_a_nested_adapter_leaves_no_old_sidecar(tmp_path: Path) -> None:
    fill(tmp_path, "old")
    with replace_directory(tmp_path) as folder:
        fill(folder, "new")
        (folder / "nesting.json").unlink()
    assert content(tmp_path) == {"adapter_model.safetensors": "new", "adapter_config.json": "new"}


@pytest.mark.parametrize("exists", [True, False])
def test_an_error_in_the_block_changes_nothing(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "adapter"
    if exists:
        target.mkdir()
        fill(target, "old")
    before = content(tmp_path)

    def fail() -> None:
        with replace_directory(target) as folder:
            fill(folder, "new")
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert content(tmp_path) == before
    assert target.exists() == exists


def test_a_failure_to_read_elsewhere_is_not_called_a_failure_to_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replace_directory(tmp_path / "out"):
        (tmp_path / "absent").read_text()


def test_a_folder_in_the_way_of_a_file_is_found_before_anything_moves(tmp_path: Path) -> None:
    fill(tmp_path, "old")
    (tmp_path / "zzz").mkdir()

    def write() -> None:
        with replace_directory(tmp_path) as folder:
            fill(folder, "new")
            (folder / "zzz").write_text("new")

    with pytest.raises(MatryoshkaError, match="zzz is a folder"):
        write()
    assert set(content(tmp_path).values()) == {"old"}


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replace_directory(tmp_path / "link") as folder:
        fill(folder, "new")
    assert (tmp_path / "link").is_symlink()
    assert len(content(tmp_path / "real")) == 3


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("precious")
    for target in (file, file / "below"):
        with pytest.raises(MatryoshkaError, match=r"cannot write .*taken.*Not a directory; a file stands"):
            check_writable(target)
        with pytest.raises(MatryoshkaError, match="a file stands"), replace_directory(target):
            pytest.fail("the block must not run")
    with pytest.raises(MatryoshkaError, match="a file stands where a folder is needed"):
        write_text(file / "below", "text")
    assert content(tmp_path) == {"taken": "precious"}


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody may write")
def test_a_place_where_nobody_may_write() -> None:
    with pytest.raises(MatryoshkaError, match=r"cannot write /proc/adapter: .*; choose "):
        check_writable("/proc/adapter")
    with (
        pytest.raises(MatryoshkaError, match="cannot write /proc/adapter: "),
        replace_directory("/proc/adapter"),
    ):
        pytest.fail("the block must not run")


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import replace_directory, write_text

target = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

def weights(folder):
    save_file({"weight": torch.zeros(100_000)}, folder / "adapter_model.safetensors")

def text(folder):
    (folder / "adapter_config.json").write_text("x" * 200_000)

for write in (weights, text):
    try:
        with replace_directory(target) as folder:
            write(folder)
    except MatryoshkaError as error:
        print(error)
try:
    write_text(target / "nesting.json", "x" * 200_000)
except MatryoshkaError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_destroys_nothing(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "adapter"
    if exists:
        target.mkdir()
        fill(target, "old")
    before = content(tmp_path)
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(target)], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    assert all("cannot write" in line and "File too large; free some space" in line for line in lines)
    assert str(target) in lines[0]
    assert content(tmp_path) == before
