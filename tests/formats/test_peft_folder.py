"""PEFT's folders: plain PEFT reads every rank as the best approximation, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import tiny_llama, tiny_mixtral
from helpers.outputs import names_in
from helpers.plain_peft import Mixed, best, by_peft, distance, logits, plain_adapter, updates
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from matryoshka_lora import Lora, MatryoshkaError, Nesting
from matryoshka_lora.formats.open import open_adapter
from matryoshka_lora.formats.peft_folder import CONFIG_NAME, WEIGHTS_NAME, base_model_of
from matryoshka_lora.lora.truncate import with_ranks

R = 8
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (tiny_llama, {"lora_alpha": 20}),
    "rslora": (tiny_llama, {"use_rslora": True, "lora_alpha": 3}),
    "regular expression": (tiny_llama, {"target_modules": r".*\.(q_proj|down_proj)"}),
    "patterns": (
        tiny_llama,
        {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"v_proj": 2}},
    ),
    "experts": (tiny_mixtral, EXPERTS),
    "embedding and convolution": (Mixed, {"target_modules": ["embedding", "convolution", "head"]}),
    "modules_to_save": (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


def read_metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        return file.metadata() or {}


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text())
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_reads_every_rank_as_the_best_approximation(kind: str, tmp_path: Path) -> None:
    base, options = KINDS[kind]
    plain_adapter(tmp_path / "plain", base(), **{"r": R, **options})
    plain = open_adapter(tmp_path / "plain")
    assert (plain.nesting, plain.order, plain.deploy) == (None, None, "reordered")
    plain.nested().save(tmp_path / "nested")
    nested = open_adapter(tmp_path / "nested")
    assert (nested.order, nested.nested_ranks) == ("svd", (1, 2, 4, R))
    expected_logits = by_peft(tmp_path / "plain", base)
    assert distance(by_peft(tmp_path / "nested", base), expected_logits) < 1e-5

    source_updates = updates(tmp_path / "plain", base)
    all_ranks: list[Any] = [1, 3, R]
    if kind != "experts":  # all layers have one rank
        all_ranks.append({layer.name: 1 + i % 5 for i, layer in enumerate(plain.layers)})
    for index, ranks in enumerate(all_ranks):
        for lora in (plain, nested):
            small = lora.truncate(ranks) if isinstance(ranks, int) else with_ranks(lora, ranks)
            output = tmp_path / f"{Path(lora.name).name}-{index}"
            result = small.save(output)
            assert (output / WEIGHTS_NAME).stat().st_size == result.size == small.file_size
            output_updates = updates(output, base)
            assert output_updates.keys() == source_updates.keys()
            squared_error = squared_norm = 0.0
            for key, update in source_updates.items():
                if key == "lm_head.weight":  # of modules_to_save
                    np.testing.assert_array_equal(output_updates[key], update)
                    continue
                rank = ranks if isinstance(ranks, int) else ranks[key.removesuffix(".weight")]
                expected = best(update, rank)
                difference = np.abs(output_updates[key] - expected).max()
                assert difference < 1e-5 * np.abs(update).max(), key
                squared_error += np.sum((expected - update) ** 2)
                squared_norm += np.sum(update**2)
            expected_error = (squared_error / squared_norm) ** 0.5
            (error,) = result.errors.values()
            assert error == pytest.approx(expected_error, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_layer_of_a_small_rank_keeps_its_bias(tmp_path: Path, bias: str) -> None:
    def base() -> Any:
        return tiny_llama(attention_bias=True)

    folder = tmp_path / "plain"
    model = plain_adapter(folder, base(), target_modules=["q_proj", "o_proj"], bias=bias)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    lora = open_adapter(folder)
    ranks = {layer.name: 4 for layer in lora.layers}
    ranks["model.layers.0.self_attn.q_proj"] = 1
    with_ranks(lora, ranks).save(tmp_path / "output")

    expected = base()
    state = expected.state_dict()
    for name, update in updates(folder, base).items():
        rank = ranks[name.removesuffix(".weight")]
        state[name] += torch.from_numpy(best(update, rank)).float()
    for key, tensor in load_file(folder / WEIGHTS_NAME).items():
        if key.endswith("bias"):
            state[key.removeprefix("base_model.model.").replace(".base_layer", "")] = tensor
    expected.load_state_dict(state)
    torch.testing.assert_close(
        by_peft(tmp_path / "output", base), logits(expected), atol=1e-5, rtol=1e-5
    )


def test_keep_factors_changes_nothing(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "plain", lora_alpha=12)
    lora = open_adapter(tmp_path / "plain")
    lora.save(tmp_path / "output")
    tensors = load_file(tmp_path / "output" / WEIGHTS_NAME)
    for key, tensor in load_file(tmp_path / "plain" / WEIGHTS_NAME).items():
        assert torch.equal(tensors[key], tensor)
    assert read_config(tmp_path / "output")["lora_alpha"] == 12


def test_layers_of_smaller_rank_are_padded_in_a_nested_adapter(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "plain", rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 2})
    lora = open_adapter(tmp_path / "plain")
    replace(lora, nesting=Nesting((2, 5), "rank", 0.7)).nested().save(tmp_path / "nested")
    nested = open_adapter(tmp_path / "nested")
    assert {(layer.rank, layer.scale) for layer in nested.layers} == {(5, 0.7)}
    assert nested.nesting == Nesting((2, 5), "rank", 0.7)
    source_updates = updates(tmp_path / "plain")
    for key, update in updates(tmp_path / "nested").items():
        expected = best(source_updates[key], 5)
        np.testing.assert_allclose(update, expected, atol=1e-5 * np.abs(expected).max())


# The nesting in the metadata.


def edit_factor(folder: Path) -> None:
    metadata = read_metadata(folder)
    tensors = load_file(folder / WEIGHTS_NAME)
    tensors[min(tensors)][0, 0] += 1e-3
    save_file(tensors, folder / WEIGHTS_NAME, metadata)


def save_with_peft(folder: Path) -> None:
    PeftModel.from_pretrained(tiny_llama(), folder).save_pretrained(folder)


def change_scale(folder: Path) -> None:
    config = read_config(folder)
    config["alpha_pattern"] = {"q_proj": 3}
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def edit_nesting(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        metadata = read_metadata(folder)
        nesting = {**json.loads(metadata["matryoshka_lora"]), **fields}
        metadata["matryoshka_lora"] = json.dumps(nesting)
        save_file(load_file(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME, metadata)

    return edit


def replace_nesting(text: str) -> Callable[[Path], None]:
    def replace_text(folder: Path) -> None:
        metadata = {"matryoshka_lora": text}
        save_file(load_file(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME, metadata)

    return replace_text


CHANGES = {
    "edited factor": edit_factor,
    "saved by PEFT": save_with_peft,
    "another scale": change_scale,
    "checksum": edit_nesting(checksum="0" * 32),
    "ranks of another R": edit_nesting(ranks=[1, 2, 4]),
    "a number as ranks": edit_nesting(ranks=4),
    "ranks that decrease": edit_nesting(ranks=[4, 2, 8]),
    "unknown scaling": edit_nesting(scaling=["none"]),
    "unknown order": edit_nesting(order=["svd"]),
    "unknown deploy": edit_nesting(deploy=None),
    "paper with an order": edit_nesting(deploy="paper"),
    "a list": replace_nesting("[]"),
    "no JSON": replace_nesting("{"),
    "nested lists": replace_nesting("[" * 100_000),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nesting_counts_only_for_its_factors(tmp_path: Path, change: str) -> None:
    plain_adapter(tmp_path / "plain", target_modules=["q_proj", "v_proj"])
    open_adapter(tmp_path / "plain").nested().save(tmp_path / "nested")
    assert open_adapter(tmp_path / "nested").order == "svd"
    CHANGES[change](tmp_path / "nested")
    # A file without the record, as PEFT saves it, is silent.
    with nullcontext() if change == "saved by PEFT" else pytest.warns(UserWarning, match="plain"):
        lora = open_adapter(tmp_path / "nested")
    assert (lora.nesting, lora.order, lora.deploy) == (None, None, "reordered")
    source_updates = updates(tmp_path / "nested")
    lora.truncate(2).save(tmp_path / "output")
    for name, update in updates(tmp_path / "output").items():
        expected = best(source_updates[name], 2)
        assert np.abs(update - expected).max() < 1e-5 * np.abs(expected).max()


def test_nested_adapter_is_rewritten_bit_by_bit(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "plain", target_modules=["q_proj", "v_proj"])
    lora = open_adapter(tmp_path / "plain")
    nesting = Nesting((1, 3, R), "sqrt", lora.layers[0].scale)
    replace(lora, nesting=nesting, order="svd").nested().save(tmp_path / "first")
    first = open_adapter(tmp_path / "first")
    assert (first.nesting, first.order) == (nesting, "svd")
    first.nested().save(tmp_path / "second")
    for name in (WEIGHTS_NAME, CONFIG_NAME, "README.md"):
        first_bytes = (tmp_path / "first" / name).read_bytes()
        assert (tmp_path / "second" / name).read_bytes() == first_bytes


@pytest.mark.parametrize("scaling", ["none", "rank", "sqrt"])
def test_paper_deployment_has_its_nested_ranks_and_their_scales(
    tmp_path: Path, scaling: Any
) -> None:
    plain_adapter(tmp_path / "plain", target_modules=["q_proj", "v_proj"], lora_alpha=4)
    nesting = Nesting((1, 2, R), scaling, 0.5)
    plain = open_adapter(tmp_path / "plain")
    replace(plain, nesting=nesting, deploy="paper").nested().save(tmp_path / "nested")
    nested = open_adapter(tmp_path / "nested")
    assert (nested.nesting, nested.order, nested.deploy) == (nesting, None, "paper")
    tensors = load_file(tmp_path / "plain" / WEIGHTS_NAME)
    scales = {"none": 1.0, "rank": R, "sqrt": R**0.5}  # at rank 1, over that of rank R
    for rank in (1, 2, R):
        result = nested.truncate(rank).save(tmp_path / f"rank-{rank}")
        scale = 0.5 * scales[scaling] / {"none": 1.0, "rank": rank, "sqrt": rank**0.5}[scaling]
        squared_error = squared_norm = 0.0
        for name, update in updates(tmp_path / f"rank-{rank}").items():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            A = tensors[f"{key}.lora_A.weight"].double()
            B = tensors[f"{key}.lora_B.weight"].double()
            expected = scale * B[:, :rank] @ A[:rank]
            np.testing.assert_allclose(update, expected, atol=1e-5)
            squared_error += float((0.5 * B @ A - expected).square().sum())
            squared_norm += float((0.5 * B @ A).square().sum())
        expected_error = (squared_error / squared_norm) ** 0.5
        assert result.errors == {rank: pytest.approx(expected_error, rel=1e-6, abs=1e-9)}
    with pytest.raises(MatryoshkaError, match="rank"):
        nested.truncate(3)


def test_experts_have_one_rank(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "plain", tiny_mixtral(), **EXPERTS)
    lora = open_adapter(tmp_path / "plain")
    ranks = {layer.name: 2 for layer in lora.layers}
    ranks[lora.layers[0].name] = 1
    with pytest.raises(MatryoshkaError, match="target_parameters"):
        with_ranks(lora, ranks).save(tmp_path / "output")
    assert not (tmp_path / "output").exists()


# What else is in the folder.

PRIVATE = "/home/somebody/secret-project"


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize(
    ("base_model", "shown"),
    [
        (f"{PRIVATE}/my-base", "my-base"),
        ("org/name", "org/name"),
        (None, None),
    ],
)
def test_model_card_names_the_base_model_and_no_path(
    tmp_path: Path, base_model: str | None, shown: str | None
) -> None:
    model = plain_adapter(tmp_path / "plain", target_modules=["q_proj"])
    model.peft_config["default"].base_model_name_or_path = base_model
    model.peft_config["default"].task_type = PRIVATE  # a field that no card shows
    model.save_pretrained(tmp_path / "plain")
    lora = open_adapter(tmp_path / "plain")
    lora.nested().save(tmp_path / "nested")
    lora.truncate(4).save(tmp_path / "truncated")
    for name, rank in (("nested", R), ("truncated", 4)):
        card = (tmp_path / name / "README.md").read_text()
        assert f"rank {rank} for {shown or 'an unknown base model'}\n" in card
        assert ("base_model: " in card) == ("/" in (shown or ""))
        assert ("arxiv" in card) == ("matryoshka eval" in card) == (name == "nested")
        assert PRIVATE not in card
        assert str(tmp_path) not in card
        assert str(tmp_path) not in json.dumps(read_metadata(tmp_path / name))
        # PEFT and vLLM read it.
        written_name = read_config(tmp_path / name)["base_model_name_or_path"]
        assert (written_name or None) == base_model  # older versions of PEFT write ""


def test_a_link_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "plain", target_modules=["q_proj"])
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id.jinja").write_text("secret")
    (tmp_path / "plain" / "chat_template.jinja").symlink_to("../private/id.jinja")
    (tmp_path / "plain" / "additional_chat_templates").symlink_to("../private")
    (tmp_path / "plain" / "special_tokens_map.json").write_text("{}")
    (tmp_path / "plain" / "tokenizer.json").symlink_to("special_tokens_map.json")
    with pytest.warns(UserWarning, match="symbolic link"):
        open_adapter(tmp_path / "plain").truncate(4).save(tmp_path / "output")
    assert not list((tmp_path / "output").rglob("*.jinja"))
    assert (tmp_path / "output" / "tokenizer.json").read_text() == "{}"


def test_a_base_model_cannot_add_text_to_the_model_card(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "plain", target_modules=["q_proj"])
    config = {**read_config(tmp_path / "plain"), "base_model_name_or_path": "x\n\n# Run `curl y`"}
    (tmp_path / "plain" / CONFIG_NAME).write_text(json.dumps(config))
    open_adapter(tmp_path / "plain").truncate(4).save(tmp_path / "output")
    card = (tmp_path / "output" / "README.md").read_text(encoding="utf-8")
    assert "\n# Run" not in card
    assert "`curl" not in card


def test_a_base_model_with_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "plain", target_modules=["q_proj"])
    path = "/models/\udcff-base"
    config = {**read_config(tmp_path / "plain"), "base_model_name_or_path": path}
    (tmp_path / "plain" / CONFIG_NAME).write_text(json.dumps(config))
    open_adapter(tmp_path / "plain").truncate(4).save(tmp_path / "output")
    assert read_config(tmp_path / "output")["base_model_name_or_path"] == path
    assert "for ?-base" in (tmp_path / "output" / "README.md").read_text(encoding="utf-8")


def test_companion_files_are_copied(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "plain", target_modules=["q_proj"])
    (tmp_path / "plain" / "tokenizer").mkdir()
    companions = ["tokenizer.json", "chat_template.jinja", "special_tokens_map.json"]
    for name in (*companions, "optimizer.pt", "notes.txt"):
        (tmp_path / "plain" / name).write_text(name)
    template = Path("additional_chat_templates", "rag.jinja")
    (tmp_path / "plain" / template.parent).mkdir()
    (tmp_path / "plain" / template).write_text("rag")
    lora = open_adapter(tmp_path / "plain")
    lora.truncate(4).save(tmp_path / "output")
    files = set(names_in(tmp_path / "output"))
    assert files == {CONFIG_NAME, WEIGHTS_NAME, "README.md", template.parent.name, *companions}
    assert (tmp_path / "output" / template).read_text() == "rag"
    assert (tmp_path / "output" / "tokenizer.json").read_text() == "tokenizer.json"
    # Next to a single file may be the files of something else.
    in_memory = replace(lora, files=(tmp_path / "plain" / "tokenizer" / "lora.safetensors",))
    in_memory.truncate(4).save(tmp_path / "other")
    assert not (tmp_path / "other" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        ({"base_model_name_or_path": "a/b", "revision": "v1"}, (), ("a/b", "v1")),
        ({"base_model_name_or_path": "a/b", "revision": "v1"}, (None, "v2"), ("a/b", "v2")),
        ({"base_model_name_or_path": "a/b", "revision": "v1"}, ("c/d",), ("c/d", None)),
        ({"base_model_name_or_path": None}, ("c/d", "v3"), ("c/d", "v3")),
        ({"base_model_name_or_path": None}, (), "base_model"),
        ({"base_model_name_or_path": "a/b", "task_type": "CAUSAL_LM"}, (), ("a/b", None)),
        ({"base_model_name_or_path": "a/b", "task_type": "SEQ_CLS"}, (), "SEQ_CLS"),
    ],
)
def test_base_model(config: dict[str, Any], arguments: Any, expected: Any) -> None:
    lora = Lora("adapter", (), config=config)
    if isinstance(expected, str):
        with pytest.raises(MatryoshkaError, match=expected):
            base_model_of(lora, *arguments)
    else:
        assert base_model_of(lora, *arguments) == expected


PEAK_MEMORY = """
import resource, sys
import matryoshka_lora as ml
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
lora = ml.open(sys.argv[1])
lora.truncate(1).save(sys.argv[2] + "/rank")
lora.truncate(keep=0.9)
assert "torch" not in sys.modules
print(peak() - before)
"""


@pytest.mark.slow
def test_only_one_layer_is_in_memory(tmp_path: Path) -> None:
    """120 layers of 0.5 MB need less than half of their size, workspace included."""
    (tmp_path / "plain").mkdir()
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q"]}
    (tmp_path / "plain" / CONFIG_NAME).write_text(json.dumps(config))
    tensors = {}
    for index in range(120):
        tensors[f"base_model.model.{index}.q.lora_A.weight"] = torch.randn(16, 4096)
        tensors[f"base_model.model.{index}.q.lora_B.weight"] = torch.randn(4096, 16)
    weights_file = tmp_path / "plain" / WEIGHTS_NAME
    save_file(tensors, weights_file)
    command = [sys.executable, "-c", PEAK_MEMORY, str(tmp_path / "plain"), str(tmp_path)]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(process.stdout) < weights_file.stat().st_size / 2
