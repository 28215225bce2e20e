"""Sums of LoRAs against NumPy's SVD of the dense sum of what plain PEFT merges."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.models import LINEAR_LAYERS, tiny_llama, tiny_mixtral
from helpers.plain_peft import Mixed, best, logits, plain_adapter, updates
from helpers.single_files import read_updates
from peft import PeftModel
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from matryoshka_lora import MatryoshkaError, combine, export, info
from matryoshka_lora.formats.peft_folder import CONFIG_NAME, WEIGHTS_NAME

MIXED_LAYERS = ["embedding", "convolution", "head"]


class RandomSum(NamedTuple):
    """Adapters with different ranks, scales and layers, and the weights of their sum."""

    base: Callable[[], Any]
    paths: list[Path]
    weights: list[float]
    ranks: list[int]
    targets: list[list[str]]


def random_sum(folder: Path, seed: int) -> RandomSum:
    """Save two to four adapters with random factors."""
    rng = random.Random(seed)
    base, layer_names = (Mixed, MIXED_LAYERS) if seed % 2 else (tiny_llama, LINEAR_LAYERS)
    result = RandomSum(base, [], [], [], [])
    for index in range(rng.randint(2, 4)):
        torch.manual_seed(100 * seed + index)
        path = folder / str(index)
        rank = rng.choice([1, 2, 3, 5, 8])
        targets = rng.sample(layer_names, rng.randint(2, len(layer_names)))
        plain_adapter(
            path,
            base(),
            r=rank,
            lora_alpha=rng.uniform(1, 20),
            use_rslora=rng.random() < 0.5,
            target_modules=targets,
        )
        result.paths.append(path)
        result.weights.append(rng.choice([1.0, 0.3, -0.7, 2.5]))
        result.ranks.append(rank)
        result.targets.append(targets)
    return result


def dense_sum(
    base: Callable[[], Any], paths: list[Path], weights: list[float]
) -> dict[str, np.ndarray]:
    """Return the weighted sum of what plain PEFT merges, as matrices."""
    total: dict[str, Any] = {}
    for path, weight in zip(paths, weights, strict=True):
        for name, update in updates(path, base).items():
            total[name] = total.get(name, 0) + weight * update.reshape(len(update), -1)
    return total


def prefix_updates(folder: Path, rank: int) -> list[np.ndarray]:
    """Return the updates of the first columns of a saved adapter, with the scale of its config."""
    tensors = load_file(folder / WEIGHTS_NAME)
    config = json.loads((folder / CONFIG_NAME).read_text())
    scale = config["lora_alpha"] / config["r"]
    prefixes = []
    for key, factor in tensors.items():
        if "_A" in key:
            key_B = key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
            A = factor.double().flatten(1)[:rank]
            B = tensors[key_B].double().flatten(1)[:, :rank]
            prefixes.append((scale * B @ A).numpy())
    return prefixes


@pytest.mark.parametrize("seed", range(12))
def test_every_rank_is_the_best_approximation_of_the_sum(tmp_path: Path, seed: int) -> None:
    terms = random_sum(tmp_path, seed)
    expected = dense_sum(terms.base, terms.paths, terms.weights)
    result = combine(terms.paths, tmp_path / "sum", terms.weights)
    values = [np.linalg.svd(update, compute_uv=False) for update in expected.values()]
    total = sum(float((s**2).sum()) for s in values)
    assert max(result.errors) == max(terms.ranks)
    for rank, error in result.errors.items():
        missing = sum(float((s[rank:] ** 2).sum()) for s in values)
        assert error == pytest.approx((missing / total) ** 0.5, abs=1e-6)
        kept = sum(float((prefix**2).sum()) for prefix in prefix_updates(tmp_path / "sum", rank))
        assert kept == pytest.approx(total - missing, rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_plain_peft_computes_the_sum(tmp_path: Path, seed: int) -> None:
    terms = random_sum(tmp_path, seed)
    rank_of_sum = Counter[str]()
    for rank, targets in zip(terms.ranks, terms.targets, strict=True):
        rank_of_sum.update(dict.fromkeys(targets, rank))
    full_rank = max(rank_of_sum.values())
    result = combine(terms.paths, tmp_path / "sum", terms.weights, rank=full_rank)
    assert result.path == tmp_path / "sum"
    assert result.errors[full_rank] < 1e-6
    expected_model = terms.base()
    weights: dict[str, Tensor] = expected_model.state_dict()
    expected = dense_sum(terms.base, terms.paths, terms.weights)
    assert result.num_layers == len(expected)
    for name, update in expected.items():
        weights[name] += torch.from_numpy(update).reshape(weights[name].shape).float()
    actual = logits(PeftModel.from_pretrained(terms.base(), tmp_path / "sum"))
    assert torch.allclose(actual, logits(expected_model), atol=1e-3, rtol=1e-4)
    assert info(tmp_path / "sum").lora.order == "svd"


@pytest.mark.parametrize("seed", range(4))
def test_cosines_are_those_of_the_dense_updates(seed: int, tmp_path: Path) -> None:
    terms = random_sum(tmp_path, seed)
    result = combine(terms.paths, tmp_path / "sum", terms.weights)
    dense: list[dict[str, Any]] = []
    for path in terms.paths:
        dense.append(dense_sum(terms.base, [path], [1.0]))
    names = sorted({name for updates in dense for name in updates})
    shapes = {name: value.shape for updates in dense for name, value in updates.items()}
    vectors = [
        np.concatenate([updates.get(name, np.zeros(shapes[name])).ravel() for name in names])
        for updates in dense
    ]
    vectors = [vector / np.linalg.norm(vector) for vector in vectors]
    expected = [[first @ second for second in vectors] for first in vectors]
    np.testing.assert_allclose(result.cosines, expected, atol=1e-6)


def test_a_mean_has_equal_weights(tmp_path: Path) -> None:
    terms = random_sum(tmp_path, 0)
    num_sources = len(terms.paths)
    combine(terms.paths, tmp_path / "mean", "mean")
    combine(terms.paths, tmp_path / "sum", [1 / num_sources] * num_sources)
    mean, total = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("mean", "sum"))
    assert all(torch.equal(mean[key], total[key]) for key in total)


@pytest.mark.parametrize("rank_of_sum", [9, "sum"])
def test_single_files_keep_their_key_format(tmp_path: Path, rank_of_sum: Any) -> None:
    sources = {"a": (4, 8.0, "x"), "b": (2, 1.0, "x"), "c": (3, 6.0, "y")}
    for name, (rank, alpha, other_layer) in sources.items():
        tensors = {}
        for layer in ("lora_unet_q", f"lora_unet_{other_layer}"):
            tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, 6)
            tensors[f"{layer}.lora_up.weight"] = torch.randn(5, rank)
            tensors[f"{layer}.alpha"] = torch.tensor(alpha)
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in sources]
    combine(iter(paths), tmp_path / "sum.safetensors", iter([1, -2, 0.5]), rank_of_sum)
    a, b, c = (read_updates(path) for path in paths)
    total = read_updates(tmp_path / "sum.safetensors")
    expected_q = a["lora_unet_q"] - 2 * b["lora_unet_q"] + c["lora_unet_q"] / 2
    assert np.allclose(total["lora_unet_q"], expected_q, atol=1e-5)
    assert np.allclose(total["lora_unet_y"], c["lora_unet_y"] / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float64, torch.bfloat16), torch.float64),
    ],
)
def test_the_dtype_represents_all_factors(
    tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype], expected: torch.dtype
) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, dtype in zip(paths, dtypes, strict=True):
        factors = {"q.lora_A.weight": torch.randn(2, 6), "q.lora_B.weight": torch.randn(5, 2)}
        save_file({key: factor.to(dtype) for key, factor in factors.items()}, path)
    combine(paths, tmp_path / "sum.safetensors", rank=4)
    total = load_file(tmp_path / "sum.safetensors")
    assert {factor.dtype for factor in total.values()} == {expected}
    expected_update = read_updates(paths[0])["q"] + read_updates(paths[1])["q"]
    tolerance = 0.1 if expected is torch.bfloat16 else 1e-5
    assert np.allclose(
        read_updates(tmp_path / "sum.safetensors")["q"], expected_update, atol=tolerance
    )


def test_stacks_of_experts_are_added(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, targets in zip(paths, (["q_proj"], ["q_proj", "v_proj"]), strict=True):
        plain_adapter(
            path,
            tiny_mixtral(),
            target_modules=targets,
            target_parameters=["mlp.experts.down_proj"],
        )
    combine(paths, tmp_path / "sum", rank=16)
    actual = updates(tmp_path / "sum", tiny_mixtral)
    expected = dense_sum(tiny_mixtral, paths, [1, 1])
    assert actual.keys() == expected.keys()
    for name, update in actual.items():
        assert np.allclose(update.reshape(len(update), -1), expected[name], atol=1e-4)


def test_modules_to_save_are_kept_if_all_sources_have_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plain_adapter(tmp_path / name, modules_to_save=["lm_head"], target_modules=["q_proj"])
    first, second = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("a", "b"))
    heads = {key: tensor for key, tensor in first.items() if "lm_head" in key}
    assert heads
    save_file(second | heads, tmp_path / "b" / WEIGHTS_NAME)
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "sum")
    total = load_file(tmp_path / "sum" / WEIGHTS_NAME)
    assert all(torch.equal(total[key], head) for key, head in heads.items())

    changed_heads = {key: head + 1 for key, head in heads.items()}
    save_file(second | changed_heads, tmp_path / "b" / WEIGHTS_NAME)
    with pytest.raises(MatryoshkaError, match="lm_head"):
        combine([tmp_path / "a", tmp_path / "b"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def save_with_scale(file: Path, scale: float | None) -> None:
    """Write a layer of rank 2 whose scale is in the metadata alone."""
    configs = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 2 * (scale or 1)})
    metadata = {"lora_adapter_metadata": configs} if scale else None
    save_file(factors("transformer.q"), file, metadata)


@pytest.mark.parametrize(
    ("scales", "expected"),
    [((2.0, 2.0), 2.0), ((2.0, 1.0), 1.0), ((2.0, None), 1.0), ((None, 2.0), 1.0)],
)
def test_a_scale_in_the_metadata_stays_there(
    tmp_path: Path, scales: tuple[float | None, float | None], expected: float
) -> None:
    """ComfyUI ignores it, so it must not move into the factors unless the scales differ."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    update: Any = 0.0
    for path, scale in zip(paths, scales, strict=True):
        save_with_scale(path, scale)
        update += (scale or 1.0) * read_updates(path)["transformer.q"]
    combine(paths, tmp_path / "sum.safetensors", rank=4)
    (layer,) = info(tmp_path / "sum.safetensors").lora.layers
    assert layer.scale == expected
    total = read_updates(tmp_path / "sum.safetensors")["transformer.q"]  # ignores the metadata
    assert np.allclose(expected * total, update, atol=1e-5)


