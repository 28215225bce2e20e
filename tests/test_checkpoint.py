"""Save, load and export: the same numbers, the same settings, and files that any PEFT can read."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import OneLayer, lora_config, nest_as, nested_llama, randomize, tiny_llama, tiny_mixtral
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, export, load
from matryoshka_lora.formats.beside import read_spectra
from matryoshka_lora.formats.opened import hash_of_files, open_adapter
from matryoshka_lora.rules import Draw, Rule

IDS = torch.arange(3, 27).reshape(2, 12)
NESTINGS = {
    "none": Nesting([1, 2, 4, 8]),
    "rank": Nesting([2, 3, 5], scaling="rank", scale=3.0 / 5),
    "sqrt": Nesting([1, 3, 6], scaling="sqrt", scale=1.7 / 6**0.5),
}
NESTING = NESTINGS["sqrt"]
WEIGHTS, CONFIG, SIDECAR, CARD = "adapter_model.safetensors", "adapter_config.json", "nesting.json", "README.md"
SPECTRA, TRAINED = "spectra.safetensors", "trained.safetensors"

FORMS = ("paper", "trained", "reordered")
"""Saved as it was trained, P dropped; trained, and reordered on the way to the file; reordered in memory."""


def in_form(form: str, adapter: NestedAdapter) -> NestedAdapter:
    """An adapter that was made with deploy="paper", in another form."""
    if form != "paper":
        adapter.state.deploy = "reordered"
    if form == "reordered":
        adapter.reorder()
    return adapter


def as_deployed(adapter: NestedAdapter) -> NestedAdapter:
    """What a file of the adapter serves: the adapter itself, or a copy that is reordered by SVD."""
    served = NestedAdapter(copy.deepcopy(adapter.model), adapter.name)
    if not served.state.deployed:
        served.reorder()
    return served


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def at_every_rank(adapter: NestedAdapter, ids: Tensor = IDS) -> dict[int, Tensor]:
    """The outputs by rank; the rank is as before afterwards."""
    before, found = adapter.rank, {}
    for rank in adapter.ranks:
        adapter.set_rank(rank)
        found[rank] = logits(adapter.model, ids)
    adapter.set_rank(before)
    return found


def assert_same(found: dict[int, Tensor], expected: dict[int, Tensor], tolerance: float = 0.0) -> None:
    assert list(found) == list(expected)
    for rank, output in expected.items():
        error = (found[rank] - output).abs().max()
        assert error <= tolerance * output.abs().max(), f"rank {rank}: {error}"


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    # PEFT keeps these as a set, whose order is another one in every process.
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])
    return config


# Forms, scalings, rules


@pytest.mark.parametrize("scaling", NESTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_a_round_trip_keeps_every_rank(tmp_path: Path, form: str, scaling: str) -> None:
    saved = in_form(form, nested_llama(NESTINGS[scaling]))
    saved.save(tmp_path / "a")
    loaded = load(tiny_llama(), tmp_path / "a")
    assert (loaded.nesting, loaded.rule, loaded.state.deploy) == (saved.nesting, saved.rule, saved.state.deploy)
    assert loaded.rank == saved.nesting.max_rank
    assert loaded.state.reordered == (None if form == "paper" else "svd")
    assert_same(at_every_rank(loaded), at_every_rank(as_deployed(saved)))


@pytest.mark.parametrize("form", FORMS)
def test_a_second_round_trip_writes_the_same_files(tmp_path: Path, form: str) -> None:
    saved = in_form(form, nested_llama(NESTING))
    saved.save(tmp_path / "a")
    load(tiny_llama(), tmp_path / "a").save(tmp_path / "b")
    a, b = fingerprint(tmp_path / "a"), fingerprint(tmp_path / "b")
    assert set(a) == set(b) | ({SPECTRA} if form != "paper" else set())
    assert set(b) == {WEIGHTS, CONFIG, SIDECAR, CARD}
    assert a[WEIGHTS] == b[WEIGHTS]
    assert a[SIDECAR] == b[SIDECAR]
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")


@pytest.mark.parametrize("deploy", ["paper", "reordered"])
@pytest.mark.parametrize("rule", ["lora", "dylora", "dylora-all", "dylora-frozen", "matryoshka", "stratified"])
def test_the_rule_seed_and_ranks_come_back(tmp_path: Path, rule: str, deploy: Any) -> None:
    model = get_peft_model(tiny_llama(), lora_config(NESTING))
    randomize(model)
    saved = nest_as(model.eval(), NESTING, rule, deploy=deploy, seed=71)
    trained = tuple(range(1, 7)) if rule in ("dylora-all", "dylora-frozen") else (1, 3, 6)
    assert saved.ranks == trained
    saved.save(tmp_path)
    loaded, state = load(tiny_llama(), tmp_path), open_adapter(tmp_path).nested
    assert loaded.rule.name == state.rule.name == rule
    assert loaded.state.seed == state.seed == 71
    assert loaded.ranks == state.ranks == (trained if deploy == "paper" else (1, 2, 3, 4, 5, 6))
    assert_same(at_every_rank(loaded), at_every_rank(as_deployed(saved)))
    for step in range(3 if deploy == "paper" else 0):
        drawn, expected = (a.state.draw(step, 4) for a in (loaded, saved))
        assert torch.equal(drawn.diagonal, expected.diagonal)


def test_what_was_never_reordered_is_saved_reordered_and_says_so(tmp_path: Path) -> None:
    """Plain PEFT then reads the function that was trained, W + B P A, and memory stays as it is trained."""
    saved = nested_llama(NESTING, deploy="reordered")
    before, trained = at_every_rank(saved), factors_of(saved)
    for write in (lambda: saved.save(tmp_path / "a"), lambda: saved.export(tmp_path / "b", 6)):
        with pytest.warns(UserWarning, match="was not reordered after training: what is written is reordered by SVD"):
            write()
    assert saved.state.reordered is None
    assert_same(at_every_rank(saved), before)
    p = oracle.trained_p(NESTING.ranks, "sqrt", NESTING.scale)
    expected = logits(oracle.fold(tiny_llama(), trained, p))
    for folder in ("a", "b"):
        plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / folder).eval()
        assert_same({6: logits(plain)}, {6: expected}, tolerance=1e-5)


def factors_of(adapter: NestedAdapter) -> dict[str, Tensor]:
    """PEFT's state dict of the factors in memory, by the keys of its files."""
    return {
        name.replace(f".{adapter.name}.", "."): parameter.detach().clone()
        for name, parameter in adapter.model.named_parameters()
        if f".{adapter.name}." in name and "lora_" in name
    }


