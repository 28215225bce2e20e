"""Another dtype, layers that are left out or scaled, and a larger rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers.models import tiny_llama, tiny_mixtral
from helpers.plain_peft import (
    IDS,
    Mixed,
    best,
    by_peft,
    distance,
    logits,
    plain_adapter,
    updates,
)
from helpers.single_files import read_ranks, read_updates
from helpers.tiny_chat import tiny_tokenizer
from packaging.version import Version
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import matryoshka_lora as ml
from matryoshka_lora import Lora, MatryoshkaError, Nesting

R = 8


@pytest.fixture
def lora(tmp_path: Path) -> Lora:
    plain_adapter(tmp_path / "lora", r=R)
    return ml.open(tmp_path / "lora")


def save_kohya(file: Path, dtype: torch.dtype = torch.float32, **alphas: float) -> Path:
    """Write a layer for each alpha, of rank 4, with kohya's keys and metadata."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, alpha in alphas.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, 16).to(dtype)
        tensors[f"{name}.lora_up.weight"] = torch.randn(12, 4).to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file, {"ss_network_dim": "4", "ss_network_alpha": "3"})
    return file


def relative(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Return the norm of the difference over that of what is expected, over all layers."""
    assert actual.keys() == expected.keys()
    missing = sum(float(((actual[name] - expected[name]) ** 2).sum()) for name in expected)
    return (missing / sum(float((update**2).sum()) for update in expected.values())) ** 0.5


# The dtype


@pytest.mark.parametrize(
    ("name", "dtype", "rounding"),
    [("fp32", torch.float32, 1e-6), ("bf16", torch.bfloat16, 5e-3), ("fp16", torch.float16, 6e-4)],
)
@pytest.mark.parametrize("rank", [None, 2])
def test_the_dtype_of_the_factors(
    lora: Lora, tmp_path: Path, name: Any, dtype: torch.dtype, rounding: float, rank: int | None
) -> None:
    changed = lora.cast(name)
    (changed if rank is None else changed.truncate(rank)).save(tmp_path / "output")
    tensors = load_file(tmp_path / "output" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    expected = updates(Path(lora.name))
    if rank is not None:
        expected = {key: best(update, rank) for key, update in expected.items()}
    assert relative(updates(tmp_path / "output"), expected) < rounding


def test_the_dtype_alone_changes_nothing_else(tmp_path: Path) -> None:
    file = save_kohya(tmp_path / "lora.safetensors", torch.bfloat16, a=3, b=1)
    ml.open(file).cast("fp32").save(tmp_path / "wide.safetensors")
    ml.open(tmp_path / "wide.safetensors").cast("bf16").save(tmp_path / "narrow.safetensors")
    expected = load_file(file)
    for output in ("wide", "narrow"):
        actual = load_file(tmp_path / f"{output}.safetensors")
        assert actual.keys() == expected.keys()
        for key, tensor in actual.items():
            assert torch.equal(tensor.float(), expected[key].float()), key
    with safe_open(tmp_path / "narrow.safetensors", "pt") as opened:
        assert opened.metadata()["ss_network_alpha"] == "3"


def test_the_rank_is_chosen_before_rounding(tmp_path: Path) -> None:
    """Factors in bf16 are reordered in full precision and written in fp32."""
    file = save_kohya(tmp_path / "lora.safetensors", torch.bfloat16, a=3, b=1)
    ml.open(file).cast("fp32").truncate(2).save(tmp_path / "small.safetensors")
    expected = {name: best(update, 2) for name, update in read_updates(file).items()}
    assert relative(read_updates(tmp_path / "small.safetensors"), expected) < 1e-6


@pytest.mark.parametrize("alpha", [4.0, 2.0**-18])
@pytest.mark.parametrize("size", [2.0**-16, 1.0, 2.0**18])
def test_fp16_keeps_the_digits_of_small_and_large_factors(
    tmp_path: Path, alpha: float, size: float
) -> None:
    file = save_kohya(tmp_path / "lora.safetensors", a=alpha, b=alpha)
    tensors = load_file(file)
    for name in ("a", "b"):
        tensors[f"{name}.lora_up.weight"] *= size
    save_file(tensors, file)
    ml.open(file).cast("fp16").save(tmp_path / "half.safetensors")
    assert relative(read_updates(tmp_path / "half.safetensors"), read_updates(file)) < 6e-4


def test_a_ladder_in_another_dtype(lora: Lora, tmp_path: Path) -> None:
    lora.cast("bf16").save(tmp_path / "ladder", "ladder", ranks=[1, 4])
    for rank in (1, 4):
        folder = tmp_path / "ladder" / f"lora@{rank}"
        tensors = load_file(folder / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        expected = {key: best(update, rank) for key, update in updates(Path(lora.name)).items()}
        assert relative(updates(folder), expected) < 5e-3


# Layers that are left out


def test_dropped_layers_have_no_update(lora: Lora, tmp_path: Path) -> None:
    dropped = lora.drop("*.0.*", "*k_proj")
    dropped.save(tmp_path / "output")
    expected = {
        key: update
        for key, update in updates(Path(lora.name)).items()
        if ".0." not in key and "k_" not in key
    }
    assert relative(updates(tmp_path / "output"), expected) < 1e-6
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "output")
    adapted = {name for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    assert len(adapted) == len(expected) == len(dropped.ranks)
    assert dropped.changes == ("left out 8 layers of 14",)


def test_a_rank_without_some_layers(lora: Lora, tmp_path: Path) -> None:
    result = lora.drop("*mlp*").truncate(2).save(tmp_path / "output")
    full = {key: update for key, update in updates(Path(lora.name)).items() if "mlp" not in key}
    expected = {key: best(update, 2) for key, update in full.items()}
    assert relative(updates(tmp_path / "output"), expected) < 1e-6
    assert result.errors[2] == pytest.approx(relative(expected, full), rel=1e-5)


def test_a_dropped_module_of_a_file_loses_all_its_tensors(tmp_path: Path) -> None:
    file = save_kohya(tmp_path / "lora.safetensors", lora_unet_a=3, lora_te1_a=2, lora_te1_b=2)
    extra = {
        "lora_te1_b.dora_scale": torch.ones(12, 1),
        "lora_te1_c.oft_blocks": torch.ones(2, 4, 4),
        "lora_te1_d.lora_mid.weight": torch.ones(4, 4, 3, 3),
        "lora_unet_c.oft_blocks": torch.ones(2, 4, 4),
    }
    save_file({**load_file(file), **extra}, file)
    result = ml.open(file).drop("lora_te*").save(tmp_path / "unet.safetensors")
    tensors = load_file(result.path)
    assert sorted(tensors) == [
        "lora_unet_a.alpha",
        "lora_unet_a.lora_down.weight",
        "lora_unet_a.lora_up.weight",
        "lora_unet_c.oft_blocks",
    ]
    assert float(tensors["lora_unet_a.alpha"]) == 3


def test_the_old_names_of_diffusers_lose_their_alpha(tmp_path: Path) -> None:
    """An alpha or a magnitude follows the module's name without its ``.lora``."""
    torch.manual_seed(0)
    tensors = {f"{name}.lora.down.weight": torch.randn(4, 16) for name in ("a", "b")}
    tensors |= {f"{name}.lora.up.weight": torch.randn(12, 4) for name in ("a", "b")}
    tensors |= {f"{name}.alpha": torch.tensor(2.0) for name in ("a", "b")}
    save_file(tensors, tmp_path / "lora.safetensors")
    ml.open(tmp_path / "lora.safetensors").drop("a.*").save(tmp_path / "x.safetensors")
    expected = {key for key in tensors if key.startswith("b.")}
    assert load_file(tmp_path / "x.safetensors").keys() == expected


# Layers that are scaled


@pytest.mark.parametrize("rank", [None, 3])
def test_scaled_updates(lora: Lora, tmp_path: Path, rank: int | None) -> None:
    factors = {"*layers.0*": 0.5, "*q_proj": -2.0, "*v_proj": 0}
    changed = lora.scale(factors)
    result = (changed if rank is None else changed.truncate(rank)).save(tmp_path / "output")
    scaled: dict[str, np.ndarray] = {}
    for key, update in updates(Path(lora.name)).items():
        if "v_proj" in key:
            continue
        factor = -2.0 if "q_proj" in key else 0.5 if "layers.0" in key else 1.0
        scaled[key] = factor * update
    expected = scaled
    if rank is not None:
        expected = {key: best(update, rank) for key, update in scaled.items()}
    assert relative(updates(tmp_path / "output"), expected) < 1e-6
    assert result.errors[rank or R] == pytest.approx(relative(expected, scaled), abs=1e-6)


def test_all_that_is_linear_in_the_update_is_scaled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "lora.safetensors"
    tensors = {
        "a.lora_A.weight": torch.randn(4, 16),
        "a.lora_B.weight": torch.randn(12, 4),
        "a.lora_B.bias": torch.randn(12),
        "a.diff_b": torch.randn(12),
        "b.diff": torch.randn(12, 16).to(torch.float16),
        "norm.w_norm": torch.randn(16),
        # PEFT and ComfyUI differ in the scale of this bias, so the layer is copied.
        "c.lora_down.weight": torch.randn(4, 16),
        "c.lora_up.weight": torch.randn(12, 4),
        "c.lora_up.bias": torch.randn(12),
        "c.alpha": torch.tensor(2.0),
        "dora.lora_A.weight": torch.randn(4, 16),
        "dora.lora_B.weight": torch.randn(12, 4),
        "dora.dora_scale": torch.randn(12, 1),
    }
    save_file(tensors, file)
    lora = ml.open(file)
    with pytest.raises(MatryoshkaError, match=r"dora\.dora_scale"):
        lora.scale({"*": 0.5})
    lora.scale({"*": 0.5, "dora": 0, "b": 1}).save(tmp_path / "scaled.safetensors")
    written = load_file(tmp_path / "scaled.safetensors")
    assert written.keys() == {key for key in tensors if "dora" not in key}
    for key, tensor in written.items():
        is_kept = key.startswith("b.") or key.endswith((".lora_A.weight", "down.weight", "alpha"))
        assert tensor.dtype == tensors[key].dtype
        assert torch.allclose(tensor, tensors[key] * (1 if is_kept else 0.5)), key


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"), reason="PEFT itself loses these biases"
)
def test_a_scaled_adapter_has_no_biases(tmp_path: Path) -> None:
    """PEFT's folders hold the biases of the model, and not their changes."""
    plain_adapter(tmp_path / "bias", tiny_llama(attention_bias=True), bias="lora_only")
    lora = ml.open(tmp_path / "bias")
    assert any(key.endswith("q_proj.base_layer.bias") for key in lora.other_tensors)
    for pattern in ("*", "*q_proj"):
        with pytest.raises(MatryoshkaError, match="bias"):
            lora.scale({pattern: 0.5})
    lora.scale({"*.down_proj": 0.5})


