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


def limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))


def read_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("command", ["combine", pytest.param("extract", marks=pytest.mark.slow)])
def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, command: str, force: bool
) -> None:
    models = tmp_path / "base", tmp_path / "tuned"
    tiny_llama().save_pretrained(models[0])
    tuned = tiny_llama()
    for block in tuned.model.layers:
        torch.nn.init.normal_(block.mlp.down_proj.weight)
    tuned.save_pretrained(models[1])
    sources = models
    if command == "combine":
        extract(*models, tmp_path / "lora", rank=16)
        sources = tmp_path / "lora", tmp_path / "lora"
    arguments = [command, *map(str, sources), "--rank", "16", "-o", str(tmp_path / "output")]
    if force:
        extract(*models, tmp_path / "output", rank=1)
        arguments.append("--force")
    before = read_files(tmp_path)
    process = subprocess.run(
        [sys.executable, "-m", "matryoshka_lora", *arguments],
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
        check=False,
    )
    assert process.returncode == 1
    assert "Cannot write" in process.stderr
    assert "Traceback" not in process.stderr
    assert read_files(tmp_path) == before