def test_the_paper_s_adapter_can_be_reordered_after_loading(tmp_path: Path) -> None:
    """By what was trained, P and all, though its own ranks have dropped P."""
    saved = nested_llama(NESTING)
    saved.save(tmp_path)
    loaded = load(tiny_llama(), tmp_path)
    p = oracle.trained_p(NESTING.ranks, "sqrt", NESTING.scale)
    expected = logits(oracle.fold(tiny_llama(), load_file(tmp_path / WEIGHTS), p))
    for adapter in (saved, loaded):
        assert (logits(adapter.model) - expected).abs().max() > 1e-2
        adapter.reorder()
        assert_same({6: logits(adapter.model)}, {6: expected}, tolerance=1e-5)
    assert_same(at_every_rank(loaded), at_every_rank(saved))


def test_rslora_in_the_config_is_read_back(tmp_path: Path) -> None:
    saved = nested_llama(NESTING, lora_alpha=1.7, use_rslora=True)
    assert saved.nesting.scale == pytest.approx(NESTING.scale)
    saved.save(tmp_path / "a")
    saved.export(tmp_path / "b", 3)
    assert config_of(tmp_path / "a")["use_rslora"] is True
    assert_same(at_every_rank(load(tiny_llama(), tmp_path / "a")), at_every_rank(saved))
    sliced = PeftModel.from_pretrained(tiny_llama(), tmp_path / "b").eval()
    assert_same({3: logits(sliced)}, {3: at_every_rank(saved)[3]}, tolerance=1e-5)


# Layer kinds


def one_layer(kind: str, seed: int, name: str = "default") -> NestedAdapter:
    config = lora_config(NESTING, target_modules=["layer"], fan_in_fan_out=kind == "Conv1D")
    model = get_peft_model(base_layer(kind), config, adapter_name=name)
    randomize(model, seed)
    return nest_as(model.eval(), NESTING, deploy="paper", adapter=name)


def base_layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return OneLayer(oracle.KINDS[kind].build()).float().eval()


def outputs(adapter: NestedAdapter, x: Tensor) -> dict[int, Tensor]:
    found = {}
    for rank in adapter.ranks:
        adapter.set_rank(rank)
        found[rank] = adapter.model(x).detach()
    return found


