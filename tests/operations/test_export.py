"""`export` and `export_folder`: ranks, formats, and arguments that contradict each other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.models import tiny_llama
from helpers.outputs import names_in
from helpers.plain_peft import best, by_peft, distance, logits, plain_adapter, updates
from helpers.single_files import read_ranks, read_updates, save_pairs, save_random_lora
from helpers.tiny_chat import tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import matryoshka_lora as ml
from matryoshka_lora import (
    MatryoshkaError,
    MissingDependencyError,
    combine,
    export,
    export_folder,
    reorder,
)
from matryoshka_lora.formats.peft_folder import WEIGHTS_NAME

R = 8


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    plain_adapter(tmp_path / "lora", r=R)
    return tmp_path / "lora"


@pytest.fixture
def single_file(tmp_path: Path) -> Path:
    return save_single_file(tmp_path / "lora.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_single_file(file: Path) -> Path:
    """Write a layer of rank 4 with kohya's keys."""
    torch.manual_seed(0)
    tensors = {"a.lora_down.weight": torch.randn(4, 6), "a.lora_up.weight": torch.randn(5, 4)}
    save_file(tensors, file)
    return file


def weights_size(folder: Path) -> int:
    return (folder / WEIGHTS_NAME).stat().st_size


@pytest.mark.parametrize(
    ("source", "output", "arguments", "keyword"),
    [
        ("lora", "x.safetensors", {"rank": 2}, "folder"),
        ("lora", "x", {"rank": [1, 2]}, "ladder"),
        ("lora", "x", {"rank": 2.0}, "integer"),
        ("lora", "x", {"rank": []}, "integer"),
        ("lora", "x", {"rank": [], "format": "ladder"}, "empty"),
        ("lora", "x", {"rank": [True, 2], "format": "ladder"}, "integer"),
        ("lora", "x.gguf", {"max_bytes": "1MB"}, "keep"),
        ("lora", "x", {"rank": 2, "key_format": "kohya"}, r"x\.safetensors"),
        ("lora", "x.safetensors", {"rank": 2, "key_format": "kohya"}, "image model"),
        ("lora", "x.safetensors", {"rank": 2, "format": "peft"}, "folder"),
        ("lora", "x.gguf", {"rank": 2, "format": "mlx"}, "folder"),
        ("lora", "x", {"rank": 2, "format": "gguf"}, r"x\.gguf"),
        ("lora", "x", {"rank": 2, "format": "single"}, "format"),
        ("lora", "x", {}, "max_bytes"),
        ("lora", "x", {"keep": "90%", "format": "ladder"}, "ladder"),
        ("lora", "x", {"max_bytes": 50_000, "format": "merged"}, "merged"),
        ("lora", "x", {"keep": 1}, "share"),
        ("lora", "x", {"error": "0%"}, "share"),
        ("lora", "x", {"error": "10%", "keep": "90%"}, "both"),
        ("lora", "x", {"max_bytes": 0}, "size"),
        ("lora", "x", {"max_bytes": "120%"}, "share"),
        ("lora", "x", {"rank": 9}, "from 1 to 8.*pad"),
        ("lora", "x", {"rank": 0}, "rank"),
        ("lora", "x", {"rank": 9, "format": "ladder"}, "from 1 to 8"),
        ("lora", "x", {"max_bytes": 1000}, "max_bytes"),
        ("lora", "x", {"dtype": "bf16", "format": "mlx", "rank": 2}, "dtype"),
        ("lora", "x", {"drop": "q_proj"}, "list"),
        ("lora", "x", {"pad": True}, "rank"),
        ("lora", "x", {"rank": 9, "pad": True, "error": "10%"}, "error"),
        ("lora", "x", {"rank": [9, 10], "pad": True, "format": "ladder"}, "pad"),
        ("lora", "x", {"rank": 2, "format": "merged"}, "base_model"),
        ("lora", "x.gguf", {"rank": 2}, "base_model"),
        ("single_file", "x", {"rank": 2}, r"x\.safetensors"),
        ("single_file", "x.safetensors", {"rank": 2, "format": "mlx"}, "format"),
        ("single_file", "x", {"format": "mlx", "key_format": "peft"}, "format"),
        ("single_file", "x.safetensors", {"key_format": "peft"}, "folder"),
        ("single_file", "x.safetensors", {"key_format": "civitai"}, "key_format"),
        ("single_file", "x.safetensors", {"rank": 5}, "from 1 to 4"),
        ("single_file", "x.safetensors", {"rank": [1, 2]}, "each rank"),
        ("single_file", "x", {"rank": [1, 2], "format": "ladder"}, "each rank"),
    ],
)
def test_contradictory_arguments_are_rejected(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    source: str,
    output: str,
    arguments: dict[str, Any],
    keyword: str,
) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        export(request.getfixturevalue(source), tmp_path / output, **arguments)
    assert not (tmp_path / output).exists()


