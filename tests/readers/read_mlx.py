"""What mlx-lm computes, in its own environment: ``python read_mlx.py JOBS.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np

for job in json.loads(Path(sys.argv[1]).read_text()):
    model, _ = mlx_lm.load(job["model"], adapter_path=job["adapter"])
    logits = model(mx.array(job["ids"])).astype(mx.float32)
    np.save(job["out"], np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
