"""The example for image models, on small pipelines with random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.peft
from helpers.plain_peft import distance
from PIL import Image

import matryoshka_lora as ml

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from helpers.pipelines import flux, stable_diffusion  # noqa: E402

# transformers 5.24 requires for its text encoders a version of PEFT that is not released yet.
transformers.integrations.peft.MIN_PEFT_VERSION = "0.18.0"

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_diffusion.py"


@pytest.mark.parametrize("new_pipeline", [stable_diffusion, flux], ids=lambda f: f.__name__)
def test_every_rank_of_a_pipeline(tmp_path: Path, new_pipeline: Any) -> None:
    torch.manual_seed(0)
    new_pipeline(tmp_path).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number in range(3):
        color = (80 * number, 200 - 60 * number, 30)
        Image.new("RGB", (20, 16), color).save(tmp_path / "images" / f"{number}.png")
    words = "--model model --images images --output out --resolution 16 --rank 4 --steps 40 "
    command = [sys.executable, str(EXAMPLE), *words.split(), "--prompt", "a dog"]
    command += ["--learning-rate", "1e-2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "validation loss" in result.stdout
    assert ml.open(tmp_path / "out" / "adapter").max_rank == 4
    for rank in (1, 2, 4):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
        part = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
        pipeline.load_lora_weights(str(tmp_path / "out" / f"rank-{rank}.safetensors"))
        updates = {
            name: module.get_delta_weight("default_0")
            for name, module in part.named_modules()
            if hasattr(module, "get_delta_weight")
        }
        ml.export(tmp_path / "out" / "adapter", tmp_path / f"rank-{rank}", rank)
        layers = ml.open(tmp_path / f"rank-{rank}").layers
        assert updates.keys() == {layer.name for layer in layers}
        for layer in layers:
            factors = layer.read()
            expected = torch.tensor(layer.scale * factors.B @ factors.A)
            assert distance(updates[layer.name], expected) < 1e-5
