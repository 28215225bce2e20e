"""`matryoshka push`: which files are sent to a hub, and what keeps all of them at home."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import LINEAR_LAYERS, nested_llama, randomize, tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from strangers import forget_weights
from tiny_hub import sent_files, tiny_hub

from matryoshka_lora import MatryoshkaError, Nesting, export, reorder
from matryoshka_lora.cli.main import app
from matryoshka_lora.formats.beside import check_measured, fingerprint
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.serving.push import push

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"
OWN = {"README.md", "adapter_config.json", "adapter_model.safetensors", "nesting.json"}


@pytest.fixture
def hub() -> Iterator[Any]:
    with tiny_hub() as server:
        yield server


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """A reordered adapter whose base model has no name."""
    adapter = nested_llama(Nesting([1, 2, 8]))
    adapter.save(tmp_path / "raw")
    reorder(tmp_path / "raw", tmp_path / "nested")
    return tmp_path / "nested"


def name_base(adapter: Path, base: str) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def test_the_adapter_is_sent_and_nothing_else(nested: Path, hub: Any) -> None:
    for name in ("checkpoint-5/optimizer.pt", "secret.txt", "train.yaml", "evaluation/examples.jsonl"):
        (nested / name).parent.mkdir(exist_ok=True)
        (nested / name).write_text("secret")
    # A pattern with a star would take these, and their folders: to huggingface_hub, a star also stands for strokes.
    for name in ("adapter_model_private/a.safetensors", "adapter_model/b.safetensors", "adapter_model_old.safetensors"):
        (nested / name).parent.mkdir(exist_ok=True)
        (nested / name).write_bytes(b"secret")
    # An index that is left over speaks of shards that are not the adapter's.
    (nested / "adapter_model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "adapter_model_old.safetensors"}}'
    )
    assert push(nested, "me/any-rank", endpoint=hub.address).startswith(hub.address)
    sent = sent_files(hub)
    assert set(sent) == {*OWN, "spectra.safetensors"}
    for name, content in sent.items():
        assert name == "adapter_config.json" or content == (nested / name).read_bytes()
    assert json.loads(sent["adapter_config.json"]) == json.loads((nested / "adapter_config.json").read_text())


def test_the_evaluation_is_sent_with_its_picture(nested: Path, hub: Any) -> None:
    (nested / "evaluation").mkdir()
    (nested / "evaluation" / "evaluation.json").write_text("{}")
    (nested / "evaluation" / "curve.png").write_bytes(b"\x89PNG\r\n")
    push(nested, "me/any-rank", endpoint=hub.address)
    assert {name for name in sent_files(hub) if "/" in name} == {"evaluation/evaluation.json", "evaluation/curve.png"}


def test_an_evaluation_of_other_weights_is_not_sent(nested: Path, hub: Any) -> None:
    (nested / "evaluation").mkdir()
    file = nested / "evaluation" / "evaluation.json"
    file.write_text(json.dumps({"format": 3, "adapter": {"sha256": fingerprint(open_adapter(nested))}}))
    forget_weights(nested)
    weights = nested / "adapter_model.safetensors"
    before = weights.read_bytes()
    save_file({key: 2 * weight for key, weight in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(MatryoshkaError, match=r"evaluation.json was measured on other weights than .*with --force"):
        push(nested, "me/any-rank", endpoint=hub.address)
    assert not hub.requests
    weights.write_bytes(before)
    push(nested, "me/any-rank", endpoint=hub.address)
    assert "evaluation/evaluation.json" in sent_files(hub)


def test_an_evaluation_of_version_0_1_knows_the_files_that_it_is_of(nested: Path) -> None:
    """Their bytes, in the order of their names; of the others of the folder, nothing."""
    names = ["adapter_config.json", "adapter_model.safetensors", "nesting.json", "spectra.safetensors"]
    found = hashlib.sha256(b"".join(name.encode() + (nested / name).read_bytes() for name in names)).hexdigest()
    file = nested / "evaluation.json"
    file.write_text(json.dumps({"format": 2, "adapter": {"sha256": found}}))
    check_measured(file, open_adapter(nested))
    (nested / "nesting.json").write_text((nested / "nesting.json").read_text() + " ")
    with pytest.raises(MatryoshkaError, match="was measured on other weights"):
        check_measured(file, open_adapter(nested))


def test_shards_are_sent_with_their_index(tmp_path: Path, hub: Any) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=LINEAR_LAYERS))
    randomize(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    names = {file.name for file in tmp_path.glob("adapter_model*")}
    if len(names) < 3:  # this PEFT writes one file
        names = split(tmp_path)
    (tmp_path / "adapter_model-00009-of-00009.safetensors").write_bytes(b"secret")
    (tmp_path / "README.md").unlink(missing_ok=True)
    push(tmp_path, "me/any-rank", endpoint=hub.address)
    assert set(sent_files(hub)) == {"adapter_config.json", *names}
    assert not (tmp_path / "README.md").exists(), "an adapter that may be anybody's gets no card of ours"


def split(folder: Path) -> set[str]:
    tensors, names = load_file(folder / "adapter_model.safetensors"), ["one.safetensors", "two.safetensors"]
    keys = sorted(tensors)
    parts = dict(zip(names, (keys[:5], keys[5:]), strict=True))
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapter_model.safetensors").unlink()
    return {"adapter_model.safetensors.index.json", *names}


def test_a_file_of_directions_is_sent(nested: Path, tmp_path: Path, hub: Any) -> None:
    export(nested, tmp_path / "directions", format="directions")
    push(tmp_path / "directions", "me/any-rank", endpoint=hub.address)
    assert set(sent_files(hub)) == OWN - {"adapter_model.safetensors"} | {"directions.safetensors"}


def in_shards(folder: Path) -> Path:
    """A plain adapter in two files, as PEFT names them."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=LINEAR_LAYERS))
    randomize(model, seed=3)
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    keys = sorted(tensors)
    parts = {f"adapter_model-0000{i}-of-00002.safetensors": part for i, part in ((1, keys[:5]), (2, keys[5:]))}
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapter_model.safetensors").unlink()
    return folder


