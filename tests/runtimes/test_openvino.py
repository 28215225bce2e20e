"""OpenVINO GenAI reads PEFT folders. It is installed in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_llama
from helpers.plain_peft import IDS, plain_adapter
from helpers.tiny_chat import tiny_tokenizer
from peft import PeftModel

from matryoshka_lora import export, reorder

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("OPENVINO_PYTHON") or ROOT / ".venv-openvino" / "bin" / "python")
NUM_TOKENS = 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON.exists(), reason="OpenVINO is not installed in .venv-openvino"),
]


def convert_base_model(folder: Path) -> Path:
    """Return the base model in OpenVINO's format, float32, as optimum-intel converts it."""
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    command = [str(PYTHON.with_name("optimum-cli")), "export", "openvino"]
    command += ["--model", str(folder / "base"), "--task", "text-generation-with-past"]
    command += ["--weight-format", "fp32", str(folder / "openvino")]
    subprocess.run(command, check=True)
    return folder / "openvino"


def adapter_request(folder: Path | None, token_ids: list[int]) -> dict[str, Any]:
    """Return a request of `run_openvino.py` with the adapter in a folder, or without one."""
    if folder is None:
        return {"adapter": None, "scale": 0.0, "token_ids": token_ids}
    config = json.loads((folder / "adapter_config.json").read_text())
    return {
        "adapter": str(folder / "adapter_model.safetensors"),
        "scale": config["lora_alpha"] / config["r"],  # OpenVINO's alpha is the scale
        "token_ids": token_ids,
    }


def run_openvino(folder: Path, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    job = {
        "model": str(convert_base_model(folder)),
        "num_tokens": NUM_TOKENS,
        "output": str(folder / "answers.json"),
        "requests": requests,
    }
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("run_openvino.py")
    subprocess.run([str(PYTHON), str(script), str(folder / "job.json")], check=True)
    answers: list[dict[str, Any]] = json.loads((folder / "answers.json").read_text())
    return answers


def test_openvino_generates_what_peft_does(tmp_path: Path) -> None:
    """All adapters are in one pipeline; token ids and log-probabilities are PEFT's."""
    plain_adapter(tmp_path / "plain", lora_alpha=16)
    reorder(tmp_path / "plain", tmp_path / "nested")
    export(tmp_path / "nested", tmp_path / "rank-1", 1)
    export(tmp_path / "nested", tmp_path / "rank-8", 8)
    export(tmp_path / "nested", tmp_path / "mixed-ranks", keep=0.7)
    names = [None, "plain", "rank-1", "rank-8", "mixed-ranks"]
    folders = [None if name is None else tmp_path / name for name in names]
    prompts: list[list[int]] = IDS.tolist()
    pairs = [(folder, prompt) for folder in folders for prompt in prompts]
    requests = [adapter_request(folder, prompt) for folder, prompt in pairs]
    assert {request["scale"] for request in requests} == {0, 1, 2}

    answers = run_openvino(tmp_path, requests)
    tokens_by_folder: dict[Path | None, list[int]] = {}
    for (folder, prompt), answer in zip(pairs, answers, strict=True):
        token_ids = torch.tensor(answer["token_ids"])
        tokens_by_folder.setdefault(folder, []).extend(answer["token_ids"])
        model = tiny_llama()
        if folder is not None:
            model = PeftModel.from_pretrained(model, folder)
        with torch.no_grad():
            logits = model.eval()(input_ids=token_ids[None, :-1]).logits[0]
        expected = logits.log_softmax(-1)
        most_likely = expected[len(prompt) - 1 :].argmax(-1)
        assert token_ids[len(prompt) :].tolist() == most_likely.tolist(), folder
        logprobs = expected.gather(-1, token_ids[1:, None])[:, 0]
        assert (torch.tensor(answer["logprobs"]) - logprobs).abs().max() < 1e-4, folder
    # The adapters differ, so the agreement is not by chance.
    assert len({tuple(token_ids) for token_ids in tokens_by_folder.values()}) >= 4
