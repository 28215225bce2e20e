"""Single-file LoRAs: what each rank holds, alphas and metadata, tensors that are not factors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plain_peft import best
from helpers.single_files import SUFFIXES, kohya_name, read_ranks, read_updates, save_pairs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import matryoshka_lora as ml
from matryoshka_lora import export
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.safetensors_io import ORDER_KEY
from matryoshka_lora.formats.single_file import read
from matryoshka_lora.lora.combine import combine
from matryoshka_lora.lora.save import SaveResult
from matryoshka_lora.lora.truncate import with_ranks

# Module, rank, inputs, outputs, kernel.
LAYERS = (
    ("unet.down_blocks.0.attn1.to_q", 8, 20, 12, ()),
    ("unet.mid_block.attn1.to_out.0", 3, 10, 16, ()),
    ("unet.down_blocks.0.resnets.0.conv1", 4, 6, 8, (3, 3)),
    ("text_encoder.text_model.encoder.layers.0.mlp.fc1", 5, 7, 9, ()),
)
MAX_RANK = 8


def save_lora(
    file: Path,
    key_format: str = "kohya",
    alpha: float | None = 6.0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a LoRA of random factors, with a rank of its own for each of `LAYERS`."""
    generator = torch.Generator().manual_seed(0)
    suffix_A, suffix_B = SUFFIXES[key_format]
    tensors: dict[str, Tensor] = {}
    for module, rank, num_inputs, num_outputs, kernel in LAYERS:
        name = kohya_name(module) if key_format == "kohya" else module
        A = torch.randn(rank, num_inputs, *kernel, generator=generator)
        B = torch.randn(num_outputs, rank, *[1 for _ in kernel], generator=generator)
        tensors[name + suffix_A] = A.to(dtype)
        tensors[name + suffix_B] = B.to(dtype)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    metadata = {
        "ss_network_dim": "8",
        "ss_network_alpha": str(alpha),
    }
    save_file(tensors, file, metadata)
    return file


def truncate(source: Path, output: Path, ranks: int | dict[str, int]) -> SaveResult:
    lora = read(source)
    small = lora.truncate(ranks) if isinstance(ranks, int) else with_ranks(lora, ranks)
    result = small.save(output)
    assert small.file_size == output.stat().st_size == result.size
    return result


def read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


@pytest.mark.parametrize("key_format", SUFFIXES)
@pytest.mark.parametrize("alpha", [6.0, None])
def test_every_rank_is_the_best_approximation(
    tmp_path: Path, key_format: str, alpha: float | None
) -> None:
    """Of the source, and of its reordered form, in which every prefix is one."""
    source = save_lora(tmp_path / "lora.safetensors", key_format, alpha)
    updates = read_updates(source)
    reordered = tmp_path / "reordered.safetensors"
    truncate(source, reordered, MAX_RANK)
    assert read_ranks(reordered) == read_ranks(source)
    layers = read(source).layers
    ranks_by_layer = {layer.name: min(layer.rank, 1 + i) for i, layer in enumerate(layers)}
    selections: tuple[int | dict[str, int], ...] = (1, 5, ranks_by_layer, MAX_RANK)
    for number, ranks in enumerate(selections):
        output = tmp_path / f"{number}.safetensors"
        result = truncate((source, reordered)[number % 2], output, ranks)
        assert load_file(output).keys() == load_file(source).keys()
        output_ranks = read_ranks(output)
        squared_error = 0.0
        for name, update in read_updates(output).items():
            expected = best(updates[name], output_ranks[name])
            atol = 1e-5 * np.abs(updates[name]).max()
            np.testing.assert_allclose(update, expected, atol=atol)
            squared_error += ((expected - updates[name]) ** 2).sum()
        squared_norm = sum((update**2).sum() for update in updates.values())
        expected_error = (squared_error / squared_norm) ** 0.5
        assert result.errors == {
            max(output_ranks.values()): pytest.approx(expected_error, abs=1e-6)
        }