def plain(folder: Path) -> Path:
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=LINEAR_LAYERS))
    randomize(model, seed=2)
    model.save_pretrained(folder)
    return folder


def downloaded(hub: Any, into: Path) -> Path:
    for name, content in hub.files.items():
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).write_bytes(content)
    return into


KINDS = ("nested", "plain", "shards", "directions")


@pytest.mark.parametrize(
    ("first", "second"),
    # A plain adapter has no file that a nested one has not.
    [pair for pair in itertools.permutations(KINDS, 2) if pair != ("plain", "nested")],
)
def test_a_second_version_leaves_nothing_of_the_first(
    nested: Path, tmp_path: Path, hub: Any, first: str, second: str
) -> None:
    kinds = {"nested": nested, "plain": plain(tmp_path / "plain"), "shards": in_shards(tmp_path / "shards")}
    kinds["directions"] = tmp_path / "directions"
    export(nested, tmp_path / "directions", format="directions")
    push(kinds[first], "me/any-rank", endpoint=hub.address)
    hub.requests.clear()
    push(kinds[second], "me/any-rank", endpoint=hub.address)
    assert set(hub.files) == {"README.md", *sent_files(hub)}
    wanted = open_adapter(kinds[second])
    found = open_adapter(downloaded(hub, tmp_path / "there"))
    assert [file.name for file in found.weights] == [file.name for file in wanted.weights]
    assert found.state == wanted.state
    assert all(tensor.equal(found.tensor(key)) for key, tensor in wanted.tensors().items())


def test_only_files_of_an_adapter_are_deleted(nested: Path, hub: Any) -> None:
    others = (
        *(".gitattributes", "LICENSE", "train.yaml", "adapter_model_old.safetensors", "model.safetensors"),
        *("other/nesting.json", "evaluation/mine.txt", "evaluation.json", "tokenizer.json"),
    )
    ours = (
        *("adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json", "adapter_model.bin"),
        *("directions.safetensors", "trained.safetensors"),
        *("evaluation/evaluation.json", "evaluation/curve.png", "evaluation/report.html", "evaluation/examples.jsonl"),
    )
    hub.files.update(dict.fromkeys((*others, *ours, "nesting.json"), b"old"))
    push(nested, "me/any-rank", endpoint=hub.address)
    assert set(hub.files) == {*others, *OWN, "spectra.safetensors"}
    assert {hub.files[name] for name in others} == {b"old"}
    assert hub.files["nesting.json"] == (nested / "nesting.json").read_bytes()
    assert len([path for path, _ in hub.requests if "/commit/" in path]) == 1


