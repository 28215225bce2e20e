"""What a rank costs where it is deployed: bytes of its adapter, time of a token."""

from __future__ import annotations

import inspect
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.adapter.saving import export_rank, opened_from
from matryoshka_lora.formats.config import AdapterConfig
from matryoshka_lora.formats.opened import OpenedAdapter
from matryoshka_lora.loaded import evaluation_mode

_STEPS = 12


def adapter_bytes(adapter: OpenedAdapter, ranks: Sequence[int]) -> list[int]:
    """Bytes of the tensors of the ordinary adapter that ``matryoshka export`` writes, for each rank.

    Args:
        adapter: A nested one.
        ranks: From 1 to R.
    """
    factors = _bytes(adapter, [key for layer in adapter.layers for key in (layer.key_A, layer.key_B)])
    others = _bytes(adapter, adapter.others)
    return [factors * rank // adapter.rank + others for rank in ranks]


def _bytes(adapter: OpenedAdapter, keys: Sequence[str]) -> int:
    stored = [adapter.stored[key] for key in keys]
    return sum(each.shape.numel() * each.dtype.itemsize for each in stored if each.dtype is not None)


def token_latency(adapter: NestedAdapter, ranks: Sequence[int]) -> list[float]:
    """Milliseconds to generate a token with the exported adapter of each rank: one row, after 64 tokens; medians.

    Measured on the machine that evaluates, with PEFT's own layers and transformers' own cache. The ranks take turns, as
    many of them as are together in memory no more than two adapters of the largest rank.
    """
    found: list[float] = []
    turns: list[int] = []
    for rank in ranks:
        if turns and sum(turns) + rank > 2 * adapter.nesting.max_rank:
            found += _in_turns(adapter, turns)
            turns = []
        turns.append(rank)
    return found + (_in_turns(adapter, turns) if turns else [])


@torch.inference_mode()
def _in_turns(adapter: NestedAdapter, ranks: Sequence[int]) -> list[float]:
    model = adapter.model
    # PEFT lets an adapter learn that is made the active one.
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    names = {rank: f"latency_{rank}" for rank in ranks}
    times: dict[int, list[float]] = {rank: [] for rank in ranks}
    # transformers 5.24 has renamed it.
    key = "cache" if "cache" in inspect.signature(model.get_base_model().forward).parameters else "past_key_values"
    ids = torch.arange(64, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        with evaluation_mode(model):
            _load_cut(adapter, names)
            caches: dict[int, Any] = {}
            for turn in range(_STEPS):
                for rank in ranks:
                    model.set_adapter(names[rank])
                    if rank not in caches:
                        caches[rank] = getattr(model(input_ids=ids, use_cache=True), key)
                    begin = time.perf_counter()
                    model(input_ids=ids[:, -1:], use_cache=True, **{key: caches[rank]})
                    if turn > 1:
                        times[rank].append(1000 * (time.perf_counter() - begin))
    finally:
        model.set_adapter(adapter.name)
        for name in names.values():
            if name in model.peft_config:
                model.delete_adapter(name)
        for parameter, learns in learning:
            parameter.requires_grad = learns
    return [round(statistics.median(times[rank]), 3) for rank in ranks]


def _load_cut(adapter: NestedAdapter, names: Mapping[int, str]) -> None:
    """Put the ordinary adapter of each rank onto the model.

    Time does not depend on the numbers, so factors that were never reordered are cut as they are. Biases that were
    trained stay those of the model: PEFT takes one adapter that has some.
    """
    opened = opened_from(adapter.model, adapter.name)
    columns = replace(opened, state=replace(opened.nested, deploy="paper"))
    if opened.config["bias"] not in (None, "none"):
        others = tuple(key for key in opened.others if not key.endswith(".bias"))
        columns = replace(columns, config=AdapterConfig({**opened.config.data, "bias": "none"}), others=others)
    with tempfile.TemporaryDirectory() as folder:
        for rank, name in names.items():
            export_rank(columns, f"{folder}/{rank}", rank)
            adapter.model.load_adapter(f"{folder}/{rank}", name, torch_device=str(adapter.model.device))