def test_a_layer_of_one_source_keeps_its_scale(tmp_path: Path) -> None:
    save_file(factors("transformer.k"), tmp_path / "a.safetensors")
    configs = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 4}'}
    save_file(factors("transformer.k", "transformer.q"), tmp_path / "b.safetensors", configs)
    combine([tmp_path / f"{name}.safetensors" for name in "ab"], tmp_path / "sum.safetensors")
    layers = info(tmp_path / "sum.safetensors").lora.layers
    assert {layer.name: layer.scale for layer in layers} == {
        "transformer.k": 1.0,
        "transformer.q": 2.0,
    }


def test_the_rank_is_at_most_the_sum_of_the_ranks(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "a", r=4, target_modules=["q_proj"])
    plain_adapter(tmp_path / "b", r=2, target_modules=["v_proj"])
    result = combine([tmp_path / "a", tmp_path / "b"], tmp_path / "sum", rank=6)
    assert json.loads((tmp_path / "sum" / CONFIG_NAME).read_text())["r"] == max(result.errors) == 6
    expected = dense_sum(tiny_llama, [tmp_path / "a", tmp_path / "b"], [1, 1])
    for name, update in updates(tmp_path / "sum").items():
        assert np.allclose(update, expected[name], atol=1e-5)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(factors("q", "k"), paths[0])
    save_file(factors("k", "v"), paths[1])
    single = combine([*paths, paths[1]], tmp_path / "sum.safetensors", [1, 1, -1], rank=6)
    assert max(single.errors) == 6
    with pytest.raises(MatryoshkaError, match="rank"):
        combine(paths, tmp_path / "other.safetensors", rank=5)