def test_other_models_than_causal_ones_are_rejected(base: Path, tmp_path: Path) -> None:
    plain_adapter(tmp_path / "lora", task_type="SEQ_CLS")
    with pytest.raises(MatryoshkaError, match="SEQ_CLS"):
        export(tmp_path / "lora", tmp_path / "x", 2, format="merged", base_model=str(base))


# The ranks.


def test_the_result_reports_sizes_and_the_error(lora: Path, tmp_path: Path) -> None:
    result = export(lora, tmp_path / "output", np.int64(4))  # type: ignore[arg-type]
    assert (result.path, result.format) == (tmp_path / "output", "peft")
    assert set(result.ranks.values()) == {4}
    assert result.size_before == weights_size(lora)
    assert result.size_after == weights_size(tmp_path / "output")
    source_updates = updates(lora).values()
    missing = sum(np.sum((update - best(update, 4)) ** 2) for update in source_updates)
    total = sum(np.sum(update**2) for update in source_updates)
    assert result.errors == {4: pytest.approx(np.sqrt(missing / total), rel=1e-6)}
    assert result.notes == ()


@pytest.mark.parametrize(("share", "options"), [("70%", {}), (" 45.5 %", {"dtype": "bf16"})])
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_a_size_may_be_a_share_of_the_source(
    lora: Path, tmp_path: Path, suffix: str, share: str, options: Any
) -> None:
    path, file = lora, lora / WEIGHTS_NAME
    if suffix:
        path = file = tmp_path / "single.safetensors"
        save_random_lora(path, {"a": (600, 80), "b": (90, 500)}, has_alpha=True)
    limit = int(float(share.strip(" %")) / 100 * file.stat().st_size)
    result = export(path, tmp_path / f"small{suffix}", max_bytes=share, **options)
    sized = export(path, tmp_path / f"sized{suffix}", max_bytes=limit, **options)
    assert result.ranks == sized.ranks
    assert result.size_after <= limit < result.size_before
    # An adapter in memory has no file yet.
    whole = replace(ml.open(path), files=())
    assert whole.truncate(max_bytes=share).file_size <= limit


# Formats of a PEFT folder.


