"""The export for mlx-lm: its files, and what mlx-lm itself makes of them where ``make test-mlx`` has set it up."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from peft import PeftModel
from safetensors.torch import load_file
from strangers import IDS, deltas, plain_adapter
from tiny_chat import tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from matryoshka_lora import MatryoshkaError, export, reorder
from matryoshka_lora.formats.mlx import MODELS
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.formats.write import write_adapter

MLX_PYTHON = os.environ.get("MLX_PYTHON", "")
READER = Path(__file__).parent / "readers" / "read_mlx.py"

SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2},
}
GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma": GemmaConfig(**SIZES, **GEMMA),
    "gemma2": Gemma2Config(**SIZES, **GEMMA, query_pre_attn_scalar=16),
    "gemma3_text": Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 6}, **GEMMA, query_pre_attn_scalar=16),
}


def tiny_model(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()


def saved(model: Any, folder: Path) -> str:
    """A base model as it lies on the hub: transformers 5 leaves out the ``rope_theta`` that mlx-lm reads."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": rope["rope_theta"]}))
    return str(folder)


def test_what_mlx_lm_misreads_of_a_base_model_is_a_warning(tmp_path: Path) -> None:
    """transformers 5 writes ``rope_parameters`` alone. The fields that the warning names are what is missing."""
    given = tiny_rope(5e5)
    kinds = {"full_attention": tiny_rope(5e6), "sliding_attention": tiny_rope(2e4)}
    scaled = {**tiny_rope(5e5), "rope_type": "linear", "factor": 2.0}
    for kind, rope, missing in (
        ("llama", given, {"rope_theta": 5e5}),
        ("llama", tiny_rope(1e4), {}),
        ("llama", scaled, {"rope_theta": 5e5, "rope_scaling": scaled}),
        ("qwen2", tiny_rope(1e6), {}),
        ("qwen2", tiny_rope(1e4), {"rope_theta": 1e4}),
        ("qwen3", given, {}),
        ("gemma3_text", kinds, {"rope_theta": 5e6, "rope_local_base_freq": 2e4}),
    ):
        own = type(CONFIGS[kind])(**{**CONFIGS[kind].to_dict(), "rope_parameters": rope})
        model, folder = AutoModelForCausalLM.from_config(own), tmp_path / "base"
        model.save_pretrained(folder)
        plain_adapter(tmp_path / "plain", copy.deepcopy(model), target_modules=["q_proj"])
        config = json.loads((folder / "config.json").read_text())
        for fields in ({}, missing):
            (folder / "config.json").write_text(json.dumps({**config, **fields}))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                export(tmp_path / "plain", tmp_path / "mlx", 4, "mlx", model=str(folder), verify=False, overwrite=True)
            said = [str(each.message) for each in caught if "mlx-lm" in str(each.message)]
            assert len(said) == (1 if missing and not fields else 0), (kind, rope, fields)
            if said:
                assert json.loads("{" + said[0].partition("config.json: ")[2] + "}") == missing
        assert AutoConfig.from_pretrained(folder).rope_parameters == model.config.rope_parameters