@pytest.mark.parametrize(("rank", "written"), [(None, 1), ("sum", 1), (4, 4)])
@pytest.mark.parametrize("kind", ["folders", "files"])
def test_an_adapter_minus_itself_is_zero_at_rank_1(
    kind: str, rank: Any, written: int, tmp_path: Path
) -> None:
    source, output = tmp_path / "a", tmp_path / "zero"
    plain_adapter(source)
    if kind == "files":
        source, output = tmp_path / "a.safetensors", tmp_path / "zero.safetensors"
        save_file(factors("q", "k"), source)
    with pytest.warns(UserWarning, match="cancel"):
        result = combine([source, source], output, [1, -1], rank)
    assert set(result.errors.values()) == {0.0}
    assert result.rank == written
    assert set(info(output).errors.values()) == {0.0}


@pytest.mark.parametrize("weights", [[0, 2], [2, 0]])
def test_a_source_of_weight_0_is_left_out(weights: list[float], tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    plain_adapter(paths[0], r=8, target_modules=["q_proj", "v_proj"])
    plain_adapter(paths[1], r=4, target_modules=["k_proj", "v_proj"])
    kept = paths[weights.index(2)]
    result = combine(paths, tmp_path / "sum", weights)
    assert result.rank == result.exact_rank == info(kept).lora.max_rank
    assert result.cosines.shape == (2, 2)
    expected = updates(kept)
    assert {name for name, update in updates(tmp_path / "sum").items() if update.any()} == {
        name for name, update in expected.items() if update.any()
    }
    for name, update in updates(tmp_path / "sum").items():
        assert np.allclose(update, 2 * expected[name], atol=1e-5)
    with pytest.raises(MatryoshkaError, match="weights"):
        combine(paths, tmp_path / "none", [0, 0])


@pytest.mark.parametrize("kind", ["folders", "files"])
def test_names_may_be_of_any_bytes(kind: str, tmp_path: Path) -> None:
    """A name that is not UTF-8 has lone surrogates, which no header can hold."""
    name = os.fsdecode(b"\xff")
    source, output = tmp_path / name, tmp_path / f"{name}-sum"
    if kind == "files":
        source, output = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-sum.safetensors"
        save_file(factors("q"), source, {"ss_network_dim": "2"})
    else:
        plain_adapter(source)
        (source / "README.md").write_text("---\nlicense: mit\n---\nA card.")
    result = combine([source, source], output)
    assert info(output).lora.max_rank == result.rank
    small = tmp_path / f"{name}-small{output.suffix}"
    export(output, small, 1)
    assert info(small).lora.max_rank == 1
    str(result).encode()  # can be printed
    for file in small.iterdir() if small.is_dir() else [small]:
        if file.suffix != ".safetensors":
            file.read_text(encoding="utf-8")
        else:
            load(file.read_bytes())


@pytest.mark.parametrize(
    ("config_change", "options", "keyword"),
    [
        ({}, {"weights": [1.0]}, "weights"),
        ({}, {"weights": [1, 10**400]}, "weights"),
        ({}, {"weights": [1, float("nan")]}, "weights"),
        ({}, {"weights": [1, None]}, "weights"),
        ({}, {"weights": "median"}, "weights"),
        ({}, {"weights": [1, 1e300]}, "weights"),
        ({}, {"rank": 13}, "rank"),
        ({}, {"rank": 0}, "rank"),
        ({"use_dora": True}, {}, "DoRA"),
        ({"base_model_name_or_path": "other"}, {}, "base_model_name_or_path"),
        ({"fan_in_fan_out": True}, {}, "fan_in_fan_out"),
        ({"peft_type": "LOHA"}, {}, "LOHA"),
    ],
)
def test_incompatible_folders_are_rejected(
    tmp_path: Path, config_change: dict[str, Any], options: dict[str, Any], keyword: str
) -> None:
    plain_adapter(tmp_path / "a", r=8)
    plain_adapter(tmp_path / "b", r=4)
    config_file = tmp_path / "b" / CONFIG_NAME
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | config_change))
    with pytest.raises(MatryoshkaError, match=keyword):
        combine([tmp_path / "a", tmp_path / "b"], tmp_path / "sum", **options)
    assert not (tmp_path / "sum").exists()