def test_a_repository_that_is_not_listed_is_left_alone(nested: Path, hub: Any) -> None:
    hub.files["directions.safetensors"], hub.lists = b"old", False
    with pytest.raises(MatryoshkaError, match=r"nothing was sent.*'me/any-rank' cannot be listed.*another repository"):
        push(nested, "me/any-rank", endpoint=hub.address)
    assert hub.files == {"directions.safetensors": b"old"}
    assert not [path for path, _ in hub.requests if "/commit/" in path]


def picture(words: str) -> bytes:
    """A PNG of one pixel with a text in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixel = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0\0"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", b"Comment\0" + words.encode()) + pixel + chunk(b"IEND", b"")


CARD, EVALUATION, PICTURE = "README.md", "evaluation/evaluation.json", "evaluation/curve.png"
HIDDEN: dict[str, tuple[str, str | bytes | None, str]] = {
    "a token in somebody's card": (CARD, f"# Mine\n\nkey: {TOKEN}\n", "line 3: what looks like a token"),
    "a path in somebody's card": (CARD, "# Mine\nsee /home/alice/notes\n", "line 2: an absolute path"),
    "an evaluation of an older version": (EVALUATION, '{\n"path": "/home/alice/run"}', "line 2: an absolute path"),
    "a picture, a token": (PICTURE, picture(f"by {TOKEN}"), "byte 27: what looks like a token"),
    "a picture, a path": (PICTURE, picture("in /home/alice/run"), "byte 27: an absolute path"),
    "tensors": ("spectra.safetensors", None, "line 1: an absolute path"),
    "a field of the config": ("adapter_config.json", None, "line 5: what looks like a token"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_nothing_is_sent_while_a_file_holds_a_secret(nested: Path, hub: Any, case: str) -> None:
    name, content, where = HIDDEN[case]
    file = nested / name
    file.parent.mkdir(exist_ok=True)
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif case == "tensors":
        save_file(load_file(file), file, {"from": "/home/alice/run"})
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_mapping": TOKEN}))
    with pytest.raises(MatryoshkaError, match=r"nothing was sent, because of .*Take it out of the file") as caught:
        push(nested, "me/any-rank", endpoint=hub.address)
    assert f"{name}, {where}" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert "alice" not in str(caught.value)
    assert not hub.requests


def test_a_base_model_in_a_folder_needs_its_name_on_the_hub(
    nested: Path, hub: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").mkdir()
    for base in ("/home/alice/models/tiny", "../models/tiny", "models/tiny"):
        name_base(nested, base)
        before = {file.name: file.read_bytes() for file in nested.iterdir()}
        with pytest.raises(MatryoshkaError, match=r"folder of this machine.* --base-model owner/name"):
            push(nested, "me/any-rank", endpoint=hub.address)
        with pytest.raises(MatryoshkaError, match="is no id of a model on the hub"):
            push(nested, "me/any-rank", endpoint=hub.address, base_model="/home/alice/models/tiny")
        assert {file.name: file.read_bytes() for file in nested.iterdir()} == before
        assert not hub.requests
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    app(["push", str(nested), "me/any-rank", "--base-model", "someone/tiny"], standalone_mode=False)
    assert "Uploaded: " in capsys.readouterr().out
    sent = sent_files(hub)
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "someone/tiny"
    assert b"base_model: someone/tiny\n" in sent["README.md"]
    assert b"models/tiny" not in b"".join(sent.values())
    # Here it is loaded from its folder as before.
    assert json.loads((nested / "adapter_config.json").read_text())["base_model_name_or_path"] == "models/tiny"


def test_a_name_of_the_hub_is_sent_as_it_is(nested: Path, hub: Any) -> None:
    name_base(nested, "someone/tiny")
    push(nested, "me/any-rank", endpoint=hub.address)
    assert json.loads(sent_files(hub)["adapter_config.json"])["base_model_name_or_path"] == "someone/tiny"


def test_a_hub_that_cannot_be_reached(nested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(MatryoshkaError, match=r"cannot push to 'me/any-rank'.*hf auth login"):
        push(nested, "me/any-rank", endpoint="http://127.0.0.1:9")