@pytest.mark.parametrize(
    ("rank", "ranks"), [(None, (1, 2, 4, 8)), (4, (4,)), ((1, 6), (1, 6)), ([np.int64(2)], (2,))]
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_ladder_is_a_peft_folder_for_each_rank(
    tmp_path: Path, rank: Any, ranks: tuple[int, ...], is_nested: bool
) -> None:
    plain_adapter(tmp_path / "lora", r=R, rank_pattern={"q_proj": 3})
    source, output = tmp_path / "lora", tmp_path / "ladder"
    if is_nested:
        source = tmp_path / "nested"
        reorder(tmp_path / "lora", source)
    result = export(source, output, rank, format="ladder")
    assert tuple(result.errors) == ranks
    assert names_in(output) == [f"{source.name}@{r}" for r in ranks]
    source_updates = updates(tmp_path / "lora")
    total = sum(np.sum(update**2) for update in source_updates.values())
    for r in ranks:
        missing = 0.0
        for name, update in updates(output / f"{source.name}@{r}").items():
            expected = best(source_updates[name], r)
            np.testing.assert_allclose(update, expected, atol=1e-5)
            missing += np.sum((source_updates[name] - expected) ** 2)
        assert result.errors[r] == pytest.approx(np.sqrt(missing / total), rel=1e-4, abs=1e-6)
        config = json.loads((output / f"{source.name}@{r}" / "adapter_config.json").read_text())
        assert config["r"] == r
    assert result.size_after == sum(weights_size(folder) for folder in output.glob("*@*"))


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_merged_model_is_the_base_model_with_the_rank(tmp_path: Path, is_tied: bool) -> None:
    """A weight that embeddings and head share gets no update of the other."""

    def base() -> Any:
        return tiny_llama(tie_word_embeddings=is_tied)

    base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain_adapter(tmp_path / "lora", model, target_modules=["embed_tokens", "q_proj"])
    tiny_tokenizer().save_pretrained(tmp_path / "lora")  # as in a Trainer's checkpoint
    (tmp_path / "lora" / "chat_template.jinja").write_text("custom")
    save_file({"v_head.weight": torch.ones(1)}, tmp_path / "lora" / "value_head.safetensors")

    result = export(tmp_path / "lora", tmp_path / "merged", 3, format="merged")
    expected = export(tmp_path / "lora", tmp_path / "rank-3", 3)
    assert result.errors == expected.errors
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), by_peft(tmp_path / "rank-3", base)) < 1e-5
    assert distance(logits(merged), logits(base())) > 0.1
    for output in ("merged", "rank-3"):
        assert AutoTokenizer.from_pretrained(tmp_path / output).chat_template == "custom"
    assert (tmp_path / "rank-3" / "value_head.safetensors").is_file()
    config_text = (tmp_path / "merged" / "config.json").read_text()
    assert json.loads(config_text)["rope_theta"] == 1e4  # where older runtimes read it
    assert str(tmp_path) not in config_text
    with pytest.raises(MatryoshkaError, match="source"):
        export(tmp_path / "lora", tmp_path / "base", 3, format="merged", force=True)


OVERWRITING: dict[str, Callable[[Path, Path], object]] = {
    "peft": lambda lora, output: export(lora, output, 2, force=True),
    "ladder": lambda lora, output: export(lora, output, 2, format="ladder", force=True),
    "merged": lambda lora, output: export(lora, output, 2, format="merged", force=True),
    "folder": lambda lora, output: export_folder(lora.parent, output, 2, force=True),
    "combine": lambda lora, output: combine([lora], output, force=True),
    "reorder": lambda lora, output: reorder(lora, output, force=True),
}


