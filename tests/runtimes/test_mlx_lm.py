"""mlx-lm reads what is exported for it. It is installed in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plain_peft import IDS, logits, plain_adapter
from helpers.tiny_chat import tiny_tokenizer
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from matryoshka_lora import export, reorder
from matryoshka_lora.formats.mlx import missing_rope_fields

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MLX_PYTHON") or ROOT / ".venv-mlx" / "bin" / "python")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON.exists(), reason="mlx-lm is not installed in .venv-mlx"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 5e5}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": DEFAULT_ROPE},
    "mistral": {"sliding_window": None},
    "qwen2": {"rope_parameters": LINEAR_ROPE},
    "qwen3": {"head_dim": 16},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "query_pre_attn_scalar": 16},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6, "query_pre_attn_scalar": 16},
}
"""The config of a small model by its model_type."""

SCRIPT = """
import json, sys
import mlx.core as mx, mlx_lm, numpy as np
for job in json.loads(sys.argv[1]):
    model, _ = mlx_lm.load(job["model"], adapter_path=job["adapter"])
    logits = model(mx.array(job["token_ids"])).astype(mx.float32)
    np.save(job["output"], np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
"""


def tiny_model(model_type: str) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **CONFIGS[model_type]})
    return AutoModelForCausalLM.from_config(config).eval()


def save_base_model(model_type: str, folder: Path) -> None:
    """Save a small model with the fields that mlx-lm needs in its config."""
    tiny_model(model_type).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(missing_rope_fields(config))
    (folder / "config.json").write_text(json.dumps(config))


def torch_logprobs(model: Any) -> np.ndarray:
    logprobs: np.ndarray = logits(model).float().log_softmax(-1).numpy()
    return logprobs


class MlxJobs:
    """Models whose log-probabilities mlx-lm computes, all in one process.

    Attributes:
        expected: The log-probabilities that PyTorch computes, by the name of the job.
    """

    def __init__(self, folder: Path) -> None:
        self.expected: dict[str, np.ndarray] = {}
        self._folder = folder
        self._jobs: list[dict[str, Any]] = []

    def add(self, name: str, torch_model: Any, model: Path, adapter: Path | None = None) -> None:
        self.expected[name] = torch_logprobs(torch_model)
        job = {
            "model": str(model),
            "adapter": None if adapter is None else str(adapter),
            "token_ids": IDS.tolist(),
            "output": str(self._folder / f"{name}.npy"),
        }
        self._jobs.append(job)

    def run(self) -> dict[str, np.ndarray]:
        subprocess.run([str(PYTHON), "-c", SCRIPT, json.dumps(self._jobs)], check=True)
        return {name: np.load(self._folder / f"{name}.npy") for name in self.expected}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_mlx_lm_computes_what_pytorch_does(tmp_path: Path, model_type: str) -> None:
    """The base model, exported ranks, and a merged model."""
    base = tmp_path / "base"
    nested = tmp_path / "nested"
    save_base_model(model_type, base)
    plain_adapter(tmp_path / "plain", tiny_model(model_type), lora_alpha=4)
    reorder(tmp_path / "plain", nested)

    jobs = MlxJobs(tmp_path)
    jobs.add("base", tiny_model(model_type), base)
    for rank in (1, 4, 8):
        mlx_folder = tmp_path / f"mlx-{rank}"
        peft_folder = tmp_path / f"peft-{rank}"
        export(nested, mlx_folder, rank, format="mlx", base_model=str(base))
        export(nested, peft_folder, rank)
        peft_model = PeftModel.from_pretrained(tiny_model(model_type), peft_folder)
        jobs.add(f"rank {rank}", peft_model, base, mlx_folder)
    merged = tmp_path / "merged"
    export(nested, merged, 4, format="merged", base_model=str(base))
    jobs.add("merged", AutoModelForCausalLM.from_pretrained(merged), merged)

    # mlx-lm's Gemma 1 differs from that of transformers without an adapter, too.
    tolerance = 5e-3 if model_type == "gemma" else 1e-4
    for name, result in jobs.run().items():
        expected = jobs.expected[name]
        assert np.abs(result - expected).max() < tolerance, name
        if name != "base":  # the adapter has an effect, so the agreement is not by chance
            assert np.abs(expected - jobs.expected["base"]).max() > 0.1, name


NEW_ADAPTER = """
import sys
from pathlib import Path
import mlx.core as mx, mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_config
base, folder = sys.argv[1], Path(sys.argv[2])
model, _ = mlx_lm.load(base)
parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0}
model.freeze()
linear_to_lora_layers(model, 1, parameters)
folder.mkdir()
weights = {
    name: 0.1 * mx.random.normal(weight.shape)
    for name, weight in tree_flatten(model.trainable_parameters())
}
mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
config = {"model": base, "num_layers": 1, "lora_parameters": parameters}
save_config(config, folder / "adapter_config.json")
"""


def test_an_adapter_of_mlx_lm_is_read(tmp_path: Path) -> None:
    """PEFT computes the same with it, and a smaller rank goes back to mlx-lm."""
    base, trained = tmp_path / "base", tmp_path / "trained"
    save_base_model("llama", base)
    subprocess.run([str(PYTHON), "-c", NEW_ADAPTER, str(base), str(trained)], check=True)
    jobs = MlxJobs(tmp_path)
    jobs.add("base", tiny_model("llama"), base)
    for rank, mlx_folder in ((4, trained), (2, tmp_path / "mlx-2")):
        peft_folder = tmp_path / f"peft-{rank}"
        export(trained, peft_folder, rank)
        if rank < 4:
            export(trained, mlx_folder, rank, format="mlx")
        peft_model = PeftModel.from_pretrained(tiny_model("llama"), peft_folder)
        jobs.add(f"rank {rank}", peft_model, base, mlx_folder)
    for name, result in jobs.run().items():
        expected = jobs.expected[name]
        assert np.abs(result - expected).max() < 1e-4, name
        if name != "base":
            assert np.abs(expected - jobs.expected["base"]).max() > 0.1, name
