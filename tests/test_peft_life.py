"""What PEFT does with an adapter goes on working when it is nested, and what cannot work is refused."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import (
    NestedLayer,
    OneLayer,
    lora_config,
    nest_as,
    nested_layer,
    nested_llama,
    one_layer,
    randomize,
    tiny_llama,
)
from packaging.version import Version
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import config as lora_configs
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, load, nest
from matryoshka_lora.adapter import saving
from matryoshka_lora.adapter.variant import NestedVariant
from matryoshka_lora.rules import RULES

NESTING = Nesting([1, 2, 4, 8], "sqrt", 0.7)


def tokens(rows: int = 3, length: int = 6, seed: int = 5) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Callable[[Tensor], Any], ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens() if ids is None else ids).logits
    return found


def prefix(nesting: Nesting, rank: int) -> Tensor:
    return oracle.prefix_p(nesting.ranks, rank, nesting.scaling, nesting.scale)


def p_of(nesting: Nesting) -> Tensor:
    return oracle.trained_p(nesting.ranks, nesting.scaling, nesting.scale)


def kept(nesting: Nesting, rank: int) -> Tensor:
    return oracle.kept_p(nesting.ranks, rank, nesting.scaling, nesting.scale)


FORMS = ["paper", "kept", "reordered"]
"""How a rank may be in eval mode: P dropped, P kept since it was not reordered yet, and reordered."""


def deploy_of(form: str) -> Any:
    return "paper" if form == "paper" else "reordered"


def in_form(adapter: NestedAdapter, form: str) -> NestedAdapter:
    if form == "reordered":
        adapter.reorder()
    return adapter


def p_in_form(form: str, rank: int) -> Tensor:
    """What stands between the factors at a rank."""
    if form == "reordered":
        return prefix(NESTING, 8) * (torch.arange(8) < rank)
    return prefix(NESTING, rank) if form == "paper" else kept(NESTING, rank)


def plain_llama(**lora: Any) -> PeftModel:
    """The model of `nested_llama(NESTING)` without nesting."""
    model = get_peft_model(tiny_llama(), lora_config(NESTING, **lora))
    randomize(model)
    return model.eval()


# What the rest of PEFT sees.


def test_nesting_leaves_config_parameters_and_keys_as_they_were() -> None:
    model, plain = plain_llama(), plain_llama()
    config = model.peft_config["default"].to_dict()
    trainable = [(name, p.shape) for name, p in model.named_parameters() if p.requires_grad]
    nest_as(model, NESTING)
    assert type(model.peft_config["default"]) is LoraConfig
    assert model.peft_config["default"].to_dict() == config
    assert [(name, p.shape) for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())
    assert model.get_model_status().enabled
    assert not model.training


@pytest.mark.parametrize("rule", RULES)
def test_without_a_word_about_it_eval_mode_is_what_is_trained(rule: str) -> None:
    model: Any = one_layer("Linear", NESTING)
    adapter = nest(model, NESTING.ranks, NESTING.scaling, rule)
    nested = NestedLayer(oracle.KINDS["Linear"], adapter, model.base_model.model.layer)
    x = nested.kind.batch(2)
    whole, low = prefix(NESTING, 8), prefix(NESTING, 2)
    if rule == "matryoshka":
        whole, low = p_of(NESTING), kept(NESTING, 2)
    elif rule == "lora":
        low = whole * (torch.arange(8) < 2)
    if RULES[rule].fixed:
        torch.testing.assert_close(nested.layer(x), nested.expected(whole, x), rtol=1e-12, atol=1e-12)
    model.eval()
    torch.testing.assert_close(nested.layer(x), nested.expected(whole, x), rtol=1e-12, atol=1e-12)
    adapter.set_rank(2)
    torch.testing.assert_close(nested.layer(x), nested.expected(low, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("r", "alpha", "rslora", "whole"), [(8, 16, False, 2), (8, 16, True, 16 / 8**0.5), (6, 3, False, 0.5)]
)
@pytest.mark.parametrize("scaling", ["none", "rank", "sqrt"])
def test_the_scale_is_that_of_the_config(r: int, alpha: int, rslora: bool, whole: float, scaling: Any) -> None:
    """Of rank R; and P is the sum over the powers of two up to R. Nobody has to say either."""
    model: Any = one_layer("Linear", Nesting([r]), lora_alpha=alpha, use_rslora=rslora)
    x = oracle.KINDS["Linear"].batch(3)
    plain = model.eval()(x)
    adapter = nest(model) if scaling == "none" else nest(model, scaling=scaling)
    nested = NestedLayer(oracle.KINDS["Linear"], adapter, model.base_model.model.layer)
    ranks = [1, 2, 4, 8] if r == 8 else [1, 2, 4, 6]
    assert list(adapter.ranks) == ranks
    trained = oracle.trained_p(ranks, scaling, whole)
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(model(x), nested.expected(trained, x), rtol=1e-12, atol=1e-12)
    nest(model, scaling=scaling, rule="lora")
    torch.testing.assert_close(model(x), plain, rtol=1e-14, atol=1e-14)
    adapter = nest(model, scaling=scaling, deploy="paper")
    torch.testing.assert_close(model(x), plain, rtol=1e-14, atol=1e-14)
    for rank in ranks:
        adapter.set_rank(rank)
        expected = nested.expected(oracle.prefix_p(ranks, rank, scaling, whole), x)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deploy", ["paper", "reordered"])
@pytest.mark.filterwarnings("ignore:.*was not reordered after training")
def test_no_rank_chosen_is_full_rank_is_plain_peft(deploy: Any, tmp_path: Path) -> None:
    adapter = nested_llama(NESTING, deploy=deploy)
    unchosen = logits(adapter.model)
    adapter.set_rank(8)
    assert torch.equal(logits(adapter.model), unchosen)
    adapter.save(tmp_path / "saved")
    adapter.export(tmp_path / "slice", 8)
    saved = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved"))
    exported = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "slice"))
    assert torch.equal(saved, exported)
    if deploy == "paper":
        assert torch.equal(saved, unchosen)
        assert torch.equal(logits(plain_llama()), unchosen)
    else:  # the SVD rounds
        torch.testing.assert_close(saved, unchosen, rtol=1e-4, atol=1e-4)
        assert (logits(plain_llama()) - unchosen).abs().max() > 0.1


@pytest.mark.parametrize("rank", NESTING.ranks)
def test_every_rank_of_a_model_is_the_folded_one(rank: int) -> None:
    adapter = nested_llama(NESTING)
    adapter.set_rank(rank)
    folded = oracle.fold(tiny_llama(), get_peft_model_state_dict(adapter.model), prefix(NESTING, rank))
    torch.testing.assert_close(logits(adapter.model), logits(folded), rtol=1e-3, atol=1e-3)
    adapter.set_rank(1 if rank > 1 else 2)
    assert (logits(adapter.model) - logits(folded)).abs().max() > 0.05


def test_factors_that_peft_puts_there_are_used_at_once() -> None:
    adapter, other = nested_llama(NESTING), plain_llama()
    randomize(other, seed=7)
    set_peft_model_state_dict(adapter.model, get_peft_model_state_dict(other))
    assert torch.equal(logits(adapter.model), logits(other))
    adapter.set_rank(2)
    assert not torch.equal(logits(adapter.model), logits(other))


def test_disable_adapter_is_the_base_model() -> None:
    adapter = nested_llama(NESTING)
    base = logits(tiny_llama())
    before = logits(adapter.model)
    with adapter.model.disable_adapter():
        assert torch.equal(logits(adapter.model), base)
    assert torch.equal(logits(adapter.model), before)
    assert not torch.equal(before, base)


@pytest.mark.parametrize("deploy", ["paper", "reordered"])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_merge_and_unload_gives_a_plain_model_of_that_rank(deploy: Any, rank: int) -> None:
    adapter = nested_llama(NESTING, deploy=deploy)
    adapter.set_rank(rank)
    expected = logits(adapter.model)
    merged = adapter.model.merge_and_unload()
    assert type(merged) is type(tiny_llama())
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_merge_and_unmerge_by_the_handle_and_by_peft() -> None:
    adapter = nested_llama(NESTING)
    model: Any = adapter.model
    full = logits(model)
    base = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    for rank in (2, 8):
        adapter.set_rank(rank)
        expected = logits(model)
        adapter.merge(rank)
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
        adapter.unmerge()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), full, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():  # PEFT unmerges for it
        torch.testing.assert_close(logits(model), logits(tiny_llama()), rtol=1e-3, atol=1e-3)
    for name, before in base.items():
        torch.testing.assert_close(dict(model.named_parameters())[name], before, rtol=0, atol=1e-5)


def test_unload_gives_the_base_model_back() -> None:
    adapter = nested_llama(NESTING)
    assert torch.equal(logits(adapter.model.unload()), logits(tiny_llama()))


def test_generate_is_that_of_the_exported_slice(tmp_path: Path) -> None:
    adapter = nested_llama(NESTING)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    said = {}
    for rank in NESTING.ranks:
        adapter.set_rank(rank)
        adapter.export(tmp_path / str(rank), rank)
        plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / str(rank))
        said[rank] = adapter.model.generate(input_ids=tokens(), **options)
        assert torch.equal(said[rank], plain.generate(input_ids=tokens(), **options))
    assert not torch.equal(said[1], said[8])


# PEFT's own functions that write and read files.


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_peft_writes_what_save_writes(tmp_path: Path) -> None:
    """And, while the adapter may still be trained, the factors as they are trained in one more file."""
    adapter = nested_llama(NESTING, deploy="reordered")
    factors = get_peft_model_state_dict(adapter.model)
    trained = logits(oracle.fold(tiny_llama(), factors, p_of(NESTING)))
    with pytest.warns(UserWarning, match="'default' was not reordered after training"):
        adapter.save(tmp_path / "save")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.model.save_pretrained(str(tmp_path / "trainable"))
    saved, trainable = files_of(tmp_path / "save"), files_of(tmp_path / "trainable")
    assert set(trainable) - set(saved) == {"trained.safetensors"}
    assert {name for name, content in saved.items() if trainable[name] != content} == {"nesting.json"}
    nesting = json.loads(trainable["nesting.json"])
    assert nesting.pop("trained") != nesting["weights"]
    assert nesting == json.loads(saved["nesting.json"])
    torch.testing.assert_close(load_file(tmp_path / "trainable/trained.safetensors"), factors, rtol=0, atol=0)
    adapter.model.requires_grad_(False)
    with pytest.warns(UserWarning, match="'default' was not reordered after training"):
        adapter.model.save_pretrained(str(tmp_path / "frozen"))
    assert files_of(tmp_path / "frozen") == saved
    # Memory stays as it is trained.
    assert not adapter.reordered
    torch.testing.assert_close(get_peft_model_state_dict(adapter.model), factors, rtol=0, atol=0)
    # A plain model in the same process takes it for what it is to everybody else.
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "trainable")
    assert type(plain) is PeftModel
    torch.testing.assert_close(logits(plain), trained, rtol=1e-3, atol=1e-3)
    assert (trained - logits(plain_llama())).abs().max() > 0.1
    assert "Its factors were reordered (`svd`)" in (tmp_path / "trainable/README.md").read_text()


def test_peft_writes_the_papers_deployment_as_the_paper_has_it(tmp_path: Path) -> None:
    adapter = nested_llama(NESTING, deploy="paper")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.model.save_pretrained(str(tmp_path / "peft"))
        adapter.save(tmp_path / "save")
    assert files_of(tmp_path / "peft") == files_of(tmp_path / "save")
    found = load_file(tmp_path / "peft/adapter_model.safetensors")
    torch.testing.assert_close(found, get_peft_model_state_dict(adapter.model), rtol=0, atol=0)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft")), logits(plain_llama()))
    loaded = load(tiny_llama(), tmp_path / "peft")
    for rank in NESTING.ranks:
        loaded.set_rank(rank)
        folded = oracle.fold(tiny_llama(), found, prefix(NESTING, rank))
        torch.testing.assert_close(logits(loaded.model), logits(folded), rtol=1e-3, atol=1e-3)
    card = (tmp_path / "peft/README.md").read_text()
    assert "Its deployment is the paper's: P is dropped, and rank r is the first r columns as they were trained" in card
    assert "Low ranks are much worse than those of a reordered adapter" in card


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trainable", [True, False])
def test_what_peft_wrote_peft_loads_into_a_nested_adapter(form: str, trainable: bool, tmp_path: Path) -> None:
    """As a Trainer does when it goes on, or takes the best model in the end."""
    written = in_form(nested_llama(NESTING, deploy=deploy_of(form)), form)
    written.model.save_pretrained(str(tmp_path))
    other = nest_as(get_peft_model(tiny_llama(), lora_config(NESTING)), NESTING, deploy=deploy_of(form))
    other.set_rank(2)
    other.model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns where keys are missing
        found = other.model.load_adapter(str(tmp_path), "default", is_trainable=trainable)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert other.model.training == trainable  # as PEFT has it
    assert (other.rank, other.reordered, other.ranks) == (2, written.reordered, written.ranks)
    for training in (True, False):
        for rank in written.ranks:
            for adapter in (written, other):
                adapter.model.train(training)
                adapter.set_rank(rank)
            assert torch.equal(logits(other.model), logits(written.model))


@pytest.mark.parametrize("form", FORMS)
def test_what_peft_wrote_peft_loads_into_a_plain_adapter(form: str, tmp_path: Path) -> None:
    """Into the one that is there, and as another one beside a nested one."""
    written = in_form(nested_llama(NESTING, deploy=deploy_of(form)), form)
    written.model.save_pretrained(str(tmp_path))
    model = get_peft_model(tiny_llama(), lora_config(NESTING))
    model.load_adapter(str(tmp_path), "default")
    torch.testing.assert_close(logits(model), logits(written.model), rtol=1e-3, atol=1e-3)
    nested = nest_as(get_peft_model(tiny_llama(), lora_config(NESTING)), NESTING).model
    nested.load_adapter(str(tmp_path), "other")
    nested.set_adapter("other")
    torch.testing.assert_close(logits(nested), logits(written.model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rule", ["matryoshka", "lora", "dylora"])
def test_a_plain_adapter_is_loaded_into_a_nested_one_where_it_stays_the_same_function(
    rule: str, tmp_path: Path
) -> None:
    plain = plain_llama()
    plain.save_pretrained(tmp_path)
    adapter = nest_as(get_peft_model(tiny_llama(), lora_config(NESTING)).eval(), NESTING, rule)
    before = logits(adapter.model)
    if rule == "matryoshka":
        with pytest.raises(
            MatryoshkaError, match="P of adapter 'default' would stand between its factors: load it und"
        ):
            adapter.model.load_adapter(str(tmp_path), "default")
        with pytest.raises(MatryoshkaError, match=r"some/adapter .*If it is on the hub, download it first"):
            adapter.model.load_adapter("some/adapter", "default")
        assert torch.equal(logits(adapter.model), before)
    else:
        adapter.model.load_adapter(str(tmp_path), "default")
        torch.testing.assert_close(logits(adapter.model), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["matryoshka", "lora", "dylora"])
def test_a_plain_adapter_in_the_place_of_a_reordered_one_has_no_order(rule: str, tmp_path: Path) -> None:
    plain = plain_llama()
    plain.save_pretrained(tmp_path)
    adapter = nest_as(get_peft_model(tiny_llama(), lora_config(NESTING)).eval(), NESTING, rule)
    randomize(adapter.model, seed=7)
    adapter.reorder()
    adapter.set_rank(3)  # which the rules do not train
    if rule == "matryoshka":
        before = logits(adapter.model)
        with pytest.raises(MatryoshkaError, match="P of adapter 'default' would stand between its factors"):
            adapter.model.load_adapter(str(tmp_path), "default")
        assert torch.equal(logits(adapter.model), before)
        return
    adapter.model.load_adapter(str(tmp_path), "default")
    assert (adapter.reordered, adapter.rank, adapter.ranks) == (False, 8, NESTING.ranks)
    torch.testing.assert_close(logits(adapter.model), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nested", "plain"])
def test_nothing_is_loaded_into_a_merged_adapter(kind: str, tmp_path: Path) -> None:
    """Unmerging would take out the new factors where the old ones were put in."""
    (plain_llama() if kind == "plain" else nested_llama(NESTING, "lora").model).save_pretrained(str(tmp_path))
    adapter = nested_llama(NESTING, "lora", seed=3)
    base = logits(adapter.model.base_model.model)
    adapter.merge(8)
    with pytest.raises(MatryoshkaError, match="adapter 'default' is merged into the base weights: unmerge it first"):
        adapter.model.load_adapter(str(tmp_path), "default")
    adapter.unmerge()
    torch.testing.assert_close(logits(adapter.model.base_model.model), base, rtol=1e-4, atol=1e-4)


def test_pefts_options_of_loading_count_for_a_nested_adapter(tmp_path: Path) -> None:
    """The names that the model has now, and a folder below."""

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.new = nn.Linear(12, 10)

    written = get_peft_model(OneLayer(nn.Linear(12, 10)), lora_config(NESTING, target_modules=["layer"]))
    randomize(written)
    nest_as(written, NESTING)
    written.save_pretrained(str(tmp_path / "below"))
    model: Any = get_peft_model(Renamed(), lora_config(NESTING, target_modules=["new"]))
    nest_as(model, NESTING)
    model.load_adapter(str(tmp_path), "default", subfolder="below", key_mapping={"layer": "new"})
    old, new = (get_peft_model_state_dict(each) for each in (written, model))
    torch.testing.assert_close(new, {key.replace("layer", "new"): value for key, value in old.items()}, rtol=0, atol=0)


def test_whole_numbers_beside_the_factors_are_written_too(tmp_path: Path) -> None:
    class WithNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    config = lora_config(NESTING, target_modules=["layer"], modules_to_save=["norm"])
    model: Any = get_peft_model(WithNorm(), config)
    nest_as(model, NESTING, deploy="paper")
    model.base_model.model.norm.modules_to_save["default"].num_batches_tracked.fill_(7)
    model.save_pretrained(str(tmp_path))
    for loaded in (PeftModel.from_pretrained(WithNorm(), tmp_path), load(WithNorm(), tmp_path).model):
        assert loaded.base_model.model.norm.modules_to_save["default"].num_batches_tracked.item() == 7


def test_an_adapter_that_peft_cannot_write_is_not_nested() -> None:
    """As PEFT has it where two adapters train the tokens of different layers."""

    class TwoEmbeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.layer = nn.Embedding(5, 4), nn.Embedding(5, 4), nn.Linear(4, 4)

    def config(embedding: str) -> LoraConfig:
        return lora_config(NESTING, target_modules=["layer"], trainable_token_indices={embedding: [0]})

    model: Any = get_peft_model(TwoEmbeddings(), config("first"))
    model.add_adapter("other", config("second"))
    with pytest.raises(KeyError):
        get_peft_model_state_dict(model, adapter_name="other")
    with pytest.raises(MatryoshkaError, match=r"PEFT cannot write adapter 'other' to a file .*trainable_token_indices"):
        nest_as(model, NESTING, adapter="other")


def test_a_nested_adapter_is_not_written_with_the_embeddings_of_the_base_model(tmp_path: Path) -> None:
    model = nested_llama(NESTING).model
    with pytest.raises(MatryoshkaError, match="embeddings are no part of its files: leave save_embedding_layers out"):
        model.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    assert not (tmp_path / "a").exists()


def test_a_nested_adapter_is_not_written_as_a_pickle(tmp_path: Path) -> None:
    model = two_adapters()[1]
    with pytest.raises(MatryoshkaError, match="'default' is nested, and is written as safetensors only: leave safe_"):
        model.save_pretrained(str(tmp_path / "both"), safe_serialization=False)
    assert not (tmp_path / "both").exists()
    model.save_pretrained(str(tmp_path / "one"), False, ["plain"])  # which is PEFT's own matter
    assert [file for file in files_of(tmp_path / "one") if "adapter_model" in file] == ["plain/adapter_model.bin"]


@pytest.mark.parametrize("names", [["default"], ["plain"], ["plain", "default"]], ids=str)
def test_peft_writes_the_adapters_that_are_named(names: list[str], tmp_path: Path) -> None:
    """By position too, as PEFT takes them."""
    two_adapters()[1].save_pretrained(str(tmp_path), True, names)
    found = {file for file in files_of(tmp_path) if "adapter_model" in file}
    places = {"default": "adapter_model.safetensors", "plain": "plain/adapter_model.safetensors"}
    assert found == {places[name] for name in names}
    assert (tmp_path / "nesting.json").exists() == ("default" in names)
    assert not (tmp_path / "plain/nesting.json").exists()


# Several adapters.


def two_adapters(rule: str = "matryoshka") -> tuple[NestedAdapter, Any]:
    """A nested adapter and a plain one of rank 3."""
    adapter = nested_llama(NESTING, rule)
    adapter.model.add_adapter("plain", LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    generator = torch.Generator().manual_seed(9)
    for name, parameter in adapter.model.named_parameters():
        if ".plain." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter, adapter.model.eval()


def test_a_plain_adapter_beside_a_nested_one_stays_plain() -> None:
    adapter, model = two_adapters()
    nested_only = logits(model)
    folded = oracle.fold(
        tiny_llama(), get_peft_model_state_dict(model, adapter_name="plain"), torch.full((3,), 2.0).double()
    )
    model.set_adapter("plain")
    torch.testing.assert_close(logits(model), logits(folded), rtol=1e-3, atol=1e-3)
    adapter.set_rank(1)  # an adapter may be set while another is active
    torch.testing.assert_close(logits(model), logits(folded), rtol=1e-3, atol=1e-3)
    model.set_adapter("default")
    assert not torch.equal(logits(model), nested_only)
    adapter.set_rank(8)
    assert torch.equal(logits(model), nested_only)


def test_both_adapters_at_once_add_up() -> None:
    adapter, model = two_adapters()
    model.base_model.set_adapter(["default", "plain"])
    adapter.set_rank(2)
    folded = oracle.fold(tiny_llama(), get_peft_model_state_dict(model, adapter_name="default"), prefix(NESTING, 2))
    folded = oracle.fold(folded, get_peft_model_state_dict(model, adapter_name="plain"), torch.full((3,), 2.0).double())
    torch.testing.assert_close(logits(model), logits(folded), rtol=1e-3, atol=1e-3)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("names", [["default"], ["plain"], ["default", "plain"]], ids=str)
def test_merge_and_unload_takes_the_adapters_that_are_named(names: list[str]) -> None:
    adapter, model = two_adapters()
    adapter.set_rank(2)
    model.base_model.set_adapter(names)
    expected = logits(model)
    merged = model.merge_and_unload(adapter_names=names)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_merge_merges_only_the_nested_adapter() -> None:
    adapter, model = two_adapters()
    adapter.set_rank(2)
    expected = logits(model)
    model.base_model.set_adapter(["default", "plain"])  # the other one is active too
    adapter.merge(2)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    adapter.unmerge()


@pytest.mark.parametrize("order", [["default", "plain"], ["plain", "default"]], ids=str)
@pytest.mark.parametrize("kind", list(oracle.KINDS))
def test_unmerge_takes_out_only_the_nested_adapter(kind: str, order: list[str]) -> None:
    nested = nested_layer(kind, NESTING)
    model, layer = nested.adapter.model, nested.layer
    model.add_adapter("plain", lora_config(NESTING, target_modules=["layer"], fan_in_fan_out=kind == "Conv1D"))
    model.double()
    randomize(model, seed=3)
    weight = layer.base_layer.weight
    base = weight.detach().clone()
    model.merge_adapter(adapter_names=["plain"])
    with_plain = weight.detach().clone()
    model.unmerge_adapter()
    for name in order:
        if name == "default":
            nested.adapter.merge(2)
        else:
            model.merge_adapter(adapter_names=[name])
    assert layer.merged_adapters == order
    nested.adapter.unmerge()
    assert layer.merged_adapters == ["plain"]
    torch.testing.assert_close(weight.detach(), with_plain, rtol=1e-12, atol=1e-12)
    assert (with_plain - base).abs().max() > 0.01
    nested.adapter.unmerge()  # nothing of it is merged
    assert layer.merged_adapters == ["plain"]
    model.unmerge_adapter()
    torch.testing.assert_close(weight.detach(), base, rtol=1e-12, atol=1e-12)


def test_unmerge_from_under_another_kind_of_adapter_is_refused() -> None:
    """DoRA scales the weights that it finds, and with them what was merged before."""
    nested = nested_layer("Linear", NESTING)
    model, layer = nested.adapter.model, nested.layer
    model.add_adapter("dora", lora_config(NESTING, target_modules=["layer"], use_dora=True))
    model.double()
    randomize(model, seed=3)
    nested.adapter.merge(2)
    model.merge_adapter(adapter_names=["dora"])
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(MatryoshkaError, match="'dora' is of another kind and was merged on top of 'default'"):
        nested.adapter.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.merged_adapters == ["default", "dora"]
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["dora"])
    nested.adapter.merge(2)
    nested.adapter.unmerge()  # from above it
    assert layer.merged_adapters == ["dora"]


@pytest.mark.parametrize("kind", list(oracle.KINDS))
def test_disabled_merged_and_second_adapters_count_in_training_too(kind: str) -> None:
    nested = nested_layer(kind, NESTING)
    model, layer = nested.adapter.model, nested.layer
    x = nested.kind.batch(3)
    base = layer.base_layer(x)
    with model.disable_adapter():
        torch.testing.assert_close(layer(x), base, rtol=0, atol=0)
    nested.adapter.merge(2)
    torch.testing.assert_close(layer(x), nested.kind.apply(layer.base_layer, layer.base_layer.weight, x))
    nested.adapter.unmerge()
    torch.testing.assert_close(layer(x), nested.expected(p_of(NESTING), x), rtol=1e-12, atol=1e-12)
    model.add_adapter("plain", lora_config(NESTING, target_modules=["layer"], fan_in_fan_out=kind == "Conv1D"))
    model.double()
    randomize(model, seed=3)
    model.base_model.set_adapter(["default", "plain"])
    both = layer(x) - base
    model.base_model.set_adapter(["plain"])
    plain = layer(x) - base
    model.base_model.set_adapter(["default"])
    torch.testing.assert_close(both, plain + (layer(x) - base), rtol=1e-10, atol=1e-10)
    assert plain.abs().max() > 1e-3


def test_an_adapter_that_is_loaded_beside_another_says_that_it_is_not_active(tmp_path: Path) -> None:
    nested_llama(NESTING).save(tmp_path / "second")
    first = nested_llama(NESTING)
    with pytest.warns(UserWarning, match=r"'second' is loaded, and default is still the active one: .*set_adapter"):
        load(first.model, tmp_path / "second", adapter="second")


def test_two_nested_adapters_have_ranks_of_their_own() -> None:
    first = nested_llama(NESTING)
    other = Nesting([3, 5], "rank", 0.8)
    model: Any = first.model
    model.add_adapter("second", lora_config(other, target_modules=["v_proj", "down_proj"]))
    randomize(model, seed=4)
    second = nest_as(model, other, rule="dylora", adapter="second")
    assert second.nesting == other
    assert first.nesting == NESTING
    assert NestedAdapter(model, "second").rule.name == "dylora"
    assert first.rule.name == "matryoshka"
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    tensors = [get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "second")]
    for ranks in ((1, 3), (8, 3), (8, 5), (2, 5)):
        first.set_rank(ranks[0])
        second.set_rank(ranks[1])
        assert (first.rank, second.rank) == ranks
        folded = oracle.fold(tiny_llama(), tensors[0], prefix(NESTING, ranks[0]))
        folded = oracle.fold(folded, tensors[1], prefix(other, ranks[1]))
        torch.testing.assert_close(logits(model), logits(folded), rtol=1e-3, atol=1e-3)
    with pytest.raises(MatryoshkaError, match="trained ranks are 3, 5"):
        second.set_rank(1)
    first.reorder()
    assert not second.reordered
    torch.testing.assert_close(get_peft_model_state_dict(model, adapter_name="second"), tensors[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["0", "q_proj", "model", "weight"])
def test_an_adapter_with_the_name_of_a_part_of_the_model(name: str, tmp_path: Path) -> None:
    """PEFT leaves what is below that part out of the files of the other adapters."""
    message = f"adapter '{name}' has the name of a part of the model, .*Give the adapter another name"
    adapter = nested_llama(NESTING)
    model: Any = adapter.model
    adapter.save(tmp_path / "good")
    with pytest.raises(MatryoshkaError, match=message):
        load(model, tmp_path / "good", adapter=name)
    assert list(model.peft_config) == ["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's own about some names
        model.add_adapter(name, lora_config(NESTING))
    writes: list[Callable[[], object]] = [
        lambda: adapter.save(tmp_path / "bad"),
        lambda: adapter.export(tmp_path / "bad", 4),
        lambda: model.save_pretrained(str(tmp_path / "bad"), selected_adapters=["default"]),
        lambda: nest_as(model, NESTING, adapter=name),
        lambda: nest_as(model, NESTING),
        lambda: load(model, tmp_path / "good", adapter="second"),
    ]
    for write in writes:
        with pytest.raises(MatryoshkaError, match=message):
            write()
    assert not (tmp_path / "bad").exists()
    model.delete_adapter(name)
    adapter.save(tmp_path / "bad")
    assert files_of(tmp_path / "bad") == files_of(tmp_path / "good")


@pytest.mark.parametrize("name", ["norm", "act_fn"])
def test_an_adapter_may_have_the_name_of_a_part_that_no_adapter_is_in(name: str, tmp_path: Path) -> None:
    adapter = nested_llama(NESTING)
    model: Any = adapter.model
    adapter.save(tmp_path / "alone")
    model.add_adapter(name, lora_config(NESTING))
    adapter.save(tmp_path / "beside")
    assert files_of(tmp_path / "beside") == files_of(tmp_path / "alone")
    load(model, tmp_path / "alone", adapter="second")


def test_the_name_of_a_part_that_is_trained_whole_is_refused() -> None:
    head = nn.Sequential(OrderedDict(dense=nn.Linear(4, 4), out=nn.Linear(4, 4)))
    base = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), head=head))
    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
    model: Any = get_peft_model(base, config)
    model.add_adapter("dense", config)
    with pytest.raises(MatryoshkaError, match=r"adapter 'dense' has the name of a part of the model, head\.dense"):
        nest(model, [1, 2])


def test_layers_that_peft_does_not_read_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = nested_llama(NESTING)

    def first_layer(*args: Any, **options: Any) -> dict[str, Tensor]:
        return {k: v for k, v in get_peft_model_state_dict(*args, **options).items() if ".layers.0." in k}

    monkeypatch.setattr(saving, "get_peft_model_state_dict", first_layer)
    with pytest.raises(MatryoshkaError, match="PEFT has read 7 of the 14 layers of adapter 'default'"):
        adapter.save(tmp_path / "saved")


def test_an_adapter_that_peft_makes_anew_is_plain_until_it_is_nested_again() -> None:
    """As it does for an adapter name that its layers already have."""
    adapter = nested_llama(NESTING)
    base = adapter.model.get_base_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = get_peft_model(base, lora_config(NESTING))
    randomize(again)
    with pytest.raises(MatryoshkaError, match="no nested adapter 'default'"):
        adapter.set_rank(1)
    with pytest.raises(MatryoshkaError, match="no nested adapter 'default'"):
        NestedAdapter(again)
    assert torch.equal(logits(again.eval()), logits(plain_llama()))
    nest_as(again, NESTING).set_rank(1)
    assert not torch.equal(logits(again), logits(plain_llama()))


@pytest.mark.parametrize("kind", list(oracle.KINDS))
def test_each_kind_of_layer_may_be_made_anew(kind: str) -> None:
    nested = nested_layer(kind, NESTING)
    made_anew(nested.adapter, ["layer"], fan_in_fan_out=kind == "Conv1D")
    nested.adapter.model.double()
    randomize(nested.adapter.model)
    p = torch.full((8,), NESTING.scale, dtype=torch.float64)
    x = nested.kind.batch(3)
    torch.testing.assert_close(nested.layer(x), nested.expected(p, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deploy", ["paper", "reordered"])
def test_an_adapter_that_is_plain_in_some_layers_is_no_nested_one(deploy: Any, tmp_path: Path) -> None:
    adapter = nested_llama(NESTING, deploy=deploy)
    callback = adapter.callback()
    made_anew(adapter, ["1.mlp.up_proj"])
    uses: list[Callable[[], object]] = [
        lambda: adapter.set_rank(1),
        lambda: adapter.rank,
        lambda: adapter.draw(0),
        lambda: adapter.rows([1]).__enter__(),
        lambda: adapter.reorder(),
        lambda: adapter.callback(),
        lambda: callback.on_step_begin(TrainingArguments("none"), TrainerState(), TrainerControl()),
        lambda: adapter.save(tmp_path / "saved"),
        lambda: adapter.export(tmp_path / "exported", 8),
        lambda: adapter.model.save_pretrained(str(tmp_path / "by PEFT")),
        lambda: NestedAdapter(adapter.model),
    ]
    for use in uses:
        with pytest.raises(MatryoshkaError, match=r"'default' anew in layer .*1\.mlp\.up_proj .*: call nest\(\) again"):
            use()
    assert not list(tmp_path.iterdir())
    nest_as(adapter.model, NESTING).set_rank(1)


def made_anew(adapter: NestedAdapter, targets: list[str], **lora: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(adapter.model.get_base_model(), lora_config(NESTING, target_modules=targets, **lora))


# PEFT's functions that read the factors.

COMBINATIONS = ["cat", "svd", "linear", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]


def combined(model: Any, combination: str) -> Tensor:
    density = {"density": 0.6} if combination not in ("cat", "svd", "linear") else {}
    model.add_weighted_adapter(["default", "plain"], [0.7, -0.4], "both", combination, **density)
    model.set_adapter("both")
    return logits(model)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_sums_of_adapters_are_those_of_ordinary_ones(combination: str, form: str) -> None:
    """PEFT's result on plain adapters, of which one is what the nested one is at a rank."""
    targets = ["embed_tokens", "q_proj", "up_proj"]
    results = {}
    for rank in (2, 8):
        adapter = in_form(nested_llama(NESTING, deploy=deploy_of(form), target_modules=targets), form)
        model: Any = adapter.model
        model.add_adapter("plain", lora_config(NESTING, target_modules=targets))
        for name, parameter in model.named_parameters():
            if ".plain." in name:
                torch.manual_seed(len(name))
                parameter.data.normal_(std=0.3)
        model.eval()
        adapter.set_rank(rank)
        before = logits(model)
        results[rank] = combined(model, combination)
        model.set_adapter("default")
        assert torch.equal(logits(model), before)
        assert adapter.rank == rank

        plain = ordinary(adapter, p_in_form(form, rank), targets)
        plain.add_adapter("plain", lora_config(NESTING, target_modules=targets))
        set_peft_model_state_dict(plain, get_peft_model_state_dict(model, adapter_name="plain"), adapter_name="plain")
        torch.testing.assert_close(results[rank], combined(plain.eval(), combination), rtol=1e-3, atol=1e-3)
    assert (results[2] - results[8]).abs().max() > 0.01


