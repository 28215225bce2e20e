"""Save, export and load: the files hold the deployed function, for plain PEFT too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers import oracle
from helpers.models import (
    OneLayer,
    lora_config,
    nest_as,
    nested_layer,
    nested_llama,
    randomize,
    tiny_llama,
)
from helpers.plain_peft import IDS, by_peft, is_close, logits, plain_adapter
from helpers.small_adapter import add_small_adapter
from huggingface_hub import HfApi
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, export, load, nest, reorder
from matryoshka_lora.peft.base_model import load_model

NESTINGS = {
    "none": Nesting((1, 2, 4, 8)),
    "rank": Nesting((2, 3, 5), "rank", 3.0 / 5),
    "sqrt": Nesting((1, 3, 6), "sqrt", 1.7 / 6**0.5),  # not a power of two, to show a rounding
}
NESTING = NESTINGS["sqrt"]
WEIGHTS_NAME = "adapter_model.safetensors"
FORMS = ["paper", "unordered", "svd"]
"""P dropped; with P, reordered on the way to the file; reordered."""


def into_form(adapter: NestedAdapter, form: str) -> None:
    """Bring an adapter of rule matryoshka into a form."""
    if form == "svd":
        adapter.reorder()


def llama_in_form(form: str, nesting: Nesting = NESTING, **options: Any) -> NestedAdapter:
    deploy = "paper" if form == "paper" else "reordered"
    adapter = nested_llama(nesting, deploy=deploy, **options)
    into_form(adapter, form)
    return adapter


def logits_by_rank(adapter: NestedAdapter) -> dict[int, Tensor]:
    outputs = {}
    for rank in adapter.ranks:
        adapter.set_rank(rank)
        outputs[rank] = logits(adapter.model)
    adapter.set_rank(adapter.nesting.max_rank)
    return outputs


def read_nesting(folder: Path) -> dict[str, Any] | None:
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        text = (file.metadata() or {}).get("matryoshka_lora")
    return None if text is None else json.loads(text)


@pytest.mark.parametrize("scaling", NESTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_a_round_trip_keeps_every_rank(form: str, scaling: str, tmp_path: Path) -> None:
    nesting = NESTINGS[scaling]
    saved = llama_in_form(form, nesting)
    order = "svd" if form == "svd" else None
    factors, before = saved.factors.copy(), logits(saved.model)
    saved.save(tmp_path / "a")
    # The adapter in memory is unchanged.
    assert saved.order == order
    for name, pair in saved.factors.copy().items():
        assert all(map(torch.equal, pair, factors[name]))

    loaded = load(tiny_llama(), tmp_path / "a")
    if form == "unordered":
        saved.reorder()
    assert (loaded.nesting, loaded.order, loaded.ranks) == (nesting, saved.order, saved.ranks)
    assert loaded.deploy == saved.deploy
    written = read_nesting(tmp_path / "a")
    assert written is not None
    assert (written["ranks"], written["scaling"]) == (list(nesting.ranks), scaling)
    assert (written["order"], written["deploy"]) == (saved.order, saved.deploy)
    expected = logits_by_rank(saved)
    actual = logits_by_rank(loaded)
    tolerance = 1e-4 if form == "unordered" else 0.0  # P is folded, and rounded, on the way
    for rank, output in actual.items():
        assert is_close(output, expected[rank], tolerance)
    assert is_close(by_peft(tmp_path / "a"), actual[nesting.max_rank])
    assert is_close(expected[nesting.max_rank], before, 1e-4)

    for rank in saved.ranks:
        saved.export(tmp_path / f"{rank}", np.int64(rank))
        assert is_close(by_peft(tmp_path / f"{rank}"), expected[rank], 1e-4)
        assert read_nesting(tmp_path / f"{rank}") is None
    loaded.save(tmp_path / "b")
    tensors, tensors_again = (
        load_file(tmp_path / "a" / WEIGHTS_NAME),
        load_file(tmp_path / "b" / WEIGHTS_NAME),
    )
    assert tensors.keys() == tensors_again.keys()
    assert all(torch.equal(value, tensors_again[key]) for key, value in tensors.items())


def test_a_trained_adapter_is_saved_next_to_an_existing_path(tmp_path: Path) -> None:
    adapter = llama_in_form("svd")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("mine")
    with warnings.catch_warnings(action="error"):
        warnings.filterwarnings("ignore", "Could not find a config file")  # of PEFT 0.18
        with pytest.raises(UserWarning, match="a-2"):
            adapter.save(tmp_path / "a")  # the warning comes last
    assert (tmp_path / "a-2" / WEIGHTS_NAME).exists()
    with pytest.warns(UserWarning, match="a-3"):
        assert adapter.save(tmp_path / "a") == tmp_path / "a-3"
    with pytest.warns(UserWarning, match="a-3-2 instead.*force=True"):
        adapter.save(tmp_path / "a-3")
    with pytest.warns(UserWarning, match="a-4"):  # what this package has not written
        adapter.save(tmp_path / "a", force=True)
    assert adapter.save(tmp_path / "a-2", force=True) == tmp_path / "a-2"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["mine"]
    assert is_close(by_peft(tmp_path / "a-4"), logits(adapter.model), 1e-5)


def test_reordering_a_paper_deployment_drops_p_in_memory_as_well(tmp_path: Path) -> None:
    adapter = llama_in_form("paper")
    expected = logits(adapter.model)
    adapter.save(tmp_path / "a")
    loaded = load(tiny_llama(), tmp_path / "a")
    for nested in (adapter, loaded):
        nested.reorder()
        assert (nested.deploy, nested.order) == ("reordered", "svd")
        assert is_close(logits(nested.model), expected, 1e-4)
    reorder(tmp_path / "a", tmp_path / "b")
    from_file = logits_by_rank(load(tiny_llama(), tmp_path / "b"))
    in_memory, after_loading = logits_by_rank(adapter), logits_by_rank(loaded)
    for rank in range(1, NESTING.max_rank + 1):
        assert is_close(in_memory[rank], from_file[rank], 1e-4)
        assert is_close(after_loading[rank], from_file[rank], 1e-4)


@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("form", ["paper", "unordered", "svd"])
def test_every_kind_of_layer(kind: str, form: str, tmp_path: Path) -> None:
    deploy = "paper" if form == "paper" else "reordered"
    nested = nested_layer(kind, NESTING, deploy=deploy, dtype=torch.float32)
    into_form(nested.adapter, form)
    base_weights = {
        key: value.clone() for key, value in nested.layer.get_base_layer().state_dict().items()
    }

    def base_model() -> nn.Module:
        model = OneLayer(oracle.KINDS[kind].build()).float()
        model.layer.load_state_dict(base_weights)
        return model

    x = nested.kind.batch(3)
    if x.is_floating_point():
        x = x.float()
    nested.adapter.model.eval()
    nested.adapter.save(tmp_path / "a")
    loaded = load(base_model(), tmp_path / "a")
    plain_model = PeftModel.from_pretrained(base_model(), str(tmp_path / "a")).eval()
    assert torch.equal(plain_model(x), loaded.model(x))
    tolerance = 1e-5 if form == "unordered" else 0.0
    assert is_close(loaded.model(x), nested.layer(x), 1e-5)
    if form == "unordered":
        nested.adapter.reorder()
    for rank in nested.adapter.ranks:
        loaded.set_rank(rank)
        nested.adapter.set_rank(rank)
        assert is_close(loaded.model(x), nested.layer(x), tolerance)
        nested.adapter.export(tmp_path / f"{rank}", rank)
        exported = PeftModel.from_pretrained(base_model(), str(tmp_path / f"{rank}")).eval()
        assert is_close(exported(x), nested.layer(x), 1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "bias-all": {"bias": "all"},
    "bias-lora_only": {"bias": "lora_only"},
    "trainable_token_indices": {"trainable_token_indices": [3, 5, 8]},
    "several": {"modules_to_save": ["norm"], "bias": "all", "trainable_token_indices": [3, 5]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "pattern": {"target_modules": r".*\.(q|down)_proj"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dropout": {"lora_dropout": 0.3},
}


def llama_with_biases() -> Any:
    model = tiny_llama(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(parameter, 0.1)
    return model


@dataclass
class ConfigOfATrainer(LoraConfig):
    """A subclass as of ms-swift, whose fields PEFT does not know."""

    lora_dtype: str | None = "float32"


def test_fields_that_peft_does_not_know_are_not_saved(tmp_path: Path) -> None:
    config = lora_config(NESTING)
    model = get_peft_model(tiny_llama(), ConfigOfATrainer(**config.to_dict()))
    nest_as(model, NESTING).save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert saved.keys() == config.to_dict().keys()


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_lora_config(option: str, tmp_path: Path) -> None:
    if option == "bias-lora_only" and Version(peft.__version__) < Version("0.21"):
        pytest.skip("PEFT itself loses these biases")
    model = get_peft_model(llama_with_biases(), lora_config(NESTING, **OPTIONS[option])).eval()
    adapter = nest_as(model, NESTING)
    randomize(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    expected = logits(model)
    adapter.save(tmp_path / "saved")
    model.save_pretrained(str(tmp_path / "saved-by-peft"))
    adapter.export(tmp_path / "exported", 6)
    for name in ("saved", "saved-by-peft", "exported"):
        assert is_close(by_peft(tmp_path / name, llama_with_biases), expected, 1e-4)
    loaded = load(llama_with_biases(), tmp_path / "saved", rank=2, adapter_name="mine")
    assert (loaded.rank, loaded.name) == (2, "mine")
    adapter.reorder()
    adapter.set_rank(2)
    assert is_close(logits(loaded.model), logits(model), 1e-4)
    add_small_adapter(adapter)
    adapter.save(tmp_path / "with-small")
    assert not is_close(logits(loaded.model), logits(model), 1e-2)
    loaded = load(llama_with_biases(), tmp_path / "with-small", rank=2, adapter_name="mine")
    assert is_close(logits(loaded.model), logits(model))
    adapter.export(tmp_path / "rank-2", 2)
    assert is_close(by_peft(tmp_path / "rank-2", llama_with_biases), logits(model), 1e-4)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [100, 120]}],
    ids=str,
)
def test_an_enlarged_vocabulary(options: dict[str, Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base_model = type(tiny_llama()).from_pretrained(tmp_path / "base")
    enlarged = type(tiny_llama()).from_pretrained(tmp_path / "base")
    enlarged.resize_token_embeddings(enlarged.vocab_size + 40)
    adapter = nest_as(get_peft_model(enlarged, lora_config(NESTING, **options)).eval(), NESTING)
    randomize(adapter.model)
    new_ids = torch.arange(40)[None] + base_model.vocab_size
    expected = adapter.model(new_ids).logits
    adapter.save(tmp_path / "a")
    assert is_close(load(base_model, tmp_path / "a").model(new_ids).logits, expected, 1e-5)


def test_a_smaller_vocabulary_is_rejected(tmp_path: Path) -> None:
    """Plain PEFT also refuses it."""
    config = lora_config(NESTING, modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(tiny_llama(vocab_size=80), config).save_pretrained(tmp_path / "a")
    base_model = tiny_llama()
    with pytest.raises(MatryoshkaError, match="96"):
        load(base_model, tmp_path / "a")
    assert logits(base_model).equal(logits(tiny_llama()))


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"((.)+)+X": 4}},
        {"alpha_pattern": {"(a|b)*c": 4}},
        {"rank_pattern": {".*a.*a.*a.*a.*a.*a.*a.*a.*a.*X": 4}},
    ],
    ids=str,
)
def test_a_regular_expression_that_may_never_end_is_rejected(
    options: dict[str, Any], tmp_path: Path
) -> None:
    get_peft_model(tiny_llama(), lora_config(NESTING)).save_pretrained(tmp_path / "a")
    config_file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, **options}))
    with pytest.raises(MatryoshkaError, match="regular expression"):
        load(tiny_llama(), tmp_path / "a")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r"((.)+)+X"},
        {"target_modules": ["q_proj"]},
        {"exclude_modules": r"((.)+)+X"},
        {"exclude_modules": ["up_proj"]},
        {"layers_to_transform": [0], "layers_pattern": ["(a+)+"]},
    ],
    ids=str,
)
def test_all_layers_of_the_file_are_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the config's target_modules say. A regular expression in it may never end."""
    model = get_peft_model(tiny_llama(), lora_config(NESTING))
    randomize(model)
    model.save_pretrained(tmp_path / "a")
    config_file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, **options}))
    expected = logits(model.eval())
    adapter = load(tiny_llama(), tmp_path / "a")
    assert logits(adapter.model).allclose(expected, atol=1e-5)
    load(adapter.model, tmp_path / "a", adapter_name="other")
    adapter.model.set_adapter("other")
    assert logits(adapter.model).allclose(expected, atol=1e-5)
    base_model = str(tmp_path / "base")
    tiny_llama().save_pretrained(base_model)
    export(
        tmp_path / "a",
        tmp_path / "merged",
        NESTING.max_rank,
        format="merged",
        base_model=base_model,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert logits(merged).allclose(expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_failed_load_restores_the_vocabulary(is_tied: bool, tmp_path: Path) -> None:
    config = lora_config(NESTING, modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(tiny_llama(vocab_size=120), config).save_pretrained(tmp_path / "a")
    base_model = tiny_llama(tie_word_embeddings=is_tied)
    expected = logits(base_model)
    with pytest.raises(MatryoshkaError, match="rank"):
        load(base_model, tmp_path / "a", rank=99)
    assert base_model.config.vocab_size == 96
    assert logits(base_model).equal(expected)
    assert all(parameter.requires_grad for parameter in base_model.parameters())


def test_an_enlarged_vocabulary_of_the_bundled_model() -> None:
    enlarged = load_model(dtype="float32")  # PEFT does not find its files
    enlarged.resize_token_embeddings(enlarged.config.vocab_size + 8)
    model = get_peft_model(enlarged, LoraConfig(r=4, target_modules=["q_proj"]))
    assert any("embed_tokens" in key for key in nest(model).to_lora().other_tensors)


def test_a_lora_file_does_not_follow_the_parameters(tmp_path: Path) -> None:
    adapter = llama_in_form("svd")
    expected = logits(adapter.model)
    lora = adapter.to_lora()
    randomize(adapter.model, seed=8)
    lora.nested().save(tmp_path / "a")
    assert is_close(by_peft(tmp_path / "a"), expected)


@pytest.mark.parametrize("deploy", ["reordered", "paper"])
def test_trained_prefixes_are_exported_as_they_are(deploy: str, tmp_path: Path) -> None:
    """A rule that draws gives each nested rank its own scale. Saving reorders, unless P drops."""
    adapter = nested_llama(NESTING, "dylora", deploy)
    expected = logits_by_rank(adapter)
    assert tuple(expected) == NESTING.ranks
    for rank, output in expected.items():
        adapter.export(tmp_path / f"{rank}", rank)
        assert is_close(by_peft(tmp_path / f"{rank}"), output, 1e-5)
    if deploy == "reordered":
        with pytest.warns(UserWarning, match="reordered"):
            adapter.save(tmp_path / "a")
        adapter.export(tmp_path / "2", 2)  # of the reordered factors, as it is no nested rank
        loaded = load(tiny_llama(), tmp_path / "a", rank=2)
        assert is_close(by_peft(tmp_path / "2"), logits(loaded.model), 1e-5)
    else:
        adapter.save(tmp_path / "a")
        for rank, output in logits_by_rank(load(tiny_llama(), tmp_path / "a")).items():
            assert is_close(output, expected[rank], 1e-5)


# Loading.


@pytest.mark.parametrize("rule", ["lora", "matryoshka", "dylora"])
@pytest.mark.parametrize("form", ["paper", "unordered", "svd"])
def test_an_adapter_that_peft_has_saved(rule: str, form: str, tmp_path: Path) -> None:
    """It is the function of eval mode, and not nested."""
    if (rule, form) == ("lora", "paper"):
        return  # rejected: there is no P to drop
    adapter = llama_in_form(form, rule=rule)
    expected = logits(adapter.model)
    adapter.model.save_pretrained(str(tmp_path / "a"))
    assert is_close(logits(adapter.model), expected)
    is_folded = rule == "matryoshka" and form == "unordered"
    assert is_close(by_peft(tmp_path / "a"), expected, 1e-5 if is_folded else 0.0)
    assert read_nesting(tmp_path / "a") is None
    loaded = load(tiny_llama(), tmp_path / "a")
    assert (loaded.order, loaded.ranks) == ("svd", (1, 2, 3, 4, 5, 6))
    assert is_close(logits(loaded.model), expected, 1e-5)


def test_a_trainable_adapter_is_plain_lora(tmp_path: Path) -> None:
    llama_in_form("svd", task_type="CAUSAL_LM").save(tmp_path / "a")
    adapter = load(tiny_llama(), tmp_path / "a", is_trainable=True)
    assert (adapter.rule.name, adapter.order, adapter.model.training) == ("lora", "svd", True)
    plain_model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a"), is_trainable=True)
    for model in (adapter.model, plain_model.train()):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model(IDS, labels=IDS).loss.backward()
        torch.optim.SGD(parameters, lr=0.1).step()
    assert is_close(logits(adapter.model), logits(plain_model), 1e-4)
    assert adapter.order is None
    with pytest.raises(MatryoshkaError, match="trainable"):
        load(tiny_llama(), tmp_path / "a", rank=2, is_trainable=True)
    frozen = load(tiny_llama(), tmp_path / "a")
    assert not frozen.model.training
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())


def test_a_second_adapter_leaves_the_first_as_it_is(tmp_path: Path) -> None:
    first = llama_in_form("svd")
    first.save(tmp_path / "1")
    before = logits_by_rank(first)
    randomize(first.model, seed=5)
    first.reorder()
    first.save(tmp_path / "2")
    model = load(tiny_llama(), tmp_path / "1").model
    load(model, tmp_path / "2", rank=3, adapter_name="second")
    assert logits(model).equal(before[6])
    model.set_adapter("second")
    first.set_rank(3)
    assert logits(model).equal(logits(first.model))
    assert NestedAdapter(model).rank == 6
    with pytest.raises(MatryoshkaError, match="second"):
        load(model, tmp_path / "2", adapter_name="second")


def test_rank_0_is_the_base_model(tmp_path: Path) -> None:
    llama_in_form("paper").save(tmp_path / "a")
    loaded = load(tiny_llama(), tmp_path / "a", rank=0)
    assert is_close(logits(loaded.model), logits(tiny_llama()), 1e-6)


@pytest.mark.parametrize("rank", [7, "2"])
def test_a_rank_that_is_not_available_leaves_the_base_model(rank: Any, tmp_path: Path) -> None:
    llama_in_form("paper").save(tmp_path / "a")
    base_model = tiny_llama()
    names = [name for name, _ in base_model.named_parameters()]
    with pytest.raises(MatryoshkaError, match="rank"):
        load(base_model, tmp_path / "a", rank=rank)
    assert [name for name, _ in base_model.named_parameters()] == names


@pytest.mark.parametrize(
    ("changes", "layer"),
    [
        ({"num_hidden_layers": 1}, r"layers\.1"),
        ({"hidden_size": 128}, "layers"),
        ({"num_key_value_heads": 4}, "k_proj"),
    ],
    ids=str,
)
def test_another_base_model_is_rejected(
    changes: dict[str, Any], layer: str, tmp_path: Path
) -> None:
    llama_in_form("svd").save(tmp_path / "a")
    base_model = tiny_llama(**changes)
    names = [name for name, _ in base_model.named_parameters()]
    with pytest.raises(MatryoshkaError, match=layer):
        load(base_model, tmp_path / "a")
    assert [name for name, _ in base_model.named_parameters()] == names


def tiny_gpt2(width: int = 16) -> Any:
    config = GPT2Config(
        vocab_size=96, n_positions=24, n_embd=width, n_layer=1, n_head=2, bos_token_id=0
    )
    return GPT2LMHeadModel(config)


def test_another_gpt2_is_rejected(tmp_path: Path) -> None:
    """Its linear layers are transformers' Conv1D."""
    model = get_peft_model(
        tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    model.save_pretrained(tmp_path / "a")
    load(tiny_gpt2(), tmp_path / "a")
    with pytest.raises(MatryoshkaError, match="c_attn"):
        load(tiny_gpt2(width=32), tmp_path / "a")


class Convolution(nn.Module):
    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, 4, kernel_size)
        self.embedding = nn.Embedding(width, kernel_size)


@pytest.mark.parametrize(("width", "kernel_size"), [(6, 3), (5, 2)])
@pytest.mark.parametrize("layer", ["conv", "embedding"])
def test_convolutions_and_embeddings_of_other_dimensions_are_rejected(
    layer: str, width: int, kernel_size: int, tmp_path: Path
) -> None:
    model = get_peft_model(Convolution(5, 3), LoraConfig(r=2, target_modules=[layer]))
    model.save_pretrained(tmp_path / "a")
    load(Convolution(5, 3), tmp_path / "a")
    with pytest.raises(MatryoshkaError, match=layer):
        load(Convolution(width, kernel_size), tmp_path / "a")


@pytest.mark.parametrize("is_peft_model", [False, True])
def test_an_error_of_peft_leaves_the_base_model(
    is_peft_model: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_in_form("svd").save(tmp_path / "a")
    base_model = load(tiny_llama(), tmp_path / "a").model if is_peft_model else tiny_llama()
    base_model.train()
    before = {name: p.requires_grad for name, p in base_model.named_parameters()}

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("peft.peft_model.set_peft_model_state_dict", fail)
    with pytest.raises(MatryoshkaError, match="RuntimeError"):
        load(base_model, tmp_path / "a", adapter_name="other")
    assert {name: p.requires_grad for name, p in base_model.named_parameters()} == before
    assert all(module.training for module in base_model.modules())


@pytest.mark.parametrize("kind", ["injected", "inner"])
def test_a_base_model_keeps_the_adapters_that_it_has(kind: str, tmp_path: Path) -> None:
    """As those of diffusers' and transformers' ``add_adapter``."""
    llama_in_form("svd").save(tmp_path / "a")
    plain_model: Any = plain_adapter(tmp_path / "mine")
    if kind == "injected":
        base_model: Any = inject_adapter_in_model(lora_config(NESTING), tiny_llama(), "mine")
        randomize(base_model)
    else:
        base_model = plain_model.get_base_model()
    before = logits(base_model)
    with pytest.raises(MatryoshkaError, match="PeftModel"):
        load(base_model, tmp_path / "a")
    assert torch.equal(logits(base_model), before)
    assert not torch.equal(before, logits(tiny_llama()))


# A process that has only PEFT.

SCRIPT = """
import sys, warnings
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folder, *names = sys.argv[1:]
torch.set_num_threads(1)
ids, logits = torch.arange(3, 27).reshape(2, 12), {}
for name in names:
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base, f"{folder}/{name}").eval()
    with torch.no_grad():
        logits[name] = model(input_ids=ids).logits
assert "matryoshka_lora" not in sys.modules
save_file(logits, f"{folder}/logits.safetensors")
"""


@pytest.mark.slow
def test_plain_peft_in_another_process(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    expected = {}
    for form in ("paper", "unordered", "svd"):
        adapter = llama_in_form(form, task_type="CAUSAL_LM")
        adapter.save(tmp_path / form)
        expected[form] = logits(adapter.model)
        if form == "unordered":
            adapter.reorder()
        for rank, output in logits_by_rank(adapter).items():
            adapter.export(tmp_path / f"{form}@{rank}", rank)
            expected[f"{form}@{rank}"] = output
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *expected]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    actual = load_file(tmp_path / "logits.safetensors")
    for name, output in expected.items():
        assert is_close(actual[name], output, 0.0 if name in ("paper", "svd") else 1e-4)


def test_what_is_uploaded_serves_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no Hub here: the upload copies the folder."""
    adapter = llama_in_form("svd")
    calls: dict[str, Any] = {}

    def create_repo(api: HfApi, repo_id: str, **options: Any) -> SimpleNamespace:
        calls["create"] = (repo_id, options["private"], api.token)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(api: HfApi, folder_path: Path, **options: Any) -> SimpleNamespace:
        ignored = shutil.ignore_patterns(*options["ignore_patterns"])
        shutil.copytree(folder_path, tmp_path / "uploaded", ignore=ignored)
        calls["upload"] = (options["repo_id"], options["revision"])
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    url = adapter.push_to_hub("owner/name", private=True, token="secret", revision="v2")
    assert url == "https://hub/commit"
    assert calls == {"create": ("owner/name", True, "secret"), "upload": ("owner/name", "v2")}
    files = {file.name for file in (tmp_path / "uploaded").iterdir()}
    assert files == {"README.md", "adapter_config.json", WEIGHTS_NAME}
    loaded = NestedAdapter.from_pretrained(tiny_llama(), tmp_path / "uploaded", rank=3)
    adapter.set_rank(3)
    assert is_close(logits(loaded.model), logits(adapter.model), 0.0)
