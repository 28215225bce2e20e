"""OpenVINO GenAI reads PEFT's folders, where it is installed in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from peft import PeftModel
from strangers import IDS, plain_adapter
from tiny_chat import tiny_tokenizer

from matryoshka_lora import export, reorder

ROOT, TOKENS = Path(__file__).parents[2], 8
PYTHON = Path(os.environ.get("OPENVINO_PYTHON") or ROOT / ".venv-openvino" / "bin" / "python")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON.exists(), reason="OpenVINO is not installed in .venv-openvino"),
]


def converted(folder: Path) -> str:
    """Return the base model as optimum-intel writes it for OpenVINO, in float32."""
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    task = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    command = [PYTHON.with_name("optimum-cli"), "export", "openvino", "--model", folder / "base"]
    subprocess.run([*map(str, command), *task, str(folder / "openvino")], check=True)
    return str(folder / "openvino")


def test_openvino_genai_computes_what_peft_does(tmp_path: Path) -> None:
    """One pipeline has all adapters: each token after a prompt is PEFT's most likely one."""
    plain_adapter(tmp_path / "plain", lora_alpha=16)
    reorder(tmp_path / "plain", tmp_path / "nested")
    folders: dict[str, Path | None] = {"base": None, "plain": tmp_path / "plain"}
    for name, rank, keep in (("1", 1, None), ("8", 8, None), ("by layer", None, 0.7)):
        folders[name] = export(tmp_path / "nested", tmp_path / f"rank-{name}", rank, keep=keep).path
    asked, requests = [(name, ids) for name in folders for ids in IDS.tolist()], []
    for name, ids in asked:
        folder = folders[name]
        file, scale = None, 0.0
        if folder is not None:
            file = str(folder / "adapter_model.safetensors")
            config = json.loads((folder / "adapter_config.json").read_text())
            scale = config["lora_alpha"] / config["r"]  # OpenVINO's alpha is the whole scale
            assert scale == (2 if name == "plain" else 1)
        requests.append({"adapter": file, "scale": scale, "ids": ids})
    out = tmp_path / "answers.json"
    job = {"model": converted(tmp_path), "tokens": TOKENS, "out": str(out), "requests": requests}
    (tmp_path / "job.json").write_text(json.dumps(job))
    reader = Path(__file__).with_name("read_openvino.py")
    subprocess.run([str(PYTHON), str(reader), str(tmp_path / "job.json")], check=True)
    texts = dict[str, list[int]]()
    for (name, prompt), answer in zip(asked, json.loads(out.read_text()), strict=True):
        folder, ids = folders[name], answer["ids"]
        model = tiny_llama() if folder is None else PeftModel.from_pretrained(tiny_llama(), folder)
        with torch.no_grad():
            wanted = model.eval()(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        assert ids[len(prompt) :] == wanted[len(prompt) - 1 :].argmax(-1).tolist(), name
        logs = wanted.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (torch.tensor(answer["logs"]) - logs).abs().max() < 1e-4, name
        texts.setdefault(name, []).extend(ids)
    # The rank matters, so agreement is no accident.
    assert len({tuple(ids) for ids in texts.values()}) >= 4
