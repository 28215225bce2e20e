"""LoRAs of DoRA adapters against what PEFT and LyCORIS compute with DoRA."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.layers import best_matrix
from helpers.models import tiny_llama
from helpers.plain_peft import best, distance, logits, updates
from helpers.single_files import read_updates
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from matryoshka_lora import MatryoshkaError, extract


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=64)
    return GPT2LMHeadModel(config).eval()


class Convolutions(nn.Module):
    """A convolution and a linear layer, as a UNet has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(6, 10, 3)
        self.out = nn.Linear(10, 8)

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.state_dict(), folder / "diffusion_pytorch_model.safetensors")

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.cos(torch.arange(6 * 25.0)).reshape(1, 6, 5, 5) + input_ids[0, 0]
        output: Tensor = self.out(self.conv(x).mT.flatten(2).mT)
        return output


def train(model: Any, size: float = 0.1) -> Any:
    """Fill the factors, and change the magnitudes by a tenth, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name or "dora_scale" in name:
                parameter *= 1 + 0.1 * noise
            elif parameter.requires_grad:
                parameter.copy_(size * noise)
    return model.eval()


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "Llama": (tiny_llama, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "GPT-2": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "convolution": (Convolutions, {"target_modules": ["conv", "out"]}),
}


def save(folder: Path, case: str, **changes: Any) -> tuple[Path, Path, Any]:
    """Write a base model and DoRA, and return their folders and the model with DoRA."""
    create, options = CASES[case]
    create().save_pretrained(folder / "base")
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "use_dora": True, **options, **changes})
    model = train(get_peft_model(create(), config))
    model.save_pretrained(folder / "dora")
    return folder / "base", folder / "dora", model


@pytest.mark.parametrize("case", CASES)
def test_every_rank_is_the_closest_lora_to_dora(tmp_path: Path, case: str) -> None:
    base, dora, model = save(tmp_path, case)
    expected = logits(model)
    changes = updates(dora, CASES[case][0])
    extract(base, dora, tmp_path / "full", rank=200)
    full = PeftModel.from_pretrained(CASES[case][0](), tmp_path / "full")
    assert distance(logits(full), expected) < 1e-5
    assert distance(logits(full.merge_and_unload()), logits(model.merge_and_unload())) < 1e-5
    result = extract(base, dora, tmp_path / "lora", rank=6)
    actual = updates(tmp_path / "lora", CASES[case][0])
    assert actual.keys() == changes.keys()
    missing = 0.0
    for key, change in changes.items():
        np.testing.assert_allclose(actual[key], best(change, 6), atol=1e-5)
        missing += float(((actual[key] - change) ** 2).sum())
    total = sum(float((change**2).sum()) for change in changes.values())
    assert result.errors[6] == pytest.approx((missing / total) ** 0.5, rel=1e-3)


def test_modules_to_save_and_embeddings_may_be_saved_in_full(tmp_path: Path) -> None:
    """A LoRA of an embedding is not written. Its weight with DoRA may be."""
    targets = ["q_proj", "embed_tokens"]
    base, dora, model = save(
        tmp_path, "Llama", target_modules=targets, modules_to_save=["lm_head"], bias="all"
    )
    result = extract(base, dora, tmp_path / "short", rank=64)
    assert result.unsaved_tensors.keys() == {"lm_head.weight", "model.embed_tokens.weight"}
    saved = ["lm_head", "embed_tokens"]
    extract(base, dora, tmp_path / "lora", rank=64, modules_to_save=saved)
    assert (
        distance(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")), logits(model))
        < 1e-5
    )


BLOCK = "input_blocks.4.1.transformer_blocks.0"
SHAPES = {
    f"model.diffusion_model.{BLOCK}.attn1.to_q": (24, 24),
    "model.diffusion_model.input_blocks.1.0.in_layers.2": (12, 8, 3, 3),
    "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc": (32, 8),
}
"""The layers of a checkpoint of Stable Diffusion XL."""
KOHYA_NAMES = [
    f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q",
    "lora_unet_input_blocks_1_0_in_layers_2",
    "lora_te2_text_model_encoder_layers_1_mlp_fc1",
]
DIFFUSERS_NAMES = [
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.resnets.0.conv1",
    "text_encoder_2.text_model.encoder.layers.1.mlp.fc1",
]


def dense_weight(layer: Any) -> np.ndarray:
    """Return the matrix of a layer's forward pass, from its outputs for unit vectors."""
    shape = layer.weight.shape[1:]
    with torch.no_grad():
        outputs = layer(torch.eye(shape.numel()).reshape(-1, *shape)).flatten(1) - layer.bias
    return outputs.T.double().numpy()


