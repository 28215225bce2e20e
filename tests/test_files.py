"""Writing is all or nothing, by one program at a time, and its errors name the place and the way out.

What a kill at each of the operations leaves is in test_interrupted.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import nested_llama

from matryoshka_lora import Nesting
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import check_writable, replace_directory, replace_file, settle, write_text
from matryoshka_lora.formats import opened as reading
from matryoshka_lora.formats.opened import open_adapter


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def visible(folder: Path) -> dict[str, str]:
    """Without what a writer has not finished."""
    return {name: text for name, text in content(folder).items() if not name.startswith(".writing")}


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
        seen.append(visible(tmp_path))

    monkeypatch.setattr(os, "replace", watch)
    with replace_directory(tmp_path) as folder:
        fill(folder, "new")
    assert all(len(set(state.values())) <= 1 for state in seen)
    assert set(seen[-1].values()) == {"new"}
    # What plain PEFT needs is missing only while the weights move.
    missing = [state for state in seen if "adapter_config.json" not in state]
    assert [len(state) for state in missing] == [1, 0, 1]


@pytest.mark.parametrize("last_good", range(7))
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


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "there.json").write_text("old")
    for name in ("there.json", "not-yet.json"):
        (tmp_path / name).symlink_to(Path("real") / name)
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "real" / name).read_text() == "new"
    assert not (tmp_path / "real" / "there.json").is_symlink()


def test_a_file_that_may_not_be_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with (
        pytest.raises(MatryoshkaError, match=r"file exists already.*--force"),
        replace_file(tmp_path / "file", overwrite=False),
    ):
        pytest.fail("the block must not run")
    with replace_file(tmp_path / "other", overwrite=False) as file:
        file.write_text("new")
    assert content(tmp_path) == {"file": "old", "other": "new"}


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


# Two writers, and dead ones


WRITER = """
import sys
from pathlib import Path
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import replace_directory, replace_file, writing

kind, target, version, writing.PATIENCE = sys.argv[1], Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
try:
    with (replace_directory if kind == "folder" else replace_file)(target) as place:
        if kind == "folder":
            (place / "adapter_model.safetensors").write_text(version)
        print("writing", flush=True)
        sys.stdin.readline()
        (place / "adapter_config.json" if kind == "folder" else place).write_text(version)
    print("written", flush=True)
except MatryoshkaError as error:
    print(error, flush=True)
"""


@contextmanager
def writer(kind: str, target: Path, version: str, patience: float = 30) -> Iterator[Any]:
    """A process that has begun to write as soon as it says so, and goes on when it is told."""
    command = [sys.executable, "-c", WRITER, kind, str(target), version, str(patience)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def say(process: Any) -> None:
    process.stdin.write("go on\n")
    process.stdin.flush()


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_second_writer_waits_or_is_refused(tmp_path: Path, kind: str, exists: bool) -> None:
    target = tmp_path / "target"
    if exists and kind == "folder":
        target.mkdir()
        fill(target, "old")
    elif exists:
        target.write_text("old")
    before = content(tmp_path)
    with writer(kind, target, "first") as first:
        assert first.stdout.readline() == "writing\n"
        with writer(kind, target, "refused", patience=0.1) as refused:
            assert f"another process is writing {target}: wait" in refused.stdout.readline()
        assert {name: text for name, text in content(tmp_path).items() if ".writing" not in name} == before
        with writer(kind, target, "second") as second:
            say(second)
            say(first)
            assert first.stdout.readline() == "written\n"
            assert [second.stdout.readline() for _ in range(2)] == ["writing\n", "written\n"]
    assert set(content(tmp_path).values()) == {"second"}
    assert len(content(tmp_path)) == (1 if kind == "file" else 2)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path: Path, kind: str, exists: bool) -> None:
    target = tmp_path / "target"
    if exists:
        target.mkdir() if kind == "folder" else target.write_text("old")
    with writer(kind, target, "killed") as first:
        assert first.stdout.readline() == "writing\n"
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert any(".writing" in path.name for path in tmp_path.rglob("*"))
    with writer(kind, target, "second") as second:
        say(second)
        assert [second.stdout.readline() for _ in range(2)] == ["writing\n", "written\n"]
    assert set(content(tmp_path).values()) == {"second"}
    assert not any(".writing" in path.name for path in tmp_path.rglob("*"))


def stopped_switch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a folder as a kill does when the old files have been taken and no new one has been put."""
    fill(folder, "old")
    replace = os.replace

    def stop(source: Path, destination: Path) -> None:
        # Not even the attempt to put everything back gets through.
        if Path(source).parent.name == "new" or Path(destination).parent == folder:
            raise KeyboardInterrupt
        replace(source, destination)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt), replace_directory(folder) as place:
            fill(place, "new")
    assert visible(folder) == {}


