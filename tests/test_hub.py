"""Names of the hub, read from a cache of the hub's own layout, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from strangers import plain_adapter

from matryoshka_lora.evaluation.evaluate import folder_for
from matryoshka_lora.files.hub import hub_parts

REVISIONS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository owner/name, with an adapter of rank 4, of rank 2 at v2, and a file."""
    home = tmp_path_factory.mktemp("home")
    repository = home / "hub/models--owner--name"
    for revision, rank in (("main", 4), ("v2", 2)):
        folder = repository / "snapshots" / REVISIONS[revision]
        plain_adapter(folder, r=rank)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(REVISIONS[revision])
        (folder / "chat_template.jinja").write_text("mine")
        (folder / "tokenizer").mkdir()
        state = folder / "adapter_model.safetensors"
        (folder / "in").mkdir()
        (folder / "in/lora.safetensors").write_bytes(
            state.read_bytes().replace(b"base_model.model.", b"unet.mid_block.m.")
        )
    files = home / "hub/models--owner--files"
    for part in ("refs", f"snapshots/{REVISIONS['main']}"):
        (files / part).mkdir(parents=True)
    (files / "refs/main").write_text(REVISIONS["main"])
    return home


def run(cache: Path, *words: str, offline: bool = True) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "matryoshka_lora", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cache)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("owner/name", "rank        4"),
        ("owner/name@v2", "rank        2"),
        ("owner/name@v2/in/lora.safetensors", "is a LoRA in one file"),
    ],
)
def test_an_adapter_may_be_named_by_its_repository(cache: Path, name: str, said: str) -> None:
    found = run(cache, "info", name)
    assert found.returncode == 0, found.stderr
    assert said in found.stdout


def test_a_tokenizer_comes_along_and_a_file_of_the_hub_has_a_name(cache: Path) -> None:
    assert run(cache, "export", "owner/name", "--rank", "2", "-o", "out").returncode == 0
    assert (cache / "out/chat_template.jinja").read_text() == "mine"
    found = run(cache, "info", "owner/files")
    assert "holds no adapter_config.json: name a file, as owner/files/FILE.saf" in found.stderr


@pytest.mark.parametrize("name", ["owner/other", "owner/name@v3"])
@pytest.mark.parametrize("offline", [True, False])
def test_what_the_hub_does_not_give_is_said(cache: Path, name: str, offline: bool) -> None:
    found = run(cache, "info", name, offline=offline)
    assert found.returncode == 1
    assert found.stderr.startswith(f"error: there is no path {name} here, and the hub gives none")
    assert "only what was downloaded before is read" in found.stderr


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("owner/name", True),
        ("owner/name@main/a/b.safetensors", True),
        ("nothing", False),
        ("a/b/c", False),
        ("../name", False),
        ("/owner/name", False),
        ("here/typo", False),
    ],
)
def test_a_path_is_told_from_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_one: bool
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (hub_parts(name) is not None) == is_one


def test_what_is_made_of_a_repository_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation in a folder `owner` would make each name of that owner a path."""
    monkeypatch.chdir(tmp_path)
    assert folder_for("owner/name") == Path("name-evaluation")
    (tmp_path / "runs/mine").mkdir(parents=True)
    assert folder_for("runs/mine") == Path("runs/mine-evaluation")
    assert hub_parts("owner/name@v2") == ("owner/name", "v2", None)