def tiny_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def log_probabilities(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model.eval()(input_ids=IDS).logits.float().log_softmax(-1).numpy()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 0.3])
def test_the_files_are_as_mlx_lm_documents_them(tmp_path: Path, budget: float | None, dtype: torch.dtype) -> None:
    own = tiny_llama()
    base = saved(own, tmp_path / "base")
    plain_adapter(tmp_path / "plain", copy.deepcopy(own), lora_alpha=5)
    reorder(tmp_path / "plain", tmp_path / "reordered")
    (tmp_path / "nested").mkdir()  # PEFT makes factors in float32, whatever the base model has
    write_adapter(tmp_path / "nested", open_adapter(tmp_path / "reordered").cast(dtype))
    rank = 4 if budget is None else None
    made = export(tmp_path / "nested", tmp_path / "mlx", rank, "mlx", budget=budget, model=base)
    assert made.verified is not None
    export(tmp_path / "nested", tmp_path / "peft", rank, budget=budget, verify=False)
    wanted = deltas(PeftModel.from_pretrained(copy.deepcopy(own), tmp_path / "peft"))

    assert sorted(file.name for file in (tmp_path / "mlx").iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    parameters = config["lora_parameters"]
    assert set(parameters) == {"rank", "scale", "dropout", "keys"}
    assert parameters["dropout"] == 0.0
    places = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
    assert set(parameters["keys"]) == {f"{place}.{name}_proj" for place, names in places.items() for name in names}
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert len(tensors) == 2 * 14
    # mlx-lm refuses a tensor of another rank than the config's.
    assert {tensor.shape[1] for key, tensor in tensors.items() if key.endswith("lora_a")} == {parameters["rank"]}
    assert {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_b")} == {parameters["rank"]}
    for name, delta in wanted.items():
        # As mlx-lm computes it: x + scale * (x @ lora_a) @ lora_b.
        found = tensors[f"{name}.lora_a"].double() @ tensors[f"{name}.lora_b"].double() * parameters["scale"]
        torch.testing.assert_close(found.T, delta, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_what_mlx_lm_would_leave_out_is_refused(tmp_path: Path) -> None:
    olmo = AutoModelForCausalLM.from_config(OlmoConfig(**SIZES))
    other = saved(olmo, tmp_path / "olmo")
    base = saved(tiny_llama(), tmp_path / "base")
    plain_adapter(tmp_path / "plain")
    plain_adapter(tmp_path / "embedding", target_modules=["q_proj", "embed_tokens"])
    plain_adapter(tmp_path / "saved", target_modules=["q_proj"], modules_to_save=["lm_head"])
    for source, model, message in (
        ("plain", other, "models of type 'olmo' cannot be exported to MLX yet"),
        ("embedding", base, "layer model.embed_tokens cannot be exported to MLX: leave it out of target_modules"),
        ("saved", base, "which is no factor: mlx-lm's adapters have no place for it"),
    ):
        with pytest.raises(MatryoshkaError, match=message):
            export(tmp_path / source, tmp_path / "out", 4, "mlx", model=model, verify=False)
    with pytest.raises(MatryoshkaError, match="format mlx needs the base model"):
        export(tmp_path / "plain", tmp_path / "out", 4, "mlx", model=str(tmp_path / "absent"))
    assert not (tmp_path / "out").exists()


def test_nothing_of_it_is_left_under_another_export(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    plain_adapter(tmp_path / "plain")
    export(tmp_path / "plain", tmp_path / "out", 4, "mlx", model=base, verify=False)
    with pytest.raises(MatryoshkaError, match="holds an adapter already"):
        export(tmp_path / "plain", tmp_path / "out", 2, verify=False)
    export(tmp_path / "plain", tmp_path / "out", 2, verify=False, overwrite=True)
    assert not (tmp_path / "out" / "adapters.safetensors").exists()
    assert open_adapter(tmp_path / "out").rank == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not MLX_PYTHON, reason="make test-mlx sets up mlx-lm")
def test_mlx_lm_computes_what_peft_does(tmp_path: Path, capsys: Any) -> None:
    """Every kind of model that `export` takes, at several ranks and with ranks by layer; and a merged model."""
    assert set(CONFIGS) == set(MODELS)
    jobs: list[dict[str, Any]] = []
    wanted: dict[str, np.ndarray] = {}

    def job(name: str, model: Any, base: str, adapter: Path | None) -> None:
        wanted[name] = log_probabilities(model)
        out = str(tmp_path / f"{name}.npy")
        jobs.append({"model": base, "adapter": adapter and str(adapter), "ids": IDS.tolist(), "out": out})

    for kind in CONFIGS:
        folder, own = tmp_path / kind, tiny_model(kind)
        base = saved(own, folder / "base")
        job(f"{kind} base", own, base, None)
        plain_adapter(folder / "plain", tiny_model(kind), lora_alpha=4)
        reorder(folder / "plain", folder / "nested")
        for name, wish in {"1": {"rank": 1}, "4": {"rank": 4}, "8": {"rank": 8}, "budget": {"budget": 0.3}}.items():
            export(folder / "nested", folder / f"mlx-{name}", format="mlx", model=base, verify=False, **wish)
            export(folder / "nested", folder / f"peft-{name}", verify=False, **wish)
            peft = PeftModel.from_pretrained(tiny_model(kind), folder / f"peft-{name}")
            job(f"{kind} {name}", peft, base, folder / f"mlx-{name}")
        export(folder / "nested", folder / "merged", 4, "merged", model=base, verify=False)
        job(f"{kind} merged", AutoModelForCausalLM.from_pretrained(folder / "merged"), str(folder / "merged"), None)
    # transformers 5 writes no field of this model that mlx-lm would read, and the merge does.
    scaled = {**tiny_rope(5e5), "rope_type": "linear", "factor": 2.0}
    own = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, rope_parameters=scaled))
    own.save_pretrained(tmp_path / "scaled")
    tiny_tokenizer().save_pretrained(tmp_path / "scaled")
    plain_adapter(tmp_path / "plain", copy.deepcopy(own))
    merged = tmp_path / "scaled-merged"
    export(tmp_path / "plain", merged, 4, "merged", model=str(tmp_path / "scaled"), verify=False)
    job("llama scaled merged", AutoModelForCausalLM.from_pretrained(merged), str(merged), None)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([MLX_PYTHON, str(READER), str(tmp_path / "jobs.json")], check=True)

    differences = {name: float(np.abs(np.load(tmp_path / f"{name}.npy") - wanted[name]).max()) for name in wanted}
    with capsys.disabled():
        print(json.dumps({name: f"{difference:.1e}" for name, difference in differences.items()}, indent=1))
    for name, difference in differences.items():
        # mlx-lm's Gemma 1 is another one than transformers', with no adapter either.
        assert difference < (5e-3 if name.startswith("gemma ") else 1e-4), name
        # The adapter matters, so agreement is no accident.
        if not name.endswith("base"):
            assert np.abs(wanted[name] - wanted[f"{name.split()[0]} base"]).max() > 0.1, name
