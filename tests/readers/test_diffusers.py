"""diffusers itself reads the single files that are written, and computes the same pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.peft
from conftest import randomize
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strangers import best, distance
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from matryoshka_lora import combine, export, extract, reorder

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

# transformers 5.24 asks its own text encoders for a PEFT that is not out yet.
transformers.integrations.peft.MIN_PEFT_VERSION = "0.18.0"

pytestmark = pytest.mark.slow

UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.2"]
TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]
FLUX = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_out", "x_embedder"]
MIXED = {"rank_pattern": {"to_q": 3, "conv1": 2, "fc1": 5}}


class Pipeline(diffusers.loaders.StableDiffusionLoraLoaderMixin):  # type: ignore[name-defined]
    """What diffusers' loader needs of Stable Diffusion: its models."""

    components: dict[str, Any] = {}
    hf_device_map = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()
        sizes = {"vocab_size": 50, "hidden_size": 12, "intermediate_size": 24}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 3, "bos_token_id": 0}
        config = CLIPTextConfig(**sizes, **heads, initializer_range=0.3, eos_token_id=1)
        self.text_encoder = CLIPTextModel(config).eval()

    def outputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            words = self.text_encoder(torch.arange(8)[None]).last_hidden_state
            image = torch.randn(1, 4, 8, 8, generator=generator)
            made = self.unet(image, 3, encoder_hidden_states=words).sample
        return torch.cat([words.flatten(), made.flatten()])


class FluxPipeline(diffusers.loaders.FluxLoraLoaderMixin):  # type: ignore[name-defined]
    """What diffusers' loader needs of Flux."""

    components: dict[str, Any] = {}
    hf_device_map = None

    def __init__(self) -> None:
        torch.manual_seed(2)
        sizes = {"joint_attention_dim": 12, "pooled_projection_dim": 12, "num_single_layers": 2}
        heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
        flux = diffusers.FluxTransformer2DModel
        self.transformer = flux(in_channels=4, num_layers=1, **sizes, **heads).eval()
        self.text_encoder = None

    def outputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        shapes: dict[str, tuple[int, ...]]
        shapes = {"hidden_states": (1, 16, 4), "encoder_hidden_states": (1, 5, 12)}
        shapes["pooled_projections"] = (1, 12)
        given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        given |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
        with torch.no_grad():
            made: Tensor = self.transformer(timestep=torch.tensor([0.5]), **given).sample
        return made.flatten()


def with_lora(
    model: Any, targets: list[str], **config: Any
) -> tuple[LoraConfig, dict[str, Tensor]]:
    lora = LoraConfig(**{"r": 6, "lora_alpha": 6, "target_modules": targets, **config})
    model.add_adapter(lora)
    randomize(model, 4)
    return lora, get_peft_model_state_dict(model, adapter_name="default")


def save_sd(folder: Path, words: Sequence[str] = TEXT, **config: Any) -> None:
    pipe = Pipeline()
    unet, first = with_lora(pipe.unet, UNET, **config)
    text, second = with_lora(pipe.text_encoder, [*words], **config)
    more = {"unet_lora_adapter_metadata": unet, "text_encoder_lora_adapter_metadata": text}
    metadata = {name: lora.to_dict() for name, lora in more.items()}
    pipe.save_lora_weights(folder, first, second, weight_name="lora.safetensors", **metadata)


def save_flux(folder: Path, **config: Any) -> None:
    pipe = FluxPipeline()
    lora, state = with_lora(pipe.transformer, FLUX, lora_alpha=12, **config)
    more = {"transformer_lora_adapter_metadata": lora.to_dict()}
    pipe.save_lora_weights(folder, state, weight_name="lora.safetensors", **more)


def save_older(folder: Path) -> None:
    """CLIP's names as they were before transformers 5, with the metadata of today or without."""
    save_sd(folder, **MIXED)
    with safe_open(folder / "lora.safetensors", "pt") as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    first = "text_encoder."
    renamed = {key.replace(first, f"{first}text_model."): x for key, x in state.items()}
    save_file(renamed, folder / "lora.safetensors", metadata)


def save_kohya(folder: Path) -> None:
    """`test_styles_are_read_by_diffusers_and_peft` compares its keys with the file's own."""
    save_sd(folder, **MIXED)
    export(folder / "lora.safetensors", folder / "kohya.safetensors", style="kohya")
    (folder / "kohya.safetensors").rename(folder / "lora.safetensors")


WRITERS: dict[str, tuple[Callable[[], Any], Callable[[Path], None]]] = {
    "mixed ranks": (Pipeline, lambda folder: save_sd(folder, lora_alpha=3, **MIXED)),
    "older names": (Pipeline, save_older),
    "flux": (FluxPipeline, save_flux),
    "kohya": (Pipeline, save_kohya),
}