def test_a_stopped_switch_is_completed_by_whoever_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_switch(tmp_path, monkeypatch)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    settle(moved)
    assert set(content(moved).values()) == {"new"}
    assert len(content(moved)) == 3
    assert len(list(moved.iterdir())) == 3


def test_a_stopped_switch_goes_over_nothing_that_was_written_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_switch(tmp_path, monkeypatch)
    (tmp_path / "adapter_config.json").write_text("another program's")
    for use in (settle, check_writable):
        with pytest.raises(MatryoshkaError, match=r"adapter_config.json was changed since\. .* delete .*\.writing"):
            use(tmp_path)
    with pytest.raises(MatryoshkaError, match="was changed since"), replace_directory(tmp_path):
        pytest.fail("the block must not run")
    assert visible(tmp_path) == {"adapter_config.json": "another program's"}


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "link/outside", "a/../../outside"])
def test_a_journal_moves_no_files_of_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A folder from a stranger may hold one."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    stopped_switch(folder, monkeypatch)
    for place in (folder, folder / ".writing" / "new"):
        (place / "link").symlink_to(tmp_path)
    (tmp_path / "outside").write_text("precious")
    found = (tmp_path / "outside").stat()
    journal = folder / ".writing" / "journal.json"
    for key in ("new", "old"):
        data = json.loads(journal.read_text())
        data[key][name] = [found.st_size, found.st_mtime_ns]
        journal.write_text(json.dumps(data))
        with pytest.raises(MatryoshkaError, match="is not in the folder"):
            settle(folder)
    assert (tmp_path / "outside").read_text() == "precious"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"new": [], "old": {}}', '{"new": {"a": 1}, "old": {}}', "[" * 99999]
)
def test_a_damaged_journal_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    stopped_switch(tmp_path, monkeypatch)
    (tmp_path / ".writing" / "journal.json").write_text(text)
    with pytest.raises(MatryoshkaError, match=r"journal\.json cannot be read.*delete .*\.writing"):
        settle(tmp_path)


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


def test_a_reader_that_a_writer_overtakes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adapters of the same shapes: a half of each would be an adapter too."""
    adapter = nested_llama(Nesting([1, 4]), layers=1, target_modules=["q_proj"])
    adapter.save(tmp_path)
    opened = open_adapter(tmp_path)
    before = opened.tensors()
    adapter.reorder()
    read_config = reading.read_config

    def overtaken(folder: Path) -> Any:
        adapter.save(folder)
        return read_config(folder)

    with monkeypatch.context() as patched:
        patched.setattr(reading, "read_config", overtaken)
        with pytest.raises(MatryoshkaError, match="was replaced while it was read"):
            open_adapter(tmp_path)
    with pytest.raises(MatryoshkaError, match="was replaced while it was read"):
        opened.tensor(opened.layers[0].key_A)
    after = open_adapter(tmp_path)
    assert after.nested.reordered == "svd"
    assert not any(tensor.equal(before[key]) for key, tensor in after.tensors().items())
