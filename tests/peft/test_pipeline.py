"""Second moments of the steps of a pipeline, against finite differences of its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.peft
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from helpers.pipelines import flux, save_lora, stable_diffusion  # noqa: E402

from matryoshka_lora.peft.pipeline import denoising_moments  # noqa: E402

# transformers 5.24 requires for its text encoders a version of PEFT that is not released yet.
transformers.integrations.peft.MIN_PEFT_VERSION = "0.18.0"

pytestmark = pytest.mark.slow

NUM_STEPS = 2
SEED = 5
ARGUMENTS: dict[str, Any] = {
    "num_inference_steps": NUM_STEPS,
    "height": 16,
    "width": 16,
    "negative_prompt": "dark",
}
# Guidance is one forward of two rows, or two forwards.
CASES = {
    "stable diffusion": (
        stable_diffusion,
        diffusers.UniPCMultistepScheduler,
        {"guidance_scale": 4.0},
    ),
    "flux": (
        flux,
        diffusers.FlowMatchEulerDiscreteScheduler,
        {"true_cfg_scale": 3.0, "max_sequence_length": 8},
    ),
}
LAYERS = {
    "unet": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "transformer": "transformer_blocks.0.attn.to_q",
}


@pytest.mark.parametrize("case", CASES)
def test_moments_are_those_of_the_derivative_of_each_step(case: str, tmp_path: Path) -> None:
    new_pipeline, scheduler, options = CASES[case]
    torch.manual_seed(0)
    save_lora(new_pipeline(tmp_path), tmp_path / "lora.safetensors")
    torch.manual_seed(0)
    pipeline = new_pipeline(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("text_encoder", "text_encoder_2"):  # new ones have dropout
        getattr(pipeline, name, torch.nn.Identity()).eval()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    arguments = {**ARGUMENTS, **options}
    part = "transformer" if case == "flux" else "unet"
    denoiser = getattr(pipeline, part)
    moments = denoising_moments(pipeline, ["a dog"], arguments, SEED, progress=False)
    assert not denoiser.is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert all(name.startswith(f"{part}.") for name in moments)

    layer: Any = denoiser.get_submodule(LAYERS[part])
    A = layer.lora_A["default_0"]

    def latents_of(perturbation: tuple[int, int] | None, size: float) -> tuple[Any, list[Tensor]]:
        """Draw without gradients; add a number to an element of the output of A in a forward."""
        hidden: list[Tensor] = []
        latents: list[Tensor] = []

        def perturb(_: Any, _args: Any, output: Tensor) -> Tensor:
            forward, element = perturbation or (None, None)
            if len(hidden) == forward:
                output = output.clone()
                output.view(-1)[element] += size
            hidden.append(output)
            return output

        def keep(_: Any, _step: int, _time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            latents.append(tensors["latents"])
            return {}

        hook = A.register_forward_hook(perturb)
        pipeline(
            prompt="a dog",
            generator=torch.Generator().manual_seed(SEED),
            callback_on_step_end=keep,
            output_type="latent",
            **arguments,
        )
        hook.remove()
        return hidden, latents

    hidden, latents = latents_of(None, 0.0)
    generator = torch.Generator().manual_seed(SEED)
    directions = [torch.randn(x.shape, generator=generator) for x in latents]
    rank = A.out_features
    inputs, outputs = torch.zeros(rank, rank).double(), torch.zeros(rank, rank).double()
    num_positions = 0
    for forward, h in enumerate(hidden):
        step = forward * NUM_STEPS // len(hidden)
        b = torch.zeros(h.numel()).double()
        size = 1e-2 * float(h.std())
        for element in range(h.numel()):
            _, changed = latents_of((forward, element), size)
            difference = (changed[step] - latents[step]).double() / size
            b[element] = (difference * directions[step]).sum()
        b, h = b.view(-1, rank), h.reshape(-1, rank).double()
        inputs += h.T @ h
        outputs += b.T @ b / NUM_STEPS
        num_positions += len(h)
    actual = moments[f"{part}.{LAYERS[part]}"]
    torch.testing.assert_close(torch.tensor(actual.inputs), inputs / num_positions)
    assert torch.dist(torch.tensor(actual.outputs), outputs) < 0.02 * outputs.norm()