def test_base_models_that_are_not_named_are_equal(tmp_path: Path) -> None:
    for name, base_model in (("a", None), ("b", "")):
        plain_adapter(tmp_path / name)
        config_file = tmp_path / name / CONFIG_NAME
        config = json.loads(config_file.read_text())
        config_file.write_text(json.dumps(config | {"base_model_name_or_path": base_model}))
    assert combine([tmp_path / "a", tmp_path / "b"], tmp_path / "sum").path.is_dir()


def factors(*names: str, in_features: int = 6) -> dict[str, Tensor]:
    """Return the tensors of a single file with some layers."""
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, in_features)
        tensors[f"{name}.lora_B.weight"] = torch.randn(5, 2)
    return tensors


INCOMPATIBLE_FILES = {
    "shapes": (factors("q"), factors("q", in_features=7), "shapes"),
    "not finite": (
        factors("q"),
        factors("q") | {"q.lora_A.weight": torch.full((2, 6), torch.nan)},
        "NaN",
    ),
    "no common layer": (factors("q"), factors("model.q"), "key_format"),
    "two names of the UNet": (
        factors("lora_unet_down_blocks", "lora_te2_x"),
        factors("lora_unet_input_blocks", "lora_te2_x"),
        "key_format",
    ),
    "two names of CLIP": (
        factors("text_encoder.e", "lora_te2_x"),
        factors("text_encoder.text_model.e", "lora_te2_x"),
        "key_format",
    ),
    "two names of a model that is not known": (
        factors("lora_unet_double_blocks_0_x", "lora_te1_x"),
        factors("lora_transformer_transformer_blocks_0_x", "lora_te1_x"),
        "lora_transformer_transformer_blocks_0.*lora_unet_double_blocks_0",
    ),
    "Flux and Wan": (
        factors("lora_unet_vector_in_in_layer"),
        factors("lora_unet_blocks_0_ffn_0"),
        "different models: Wan, and Flux",
    ),
    "a layer without a name in the other format": (
        factors("lora_unet_vector_in_in_layer", "lora_te1_x"),
        factors("transformer.time_text_embed.text_embedder.linear_1"),
        "lora_te1_x",
    ),
    "two prefixes": (
        factors("diffusion_model.blocks.0.q", "text_encoder.x"),
        factors("transformer.blocks.0.attn.to_q", "text_encoder.x"),
        "key_format",
    ),
    "a bias of B": (factors("q") | {"q.lora_B.bias": torch.ones(5)}, factors("q"), "bias"),
    "a weight": (factors("q") | {"k.set_weight": torch.ones(5)}, factors("q"), "set_weight"),
    "DoRA": (factors("q", "k") | {"k.dora_scale": torch.ones(5)}, factors("q"), "dora_scale"),
    "shapes of changes": (
        factors("q") | {"k.diff": torch.ones(5)},
        factors("q") | {"k.diff": torch.ones(6)},
        "shapes",
    ),
    "factors and a change": (
        factors("q", "k"),
        factors("q") | {"k.diff": torch.ones(5, 6)},
        "diff",
    ),
    "two changes": (
        factors("q") | {"k.w_norm": torch.ones(5)},
        factors("q") | {"k.diff": torch.ones(5)},
        "w_norm",
    ),
    "a sum too large": (
        factors("q") | {"k.diff": torch.full((5,), 6e4).half()},
        factors("q") | {"k.diff": torch.full((5,), 6e4).half()},
        "large",
    ),
}


