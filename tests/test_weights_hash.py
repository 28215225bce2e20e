"""A sidecar knows the weights that it was written for: PEFT alone replaces those, and leaves it where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LINEAR_LAYERS, nested_llama, randomize, tiny_llama, tiny_mixtral
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from strangers import output, plain_adapter
from test_directions import forget, pages_in_memory

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, export, load, nest, reorder
from matryoshka_lora.formats.beside import read_spectra
from matryoshka_lora.formats.opened import hash_of_files, open_adapter
from matryoshka_lora.formats.write import write_adapter

WEIGHTS, SIDECAR, SPECTRA, TRAINED = (
    *("adapter_model.safetensors", "nesting.json"),
    *("spectra.safetensors", "trained.safetensors"),
)
OTHERS = rf"{SIDECAR} was written for other weights than {WEIGHTS} has now.*Delete .*`matryoshka reorder`"


def in_memory(seed: int = 1) -> NestedAdapter:
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR_LAYERS))
    randomize(model, seed)
    return nest(model)


def save_reordered(folder: Path, seed: int = 1) -> Path:
    adapter = in_memory(seed)
    adapter.reorder()
    adapter.save(folder)
    return folder


def save_trainable(folder: Path, seed: int = 1) -> Path:
    """As trainer.save_model() does."""
    in_memory(seed).model.save_pretrained(folder)
    assert (folder / TRAINED).is_file()
    return folder


def train_in_peft(folder: Path, which: str = "lora_") -> Any:
    """Plain PEFT takes a step of training and saves into the same folder."""
    model: Any = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)
    factors = [parameter for name, parameter in model.named_parameters() if which in name]
    optimizer = torch.optim.SGD(factors, lr=1e-3)
    tokens = torch.arange(20)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.save_pretrained(folder)
    return model


def said(folder: Path) -> Any:
    return json.loads((folder / SIDECAR).read_text())


def change_sidecar(folder: Path, **values: Any) -> None:
    """None takes a key out."""
    new = {key: value for key, value in (said(folder) | values).items() if value is not None or key not in values}
    (folder / SIDECAR).write_text(json.dumps(new))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("save", [save_reordered, save_trainable])
@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_what_peft_alone_trained_on_in_the_folder_is_refused(tmp_path: Path, save: Any, which: str) -> None:
    folder = save(tmp_path / "adapter")
    wanted = output(train_in_peft(folder, which))
    for open_it in (
        lambda: open_adapter(folder),
        lambda: open_adapter(folder, max_rank=2),
        lambda: load(tiny_llama(), folder),
        lambda: load(tiny_llama(), folder, trainable=True),
        lambda: in_memory().model.load_adapter(folder, "default"),
        lambda: export(folder, tmp_path / "rank", 2),
    ):
        with pytest.raises(MatryoshkaError, match=OTHERS):
            open_it()
    # The ways out, as the message names them.
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in (SIDECAR, SPECTRA, TRAINED):
        (copy / name).unlink(missing_ok=True)
    reorder(copy, tmp_path / "again")
    again = load(tiny_llama(), tmp_path / "again")
    torch.testing.assert_close(output(again.model), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_peft_alone_only_saved_again_is_the_same_adapter(tmp_path: Path, dtype: torch.dtype) -> None:
    """Half precision becomes float32 on the way: PEFT computes in it."""
    save_reordered(tmp_path / "made")
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, open_adapter(tmp_path / "made").cast(dtype))
    before = said(folder)["weights"]
    PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True).save_pretrained(folder)
    assert open_adapter(folder).dtype == torch.float32
    assert said(folder)["weights"] == before
    assert load(tiny_llama(), folder).ranks == tuple(range(1, 9))


def by_handle(folder: Path) -> None:
    save_reordered(folder)


def by_handle_as_trained(folder: Path) -> None:
    nested_llama(Nesting([1, 2, 8])).save(folder)


def by_handle_in_half_precision(folder: Path) -> None:
    adapter = in_memory()
    adapter.reorder()
    adapter.model.to(torch.bfloat16)
    adapter.save(folder)


def by_peft_s_save(folder: Path) -> None:
    save_trainable(folder)


def by_reorder(folder: Path, **options: Any) -> None:
    plain = folder.with_name(f"{folder.name}-plain")
    plain_adapter(plain, **options)
    reorder(plain, folder)


def by_reorder_of_an_embedding(folder: Path) -> None:
    by_reorder(folder, target_modules=["embed_tokens", "q_proj"])


def by_reorder_of_experts(folder: Path) -> None:
    by_reorder(folder, base=tiny_mixtral(), target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])


def by_directions(folder: Path) -> None:
    save_reordered(folder.with_name("whole"))
    export(folder.with_name("whole"), folder, 8, "directions")


def by_some_directions(folder: Path) -> None:
    by_reorder_of_experts(folder.with_name("whole"))
    export(folder.with_name("whole"), folder, 3, "directions")
    assert said(folder)["weights"] == said(folder.with_name("whole"))["weights"], "all ranks have the same"


WRITERS = [
    *(by_handle, by_handle_as_trained, by_handle_in_half_precision, by_peft_s_save, by_reorder),
    *(by_reorder_of_an_embedding, by_reorder_of_experts, by_directions, by_some_directions),
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_writer_names_the_weights_that_it_stored(tmp_path: Path, write: Any) -> None:
    folder = tmp_path / "adapter"
    write(folder)
    opened = open_adapter(folder)
    assert len(said(folder)["weights"]) == 64
    assert ("trained" in said(folder)) == (folder / TRAINED).exists()
    if opened.nested.reordered:
        open_adapter(folder, max_rank=2).tensors()
    open_adapter(folder, trained=True).tensors()
    if (folder / SPECTRA).is_file():
        assert read_spectra(opened) is not None
    change_sidecar(folder, weights="0" * 64)
    with pytest.raises(MatryoshkaError, match=f"{SIDECAR} was written for other weights than {opened.weights[0].name}"):
        open_adapter(folder)


def test_plain_weights_beside_directions_are_others(tmp_path: Path) -> None:
    by_directions(tmp_path / "adapter")
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR_LAYERS))
    randomize(model, 5)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MatryoshkaError, match=OTHERS):
        open_adapter(tmp_path / "adapter")


def test_shards_are_the_weights_that_they_were_split_from(tmp_path: Path) -> None:
    folder = save_reordered(tmp_path / "adapter")
    tensors = load_file(folder / WEIGHTS)
    keys = sorted(tensors)
    parts = {"one.safetensors": keys[:5], "two.safetensors": keys[5:]}
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"weight_map": {key: name for name, part in parts.items() for key in part}})
    )
    (folder / WEIGHTS).unlink()
    assert len(open_adapter(folder).weights) == 2
    save_file({key: 2 * tensors[key] for key in keys[5:]}, folder / "two.safetensors", {"format": "pt"})
    with pytest.raises(MatryoshkaError, match=f"{SIDECAR} was written for other weights"):
        open_adapter(folder)


def test_a_sidecar_that_names_no_weights_is_read_as_before(tmp_path: Path) -> None:
    folder = save_trainable(tmp_path / "adapter")
    change_weights(folder, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()] and None)
    with pytest.raises(MatryoshkaError, match=OTHERS):
        open_adapter(folder)
    change_sidecar(folder, weights=None, trained=None)
    assert open_adapter(folder).nested.reordered == "svd"
    assert open_adapter(folder, trained=True).nested.reordered is None


def test_factors_of_another_training_are_not_gone_on_from(tmp_path: Path) -> None:
    """As where a download has replaced the others: a hub has no such file."""
    old = save_trainable(tmp_path / "old")
    for new in (save_trainable(tmp_path / "trainable", seed=2), save_reordered(tmp_path / "reordered", seed=2)):
        shutil.copy(old / TRAINED, new)
        assert load(tiny_llama(), new).ranks == tuple(range(1, 9))
        with pytest.raises(
            MatryoshkaError, match=rf"{TRAINED} holds the factors of another training.*delete {TRAINED}"
        ):
            load(tiny_llama(), new, trainable=True)
        (new / TRAINED).unlink()
        load(tiny_llama(), new, trainable=True)


def test_singular_values_of_other_weights_are_refused(tmp_path: Path) -> None:
    old, new = save_reordered(tmp_path / "old"), save_reordered(tmp_path / "new", seed=2)
    assert read_spectra(open_adapter(new)) is not None
    shutil.copy(old / SPECTRA, new)
    with pytest.raises(MatryoshkaError, match=rf"{SPECTRA} belongs to another adapter. Delete"):
        read_spectra(open_adapter(new))


@pytest.mark.parametrize("key", ["weights", "trained"])
@pytest.mark.parametrize("value", [7, "", "Z" * 64, ["a"]])
def test_what_is_no_hash_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    folder = save_reordered(tmp_path / "adapter")
    change_sidecar(folder, **{key: value})
    with pytest.raises(MatryoshkaError, match=rf"{SIDECAR}: {key} is .*, not a hash. Copy the adapter again"):
        open_adapter(folder)


def test_the_hash_reads_little(tmp_path: Path) -> None:
    tensors = {}
    for name in (f"base_model.model.layers.{i}.up_proj" for i in range(4)):
        tensors[f"{name}.lora_A.weight"] = torch.randn(256, 2048)
        tensors[f"{name}.lora_B.weight"] = torch.randn(2048, 256)
    (tmp_path / "plain").mkdir()
    LoraConfig(r=256, lora_alpha=256, target_modules=["up_proj"]).save_pretrained(tmp_path / "plain")
    save_file(tensors, tmp_path / "plain" / WEIGHTS, {"format": "pt"})
    reorder(tmp_path / "plain", tmp_path / "nested")
    file = tmp_path / "nested" / WEIGHTS
    opened = open_adapter(tmp_path / "nested")
    forget(file)  # the system has read ahead while safetensors read the header
    assert hash_of_files(opened) == said(tmp_path / "nested")["weights"]
    touched = pages_in_memory(file)
    print(f"the hash: {touched:,} of {file.stat().st_size:,} bytes")
    assert touched < 0.02 * file.stat().st_size


def test_the_same_adapter_is_the_same_bytes(tmp_path: Path) -> None:
    one, two = save_trainable(tmp_path / "one"), save_trainable(tmp_path / "two")
    names = {file.name for file in one.iterdir()}
    assert {WEIGHTS, SIDECAR, SPECTRA, TRAINED} <= names
    assert "trained" in said(one)
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