def ordinary(adapter: NestedAdapter, p: Tensor, targets: list[str]) -> Any:
    """A plain adapter with p in its B, at the scale of the first column; columns after the rank are zeros."""
    scale = float(p[0])
    model: Any = get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=8 * scale, target_modules=targets))
    tensors = get_peft_model_state_dict(adapter.model, save_embedding_layers=False)
    share = (p / scale).float()
    for key, tensor in tensors.items():
        is_A = "lora_A" in key or "embedding_A" in key
        tensors[key] = tensor * (share > 0)[:, None] if is_A else tensor * share
    set_peft_model_state_dict(model, tensors)
    return model


def test_a_sum_with_an_rslora_adapter_has_the_scale_of_its_parts() -> None:
    model: Any = one_layer("Linear", Nesting([8]), lora_alpha=16, use_rslora=True).eval()
    nest(model)
    x = oracle.KINDS["Linear"].batch(2)
    layer = model.base_model.model.layer
    own = layer(x) - layer.base_layer(x)
    model.add_weighted_adapter(["default"], [1.0], "copy", "linear")
    assert model.peft_config["default"].use_rslora
    model.set_adapter("copy")
    torch.testing.assert_close(layer(x) - layer.base_layer(x), own, rtol=1e-5, atol=1e-5)


