"""What a rank costs where it is deployed: bytes of its adapter, time of a token."""

from __future__ import annotations

import inspect
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.adapter.factors import get_parameters

_STEPS = 12


def adapter_bytes(adapter: NestedAdapter, ranks: Sequence[int]) -> list[int]:
    """Bytes of the factors of the ordinary adapter that `NestedAdapter.export` writes, for each rank."""
    factors = [factor for _, module, _ in adapter._layers() for factor in get_parameters(module, adapter.name)]
    top = adapter.nesting.max_rank
    return [sum(factor.numel() // top * rank * factor.itemsize for factor in factors) for rank in ranks]


@torch.inference_mode()
def token_latency(adapter: NestedAdapter, ranks: Sequence[int]) -> list[float]:
    """Milliseconds to generate a token with the exported adapter of each rank: one row, after 64 tokens; medians.

    Measured on the machine that evaluates, with PEFT's own layers and transformers' own cache. The ranks take turns.
    """
    model = adapter.model
    with tempfile.TemporaryDirectory() as folder:
        names = {}
        for rank in ranks:
            names[rank] = f"latency_{rank}"
            adapter.export(f"{folder}/{rank}", rank)
            model.load_adapter(f"{folder}/{rank}", names[rank], torch_device=str(model.device))
    # transformers 5.24 has renamed it.
    key = "cache" if "cache" in inspect.signature(model.get_base_model().forward).parameters else "past_key_values"
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    ids = torch.arange(64, device=model.device)[None] % model.config.get_text_config().vocab_size
    times: dict[int, list[float]] = {rank: [] for rank in ranks}
    try:
        caches: dict[int, Any] = {}
        for turn in range(_STEPS):
            for rank in ranks:
                model.set_adapter(names[rank])
                if rank not in caches:
                    out = model(input_ids=ids, use_cache=True)
                    caches[rank] = getattr(out, key)
                begin = time.perf_counter()
                model(input_ids=ids[:, -1:], use_cache=True, **{key: caches[rank]})
                if turn > 1:
                    times[rank].append(1000 * (time.perf_counter() - begin))
    finally:
        model.set_adapter(adapter.name)
        for name in names.values():
            model.delete_adapter(name)
        for module, training in modes:
            module.training = training
    return [round(statistics.median(times[rank]), 3) for rank in ranks]