def test_scaling_keeps_an_order(lora: Lora, tmp_path: Path) -> None:
    """The components of a nested LoRA stay as they are, so a rank is a prefix of its factors."""
    lora.reorder().save(tmp_path / "nested")
    nested = ml.open(tmp_path / "nested")
    nested.scale({"*q_proj": 0.25}).truncate(3).save(tmp_path / "output")
    source = load_file(tmp_path / "nested" / "adapter_model.safetensors")
    for key, tensor in load_file(tmp_path / "output" / "adapter_model.safetensors").items():
        expected = source[key][:3] if "lora_A" in key else source[key][:, :3]
        factor = 0.25 if "q_proj.lora_B" in key else 1.0
        torch.testing.assert_close(tensor, factor * expected)


def test_a_scaled_file_keeps_its_alphas(tmp_path: Path) -> None:
    file = save_kohya(tmp_path / "lora.safetensors", torch.bfloat16, a=3, b=1)
    ml.open(file).scale({"b": 0.5}).save(tmp_path / "scaled.safetensors")
    expected = read_updates(file)
    expected["b"] *= 0.5
    assert relative(read_updates(tmp_path / "scaled.safetensors"), expected) == 0
    assert float(load_file(tmp_path / "scaled.safetensors")["a.alpha"]) == 3


