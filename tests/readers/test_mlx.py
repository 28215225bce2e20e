"""mlx-lm reads what is exported for it, where it is installed in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from strangers import IDS, logits, plain_adapter
from tiny_chat import tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from matryoshka_lora import export, reorder
from matryoshka_lora.files.engines import missing_rope

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MLX_PYTHON") or ROOT / ".venv-mlx" / "bin" / "python")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON.exists(), reason="mlx-lm is not installed in .venv-mlx"),
]

SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
    "initializer_range": 0.2,
}
GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 5e5}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": ROPE},
    "mistral": {"sliding_window": None},
    "qwen2": {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}},
    "qwen3": {"head_dim": 16},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "query_pre_attn_scalar": 16},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6, "query_pre_attn_scalar": 16},
}


READER = """
import json, sys
import mlx.core as mx, mlx_lm, numpy as np
for job in json.loads(sys.argv[1]):
    model, _ = mlx_lm.load(job["model"], adapter_path=job["adapter"])
    logits = model(mx.array(job["ids"])).astype(mx.float32)
    np.save(job["out"], np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
"""


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SIZES, **KINDS[kind]})
    return AutoModelForCausalLM.from_config(config).eval()


def test_mlx_lm_computes_what_peft_does(tmp_path: Path) -> None:
    """Each kind of model at several ranks, with the fields that the note names; and merged."""
    jobs, wanted = list[dict[str, Any]](), dict[str, np.ndarray]()

    def job(name: str, model: Any, base: Path, adapter: Path | None) -> None:
        wanted[name] = logits(model).float().log_softmax(-1).numpy()
        out = str(tmp_path / f"{name}.npy")
        given = {"model": str(base), "adapter": adapter and str(adapter), "out": out}
        jobs.append({**given, "ids": IDS.tolist()})

    for kind in KINDS:
        folder = tmp_path / kind
        tiny(kind).save_pretrained(folder / "base")
        tiny_tokenizer().save_pretrained(folder / "base")
        config = json.loads((folder / "base" / "config.json").read_text())
        config |= missing_rope(config)
        (folder / "base" / "config.json").write_text(json.dumps(config))
        job(f"{kind} base", tiny(kind), folder / "base", None)
        plain_adapter(folder / "plain", tiny(kind), lora_alpha=4)
        reorder(folder / "plain", folder / "nested")
        for rank in (1, 4, 8):
            mlx, peft = folder / f"mlx-{rank}", folder / f"peft-{rank}"
            export(folder / "nested", mlx, rank, "mlx", model=str(folder / "base"))
            export(folder / "nested", peft, rank)
            job(f"{kind} {rank}", PeftModel.from_pretrained(tiny(kind), peft), folder / "base", mlx)
        merged = folder / "merged"
        export(folder / "nested", merged, 4, "merged", model=str(folder / "base"))
        job(f"{kind} merged", AutoModelForCausalLM.from_pretrained(merged), merged, None)
    subprocess.run([str(PYTHON), "-c", READER, json.dumps(jobs)], check=True)
    for name, own in wanted.items():
        difference = np.abs(np.load(tmp_path / f"{name}.npy") - own).max()
        # mlx-lm's Gemma 1 is another one than transformers', with no adapter either.
        assert difference < (5e-3 if name.startswith("gemma ") else 1e-4), name
        if not name.endswith("base"):  # the adapter matters, so agreement is no accident
            assert np.abs(own - wanted[f"{name.split()[0]} base"]).max() > 0.1, name
