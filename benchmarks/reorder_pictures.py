"""Measure what ``reorder --pipeline`` costs, next to drawing the same picture.

    OMP_NUM_THREADS=1 python benchmarks/reorder_pictures.py --out runs/reorder_pictures.json

A transformer of Flux with random weights in float32: width 512, 4 and 8 blocks, 1024 image tokens
and 64 text tokens, with a LoRA of rank 16 in its attention. It draws one picture in 4 steps, or
computes the second moments of these steps, each in a process of its own. CPU seconds, and the peak
memory above that of the loaded model; medians of the repetitions, which alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

NUM_STEPS = 4
NUM_REPEATS = 3


def peak_MiB() -> float:
    """Return the peak memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(way: str) -> dict[str, float]:
    """Return CPU seconds and peak memory of drawing, or of the second moments."""
    import torch
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from diffusers.loaders import FluxLoraLoaderMixin
    from peft import LoraConfig
    from torch import Tensor

    from matryoshka_lora.peft.pipeline import denoising_moments, draw

    side, width, num_words = 32, 512, 64

    class Pipeline(DiffusionPipeline, FluxLoraLoaderMixin):  # type: ignore[misc]
        """Draw with random embeddings in place of a text encoder."""

        def __init__(self, transformer: Any, scheduler: Any) -> None:
            self.register_modules(transformer=transformer, scheduler=scheduler)

        @torch.no_grad()
        def __call__(
            self,
            prompt: str,
            generator: torch.Generator,
            callback_on_step_end: Any,
            callback_on_step_end_tensor_inputs: list[str],
            output_type: str,
        ) -> Tensor:
            latents = torch.randn(1, side**2, 64, generator=generator)
            axis = torch.arange(float(side))
            ids = torch.cartesian_prod(torch.zeros(1), axis, axis)
            words = torch.randn(1, num_words, width, generator=generator)
            self.scheduler.set_timesteps(NUM_STEPS)
            for step, t in enumerate(self.scheduler.timesteps):
                prediction = self.transformer(
                    latents, words, words[:, 0], t[None] / 1000, ids, torch.zeros(num_words, 3)
                ).sample
                latents = self.scheduler.step(prediction, t, latents).prev_sample
                changed = callback_on_step_end(self, step, t, {"latents": latents})
                latents = changed.get("latents", latents)
            return latents

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        axes_dims_rope=(16, 24, 24),
    ).eval()
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.add_adapter(
        LoraConfig(r=16, init_lora_weights="gaussian", target_modules=targets), "default_0"
    )
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    pipeline = Pipeline(transformer, FlowMatchEulerDiscreteScheduler())
    loaded, start = peak_MiB(), time.process_time()
    if way == "draw":
        draw(pipeline, "", 0, lambda *_: {}, {}, output_type="latent")
    else:
        denoising_moments(pipeline, [""], {}, progress=False)
    return {"cpu_seconds": time.process_time() - start, "peak_MiB": peak_MiB() - loaded}


def main() -> None:
    """Measure, and write the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reorder_pictures.json"))
    parser.add_argument("--way", choices=("draw", "moments"), help="print one measurement")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way)))
        return
    measured: dict[str, list[dict[str, float]]] = {"draw": [], "moments": []}
    for _ in range(NUM_REPEATS):
        for way, values in measured.items():
            process = subprocess.run(
                [sys.executable, __file__, "--way", way],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                check=True,
            )
            values.append(json.loads(process.stdout.splitlines()[-1]))
    medians = {
        way: {key: round(median(value[key] for value in values), 2) for key in values[0]}
        for way, values in measured.items()
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(medians, indent=1) + "\n")
    print(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