def test_a_sum_of_an_adapter_with_itself() -> None:
    nested = nested_layer("Linear", NESTING, deploy="reordered")
    model, layer = nested.adapter.model.eval(), nested.layer
    nested.adapter.set_rank(2)
    x = nested.kind.batch(2)
    own = layer(x) - layer.base_layer(x)
    model.add_weighted_adapter(["default", "default"], [1.0, 2.0], "both", "cat")
    model.set_adapter("both")
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 3 * own, rtol=1e-12, atol=1e-12)


def test_a_sum_with_a_bare_parameter_is_refused_by_peft() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = lora_config(NESTING, target_modules=[], target_parameters=["layer.weight"])
        model: Any = get_peft_model(Net(nn.Linear(6, 6)), config)
    nest_as(model, NESTING)
    with pytest.raises(ValueError, match=r"does not support targeting nn\.Parameter"):
        model.add_weighted_adapter(["default"], [1.0], "copy", "cat")


def test_a_sum_that_peft_refuses_changes_nothing() -> None:
    adapter, model = two_adapters()
    adapter.set_rank(2)
    before = logits(model)
    with pytest.raises(ValueError, match="must have the same r value"):
        model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "both", "linear")
    with pytest.raises(ValueError, match="nobody does not exist"):
        model.add_weighted_adapter(["default", "nobody"], [1.0, 1.0], "both", "cat")
    assert torch.equal(logits(model), before)
    adapter.set_rank(8)
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [2, 8])
def test_conversion_by_peft_is_of_the_whole_adapter_or_refused(form: str, rank: int) -> None:
    """It reads ``scale * B A``, which is what is computed at full rank without P alone."""
    convert_to_lora = pytest.importorskip("peft.tuners.lora.conversion").convert_to_lora
    reduce_intruder_dimension = pytest.importorskip("peft.tuners.lora.intruders").reduce_intruder_dimension
    nested = nested_layer("Linear", NESTING, deploy=deploy_of(form))
    in_form(nested.adapter, form).set_rank(rank)
    reads: list[Callable[[], Any]] = [
        lambda: nested.layer.get_delta_weight("default"),
        lambda: convert_to_lora(nested.adapter.model, rank=8)[1],
        lambda: reduce_intruder_dimension(nested.adapter.model, logging_sink=None),
    ]
    if rank == 8 and form != "kept":
        delta = nested.kind.delta(nested.layer.base_layer, *nested.factors, prefix(NESTING, 8))
        torch.testing.assert_close(reads[0](), delta, rtol=1e-12, atol=1e-12)
        found = reads[1]()
        A, B = (next(value for key, value in found.items() if f"lora_{f}" in key) for f in "AB")
        torch.testing.assert_close(B.double() @ A.double(), delta, rtol=1e-4, atol=1e-4)
    else:
        for read in reads:
            with pytest.raises(MatryoshkaError, match=rf"used otherwise \(rank {rank}\): export"):
                read()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("own", [1, 8])
