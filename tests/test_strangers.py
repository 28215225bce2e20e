"""Adapters that plain PEFT has written become nested, file to file."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import nested_llama, tiny_llama, tiny_mixtral
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from strangers import deltas, output, plain_adapter
from tiny_chat import save_tiny_chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from matryoshka_lora import MatryoshkaError, Nesting, evaluate, export, load, reorder
from matryoshka_lora.formats.beside import read_spectra
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.nesting import Scaling
from matryoshka_lora.serving.info import describe
from matryoshka_lora.state import By, Deploy

WEIGHTS = "adapter_model.safetensors"

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "alpha": {"lora_alpha": 11},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 12},
        "alpha_pattern": {"q_proj": 5, r"layers.\d.mlp.up_proj": 1},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "saved module": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "a regular expression": {"target_modules": r".*\.layers\.0\.(self_attn|mlp)\.(q|up)_proj"},
    "wider than a layer": {"r": 40, "target_modules": ["k_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_reads_the_same_function_and_every_prefix_is_best(tmp_path: Path, kind: str) -> None:
    before = plain_adapter(tmp_path / "plain", **KINDS[kind])
    wanted, dense = output(before), deltas(before)
    reorder(tmp_path / "plain", tmp_path / "nested")

    after = PeftModel.from_pretrained(tiny_llama(), tmp_path / "nested")
    assert (output(after) - wanted).norm() < 1e-5 * wanted.norm()
    for name, delta in deltas(after).items():
        assert (delta - dense[name]).norm() < 1e-5 * dense[name].norm(), name

    adapter = load(tiny_llama(), tmp_path / "nested")
    top = adapter.nesting.max_rank
    assert top == max([KINDS[kind].get("r", 8), *KINDS[kind].get("rank_pattern", {}).values()])
    assert adapter.ranks == tuple(range(1, top + 1))
    for rank in (1, 3, top):
        adapter.export(tmp_path / "slice", rank, overwrite=True)
        sliced = deltas(PeftModel.from_pretrained(tiny_llama(), tmp_path / "slice"))
        for name, delta in dense.items():
            values = np.linalg.svd(delta.numpy(), compute_uv=False)
            best = np.sqrt((values[rank:] ** 2).sum())
            assert float((sliced[name] - delta).norm()) <= best + 1e-5 * values[0], (name, rank)


def test_the_dtype_is_kept(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "plain")
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(tmp_path / "plain" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "plain" / WEIGHTS, {"format": "pt"})
    wanted = output(PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain"))
    reorder(tmp_path / "plain", tmp_path / "nested")
    assert {tensor.dtype for tensor in load_file(tmp_path / "nested" / WEIGHTS).values()} == {torch.bfloat16}
    found = output(PeftModel.from_pretrained(tiny_llama(), tmp_path / "nested"))
    assert (found - wanted).norm() < 0.05 * (wanted - output(tiny_llama())).norm()


def test_shards(tmp_path: Path) -> None:
    before = plain_adapter(tmp_path / "plain")
    tensors = sorted(load_file(tmp_path / "plain" / WEIGHTS).items())
    names = [f"adapter_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        save_file(dict(tensors[i::3]), tmp_path / "plain" / name, {"format": "pt"})
    index = {"weight_map": {key: names[i % 3] for i, (key, _) in enumerate(tensors)}}
    (tmp_path / "plain" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (tmp_path / "plain" / WEIGHTS).unlink()
    reorder(tmp_path / "plain", tmp_path / "nested")
    found, wanted = output(PeftModel.from_pretrained(tiny_llama(), tmp_path / "nested")), output(before)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_experts(tmp_path: Path) -> None:
    base = tiny_mixtral(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    before = plain_adapter(
        tmp_path / "plain", copy.deepcopy(base), target_modules=["q_proj"], target_parameters=targets
    )
    wanted = output(before)
    reorder(tmp_path / "plain", tmp_path / "nested")
    found = output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "nested"))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    spectra = read_spectra(open_adapter(tmp_path / "nested"))
    assert spectra is not None
    assert sorted(values.shape for values in spectra.values()) == [(4, 8), (4, 8), (8,)]


@pytest.mark.parametrize("deploy", ["paper", "reordered"])
@pytest.mark.parametrize("scaling", ["none", "sqrt"])
def test_one_of_ours_that_was_not_reordered_yet(tmp_path: Path, deploy: Deploy, scaling: Scaling) -> None:
    """Reordered from its file, it is what it is when it was reordered in memory: what was trained, P and all."""
    nesting = Nesting([1, 3, 6], scaling, scale=0.7)
    adapter = nested_llama(nesting, deploy=deploy, target_modules=["q_proj", "down_proj"])
    with pytest.warns(UserWarning, match="not reordered after training") if deploy == "reordered" else nullcontext():
        adapter.save(tmp_path / "trained")
    reorder(tmp_path / "trained", tmp_path / "files")
    adapter.reorder()
    adapter.save(tmp_path / "memory")
    for file in ("files", "memory"):
        state = open_adapter(tmp_path / file).nested
        assert (state.nesting.ranks, state.nesting.scaling, state.reordered) == ((1, 3, 6), scaling, "svd")
        assert state.nesting.scale == pytest.approx(0.7, rel=1e-12)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("files", "memory"))
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-5)


ROWS = [{"prompt": f"{n} and {n + 1} make ", "completion": str(2 * n + 1)} for n in range(9)]


def test_what_is_no_factor_stays_as_it_is(tmp_path: Path) -> None:
    """Though the base model is loaded in bfloat16."""
    base = save_tiny_chat(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain_adapter(tmp_path / "plain", model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    reorder(tmp_path / "plain", tmp_path / "nested", "activations", ROWS, model=str(base), rows=9)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "nested"))
    (head,) = (key for key in before if "lora_" not in key)
    assert after[head].dtype == torch.float32
    assert torch.equal(after[head], before[head])


@pytest.mark.parametrize("by", ["activations", "loss", "learned"])
def test_reordering_by_data_keeps_the_function(tmp_path: Path, by: By) -> None:
    base = save_tiny_chat(tmp_path / "base")

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    before = plain_adapter(tmp_path / "plain", model(), target_modules=["q_proj", "up_proj", "embed_tokens"])
    reorder(tmp_path / "plain", tmp_path / "first")
    spectra = reorder(tmp_path / "plain", tmp_path / "second", by, ROWS, model=str(base), dtype="fp32", rows=9)
    found, wanted = output(PeftModel.from_pretrained(model(), tmp_path / "second")), output(before)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    again = open_adapter(tmp_path / "second")
    assert again.nested.reordered == by
    written = read_spectra(again)
    assert written is not None
    assert written.keys() == spectra.keys() == {layer.name for layer in again.layers}
    for name, values in spectra.items():
        torch.testing.assert_close(written[name], values, rtol=1e-6, atol=0)
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("first", "second"))
    for key in second:
        # An embedding has no moments, and is as the SVD has left it.
        stays = "embed" in key and by != "learned"
        assert torch.allclose(first[key], second[key], atol=1e-5) == stays, key


def test_what_an_order_is_judged_by_is_not_what_it_was_learned_from(tmp_path: Path) -> None:
    """Of a file too: 9 rows are learned from, and 48 more are looked at. A 58th is not read."""
    base = save_tiny_chat(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain_adapter(tmp_path / "plain", model, target_modules=["q_proj"])

    def weights(count: int) -> bytes:
        rows = [{"prompt": f"{row} and one is ", "completion": str(row + 1)} for row in range(count)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = str(tmp_path / "rows.jsonl")
        reorder(tmp_path / "plain", tmp_path / "new", "learned", data, model=str(base), rows=9, overwrite=True)
        return (tmp_path / "new" / WEIGHTS).read_bytes()

    assert weights(57) == weights(58)
    assert weights(57) != weights(9)


def test_a_file_s_questions_are_asked_in_the_text_of_the_training(tmp_path: Path) -> None:
    """By `eval` and by `reorder`, where ``train.yaml`` names a template."""
    base = save_tiny_chat(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain_adapter(tmp_path / "plain", model, target_modules=["q_proj"])
    (tmp_path / "plain" / "train.yaml").write_text('data: {path: mine.jsonl, template: "Q: {prompt} A:"}\n')
    for name, keys, add in (("asked", ("question", "answer"), ""), ("text", ("prompt", "completion"), "Q: {} A:")):
        rows = [(add.format(f"{row} + 1?") if add else f"{row} + 1?", f"{' ' * bool(add)}{row}") for row in range(3)]
        lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        data = str(tmp_path / f"{name}.jsonl")
        reorder(tmp_path / "plain", tmp_path / name, "loss", data, model=str(base), rows=3)
    asked, text = (load_file(tmp_path / name / WEIGHTS) for name in ("asked", "text"))
    assert all(torch.equal(asked[key], text[key]) for key in text)

    (tmp_path / "text" / "train.yaml").write_bytes((tmp_path / "plain" / "train.yaml").read_bytes())
    found = evaluate(
        tmp_path / "text", data=str(tmp_path / "asked.jsonl"), ranks=[1], model=str(base), base=False, latency=False
    )
    prompts = [example["prompt"].replace(" ", "") for example in found.examples]  # its tokens have spaces between
    assert prompts == [f"Q:{row}+1?A:" for row in range(3)]


def test_another_tokenizer_than_the_base_models_is_asked_for(tmp_path: Path) -> None:
    """Where ``train.yaml`` names a chat template: its prompts are not those of the base model's tokenizer."""
    base = save_tiny_chat(tmp_path / "base")
    plain_adapter(tmp_path / "plain", AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj"])
    reorder(tmp_path / "plain", tmp_path / "nested")
    for name in ("plain", "nested"):
        (tmp_path / name / "train.yaml").write_text("chat_template_path: .../0a1b2c3d/other.jinja\neos_token: null\n")
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}]
    with pytest.raises(MatryoshkaError, match=r"trained with chat_template_path \(train.yaml\).*reorder it in Python"):
        reorder(tmp_path / "plain", tmp_path / "new", "loss", rows, model=str(base))
    asked: dict[str, Any] = {"data": rows, "ranks": [1], "model": str(base), "base": False, "latency": False}
    with pytest.raises(MatryoshkaError, match=r"trained with chat_template_path \(train.yaml\).*tokenizer="):
        evaluate(tmp_path / "nested", **asked)
    assert evaluate(tmp_path / "nested", tokenizer=AutoTokenizer.from_pretrained(base), **asked).ranks == (1,)
    text = [{"prompt": "a", "completion": "b"}]  # which no template writes
    assert evaluate(tmp_path / "nested", **{**asked, "data": text}).ranks == (1,)
    with pytest.warns(UserWarning, match="merged gets the base model's tokenizer: save the tokenizer of the training"):
        export(tmp_path / "nested", tmp_path / "merged", 8, format="merged", model=str(base))


