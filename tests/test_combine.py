"""Sums of adapters against NumPy's SVD of the dense sum that plain PEFT makes."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LINEAR_LAYERS, tiny_llama, tiny_mixtral
from peft import PeftModel
from safetensors.torch import load_file, save_file
from strangers import Mixed, file_updates, logits, plain_adapter, updates
from torch import Tensor

from matryoshka_lora import MatryoshkaError, combine, load
from matryoshka_lora.files.peft import CONFIG_NAME, WEIGHTS_NAME, open_adapter

MIXED = ["embedding", "convolution", "head"]


def drawn(folder: Path, seed: int) -> tuple[Any, list[Path], list[float]]:
    """Write two to four adapters of any ranks, scales and layers; return base, paths, weights."""
    draw, paths = random.Random(seed), list[Path]()
    base, names = (Mixed, MIXED) if seed % 2 else (tiny_llama, list(LINEAR_LAYERS))
    for number in range(draw.randint(2, 4)):
        torch.manual_seed(100 * seed + number)
        paths.append(folder / str(number))
        targets = draw.sample(names, draw.randint(2, len(names)))
        config = {"r": draw.choice([1, 2, 3, 5, 8]), "lora_alpha": draw.uniform(1, 20)}
        plain_adapter(
            paths[-1], base(), target_modules=targets, use_rslora=draw.random() < 0.5, **config
        )
    return base, paths, [draw.choice([1.0, 0.3, -0.7, 2.5]) for _ in paths]


def dense_sum(base: Any, paths: list[Path], weights: list[float]) -> dict[str, np.ndarray]:
    found: dict[str, Any] = {}
    for path, weight in zip(paths, weights, strict=True):
        for name, update in updates(path, base).items():
            found[name] = found.get(name, 0) + weight * update.reshape(len(update), -1)
    return found


def prefixes(folder: Path, rank: int) -> list[np.ndarray]:
    """The updates of the first columns of a file, as its config scales them, in no order."""
    state = load_file(folder / WEIGHTS_NAME)
    config = json.loads((folder / CONFIG_NAME).read_text())
    found = []
    for key, A in state.items():
        key_B = key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        if "_A" in key:
            a, b = A.double().flatten(1)[:rank], state[key_B].double().flatten(1)[:, :rank]
            found.append((b @ a * config["lora_alpha"] / config["r"]).numpy())
    return found


@pytest.mark.parametrize("seed", range(20))
def test_every_rank_is_the_best_one_of_the_dense_sum(tmp_path: Path, seed: int) -> None:
    base, paths, weights = drawn(tmp_path, seed)
    wanted = dense_sum(base, paths, weights)
    made = combine(paths, tmp_path / "sum", weights)
    values = [np.linalg.svd(each, compute_uv=False) for each in wanted.values()]
    whole = sum(float((each**2).sum()) for each in values)
    assert max(made.errors) == max(open_adapter(path).max_rank for path in paths)
    for rank, error in made.errors.items():
        optimum = sum(float((each[rank:] ** 2).sum()) for each in values)
        assert error == pytest.approx((optimum / whole) ** 0.5, abs=1e-6)
        kept = sum(float((each**2).sum()) for each in prefixes(tmp_path / "sum", rank))
        assert kept == pytest.approx(whole - optimum, rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_plain_peft_computes_the_sum(tmp_path: Path, seed: int) -> None:
    """At a rank that holds all of it; and the output is nested."""
    base, paths, weights = drawn(tmp_path, seed)
    wanted, model = dense_sum(base, paths, weights), base()
    ranks = Counter[str]()
    for path in paths:
        ranks.update({layer.name: layer.rank for layer in open_adapter(path).layers})
    made = combine(paths, tmp_path / "sum", weights, rank=max(ranks.values()))
    assert made.errors[max(ranks.values())] < 1e-6
    state: dict[str, Tensor] = model.state_dict()
    for name, update in wanted.items():
        state[name] += torch.from_numpy(update).reshape(state[name].shape).float()
    found = logits(PeftModel.from_pretrained(base(), tmp_path / "sum"))
    assert torch.allclose(found, logits(model), atol=1e-3, rtol=1e-4)
    adapter = load(base(), tmp_path / "sum", rank=2)
    assert adapter.order == "svd"


def test_single_files_stay_in_their_style(tmp_path: Path) -> None:
    parts = {"a": (4, 8.0, "x"), "b": (2, 1.0, "x"), "c": (3, 6.0, "y")}
    for name, (rank, alpha, extra) in parts.items():
        state = {}
        for layer in ("lora_unet_q", f"lora_unet_{extra}"):
            state[f"{layer}.lora_down.weight"] = torch.randn(rank, 6)
            state[f"{layer}.lora_up.weight"] = torch.randn(5, rank)
            state[f"{layer}.alpha"] = torch.tensor(alpha)
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in parts]
    combine(paths, tmp_path / "sum.safetensors", [1, -2, 0.5], rank=9)
    found, each = file_updates(tmp_path / "sum.safetensors"), [file_updates(p) for p in paths]
    q = each[0]["lora_unet_q"] - 2 * each[1]["lora_unet_q"] + each[2]["lora_unet_q"] / 2
    assert np.allclose(found["lora_unet_q"], q, atol=1e-5)
    assert np.allclose(found["lora_unet_y"], each[2]["lora_unet_y"] / 2, atol=1e-5)


def test_experts_stay_apart_from_the_other_layers(tmp_path: Path) -> None:
    for name, targets in (("a", ["q_proj"]), ("b", ["q_proj", "v_proj"])):
        options = {"target_modules": targets, "target_parameters": ["mlp.experts.down_proj"]}
        plain_adapter(tmp_path / name, tiny_mixtral(), **options)
    paths = [tmp_path / "a", tmp_path / "b"]
    combine(paths, tmp_path / "sum", rank=16)
    found, wanted = updates(tmp_path / "sum", tiny_mixtral), dense_sum(tiny_mixtral, paths, [1, 1])
    assert found.keys() == wanted.keys()
    for name, update in found.items():
        assert np.allclose(update.reshape(len(update), -1), wanted[name], atol=1e-4)


def test_modules_that_all_inputs_share_are_kept(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plain_adapter(tmp_path / name, modules_to_save=["lm_head"], target_modules=["q_proj"])
    one, other = ({**load_file(tmp_path / name / WEIGHTS_NAME)} for name in ("a", "b"))
    heads = [key for key in one if "lm_head" in key]
    save_file(other | {key: one[key] for key in heads}, tmp_path / "b" / WEIGHTS_NAME)
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "sum")
    made = load_file(tmp_path / "sum" / WEIGHTS_NAME)
    assert heads
    assert all(torch.equal(made[key], one[key]) for key in heads)
    save_file(other | {key: one[key] + 1 for key in heads}, tmp_path / "b" / WEIGHTS_NAME)
    with pytest.raises(MatryoshkaError, match=r"lm_head.*cannot be added"):
        combine([tmp_path / "a", tmp_path / "b"], tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"weights": [1.0]}, "1 weights for 2 adapters"),
        ({}, {"rank": 13}, "has no rank 13: choose one of 1 to 12"),
        ({"use_dora": True}, {}, "with use_dora its layers are more"),
        ({"base_model_name_or_path": "other"}, {}, "differ in base_model_name_or_path"),
        ({"fan_in_fan_out": True}, {}, "differ in fan_in_fan_out"),
        ({"peft_type": "LOHA"}, {}, "'LOHA' and not LoRA"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    for name, rank in (("a", 8), ("b", 4)):
        plain_adapter(tmp_path / name, r=rank)
    config = tmp_path / "b" / CONFIG_NAME
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(MatryoshkaError, match=message):
        combine([tmp_path / "a", tmp_path / "b"], tmp_path / "sum", **options)
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize(
    "what", ["shapes", "nan", "names", "parts", "clip", "kinds", "target", "bias"]
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, what: str) -> None:
    state = {"q.lora_A.weight": torch.randn(2, 6), "q.lora_B.weight": torch.randn(5, 2)}
    save_file(state, tmp_path / "a.safetensors")
    other = {"shapes": torch.randn(2, 7), "nan": torch.full((2, 6), torch.nan)}
    state["q.lora_A.weight"] = other.get(what, state["q.lora_A.weight"])
    if what in ("parts", "clip"):  # one part has two spellings, the other one a single one
        clip, unet = "text_encoder.{}e", "lora_unet_{}_blocks"
        for name, word, part in (("a", "down", ""), ("b", "input", "text_model.")):
            key = clip.format(part) if what == "clip" else unet.format(word)
            both = {f"{x}.{k}": t.clone() for k, t in state.items() for x in (key, "lora_te2_x")}
            save_file(both, tmp_path / f"{name}.safetensors")
        state = both
    if what == "bias":  # which a weight would not reach
        save_file({**state, "q.diff_b": torch.ones(5)}, tmp_path / "a.safetensors")
    if what == "names":
        state = {f"model.{key}": each for key, each in state.items()}
    save_file(state, tmp_path / "b.safetensors")
    plain_adapter(tmp_path / "folder")
    second = tmp_path / ("folder" if what == "kinds" else "b.safetensors")
    out = tmp_path / ("sum" if what == "target" else "sum.safetensors")
    message = {
        "shapes": r"the factors of q do not fit each other: \[2, 6\] in .*a.safetensors",
        "nan": "b.safetensors: the factors of q hold NaN",
        "names": "are for two models, or spell",
        **dict.fromkeys(("parts", "clip"), "spell their keys in two ways"),
        "kinds": "are a folder and a file: `matryoshka export FILE --style peft`",
        "bias": "hold q.diff_b, which is no pair of factors",
        "target": "stays what it is: name a file such as sum.safetensors",
    }[what]
    with pytest.raises(MatryoshkaError, match=message):
        combine([tmp_path / "a.safetensors", second], out)
    assert not out.exists()