def test_an_adapter_of_another_rank_in_its_place_is_refused(own: int, training: bool, tmp_path: Path) -> None:
    """A diagonal of one number would silently stand before all columns."""
    hotswap = pytest.importorskip("peft.utils.hotswap")
    nesting = Nesting([own])
    other = get_peft_model(tiny_llama(), LoraConfig(r=12, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), lora_config(nesting, target_modules=["q_proj"]))
    nest_as(model.train(training), nesting)
    hotswap.hotswap_adapter(model, str(tmp_path), "default")
    with pytest.raises(MatryoshkaError, match=f"nested at rank {own} and has rank 12 now: .*a name of its own"):
        model(tokens())


def test_pefts_names_of_classes_are_kept() -> None:
    """PEFT compares some of them, and prints them all."""
    nested, plain = nested_llama(NESTING, target_modules=["embed_tokens", "q_proj"]).model, plain_llama()
    assert repr(nested.base_model.model.model.layers[0].self_attn.q_proj).startswith("lora.Linear(")
    assert repr(nested.base_model.model.model.embed_tokens).startswith("lora.Embedding(")
    assert [status.module_type for status in nested.get_layer_status()] == ["lora.Embedding"] + ["lora.Linear"] * 2
    assert nested.get_model_status().adapter_model_type == plain.get_model_status().adapter_model_type == "LoraModel"


