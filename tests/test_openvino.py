"""OpenVINO GenAI reads the export for PEFT, where ``make test-openvino`` has set it up."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import PeftModel
from strangers import IDS, plain_adapter
from tiny_chat import tiny_tokenizer
from transformers import AutoModelForCausalLM, Qwen3Config

from matryoshka_lora import export, reorder

OPENVINO_PYTHON = os.environ.get("OPENVINO_PYTHON", "")
READER = Path(__file__).parent / "readers" / "read_openvino.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not OPENVINO_PYTHON, reason="make test-openvino sets up OpenVINO GenAI"),
]

R, TOKENS = 8, 8


def tiny_qwen3() -> Any:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3Config(**sizes, **heads, initializer_range=0.2)).eval()


MODELS: dict[str, Callable[[], Any]] = {"llama": tiny_llama, "qwen3": tiny_qwen3}


def converted(model: Any, folder: Path) -> str:
    """The base model as optimum-intel writes it for OpenVINO, in float32."""
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    options = ["--model", folder / "base", "--task", "text-generation-with-past", "--weight-format", "fp32"]
    command = [Path(OPENVINO_PYTHON).with_name("optimum-cli"), "export", "openvino", *options, folder / "openvino"]
    subprocess.run([os.path.abspath(command[0]), *map(str, command[1:])], check=True)
    return str(folder / "openvino")


def scale_of(folder: Path) -> float:
    config = json.loads((folder / "adapter_config.json").read_text())
    return float(config["lora_alpha"] / config["r"])


@pytest.mark.parametrize("kind", MODELS)
def test_openvino_genai_computes_what_peft_does(kind: str, tmp_path: Path, capsys: Any) -> None:
    """All adapters in one pipeline, one for each call: the log-probability of each token of a prompt, and of each token
    that follows it, which is PEFT's most likely one."""
    make = MODELS[kind]
    folders: dict[str, Path | None] = {"base": None}
    plain_adapter(tmp_path / "plain", make(), r=R, lora_alpha=2 * R)
    reorder(tmp_path / "plain", tmp_path / "nested")
    for name, wish in {"1": {"rank": 1}, "4": {"rank": 4}, str(R): {"rank": R}, "budget": {"budget": 0.3}}.items():
        folders[name] = tmp_path / f"rank-{name}"
        export(tmp_path / "nested", tmp_path / f"rank-{name}", verify=False, **wish)
        assert scale_of(tmp_path / f"rank-{name}") == 1
    # OpenVINO's alpha is the whole scale, which PEFT's own adapter has in its config.
    folders["plain"] = tmp_path / "plain"
    assert scale_of(tmp_path / "plain") == 2

    asked = [(name, ids) for name in folders for ids in IDS.tolist()]
    jobs = []
    for name, ids in asked:
        folder = folders[name]
        file = None if folder is None else str(folder / "adapter_model.safetensors")
        jobs.append({"adapter": file, "scale": 0.0 if folder is None else scale_of(folder), "ids": ids})
    out = tmp_path / "answers.json"
    model = {"model": converted(make(), tmp_path), "tokens": TOKENS, "out": str(out), "jobs": jobs}
    (tmp_path / "jobs.json").write_text(json.dumps([model]))
    subprocess.run([OPENVINO_PYTHON, str(READER), str(tmp_path / "jobs.json")], check=True)

    differences: dict[str, float] = {}
    texts: dict[str, list[int]] = {}
    for (name, prompt), answer in zip(asked, json.loads(out.read_text()), strict=True):
        folder, ids = folders[name], answer["ids"]
        assert ids[: len(prompt)] == prompt
        assert len(ids) == len(prompt) + TOKENS
        peft = make() if folder is None else PeftModel.from_pretrained(make(), folder)
        with torch.no_grad():
            wanted = peft.eval()(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        assert ids[len(prompt) :] == wanted[len(prompt) - 1 :].argmax(-1).tolist(), name
        found = torch.tensor(answer["log-probabilities"])
        difference = float((found - wanted.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]).abs().max())
        differences[name] = max(differences.get(name, 0.0), difference)
        texts.setdefault(name, []).extend(ids)
    with capsys.disabled():
        print(json.dumps({kind: {name: f"{difference:.1e}" for name, difference in differences.items()}}))
    assert max(differences.values()) < 1e-4
    # The rank matters, so agreement is no accident.
    assert len({tuple(ids) for ids in texts.values()}) >= 5
