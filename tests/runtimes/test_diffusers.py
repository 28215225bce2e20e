"""diffusers reads the single files that are written, and computes the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers.integrations.peft
from helpers.models import randomize
from helpers.plain_peft import best, distance
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from matryoshka_lora import combine, export, extract, reorder

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from helpers.diffusers_models import small_flux, small_unet  # noqa: E402

# transformers 5.24 requires for its text encoders a version of PEFT that is not released yet.
transformers.integrations.peft.MIN_PEFT_VERSION = "0.18.0"

pytestmark = pytest.mark.slow

UNET_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.2"]
TEXT_MODULES = ["q_proj", "v_proj", "out_proj", "fc1"]
FLUX_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_out", "x_embedder"]
MIXED_RANKS = {"to_q": 3, "conv1": 2, "fc1": 5}


class StableDiffusion(diffusers.loaders.StableDiffusionLoraLoaderMixin):  # type: ignore[name-defined]
    """The models of Stable Diffusion, small, with the loader of the real pipeline."""

    components: dict[str, Any] = {}
    hf_device_map = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet = small_unet().eval()
        text_config = CLIPTextConfig(
            vocab_size=50,
            hidden_size=12,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.3,
        )
        self.text_encoder = CLIPTextModel(text_config).eval()

    def outputs(self) -> Tensor:
        """Return what the models compute of fixed inputs."""
        generator = torch.Generator().manual_seed(3)
        image = torch.randn(1, 4, 8, 8, generator=generator)
        with torch.no_grad():
            hidden_states = self.text_encoder(torch.arange(8)[None]).last_hidden_state
            sample = self.unet(image, 3, encoder_hidden_states=hidden_states).sample
        return torch.cat([hidden_states.flatten(), sample.flatten()])


class Flux(diffusers.loaders.FluxLoraLoaderMixin):  # type: ignore[name-defined]
    """The transformer of Flux, small, with the loader of the real pipeline."""

    components: dict[str, Any] = {}
    hf_device_map = None

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.transformer = small_flux().eval()
        self.text_encoder = None

    def outputs(self) -> Tensor:
        """Return what the transformer computes of fixed inputs."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            sample: Tensor = self.transformer(
                hidden_states=torch.randn(1, 16, 4, generator=generator),
                encoder_hidden_states=torch.randn(1, 5, 12, generator=generator),
                pooled_projections=torch.randn(1, 12, generator=generator),
                timestep=torch.tensor([0.5]),
                img_ids=torch.zeros(16, 3),
                txt_ids=torch.zeros(5, 3),
            ).sample
        return sample.flatten()


