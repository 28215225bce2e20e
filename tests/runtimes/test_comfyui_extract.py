"""ComfyUI reads LoRAs that were extracted from models in its own names."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from matryoshka_lora import extract

COMFYUI = os.environ.get("COMFYUI_PATH", "")
PYTHON = os.environ.get("COMFYUI_PYTHON", "")
SCRIPT = Path(__file__).with_name("run_comfyui_extract.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (COMFYUI and PYTHON), reason="COMFYUI_PATH and COMFYUI_PYTHON are not set"
    ),
]


def run(*arguments: object) -> str:
    command = [PYTHON, str(SCRIPT), COMFYUI, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ComfyUI does not read diffusers' names of Wan, nor of SDXL's attention, which it expects with
# `processor`. Those of Flux are parts of its weights, see test_comfyui_names.
KEY_FORMATS: dict[str, list[Any]] = {
    "flux": ["kohya"],
    "wan": ["kohya"],
    "qwen": ["kohya", "diffusers"],
    "sdxl": ["kohya"],
}


@pytest.mark.parametrize("kind", KEY_FORMATS)
def test_the_base_with_the_lora_is_the_tuned_model(tmp_path: Path, kind: str) -> None:
    """The weights are those of models of ComfyUI's own classes, and it says which keys it reads."""
    run("build", kind, tmp_path)
    for key_format in KEY_FORMATS[kind]:
        lora = tmp_path / f"{key_format}.safetensors"
        models = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
        result = extract(*models, lora, rank=4096, key_format=key_format)
        report = json.loads(run("apply", kind, tmp_path, lora).splitlines()[-1])
        assert (report["unread"], report["others"]) == (0, 0)
        assert report["changed"] == report["patched"] == len(result.ranks)
        assert report["distance"] < 1e-5
        assert not result.unsaved_tensors
