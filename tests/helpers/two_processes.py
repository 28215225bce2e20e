"""Run a script of this folder under `accelerate launch`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def run_in_two_processes(strategy: str, script: str, arguments: Sequence[str]) -> str:
    """Run a script in two processes on CPUs, and return its output.

    Args:
        strategy: The name of a file of configs/accelerate.
        script: The name of a file of this folder.
        arguments: The script's arguments.
    """
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]),
    }
    if strategy == "fsdp2":
        environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs/accelerate" / f"{strategy}.yaml"),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        str(FOLDER / script),
        *arguments,
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-12000:]
    return result.stdout + result.stderr