def batch(kind: str) -> Tensor:
    torch.manual_seed(1)
    x = oracle.KINDS[kind].batch(2)
    return x.float() if x.is_floating_point() else x


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_each_kind_of_layer_comes_back(tmp_path: Path, kind: str) -> None:
    saved, x = one_layer(kind, seed=1), batch(kind)
    saved.save(tmp_path / "a")
    expected = outputs(saved, x)
    assert (expected[1] - expected[6]).abs().max() > 0.1
    assert_same(outputs(load(base_layer(kind), tmp_path / "a"), x), expected)
    plain = PeftModel.from_pretrained(base_layer(kind), tmp_path / "a").eval()
    assert torch.equal(plain(x), expected[6])
    for rank in saved.ranks:
        export(tmp_path / "a", tmp_path / f"{rank}", rank)
        sliced = PeftModel.from_pretrained(base_layer(kind), tmp_path / f"{rank}").eval()
        assert_same({rank: sliced(x).detach()}, {rank: expected[rank]}, tolerance=1e-6)


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_each_kind_of_layer_is_loaded_beside_another_adapter(tmp_path: Path, kind: str) -> None:
    first, second, x = one_layer(kind, seed=1), one_layer(kind, seed=2), batch(kind)
    first.save(tmp_path / "1")
    second.save(tmp_path / "2")
    model = load(base_layer(kind), tmp_path / "1").model
    loaded = load(model, tmp_path / "2", adapter="second")
    assert_same(outputs(NestedAdapter(model), x), outputs(first, x))
    model.set_adapter("second")
    assert_same(outputs(loaded, x), outputs(second, x))