@pytest.mark.parametrize("command", OVERWRITING)
@pytest.mark.parametrize("output", ["base", "lora/adapter_config.json"])
def test_no_output_replaces_the_base_model_or_the_config(
    tmp_path: Path, command: str, output: str
) -> None:
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    plain_adapter(tmp_path / "lora", AutoModelForCausalLM.from_pretrained(base))
    before = (tmp_path / output).stat().st_mtime_ns  # reading changes other fields
    with pytest.raises(MatryoshkaError, match="source"):
        OVERWRITING[command](tmp_path / "lora", tmp_path / output)
    assert (tmp_path / output).stat().st_mtime_ns == before


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_merged_model_is_dequantized(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=128, intermediate_size=128).save_pretrained(tmp_path / "full")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapted = plain_adapter(tmp_path / "lora", model)
    base_model = str(tmp_path / "base")
    if transformers.__version__.startswith("5.0."):  # it cannot save what it has dequantized
        with pytest.raises(MatryoshkaError, match="dequantizing"):
            export(
                tmp_path / "lora", tmp_path / "merged", R, format="merged", base_model=base_model
            )
        return
    export(tmp_path / "lora", tmp_path / "merged", R, format="merged", base_model=base_model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    assert distance(logits(merged), logits(adapted)) < 0.1


def test_a_gguf_file_holds_the_rank(lora: Path, base: Path, tmp_path: Path) -> None:
    """By the formula of llama.cpp, alpha over the tensor's rank. tests/runtimes has llama.cpp."""
    gguf = pytest.importorskip("gguf")
    export(lora, tmp_path / "x.gguf", keep="60%", base_model=str(base))
    export(lora, tmp_path / "peft", keep="60%")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    gguf_names = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    for name, expected in updates(tmp_path / "peft").items():
        block, module = name.split(".")[2], name.split(".")[-2]
        prefix = f"blk.{block}.{gguf_names[module]}.weight"
        A, B = tensors[f"{prefix}.lora_a"], tensors[f"{prefix}.lora_b"]
        update = B @ A * alpha / len(A)
        if module in ("q_proj", "k_proj"):  # the two halves of a head alternate in llama.cpp
            half = 64 // 4 // 2
            update = update.reshape(-1, half, 2, 64).swapaxes(1, 2).reshape(update.shape)
        np.testing.assert_allclose(update, expected, atol=1e-5)


@pytest.mark.parametrize("options", [{"rank": 4}, {"keep": "60%"}], ids=str)
def test_mlx_has_one_rank_for_all_layers(base: Path, tmp_path: Path, options: Any) -> None:
    """Smaller layers are padded with zeros."""
    plain_adapter(tmp_path / "lora", r=R, rank_pattern={"q_proj": 2})
    expected = export(tmp_path / "lora", tmp_path / "peft", **options)
    rank = max(expected.ranks.values())
    result = export(
        tmp_path / "lora", tmp_path / "mlx", format="mlx", base_model=str(base), **options
    )
    assert (set(result.ranks.values()), result.errors) == ({rank}, expected.errors)
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    scale = config["lora_parameters"]["scale"]
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    for name, update in updates(tmp_path / "peft").items():
        key = name.removesuffix(".weight")
        A, B = (tensors[f"{key}.lora_{factor}"].double().numpy() for factor in "ab")
        assert A.shape[1] == rank
        np.testing.assert_allclose(scale * (A @ B).T, update, atol=1e-5)


EDITED_CONFIGS: dict[str, dict[str, Any]] = {
    "short": {"num_hidden_layers": 1},
    "text": {"num_hidden_layers": "x"},
    "bloom": {"model_type": "bloom"},
    "list": {"model_type": ["llama"]},
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_heads", None),
        ("num_attention_heads", 5),
        ("num_key_value_heads", "x"),
    ],
)
def test_a_config_with_other_heads_is_rejected(
    lora: Path, base: Path, tmp_path: Path, field: str, value: Any
) -> None:
    pytest.importorskip("gguf")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(MatryoshkaError, match=field):
        export(lora, tmp_path / "x.gguf", base_model=str(tmp_path))


@pytest.mark.parametrize(
    ("format", "output", "runtime"), [("gguf", "x.gguf", "llama.cpp"), ("mlx", "x", "mlx-lm")]
)
def test_what_a_runtime_cannot_read_is_rejected(
    tmp_path: Path, base: Path, format: Any, output: str, runtime: str
) -> None:
    pytest.importorskip("gguf")
    config = json.loads((base / "config.json").read_text())
    for name, fields in EDITED_CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **fields}))
    plain_adapter(tmp_path / "plain", target_modules=["q_proj"])
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["lm_head"])
    shutil.copytree(tmp_path / "plain", tmp_path / "digits")
    tensors = load_file(tmp_path / "plain" / WEIGHTS_NAME)
    renamed = {key.replace("layers.1.", f"layers.{'9' * 5000}."): tensors[key] for key in tensors}
    save_file(renamed, tmp_path / "digits" / WEIGHTS_NAME)
    for source, base_model, keyword in (
        ("lora", base, f"lm_head.*{runtime}"),
        ("plain", tmp_path / "short", rf"layers\.1.*{runtime}"),
        ("plain", tmp_path / "bloom", f"{runtime}.*bloom"),
        ("plain", tmp_path / "list", f"{runtime}.*llama"),
        ("plain", tmp_path / "text", "num_hidden_layers"),
        ("digits", base, f"99.*{runtime}"),
        ("plain", tmp_path / "missing", "base_model"),
        ("plain", tmp_path / "plain", "base_model"),
    ):
        with pytest.raises(MatryoshkaError, match=keyword):
            export(
                tmp_path / source, tmp_path / output, 2, format=format, base_model=str(base_model)
            )
        assert not (tmp_path / output).exists()