def test_changes_of_whole_weights_are_added(tmp_path: Path) -> None:
    """Programs multiply them by the strength only, whatever the alphas of the layers are."""
    torch.manual_seed(0)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    shapes = {"k.diff": (5, 6), "k.diff_b": (5,), "q.diff_b": (5,), "norm.w_norm": (4,)}
    first = {key: torch.randn(shape) for key, shape in shapes.items()}
    second = {key: torch.randn(shape) for key, shape in shapes.items() if key != "k.diff"}
    second["norm.b_norm"] = torch.randn(4).to(torch.float8_e4m3fn)
    save_file({**factors("q"), **first, "q.alpha": torch.tensor(8.0)}, paths[0])
    save_file({**factors("q"), **second}, paths[1])
    combine(paths, tmp_path / "sum.safetensors", [2, -0.5])
    written = load_file(tmp_path / "sum.safetensors")
    assert written["norm.b_norm"].dtype == torch.bfloat16
    for key in first.keys() | second.keys():
        expected = (
            2 * first.get(key, torch.zeros(())) - 0.5 * second.get(key, torch.zeros(())).float()
        )
        assert torch.allclose(written[key].float(), expected, atol=1e-6)


def test_lokr_and_lora_are_added_at_the_rank_of_the_lora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    w1, w2 = torch.randn(2, 3), torch.randn(4, 5)
    save_file({"q.lokr_w1": w1, "q.lokr_w2": w2}, paths[0])
    pair = {"q.lora_down.weight": torch.randn(3, 15), "q.lora_up.weight": torch.randn(8, 3)}
    save_file(pair, paths[1])
    total = np.kron(w1, w2) - 0.5 * (pair["q.lora_up.weight"] @ pair["q.lora_down.weight"]).numpy()
    combine(paths, tmp_path / "sum.safetensors", [1, -0.5])
    update = read_updates(tmp_path / "sum.safetensors")["q"]
    assert np.allclose(update, best(total, 3), atol=1e-5)
    with pytest.raises(MatryoshkaError, match="rank"):
        combine(paths[:1], tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "block", ["double_blocks_1", "single_blocks_0", "double_blocks_0_txt", "img_in"]
)
def test_files_of_one_key_format_may_have_different_layers(tmp_path: Path, block: str) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(factors("lora_unet_double_blocks_0_img", "lora_te1_x"), paths[0])
    save_file(factors(f"lora_unet_{block}", "lora_te1_x"), paths[1])
    assert combine(paths, tmp_path / "sum.safetensors").num_layers == 3


