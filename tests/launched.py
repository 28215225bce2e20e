"""`matryoshka train` under `accelerate launch` on CPUs: launched.py train CONFIG.yaml ..."""

from __future__ import annotations

import os
import sys
import time

from matryoshka_lora.cli import main

if "ACCELERATE_USE_FSDP" in os.environ:
    # accelerate offers FSDP on accelerators only, though all of it runs on CPUs.
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *args, **kwargs: (
        "gloo",
        DistributedType.MULTI_GPU,
    )

if "ACCELERATE_USE_DEEPSPEED" in os.environ:
    # Else it compiles a shared-memory all-reduce for a minute. Without, it uses gloo.
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}

# Only process 0 makes the folder of a run. The other one must not count on it.
make = os.makedirs
os.makedirs = lambda name, *args, **how: (
    time.sleep(2 * str(name).endswith("run")),
    make(name, *args, **how),
)
code: object = 0
try:
    main()
except SystemExit as done:
    code = done.code
# FSDP 2 on CPUs was seen to abort in the interpreter's teardown.
sys.stdout.flush()
sys.stderr.flush()
os._exit(code if isinstance(code, int) else int(code is not None))
