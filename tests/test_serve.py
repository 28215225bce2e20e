"""`matryoshka serve`: the command for vLLM. vLLM itself answers in readers/test_vllm.py."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from conftest import nested_llama
from safetensors.torch import save_file
from strangers import plain_adapter

from matryoshka_lora import MatryoshkaError, Nesting, export
from matryoshka_lora.serve import serve


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    nested_llama(Nesting((1, 2, 12))).save(tmp_path / "family")
    return tmp_path / "family"


def printed(
    capsys: pytest.CaptureFixture[str], *folder: Path, **options: object
) -> list[list[str]]:
    """Return the words of the two commands that are printed."""
    assert serve(*folder, only_print=True, **options) == 0  # type: ignore[arg-type]
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def after(words: list[str], option: str) -> list[str]:
    """Return the words between an option and the next one."""
    rest = words[words.index(option) + 1 :]
    end = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    return rest[:end]


@pytest.mark.parametrize(
    ("asked", "ranks", "padded"),
    [(None, [1, 2, 12], "16"), ([1, 2], [1, 2], "8"), ([2, 8], [2, 8], "8"), ([1], [1], "1")],
)
def test_the_printed_commands_serve_the_ladder_that_they_make(
    asked: list[int] | None,
    ranks: list[int],
    padded: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    where = {"model": "some/base", "port": 8123}
    make, server = printed(capsys, adapter, ranks=asked, **where)
    assert make[:5] == ["matryoshka", "export", str(adapter), "--format", "ladder"]
    export(adapter, make[-1], [int(x) for x in after(make, "--rank")[0].split(",")], "ladder")
    modules = dict(word.split("=") for word in after(server, "--lora-modules"))
    assert list(modules) == [f"family@{rank}" for rank in ranks]
    assert sorted(map(Path, modules.values())) == sorted(Path(make[-1]).iterdir())
    assert after(server, "--max-lora-rank") == [padded]
    assert after(server, "--max-loras") == [str(len(ranks))]
    assert after(server, "--model") == ["some/base"]
    assert (after(server, "--host"), after(server, "--port")) == (["127.0.0.1"], ["8123"])
    # A ladder that is there is served as it is.
    assert printed(capsys, Path(make[-1]), **where) == [server]
    (few,) = printed(capsys, Path(make[-1]), ranks=ranks[:1], **where)
    assert after(few, "--lora-modules") == after(server, "--lora-modules")[:1]


def test_base_and_revision_are_what_the_adapter_names(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = adapter / "adapter_config.json"
    text = config.read_text()
    for old, new in (
        ('"base_model_name_or_path": ""', '"base_model_name_or_path": "a/b"'),
        ('"revision": null', '"revision": "v1"'),
    ):
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    _, server = printed(capsys, adapter, more=["--max-model-len", "64"])
    assert (after(server, "--model"), after(server, "--revision")) == (["a/b"], ["v1"])
    assert server[-2:] == ["--max-model-len", "64"]
    _, server = printed(capsys, adapter, model="other/base")
    assert "--revision" not in server  # it is the other model's


def test_what_vllm_cannot_read_is_refused(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "lora", modules_to_save=["lm_head"])
    with pytest.raises(MatryoshkaError, match=r"lm_head.*, which vLLM cannot read: .*merged"):
        serve(tmp_path / "lora", model="some/base", only_print=True)
    pair = {"b.lora_down.weight": torch.ones(2, 3), "b.lora_up.weight": torch.ones(4, 2)}
    save_file(pair, tmp_path / "lora.safetensors")
    with pytest.raises(MatryoshkaError, match="is a single file, and vLLM reads PEFT's folders"):
        serve(tmp_path / "lora.safetensors", model="some/base", only_print=True)


def test_what_cannot_be_served_is_refused_before_anything_is_announced(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MatryoshkaError, match="vLLM is not installed"):
        serve(adapter, model="some/base")
    with pytest.raises(MatryoshkaError, match="has no rank 13"):
        serve(adapter, model="some/base", ranks=[13])
    export(adapter, adapter.with_name("ladder"), format="ladder")
    with pytest.raises(MatryoshkaError, match=r"no rank 4: its ranks are \[1, 2, 12\]"):
        serve(adapter.with_name("ladder"), model="some/base", ranks=[4])
    (adapter.with_name("ladder") / "family@2").rename(adapter.with_name("ladder") / "other@1")
    with pytest.raises(MatryoshkaError, match="has a rank twice"):
        serve(adapter.with_name("ladder"), model="some/base", only_print=True)
    with pytest.raises(MatryoshkaError, match="names no base model"):
        serve(adapter)
    assert capsys.readouterr().out == ""
