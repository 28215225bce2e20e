"""Measure the training step of a TRL script, as in docs/training.md: PEFT alone, and nested.

    make bench-trl
    python benchmarks/trl_step.py --tokens 128 --repeats 3 --output benchmarks/results/trl_step.json

Three kinds of trainer alternate in one process: plain PEFT, the nested adapter with PEFT's own
forward, and the nested adapter with the fused operation. Each runs ``trainer.train()`` with TRL's
defaults: batches of 8 rows and gradient checkpointing. There are three settings: the model in bf16
with ``bf16=False``, as there on hardware with bf16; the model in fp32, as there on other
CPUs; and TRL's bf16 autocast.

Time is CPU time of one thread, and on a GPU wall time, of a step with its update; the ratios are
medians over all steps but the first of each run. Peak bytes count all tensors that a step creates
and that live at the same time.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import weakref
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_step import now
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import nest
from matryoshka_lora.peft.base_model import load_model, load_tokenizer

VARIANTS = ("PEFT", "nested, PEFT's forward", "nested, fused")
SETTINGS = {"bf16": ("bf16", False), "fp32": ("fp32", False), "autocast": ("bf16", True)}
"""The dtype of the model, and TRL's ``bf16``."""
ROWS = 8
STEPS = 2
"""The measured steps of a run."""


class PeakBytes(TorchDispatchMode):
    """Count the bytes of the storages that are created and live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self._storages:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


class StepMeter(TrainerCallback):
    """Measure the time of each step, and the peak bytes of the last one, whose time is omitted.

    Attributes:
        seconds: Of all steps but the first and the last.
        peak: In bytes.
        checkpoints: Whether the model checkpoints its activations.
        loss: Of the last step.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak = 0
        self.checkpoints = False
        self.loss = 0.0
        self._start = 0.0
        self._counter = PeakBytes()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, or the counter."""
        if state.global_step == args.max_steps - 1:
            self.checkpoints = kwargs["model"].is_gradient_checkpointing
            self._counter.__enter__()
        self._start = now(kwargs["model"].device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        if state.global_step == args.max_steps:
            self._counter.__exit__(None, None, None)
            self.peak = self._counter.peak
        elif state.global_step > 1:
            self.seconds.append(now(kwargs["model"].device) - self._start)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the loss."""
        self.loss = kwargs["logs"].get("loss", self.loss)


def run(variant: str, setting: str, tokens: int, num_steps: int) -> StepMeter:
    """Train as that script, on rows of a number of tokens."""
    meter = StepMeter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(variant, setting, tokens, num_steps + 2, folder)
        trainer.add_callback(meter)
        trainer.train()
    return meter


def make_trainer(
    variant: str, setting: str, tokens: int, num_steps: int, folder: str
) -> SFTTrainer:
    """Return the trainer of the script, on rows of a number of tokens."""
    dtype, bf16 = SETTINGS[setting]
    tokenizer = load_tokenizer()
    ids = tokenizer(Path(__file__).read_text(encoding="utf-8"))["input_ids"]
    half = tokens // 2
    rows = [
        {
            "prompt": tokenizer.decode(ids[row * 8 : row * 8 + half]),
            "completion": tokenizer.decode(ids[row * 8 + half : row * 8 + tokens]),
        }
        for row in range(ROWS)
    ]
    trainer = SFTTrainer(
        load_model(dtype=dtype),
        SFTConfig(
            folder,
            max_steps=num_steps,
            learning_rate=1e-3,
            bf16=bf16,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"),
    )
    if variant != "PEFT":
        adapter = nest(trainer.model)
        trainer.add_callback(adapter.callback())
        if variant != "nested, fused":
            for name, module in trainer.model.named_modules():
                if name.endswith(f"lora_A.{adapter.name}"):
                    # The fused operation does not run for a module with hooks.
                    module.register_forward_hook(lambda *_: None)
    return trainer


def measure(tokens: int, repeats: int, setting: str) -> dict[str, dict[str, Any]]:
    """Return the seconds, and the time and peak bytes relative to plain PEFT, of each variant."""
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    meters: dict[str, StepMeter] = {}
    for _ in range(repeats):
        for variant in VARIANTS:
            meters[variant] = run(variant, setting, tokens, STEPS)
            seconds[variant] += meters[variant].seconds
    plain = meters["PEFT"]
    return {
        variant: {
            "seconds": median(seconds[variant]),
            "time": median(a / b for a, b in zip(seconds[variant], seconds["PEFT"], strict=True)),
            "bytes": meter.peak / plain.peak,
            "peak_mib": meter.peak / 2**20,
            "checkpoints": meter.checkpoints,
            "loss": meter.loss,
        }
        for variant, meter in meters.items()
    }


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor(),
        "tokens": options.tokens,
        "repeats": options.repeats,
        "torch": torch.__version__,
    }
    for setting in options.settings:
        results[setting] = measure(options.tokens, options.repeats, setting)
        for variant, values in results[setting].items():
            print(
                f"{setting:8}  {variant:22}  {values['seconds']:6.2f} s  "
                f"time {values['time']:.3f}  "
                f"peak {values['bytes']:.3f} ({values['peak_mib']:.0f} MiB)  "
                f"loss {values['loss']:.4f}",
                flush=True,
            )
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
