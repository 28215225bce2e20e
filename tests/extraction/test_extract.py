"""LoRAs of tuned models against NumPy's SVD of the change, and against the tuned model itself."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from helpers.models import tiny_llama
from helpers.outputs import names_in
from helpers.plain_peft import IDS, logits, updates
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from matryoshka_lora import MatryoshkaError, NotFiniteError, extract, info
from matryoshka_lora.extraction.factorize import factorize_change

CHANGED_LAYERS = ("q_proj", "down_proj", "o_proj")


def tune(model: Any, names: tuple[str, ...] = CHANGED_LAYERS, size: float = 0.05) -> Any:
    """Change some weights of a model by matrices with decreasing singular values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in names):
                matrix = torch.randn(weight.shape, generator=generator)
                if matrix.ndim > 1:
                    u, s, vh = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
                    matrix = (u * s * 0.8 ** torch.arange(len(s))) @ vh
                weight += size * matrix.reshape(weight.shape)
    return model


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Return the folders of a model before and after fine-tuning."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tiny_llama().save_pretrained(base)
    tune(tiny_llama(), (*CHANGED_LAYERS, "model.norm", "lm_head")).save_pretrained(tuned)
    return base, tuned


def changes(models: tuple[Path, Path]) -> dict[str, np.ndarray]:
    """Return the changes of the layers by the keys of their weights, float64."""
    base, tuned = (load_file(folder / "model.safetensors") for folder in models)
    return {
        key: (tuned[key].double() - base[key].double()).numpy()
        for key in base
        if any(name in key for name in CHANGED_LAYERS)
    }


