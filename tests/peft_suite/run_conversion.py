"""Run PEFT's own tests of conversion with `contrib/peft` patched in: ``make test-peft``.

    python tests/peft_suite/run_conversion.py [--both]

The tests are those of the installed version. Those that load a model from the hub get a random one
of the same architecture and about the same size. None may fail. With ``--both`` they run without
the patch too, and the outcomes must be the same.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from run import download_tests

HERE = Path(__file__).parent
CONTRIB = HERE.parents[1] / "contrib" / "peft"
MIN_FROM_FACTORS = 100
"""If the patch was never used, equal outcomes would mean nothing."""

SELECTED = (
    "test_lora_conversion.py",
    "test_unilora.py",
    "test_decoder_models.py",
    "test_custom_models.py",
)
# Weighted sums of adapters are tested for every method, and skipped for all but LoRA.
KEYWORDS = "lora_conversion or (weighted and lora)"

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
GPT_SIZE = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 1000, "n_positions": 512}
OPT_SIZE = {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "ffn_dim": 4,
    "vocab_size": 50265,
    "max_position_embeddings": 100,
}
MODELS: dict[str, transformers.PretrainedConfig] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": transformers.OPTConfig(**OPT_SIZE),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": transformers.GPT2Config(**GPT_SIZE),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": transformers.GPTJConfig(
        **GPT_SIZE, rotary_dim=4
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": transformers.LlamaConfig(**SIZE),
    "peft-internal-testing/tiny-dummy-qwen2": transformers.Qwen2Config(**SIZE),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": transformers.Gemma3TextConfig(
        **SIZE, head_dim=8
    ),
    "hf-internal-testing/tiny-random-gpt2": transformers.GPT2Config(**GPT_SIZE),
    "hf-internal-testing/tiny-random-MistralForCausalLM": transformers.MistralConfig(**SIZE),
}


def write_hub_cache(folder: Path) -> None:
    """Write a random model for each name into a cache of the hub."""
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        repository = folder / f"models--{name.replace('/', '--')}"
        model.save_pretrained(repository / "snapshots" / "random")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("random")


def run_tests(source: Path, folder: Path, is_patched: bool) -> dict[str, Any]:
    """Return the outcome of each test, and how many conversions needed no dense update."""
    report = folder / "report.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(CONTRIB), str(source)]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder),
        "PEFT_SUITE_REPORT": str(report),
        "PEFT_SUITE_PATCH": str(int(is_patched)),
    }
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--tb=no"]
    command += ["-p", "patch_conversion", "--rootdir", str(source), "-k", KEYWORDS]
    command += [f"tests/{test}" for test in SELECTED]
    subprocess.run(command, cwd=source, env=environment)
    result: dict[str, Any] = json.loads(report.read_text())
    return result


def main() -> int:
    """Run the tests. The exit status is 0 if none fails, and the patch changes no outcome."""
    version = importlib.metadata.version("peft")
    source = download_tests(version)
    with tempfile.TemporaryDirectory() as temporary:
        write_hub_cache(Path(temporary, "hub"))
        patched = run_tests(source, Path(temporary), is_patched=True)
        reports = {"with": patched}
        if "--both" in sys.argv:
            reports["without"] = run_tests(source, Path(temporary), is_patched=False)
    for name, report in reports.items():
        print(f"PEFT {version} {name} the patch: {dict(Counter(report['outcomes'].values()))}")
    print(f"{patched['from_factors']} conversions and sums from factors")
    has_failed = "failed" in patched["outcomes"].values()
    is_same = all(report["outcomes"] == patched["outcomes"] for report in reports.values())
    return int(has_failed or not is_same or patched["from_factors"] < MIN_FROM_FACTORS)


if __name__ == "__main__":
    sys.exit(main())
