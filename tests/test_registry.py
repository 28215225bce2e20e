"""The registry of formats: an entry is complete, and a program reads every format."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers.models import tiny_llama
from helpers.plain_peft import best, distance, logits, plain_adapter, updates
from helpers.single_files import read_updates, save_random_lora
from helpers.tiny_chat import tiny_tokenizer
from transformers import AutoModelForCausalLM

import matryoshka_lora as ml
from matryoshka_lora import Lora, MatryoshkaError
from matryoshka_lora.lora.save import choose_format
from matryoshka_lora.registry import FORMATS, FormatName


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_registered_completely(name: Any, tmp_path: Path) -> None:
    """It has a type, a writer with the arguments of the others, a phrase, and a command to load."""
    spec = FORMATS[name]
    assert name in get_args(FormatName)
    assert [*inspect.signature(import_module(spec.module).write).parameters][::2] == [
        "lora",
        "target",
    ]
    assert spec.description
    assert "{path}" in spec.load
    assert spec.suffix == "" or spec.suffix.startswith(".")
    container: Any = "single" if name == "single" else "peft"
    output = tmp_path / f"output{spec.suffix}"
    assert choose_format(Lora("lora", (), container=container), output, name) is spec
    result = ml.ExportResult(output, name, {"a": 2}, 9, 8, {2: 0.5})
    assert str(output) in str(result)


@pytest.mark.parametrize("container", ["peft", "single"])
def test_the_suffix_of_a_file_is_safetensors(container: Any, tmp_path: Path) -> None:
    """A file `x.sft` of ComfyUI would be a folder of that name."""
    with pytest.raises(MatryoshkaError, match=r"lora\.safetensors"):
        choose_format(Lora("lora", (), container=container), tmp_path / "lora.sft")
    (tmp_path / "lora.sft").touch()
    with pytest.raises(MatryoshkaError, match="rename"):
        ml.open(tmp_path / "lora.sft")


def test_every_name_is_registered() -> None:
    assert list(FORMATS) == [*get_args(FormatName)]
    suffixes = [spec.suffix for spec in FORMATS.values() if spec.suffix]
    assert len(suffixes) == len(set(suffixes))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_again(name: Any, base: Path, tmp_path: Path) -> None:
    """By PEFT, transformers and this package. tests/runtimes reads GGUF and MLX."""
    output = tmp_path / f"output{FORMATS[name].suffix}"
    if name == "single":
        save_random_lora(tmp_path / "lora.safetensors", {"lora_unet_a": (9, 8)}, has_alpha=True)
        ml.open(tmp_path / "lora.safetensors").truncate(1).save(output, name)
        (update,) = read_updates(tmp_path / "lora.safetensors").values()
        (written,) = read_updates(output).values()
        np.testing.assert_allclose(written, best(update, 1), atol=1e-5)
        return
    if name == "gguf":
        pytest.importorskip("gguf")
    plain_adapter(tmp_path / "lora")
    lora = ml.open(tmp_path / "lora").truncate(4)
    result = lora.save(output, name, base_model=str(base), ranks=[4] if name == "ladder" else None)
    assert (result.format, result.path) == (name, output)
    assert [*result.errors] == [4]
    expected = {key: best(update, 4) for key, update in updates(tmp_path / "lora").items()}
    if name == "merged":
        model = AutoModelForCausalLM.from_pretrained(output)
        merged = tiny_llama()
        state = merged.state_dict()
        for key, update in expected.items():
            state[key] += torch.from_numpy(update).float()
        assert distance(logits(model), logits(merged)) < 1e-5
    elif name in ("peft", "ladder"):
        written_updates = updates(output / "lora@4" if name == "ladder" else output)
        assert written_updates.keys() == expected.keys()
        for key, update in written_updates.items():
            np.testing.assert_allclose(update, expected[key], atol=1e-5)
