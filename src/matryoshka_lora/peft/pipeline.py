"""Pipelines of diffusers: load one, load a LoRA into it, draw, and see what changes a picture."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from matryoshka_lora.errors import MatryoshkaError, check_choice, wrap_errors
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.peft.base_model import DTYPES, default_dtype
from matryoshka_lora.peft.lora_layers import factor_parameters
from matryoshka_lora.progress import training_bar
from matryoshka_lora.training.factors import ModelFactors
from matryoshka_lora.training.moments import MomentRecorder, Moments

StepCallback = Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]]
"""Gets a pipeline, the step, its time and the latents after it; returns the latents to go on with,
or nothing."""


def open_pipeline(model: Any, dtype: Any, offload: bool) -> tuple[Any, str]:
    """Return a pipeline that has no LoRA, and its name.

    Args:
        model: A folder, a Hub id, or a pipeline in memory.
        dtype: The name of the dtype of a pipeline on disk. Chosen by the hardware by default.
        offload: Whether the parts of a pipeline on disk are on the accelerator only while they
            compute.

    Raises:
        MatryoshkaError: The dtype is unknown; or the pipeline cannot be loaded, takes no LoRA, or
            has one.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    pipeline, name = model, type(model).__name__
    if isinstance(model, (str, os.PathLike)):
        pipeline, name = _load_pipeline(str(model), dtype, offload), str(model)
    if not hasattr(pipeline, "load_lora_weights"):
        raise MatryoshkaError(f"{name} takes no LoRAs. Pass another pipeline.")
    if _count_lora_layers(pipeline):  # it would be unloaded
        raise MatryoshkaError(
            "The pipeline already has a LoRA. Call its unload_lora_weights(), or to keep the LoRA "
            "in all pictures, fuse_lora() before that."
        )
    return pipeline, name


def _load_pipeline(model: str, dtype: str | None, offload: bool) -> Any:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch_dtype = torch.float32 if device.type == "cpu" else default_dtype()
    if dtype is not None:
        torch_dtype = DTYPES[dtype]
    with wrap_errors(
        f"Cannot load the pipeline {model!r}",
        "Pass a folder that diffusers has saved, or a Hub id",
        # diffusers has no common error type.
        (OSError, ValueError, TypeError, ImportError, KeyError, SafetensorError),
    ):
        pipeline = DiffusionPipeline.from_pretrained(
            model, torch_dtype=torch_dtype, use_safetensors=True, trust_remote_code=False
        )
    pipeline.set_progress_bar_config(disable=True)
    with wrap_errors(
        f"Cannot use the pipeline on {device}",
        "`offload=True` needs less memory, and an accelerator",
        RuntimeError,
    ):
        if offload:
            pipeline.enable_model_cpu_offload()
        else:
            pipeline.to(device)
    return pipeline


def with_diffusers_keys(lora: Lora) -> Lora:
    """Return a LoRA with the keys of diffusers, or as it is if it cannot be converted.

    diffusers may read such keys, too.
    """
    with suppress(MatryoshkaError):
        return lora.convert("diffusers")
    return lora


@contextmanager
def with_lora(pipeline: Any, lora: Lora | None) -> Iterator[str]:
    """Load a LoRA into a pipeline, and unload it at the end.

    Yields:
        A note if the pipeline ignores some of its layers, or "".
    """
    if lora is None:
        yield ""
        return
    pipeline_name = type(pipeline).__name__
    converted = with_diffusers_keys(lora)
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            wrap_errors(
                f"{pipeline_name} cannot load {lora.name}",
                "Pass the model that the LoRA is for",
                (ValueError, TypeError, KeyError, AttributeError, RuntimeError),
            ),
        ):
            file = Path(folder, "lora.safetensors")
            converted.save(file)
            pipeline.load_lora_weights(str(file))
        num_layers, num_loaded = len(converted.layers), _count_lora_layers(pipeline)
        if not num_loaded:
            raise MatryoshkaError(
                f"{pipeline_name} has none of the layers of {lora.name}. Pass the model that the "
                "LoRA is for."
            )
        note = f"{pipeline_name} ignores {num_layers - num_loaded} of {num_layers} layers."
        yield note if num_loaded < num_layers else ""
    finally:
        pipeline.unload_lora_weights()


def _count_lora_layers(pipeline: Any) -> int:
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return sum(isinstance(module, LoraLayer) for part in parts for module in part.modules())