def test_fp16_can_represent_the_sum_of_small_adapters(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        plain_adapter(path, target_modules=["q_proj"], lora_alpha=1e-6)
        tensors = load_file(path / WEIGHTS_NAME)
        save_file({key: tensor.half() for key, tensor in tensors.items()}, path / WEIGHTS_NAME)
    combine(paths, tmp_path / "sum", rank=16)
    expected = dense_sum(tiny_llama, paths, [1, 1])
    for name, update in updates(tmp_path / "sum").items():
        error = np.linalg.norm(update - expected[name])
        assert error < 1e-3 * np.linalg.norm(expected[name])


@pytest.mark.parametrize("case", INCOMPATIBLE_FILES)
def test_incompatible_single_files_are_rejected(tmp_path: Path, case: str) -> None:
    first, second, keyword = INCOMPATIBLE_FILES[case]
    save_file(first, tmp_path / "a.safetensors")
    save_file(second, tmp_path / "b.safetensors")
    output = tmp_path / "sum.safetensors"
    with pytest.raises(MatryoshkaError, match=keyword):
        combine([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("sources", "weights"), [("a", None), (Path("a"), None), (["a", "b"], 2.0), (["a"], "1")]
)
def test_one_value_is_not_a_list(tmp_path: Path, sources: Any, weights: Any) -> None:
    with pytest.raises(MatryoshkaError, match="list"):
        combine(sources, tmp_path / "sum", weights)


@pytest.mark.parametrize(
    ("names", "output_name", "keyword"),
    [
        (["file.safetensors", "folder"], "sum.safetensors", "key_format"),
        (["file.safetensors"], "sum", "single file"),
        (["folder"], "sum.safetensors", "folder"),
        ([], "sum", "empty"),
    ],
)
def test_sources_and_output_are_of_one_kind(
    tmp_path: Path, names: list[str], output_name: str, keyword: str
) -> None:
    save_file(factors("q"), tmp_path / "file.safetensors")
    plain_adapter(tmp_path / "folder")
    output = tmp_path / output_name
    with pytest.raises(MatryoshkaError, match=keyword):
        combine([tmp_path / name for name in names], output)
    assert not output.exists()