def test_a_second_adapter_on_a_bare_parameter() -> None:
    """PEFT finds the wrapper of the first one by the name of its class."""
    x = torch.randn(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = lora_config(NESTING, target_modules=[], target_parameters=["layer.weight"])
        model: Any = get_peft_model(Net(nn.Linear(6, 6)), config)
        adapter = nest_as(model, NESTING, deploy="paper")
        if Version(version("peft")) < Version("0.20"):
            pytest.skip("this version of PEFT allows one adapter with target_parameters")
        model.add_adapter("second", lora_config(NESTING, target_modules=[], target_parameters=["layer.weight"]))
    randomize(model)
    second = nest_as(model.eval(), NESTING, deploy="paper", adapter="second")
    base = model.base_model.model.layer.base_layer
    for name, handle in (("default", adapter), ("second", second)):
        model.set_adapter(name)
        handle.set_rank(2)
        wrapper = model.base_model.model.layer
        A, B = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        delta = torch.einsum("or,r,ri->oi", B, prefix(NESTING, 2).float(), A)
        torch.testing.assert_close(model(x), nn.functional.linear(x, base.weight + delta, base.bias))


def test_a_deleted_adapter_is_gone_and_the_others_stay() -> None:
    adapter, model = two_adapters()
    model.set_adapter("plain")
    plain = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), plain)
    with pytest.raises(MatryoshkaError, match="no nested adapter 'default': call nest\\(\\) or load\\(\\) first"):
        adapter.set_rank(1)
    # The name may be used again, and means a plain adapter until it is nested.
    model.add_adapter("default", lora_config(NESTING))
    with pytest.raises(MatryoshkaError, match="no nested adapter 'default'"):
        NestedAdapter(model)
    randomize(model)
    nest_as(model, NESTING).set_rank(1)


def test_deleting_a_plain_adapter_leaves_the_nested_one() -> None:
    adapter, model = two_adapters()
    adapter.set_rank(4)
    before = logits(model)
    model.delete_adapter("plain")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("deploy", "p"), [("reordered", kept(NESTING, 4)), ("paper", prefix(NESTING, 4))])
def test_an_adapter_may_be_nested_again_to_be_deployed_in_another_way(deploy: Any, p: Tensor) -> None:
    nested = nested_layer("Linear", NESTING, deploy="paper" if deploy == "reordered" else "reordered")
    again = nest_as(nested.adapter.model.eval(), NESTING, deploy=deploy)
    assert nested.adapter.state.deploy == deploy
    again.set_rank(4)
    x = nested.kind.batch(2)
    torch.testing.assert_close(nested.layer(x), nested.expected(p, x), rtol=1e-12, atol=1e-12)


def test_an_adapter_may_be_nested_again_by_another_rule() -> None:
    nested = nested_layer("Linear", NESTING, "lora")
    again = nest_as(nested.adapter.model, NESTING, "matryoshka")
    x = nested.kind.batch(2)
    torch.testing.assert_close(nested.layer(x), nested.expected(p_of(NESTING), x), rtol=1e-12, atol=1e-12)
    assert nested.adapter.rule.name == again.rule.name == "matryoshka"


# Scale.


