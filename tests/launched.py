"""Run by `accelerate launch` in tests: ``matryoshka train`` on CPUs, where one process may kill itself.

Usage: ``accelerate launch ... launched.py CONFIG.yaml [KEY=VALUE]...``. With ``KILL=STEP@PROCESS`` in the environment
that process gets SIGKILL between the two batches of the optimizer step after STEP.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from matryoshka_lora.adapter.callback import NestingCallback
from matryoshka_lora.cli.main import main


def kill(self: NestingCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    if os.environ.get("KILL") == f"{state.global_step}@{args.process_index}":
        os.kill(os.getpid(), signal.SIGKILL)


NestingCallback.on_substep_end = kill

if "ACCELERATE_USE_FSDP" in os.environ:
    # accelerate offers FSDP on accelerators only, though all of it runs on CPUs. This makes it take them for some; the
    # environment says ACCELERATE_TORCH_DEVICE=cpu.
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

if "ACCELERATE_USE_DEEPSPEED" in os.environ:
    # Else it compiles a shared-memory all-reduce for a minute. Without, it uses gloo.
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}

sys.argv.insert(1, "train")
code: Any = 0
try:
    main()
except SystemExit as done:
    code = done.code
# A process under FSDP2 on CPUs, which accelerate does not offer, was seen to abort (SIGABRT) without a traceback, twice
# in whole runs of the suite and never alone. Exiting without the interpreter's teardown leaves out one place for it.
sys.stdout.flush()
sys.stderr.flush()
os._exit(code if isinstance(code, int) else 0 if code is None else 1)