def test_a_merged_model_has_the_scaled_layers(lora: Lora, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    changed = lora.drop("*.0.*").scale({"*q_proj": 0.5})
    changed.save(tmp_path / "output")
    changed.save(tmp_path / "merged", "merged", base_model=str(tmp_path / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), by_peft(tmp_path / "output")) < 1e-5


# A larger rank


def pad(source: Path, output: Path, rank: int) -> Path:
    return ml.open(source).pad(rank).save(output).path


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"use_rslora": True},
    ],
)
def test_a_padded_lora_is_the_same_and_all_its_components_learn(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    expected = logits(plain_adapter(tmp_path / "lora", r=R, **changes))
    folder = pad(tmp_path / "lora", tmp_path / "padded", 20)
    assert distance(by_peft(folder), expected) < 1e-5
    model = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)
    factors = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert {parameter.shape[1] for parameter in factors.values()} == {20}
    before = {name: parameter.detach().clone() for name, parameter in factors.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    for name, parameter in factors.items():
        assert (before[name][:, 8:] == 0).all()
        assert (parameter[:, 8:] != 0).all(), name


def test_new_rows_have_the_norm_of_the_old_ones(lora: Lora, tmp_path: Path) -> None:
    folder = lora.pad(40).save(tmp_path / "padded").path
    lora.pad(40).save(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert torch.equal(tensor, again[key])
        if "lora_A" in key:
            norms = tensor.double().norm(dim=1)
            assert float(norms[R:].mean()) == pytest.approx(float(norms[:R].mean()), rel=0.2)
            gram = tensor[R:].double() @ tensor[R:].double().T
            assert torch.linalg.matrix_rank(gram) == 32


def test_all_kinds_of_layers_are_padded(tmp_path: Path) -> None:
    targets = ["embedding", "convolution", "head"]
    expected = logits(plain_adapter(tmp_path / "lora", Mixed(), target_modules=targets))
    folder = pad(tmp_path / "lora", tmp_path / "padded", 16)
    assert distance(by_peft(folder, Mixed), expected) < 1e-6


def test_stacks_of_experts_are_padded(tmp_path: Path) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = plain_adapter(
        tmp_path / "lora",
        tiny_mixtral(),
        target_modules=["q_proj"],
        target_parameters=parameters,
        r=4,
    )
    folder = pad(tmp_path / "lora", tmp_path / "padded", 6)
    assert distance(by_peft(folder, tiny_mixtral), logits(model)) < 1e-6


def test_the_papers_deployment_is_padded_at_its_full_rank(tmp_path: Path, lora: Lora) -> None:
    """Its scale depends on the rank, and that of the full rank is the LoRA's."""
    nesting = Nesting((1, 2, R), "sqrt", scale=1.0)
    source = replace(lora, nesting=nesting, deploy="paper")
    source.nested().save(tmp_path / "paper")
    folder = pad(tmp_path / "paper", tmp_path / "padded", 12)
    assert distance(by_peft(folder), by_peft(Path(lora.name))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_padded_file_has_the_alphas_of_its_rank(tmp_path: Path, dtype: torch.dtype) -> None:
    file = save_kohya(tmp_path / "lora.safetensors", dtype, a=3, b=3)
    output = pad(file, tmp_path / "padded.safetensors", 16)
    assert read_ranks(output) == {"a": 16, "b": 16}
    assert float(load_file(output)["a.alpha"]) == 12
    assert relative(read_updates(output), read_updates(file)) == 0
    with safe_open(output, "pt") as opened:
        assert opened.metadata()["ss_network_dim"] == "16"
        assert opened.metadata()["ss_network_alpha"] == "12"


def test_a_padded_file_of_diffusers_has_its_scale_in_the_metadata(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": ["a"]}
    tensors = {"unet.a.lora_A.weight": torch.randn(4, 6), "unet.a.lora_B.weight": torch.randn(6, 4)}
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)})
    output = pad(file, tmp_path / "padded.safetensors", 8)
    with safe_open(output, "pt") as opened:
        updated = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (updated["unet.r"], updated["unet.lora_alpha"]) == (8, 4)
    assert torch.equal(
        load_file(output)["unet.a.lora_A.weight"][:4], tensors["unet.a.lora_A.weight"]
    )


# Arguments


@pytest.mark.parametrize(
    ("change", "keyword"),
    [
        (lambda lora: lora.cast("fp8"), "dtype"),
        (lambda lora: lora.drop("q_proj"), "matches no layer"),
        (lambda lora: lora.drop("*"), "drop"),
        (lambda lora: lora.scale({"q_proj": 0.5}), "matches no layer"),
        (lambda lora: lora.scale({"*": float("nan")}), "number"),
        (lambda lora: lora.scale({"*": "0.5"}), "number"),
        (lambda lora: lora.scale({"*": True}), "number"),
        (lambda lora: lora.scale({"*": 0}), "no layer"),
        (lambda lora: lora.pad(4), "smaller"),
        (lambda lora: lora.convert("kohya"), "key_format"),
        (lambda lora: lora.convert("civitai"), "key_format"),
    ],
)
def test_invalid_arguments_are_rejected(lora: Lora, change: Any, keyword: str) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        change(lora)
