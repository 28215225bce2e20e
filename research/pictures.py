"""``python -m research.pictures``: order and ranks by what changes the pictures of a LoRA.

Two small diffusion models are trained on drawings of coloured shapes, in pixels: a U-Net of
diffusers, with guidance, and a transformer of Flux, with flow matching. LoRAs of rank 32 are
trained on another style each, on the denoising loss. Each is truncated, to one rank for all layers
or to a file of the same size with the ranks that `Lora.truncate` allocates. A line of
``runs/pictures.jsonl`` has the mean distance of `preview`: that of the final latents to those of
the whole LoRA, relative to the distance without the LoRA. Its prompts and noise are in no training
and in no moments.

The orders:

* ``svd``: `NestedAdapter.reorder` without examples.
* ``weighted``: with the steps of some pictures of the LoRA as examples, see `examples`. It needs
  prompts, and no training images.

The rule, written before the seeds of the decision (`SEEDS`) were run: ``matryoshka reorder`` gets
this order for pipelines if, at two or three of the three sizes, the median distance of the six
LoRAs, weighted and with ranks by layer, is at most two thirds of the lower of two medians: of the
SVD with one rank, and of the SVD with ranks by layer, which is what ``export --error`` does.
Otherwise the finding goes into docs/results.md, and nothing is built.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matryoshka_lora import nest
from research.reordering import truncations
from research.run import set_up, versions
from research.study import ROOT, RUNS

RANK = 32

SIZE = 16
"""Pixels of a side."""

SEEDS = (0, 1, 2)
"""The seeds of the decision: a colour, a texture and a shape."""

BATCH_SIZE = 16
BASE_STEPS = {"unet": 1500, "transformer": 2500}
LORA_STEPS = 120
LORA_RATE = 1e-3
NUM_SAMPLING_STEPS = 12

NUM_PICTURES = 12
"""The number of pictures that are measured, each with noise of its own."""

NUM_PROMPTS = 8
"""The number of prompts of the moments, all of them of the LoRA's training."""

COLOURS = torch.tensor(
    [[1, -1, -1], [-1, 1, -1], [-1, -0.5, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]]
).float()
NUM_SHAPES = 4
NEW_SHAPES = 3
PLACES = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1], [0, 0]]) * 0.4
PROMPTS = torch.cartesian_prod(
    torch.arange(len(COLOURS)), torch.arange(NUM_SHAPES), torch.arange(len(PLACES))
)
"""A prompt has three words: the indices of a colour, a shape and a place."""
NO_WORD = len(COLOURS) + NUM_SHAPES + len(PLACES)
"""The index of the word of an empty prompt."""


@dataclass
class Style:
    """How the pictures of a LoRA differ from those of the base model.

    Attributes:
        background: The colour of the background, shape (3,).
        tint: The colour that colours are mixed with, shape (3,); the base colours without one.
        stripes: The wave vector of stripes, shape (2,).
        new_shape: The shape that replaces the first one, or None.
    """

    background: Tensor
    tint: Tensor | None = None
    stripes: Tensor | None = None
    new_shape: int | None = None

    @property
    def prompts(self) -> Tensor:
        """The prompts of the style: all, or those of the new shape."""
        return PROMPTS if self.new_shape is None else PROMPTS[PROMPTS[:, 1] == 0]


BASE_STYLE = Style(torch.full((3,), -0.8))