def save_lycoris(folder: Path, method: str, names: list[str], **options: Any) -> list[np.ndarray]:
    """Write a checkpoint and a file of LyCORIS with magnitudes; return the changes of weights."""
    lycoris = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed")
    torch.manual_seed(0)
    base: dict[str, Tensor] = {"model.diffusion_model.out.2.weight": torch.randn(4, 8, 3, 3)}
    tensors: dict[str, Tensor] = {}
    changes: list[np.ndarray] = []
    for (key, (rows, inputs, *kernel)), name in zip(SHAPES.items(), names, strict=True):
        layer = nn.Conv2d(inputs, rows, kernel[0]) if kernel else nn.Linear(inputs, rows)
        base[f"{key}.weight"] = layer.weight.detach().clone()
        module = train(
            getattr(lycoris, method)(
                name, layer, lora_dim=2, alpha=1, weight_decompose=True, **options
            )
        )
        for tensor_name, tensor in module.state_dict().items():
            if tensor_name in module.weight_list:
                tensors[f"{name}.{tensor_name}"] = tensor.detach().clone().contiguous()
        before = dense_weight(layer)
        module.apply_to()
        changes.append(dense_weight(layer) - before)
    save_file(base, folder / "base.safetensors")
    save_file(tensors, folder / "dora.safetensors")
    return changes


@pytest.mark.parametrize("names", [KOHYA_NAMES, DIFFUSERS_NAMES], ids=["kohya", "diffusers"])
@pytest.mark.parametrize("wd_on_out", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("method", ["LoConModule", "LohaModule", "LokrModule"])
def test_a_file_of_lycoris(tmp_path: Path, method: str, wd_on_out: bool, names: list[str]) -> None:
    changes = save_lycoris(tmp_path, method, names, wd_on_out=wd_on_out)
    models, output = (
        (tmp_path / "base.safetensors", tmp_path / "dora.safetensors"),
        tmp_path / "lora.safetensors",
    )
    result = extract(*models, output, rank=5, key_format="kohya")
    assert not result.unsaved_tensors
    actual = read_updates(output)
    for name, change in zip(KOHYA_NAMES, changes, strict=True):
        np.testing.assert_allclose(actual[name], best_matrix(change, 5), atol=1e-5)


def edit(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(file)), file)


MAGNITUDE = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("config", "base_config", "new_tensors", "keyword"),
    [
        ({"use_dora": False}, {}, {}, "export"),
        ({}, {"hidden_size": 32}, {}, "base model"),
        ({}, {"num_hidden_layers": 1}, {}, "layers.1"),
        ({}, {}, {MAGNITUDE: torch.ones(3)}, "magnitude"),
        ({}, {}, {MAGNITUDE.replace("q_proj", "x_proj"): torch.ones(64)}, "x_proj"),
    ],
)
def test_folders_that_cannot_be_extracted_are_rejected(
    tmp_path: Path,
    config: dict[str, Any],
    base_config: dict[str, Any],
    new_tensors: dict[str, Tensor],
    keyword: str,
) -> None:
    base, dora, _ = save(tmp_path, "Llama", **config)
    tiny_llama(**base_config).save_pretrained(base)
    edit(dora / "adapter_model.safetensors", lambda tensors: tensors | new_tensors)
    with pytest.raises(MatryoshkaError, match=keyword):
        extract(base, dora, tmp_path / "lora", rank=2)
    assert not (tmp_path / "lora").exists()


MID = f"{KOHYA_NAMES[1]}.lora_mid.weight"


@pytest.mark.parametrize(
    ("new_tensors", "key_format", "output_name", "keyword"),
    [
        ({}, None, "lora", "key_format"),
        ({MID: torch.ones(2, 2, 3, 3)}, "kohya", "lora.safetensors", "third"),
        ({"lora_unet_out_2.dora_scale": torch.ones(4, 1)}, "kohya", "lora.safetensors", "out_2"),
    ],
)
def test_files_that_cannot_be_extracted_are_rejected(
    tmp_path: Path,
    new_tensors: dict[str, Tensor],
    key_format: Any,
    output_name: str,
    keyword: str,
) -> None:
    save_lycoris(tmp_path, "LoConModule", KOHYA_NAMES)
    models = tmp_path / "base.safetensors", tmp_path / "dora.safetensors"
    edit(models[1], lambda tensors: tensors | new_tensors)
    with pytest.raises(MatryoshkaError, match=keyword):
        extract(*models, tmp_path / output_name, rank=2, key_format=key_format)
    assert not (tmp_path / output_name).exists()


def test_transposed_weights_need_the_config_of_the_model(tmp_path: Path) -> None:
    base, dora, _ = save(tmp_path, "GPT-2")
    with pytest.raises(MatryoshkaError, match="fan_in_fan_out"):
        extract(base / "model.safetensors", dora, tmp_path / "lora", rank=2)


def test_the_factors_have_the_dtype_of_the_adapter(tmp_path: Path) -> None:
    """The change is not rounded to it: its small rounding errors would have a high rank."""
    base, dora, _ = save(tmp_path, "Llama")
    edit(base / "model.safetensors", lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    file = dora / "adapter_model.safetensors"
    edit(file, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    model = tiny_llama()
    model.load_state_dict(load_file(base / "model.safetensors"), strict=False)
    expected = updates(dora, lambda: deepcopy(model))
    result = extract(base, dora, tmp_path / "lora", rank=64)
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    actual = updates(tmp_path / "lora", lambda: deepcopy(model))
    residual = sum(float(((actual[key] - expected[key]) ** 2).sum()) for key in expected)
    total = sum(float((expected[key] ** 2).sum()) for key in expected)
    assert result.errors[64] == pytest.approx((residual / total) ** 0.5, rel=0.02)
    assert result.errors[64] < 0.01
    assert result.rounding_share == 0
