"""FSDP and DeepSpeed on CPUs: import this module in a script under `accelerate launch`."""

from __future__ import annotations

import importlib.util
import os

if "ACCELERATE_USE_FSDP" in os.environ:
    # accelerate offers FSDP on accelerators only, though all of it runs on CPUs.
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *args, **kwargs: (
        "gloo",
        DistributedType.MULTI_GPU,
    )

if importlib.util.find_spec("deepspeed"):
    # Otherwise it compiles a shared-memory all-reduce for a minute. Without, it uses gloo.
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