# Single files.


def test_a_change_of_the_key_format_alone_keeps_the_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tmp_path / "lora.safetensors"
    tensors = save_pairs(source, "unet.a", "unet.b")
    result = export(source, tmp_path / "kohya.safetensors", key_format="kohya")
    assert (result.format, result.errors) == ("single", {2: 0.0})
    converted = load_file(tmp_path / "kohya.safetensors")
    assert torch.equal(converted["lora_unet_a.lora_down.weight"], tensors["unet.a.lora_A.weight"])
    assert torch.equal(converted["lora_unet_b.lora_up.weight"], tensors["unet.b.lora_B.weight"])
    result = export(source, tmp_path / "same.safetensors", key_format="diffusers")
    assert any("already" in note for note in result.notes)
    same = load_file(tmp_path / "same.safetensors")
    assert same.keys() == tensors.keys()
    assert all(torch.equal(same[key], tensor) for key, tensor in tensors.items())
    export(source, tmp_path / "rank-1.safetensors", 1, key_format="kohya")
    source_updates = read_updates(source)
    for name, update in read_updates(tmp_path / "rank-1.safetensors").items():
        expected = best(source_updates[name.replace("lora_unet_", "unet.")], 1)
        np.testing.assert_allclose(update, expected, atol=1e-5)
    result = export(source, tmp_path / "folder", 1, key_format="peft")
    assert (result.format, ml.open(tmp_path / "folder").max_rank) == ("peft", 1)


def test_other_tensors_of_a_single_file_are_noted(single_file: Path, tmp_path: Path) -> None:
    save_file({**load_file(single_file), "other": torch.ones(3)}, single_file)
    result = export(single_file, tmp_path / "small.safetensors", 2)
    assert read_ranks(result.path) == {"a": 2}
    (note,) = result.notes
    assert "other" in note


# Many LoRAs.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of LoRAs, and of entries that are not."""
    folder = tmp_path / "loras"
    plain_adapter(folder / "large", r=8)
    plain_adapter(folder / "small", r=2)
    plain_adapter(folder / "dora", r=8, use_dora=True)
    save_single_file(folder / "single.SAFETENSORS")
    (folder / "notes.txt").write_text("not a LoRA")
    plain_adapter(folder / "nested" / "another")
    (folder / "large-evaluation").mkdir()
    (folder / "large-evaluation" / "evaluation.json").write_text("{}")
    return folder


def test_every_lora_of_a_folder_is_exported(folder: Path, tmp_path: Path) -> None:
    """A LoRA of a smaller rank keeps it, and one that cannot be truncated does not stop others."""
    output = tmp_path / "output"
    result = export_folder(folder, output, 3)
    assert result.path == output
    names = ["large", "single.SAFETENSORS", "small"]
    assert [exported.path for exported in result.exported] == [output / name for name in names]
    assert names_in(output) == names
    assert [ml.open(output / name).max_rank for name in names] == [3, 3, 2]
    assert result.failed.keys() == {"dora"}
    assert result.skipped == ("nested",)
    assert "DoRA" in result.failed["dora"]
    expected = export(folder / "large", tmp_path / "expected", 3)
    assert torch.equal(by_peft(output / "large"), by_peft(tmp_path / "expected"))
    assert result.exported[0].errors == expected.errors