def test_memory_is_bounded_by_a_layer(tmp_path: Path) -> None:
    """24 layers of 2 MB: the process may not need as much as half of them beyond what one of them needs."""
    tensors = {}
    for i in range(24):
        name = f"base_model.model.layers.{i}.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(64, 4096)
        tensors[f"{name}.lora_B.weight"] = torch.randn(4096, 64)
    for name, count in (("one", 2), ("all", 48)):
        LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj"]).save_pretrained(tmp_path / name)
        save_file(dict(list(tensors.items())[:count]), tmp_path / name / WEIGHTS, {"format": "pt"})
    # Memory that the system cannot drop and read again: anonymous pages, looked at after each layer.
    code = (
        "import sys, re; from matryoshka_lora.serving.reorder import reorder\n"
        "most = 0\n"
        "def look(*_):\n"
        "    global most\n"
        "    most = max(most, int(re.search(r'RssAnon:\\s*(\\d+)', open('/proc/self/status').read())[1]))\n"
        "reorder(sys.argv[1], sys.argv[2], on_layer=look); print(most)"
    )
    most = {}
    for name in ("one", "all"):
        command = [sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / f"{name}-nested")]
        most[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert most["all"] - most["one"] < 24_000


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "another method": ({"peft_type": "LOHA"}, "LOHA|LoRA"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "pissa.*path_initial_model_for_weight_conversion"),
    "a bias": ({"lora_bias": True}, "lora_bias"),
    "replicated layers": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "rank 0": ({"rank_pattern": {"q_proj": 0}}, "positive integer"),
    "another rank": ({"rank_pattern": {"q_proj": 4}}, r"q_proj have shapes .* rank 4"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "alpha 0": ({"alpha_pattern": {"q_proj": 0}}, "lora_alpha"),
    "a pattern that takes for ever": ({"rank_pattern": {"(a+)+b": 4}}, "for ever"),
    "experts with ranks of their own": ({"target_parameters": ["x"], "rank_pattern": {"x": 8}}, "target_parameters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_nested_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    plain_adapter(tmp_path / "plain")
    file = tmp_path / "plain" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(MatryoshkaError, match=message):
        reorder(tmp_path / "plain", tmp_path / "nested")
    assert not (tmp_path / "nested").exists()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [96, 99]}], ids=str)