def loaded(pipeline: Callable[[], Any], file: Path) -> Any:
    """Return a pipeline with a file as diffusers itself reads it."""
    pipe = pipeline()
    pipe.load_lora_weights(str(file))
    return pipe


def layers_of(pipe: Any) -> dict[str, Any]:
    parts = {name: getattr(pipe, name, None) for name in ("unet", "transformer", "text_encoder")}
    found = {f"{part}.{n}": m for part, x in parts.items() if x for n, m in x.named_modules()}
    return {name: m for name, m in found.items() if len(getattr(m, "lora_A", ()))}


@pytest.mark.parametrize("kind", WRITERS)
def test_diffusers_computes_each_cut_as_the_best_of_its_rank(kind: str, tmp_path: Path) -> None:
    pipeline, save = WRITERS[kind]
    save(tmp_path)
    file = tmp_path / "lora.safetensors"
    given, without = loaded(pipeline, file), pipeline().outputs()
    before = given.outputs()
    assert distance(without, before) > 0.1
    reorder(file, tmp_path / "ordered.safetensors")
    assert distance(loaded(pipeline, tmp_path / "ordered.safetensors").outputs(), before) < 1e-5
    wanted = {}
    for name, module in layers_of(given).items():
        (own,) = module.lora_A
        A, B = (x[own].weight.double().flatten(1) for x in (module.lora_A, module.lora_B))
        wanted[name] = (B @ A * module.scaling[own]).detach().numpy()
    wishes: tuple[Any, ...] = ({"rank": 1}, {"rank": 4}, {"keep": "70%"})
    for number, wish in enumerate(wishes):
        out = tmp_path / f"{number}.safetensors"
        export(file, out, **wish)
        found, plain = loaded(pipeline, out), pipeline()
        read = layers_of(found)
        assert read.keys() == wanted.keys()
        for name, module in read.items():
            (rank,) = module.r.values()
            part, _, inside = name.partition(".")
            weight = getattr(plain, part).get_submodule(inside).weight
            update = torch.from_numpy(best(wanted[name], rank)).float().reshape(weight.shape)
            weight.data += update
        assert distance(found.outputs(), plain.outputs()) < 1e-5
        if "keep" in wish:
            assert len({rank for module in read.values() for rank in module.r.values()}) > 1


def test_styles_are_read_by_diffusers_and_peft(tmp_path: Path) -> None:
    save_sd(tmp_path, rank_pattern={"to_q": 3})
    file, before = tmp_path / "lora.safetensors", loaded(Pipeline, tmp_path / "lora.safetensors")
    export(file, tmp_path / "kohya.safetensors", style="kohya")
    names = {key.split(".")[0] for key in load_file(tmp_path / "kohya.safetensors")}
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_") for name in names)
    found = loaded(Pipeline, tmp_path / "kohya.safetensors")
    assert distance(found.outputs(), before.outputs()) < 1e-5
    save_flux(tmp_path, rank_pattern={"to_q": 3})
    export(file, tmp_path / "folder", style="peft")
    pipe = FluxPipeline()
    PeftModel.from_pretrained(pipe.transformer, str(tmp_path / "folder"))
    assert distance(pipe.outputs(), loaded(FluxPipeline, file).outputs()) < 1e-5


def test_diffusers_computes_a_sum_of_two_files(tmp_path: Path) -> None:
    save_sd(tmp_path / "a", **MIXED)
    save_sd(tmp_path / "b", words=[*TEXT, "k_proj"], lora_alpha=3)
    files = [tmp_path / name / "lora.safetensors" for name in "ab"]
    combine(files, tmp_path / "sum.safetensors", weights=[1, -0.5], rank=12)
    both = Pipeline()
    for file, weight in zip(files, (1, -0.5), strict=True):
        both.load_lora_weights(str(file))
        both.fuse_lora(["unet", "text_encoder"], lora_scale=weight)
        both.unload_lora_weights()
    found = loaded(Pipeline, tmp_path / "sum.safetensors").outputs()
    assert distance(found, both.outputs()) < 1e-5


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_diffusers_computes_the_tuned_model_from_what_was_extracted(
    tmp_path: Path, style: Any
) -> None:
    pipe = Pipeline()
    pipe.unet.save_pretrained(tmp_path / "base")
    for name, weight in pipe.unet.named_parameters():
        if "attn" in name or "conv1" in name:
            weight.data += 0.1 * torch.randn_like(weight) * (weight.ndim > 1)
    pipe.unet.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "lora.safetensors"
    extract(tmp_path / "base", tmp_path / "tuned", file, rank=99, style=style)
    assert distance(Pipeline().outputs(), pipe.outputs()) > 0.01
    assert distance(loaded(Pipeline, file).outputs(), pipe.outputs()) < 1e-4