@pytest.mark.parametrize("kind", ["Linear", "Embedding", "Conv2d"])
@pytest.mark.parametrize("training", [False, True])
def test_pefts_scaling_functions_multiply_the_nested_adapter(kind: str, training: bool) -> None:
    nested = nested_layer(kind, NESTING)
    nested.adapter.model.train(training)
    nested.adapter.set_rank(2)
    p = p_of(NESTING) if training else prefix(NESTING, 2)
    x = nested.kind.batch(3)
    layer = nested.layer

    def is_scaled_by(factor: float) -> None:
        torch.testing.assert_close(layer(x), nested.expected(p * factor, x), rtol=1e-12, atol=1e-12)

    is_scaled_by(1)
    layer.set_scale("default", 0.25)
    is_scaled_by(0.25)
    if kind != "Embedding":  # PEFT's scale_layer passes over embeddings
        layer.scale_layer(3.0)
        is_scaled_by(0.75)
        layer.unscale_layer(3.0)
        is_scaled_by(0.25)
        layer.unscale_layer()
        is_scaled_by(1)
    layer.set_scale("default", 1)
    with rescale_adapter_scale(nested.adapter.model, multiplier=0.5):
        is_scaled_by(0.5)
        with nested.adapter.rows([1, 8, 2]):
            rows = torch.stack([prefix(NESTING, rank) for rank in (1, 8, 2)])
            torch.testing.assert_close(layer(x), nested.expected(rows * 0.5, x), rtol=1e-12, atol=1e-12)
        before = layer.base_layer.weight.detach().clone()
        nested.adapter.merge(4)
        delta = nested.kind.delta(layer.base_layer, *nested.factors, prefix(NESTING, 4) * 0.5)
        torch.testing.assert_close(layer.base_layer.weight.detach(), before + delta.detach(), rtol=1e-12, atol=1e-12)
    nested.adapter.unmerge()  # takes out what was put in, though the scale is another now
    torch.testing.assert_close(layer.base_layer.weight.detach(), before, rtol=1e-12, atol=1e-12)
    nested.adapter.set_rank(2)
    is_scaled_by(1)