@pytest.mark.parametrize("rank", [0, MAX_RANK + 1])
def test_an_unavailable_rank_is_refused(tmp_path: Path, rank: int) -> None:
    source = save_lora(tmp_path / "lora.safetensors")
    with pytest.raises(MatryoshkaError, match="rank"):
        read(source).truncate(rank)


def test_truncating_updates_alphas_and_metadata(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora.safetensors")
    output = tmp_path / "output.safetensors"
    truncate(source, output, 5)
    alphas = {float(t) for key, t in load_file(output).items() if key.endswith(".alpha")}
    assert alphas == {5.0}
    metadata = read_metadata(output)
    assert metadata["ss_network_dim"] == "Dynamic"
    assert metadata["ss_network_alpha"] == "5"
    truncate(source, tmp_path / "uniform.safetensors", 3)
    assert read_metadata(tmp_path / "uniform.safetensors")["ss_network_dim"] == "3"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    source = save_lora(tmp_path / "lora.safetensors", dtype=dtype)
    output = tmp_path / "output.safetensors"
    truncate(source, output, 3)
    dtypes = {t.dtype for key, t in load_file(output).items() if not key.endswith(".alpha")}
    assert dtypes == {dtype}
    updates = read_updates(output)
    for name, update in read_updates(source).items():
        error = np.linalg.norm(updates[name] - best(update, 3))
        assert error < 1e-2 * np.linalg.norm(update)


KOHYA_PAIR = {"b.lora_down.weight": torch.ones(2, 3), "b.lora_up.weight": torch.ones(4, 2)}
DIFFUSERS_PAIR = {"b.lora_A.weight": torch.ones(2, 3), "b.lora_B.weight": torch.ones(4, 2)}
OLD_PAIR = {"b_lora.down.weight": torch.ones(2, 3), "b_lora.up.weight": torch.ones(4, 2)}
OTHER_TENSORS: dict[str, dict[str, Tensor]] = {
    "DoRA": {**KOHYA_PAIR, "b.dora_scale": torch.ones(4, 1)},
    "DoRA with old keys": {**OLD_PAIR, "b.dora_scale": torch.ones(4, 1)},
    "DoRA with a magnitude": {**KOHYA_PAIR, "b.magnitude": torch.ones(4)},
    "bias and alpha": {
        **KOHYA_PAIR,
        "b.lora_up.bias": torch.ones(4),
        "b.alpha": torch.tensor(1.0),
    },
    "bias of A": {**DIFFUSERS_PAIR, "b.lora_A.bias": torch.ones(2)},
    "third matrix": {**KOHYA_PAIR, "b.lora_mid.weight": torch.ones(2, 2)},
    "LoKr with DoRA": {
        "b.lokr_w1": torch.ones(2, 2),
        "b.lokr_w2": torch.full((4, 4), float("nan")),
        "b.dora_scale": torch.ones(8, 1),
    },
    "unknown keys": {
        "c": torch.arange(3, dtype=torch.int32),
        "d": torch.ones(5).to(torch.float8_e4m3fn),
        "e": torch.tensor([True]),
        "f": torch.zeros(0),
    },
}


@pytest.mark.parametrize("kind", OTHER_TENSORS)
def test_tensors_that_are_not_factors_are_copied(tmp_path: Path, kind: str) -> None:
    others = OTHER_TENSORS[kind]
    source = save_lora(tmp_path / "lora.safetensors")
    save_file(load_file(source) | others, source)
    assert read(source).other_tensors.keys() == others.keys()
    truncate(source, tmp_path / "output.safetensors", 2)
    output = load_file(tmp_path / "output.safetensors")
    for key, tensor in others.items():
        assert output[key].dtype == tensor.dtype
        assert output[key].view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8))


