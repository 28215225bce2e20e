"""Save, load, export and checkpoints: the files hold the deployed function, for PEFT alone too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import peft
import pytest
import torch
from conftest import (
    OneLayer,
    lora_config,
    nest_as,
    nested_layer,
    nested_llama,
    randomize,
    tiny_llama,
)
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, load, nest
from matryoshka_lora.files.peft import open_adapter
from matryoshka_lora.models import load_model

IDS = torch.arange(3, 27).reshape(2, 12)
NESTINGS = {
    "none": Nesting((1, 2, 4, 8)),
    "rank": Nesting((2, 3, 5), "rank", 3.0 / 5),
    "sqrt": Nesting((1, 3, 6), "sqrt", 1.7 / 6**0.5),  # no power of two: a rounding would show
}
NESTING = NESTINGS["sqrt"]
WEIGHTS = "adapter_model.safetensors"
FORMS = ["paper", "trained", "reordered", "learned"]
"""P dropped; trained, and reordered on the way to the file; reordered in memory; an older order."""


def in_form(adapter: NestedAdapter, form: str) -> NestedAdapter:
    if form in ("reordered", "learned"):
        adapter.reorder()
    if form == "learned":
        A, B = next(iter(adapter.parameters().values()))
        with torch.no_grad():
            for factor, dimension in ((A, 0), (B, 1)):
                factor.copy_(factor.flip(dimension))
        adapter.mark_ordered("learned")
    return adapter


def llama_in_form(form: str, nesting: Nesting = NESTING, **options: Any) -> NestedAdapter:
    deploy = "paper" if form == "paper" else "reordered"
    return in_form(nested_llama(nesting, deploy=deploy, **options), form)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def at_every_rank(adapter: NestedAdapter) -> dict[int, Tensor]:
    found = {}
    for rank in adapter.ranks:
        adapter.set_rank(rank)
        found[rank] = logits(adapter.model)
    adapter.set_rank(adapter.nesting.max_rank)
    return found


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def note(folder: Path) -> dict[str, Any] | None:
    with safe_open(folder / WEIGHTS, "pt") as file:
        text = (file.metadata() or {}).get("matryoshka_lora")
    return None if text is None else json.loads(text)


def plain(folder: Path, **changes: Any) -> Any:
    return PeftModel.from_pretrained(tiny_llama(**changes), str(folder)).eval()


@pytest.mark.parametrize("scaling", NESTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_a_round_trip_keeps_every_rank(form: str, scaling: str, tmp_path: Path) -> None:
    nesting = NESTINGS[scaling]
    saved = llama_in_form(form, nesting)
    factors, before = saved.factors(), logits(saved.model)
    saved.save(tmp_path / "a")
    # What is in memory stays.
    assert saved.order == {"trained": None, "reordered": "svd"}.get(form, form)
    for name, pair in saved.factors().items():
        assert all(map(torch.equal, pair, factors[name]))
    loaded = load(tiny_llama(), tmp_path / "a")
    if form == "trained":
        saved.reorder()
    assert (loaded.nesting, loaded.order, loaded.ranks) == (nesting, saved.order, saved.ranks)
    written = note(tmp_path / "a")
    assert written is not None
    assert (written["ranks"], written["scaling"]) == (list(nesting.ranks), scaling)
    assert written["order"] == saved.order
    expected = at_every_rank(saved)
    found = at_every_rank(loaded)
    for rank, output in found.items():  # what is folded on the way is rounded
        assert_same(output, expected[rank], 1e-4 if form == "trained" else 0.0)
    assert_same(logits(plain(tmp_path / "a")), found[nesting.max_rank])
    assert_same(expected[nesting.max_rank], before, 1e-4)
    for rank in saved.ranks:
        saved.export(tmp_path / f"{rank}", np.int64(rank))  # ranks come out of arrays too
        assert_same(logits(plain(tmp_path / f"{rank}")), expected[rank], 1e-4)
        assert note(tmp_path / f"{rank}") is None
    loaded.save(tmp_path / "b")
    tensors, again = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert tensors.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in tensors.items())


@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("form", ["paper", "trained", "reordered"])
def test_each_kind_of_layer_comes_back(kind: str, form: str, tmp_path: Path) -> None:
    deploy = "paper" if form == "paper" else "reordered"
    nested = nested_layer(kind, NESTING, deploy=deploy, dtype=torch.float32)
    in_form(nested.adapter, form)
    base = {k: v.clone() for k, v in nested.layer.get_base_layer().state_dict().items()}

    def fresh() -> nn.Module:
        model = OneLayer(oracle.KINDS[kind].build()).float()
        model.layer.load_state_dict(base)
        return model

    x = nested.kind.batch(3)
    x = x.float() if x.is_floating_point() else x
    nested.adapter.model.eval()
    nested.adapter.save(tmp_path / "a")
    loaded = load(fresh(), tmp_path / "a")
    whole = nested.layer(x)
    if form == "trained":
        assert_same(loaded.model(x), whole, 1e-5)
        nested.adapter.reorder()
    for rank in nested.adapter.ranks:
        for adapter in (loaded, nested.adapter):
            adapter.set_rank(rank)
        assert_same(loaded.model(x), nested.layer(x), 1e-5 if form == "trained" else 0.0)
        nested.adapter.export(tmp_path / f"{rank}", rank)
        sliced = PeftModel.from_pretrained(fresh(), str(tmp_path / f"{rank}")).eval()
        assert_same(sliced(x), nested.layer(x), 1e-5)
    alone = PeftModel.from_pretrained(fresh(), str(tmp_path / "a")).eval()
    assert torch.equal(alone(x), loaded.model(x))


EXTRAS: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "bias-all": {"bias": "all"},
    "bias-lora_only": {"bias": "lora_only"},
    "trainable_token_indices": {"trainable_token_indices": [3, 5, 8]},
    "everything": {"modules_to_save": ["norm"], "bias": "all", "trainable_token_indices": [3, 5]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "pattern": {"target_modules": r".*\.(q|down)_proj"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_was_trained_beside_the_factors_comes_back(extra: str, tmp_path: Path) -> None:
    if extra == "bias-lora_only" and Version(peft.__version__) < Version("0.21"):
        pytest.skip("PEFT itself loses these biases")

    def base() -> Any:
        model = tiny_llama(attention_bias=True)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, 0.1)
        return model

    model = get_peft_model(base(), lora_config(NESTING, **EXTRAS[extra])).eval()
    adapter = nest_as(model, NESTING)
    randomize(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    expected = logits(model)
    adapter.save(tmp_path / "a")
    model.save_pretrained(str(tmp_path / "b"))
    adapter.export(tmp_path / "c", 6)
    for folder in "abc":
        read = PeftModel.from_pretrained(base(), str(tmp_path / folder)).eval()
        assert_same(logits(read), expected, 1e-4)
    loaded = load(base(), tmp_path / "a", rank=2, adapter="mine")
    assert (loaded.rank, loaded.name) == (2, "mine")
    adapter.reorder()
    adapter.set_rank(2)
    assert_same(logits(loaded.model), logits(model), 1e-4)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [100, 120]}],
    ids=str,
)
def test_an_enlarged_vocabulary_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    enlarged, base = (type(tiny_llama()).from_pretrained(tmp_path / "base") for _ in "ab")
    enlarged.resize_token_embeddings(enlarged.vocab_size + 40)
    adapter = nest_as(get_peft_model(enlarged, lora_config(NESTING, **options)).eval(), NESTING)
    randomize(adapter.model)
    expected = adapter.model(new := torch.arange(40)[None] + base.vocab_size).logits
    adapter.save(tmp_path / "a")
    assert_same(load(base, tmp_path / "a").model(new).logits, expected, 1e-5)


def test_an_enlarged_vocabulary_of_the_embedded_model_comes_back() -> None:
    enlarged = load_model(dtype="float32")  # PEFT does not find its files
    enlarged.resize_token_embeddings(enlarged.config.vocab_size + 8)
    model = get_peft_model(enlarged, LoraConfig(r=4, target_modules=["q_proj"]))
    assert any("embed_tokens" in key for key in nest(model).opened().others)


# PEFT's own files and state dicts.


@pytest.mark.parametrize("rule", ["lora", "matryoshka", "dylora", "stratified"])
@pytest.mark.parametrize("form", ["paper", "trained", "reordered"])
def test_peft_writes_the_function_that_eval_mode_has(rule: str, form: str, tmp_path: Path) -> None:
    adapter = llama_in_form(form, rule=rule)
    expected = logits(adapter.model)
    adapter.model.save_pretrained(str(tmp_path / "a"))
    assert_same(logits(adapter.model), expected)
    exact = rule != "matryoshka" or form != "trained"
    assert_same(logits(plain(tmp_path / "a")), expected, 0.0 if exact else 1e-5)
    if exact:
        for key, value in get_peft_model_state_dict(adapter.model).items():
            assert torch.equal(value, load_file(tmp_path / "a" / WEIGHTS)[key])
    file = open_adapter(tmp_path / "a")
    assert (file.nesting, file.order) == (None, None)
    loaded = load(tiny_llama(), tmp_path / "a")
    assert (loaded.order, loaded.ranks) == ("svd", (1, 2, 3, 4, 5, 6))
    assert_same(logits(loaded.model), expected, 1e-5)


@pytest.mark.parametrize("how", ["load_adapter", "set_peft_model_state_dict", "load_state_dict"])
def test_a_state_dict_is_the_plain_function_in_both_directions(how: str, tmp_path: Path) -> None:
    """Best models, moving averages and checkpoints go this way."""
    plain_model = get_peft_model(tiny_llama(), lora_config(NESTING)).eval()
    randomize(plain_model, seed=7)
    adapter = nested_llama(NESTING)
    before = adapter.factors()
    state = {key: value.clone() for key, value in adapter.model.state_dict().items()}
    if how == "load_adapter":
        plain_model.save_pretrained(tmp_path)
        adapter.model.load_adapter(str(tmp_path), "default", is_trainable=True)
    elif how == "load_state_dict":
        adapter.model.load_state_dict(plain_model.state_dict())
    else:
        set_peft_model_state_dict(adapter.model, get_peft_model_state_dict(plain_model))
    for training in (True, False):
        adapter.model.train(training)
        assert_same(logits(adapter.model), logits(plain_model), 1e-5)
    adapter.model.load_state_dict(state)
    for name, pair in adapter.factors().items():
        for found, kept in zip(pair, before[name], strict=True):
            assert_same(found, kept, 1e-6)


# A Trainer's checkpoints.


def train(adapter: NestedAdapter, folder: Path, checkpoint: Path | None = None) -> None:
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    ids = torch.randint(3, 90, (8, 7), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(adapter.model, arguments, train_dataset=rows, callbacks=[adapter.callback()])
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    adapter.model.eval()


def to_train(rule: str, deploy: str) -> NestedAdapter:
    torch.manual_seed(4)
    model = get_peft_model(tiny_llama(), lora_config(NESTING, task_type="CAUSAL_LM"))
    return nest_as(model, NESTING, rule, deploy=deploy, seed=11)


@pytest.mark.parametrize(
    ("rule", "deploy"),
    [
        ("lora", "reordered"),
        ("matryoshka", "reordered"),
        ("matryoshka", "paper"),
        ("dylora-frozen", "reordered"),
        ("stratified", "reordered"),
    ],
)
def test_a_resumed_run_ends_as_an_unbroken_one(rule: str, deploy: str, tmp_path: Path) -> None:
    whole = to_train(rule, deploy)
    train(whole, tmp_path / "run")
    # Both checkpoints are plain LoRA that computes what is deployed.
    expected = logits(whole.model)
    tolerance = 1e-5 if (rule, deploy) == ("matryoshka", "reordered") else 0.0
    assert_same(logits(plain(tmp_path / "run/checkpoint-6")), expected, tolerance)
    resumed = to_train(rule, deploy)
    train(resumed, tmp_path / "run", tmp_path / "run/checkpoint-3")
    for (A, B), (old_A, old_B) in zip(
        resumed.parameters().values(), whole.parameters().values(), strict=True
    ):
        assert_same(A, old_A, 100 * tolerance)
        assert_same(B, old_B, 100 * tolerance)
    assert (expected - logits(plain(tmp_path / "run/checkpoint-3"))).abs().max() > 0.01


def test_what_is_loaded_can_be_trained_on_as_plain_lora(tmp_path: Path) -> None:
    llama_in_form("reordered", task_type="CAUSAL_LM").save(tmp_path / "a")
    adapter = load(tiny_llama(), tmp_path / "a", trainable=True)
    assert (adapter.rule.name, adapter.order, adapter.model.training) == ("lora", "svd", True)
    theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a"), is_trainable=True)
    optimizers = []
    for model in (adapter.model, theirs.train()):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers.append(torch.optim.SGD(trained, lr=0.1))
        model(IDS, labels=IDS).loss.backward()
        optimizers[-1].step()
    assert_same(logits(adapter.model.eval()), logits(theirs.eval()), 1e-4)
    assert adapter.order is None
    with pytest.raises(MatryoshkaError, match="rank= or trainable="):
        load(tiny_llama(), tmp_path / "a", rank=2, trainable=True)
    adapter = load(tiny_llama(), tmp_path / "a", trainable=True)
    adapter.set_rank(2)
    train(adapter, tmp_path)
    assert adapter.rank == 6  # rank 2 is none of the new factors
    frozen = load(tiny_llama(), tmp_path / "a")
    assert not frozen.model.training
    assert not any(p.requires_grad for p in frozen.model.parameters())


# Loading.


def test_a_second_adapter_leaves_the_first_alone(tmp_path: Path) -> None:
    first = llama_in_form("reordered")
    first.save(tmp_path / "1")
    before = at_every_rank(first)
    randomize(first.model, seed=5)
    first.reorder()
    first.save(tmp_path / "2")
    model = load(tiny_llama(), tmp_path / "1").model
    load(model, tmp_path / "2", rank=3, adapter="second")
    assert logits(model).equal(before[6])
    model.set_adapter("second")
    first.set_rank(3)
    assert logits(model).equal(logits(first.model))
    assert NestedAdapter(model).rank == 6


@pytest.mark.parametrize("rank", [0, 7, "2"])
def test_a_load_that_fails_leaves_the_base_model(rank: Any, tmp_path: Path) -> None:
    llama_in_form("paper").save(tmp_path / "a")
    base = tiny_llama()
    names = [name for name, _ in base.named_parameters()]
    if rank == 0:
        assert_same(logits(load(base, tmp_path / "a", rank=0).model), logits(tiny_llama()), 1e-6)
        return
    with pytest.raises(MatryoshkaError, match="rank"):
        load(base, tmp_path / "a", rank=rank)
    assert [name for name, _ in base.named_parameters()] == names
    with pytest.raises(MatryoshkaError, match=r"this model lacks layer .*layers\.1"):
        load(tiny_llama(num_hidden_layers=1), tmp_path / "a")
    for wide in (tiny_llama(hidden_size=128), tiny_llama(num_key_value_heads=4)):
        with pytest.raises(MatryoshkaError, match="has it in another size"):
            load(wide, tmp_path / "a")
        assert [name for name, _ in wide.named_parameters()] == names


# A process that has only PEFT.

READER = """
import sys, warnings
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folder, *names = sys.argv[1:]
torch.set_num_threads(1)
ids, found = torch.arange(3, 27).reshape(2, 12), {}
for name in names:
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base, f"{folder}/{name}").eval()
    with torch.no_grad():
        found[name] = model(input_ids=ids).logits
assert "matryoshka_lora" not in sys.modules
save_file(found, f"{folder}/answers.safetensors")
"""


@pytest.mark.slow
def test_another_process_with_peft_alone(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    expected = {}
    for form in ("paper", "trained", "reordered"):
        adapter = llama_in_form(form, task_type="CAUSAL_LM")
        adapter.save(tmp_path / form)
        if form == "trained":
            adapter.reorder()
        for rank, output in at_every_rank(adapter).items():
            adapter.export(tmp_path / f"{form}@{rank}", rank)
            expected[f"{form}@{rank}"] = output
        expected[form] = logits(adapter.model)
    adapter = to_train("matryoshka", "reordered")
    train(adapter, tmp_path / "run")
    expected["run/checkpoint-6"] = logits(adapter.model)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READER, str(tmp_path), *expected]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    answers = load_file(tmp_path / "answers.safetensors")
    for name, output in expected.items():
        exact = name in ("paper", "reordered")
        assert_same(answers[name], output, 0.0 if exact else 1e-4)