def add_lora(model: Any, modules: Sequence[str], **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Add a random LoRA to a model, and return its config and state dict."""
    config = LoraConfig(r=6, target_modules=list(modules), **{"lora_alpha": 6, **options})
    model.add_adapter(config)
    randomize(model, 4)
    return config.to_dict(), get_peft_model_state_dict(model, adapter_name="default")


def save_stable_diffusion(
    file: Path, text_modules: Sequence[str] = TEXT_MODULES, **options: Any
) -> None:
    pipeline = StableDiffusion()
    unet_config, unet_tensors = add_lora(pipeline.unet, UNET_MODULES, **options)
    text_config, text_tensors = add_lora(pipeline.text_encoder, text_modules, **options)
    pipeline.save_lora_weights(
        file.parent,
        unet_tensors,
        text_tensors,
        weight_name=file.name,
        unet_lora_adapter_metadata=unet_config,
        text_encoder_lora_adapter_metadata=text_config,
    )


def save_scaled_stable_diffusion(file: Path) -> None:
    save_stable_diffusion(file, lora_alpha=3, rank_pattern=MIXED_RANKS)


def save_flux(file: Path, **options: Any) -> None:
    pipeline = Flux()
    options = {"lora_alpha": 12, **options}
    config, tensors = add_lora(pipeline.transformer, FLUX_MODULES, **options)
    pipeline.save_lora_weights(
        file.parent,
        tensors,
        weight_name=file.name,
        transformer_lora_adapter_metadata=config,
    )


def save_biases(file: Path, **options: Any) -> None:
    """Write a control LoRA: its factors B have biases."""
    save_flux(file, lora_bias=True, **{"rank_pattern": {"to_q": 3}, **options})


def save_biases_without_metadata(file: Path) -> None:
    """Write a control LoRA whose scale is 1, as the file does not contain it."""
    save_biases(file, lora_alpha=6, rank_pattern={})
    save_file(load_file(file), file)


def save_old_names(file: Path) -> None:
    """Write CLIP's names as they were before transformers 5."""
    save_stable_diffusion(file, rank_pattern=MIXED_RANKS)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    renamed: dict[str, Tensor] = {}
    for key, tensor in load_file(file).items():
        renamed[key.replace("text_encoder.", "text_encoder.text_model.")] = tensor
    save_file(renamed, file, metadata)


def save_kohya(file: Path) -> None:
    """Write kohya's keys, which `test_diffusers_reads_kohya_keys` compares with the source."""
    source = file.with_name("diffusers.safetensors")
    save_stable_diffusion(source, rank_pattern=MIXED_RANKS)
    export(source, file, key_format="kohya")


@dataclass(frozen=True)
class Kind:
    """A kind of single file.

    Attributes:
        pipeline: Creates the pipeline that it is for.
        save: Writes such a file.
    """

    pipeline: Callable[[], Any]
    save: Callable[[Path], None]


KINDS = {
    "mixed ranks": Kind(StableDiffusion, save_scaled_stable_diffusion),
    "old names": Kind(StableDiffusion, save_old_names),
    "flux": Kind(Flux, save_flux),
    "biases": Kind(Flux, save_biases),
    "biases, no metadata": Kind(Flux, save_biases_without_metadata),
    "kohya": Kind(StableDiffusion, save_kohya),
}


def load_pipeline(create: Callable[[], Any], file: Path) -> Any:
    """Return a pipeline with a LoRA that diffusers has loaded."""
    pipeline = create()
    pipeline.load_lora_weights(str(file))
    return pipeline


def lora_layers(pipeline: Any) -> dict[str, Any]:
    """Return PEFT's LoRA layers by the name of the part and of the module."""
    layers: dict[str, Any] = {}
    for part in ("unet", "transformer", "text_encoder"):
        model = getattr(pipeline, part, None)
        if model is not None:
            for name, module in model.named_modules():
                if len(getattr(module, "lora_A", ())):
                    layers[f"{part}.{name}"] = module
    return layers


def dense_update(layer: Any) -> np.ndarray:
    """Return what a LoRA layer adds to its weight; kernels are flattened."""
    (adapter,) = layer.lora_A
    A = layer.lora_A[adapter].weight.double().flatten(1)
    B = layer.lora_B[adapter].weight.double().flatten(1)
    update: np.ndarray = (B @ A * layer.scaling[adapter]).detach().numpy()
    return update


def scaled_bias(layer: Any) -> Tensor | None:
    """Return what a LoRA layer adds to its bias, if anything."""
    (adapter,) = layer.lora_A
    bias = layer.lora_B[adapter].bias
    return None if bias is None else bias.detach() * layer.scaling[adapter]


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_computes_the_best_approximation_of_each_rank(kind: str, tmp_path: Path) -> None:
    create = KINDS[kind].pipeline
    source = tmp_path / "lora.safetensors"
    KINDS[kind].save(source)
    loaded = load_pipeline(create, source)
    outputs = loaded.outputs()
    assert distance(create().outputs(), outputs) > 0.1
    reorder(source, tmp_path / "reordered.safetensors")
    reordered = load_pipeline(create, tmp_path / "reordered.safetensors")
    assert distance(reordered.outputs(), outputs) < 1e-5

    updates = {name: dense_update(layer) for name, layer in lora_layers(loaded).items()}
    biases = {name: scaled_bias(layer) for name, layer in lora_layers(loaded).items()}
    assert ("biases" in kind) == any(bias is not None and bias.any() for bias in biases.values())
    selections: list[dict[str, Any]] = [{"rank": 1}, {"rank": 4}, {"keep": "70%"}]
    for number, selection in enumerate(selections):
        output = tmp_path / f"{number}.safetensors"
        export(source, output, **selection)
        truncated = load_pipeline(create, output)
        layers = lora_layers(truncated)
        assert layers.keys() == updates.keys()
        expected = create()
        ranks: set[int] = set()
        for name, layer in layers.items():
            (rank,) = layer.r.values()
            ranks.add(rank)
            part, _, module = name.partition(".")
            base_layer = getattr(expected, part).get_submodule(module)
            update = torch.from_numpy(best(updates[name], rank)).float()
            base_layer.weight.data += update.reshape(base_layer.weight.shape)
            if biases[name] is not None:
                base_layer.bias.data += biases[name]
        assert distance(truncated.outputs(), expected.outputs()) < 1e-5
        if "keep" in selection:
            assert len(ranks) > 1


def test_diffusers_reads_kohya_keys(tmp_path: Path) -> None:
    source = tmp_path / "lora.safetensors"
    output = tmp_path / "kohya.safetensors"
    save_stable_diffusion(source, rank_pattern={"to_q": 3})
    export(source, output, key_format="kohya")
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_") for key in load_file(output))
    expected = load_pipeline(StableDiffusion, source).outputs()
    assert distance(load_pipeline(StableDiffusion, output).outputs(), expected) < 1e-5


def test_diffusers_reads_what_was_kohya_keys(tmp_path: Path) -> None:
    source = tmp_path / "lora.safetensors"
    output = tmp_path / "output.safetensors"
    save_kohya(source)
    export(source, output, key_format="diffusers")
    assert all(key.startswith(("unet.", "text_encoder.")) for key in load_file(output))
    expected = load_pipeline(StableDiffusion, source).outputs()
    assert distance(load_pipeline(StableDiffusion, output).outputs(), expected) < 1e-5


def test_peft_reads_a_folder_made_from_a_file_of_diffusers(tmp_path: Path) -> None:
    source = tmp_path / "lora.safetensors"
    save_flux(source, rank_pattern={"to_q": 3})
    export(source, tmp_path / "folder", key_format="peft")
    pipeline = Flux()
    PeftModel.from_pretrained(pipeline.transformer, str(tmp_path / "folder"))
    expected = load_pipeline(Flux, source).outputs()
    assert distance(pipeline.outputs(), expected) < 1e-5


def test_diffusers_computes_a_sum_of_two_files(tmp_path: Path) -> None:
    first = tmp_path / "first.safetensors"
    second = tmp_path / "second.safetensors"
    save_stable_diffusion(first, rank_pattern=MIXED_RANKS)
    save_stable_diffusion(second, text_modules=[*TEXT_MODULES, "k_proj"], lora_alpha=3)
    output = tmp_path / "sum.safetensors"
    combine([first, second], output, weights=[1, -0.5], rank=12)
    expected = StableDiffusion()
    for file, weight in ((first, 1.0), (second, -0.5)):
        expected.load_lora_weights(str(file))
        expected.fuse_lora(["unet", "text_encoder"], lora_scale=weight)
        expected.unload_lora_weights()
    assert distance(load_pipeline(StableDiffusion, output).outputs(), expected.outputs()) < 1e-5


@pytest.mark.parametrize("key_format", ["diffusers", "kohya"])
def test_diffusers_computes_a_tuned_model_with_the_extracted_lora(
    tmp_path: Path, key_format: Literal["diffusers", "kohya"]
) -> None:
    tuned = StableDiffusion()
    tuned.unet.save_pretrained(tmp_path / "base")
    for name, weight in tuned.unet.named_parameters():
        if weight.ndim > 1 and ("attn" in name or "conv1" in name):
            weight.data += 0.1 * torch.randn_like(weight)
    tuned.unet.save_pretrained(tmp_path / "tuned")
    output = tmp_path / "lora.safetensors"
    extract(tmp_path / "base", tmp_path / "tuned", output, rank=99, key_format=key_format)
    assert distance(StableDiffusion().outputs(), tuned.outputs()) > 0.01
    assert distance(load_pipeline(StableDiffusion, output).outputs(), tuned.outputs()) < 1e-4
