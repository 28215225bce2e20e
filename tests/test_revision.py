"""The revision of the base model that was trained on goes with the adapter, and is loaded again by its name.

The hub is a cache on this machine: two snapshots of one model, ``main`` and ``v1``, with other weights and other chat
templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import AutoPeftModelForCausalLM, PeftConfig
from safetensors.torch import load_file
from strangers import output
from tiny_chat import TEMPLATE, save_tiny_chat, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.cli.main import app
from matryoshka_lora.formats.card import make_card
from matryoshka_lora.formats.config import AdapterConfig
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.models import EMBEDDED, base_of, load_config, load_model, load_tokenizer
from matryoshka_lora.training import make_config, train
from matryoshka_lora.training.run import load_model_of, load_tokenizer_of

NAME = "someone/tiny"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
Run = Callable[..., str]


@dataclass
class Hub:
    """The folders of the two revisions, and one adapter that was trained on ``v1``."""

    folders: dict[str, Path]
    adapter: Path


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    cache = tmp_path_factory.mktemp("cache")
    home, folders = cache / "models--someone--tiny", {}
    (home / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate(COMMITS.items()):
        (home / "refs" / revision).write_text(commit)
        folder = folders[revision] = save_tiny_chat(home / "snapshots" / commit)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE.replace("\n", f" of {revision}\n")
        tokenizer.save_pretrained(folder)
        # Other heads of the same shape: llama.cpp's order of the rows of q and k depends on them.
        heads, shared = (4, 2) if revision == "v1" else (2, 1)
        ours = {"attention_bias": revision == "v1", "num_attention_heads": heads, "num_key_value_heads": shared}
        tiny_llama(seed, vocab_size=len(tokenizer), max_position_embeddings=512, **ours).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        out = tmp_path_factory.mktemp("run")
        train(config(out, model_init_kwargs={"revision": "v1"}))
        yield Hub(folders, out)


def config(out: Path, **changes: Any) -> Any:
    settings = {"model": NAME, "dtype": "fp32", "data": {"task": "chain_sum", "size": 8}, "output_dir": str(out)}
    small = {"max_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True, "learning_rate": 1e-2}
    return make_config({**settings, **small, "lora": {"r": 4}, "nesting": {"reorder": "svd"}, **changes})


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: object) -> str:
        app([str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr().out

    return command


def test_it_is_kept_with_the_adapter(hub: Hub) -> None:
    for folder in (hub.adapter, hub.adapter / "checkpoint-2"):
        found = PeftConfig.from_pretrained(str(folder))
        assert (found.base_model_name_or_path, found.revision) == (NAME, "v1")
    # PEFT loads the same base model by it.
    plain = AutoPeftModelForCausalLM.from_pretrained(hub.adapter)
    assert plain.get_base_model().config.attention_bias
    card = (hub.adapter / "README.md").read_text()
    assert card.count('from_pretrained("someone/tiny", revision="v1")') == 2


@pytest.mark.parametrize("where", [{"model_init_kwargs": {"revision": "v1"}}, {"lora": {"r": 4, "revision": "v1"}}])
def test_training_loads_model_and_tokenizer_of_it(hub: Hub, tmp_path: Path, where: dict[str, Any]) -> None:
    given = config(tmp_path, **where)
    assert given.lora_config().revision == "v1"
    assert load_model_of(given).config.attention_bias
    assert " of v1" in load_tokenizer_of(given).chat_template
    assert not load_model_of(config(tmp_path)).config.attention_bias
    assert " of main" in load_tokenizer_of(config(tmp_path)).chat_template


def test_two_revisions_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match=r"model_init_kwargs.revision is 'v1' and lora.revision 'v2': write one"):
        config(tmp_path, model_init_kwargs={"revision": "v1"}, lora={"revision": "v2"})


def test_a_folder_has_no_revision(hub: Hub) -> None:
    for load in (load_model, load_config, load_tokenizer):
        for name, where in ((str(hub.folders["main"]), "is a folder here"), (EMBEDDED, "comes inside a package")):
            with pytest.raises(MatryoshkaError, match=rf"{where}, which has no revision 'v1'"):
                load(name, revision="v1")


def test_whose_revision_it_is() -> None:
    adapter = AdapterConfig({"base_model_name_or_path": NAME, "revision": "v1"})
    assert base_of(adapter) == (NAME, "v1")
    assert base_of(adapter, NAME) == (NAME, "v1")
    assert base_of(adapter, "other/model") == ("other/model", None)
    assert base_of(adapter, "other/model", "v2") == ("other/model", "v2")
    assert base_of(adapter, None, "v2") == (NAME, "v2")
    assert base_of(AdapterConfig({})) == (None, None)


def evaluated(run: Run, adapter: Path, out: Path, *options: object) -> dict[str, Any]:
    run("eval", adapter, "--tasks", "chain_sum", "--limit", 4, "--ranks", 4, "--dtype", "fp32", "-o", out, *options)
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return found


def losses(evaluation: dict[str, Any]) -> list[float]:
    loss = evaluation["tasks"]["chain_sum"]["metrics"]["loss,none"]
    return [*loss["value"], loss["base"]["value"]]


def test_eval_uses_it(hub: Hub, run: Run, tmp_path: Path) -> None:
    found = evaluated(run, hub.adapter, tmp_path / "named")
    assert (found["model"], found["revision"]) == (NAME, "v1")
    by_folder = evaluated(run, hub.adapter, tmp_path / "folder", "--model", hub.folders["v1"])
    assert losses(found) == losses(by_folder)
    assert by_folder["revision"] is None
    other = evaluated(run, hub.adapter, tmp_path / "other", "--revision", "main")
    assert other["revision"] == "main"
    assert losses(other) == losses(evaluated(run, hub.adapter, tmp_path / "main", "--model", hub.folders["main"]))
    assert losses(other) != losses(found)
    with pytest.raises(MatryoshkaError, match=r"is the evaluation of another revision.*--out"):
        evaluated(run, hub.adapter, tmp_path / "named", "--revision", "main")


def test_reorder_uses_it(hub: Hub, run: Run, tmp_path: Path) -> None:
    def weights(name: str, *options: object) -> dict[str, torch.Tensor]:
        data = ("--by", "loss", "--data", "chain_sum", "--rows", 8, "--dtype", "fp32")
        run("reorder", hub.adapter, "-o", tmp_path / name, *data, *options)
        found: dict[str, torch.Tensor] = load_file(tmp_path / name / "adapter_model.safetensors")
        return found

    named, folder = weights("named"), weights("folder", "--model", hub.folders["v1"])
    other = weights("other", "--revision", "main")
    assert all(named[key].equal(folder[key]) for key in named)
    assert not all(named[key].equal(other[key]) for key in named)
    assert open_adapter(tmp_path / "named").config.revision == "v1"


def test_a_merge_uses_it(hub: Hub, run: Run, tmp_path: Path) -> None:
    def merged(name: str, *options: object) -> Any:
        out = run("export", hub.adapter, "--rank", 4, "--format", "merged", "-o", tmp_path / name, *options)
        assert "Verified: on " in out
        return AutoModelForCausalLM.from_pretrained(tmp_path / name)

    named = merged("named")
    plain = AutoPeftModelForCausalLM.from_pretrained(hub.adapter)  # of revision v1
    torch.testing.assert_close(output(named), output(plain), rtol=1e-4, atol=1e-4)
    assert " of v1" in AutoTokenizer.from_pretrained(tmp_path / "named").chat_template
    assert output(merged("folder", "--model", hub.folders["v1"])).equal(output(named))
    other = merged("other", "--revision", "main")
    assert not other.config.attention_bias
    assert " of main" in AutoTokenizer.from_pretrained(tmp_path / "other").chat_template


def test_what_is_exported_names_it(hub: Hub, run: Run, tmp_path: Path) -> None:
    run("export", hub.adapter, "--rank", 2, "-o", tmp_path / "two")
    run("export", hub.adapter, "--format", "ladder", "-o", tmp_path / "ladder")
    for folder in (tmp_path / "two", tmp_path / "ladder" / "rank-1"):
        assert PeftConfig.from_pretrained(str(folder)).revision == "v1"
    assert f"vllm serve {NAME} --revision v1 --enable-lora" in (tmp_path / "ladder" / "README.md").read_text()
    assert f"  base model  {NAME}, revision v1\n" in run("info", hub.adapter)


def test_a_gguf_file_is_made_for_it(hub: Hub, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("gguf")

    def written(name: str, *options: object) -> bytes:
        file = tmp_path / f"{name}.gguf"
        assert "Verified: on " in run("export", hub.adapter, "--rank", 2, "--format", "gguf", "-o", file, *options)
        return file.read_bytes()

    named = written("named")
    assert named == written("folder", "--model", hub.folders["v1"])
    assert named != written("main", "--model", hub.folders["main"])


def test_a_card_holds_no_revision_that_is_none(hub: Hub) -> None:
    opened = open_adapter(hub.adapter)
    hostile = opened.config.changed(revision='"); import os; os.remove("x')
    assert "revision=" not in make_card(hostile, opened.state, hub.adapter / "absent")