def test_added_tokens_are_explained_and_both_ways_out_work(tmp_path: Path, more: dict[str, Any], tied: bool) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def grown() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(100)
        return model

    def same(adapter: str, base: str) -> bool:
        reorder(tmp_path / adapter, tmp_path / "nested", overwrite=True)
        found = output(load(AutoModelForCausalLM.from_pretrained(tmp_path / base), tmp_path / "nested").model)
        return bool((found - wanted).norm() < 1e-5 * wanted.norm())

    options = {"target_modules": ["q_proj"], **more}
    wanted = output(plain_adapter(tmp_path / "plain", grown(), **options))
    reason = "whole embedding.*tokens were added.*trainable_token_indices"
    if more:  # the file may hold more than factors, so that only a model shows what is too much
        reorder(tmp_path / "plain", tmp_path / "nested")
        with pytest.raises(MatryoshkaError, match=reason):
            load(grown(), tmp_path / "nested")
    else:
        for read in (describe, lambda path: reorder(path, tmp_path / "nested")):
            with pytest.raises(MatryoshkaError, match=reason):
                read(tmp_path / "plain")
        assert not (tmp_path / "nested").exists()

    model = PeftModel.from_pretrained(grown(), tmp_path / "plain")
    model.save_pretrained(tmp_path / "kept", save_embedding_layers=False)
    model.unload().save_pretrained(tmp_path / "grown")
    assert same("kept", "grown")

    grown().save_pretrained(tmp_path / "saved first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved first")
    wanted = output(plain_adapter(tmp_path / "again", model, **options))
    assert same("again", "saved first")


def test_the_adapter_itself_is_not_written_over(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "plain")
    before = (tmp_path / "plain" / WEIGHTS).read_bytes()
    with pytest.raises(MatryoshkaError, match="the adapter itself"):
        reorder(tmp_path / "plain", tmp_path / "plain")
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == before