@pytest.mark.parametrize("kind", OTHER_TENSORS)
def test_a_file_without_layers_is_refused(tmp_path: Path, kind: str) -> None:
    save_file(OTHER_TENSORS[kind], tmp_path / "lora.safetensors")
    keyword = "keys" if kind == "unknown keys" else "DoRA"
    with pytest.raises(MatryoshkaError, match=keyword):
        read(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("others", [("lora_A", "lora_B"), ("down", "up")])
def test_two_pairs_of_one_module_are_named(tmp_path: Path, others: tuple[str, str]) -> None:
    """They would share an alpha."""
    tensors = {
        f"a.{suffix}.weight": torch.ones(2, 2) for suffix in ("lora_down", "lora_up", *others)
    }
    save_file({**tensors, "a.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
    with pytest.raises(MatryoshkaError, match="two pairs"):
        read(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("key_B", ["lora_B.bias", "lora_up.bias"])
def test_the_bias_of_a_layer_without_alpha_is_copied(tmp_path: Path, key_B: str) -> None:
    """Its scale is 1 in the output too, so that the bias has the same effect."""
    pair = DIFFUSERS_PAIR if key_B == "lora_B.bias" else KOHYA_PAIR
    source, output = tmp_path / "lora.safetensors", tmp_path / "small.safetensors"
    save_file({**pair, f"b.{key_B}": torch.arange(4.0)}, source)
    truncate(source, output, 1)
    assert read_ranks(output) == {"b": 1}
    written = load_file(output)
    assert written.keys() == {*pair, f"b.{key_B}"}
    assert torch.equal(written[f"b.{key_B}"], torch.arange(4.0))


def test_a_diffusers_pipeline_with_dora_is_refused(tmp_path: Path) -> None:
    """diffusers takes the ranks in the metadata for those of all layers; it would not load."""
    source = tmp_path / "lora.safetensors"
    tensors = save_pairs(source, "transformer.q", "transformer.k")
    save_file({**tensors, "transformer.k.lora_magnitude_vector": torch.ones(6)}, source)
    with pytest.raises(MatryoshkaError, match="DoRA"):
        read(source)


def test_metadata_describe_mixed_ranks_to_diffusers(tmp_path: Path) -> None:
    """Without metadata diffusers takes one alpha for all ranks."""
    source = save_lora(tmp_path / "lora.safetensors", "diffusers", alpha=None)
    output = tmp_path / "output.safetensors"
    truncate(source, output, 5)
    config = json.loads(read_metadata(output)["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (5, 5)
    assert config["unet.rank_pattern"] == config["unet.alpha_pattern"]
    assert set(config["unet.rank_pattern"].values()) == {3, 4}
    assert {layer.scale for layer in read(output).layers} == {1.0}


def test_metadata_of_diffusers_define_the_scales(tmp_path: Path) -> None:
    """They are kept, so that runtimes that ignore the metadata get the strength that they had."""
    source = tmp_path / "lora.safetensors"
    tensors = save_pairs(source, "transformer.to_q", "transformer.conv")
    config = {
        "transformer.r": 2,
        "transformer.lora_alpha": 2,
        "transformer.alpha_pattern": {"conv": 6},
        "transformer.lora_dropout": 0.5,
    }
    save_file(tensors, source, {"lora_adapter_metadata": json.dumps(config)})
    truncate(source, tmp_path / "output.safetensors", 2)
    for file in (source, tmp_path / "output.safetensors"):
        scales = {layer.name: layer.scale for layer in read(file).layers}
        assert scales == {"transformer.to_q": 1, "transformer.conv": 3}
    updates = read_updates(tmp_path / "output.safetensors")
    for name, update in read_updates(source).items():
        np.testing.assert_allclose(updates[name], update, atol=1e-5)
    written = json.loads(read_metadata(tmp_path / "output.safetensors")["lora_adapter_metadata"])
    assert written["transformer.lora_dropout"] == 0.5


@pytest.mark.parametrize("module", ["diffusion_model.blocks.0.q", "transformer.blocks.0.q"])
def test_an_alpha_tensor_takes_precedence_over_metadata(tmp_path: Path, module: str) -> None:
    """ComfyUI reads only alphas, and SimpleTuner writes a LoraConfig in addition."""
    source = tmp_path / "lora.safetensors"
    tensors = {**save_pairs(source, module), f"{module}.alpha": torch.tensor(1.0)}
    config = '{"r": 2, "transformer.r": 2, "transformer.lora_alpha": 2}'
    save_file(tensors, source, {"lora_adapter_metadata": config})
    truncate(source, tmp_path / "output.safetensors", 1)
    update = read_updates(tmp_path / "output.safetensors")[module]
    np.testing.assert_allclose(update, best(read_updates(source)[module], 1), atol=1e-5)


@pytest.mark.parametrize("layer", ["x", "x_lora", "x.lora", "x.lora_linear_layer"])
@pytest.mark.parametrize("owner", ["x", "x_lora", "x.lora", "x.lora_linear_layer"])
def test_every_alpha_that_may_be_of_a_layer_is_its_alpha(
    tmp_path: Path, layer: str, owner: str
) -> None:
    """Old keys have it after the name with or without the ending."""
    pair = {f"{layer}.down.weight": torch.ones(2, 3), f"{layer}.up.weight": torch.ones(4, 2)}
    save_file({**pair, f"{owner}.alpha": torch.tensor(8.0)}, tmp_path / "lora.safetensors")
    lora = read(tmp_path / "lora.safetensors")
    assert [layer.scale for layer in lora.layers] == [4.0]
    assert not lora.other_tensors


def test_two_alphas_of_one_layer_are_refused(tmp_path: Path) -> None:
    alphas = {"b_lora.alpha": torch.tensor(1.0), "b.alpha": torch.tensor(2.0)}
    save_file(OLD_PAIR | alphas, tmp_path / "lora.safetensors")
    with pytest.raises(MatryoshkaError, match="alpha"):
        read(tmp_path / "lora.safetensors")
    save_file(OLD_PAIR | KOHYA_PAIR | alphas, tmp_path / "lora.safetensors")
    scales = {layer.name: layer.scale for layer in read(tmp_path / "lora.safetensors").layers}
    assert scales == {"b": 1.0, "b_lora": 0.5}


@pytest.mark.parametrize("alpha", [1e-6, 1e6])
def test_fp16_can_represent_the_factors_of_every_alpha(tmp_path: Path, alpha: float) -> None:
    torch.manual_seed(0)
    tensors = {
        "q.lora_down.weight": 0.1 * torch.randn(4, 64).half(),
        "q.lora_up.weight": 0.01 * torch.randn(64, 4).half(),
        "q.alpha": torch.tensor(alpha),
    }
    source, output = tmp_path / "lora.safetensors", tmp_path / "output.safetensors"
    save_file(tensors, source)
    expected = best(read_updates(source)["q"], 3)
    truncate(source, output, 3)
    error = np.linalg.norm(read_updates(output)["q"] - expected)
    assert error < 1e-3 * np.linalg.norm(expected)


def test_a_layer_that_an_alpha_switches_off_stays_off(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora.safetensors")
    name = kohya_name(LAYERS[0][0])
    tensors = {**load_file(source), f"{name}.alpha": torch.tensor(0.0)}
    save_file(tensors, source)
    truncate(source, tmp_path / "small.safetensors", 1)
    written = load_file(tmp_path / "small.safetensors")
    for key, tensor in tensors.items():
        if key.startswith(f"{name}."):
            assert torch.equal(written[key], tensor)
    assert max(rank for module, rank in read_ranks(source).items() if module != name) > 1
    ranks = read_ranks(tmp_path / "small.safetensors")
    assert {rank for module, rank in ranks.items() if module != name} == {1}


def test_a_negative_alpha_subtracts_the_update(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora.safetensors")
    name = kohya_name(LAYERS[0][0])
    save_file({**load_file(source), f"{name}.alpha": torch.tensor(-3.0)}, source)
    updates = read_updates(source)
    truncate(source, tmp_path / "small.safetensors", 2)
    written = read_updates(tmp_path / "small.safetensors")
    for module, update in updates.items():
        np.testing.assert_allclose(written[module], best(update, 2), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_factors_become_bf16(tmp_path: Path, dtype: torch.dtype) -> None:
    source = save_lora(tmp_path / "lora.safetensors", alpha=None, dtype=dtype)
    output = tmp_path / "small.safetensors"
    truncate(source, output, 3)
    assert {tensor.dtype for tensor in load_file(output).values()} == {torch.bfloat16}
    updates = read_updates(output)
    for name, update in read_updates(source).items():
        expected = best(update, 3)
        assert np.linalg.norm(updates[name] - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("alpha", [-1e-32, 1e-32, float("nan"), [1.0, 2.0]])
def test_an_invalid_alpha_is_refused(tmp_path: Path, alpha: float | list[float]) -> None:
    source = save_lora(tmp_path / "lora.safetensors")
    tensors = load_file(source)
    tensors[f"{kohya_name(LAYERS[0][0])}.alpha"] = torch.tensor(alpha)
    save_file(tensors, source)
    with pytest.raises(MatryoshkaError, match="alpha"):
        read(source)


@pytest.mark.parametrize(
    "changes",
    [
        {"b.lora_down.weight": torch.ones(2, 3, dtype=torch.int32)},
        {"b.lora_down.weight": torch.ones(3, 3)},
        {"b.lora_down.weight": torch.ones(2, 3, 1, 1)},
        {"b.lora_down.weight": torch.ones(2, 3, 3, 3), "b.lora_up.weight": torch.ones(4, 2, 3, 3)},
    ],
    ids=["dtype", "rank", "dimensions", "kernel of B"],
)
def test_factors_that_do_not_fit_are_refused(tmp_path: Path, changes: Mapping[str, Tensor]) -> None:
    save_file({**KOHYA_PAIR, **changes}, tmp_path / "lora.safetensors")
    with pytest.raises(MatryoshkaError, match="factors"):
        read(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("metadata", ["[", "[1]", "[" * 200_000])
def test_damaged_metadata_are_refused(tmp_path: Path, metadata: str) -> None:
    save_file(DIFFUSERS_PAIR, tmp_path / "lora.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(MatryoshkaError, match="lora_adapter_metadata"):
        read(tmp_path / "lora.safetensors")


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="not found"):
        read(tmp_path / "missing.bin")
    with pytest.raises(MatryoshkaError, match="not found"):
        read(tmp_path / "missing.safetensors")
    (tmp_path / "lora.ckpt").write_bytes(b"pickle")
    with pytest.raises(MatryoshkaError, match="safetensors"):
        read(tmp_path / "lora.ckpt")
    weights = {f"base_model.model.{key}": tensor for key, tensor in DIFFUSERS_PAIR.items()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(MatryoshkaError, match="adapter_config"):
        read(tmp_path / "adapter_model.safetensors")


PEFT_PAIR = {f"base_model.model.{key}": tensor for key, tensor in DIFFUSERS_PAIR.items()}


def test_the_alpha_of_a_weights_file_may_be_passed(tmp_path: Path) -> None:
    """The output has no alpha, and the scale 1: ComfyUI reads it as it is."""
    save_file(PEFT_PAIR, tmp_path / "adapter_model.safetensors")
    export(tmp_path / "adapter_model.safetensors", tmp_path / "lora.safetensors", 1, alpha=6)
    (update,) = read_updates(tmp_path / "lora.safetensors").values()
    np.testing.assert_allclose(update, np.full((4, 3), 2 * 6 / 2), atol=1e-5)
    assert load_file(tmp_path / "lora.safetensors").keys() == PEFT_PAIR.keys()


@pytest.mark.parametrize(
    ("tensors", "alpha"),
    [
        (PEFT_PAIR, 0),
        (PEFT_PAIR, -1),
        (PEFT_PAIR, "16"),
        ({**KOHYA_PAIR, "b.alpha": torch.tensor(2.0)}, 2),
        ({**PEFT_PAIR, "base_model.model.b.lora_magnitude_vector": torch.ones(4)}, 2),
    ],
    ids=["zero", "negative", "text", "two alphas", "DoRA"],
)
def test_an_alpha_that_cannot_be_used_is_refused(
    tmp_path: Path, tensors: Mapping[str, Tensor], alpha: Any
) -> None:
    save_file(dict(tensors), tmp_path / "lora.safetensors")
    with pytest.raises(MatryoshkaError, match=r"alpha|DoRA"):
        ml.open(tmp_path / "lora.safetensors", alpha=alpha)


def test_metadata_of_a_folder_s_weights_are_dropped(tmp_path: Path) -> None:
    """The checksum in them would be renewed, and would make the header longer than reserved."""
    pair = {"a.lora_down.weight": torch.randn(4, 9), "a.lora_up.weight": torch.randn(8, 4)}
    save_file(pair, tmp_path / "a.safetensors", {"matryoshka_lora": '{"ranks": [1, 2, 4]}'})
    export(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 2, alpha=4)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.get_tensor("a.lora_up.weight").shape == (8, 2)
        assert "matryoshka_lora" not in file.metadata()


def test_padded_layers_have_one_alpha(tmp_path: Path) -> None:
    """diffusers supports only one."""
    tensors = {}
    for name, rank in (("a", 2), ("b", 4)):
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 9)
        tensors[f"{name}.lora_up.weight"] = torch.randn(8, rank)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "a.safetensors")
    export(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 8, pad=True)
    padded = load_file(tmp_path / "b.safetensors")
    assert padded["a.alpha"] == padded["b.alpha"]
    for name, rank in (("a", 2), ("b", 4)):
        before = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] * 4 / rank
        after = padded[f"{name}.lora_up.weight"] @ padded[f"{name}.lora_down.weight"]
        torch.testing.assert_close(after * padded[f"{name}.alpha"] / 8, before)


@pytest.mark.parametrize(("drop", "conv_dim"), [("lin", "2"), ("conv", None)])
def test_conv_dim_is_the_rank_of_the_convolutions_that_are_left(
    tmp_path: Path, drop: str, conv_dim: str | None
) -> None:
    tensors = {
        "lin.lora_down.weight": torch.randn(4, 9),
        "lin.lora_up.weight": torch.randn(8, 4),
        "conv.lora_down.weight": torch.randn(4, 9, 3, 3),
        "conv.lora_up.weight": torch.randn(8, 4, 1, 1),
    }
    arguments = json.dumps({"conv_dim": "4", "conv_alpha": "1"})
    metadata = {"ss_network_args": arguments, "ss_network_dim": "4", "ss_network_alpha": "1"}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    export(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 2, alpha=4, drop=[drop])
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        arguments = json.loads(file.metadata()["ss_network_args"])
    assert arguments.get("conv_dim") == conv_dim
    assert ("conv_alpha" in arguments) == (conv_dim is not None)


def save_weighted(folder: Path, key_format: str = "kohya") -> ml.Lora:
    """Write a LoRA with the order of its SVD, and other weighted values; return it as read."""
    alpha = 6.0 if key_format == "kohya" else None
    lora = read(save_lora(folder / "plain.safetensors", key_format, alpha)).reorder()
    layers = tuple(
        replace(layer, weighted_values=10.0**index * 0.5 ** np.arange(layer.rank))
        for index, layer in enumerate(lora.layers)
    )
    replace(lora, layers=layers, order="weighted").save(folder / "weighted.safetensors")
    return read(folder / "weighted.safetensors")


@pytest.mark.parametrize("key_format", ["kohya", "diffusers"])
def test_a_weighted_order_chooses_the_ranks_of_prefixes(tmp_path: Path, key_format: str) -> None:
    lora = save_weighted(tmp_path, key_format)
    assert lora.order == "weighted"
    values = {layer.name: layer.weighted_values for layer in lora.layers}
    total = sum((value**2).sum() for value in values.values() if value is not None)
    result = export(lora, tmp_path / "small.safetensors", error="30%")
    missing = sum(
        (value[result.ranks[name] :] ** 2).sum()
        for name, value in values.items()
        if value is not None
    )
    assert result.weighted_error == pytest.approx(np.sqrt(missing / total))
    assert list(result.ranks.values())[-1] == 2  # the next one has 1/10 of its weighted values
    assert next(iter(result.ranks.values())) == 1
    size = (tmp_path / "small.safetensors").stat().st_size
    fitted = export(lora, tmp_path / "fitted.safetensors", max_bytes=size)
    assert (fitted.ranks, fitted.size_after) == (result.ranks, size)

    whole, small = load_file(tmp_path / "weighted.safetensors"), tmp_path / "small.safetensors"
    suffix_A, suffix_B = SUFFIXES[key_format]
    for name, update in read_updates(small).items():
        rank = result.ranks[name]
        A = whole[name + suffix_A].double().flatten(1)
        B = whole[name + suffix_B].double().flatten(1)
        scale = float(whole.get(f"{name}.alpha", len(A))) / len(A)
        np.testing.assert_allclose(update, scale * B[:, :rank] @ A[:rank], rtol=1e-4, atol=1e-5)
    alphas = [tensor for key, tensor in load_file(small).items() if key.endswith(".alpha")]
    assert len(set(map(float, alphas))) == (key_format == "kohya")  # as diffusers requires


@pytest.mark.parametrize(
    ("verb", "keeps"),
    [
        (lambda lora: lora.cast("fp16"), True),
        (lambda lora: lora.drop("text_encoder*"), True),
        (lambda lora: lora.scale({"unet*": -2.0}), True),
        (lambda lora: lora.convert("kohya"), True),
        (lambda lora: lora.truncate(2), True),
        (lambda lora: lora.pad(8), False),
        (lambda lora: lora.reorder(), False),
        (lambda lora: lora.map(lambda factors: factors), False),
        (lambda lora: combine([lora], [1.0]), False),
    ],
)
def test_a_verb_keeps_a_weighted_order_or_drops_it(
    tmp_path: Path, verb: Callable[[ml.Lora], ml.Lora], keeps: bool
) -> None:
    changed = verb(save_weighted(tmp_path, "diffusers"))
    changed.save(tmp_path / "changed.safetensors")
    assert changed.file_size == (tmp_path / "changed.safetensors").stat().st_size
    opened = read(tmp_path / "changed.safetensors")
    assert opened.order == ("weighted" if keeps else None)
    assert (ORDER_KEY in read_metadata(tmp_path / "changed.safetensors")) == keeps
    if keeps:
        for layer, expected in zip(opened.layers, changed.layers, strict=True):
            np.testing.assert_allclose(layer.weighted_values, expected.weighted_values, rtol=1e-5)


@pytest.mark.parametrize("change", ["factor", "alpha", "layer", "values", "json"])
def test_a_file_that_has_changed_has_no_order(tmp_path: Path, change: str) -> None:
    save_weighted(tmp_path)
    file = tmp_path / "weighted.safetensors"
    tensors, metadata = load_file(file), read_metadata(file)
    first = min(tensors).partition(".")[0]
    if change == "factor":
        tensors[f"{first}.lora_up.weight"][0] += 1
    elif change == "alpha":
        tensors[f"{first}.alpha"] *= 2
    elif change == "layer":
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(first)}
    elif change == "values":
        metadata[ORDER_KEY] = metadata[ORDER_KEY].replace("0.25", "NaN")
    else:
        metadata[ORDER_KEY] = "[]"
    save_file(tensors, file, metadata)
    with pytest.warns(UserWarning, match="order"):
        lora = read(file)
    assert lora.order is None
    assert all(layer.weighted_values is None for layer in lora.layers)
