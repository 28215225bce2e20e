"""Settings of every test: one thread, no network, and reproducible hypothesis examples."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Programs that a test starts inherit it. More threads than cores would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)
# Derandomised: a failing test must fail again in the next run.
settings.register_profile(
    "tests",
    deadline=None,
    max_examples=25,
    derandomize=True,
    # Shrinking a failure would build models for minutes.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")