def test_a_folder_is_exported_in_every_format(folder: Path, base: Path, tmp_path: Path) -> None:
    export_folder(folder, tmp_path / "ladders", [1, 2], format="ladder")
    for name in ("large", "small"):
        ladder = set(names_in(tmp_path / "ladders" / name))
        assert ladder == {f"{name}@1", f"{name}@2"}
    pytest.importorskip("gguf")
    export_folder(folder, tmp_path / "gguf", 3, format="gguf", base_model=str(base))
    names = set(names_in(tmp_path / "gguf"))
    assert names == {"large.gguf", "small.gguf"}
    base_files = sorted(base.iterdir())
    with pytest.raises(MatryoshkaError):
        export_folder(folder, base, 3, format="gguf", base_model=str(base), force=True)
    assert sorted(base.iterdir()) == base_files
    save_pairs(folder / "other.safetensors", "a")
    result = export_folder(folder, tmp_path / "folders", key_format="peft")
    assert [exported.path.name for exported in result.exported] == ["other"]
    assert ml.open(tmp_path / "folders" / "other").max_rank == 2


def test_a_folder_without_a_usable_lora_is_rejected(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    for source, keyword in ((folder / "large", "folder"), (tmp_path / "missing", "folder")):
        with pytest.raises(MatryoshkaError, match=keyword):
            export_folder(source, output, 3)
    with pytest.raises(MatryoshkaError, match="folder"):
        export_folder(folder, tmp_path / "x.gguf", 3)
    for options in (
        {},
        {"format": "peft"},
        {"rank": 0},
        {"rank": "8"},
        {"rank": [1, 2]},
        {"keep": "x"},
        {"error": "x"},
        {"keep": 0.9, "error": 0.1},
        {"rank": 1, "format": "x"},
        {"rank": 1, "format": "mlx", "dtype": "bf16"},
        {"pad": True},
    ):
        with pytest.raises(MatryoshkaError) as raised:
            export_folder(folder, output, **options)
        assert "dora" not in str(raised.value)  # a mistake of the call is reported once
    for name in ("large", "small", "single.SAFETENSORS"):
        (folder / name).rename(tmp_path / name)
    with pytest.raises(MatryoshkaError, match="dora"):
        export_folder(folder, output, 3)
    assert not output.exists()


def test_every_lora_of_a_folder_is_changed(lora: Path, tmp_path: Path) -> None:
    source = tmp_path / "loras"
    source.mkdir()
    lora.rename(source / "a")
    save_single_file(source / "b.safetensors")
    result = export_folder(source, tmp_path / "output", 16, pad=True, dtype="bf16")
    assert not result.failed
    assert read_ranks(tmp_path / "output" / "b.safetensors") == {"a": 16}
    tensors = load_file(tmp_path / "output" / "a" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    # A pattern is an error only if it matches no layer of any LoRA.
    result = export_folder(source, tmp_path / "dropped", drop=["*k_proj"])
    assert not result.failed
    expected = read_updates(source / "b.safetensors")
    for name, update in read_updates(result.path / "b.safetensors").items():
        np.testing.assert_allclose(update, expected[name], atol=1e-5)
    with pytest.raises(MatryoshkaError, match="nothing"):
        export_folder(source, tmp_path / "nothing", drop=["*k_proj", "nothing"])


# Dependencies.

WITHOUT_TORCH = """
import sys
from pathlib import Path

sys.modules["torch"] = sys.modules["transformers"] = sys.modules["peft"] = None
from matryoshka_lora import MissingDependencyError, export, info, reorder

folder = Path(sys.argv[1])
lora, base = folder / "lora", sys.argv[2]
info(lora)
reorder(lora, folder / "nested")
export(lora, folder / "peft", 4)
export(lora, folder / "ladder", format="ladder")
export(lora, folder / "mlx", 4, format="mlx", base_model=base)
export(folder / "lora.safetensors", folder / "small.safetensors", keep="90%")
try:
    export(lora, folder / "merged", 4, format="merged", base_model=base)
except MissingDependencyError:
    print("an extra is missing")
"""


def test_only_a_merged_export_needs_torch(
    lora: Path, single_file: Path, base: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path), str(base)]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    assert process.stdout == "an extra is missing\n"
    assert issubclass(MissingDependencyError, MatryoshkaError)
    assert not (tmp_path / "merged").exists()
