"""The command line under `accelerate launch` on CPUs: launch.py train CONFIG.yaml ..."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import helpers.cpu_backends  # noqa: F401  it changes accelerate and DeepSpeed
from matryoshka_lora.cli import main

make_folders = os.makedirs


def slow_make_folders(name: str, *args: Any, **kwargs: Any) -> None:
    """Create a run's folder late: the other processes must not rely on it."""
    if str(name).endswith("run"):
        time.sleep(2)
    make_folders(name, *args, **kwargs)


os.makedirs = slow_make_folders
exit_code: object = 0
try:
    main()
except SystemExit as error:
    exit_code = error.code
# FSDP 2 on CPUs sometimes aborts while the interpreter shuts down.
sys.stdout.flush()
sys.stderr.flush()
os._exit(exit_code if isinstance(exit_code, int) else int(exit_code is not None))