def interrupt_after(factorized: list[str], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the names of the layers that are factorized to a list, and interrupt at a length."""

    def factorize(name: str, *args: Any) -> Any:
        if len(factorized) == limit:
            raise KeyboardInterrupt
        factorized.append(name)
        return factorize_change(name, *args)

    monkeypatch.setattr("matryoshka_lora.extraction.factorize.factorize_change", factorize)


def files_in(folder: Path) -> list[str]:
    return names_in(folder)


def test_every_rank_is_the_best_approximation_of_the_change(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    result = extract(*models, tmp_path / "lora", rank=16)
    expected = changes(models)
    values = [np.linalg.svd(change, compute_uv=False) for change in expected.values()]
    total = sum(float((s**2).sum()) for s in values)
    assert [*result.errors] == [1, 2, 4, 8, 16]
    for rank, error in result.errors.items():
        missing = sum(float((s[rank:] ** 2).sum()) for s in values)
        assert error == pytest.approx((missing / total) ** 0.5, rel=1e-4)
    actual = updates(tmp_path / "lora")
    assert actual.keys() == expected.keys()
    residual = sum(float(((expected[key] - actual[key]) ** 2).sum()) for key in expected)
    assert result.errors[16] == pytest.approx((residual / total) ** 0.5, rel=1e-4)
    assert result.unsaved_tensors == {"model.norm.weight": 64 * 4, "lm_head.weight": 96 * 64 * 4}
    assert info(tmp_path / "lora").lora.order == "svd"


TIED = {"tie_word_embeddings": True}
WITH_BIASES = {"attention_bias": True}


@pytest.mark.parametrize(
    ("base_config", "tuned_config", "saved_module", "changed_names"),
    [
        ({}, {}, "lm_head", ["lm_head"]),
        (TIED, TIED, "embed_tokens", ["embed_tokens"]),
        (TIED, {}, "embed_tokens", ["embed_tokens", "lm_head"]),
        (WITH_BIASES, WITH_BIASES, "k_proj", ["k_proj"]),
        (WITH_BIASES, WITH_BIASES, "k_proj", ["k_proj.bias"]),
    ],
)
def test_the_full_rank_with_modules_to_save_is_the_tuned_model(
    tmp_path: Path,
    base_config: dict[str, Any],
    tuned_config: dict[str, Any],
    saved_module: str,
    changed_names: list[str],
) -> None:
    """PEFT unties a head that shares its weight with the embedding."""
    base, tuned = tiny_llama(**base_config), tiny_llama(**tuned_config)
    tuned.load_state_dict(base.state_dict())
    base.save_pretrained(tmp_path / "base")
    names = ("q_proj.weight", "down_proj", "o_proj.weight", "model.norm", *changed_names)
    tune(tuned, names).save_pretrained(tmp_path / "tuned")
    extract(
        tmp_path / "base",
        tmp_path / "tuned",
        tmp_path / "lora",
        rank=200,
        modules_to_save=["norm", saved_module],
    )
    actual = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert torch.allclose(logits(actual), logits(tuned), atol=1e-4)


def test_t5_ties_several_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    base = T5ForConditionalGeneration(config).eval()
    base.save_pretrained(tmp_path / "base")
    tuned = tune(deepcopy(base), ("shared", "q.weight"), 0.5)
    tuned.save_pretrained(tmp_path / "tuned")
    output = tmp_path / "lora"
    extract(tmp_path / "base", tmp_path / "tuned", output, rank=16, modules_to_save=["shared"])
    actual = PeftModel.from_pretrained(base, output).eval()
    actual_logits = actual(input_ids=IDS, decoder_input_ids=IDS).logits
    assert torch.allclose(
        actual_logits, tuned(input_ids=IDS, decoder_input_ids=IDS).logits, atol=1e-4
    )


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=64)
    )


def test_gpt2_stores_transposed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "base", tmp_path / "tuned"
    tiny_gpt2().save_pretrained(models[0])
    tuned = tune(tiny_gpt2(), ("c_attn.weight", "c_proj.weight"))
    tuned.save_pretrained(models[1])
    # Without their config, the weights are not transposed. Such factors are not used again.
    interrupt_after([], 1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        extract(*(model / "model.safetensors" for model in models), tmp_path / "lora", rank=64)
    interrupt_after([], 99, monkeypatch)
    extract(*models, tmp_path / "lora", rank=64)
    actual = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora")
    assert torch.allclose(logits(actual), logits(tuned), atol=1e-4)


def test_a_share_and_a_size_give_each_layer_its_rank(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    result = extract(*models, tmp_path / "share", keep="90%")
    for key, change in changes(models).items():
        squares = np.linalg.svd(change, compute_uv=False) ** 2
        expected_rank = int((squares.cumsum() < 0.9 * squares.sum()).sum()) + 1
        assert result.ranks[key.removesuffix(".weight")] == expected_rank
    bounded = extract(*models, tmp_path / "bounded", rank=3, keep="90%")
    assert bounded.ranks == {name: min(rank, 3) for name, rank in result.ranks.items()}
    extract(*models, tmp_path / "size", max_bytes=30_000)
    assert (tmp_path / "size/adapter_model.safetensors").stat().st_size <= 30_000
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "size")


def ranks_for_error(spectra: dict[str, np.ndarray], costs: dict[str, int], max_error: float) -> Any:
    """Return the ranks and the error of the components with the largest gain that are needed."""
    total = sum(float((s**2).sum()) for s in spectra.values())
    missing = total - sum(float(s[0] ** 2) for s in spectra.values())
    gains = [
        (s[i] ** 2 / costs[name], name, i) for name, s in spectra.items() for i in range(1, len(s))
    ]
    ranks = dict.fromkeys(spectra, 1)
    for _, name, index in sorted(gains, reverse=True):
        if missing <= max_error**2 * total:
            break
        ranks[name] += 1
        missing -= float(spectra[name][index] ** 2)
    return ranks, (missing / total) ** 0.5


@pytest.mark.parametrize("max_error", ["60%", 0.05, 0.001])
def test_one_error_over_all_layers(
    tmp_path: Path, models: tuple[Path, Path], max_error: Any
) -> None:
    spectra = {
        key.removesuffix(".weight"): np.linalg.svd(change, compute_uv=False)
        for key, change in changes(models).items()
    }
    costs = {key.removesuffix(".weight"): sum(c.shape) for key, c in changes(models).items()}
    expected, error = ranks_for_error(spectra, costs, 0.6 if max_error == "60%" else max_error)
    result = extract(*models, tmp_path / "lora", error=max_error)
    assert result.ranks == expected
    assert result.errors == {max(expected.values()): pytest.approx(error, rel=1e-3)}
    assert result.notes == ()


def save_weights(folder: Path, *spectra: Tensor) -> tuple[Path, Path]:
    """Write layers of 400 x 300 whose changes have some singular values."""
    generator = torch.Generator().manual_seed(0)
    base: dict[str, Tensor] = {}
    tuned: dict[str, Tensor] = {}
    for index, values in enumerate(spectra):
        u, _ = torch.linalg.qr(torch.randn(400, len(values), generator=generator))
        v, _ = torch.linalg.qr(torch.randn(300, len(values), generator=generator))
        base[f"layer{index}.weight"] = torch.zeros(400, 300)
        tuned[f"layer{index}.weight"] = u * values @ v.T
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


def test_the_rank_grows_where_the_error_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first factors have rank 64. What they miss counts too, and is factorized if needed."""
    spectra = [torch.ones(200), 0.1 * 0.5 ** torch.arange(300.0)]
    models = save_weights(tmp_path, *spectra)
    factorized: list[str] = []
    interrupt_after(factorized, 99, monkeypatch)
    result = extract(*models, tmp_path / "lora", error="50%")
    assert factorized == ["layer0", "layer1", "layer0", "layer0"]
    total = 200 + float((spectra[1] ** 2).sum())
    expected = next(r for r in range(1, 201) if 200 - r + 0.01 / 3 <= 0.25 * total)
    assert result.ranks == {"layer0": expected, "layer1": 1}
    assert 0.49 < result.errors[expected] <= 0.5

    interrupt_after(factorized, 5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        extract(*models, tmp_path / "again", error="50%")
    interrupt_after(factorized, 99, monkeypatch)
    assert extract(*models, tmp_path / "again", error="50%").ranks == result.ranks
    assert factorized[4:] == ["layer0", "layer1", "layer0", "layer0"]


def test_a_rank_or_a_size_may_make_the_error_larger(tmp_path: Path) -> None:
    models = save_weights(tmp_path, torch.ones(200), 0.1 * torch.ones(300))
    result = extract(*models, tmp_path / "rank", 100, error="50%")
    assert result.ranks["layer0"] == 100
    assert result.errors[100] == pytest.approx((102 / 203) ** 0.5, rel=0.02)
    assert "rank" in result.notes[0]
    result = extract(*models, tmp_path / "size", error="50%", max_bytes=100_000)
    assert (tmp_path / "size/adapter_model.safetensors").stat().st_size <= 100_000
    assert "size" in result.notes[0]


@pytest.mark.parametrize("shape", [(300, 500), (600, 400)])
def test_a_large_layer_is_nearly_as_good_as_with_a_full_svd(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    """Large layers are factorized by a randomized SVD."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(shape[0], 300, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(shape[1], 300, generator=generator))
    values = torch.arange(1, 301) ** -0.7
    models = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for model, weight in zip(models, (torch.zeros(shape), u * values @ v.T), strict=True):
        save_file({"layer.weight": weight}, model)
    result = extract(*models, tmp_path / "lora", rank=40)
    expected = float((values[40:] ** 2).sum() / (values**2).sum())
    assert result.errors[40] ** 2 == pytest.approx(expected, rel=2e-3)
    for share in (0.5, 0.9):
        result = extract(*models, tmp_path / f"{share}", keep=share)
        (error,) = result.errors.values()
        assert error**2 <= (1 - share) * (1 + 1e-4)
    bounded = extract(*models, tmp_path / "bounded", rank=70, keep=0.9)
    assert bounded.ranks == {"layer": min(70, result.ranks["layer"])}


def test_rounding_is_not_a_change(tmp_path: Path) -> None:
    """Layers that were only rounded are left out; the rounding of the others is reported."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tune(tiny_llama(), ("q_proj",), 1e-3).bfloat16().save_pretrained(tmp_path / "tuned")
    result = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", rank=2)
    assert all("q_proj" in name for name in result.ranks)
    base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    unrounded = tune(tiny_llama(), ("q_proj",), 1e-3).state_dict()
    rounding = change = 0.0
    for name in result.ranks:
        weight = tuned[f"{name}.weight"].double()
        rounding += float((weight - unrounded[f"{name}.weight"]).square().sum())
        change += float((weight - base[f"{name}.weight"]).square().sum())
    assert result.rounding_share == pytest.approx(rounding / change, rel=0.1)


def test_zeros_have_no_rounding(tmp_path: Path) -> None:
    weight = torch.zeros(16, 16)
    weight[0, 0] = 1
    for name, factor in (("base", 1), ("tuned", 2)):
        save_file({"a.weight": (factor * weight).bfloat16()}, tmp_path / f"{name}.safetensors")
    files = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    result = extract(*files, tmp_path / "lora", rank=1)
    # The multiples of 2^-6 in [2, 4) have the variance 2^-12 / 12. The change is 1.
    assert result.rounding_share == pytest.approx(2**-12 / 12)


@pytest.mark.parametrize("difference", [1e-12, 1e-60])
def test_a_small_change_in_float64(tmp_path: Path, difference: float) -> None:
    base = torch.eye(16, dtype=torch.float64)
    base[0, 1] = 0
    tuned = base.clone()
    tuned[0, 1] = difference
    tuned[2, 2] += difference
    save_file({"a.weight": base}, tmp_path / "base.safetensors")
    save_file({"a.weight": tuned}, tmp_path / "tuned.safetensors")
    files = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    if difference == 1e-60:  # 0 in float32
        with pytest.raises(MatryoshkaError, match="changed"):
            extract(*files, tmp_path / "lora", rank=2)
    else:
        assert extract(*files, tmp_path / "lora", rank=2).errors[2] < 1e-3


def test_an_integer_tensor_that_became_floating_has_changed(tmp_path: Path) -> None:
    counts = torch.tensor([2**24 + 1])
    for name, count in (("base", counts), ("tuned", counts.float())):
        weight = torch.full((8, 8), 1.0 if name == "base" else 2.0)
        save_file({"a.weight": weight, "count": count}, tmp_path / f"{name}.safetensors")
    files = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    assert "count" in extract(*files, tmp_path / "lora", rank=1).unsaved_tensors


def test_an_interrupted_run_continues(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    factorized: list[str] = []
    interrupt_after(factorized, 4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        extract(*models, tmp_path / "lora", rank=4)
    assert not (tmp_path / "lora").exists()
    interrupt_after(factorized, 99, monkeypatch)
    # An error that the caller can correct keeps the factors as well.
    with pytest.raises(MatryoshkaError, match="max_bytes"):
        extract(*models, tmp_path / "lora", rank=4, max_bytes="1KB")
    result = extract(*models, tmp_path / "lora", rank=4)
    assert sorted(factorized) == sorted(result.ranks)
    assert files_in(tmp_path) == ["base", "lora", "tuned"]

    # A run with other settings does not continue it.
    interrupt_after(factorized, len(factorized) + 4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        extract(*models, tmp_path / "other", rank=4)
    interrupt_after(factorized, 99, monkeypatch)
    other = extract(*models, tmp_path / "other", rank=4, modules_to_save=["layers.0.mlp.down_proj"])
    assert result.ranks.keys() - other.ranks.keys() == {"model.layers.0.mlp.down_proj"}
    expected, actual = updates(tmp_path / "lora"), updates(tmp_path / "other")
    for name in other.ranks:
        assert np.allclose(actual[f"{name}.weight"], expected[f"{name}.weight"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no time of the change")
def test_a_replaced_model_is_factorized_again(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file has the size and the modification time of the old one, as after ``cp -p``."""
    interrupt_after([], 4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        extract(*models, tmp_path / "lora", rank=4)
    interrupt_after([], 99, monkeypatch)
    file = models[1] / "model.safetensors"
    old = file.stat()
    tune(tiny_llama(), size=0.5).save_pretrained(models[1])
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert file.stat().st_size == old.st_size
    extract(*models, tmp_path / "lora", rank=4)
    extract(*models, tmp_path / "expected", rank=4)
    actual, expected = updates(tmp_path / "lora"), updates(tmp_path / "expected")
    for key in expected:
        assert np.array_equal(actual[key], expected[key])


def test_revisions_of_a_repository(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    for revision, commit, folder in zip(("v1", "v2"), ("a" * 40, "b" * 40), models, strict=True):
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "lora"
    extract("owner/name", "owner/name", output, 2, base_revision="v1", tuned_revision="v2")
    extract(*models, tmp_path / "expected", 2)
    actual, expected = updates(output), updates(tmp_path / "expected")
    for key in expected:
        assert np.array_equal(actual[key], expected[key])
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "v1")


Q_KEY = "model.layers.0.self_attn.q_proj.weight"


def remove_a_shard(base: Path, tuned: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tuned / "model.safetensors.index.json").write_text(json.dumps(index))
    (tuned / "model.safetensors").rename(tuned / "model-1.safetensors")


def truncate_the_file(base: Path, tuned: Path) -> None:
    file = tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_the_weights(base: Path, tuned: Path) -> None:
    (tuned / "model.safetensors").unlink()


def empty_the_index(base: Path, tuned: Path) -> None:
    (tuned / "model.safetensors").unlink()
    (tuned / "model.safetensors.index.json").write_text("{}")


def damage_the_index(base: Path, tuned: Path) -> None:
    (tuned / "model.safetensors").unlink()
    (tuned / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')


def edit_base_config(**fields: Any) -> Callable[[Path, Path], None]:
    def edit_config(base: Path, tuned: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | fields))

    return edit_config


def edit(model: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = model / "model.safetensors"
    save_file(change(load_file(file)), file)


def edit_q(model: Path, change: Callable[[Tensor], Tensor]) -> None:
    edit(model, lambda tensors: {**tensors, Q_KEY: change(tensors[Q_KEY])})


def quantize(weight: Tensor) -> Tensor:
    return (100 * weight).to(torch.int8)


def without_the_second_block(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if "layers.1" not in key}


def with_other_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"x.{key}": tensor for key, tensor in tensors.items()}


def with_other_keys_in_both(base: Path, tuned: Path) -> None:
    edit(base, with_other_keys)
    edit(tuned, with_other_keys)


BROKEN_MODELS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "missing shard": (remove_a_shard, "model-2.safetensors"),
    "truncated": (truncate_the_file, "damaged"),
    "no weights": (remove_the_weights, "model.safetensors"),
    "empty index": (empty_the_index, "model.safetensors"),
    "not finite": (lambda _, tuned: edit_q(tuned, lambda q: q * torch.nan), "q_proj"),
    "other shape": (lambda _, tuned: edit_q(tuned, lambda q: q[:8].clone()), "q_proj"),
    "quantized base": (lambda base, _: edit_q(base, quantize), "quantized"),
    "quantized tuned model": (lambda _, tuned: edit_q(tuned, quantize), "quantized"),
    "fewer layers": (lambda _, tuned: edit(tuned, without_the_second_block), "layers.1"),
    "other model": (lambda _, tuned: edit(tuned, with_other_keys), "in common"),
    "names of another class": (with_other_keys_in_both, "class"),
    "list of shards": (damage_the_index, "model.safetensors"),
    "text as size": (edit_base_config(hidden_size="abc"), "config"),
    "no attention heads": (edit_base_config(num_attention_heads=0), "config"),
    "negative vocabulary": (edit_base_config(vocab_size=-5), "config"),
    "unknown activation": (edit_base_config(hidden_act="nope"), "config"),
}


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_broken_models_are_rejected(tmp_path: Path, models: tuple[Path, Path], case: str) -> None:
    break_models, keyword = BROKEN_MODELS[case]
    break_models(*models)
    error = NotFiniteError if case == "not finite" else MatryoshkaError
    with pytest.raises(error, match=keyword):
        extract(*models, tmp_path / "lora", rank=4)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    "class_names", [["pipeline"], ["logging"], ["LlamaConfig"], ["LlamaTokenizer"], {"a": 1}, "L"]
)
def test_what_is_no_model_class_is_not_called(
    tmp_path: Path, models: tuple[Path, Path], class_names: object
) -> None:
    edit_base_config(architectures=class_names)(*models)
    assert len(extract(*models, tmp_path / "lora", rank=2).ranks) == 6


def save_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / ".lora.extracting").mkdir()


def save_link(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "settings.json").write_text("{}")
    (tmp_path / ".lora.extracting").symlink_to(tmp_path / "foreign")


@pytest.mark.parametrize("save", [save_foreign_folder, save_link])
def test_a_foreign_folder_is_not_used(
    tmp_path: Path, models: tuple[Path, Path], save: Callable[[Path], None]
) -> None:
    save(tmp_path)
    thesis = tmp_path / ".lora.extracting" / "thesis.safetensors"
    thesis.write_text("mine")
    with pytest.raises(MatryoshkaError, match="extracting"):
        extract(*models, tmp_path / "lora", rank=2)
    assert thesis.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "output_name", "keyword"),
    [
        ({}, "lora", "max_bytes"),
        ({"rank": 0}, "lora", "rank"),
        ({"keep": "200%"}, "lora", "share"),
        ({"error": 2}, "lora", "share"),
        ({"error": "10%", "keep": "90%"}, "lora", "both"),
        ({"max_bytes": 100}, "lora", "max_bytes"),
        ({"rank": 4, "modules_to_save": ["embed"]}, "lora", "modules_to_save"),
        ({"rank": 4, "modules_to_save": ["norm", "no"]}, "lora", "modules_to_save"),
        ({"rank": 4, "modules_to_save": "lm_head"}, "lora", "list"),
        ({"rank": 4, "modules_to_save": 5}, "lora", "list"),
        ({"rank": 4}, "lora.safetensors", "key_format"),
        ({"rank": 4, "key_format": "kohya"}, "lora", "safetensors"),
        ({"rank": 4, "key_format": "peft"}, "lora.safetensors", "key_format"),
        ({"rank": 4, "key_format": "kohya"}, "lora.safetensors", "pipeline"),
    ],
)
def test_invalid_arguments_are_rejected(
    tmp_path: Path,
    models: tuple[Path, Path],
    options: dict[str, Any],
    output_name: str,
    keyword: str,
) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        extract(*models, tmp_path / output_name, **options)
    assert not (tmp_path / output_name).exists()


def test_an_unchanged_model_is_rejected(tmp_path: Path, models: tuple[Path, Path]) -> None:
    with pytest.raises(MatryoshkaError, match="changed"):
        extract(models[0], models[0], tmp_path / "lora", rank=4)


def test_two_processes_do_not_share_the_cache_of_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    tuned = tiny_llama()
    torch.nn.init.normal_(tuned.model.layers[0].mlp.down_proj.weight)
    tuned.save_pretrained(tmp_path / "tuned")

    def run(rank: int) -> None:
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", rank=rank)

    def meanwhile(*arguments: Any) -> Any:
        with pytest.raises(MatryoshkaError, match="Another process"):
            run(2)
        return factorize_change(*arguments)

    monkeypatch.setattr("matryoshka_lora.extraction.factorize.factorize_change", meanwhile)
    run(4)
    assert info(tmp_path / "lora").lora.max_rank == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora", "tuned"]
