"""A LoRA on an image model of diffusers, in the manner of its DreamBooth scripts, at every rank.

python examples/train_diffusion.py --model MODEL --images FOLDER --prompt "a photo of sks dog"

MODEL is a pipeline of Stable Diffusion 1 or 2, or of Flux. It needs diffusers. Each rank is one
file, which diffusers and ComfyUI load.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FluxPipeline
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from matryoshka_lora import nest

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class NoisyImages(Dataset[dict[str, Tensor]]):
    """Images with noise. Example i has the same image, noise and time each time.

    Args:
        pipeline: Its VAE and text encoders encode the images and the prompt, once.
        files: The images.
        prompt: The prompt of all images.
        resolution: The width and height that the images get.
        numbers: The numbers of the examples, which choose image, noise and time.
    """

    def __init__(
        self, pipeline: Any, files: Sequence[Path], prompt: str, resolution: int, numbers: range
    ) -> None:
        self.numbers = numbers
        self.is_flux = isinstance(pipeline, FluxPipeline)
        if not self.is_flux:
            self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        vae, device = pipeline.vae, pipeline.device
        with torch.no_grad():
            latents = []
            for file in files:
                picture = Image.open(file).convert("RGB").resize((resolution, resolution))
                pixels = torch.from_numpy(np.asarray(picture).copy()).to(device, vae.dtype)
                encoded = vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mode()
                shift = vae.config.shift_factor or 0.0
                latents.append(((encoded - shift) * vae.config.scaling_factor)[0].float().cpu())
            self.latents = latents
            if self.is_flux:
                text, pooled, ids = pipeline.encode_prompt(prompt, None)
                _, height, width = latents[0].shape
                image_ids = pipeline._prepare_latent_image_ids(
                    1, height // 2, width // 2, device, torch.float32
                )
                self.inputs = {
                    "encoder_hidden_states": text[0].float().cpu(),
                    "pooled_projections": pooled[0].float().cpu(),
                    "txt_ids": ids.float().cpu(),
                    "img_ids": image_ids.cpu(),
                }
            else:
                text, _ = pipeline.encode_prompt(prompt, device, 1, False)
                self.inputs = {"encoder_hidden_states": text[0].float().cpu()}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.numbers[index])
        latent = self.latents[int(torch.randint(len(self.latents), (), generator=generator))]
        noise = torch.randn(latent.shape, generator=generator)
        if self.is_flux:  # flow matching: the model predicts the way from the image to the noise
            time = torch.randn((), generator=generator).sigmoid()
            noisy = pack(latent.lerp(noise, time))
            return {**self.inputs, "noisy": noisy, "time": time, "target": pack(noise - latent)}
        time = torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator)
        noisy = self.scheduler.add_noise(latent[None], noise[None], time[None])[0]
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latent[None], noise[None], time[None])[0]
        return {**self.inputs, "noisy": noisy, "time": time, "target": target}


def pack(latent: Tensor) -> Tensor:
    """Return the patches of 2 x 2 of a latent, as Flux gets them."""
    channels, height, width = latent.shape
    patches = latent.view(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4)
    return patches.reshape(height * width // 4, 4 * channels)


def denoising_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean squared error of the prediction."""
    text = batch["encoder_hidden_states"].to(model.dtype)
    noisy = batch["noisy"].to(model.dtype)
    if "txt_ids" in batch:
        guidance = torch.ones_like(batch["time"]) if model.config.guidance_embeds else None
        prediction = model(
            hidden_states=noisy,
            timestep=batch["time"].to(model.dtype),
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=batch["pooled_projections"].to(model.dtype),
            txt_ids=batch["txt_ids"][0],  # the same in each row
            img_ids=batch["img_ids"][0],
        ).sample
    else:
        prediction = model(noisy, batch["time"], text).sample
    return mse_loss(prediction.float(), batch["target"])


def train(model: nn.Module, examples: NoisyImages, batch_size: int, learning_rate: float) -> None:
    """Train the LoRA on each example once: nothing here is about ranks."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    model.train()
    device = next(model.parameters()).device
    for batch in (progress := tqdm(DataLoader(examples, batch_size), "training")):
        loss = denoising_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    """Train a LoRA, make every rank of it usable, and export each nested rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a pipeline: a folder or a Hub id")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/diffusion"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--resolution", type=int, default=512)
    options = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    pipeline = DiffusionPipeline.from_pretrained(
        options.model, torch_dtype=torch.bfloat16 if has_gpu else torch.float32
    ).to("cuda" if has_gpu else "cpu")
    model = pipeline.transformer if isinstance(pipeline, FluxPipeline) else pipeline.unet
    for part in (model, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.float()

    files = sorted(file for file in options.images.iterdir() if file.suffix in (".jpg", ".png"))
    count = options.steps * options.batch_size
    examples, held_out = (
        NoisyImages(pipeline, files, options.prompt, options.resolution, numbers)
        for numbers in (range(count), range(count, count + 64))
    )
    train(model, examples, options.batch_size, options.learning_rate)

    adapter = nest(model)
    # The held-out examples are the same images with other noise: there are only a few images.
    result = adapter.train_ranks(
        DataLoader(examples, options.batch_size),
        loss=denoising_loss,
        eval_data=DataLoader(held_out, options.batch_size),
        max_examples=count // 2,
    )
    print(result)
    print(f"{adapter.save(options.output / 'adapter')} has every rank, for matryoshka export.")
    for rank in adapter.nesting.ranks:
        adapter.export(options.output / f"rank-{rank}.safetensors", rank, force=True)
    print(f"{options.output}/rank-*.safetensors are for diffusers and ComfyUI.")


if __name__ == "__main__":
    main()