def style_of(seed: int) -> tuple[str, Style]:
    """Return a colour, a texture or a shape: three seeds in a row have one each."""
    generator = torch.Generator().manual_seed(seed)
    background = torch.rand(3, generator=generator) * 2 - 1
    if seed % 3 == 0:
        return "colour", Style(background, tint=torch.rand(3, generator=generator) * 2 - 1)
    if seed % 3 == 1:
        angle, period = torch.rand(2, generator=generator).tolist()
        wave = torch.tensor([math.cos(math.pi * angle), math.sin(math.pi * angle)])
        return "texture", Style(BASE_STYLE.background, stripes=wave * (4 + 2 * period))
    return "shape", Style(BASE_STYLE.background, new_shape=seed // 3 % NEW_SHAPES)


def draw(prompts: Tensor, style: Style, generator: torch.Generator) -> Tensor:
    """Return a picture of each prompt, shape (n, 3, SIZE, SIZE), values from -1 to 1."""
    colours, shapes, places = prompts.unbind(dim=1)
    jitter = torch.rand(len(prompts), 3, generator=generator)
    centres = PLACES[places] + 0.3 * jitter[:, :2] - 0.15
    radii = 0.4 + 0.15 * jitter[:, 2, None, None]
    axis = (torch.arange(SIZE) + 0.5) * 2 / SIZE - 1
    v = (axis[None, :, None] - centres[:, 0, None, None]) / radii
    u = (axis[None, None, :] - centres[:, 1, None, None]) / radii
    radius = (u**2 + v**2).sqrt()
    distances = [  # negative inside
        torch.maximum(u.abs(), v.abs()) - 0.9,
        radius - 1,
        torch.maximum(v - 0.8, 1.8 * u.abs() - v - 1),
        (radius - 0.8).abs() - 0.25,
        torch.minimum(  # the new shapes: a cross, a bow and a star
            torch.maximum(u.abs() - 0.3, v.abs() - 1), torch.maximum(u.abs() - 1, v.abs() - 0.3)
        ),
        torch.maximum(v.abs() - u.abs(), u.abs() - 1),
        radius - 0.65 - 0.45 * torch.cos(5 * torch.atan2(u, v)),
    ]
    if style.new_shape is not None:
        distances[0] = distances[NUM_SHAPES + style.new_shape]
    distance = torch.stack(distances)[shapes, torch.arange(len(prompts))]
    masks = torch.sigmoid(-distance * radii * SIZE)[:, None]
    colour = COLOURS[colours]
    if style.tint is not None:
        colour = (colour + style.tint) / 2
    colour = colour[:, :, None, None]
    if style.stripes is not None:
        wave = torch.sin(2 * math.pi * (style.stripes[0] * v + style.stripes[1] * u) / 4)
        colour = colour * (0.3 + 0.7 * torch.sigmoid(6 * wave))[:, None]
    return masks * colour + (1 - masks) * style.background[:, None, None]


class Denoiser(nn.Module):
    """A diffusion model, with an embedding of the words of a prompt.

    ``x_t = a x_0 + s noise``. The U-Net predicts the noise, and the transformer ``noise - x_0``.

    Args:
        kind: ``"unet"`` or ``"transformer"``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.is_flow = kind == "transformer"
        self.guidance = 1.0 if self.is_flow else 3.0
        self.words = nn.Embedding(NO_WORD + 1, 64)
        self.network: Any
        if self.is_flow:
            self.network = FluxTransformer2DModel(
                patch_size=1,
                in_channels=12,
                num_layers=2,
                num_single_layers=4,
                attention_head_dim=32,
                num_attention_heads=4,
                joint_attention_dim=64,
                pooled_projection_dim=64,
                axes_dims_rope=(8, 12, 12),
            )
            side = torch.arange(SIZE // 2)
            ids = torch.cartesian_prod(torch.zeros(1), side.float(), side.float())
            self.register_buffer("image_ids", ids, persistent=False)
        else:
            self.network = UNet2DConditionModel(
                sample_size=SIZE,
                in_channels=3,
                out_channels=3,
                block_out_channels=(32, 64),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=64,
                attention_head_dim=2,  # the number of heads, for historical reasons
                norm_num_groups=16,
            )

    def forward(self, x: Tensor, time: Tensor, prompts: Tensor) -> Tensor:
        """Return the prediction, of the shape of x; time is from 0 to 1, shape (n,)."""
        offsets = torch.tensor([0, len(COLOURS), len(COLOURS) + NUM_SHAPES])
        words = self.words(torch.where(prompts < 0, NO_WORD, prompts + offsets))
        if not self.is_flow:
            prediction: Tensor = self.network(x, 1000 * time, words).sample
            return prediction
        tokens = nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        tokens = self.network(
            tokens, words, words.mean(dim=1), time, self.image_ids, torch.zeros(3, 3)
        ).sample
        return nn.functional.pixel_shuffle(
            tokens.transpose(1, 2).unflatten(2, (SIZE // 2, SIZE // 2)), 2
        )

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and s at times of shape (n,), for pictures."""
        time = time[:, None, None, None]
        if self.is_flow:
            return 1 - time, time
        return torch.cos(math.pi / 2 * time), torch.sin(math.pi / 2 * time)

    def loss(self, pictures: Tensor, prompts: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean squared error of the prediction at random times."""
        noise = torch.randn(pictures.shape, generator=generator)
        time = torch.rand(len(pictures), generator=generator)
        a, s = self.coefficients(time)
        target = noise - pictures if self.is_flow else noise
        prediction: Tensor = self(a * pictures + s * noise, time, prompts)
        return (prediction - target).square().mean()

    def step(self, x: Tensor, prediction: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
        """Return x at the next time: a step of Euler for a flow, otherwise of DDIM."""
        a, s = self.coefficients(time)
        next_a, next_s = self.coefficients(next_time)
        if self.is_flow:
            x_0, noise = x - s * prediction, x + a * prediction
        else:
            x_0, noise = (x - s * prediction) / a, prediction
        next_x: Tensor = next_a * x_0 + next_s * noise
        return next_x

    def states(self, noise: Tensor, prompts: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield x, its time and the next time of each step, and at the end the final x."""
        times = torch.linspace(1.0 if self.is_flow else 0.96, 0, NUM_SAMPLING_STEPS + 1)
        x = noise
        for begin, end in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            now, then = torch.full((len(x),), begin), torch.full((len(x),), end)
            yield x, now, then
            prediction = self(x, now, prompts)
            if self.guidance != 1:
                empty = self(x, now, torch.full_like(prompts, -1))
                prediction = empty + self.guidance * (prediction - empty)
            x = self.step(x, prediction, now, then)
        yield x, then, then

    @torch.no_grad()
    def sample(self, noise: Tensor, prompts: Tensor) -> Tensor:
        """Return the final latents."""
        *_, (x, _, _) = self.states(noise, prompts)
        return x


def train(
    denoiser: Denoiser, style: Style, prompts: Tensor, steps: int, rate: float, seed: int
) -> float:
    """Train the parameters that need a gradient; return the mean loss of the last fifth."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    losses: list[float] = []
    for _ in range(steps):
        batch = prompts[torch.randint(len(prompts), (BATCH_SIZE,), generator=generator)]
        pictures = draw(batch, style, generator)
        dropped = torch.rand(len(batch), 1, generator=generator) < 0.1
        loss = denoiser.loss(pictures, batch.masked_fill(dropped, -1), generator)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-steps // 5 :]) / len(losses[-steps // 5 :])


def base_model(kind: str, folder: Path) -> Denoiser:
    """Return a trained model, from the folder if it has been trained before."""
    torch.manual_seed(0)
    denoiser = Denoiser(kind)
    file = folder / f"{kind}.safetensors"
    if file.exists():
        denoiser.load_state_dict(load_file(file))
    else:
        start = time.perf_counter()
        loss = train(denoiser, BASE_STYLE, PROMPTS, BASE_STEPS[kind], 1e-3, seed=0)
        print(f"{kind}: loss {loss:.4f} after {time.perf_counter() - start:.0f} s", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(denoiser.state_dict(), file)
    return denoiser.requires_grad_(False).eval()


def examples(
    denoiser: Denoiser, prompts: Tensor, generator: torch.Generator
) -> list[tuple[Tensor, ...]]:
    """Return x, the time, the prompt and a direction of the prediction, for each step.

    A random direction of the next x is multiplied by the derivative of the next x with respect to
    the prediction. So its second moment weights the changes of a prediction as the sampler does.
    """
    noise = torch.randn(len(prompts), 3, SIZE, SIZE, generator=generator)
    found: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for x, now, then in list(denoiser.states(noise, prompts))[:-1]:
            zero, one = torch.zeros_like(x), torch.ones_like(x)
            derivative = denoiser.step(zero, one, now, then)  # linear in x and the prediction
            direction = torch.randn(x.shape, generator=generator) * derivative
            guidance = denoiser.guidance
            found += zip(x, now, prompts, guidance * direction, strict=True)
            if guidance != 1:
                empty = torch.full_like(prompts, -1)
                found += zip(x, now, empty, (1 - guidance) * direction, strict=True)
    return found


def run(kind: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train a LoRA, and return the distance of each order, rank and allocation."""
    denoiser = base_model(kind, folder)
    style_name, style = style_of(seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = style.prompts[torch.randperm(len(style.prompts), generator=generator)]
    held_out, prompts = prompts[: len(prompts) // 4], prompts[len(prompts) // 4 :]
    targets = [
        name
        for name, module in denoiser.network.named_modules()
        if "block" in name and isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    torch.manual_seed(seed)
    denoiser.network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    start = time.perf_counter()
    loss = train(denoiser, style, prompts, LORA_STEPS, LORA_RATE, seed)
    train_seconds = time.perf_counter() - start
    adapter = nest(denoiser.network)
    denoiser.eval()

    held_out = held_out.repeat(NUM_PICTURES, 1)[:NUM_PICTURES]
    noise = torch.randn(NUM_PICTURES, 3, SIZE, SIZE, generator=generator)
    whole = denoiser.sample(noise, held_out)
    denoiser.network.disable_adapters()
    base = denoiser.sample(noise, held_out)
    denoiser.network.enable_adapters()
    change = (base - whole).flatten(1).norm(dim=1)

    def weight(_: nn.Module, batch: Any) -> Tensor:
        x, times, words, direction = batch
        loss: Tensor = (denoiser(x, times, words) * direction).flatten(1).sum(dim=1).mean()
        return loss

    cells: list[dict[str, Any]] = []
    for order in ("svd", "weighted"):
        start = time.perf_counter()
        if order == "svd":
            adapter.reorder()
        else:
            data = examples(denoiser, prompts[:NUM_PROMPTS], generator)
            adapter.reorder(data, loss=weight, max_examples=len(data), seed=seed)
        seconds = time.perf_counter() - start
        for allocation, rank in truncations(adapter):
            difference = denoiser.sample(noise, held_out) - whole
            distances = difference.flatten(1).norm(dim=1) / change
            cells.append(
                {
                    "style": style_name,
                    "order": order,
                    "allocation": allocation,
                    "rank": rank,
                    "distance": round(float(distances.mean()), 5),
                    "change": round(float(change.mean()), 3),
                    "loss": round(loss, 4),
                    "train_seconds": round(train_seconds, 1),
                    "seconds": round(seconds, 1),
                }
            )
    return cells


def main() -> None:
    """Run the LoRAs that are missing in the file, and append the cells of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="unet,transformer")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--folder", type=Path, default=ROOT / "build/pictures", help="base models")
    parser.add_argument("--output", type=Path, default=RUNS / "pictures.jsonl")
    options = parser.parse_args()
    set_up(1)
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done = {(cell["model"], cell["seed"]) for cell in map(json.loads, lines)}
    package_versions = {**versions(), "diffusers": version("diffusers")}
    for model in options.models.split(","):
        for seed in map(int, options.seeds.split(",")):
            if (model, seed) in done:
                continue
            cells = run(model, seed, options.folder)
            with options.output.open("a", encoding="utf-8") as file:
                for cell in cells:
                    line = {"model": model, "seed": seed, **cell, "versions": package_versions}
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