def test_a_scale_of_zero_turns_it_off() -> None:
    nested = nested_layer("Linear", NESTING)
    x = nested.kind.batch(2)
    with rescale_adapter_scale(nested.adapter.model, multiplier=0.0):
        torch.testing.assert_close(nested.layer(x), nested.layer.base_layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_a_scale_set_before_nesting_stands(factor: float) -> None:
    model: Any = one_layer("Linear", NESTING).eval()
    layer = model.base_model.model.layer
    x = oracle.KINDS["Linear"].batch(2)
    full = model(x)
    layer.scale_layer(factor)
    scaled = model(x)
    adapter = nest_as(model, NESTING, deploy="paper")
    torch.testing.assert_close(model(x), scaled, rtol=1e-14, atol=1e-14)
    nest_as(model, NESTING, "lora", deploy="paper")  # again
    torch.testing.assert_close(model(x), scaled, rtol=1e-14, atol=1e-14)
    layer.unscale_layer()
    torch.testing.assert_close(model(x), full, rtol=1e-14, atol=1e-14)
    adapter.set_rank(2)
    expected = NestedLayer(oracle.KINDS["Linear"], adapter, layer).expected(prefix(NESTING, 2), x)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


# Batches of mixed adapters.


def test_adapter_names_mix_nested_plain_and_base() -> None:
    adapter, model = two_adapters()
    adapter.set_rank(2)
    alone = {"__base__": logits(tiny_llama())}
    for name in ("default", "plain"):
        model.set_adapter(name)
        alone[name] = logits(model)
    names = ["default", "__base__", "plain"]
    with torch.no_grad():
        mixed = model(tokens(), adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-3, atol=1e-3)
    assert (alone["default"][0] - alone["plain"][0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["Embedding", "Embedding-scaled", "Linear", "Conv2d"])
@pytest.mark.parametrize("deploy", ["paper", "reordered"])
def test_each_kind_of_layer_takes_batches_of_mixed_adapters(kind: str, deploy: Any) -> None:
    nested = nested_layer(kind, NESTING, deploy=deploy)
    model, layer = nested.adapter.model.eval(), nested.layer
    model.add_adapter("plain", lora_config(NESTING, target_modules=["layer"]))
    model.double()
    randomize(model, seed=3)
    other = nest_as(model, NESTING, "lora", adapter="plain")
    nested.adapter.set_rank(2)
    other.set_rank(4)
    x = nested.kind.batch(5)
    alone = {"__base__": layer.base_layer(x)}
    for name in ("default", "plain"):
        model.set_adapter(name)
        alone[name] = layer(x)
    names = ["plain", "default", "__base__", "default", "plain"]
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(layer(x, adapter_names=names), expected, rtol=1e-12, atol=1e-12)
    assert (alone["default"] - alone["plain"]).abs().max() > 0.01


# Training details.


def test_dropout_acts_on_the_adapters_input_while_training() -> None:
    nested = nested_layer("Linear", NESTING, lora_dropout=0.5)
    x = nested.kind.batch(4)
    A, B = nested.factors
    torch.manual_seed(3)
    actual = nested.layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    expected = nested.layer.base_layer(x) + dropped @ A.T * p_of(NESTING) @ B.T
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(actual, nested.expected(p_of(NESTING), x))
    nested.adapter.model.eval()
    torch.testing.assert_close(nested.layer(x), nested.expected(prefix(NESTING, 8), x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["dylora", "dylora-all", "dylora-frozen", "stratified"])
def test_training_before_the_first_draw_is_an_error(rule: str) -> None:
    adapter = nested_llama(NESTING, rule)
    logits(adapter.model)  # evaluation needs no draw
    adapter.model.train()
    with pytest.raises(MatryoshkaError, match=rf"{rule}.* nothing was drawn: give adapter.callback\(\).*adapter.draw"):
        adapter.model(tokens())
    if rule == "stratified":
        with pytest.raises(MatryoshkaError, match="say how many rows"):
            adapter.draw(0)
    adapter.draw(0, rows=3)
    adapter.model(tokens())


def test_autocast_bf16_is_plain_peft_to_the_last_bit_and_trains_in_fp32() -> None:
    adapter, plain = nested_llama(NESTING), plain_llama()
    exact = logits(adapter.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(adapter.model), logits(plain))
        assert (logits(adapter.model) - exact).norm() < 0.05 * exact.norm()
        adapter.set_rank(1)
        assert (logits(adapter.model) - exact).norm() > 0.1 * exact.norm()
        adapter.model.train()
        adapter.model(tokens()).logits.float().square().mean().backward()
    grads = {name: p.grad for name, p in adapter.model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.dtype == torch.float32 and grad.norm() > 0 for grad in grads.values())


@pytest.mark.parametrize("rule", ["matryoshka", "stratified"])
def test_autocast_agrees_with_the_formula_to_bf16(rule: str) -> None:
    nested = nested_layer("Linear", NESTING, rule, dtype=torch.float32)
    nested.adapter.draw(0, rows=4)
    x = nested.kind.batch(4).float()
    p = RULES[rule].draw(NESTING, 0, 0, 4).diagonal
    expected = nested.expected(p.float(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = nested.layer(x)
    assert (output - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_few_steps_train_like_the_formula() -> None:
    """AdamW on the layer and on the oracle's dense form: the same factors in the end."""
    nested = nested_layer("Linear", NESTING, "stratified")
    A, B = (factor.detach().clone().requires_grad_() for factor in nested.factors)
    ours_optimizer = torch.optim.AdamW(nested.factors, lr=0.01)
    their_optimizer = torch.optim.AdamW([A, B], lr=0.01)
    for step in range(5):
        x, target = nested.kind.batch(6), torch.randn(6, 3, 10, dtype=torch.float64)
        nested.adapter.draw(step, rows=6)
        p = RULES["stratified"].draw(NESTING, 0, step, 6).diagonal
        base = nested.layer.get_base_layer()
        for optimizer, output in (
            (ours_optimizer, nested.layer(x)),
            (their_optimizer, nested.kind.forward(base, A, B, p, x)),
        ):
            optimizer.zero_grad()
            (output - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(nested.factors, (A, B), rtol=1e-9, atol=1e-9)


# torch.compile.


@pytest.fixture
def no_recompilation() -> Any:
    torch._dynamo.reset()
    yield torch._dynamo.config.patch(error_on_recompile=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("target_modules", [["q_proj", "up_proj", "down_proj"], ["embed_tokens", "o_proj"]], ids=str)
def test_compiled_in_one_graph_and_not_again_for_another_rank(no_recompilation: Any, target_modules: Any) -> None:
    adapter = nested_llama(NESTING, layers=1, target_modules=target_modules)
    compiled = torch.compile(adapter.model, backend="aot_eager", fullgraph=True, dynamic=False)
    seen = []
    with no_recompilation:
        for rank in (8, 1, 4, 2, 8):
            adapter.set_rank(rank)
            seen.append(logits(compiled))
            torch.testing.assert_close(seen[-1], logits(adapter.model), rtol=1e-4, atol=1e-4)
        adapter.set_rank({"o_proj|q_proj": 2})
        torch.testing.assert_close(logits(compiled), logits(adapter.model), rtol=1e-4, atol=1e-4)
    assert (seen[0] - seen[1]).abs().max() > 0.05


def test_compiled_rows_do_not_recompile_for_other_ranks(no_recompilation: Any) -> None:
    adapter = nested_llama(NESTING, layers=1)
    compiled = torch.compile(adapter.model, backend="aot_eager", fullgraph=True, dynamic=False)
    with no_recompilation:
        for ranks in ([1, 2, 4], [8, 8, 1], [2, 4, 8]):
            with adapter.rows(ranks):
                torch.testing.assert_close(logits(compiled), logits(adapter.model), rtol=1e-4, atol=1e-4)


INDUCTOR = pytest.param(
    "inductor",
    "dylora",
    marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on CPUs"),
)


@pytest.mark.parametrize(
    ("backend", "rule"),
    [("aot_eager", "matryoshka"), ("aot_eager", "dylora"), ("aot_eager", "stratified"), INDUCTOR],
)
def test_compiled_training_does_not_recompile_for_another_draw(no_recompilation: Any, backend: str, rule: str) -> None:
    adapter = nested_llama(NESTING, rule, layers=1)
    adapter.model.train()
    compiled = torch.compile(adapter.model, backend=backend, fullgraph=True, dynamic=False)
    with no_recompilation:
        for step in range(4):
            adapter.draw(step, rows=3)
            grads = []
            for model in (compiled, adapter.model):
                model(tokens()).logits.square().mean().backward()
                grads.append({n: p.grad.clone() for n, p in adapter.model.named_parameters() if p.grad is not None})
                adapter.model.zero_grad()
            for name, grad in grads[0].items():
                torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-5)


# Copies.


def by_deepcopy(model: Any) -> Any:
    return copy.deepcopy(model)


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("rule", ["matryoshka", "stratified"])
def test_a_copy_is_independent(duplicate: Callable[[Any], Any], rule: str) -> None:
    adapter = nested_llama(NESTING, rule, target_modules=["embed_tokens", "q_proj", "up_proj"])
    adapter.set_rank(4)
    if rule == "stratified":
        adapter.draw(0, rows=3)
    before = logits(adapter.model)
    clone = NestedAdapter(duplicate(adapter.model))
    assert torch.equal(logits(clone.model), before)
    assert (clone.nesting, clone.rule.name, clone.rank) == (NESTING, rule, 4)
    clone.set_rank(1)
    assert adapter.rank == 4
    assert torch.equal(logits(adapter.model), before)
    assert not torch.equal(logits(clone.model), before)
    clone.reorder()
    assert not adapter.reordered
    with adapter.rows([1, 2, 8]):
        assert logits(clone.model, tokens(2)).shape[0] == 2
    adapter.model.train()
    clone.model.train()
    assert not torch.equal(logits(adapter.model), logits(clone.model))


def test_the_handle_may_be_made_again_and_copied() -> None:
    adapter = nested_llama(NESTING)
    NestedAdapter(adapter.model).set_rank(2)
    assert adapter.rank == 2
    clone = copy.deepcopy(adapter)
    clone.set_rank(8)
    assert adapter.rank == 2


# Moving and casting.


@pytest.mark.parametrize("kind", list(oracle.KINDS))
def test_cast_to_fp64_after_nesting_it_is_exact(kind: str) -> None:
    """The diagonal must not have been kept in the fp32 of the moment when it was nested."""
    nesting = Nesting([1, 2, 5], "sqrt", 3.0)  # scales that fp32 does not hold
    nested = nested_layer(kind, nesting, dtype=torch.float32)
    nested.adapter.model.double()
    randomize(nested.adapter.model)
    x = nested.kind.batch(3)
    torch.testing.assert_close(nested.layer(x), nested.expected(p_of(nesting), x), rtol=1e-12, atol=1e-12)
    with nested.adapter.rows([5, 1, 2]):
        p = torch.stack([prefix(nesting, rank) for rank in (5, 1, 2)])
        torch.testing.assert_close(nested.layer(x), nested.expected(p, x), rtol=1e-12, atol=1e-12)
    nested.adapter.model.eval()
    for rank in nesting.ranks:
        nested.adapter.set_rank(rank)
        torch.testing.assert_close(nested.layer(x), nested.expected(prefix(nesting, rank), x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_to_half_precision_after_nesting_it_is_plain_peft(dtype: torch.dtype) -> None:
    adapter, plain = nested_llama(NESTING), plain_llama()
    adapter.model.to(dtype)
    plain.to(dtype)
    assert torch.equal(logits(adapter.model), logits(plain))
    with adapter.rows([1, 2, 8]):
        assert logits(adapter.model).dtype == dtype
    adapter.model.train()
    assert logits(adapter.model).dtype == dtype


def test_moved_to_meta_and_back_it_still_runs() -> None:
    """The only other device that every machine has."""
    adapter = nested_llama(NESTING)
    model = adapter.model.to("meta")
    assert model(tokens().to("meta")).logits.device.type == "meta"
    adapter.set_rank(2)
    assert model(tokens().to("meta")).logits.device.type == "meta"
    with adapter.rows([1, 2, 8]):
        assert model(tokens().to("meta")).logits.device.type == "meta"


# What nest() refuses. Each message names the fault and the way out, and the model is as it was.


def refused(model: Any, message: str, x: Tensor | None = None, **options: Any) -> None:
    """nest() raises, and the model computes, holds and is made of what it was before."""

    def run() -> Tensor | None:
        if x is None:
            return None
        with torch.no_grad():
            torch.manual_seed(0)
            output = model(x)
        found: Tensor = getattr(output, "logits", output)
        return found

    before = run(), {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    variants = [dict(m.lora_variant) for m in model.modules() if hasattr(m, "lora_variant")]
    training = [m.training for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(MatryoshkaError, match=message):
        nest(model, **{"ranks": NESTING.ranks, "scaling": NESTING.scaling, **options})
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert [type(m) for m in model.modules()] == before[2]
    assert [m.training for m in model.modules()] == training
    assert [dict(m.lora_variant) for m in model.modules() if hasattr(m, "lora_variant")] == variants
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())
    after = run()
    torch.testing.assert_close(after, before[0], rtol=0, atol=0)
    with pytest.raises(MatryoshkaError, match="no nested adapter"):
        NestedAdapter(model)


def llama_with(config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(tiny_llama(num_hidden_layers=1), config).eval()


NEW_VARIANTS: list[tuple[dict[str, Any], str]] = []
if hasattr(lora_configs, "KasaConfig"):  # since PEFT 0.21
    NEW_VARIANTS = [
        ({"init_lora_weights": "mica"}, "q_proj cannot be nested: MiCALinearVariant .*holds PEFT's only slot"),
        ({"kasa_config": lora_configs.KasaConfig()}, "kasa_config makes another method of LoRA"),
        ({"velora_config": lora_configs.VeloraConfig()}, "velora_config makes another method of LoRA"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 16}, r"r=16, and the largest nested rank is 8: end the ranks with 16, or write LoraConfig\(r=8, ...\)"),
        ({"r": 4}, "r=4, and the largest nested rank is 8"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern gives layers ranks or scales of their own: remove it"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern gives layers ranks or scales of their own"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights='pissa' assumes plain LoRA's scale.*: use True or",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' assumes"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' assumes"),
        ({"use_dora": True}, "use_dora makes another method of LoRA, which has no nested ranks: leave it out"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens makes another method of LoRA"),
        *NEW_VARIANTS,
    ],
    ids=str,
)
def test_configs_that_contradict_the_nesting(changes: dict[str, Any], message: str) -> None:
    model = llama_with(lora_config(NESTING, **{"target_modules": ["q_proj", "up_proj"], **changes}))
    refused(model, message, tokens())


@pytest.mark.parametrize("rule", ["matryoshka", "dylora", "stratified"])
def test_columns_that_cancel_out_under_one_scale(rule: str) -> None:
    """PEFT's orthogonal start is the base model, and a diagonal between its factors would be far from it."""
    x = oracle.KINDS["Linear"].batch(2)
    torch.manual_seed(0)
    model: Any = get_peft_model(
        OneLayer(oracle.KINDS["Linear"].build()).double(),
        lora_config(NESTING, target_modules=["layer"], init_lora_weights="orthogonal"),
    )
    layer = model.base_model.model.layer
    torch.testing.assert_close(model(x), layer.base_layer(x), rtol=1e-4, atol=1e-4)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (B.double() @ torch.diag(p_of(NESTING)) @ A.double()).abs().max() > 0.01
    refused(model, "init_lora_weights='orthogonal' starts from columns that cancel out", x, rule=rule)
    nest_as(model, NESTING, rule="lora")
    torch.testing.assert_close(model(x), layer.base_layer(x), rtol=1e-4, atol=1e-4)


def test_a_bias_that_belongs_to_no_rank() -> None:
    refused(one_layer("Linear", NESTING, lora_bias=True), "lora_bias=True adds a bias that belongs to no rank")


@pytest.mark.parametrize("scaling", ["rank", "sqrt"])
def test_a_rank_of_lora_s_own_scaling_is_exported_with_its_scale(scaling: Any, tmp_path: Path) -> None:
    """``lora_alpha=16, use_rslora=...`` says alpha / r or alpha / sqrt(r), which at rank 1 is 16 in either case."""
    model: Any = one_layer("Linear", Nesting([8]), lora_alpha=16, use_rslora=scaling == "sqrt").eval()
    adapter = nest(model, [1, 8], scaling, deploy="paper")
    adapter.set_rank(1)
    adapter.export(tmp_path, 1)
    base = copy.deepcopy(model.base_model.model.layer.base_layer)
    plain = PeftModel.from_pretrained(OneLayer(base), tmp_path)
    config = plain.peft_config["default"]
    assert (config.r, config.lora_alpha) == (1, pytest.approx(16, rel=1e-14))
    assert not config.use_rslora  # which some engines ignore
    x = oracle.KINDS["Linear"].batch(2)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "model",
    [
        tiny_llama,
        lambda: nn.Linear(2, 2),
        lambda: None,
        lambda: inject_adapter_in_model(lora_config(NESTING), tiny_llama()),
        lambda: get_peft_model(tiny_llama(), lora_config(NESTING), mixed=True),
    ],
    ids=["transformers", "torch", "nothing", "injected", "mixed"],
)
def test_only_a_peft_model(model: Callable[[], Any]) -> None:
    with pytest.raises(MatryoshkaError, match=r"nest\(\) takes a PEFT model, not .*: call peft.get_peft_model"):
        nest_as(model(), NESTING)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (
            lambda: AdaLoraConfig(init_r=8, target_r=4, total_step=10, lora_alpha=6, target_modules=["q_proj"]),
            "ADALORA",
        ),
        (lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
    ],
)
def test_only_lora(config: Callable[[], Any], name: str) -> None:
    refused(llama_with(config()), f"is of type '{name}': only LoRA adapters can be nested", tokens())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "other"}, "the model has no adapter 'other'; its adapters are default"),
        ({"rule": "matroska"}, "no rule 'matroska'; did you mean 'matryoshka'"),
        ({"rule": None}, "no rule None; .*the rules are lora, matryoshka"),
        ({"deploy": "kept"}, "deploy is 'kept'; write 'reordered' or 'paper'"),
        ({"ranks": [4, 8, 2]}, r"ranks must increase strictly; write \[2, 4, 8\]"),
        ({"ranks": NESTING}, r"ranks is Nesting\(.*; write a list of integers"),
        ({"scaling": "linear"}, "scaling is 'linear'; write one of 'none', 'rank', 'sqrt'"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    refused(plain_llama(), message, tokens(), **options)


def test_a_merged_adapter() -> None:
    model = plain_llama()
    model.merge_adapter()
    refused(model, r"cannot be nested: an adapter is merged into it: call unmerge_adapter\(\) first", tokens())
    model.unmerge_adapter()
    nest_as(model, NESTING)


class Net(nn.Module):
    def __init__(self, layer: nn.Module, *inputs: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


def test_a_grouped_convolution() -> None:
    model = get_peft_model(Net(nn.Conv2d(8, 8, 3, groups=2)), lora_config(NESTING, target_modules=["layer"]))
    refused(model, "layer cannot be nested: a grouped convolution ties columns of B", torch.randn(1, 8, 5, 5))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(3, 8, 3, padding="same", dilation=2),
        lambda: nn.Conv1d(3, 8, 3, dilation=2),
        lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
    ],
    ids=["dilated", "dilated-unpadded", "circular"],
)
def test_a_convolution_that_peft_does_not_follow(layer: Callable[[], nn.Module]) -> None:
    """PEFT's lora_A has neither dilation nor padding mode: what it merges is not what it computes."""
    model = get_peft_model(Net(layer()), lora_config(NESTING, target_modules=["layer"]))
    refused(model, "layer cannot be nested: .*(dilat|padding)")


def test_multihead_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x, x, x)[0]
            return output

    model = get_peft_model(Attention(), lora_config(NESTING, target_modules=["layer"]))
    refused(model, "layer.* cannot be nested: .*MultiheadAttention takes no LoRA variant", torch.randn(2, 1, 8))


@pytest.mark.parametrize("rule", ["stratified", "dylora-frozen"])
def test_target_parameters_have_no_rows_and_no_columns_of_their_own(rule: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = lora_config(NESTING, target_modules=[], target_parameters=["layer.weight"])
        model = get_peft_model(Net(nn.Linear(6, 6)), config)
    refused(model, f"target_parameters give one delta to all rows .*; rule '{rule}'", torch.randn(2, 6), rule=rule)


def test_shared_factors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)

    model: Any = get_peft_model(Twice(), lora_config(NESTING, target_modules=["first", "second"]))
    model.base_model.model.second.lora_A = model.base_model.model.first.lora_A
    refused(model, "layer second cannot be nested: it shares its factors with layer first")


def test_weights_that_are_not_loaded_yet() -> None:
    model = get_peft_model(Net(nn.Linear(4, 4)), lora_config(NESTING, target_modules=["layer"]), low_cpu_mem_usage=True)
    with pytest.raises(MatryoshkaError, match=r"no data yet \(device meta\): load the weights first"):
        nest_as(model, NESTING)


class IgnoresVariants(LoraLinear):
    """A layer that goes its own way in forward, as PEFT's AWQ, AQLM and others do."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.base_layer(x)
        update: Tensor = self.lora_B["default"](self.lora_A["default"](x)) * self.scaling["default"]
        return output + update


class IgnoresTheAdapter(LoraLinear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.base_layer(x)
        return output


class AddsSomething(LoraLinear):
    """NaN reaches the output, but zeros do not leave the base layer's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(x, *args, **kwargs)
        return output + 1


class SkipsAToken(LoraLinear):
    """Only a part of the output obeys."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(x, *args, **kwargs).clone()
        output[..., 0] = self.base_layer(x)[..., 0]
        return output


def disguised(impostor: type) -> Any:
    """The same class by the name of one that is known to work."""
    return type("Linear", (impostor,), {"__module__": "peft.tuners.lora.layer"})


@pytest.mark.parametrize("impostor", [IgnoresVariants, IgnoresTheAdapter, AddsSomething, SkipsAToken])
def test_a_layer_that_does_not_obey_is_caught_by_its_behaviour(impostor: type) -> None:
    model = plain_llama()
    layer: Any = model.base_model.model.model.layers[1].mlp.up_proj
    layer.__class__ = impostor
    refused(model, "up_proj cannot be nested: .*takes no LoRA variant in all its paths", tokens())
    # Even under the name of a layer that is known to work.
    layer.__class__ = disguised(impostor)
    refused(model, r"layers\.1\.mlp\.up_proj .*does not obey a LoRA variant.*leave it out of target_modules", tokens())
    layer.__class__ = LoraLinear
    nest_as(model, NESTING)


def test_a_refusal_leaves_an_earlier_nesting_in_place() -> None:
    adapter = nested_llama(NESTING)
    adapter.set_rank(2)
    before = logits(adapter.model)
    with pytest.raises(MatryoshkaError):
        nest(adapter.model, [1, 2, 4])
    layer: Any = adapter.model.base_model.model.model.layers[1].mlp.up_proj
    original = type(layer)
    layer.__class__ = disguised(IgnoresVariants)
    with pytest.raises(MatryoshkaError, match="does not obey"):
        nest_as(adapter.model, NESTING, rule="lora")
    layer.__class__ = original
    assert adapter.rule.name == "matryoshka"
    assert adapter.rank == 2
    assert torch.equal(logits(adapter.model), before)


def test_an_adapter_that_is_not_active_can_be_nested() -> None:
    model = plain_llama()
    model.add_adapter("second", lora_config(NESTING))
    model.set_adapter("second")
    before = logits(model)
    adapter = nest_as(model, NESTING, adapter="default")
    assert model.active_adapter == "second"
    assert torch.equal(logits(model), before)
    assert [type(v) for m in model.modules() for v in getattr(m, "lora_variant", {}).values()] == [NestedVariant] * 14
    model.set_adapter("default")
    adapter.set_rank(1)
    assert not torch.equal(logits(model), before)


def test_nesting_works_where_adapters_are_disabled_at_the_time() -> None:
    model = plain_llama()
    with model.disable_adapter():
        nest_as(model, NESTING, deploy="paper")
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert torch.equal(logits(model), logits(plain_llama()))


def test_gradients_are_not_touched_by_nesting() -> None:
    model = OneLayer(nn.Linear(4, 4))
    peft_model = get_peft_model(model, lora_config(NESTING, target_modules=["layer"]))
    peft_model(torch.ones(1, 4)).sum().backward()
    grads = [p.grad.clone() for p in peft_model.parameters() if p.grad is not None]
    nest_as(peft_model, NESTING)
    after = [p.grad for p in peft_model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, grads, strict=True))


def test_a_trained_adapter_that_becomes_another_function_is_named() -> None:
    model = get_peft_model(tiny_llama(), lora_config(NESTING))
    randomize(model)
    with pytest.warns(UserWarning, match="has been trained already, and rule 'matryoshka'"):
        nest_as(copy.deepcopy(model), NESTING)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="adapter 'default' has been trained")
        nest_as(model, NESTING, "lora")
        nest_as(get_peft_model(tiny_llama(), lora_config(NESTING)), NESTING)


def test_tokens_that_were_added_are_said_to_be_left_out(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(100, mean_resizing=False)
    adapter = nest(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])))
    adapter.reorder()
    with pytest.warns(UserWarning, match="4 tokens were added to the base model, and their embeddings are not in"):
        adapter.save(tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(100, mean_resizing=False)
    trained = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    adapter = nest(get_peft_model(base, trained))
    adapter.reorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="4 tokens were added")
        adapter.save(tmp_path / "with-embeddings")
