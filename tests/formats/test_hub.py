"""Ids of the Hugging Face Hub, resolved from a cache in the hub's own layout, without a network."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

import huggingface_hub.constants
import pytest
from helpers.plain_peft import plain_adapter

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError
from matryoshka_lora.formats.hub import HubId, local_path, split_hub_id

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache of owner/name, with rank 4 and at v2 rank 2, and of the empty owner/files."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    for revision, rank in (("main", 4), ("v2", 2)):
        (repository / "refs" / revision).write_text(COMMITS[revision])
        snapshot = repository / "snapshots" / COMMITS[revision]
        plain_adapter(snapshot, r=rank, target_modules=["q_proj"])
        blob = repository / "blobs" / f"{revision}-template"
        blob.parent.mkdir(exist_ok=True)
        blob.write_text("template")
        (snapshot / "chat_template.jinja").symlink_to(f"../../blobs/{blob.name}")
        (snapshot / "additional_chat_templates").mkdir()
        template = snapshot / "additional_chat_templates" / "rag.jinja"
        template.symlink_to(f"../../../blobs/{blob.name}")
        (snapshot / "sub").mkdir()
        weights = (snapshot / "adapter_model.safetensors").read_bytes()
        (snapshot / "checkpoint").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (snapshot / "checkpoint" / name).write_bytes((snapshot / name).read_bytes())
        (snapshot / "checkpoint" / "tokenizer.json").symlink_to(f"../../../blobs/{blob.name}")
        single_file = weights.replace(b"base_model.model.", b"unet.mid_block.m.")
        (snapshot / "sub" / "lora.safetensors").write_bytes(single_file)
    empty_repository = cache / "models--owner--files"
    (empty_repository / "refs").mkdir(parents=True)
    (empty_repository / "refs" / "main").write_text(COMMITS["main"])
    (empty_repository / "snapshots" / COMMITS["main"]).mkdir(parents=True)
    return cache


@pytest.fixture(autouse=True)
def _offline(hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def test_an_id_on_windows_has_a_backslash_as_a_path() -> None:
    assert split_hub_id(PureWindowsPath("owner/name")) == HubId("owner/name", None)


@pytest.mark.parametrize(("revision", "rank"), [(None, 4), ("main", 4), ("v2", 2)])
def test_open_lora_of_a_repository(revision: str | None, rank: int, tmp_path: Path) -> None:
    lora = ml.open("owner/name", revision=revision)
    assert lora.container == "peft"
    assert (lora.name, lora.max_rank) == ("owner/name", rank)
    lora.truncate(1).save(tmp_path / "output")
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        assert (tmp_path / "output" / name).read_text() == "template"
    single_file = ml.open("owner/name/sub/lora.safetensors", revision=revision)
    assert single_file.container == "single"
    assert single_file.max_rank == rank


def test_a_folder_in_a_repository(tmp_path: Path) -> None:
    folder = local_path("owner/name", ("adapter_config.json",)) / "checkpoint"
    ml.open(folder).truncate(1).save(tmp_path / "output")
    assert (tmp_path / "output" / "tokenizer.json").read_text() == "template"


def test_files_of_a_repository() -> None:
    folder = local_path("owner/name", ("chat_template.jinja",))
    assert (folder / "chat_template.jinja").is_file()
    with pytest.raises(MatryoshkaError, match=r"config\.json"):
        local_path("owner/name", ("config.json",))
    with pytest.raises(MatryoshkaError, match=r"owner/files/FILE\.safetensors"):
        ml.open("owner/files")


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize(("path", "revision"), [("owner/other", None), ("owner/name", "v3")])
def test_what_is_not_on_the_hub(
    path: str, revision: str | None, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(MatryoshkaError, match=path) as caught:
        ml.open(path, revision=revision)
    assert "Offline" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("owner/name", HubId("owner/name", None)),
        ("owner/name/a/b.safetensors", HubId("owner/name", "a/b.safetensors")),
        ("owner/name@v2", None),
        ("name", None),
        ("a/b/c", None),
        ("../name", None),
        ("./name", None),
        ("/owner/name", None),
        ("existing/typo", None),
        ("existing/lora.safetensors", None),
    ],
)
def test_split_hub_id(path: str, expected: HubId | None, tmp_path: Path) -> None:
    (tmp_path / "existing").mkdir()
    assert split_hub_id(path) == split_hub_id(Path(path)) == expected
    if expected is None:
        assert local_path(path, revision="v2") == Path(path)