def draw(
    pipeline: Any,
    prompt: str,
    seed: int,
    on_step: StepCallback,
    arguments: Mapping[str, Any],
    *,
    output_type: str = "pil",
    with_gradients: bool = False,
) -> Any:
    """Return the output of a pipeline. The noise is made on the CPU.

    Args:
        output_type: ``"pil"`` or ``"latent"``.
        with_gradients: Whether the denoiser records gradients.

    Raises:
        MatryoshkaError: The pipeline rejects an argument, or lacks memory.
    """
    call = type(pipeline).__call__  # diffusers decorates it with torch.no_grad
    if with_gradients:
        call = inspect.unwrap(call)
    with wrap_errors(
        f"{type(pipeline).__name__} cannot draw",
        "Check `pipeline_args`; smaller pictures or `offload=True` need less memory",
        (TypeError, ValueError, ArithmeticError, RuntimeError),  # also of the memory
    ):
        return call(
            pipeline,
            prompt=prompt,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=on_step,
            callback_on_step_end_tensor_inputs=["latents"],
            output_type=output_type,
            **arguments,
        )


def denoising_moments(
    pipeline: Any,
    prompts: Sequence[str],
    arguments: Mapping[str, Any],
    seed: int = 0,
    *,
    progress: bool = True,
) -> dict[str, Moments]:
    """Return the second moments of the denoiser's LoRA layers, while a pipeline draws pictures.

    After each step, a random direction of the new latents is backpropagated to the predictions of
    the step, through its guidance and its scheduler. Its second moment is the identity matrix, so
    the moments are about the mean squared change of the latents in a step.

    Layers of text encoders are left out, and so are layers that get no gradient.

    Args:
        prompts: A picture is drawn for each prompt.
        seed: The seed of the first noise, and of the directions. The next noise has the next seed.

    Returns:
        The moments by the name of a layer, which begins with the part: ``transformer.NAME``.

    Raises:
        MatryoshkaError: The pipeline cannot draw.
        NotFiniteError: A moment is NaN or infinite.
    """
    components = pipeline.components.items()
    parts = nn.ModuleDict({name: part for name, part in components if isinstance(part, nn.Module)})
    denoisers = nn.ModuleDict(
        {name: part for name, part in parts.items() if name.startswith(("unet", "transformer"))}
    )
    layers: dict[str, Any] = {
        name: module for name, module in denoisers.named_modules() if isinstance(module, LoraLayer)
    }
    recorder = MomentRecorder(
        ModelFactors(
            parts,  # all of them, because only the factors may need gradients
            {name: factor_parameters(layer, next(iter(layer.r))) for name, layer in layers.items()},
        )
    )
    generator = torch.Generator().manual_seed(seed)
    num_steps = 0

    def detach_inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return recursively_apply(Tensor.detach, (args, kwargs))

    def backpropagate(
        _pipeline: Any, _step: int, _time: Any, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        nonlocal num_steps
        latents = tensors["latents"]
        if latents.requires_grad:
            direction = torch.randn(latents.shape, generator=generator)
            latents.backward(direction.to(latents))  # type: ignore[no-untyped-call]
            num_steps += 1
        # Schedulers of several steps keep earlier predictions.
        state = vars(pipeline.scheduler)
        tensors_of_steps = {
            name: value for name, value in state.items() if isinstance(value, (Tensor, list))
        }
        state.update(recursively_apply(Tensor.detach, tensors_of_steps))
        return {"latents": latents.detach()}

    with ExitStack() as stack:
        for part in denoisers.values():
            stack.enter_context(_checkpointed(part))
            hook = part.register_forward_pre_hook(detach_inputs, with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(recorder.recording())
        parts.eval()  # diffusers needs no train mode for checkpoints
        pictures = training_bar(prompts, "second moments", is_shown=progress, leave=False)
        for index, prompt in enumerate(pictures):
            draw(
                pipeline,
                prompt,
                seed + index,
                backpropagate,
                arguments,
                output_type="latent",
                with_gradients=True,
            )
    return recorder.moments(num_steps)


@contextmanager
def _checkpointed(part: Any) -> Iterator[None]:
    """Compute the activations of a model of diffusers again in its backward, to save memory."""
    if part.is_gradient_checkpointing:
        yield
        return
    with suppress(ValueError):  # some models do not support it
        part.enable_gradient_checkpointing()
    try:
        yield
    finally:
        part.disable_gradient_checkpointing()