MOE_TARGETS = {
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "experts-and-attention": {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["experts.down_proj"]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("targets", MOE_TARGETS)
def test_experts_come_back(tmp_path: Path, targets: str, form: str) -> None:
    model = get_peft_model(tiny_mixtral(), lora_config(NESTING, task_type="CAUSAL_LM", **MOE_TARGETS[targets]))
    randomize(model)
    saved = in_form(form, nest_as(model.eval(), NESTING, deploy="paper"))
    saved.save(tmp_path / "a")
    loaded = load(tiny_mixtral(), tmp_path / "a")
    assert_same(at_every_rank(loaded), at_every_rank(as_deployed(saved)))
    plain = PeftModel.from_pretrained(tiny_mixtral(), tmp_path / "a").eval()
    assert torch.equal(logits(plain), logits(loaded.model))
    export(tmp_path / "a", tmp_path / "3", 3)
    sliced = PeftModel.from_pretrained(tiny_mixtral(), tmp_path / "3").eval()
    assert_same({3: logits(sliced)}, {3: at_every_rank(loaded)[3]}, tolerance=1e-5)


# What an adapter may carry beside its factors


def base_with_biases(tied: bool = False) -> Any:
    model = tiny_llama(attention_bias=True, tie_word_embeddings=tied)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


EXTRAS: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "tied-modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tied-embedding-to_save": {"modules_to_save": ["embed_tokens"]},
    "bias-all": {"bias": "all"},
    "bias-lora_only": {"bias": "lora_only"},
    "trainable_token_indices": {"trainable_token_indices": [3, 5, 8]},
    "tied-trainable_token_indices": {"trainable_token_indices": {"embed_tokens": [3, 5, 8]}},
    "everything": {"modules_to_save": ["norm"], "bias": "all", "trainable_token_indices": [3, 5]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tied-embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tied-head": {"target_modules": ["lm_head", "q_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "pattern": {"target_modules": r".*\.(q|down)_proj"},
    "open-pattern": {"target_modules": r".*q_proj.*"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "exclude_modules": {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "dropout": {"lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def with_extra(extra: str, deploy: Any = "paper") -> NestedAdapter:
    """An adapter all of whose trained numbers are random, the ones beside the factors too."""
    model = get_peft_model(base_with_biases(extra.startswith("tied")), lora_config(NESTING, **EXTRAS[extra]))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return nest_as(model.eval(), NESTING, deploy=deploy)


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_was_trained_beside_the_factors_comes_back(tmp_path: Path, extra: str) -> None:
    saved, tied = with_extra(extra), extra.startswith("tied")
    saved.save(tmp_path / "a")
    plain = PeftModel.from_pretrained(base_with_biases(tied), tmp_path / "a").eval()
    assert torch.equal(logits(plain), logits(saved.model))
    loaded = load(base_with_biases(tied), tmp_path / "a", adapter="mine")
    assert_same(at_every_rank(loaded), at_every_rank(saved))
    export(tmp_path / "a", tmp_path / "3", 3)
    sliced = PeftModel.from_pretrained(base_with_biases(tied), tmp_path / "3").eval()
    assert_same({3: logits(sliced)}, {3: at_every_rank(saved)[3]}, tolerance=1e-5)


@pytest.mark.parametrize("extra", EXTRAS)
def test_it_comes_back_beside_another_adapter_too(tmp_path: Path, extra: str) -> None:
    saved, tied = with_extra(extra), extra.startswith("tied")
    saved.save(tmp_path / "a")
    # PEFT gives biases to one adapter only, so the first has none.
    first = get_peft_model(base_with_biases(tied), lora_config(NESTING, target_modules=["q_proj", "o_proj"]))
    randomize(first, seed=9)
    loaded = load(first, tmp_path / "a", adapter="second")
    loaded.model.set_adapter("second")
    assert_same(at_every_rank(loaded), at_every_rank(saved))


@pytest.mark.parametrize("deploy", ["paper", "reordered"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_a_checkpoint_of_the_trainer_comes_back(tmp_path: Path, extra: str, deploy: str) -> None:
    """The Trainer asks PEFT to write the files. Every rank can be used, and training goes on from the same bits."""
    saved, tied = with_extra(extra, deploy), extra.startswith("tied")
    folder = tmp_path / "checkpoint-1"
    saved.model.save_pretrained(folder)
    assert (folder / TRAINED).exists() == (deploy == "reordered")
    loaded = load(base_with_biases(tied), folder)
    assert_same(at_every_rank(loaded), at_every_rank(as_deployed(saved)))
    export(folder, tmp_path / "3", 3)
    sliced = PeftModel.from_pretrained(base_with_biases(tied), tmp_path / "3").eval()
    assert_same({3: logits(sliced)}, {3: at_every_rank(as_deployed(saved))[3]}, tolerance=1e-5)
    going_on = load(base_with_biases(tied), folder, trainable=True)
    going_on.model.eval()
    assert going_on.state == saved.state
    assert_same(at_every_rank(going_on), at_every_rank(saved))


def test_what_can_be_nested_can_be_loaded_again(tmp_path: Path) -> None:
    """Replicated layers are a target that PEFT builds itself: load them, or refuse to nest them."""
    model = get_peft_model(tiny_llama(), lora_config(NESTING, layer_replication=[[0, 2], [1, 2]]))
    randomize(model)
    try:
        saved = nest_as(model.eval(), NESTING)
    except MatryoshkaError:
        return
    saved.save(tmp_path)
    assert_same(at_every_rank(load(tiny_llama(), tmp_path)), at_every_rank(saved))


# Names, paths, ranks, dtypes


# PEFT itself takes all of these.
@pytest.mark.parametrize("name", ["default", "other", "base", "0", "lora_A", "weight", "mit leerzeichen", "übung"])
def test_an_adapter_may_have_any_name_that_peft_takes(tmp_path: Path, name: str) -> None:
    model = get_peft_model(tiny_llama(), lora_config(NESTING), adapter_name=name)
    randomize(model)
    saved = nest_as(model.eval(), NESTING, deploy="paper", adapter=name)
    saved.save(tmp_path / "a")
    assert_same(at_every_rank(load(tiny_llama(), tmp_path / "a")), at_every_rank(saved))
    renamed = load(tiny_llama(), tmp_path / "a", adapter=name)
    assert renamed.name == name
    assert list(renamed.model.peft_config) == [name]
    assert_same(at_every_rank(renamed), at_every_rank(saved))


@pytest.mark.parametrize("as_path", [str, Path, lambda path: f"{path}/", lambda path: os.path.relpath(path)])
def test_paths_of_all_kinds(tmp_path: Path, as_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "zwei Wörter" / "a"
    saved = nested_llama(NESTING)
    saved.save(as_path(folder))
    export(as_path(folder), as_path(folder.parent / "3"), 3)
    assert_same(at_every_rank(load(tiny_llama(), as_path(folder))), at_every_rank(saved))
    assert config_of(folder.parent / "3")["r"] == 3


def test_a_link_to_an_adapter_is_followed(tmp_path: Path) -> None:
    saved = nested_llama(NESTING)
    saved.save(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert_same(at_every_rank(load(tiny_llama(), tmp_path / "link")), at_every_rank(saved))


def test_loading_at_a_rank(tmp_path: Path) -> None:
    saved = nested_llama(NESTING)
    saved.save(tmp_path)
    loaded = load(tiny_llama(), tmp_path, rank=3)
    assert loaded.rank == 3
    assert torch.equal(logits(loaded.model), at_every_rank(saved)[3])
    some = load(tiny_llama(), tmp_path, rank={"q_proj": 1, "mlp.*": 3})
    saved.set_rank({"q_proj": 1, "mlp.*": 3})
    assert some.rank == saved.rank
    assert torch.equal(logits(some.model), logits(saved.model))


def test_the_chosen_rank_and_a_merge_do_not_change_what_is_saved(tmp_path: Path) -> None:
    saved = nested_llama(NESTING)
    saved.save(tmp_path / "a")
    saved.set_rank(1)
    saved.save(tmp_path / "b")
    saved.merge(3)
    saved.save(tmp_path / "c")
    saved.export(tmp_path / "d", 6)
    a = fingerprint(tmp_path / "a")
    assert a[WEIGHTS] == fingerprint(tmp_path / "b")[WEIGHTS] == fingerprint(tmp_path / "c")[WEIGHTS]
    assert a[WEIGHTS] == fingerprint(tmp_path / "d")[WEIGHTS]


@pytest.mark.parametrize("form", FORMS)
def test_a_half_precision_base_gets_the_same_fp32_factors(tmp_path: Path, form: str) -> None:
    saved = in_form(form, nested_llama(NESTING))
    saved.save(tmp_path / "a")
    loaded = load(tiny_llama().bfloat16(), tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert fingerprint(tmp_path / "a")[WEIGHTS] == fingerprint(tmp_path / "b")[WEIGHTS]
    plain = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path / "a").eval()
    assert torch.equal(logits(plain), logits(loaded.model))


def test_half_precision_factors_are_written_as_they_are(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama().bfloat16(), lora_config(NESTING), autocast_adapter_dtype=False)
    randomize(model)
    saved = nest_as(model.eval(), NESTING, deploy="paper")
    saved.save(tmp_path)
    written = load_file(tmp_path / WEIGHTS)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    loaded = load(tiny_llama().bfloat16(), tmp_path)
    factors = {name.replace(".default", ""): p for name, p in loaded.model.named_parameters() if "lora_" in name}
    assert factors.keys() == written.keys()
    assert all(torch.equal(factors[key].float(), tensor.float()) for key, tensor in written.items())


# Several adapters, training on


def test_a_second_adapter_leaves_the_first_alone(tmp_path: Path) -> None:
    first = nested_llama(NESTING)
    second = nested_llama(NESTINGS["none"], target_modules=["q_proj", "up_proj"])
    randomize(second.model, seed=5)
    second.reorder()
    second.save(tmp_path)
    before = at_every_rank(first)
    loaded = load(first.model, tmp_path, rank=5, adapter="second")
    assert loaded.model is first.model
    assert first.model.active_adapter == "default"
    assert_same(at_every_rank(first), before)
    loaded.model.set_adapter("second")
    assert torch.equal(logits(loaded.model), at_every_rank(second)[5])
    loaded.save(tmp_path / "again")
    assert fingerprint(tmp_path / "again")[WEIGHTS] == fingerprint(tmp_path)[WEIGHTS]
    loaded.model.delete_adapter("second")
    assert_same(at_every_rank(first), before)


def test_a_nested_adapter_beside_a_plain_one(tmp_path: Path) -> None:
    saved = nested_llama(NESTING)
    saved.save(tmp_path)
    plain = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "gate_proj"]))
    randomize(plain, seed=6)
    plain.eval()
    before = logits(plain)
    loaded = load(plain, tmp_path, adapter="nested")
    assert torch.equal(logits(plain), before)
    plain.set_adapter("nested")
    assert_same(at_every_rank(loaded), at_every_rank(saved))


def test_an_adapter_is_loaded_for_use_or_for_training(tmp_path: Path) -> None:
    nested_llama(NESTING).save(tmp_path)
    used = load(tiny_llama().train(), tmp_path)
    assert not used.model.training
    assert not any(parameter.requires_grad for parameter in used.model.parameters())
    trained = load(tiny_llama(), tmp_path, trainable=True)
    learning = {name for name, parameter in trained.model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in trained.model.named_parameters() if "lora_" in name}
    trained.save(tmp_path / "again")
    assert config_of(tmp_path / "again")["inference_mode"] is True


def train_one_step(adapter: NestedAdapter) -> None:
    adapter.model.train()
    adapter.draw(step=4, rows=len(IDS))
    learning = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    adapter.model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    adapter.model.eval()


@pytest.mark.parametrize("deploy", ["paper", "reordered"])
@pytest.mark.parametrize("rule", ["matryoshka", "dylora", "dylora-frozen", "stratified"])
def test_training_goes_on_where_it_stopped(tmp_path: Path, rule: str, deploy: str) -> None:
    saved = nested_llama(NESTING, rule, deploy)
    saved.model.save_pretrained(tmp_path)
    before = at_every_rank(saved)
    base = tiny_llama()
    loaded = load(base, tmp_path, trainable=True)
    train_one_step(saved)
    train_one_step(loaded)
    after = at_every_rank(loaded)
    assert_same(after, at_every_rank(saved))
    assert (after[6] - before[6]).abs().max() > 1e-4
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    assert all(torch.equal(weights[name], tensor) for name, tensor in tiny_llama().state_dict().items())


@pytest.mark.parametrize("deploy", ["paper", "reordered"])
@pytest.mark.parametrize(("r", "alpha"), [(6, 1.7), (5, 16)])
def test_a_checkpoint_is_read_back_into_the_adapter_that_wrote_it(
    tmp_path: Path, deploy: str, r: int, alpha: float
) -> None:
    """As the Trainer resumes, and takes the best one. 16 / sqrt(5) times 5, over 5, is another number than before."""
    nesting = Nesting([1, 3, r], "sqrt", alpha / r**0.5)
    adapter = nested_llama(nesting, deploy=deploy, lora_alpha=alpha, use_rslora=True)
    before = at_every_rank(adapter)
    adapter.model.save_pretrained(tmp_path)
    randomize(adapter.model, seed=5)
    assert (at_every_rank(adapter)[3] - before[3]).abs().max() > 1e-2
    adapter.model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert_same(at_every_rank(adapter), before)
    other = nested_llama(Nesting([1, 2, r], "sqrt", nesting.scale), lora_alpha=alpha, use_rslora=True)
    with pytest.raises(MatryoshkaError, match="another nesting or rule"):
        other.model.load_adapter(str(tmp_path), "default")


def test_nothing_is_left_of_the_factors_of_an_older_training(tmp_path: Path) -> None:
    """Training would go on from them, in the place of the adapter that is there."""
    nested_llama(NESTING, deploy="reordered").model.save_pretrained(tmp_path)
    assert (tmp_path / TRAINED).exists()
    adapter = nested_llama(NESTING, deploy="reordered")
    randomize(adapter.model, seed=5)
    adapter.reorder()
    adapter.save(tmp_path)
    loaded = load(tiny_llama(), tmp_path, trainable=True)
    loaded.model.eval()
    there = at_every_rank(adapter)
    assert_same(at_every_rank(loaded), {rank: there[rank] for rank in NESTING.ranks})


def test_an_order_ends_where_training_goes_on(tmp_path: Path) -> None:
    """Else what is saved would be said to be reordered, and its low ranks would be those of before."""
    adapter = nested_llama(NESTING, deploy="reordered")
    adapter.reorder()
    adapter.save(tmp_path / "adapter")
    loaded = load(tiny_llama(), tmp_path / "adapter", trainable=True)
    assert (loaded.reordered, loaded.rule.name, loaded.ranks) == (False, "lora", NESTING.ranks)
    with pytest.warns(UserWarning, match="was reordered, and is trained on: its order is lost"):
        adapter.draw(0)
    for one in (adapter, loaded):
        one.model.eval()
        assert not one.reordered
        randomize(one.model, seed=7)
        with pytest.warns(UserWarning, match="was not reordered after training: what is written is reordered by SVD"):
            one.save(tmp_path / "again")
        one.reorder()
        assert_same(at_every_rank(load(tiny_llama(), tmp_path / "again")), at_every_rank(one), 1e-5)


def test_a_checkpoint_of_a_second_training_is_read_back(tmp_path: Path) -> None:
    """As the Trainer resumes: into the adapter as it was before the first step of that training."""
    adapter, again = (nested_llama(NESTING, deploy="reordered") for _ in range(2))
    for one in (adapter, again):
        one.reorder()
    with pytest.warns(UserWarning, match="its order is lost"):
        train_one_step(adapter)
    adapter.model.save_pretrained(tmp_path)
    again.model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert (again.reordered, again.rule.name, again.state.spectra) == (False, "lora", None)
    assert_same(at_every_rank(again), at_every_rank(adapter))


def test_singular_values_of_other_factors_are_not_saved(tmp_path: Path) -> None:
    adapter, other = (nested_llama(NESTING, deploy="reordered") for _ in range(2))
    randomize(other.model, seed=9)
    for one in (adapter, other):
        one.reorder()
    other.save(tmp_path / "other")
    adapter.model.load_adapter(str(tmp_path / "other"), "default")
    adapter.save(tmp_path / "out")
    assert read_spectra(open_adapter(tmp_path / "out")) is None


def test_singular_values_that_were_found_in_memory_are_saved(tmp_path: Path) -> None:
    adapter = nested_llama(NESTING, deploy="reordered")
    spectra = adapter.reorder()
    adapter.save(tmp_path)
    written = read_spectra(open_adapter(tmp_path))
    assert written is not None
    for name, values in spectra.items():
        torch.testing.assert_close(written[name], values, rtol=1e-6, atol=0)


def test_a_second_adapter_can_be_trained(tmp_path: Path) -> None:
    saved = nested_llama(NESTING)
    saved.save(tmp_path)
    first = nested_llama(NESTINGS["none"], target_modules=["q_proj"])
    before = at_every_rank(first)
    loaded = load(first.model, tmp_path, adapter="second", trainable=True)
    loaded.model.set_adapter("second")
    train_one_step(saved)
    train_one_step(loaded)
    assert_same(at_every_rank(loaded), at_every_rank(saved))
    loaded.model.set_adapter("default")
    assert_same(at_every_rank(first), before)


# The files


@pytest.mark.parametrize("form", FORMS)
def test_the_files_of_an_adapter(tmp_path: Path, form: str) -> None:
    saved = in_form(form, nested_llama(NESTING))
    saved.save(tmp_path)
    assert set(fingerprint(tmp_path)) == {WEIGHTS, CONFIG, SIDECAR, CARD} | ({SPECTRA} if form != "paper" else set())
    said = json.loads((tmp_path / SIDECAR).read_text())
    assert said.pop("weights") == hash_of_files(open_adapter(tmp_path))
    assert said == {
        "format_version": 2,
        "ranks": [1, 3, 6],
        "scaling": "sqrt",
        "rule": "matryoshka",
        "seed": 0,
        "deploy": "paper" if form == "paper" else "reordered",
        "reordered": None if form == "paper" else "svd",
    }
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(key.startswith("base_model.model.model.layers.") for key in file.keys())  # noqa: SIM118
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.inference_mode) == (6, pytest.approx(1.7 * 6**0.5), True)


def test_saving_changes_neither_model_nor_config(tmp_path: Path) -> None:
    saved = nested_llama(NESTING, deploy="reordered", modules_to_save=["norm"])
    config = copy.deepcopy(saved.model.peft_config["default"])
    weights = {name: tensor.clone() for name, tensor in saved.model.state_dict().items()}
    saved.save(tmp_path / "a")
    saved.export(tmp_path / "b", 3)
    assert saved.model.peft_config["default"] == config
    assert (saved.state.deploy, saved.state.reordered) == ("reordered", None)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in saved.model.state_dict().items())


def test_reading_changes_no_file(tmp_path: Path) -> None:
    nested_llama(NESTING).save(tmp_path / "a")
    before = fingerprint(tmp_path)
    load(tiny_llama(), tmp_path / "a")
    open_adapter(tmp_path / "a").tensors()
    export(tmp_path / "a", tmp_path / "b", 3)
    assert {name: value for name, value in fingerprint(tmp_path).items() if name.startswith("a/")} == before


@pytest.mark.parametrize("form", FORMS)
def test_exporting_from_the_file_is_exporting_from_the_model(tmp_path: Path, form: str) -> None:
    saved = in_form(form, nested_llama(NESTING, modules_to_save=["norm"]))
    saved.save(tmp_path / "a")
    for rank in NESTING.ranks if form == "paper" else range(1, 7):
        saved.export(tmp_path / "model", rank, overwrite=True)
        export(tmp_path / "a", tmp_path / "file", rank, overwrite=True)
        assert set(fingerprint(tmp_path / "model")) == {WEIGHTS, CONFIG, CARD}
        assert fingerprint(tmp_path / "model")[WEIGHTS] == fingerprint(tmp_path / "file")[WEIGHTS]
        assert config_of(tmp_path / "model") == config_of(tmp_path / "file")


@pytest.mark.parametrize(("form", "rank"), [("paper", 3), ("trained", 3), ("reordered", 4)])
def test_a_slice_is_an_ordinary_adapter(tmp_path: Path, form: str, rank: int) -> None:
    lora: dict[str, Any] = {"lora_alpha": 1.7, "use_rslora": True, "init_lora_weights": "gaussian", "lora_dropout": 0.1}
    in_form(form, nested_llama(NESTING, **lora)).export(tmp_path, rank)
    config = config_of(tmp_path)
    assert config["r"] == rank
    # A reordered prefix has the scale of the whole adapter; the paper's has that of its rank.
    assert config["lora_alpha"] == pytest.approx(rank * 1.7 / (3 if form == "paper" else 6) ** 0.5)
    assert config["use_rslora"] is False
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["inference_mode"] is True
    assert config["init_lora_weights"] is True
    assert config["lora_dropout"] == 0.1
    assert config["peft_type"] == "LORA"
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        assert tensor.shape[0 if "lora_A" in key else 1] == rank
        assert tensor.is_contiguous()


# What is there already


def test_an_adapter_is_overwritten_and_its_neighbours_stay(tmp_path: Path) -> None:
    nested_llama(NESTINGS["none"], deploy="reordered").save(tmp_path)
    (tmp_path / CARD).write_text("mine")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / SIDECAR).write_text("its own")
    saved = nested_llama(NESTING)
    saved.save(tmp_path)
    assert set(fingerprint(tmp_path)) == {WEIGHTS, CONFIG, SIDECAR, CARD, f"checkpoint-2/{SIDECAR}"}
    assert (tmp_path / CARD).read_text() == "mine"
    assert (tmp_path / "checkpoint-2" / SIDECAR).read_text() == "its own"
    assert_same(at_every_rank(load(tiny_llama(), tmp_path)), at_every_rank(saved))


def test_an_adapter_is_saved_over_the_file_that_it_was_loaded_from(tmp_path: Path) -> None:
    nested_llama(NESTING).save(tmp_path)
    loaded = load(tiny_llama(), tmp_path)
    before = at_every_rank(loaded)
    loaded.reorder()
    loaded.save(tmp_path)
    again = load(tiny_llama(), tmp_path)
    assert again.reordered
    assert_same(at_every_rank(again), at_every_rank(loaded))
    assert (at_every_rank(again)[1] - before[1]).abs().max() > 1e-3


def test_a_slice_over_a_nested_adapter_is_no_longer_taken_for_one(tmp_path: Path) -> None:
    nested_llama(NESTINGS["none"]).save(tmp_path)
    saved = nested_llama(NESTING)
    saved.export(tmp_path, 3, overwrite=True)
    assert set(fingerprint(tmp_path)) == {WEIGHTS, CONFIG, CARD}
    with pytest.raises(MatryoshkaError, match=r"is not a nested adapter, for it has no nesting\.json"):
        load(tiny_llama(), tmp_path)
    sliced = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert_same({3: logits(sliced)}, {3: at_every_rank(saved)[3]}, tolerance=1e-5)


def test_an_adapter_over_a_slice_is_nested(tmp_path: Path) -> None:
    saved = nested_llama(NESTING)
    saved.export(tmp_path, 3)
    saved.save(tmp_path)
    assert_same(at_every_rank(load(tiny_llama(), tmp_path)), at_every_rank(saved))


def test_a_slice_is_not_exported_over_its_own_source(tmp_path: Path) -> None:
    """The other ranks would be gone for good, and nobody who types the same path twice means that."""
    nested_llama(NESTING).save(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = fingerprint(tmp_path / "a")
    for target in (tmp_path / "a", tmp_path / "b" / ".." / "a", tmp_path / "link"):
        with pytest.raises(MatryoshkaError, match="another"):
            export(tmp_path / "a", target, 3)
        assert fingerprint(tmp_path / "a") == before


def saves(path: str) -> None:
    nested_llama(NESTING).save(path)
    nested_llama(NESTING, deploy="reordered").save(path + "-reordered")
    nested_llama(NESTING).export(path + "-slice", 3)


def test_the_same_adapter_is_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Evaluations are known by them. Python's sets have another order in each process."""
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    code = f"from test_checkpoint import saves; saves({str(tmp_path / 'other')!r})"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parent, check=True)
    saves(str(tmp_path / "this"))
    for kind in ("", "-reordered", "-slice"):
        assert fingerprint(tmp_path / f"this{kind}") == fingerprint(tmp_path / f"other{kind}")


@pytest.mark.parametrize("name", ["mine", "matryoshka"])
def test_a_rule_of_one_s_own_stands_in_no_file(name: str, tmp_path: Path) -> None:
    """What is reordered needs none; what training would go on from is refused."""
    rule = Rule(name, lambda nesting, generator, rows: Draw(nesting.diagonal() * 2), fixed=True)
    model: Any = get_peft_model(tiny_llama(), lora_config(NESTING))
    randomize(model)
    adapter = nest_as(model.eval(), NESTING, rule)
    expected = model(IDS).logits
    adapter.save(tmp_path / "saved")
    loaded = load(tiny_llama(), tmp_path / "saved")
    torch.testing.assert_close(loaded.model(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    assert loaded.rule.name == "lora"
    with pytest.raises(MatryoshkaError, match=f"rule '{name}' is none of this package's, .*save_strategy='no'"):
        model.save_pretrained(str(tmp_path / "checkpoint"))
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(MatryoshkaError, match=f"rule '{name}' is none of this package's, .*save_strategy='no'"):
        adapter.callback().on_train_begin(arguments, TrainerState(), TrainerControl())
    paper = nest_as(model, NESTING, rule, deploy="paper")
    with pytest.raises(MatryoshkaError, match=r"no file can say what it does: call adapter\.reorder\(\) first"):
        paper.save(tmp_path / "paper")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    paper.reorder()
    model.save_pretrained(str(tmp_path / "checkpoint"))
    model.load_adapter(str(tmp_path / "checkpoint"), "default", is_trainable=True)
