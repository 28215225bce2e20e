"""Commands that cannot write their output: a limit on file sizes stands for a full disk."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_llama

from matryoshka_lora import extract
from matryoshka_lora.atomic import CREATED_WITH


def limit_file_size(limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def read_files(folder: Path) -> dict[Path, bytes]:
    """Return the files of a folder, without the factors that `extract` keeps."""
    files = [path for path in folder.rglob("*") if path.parent.suffix != ".extracting"]
    return {path: path.read_bytes() for path in files if path.is_file()}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        "combine",
        "gguf",
        "mlx",
        pytest.param("extract", marks=pytest.mark.slow),
        pytest.param("ladder", marks=pytest.mark.slow),
        pytest.param("merged", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, command: str, force: bool
) -> None:
    models = tmp_path / "base", tmp_path / "tuned"
    tiny_llama().save_pretrained(models[0])
    tuned = tiny_llama()
    for block in tuned.model.layers:
        torch.nn.init.normal_(block.mlp.down_proj.weight)
    tuned.save_pretrained(models[1])
    output = tmp_path / ("output.gguf" if command == "gguf" else "output")
    arguments = [command, *map(str, models), "--rank", "16"]
    lora = tmp_path / "lora"
    if command != "extract":
        extract(*models, lora, rank=16)
        arguments = [command, str(lora), str(lora), "--rank", "16"]
    limit = 9000
    if command not in ("combine", "extract"):
        rank = "1" if command == "gguf" else "16"
        arguments = ["export", str(lora), "--format", command, "--rank", rank]
    if command == "gguf":
        limit = 1500  # small tensors, which C buffers until it closes the file
    if force:
        if command == "gguf":
            output.write_text(f"GGUF {CREATED_WITH}")
        else:
            extract(*models, output, rank=1)
        arguments.append("--force")
    before = read_files(tmp_path)
    process = subprocess.run(
        # -B: bytecode that is cut off at the limit would fail in later tests.
        [sys.executable, "-B", "-m", "matryoshka_lora", *arguments, "-o", str(output)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: limit_file_size(limit),
        check=False,
    )
    assert process.returncode == 1
    assert "Cannot write" in process.stderr
    assert "Traceback" not in process.stderr
    assert read_files(tmp_path) == before
