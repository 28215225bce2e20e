"""Open and find LoRAs: damaged, hostile and pickled files give one clear error."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plain_peft import plain_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

import matryoshka_lora as ml
from matryoshka_lora import MatryoshkaError, NotFiniteError, info
from matryoshka_lora.formats.open import find_loras
from matryoshka_lora.formats.peft_folder import CONFIG_NAME, WEIGHTS_NAME

Damage = Callable[[Path], object]


class Exploit:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.folder),))


def write_pickle(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS_NAME).unlink()
        (folder / name).write_bytes(pickle.dumps(Exploit(folder.parent / "exploited")))

    return damage


def write_pipe(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    os.mkfifo(folder / WEIGHTS_NAME)


def edit_bytes(edit: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / WEIGHTS_NAME
        file.write_bytes(edit(file.read_bytes()))

    return damage


def edit_tensors(edit: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS_NAME)

    return damage


def set_first(tensor: Tensor) -> Damage:
    return edit_tensors(lambda tensors: tensors.update({min(tensors): tensor}))


def edit_config(**fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG_NAME).read_text())
        (folder / CONFIG_NAME).write_text(json.dumps({**config, **fields}))

    return damage


def with_kernel(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return factors of a convolution whose B has a kernel of 3 x 3."""
    return {key: tensor[..., None, None].repeat(1, 1, 3, 3) for key, tensor in tensors.items()}


DAMAGES: dict[str, tuple[Damage, str]] = {
    "pickle": (write_pickle("adapter_model.bin"), "pickle"),
    "pickle with another name": (write_pickle(WEIGHTS_NAME), "damaged"),
    "unknown dtype": (set_first(torch.ones(3).to(torch.float8_e8m0fnu)), "F8_E8M0"),
    "header bomb": (
        edit_bytes(lambda _: struct.pack("<Q", 2**40) + b'{"a":' * 10_000),
        "damaged",
    ),
    "truncated file": (edit_bytes(lambda data: data[: len(data) // 2]), "damaged"),
    "empty file": (edit_bytes(lambda _: b""), "damaged"),
    "pipe": (write_pipe, "not found"),
    "missing B": (edit_tensors(lambda tensors: tensors.pop(max(tensors))), "lora_B"),
    "missing A": (edit_tensors(lambda tensors: tensors.pop(min(tensors))), "lora_B"),
    "no factors": (edit_tensors(lambda tensors: tensors.clear()), "no LoRA factors"),
    "shape": (set_first(torch.ones(3)), "rank 8"),
    "scalar": (set_first(torch.tensor(1.0)), "rank 8"),
    "kernel of B": (
        edit_tensors(lambda tensors: tensors.update(with_kernel(tensors))),
        "fit",
    ),
    "integers": (set_first(torch.ones(8, 64, dtype=torch.int32)), "rank 8"),
    "JSON of nested lists": (
        lambda folder: (folder / CONFIG_NAME).write_text("[" * 200_000),
        "damaged",
    ),
    "empty config": (lambda folder: (folder / CONFIG_NAME).write_text("{}"), "peft_type"),
    "rank is a list": (edit_config(r=[8]), "positive"),
    "rank is null": (edit_config(r=None), "positive"),
    "rank is a float": (edit_config(r=8.0), "positive"),
    "rank is negative": (edit_config(r=-8, lora_alpha=-8), "positive"),
    "alpha is infinite": (edit_config(lora_alpha=1e999), "positive"),
    "alpha is zero": (edit_config(lora_alpha=0), "positive"),
    "alpha is text": (edit_config(lora_alpha="8"), "positive"),
    "pattern that does not end": (edit_config(rank_pattern={"(.|..|...)+(?<!.)": 4}), "forever"),
    "pattern is no regular expression": (edit_config(rank_pattern={"(": 4}), "regular expression"),
    "patterns are a list": (edit_config(alpha_pattern=["q_proj"]), "pattern"),
    "patterns of experts": (
        edit_config(target_parameters=["experts.up"], alpha_pattern={"experts.up": 9}),
        "target_parameters",
    ),
    "DoRA": (edit_config(use_dora=True), "use_dora"),
    "bias in the factors": (edit_config(lora_bias=True), "lora_bias"),
    "alpha has 400 digits": (edit_config(lora_alpha=10**400), "positive"),
    "rank and alpha have 400 digits": (edit_config(r=10**400, lora_alpha=10**400), "rank"),
    "alpha is too small": (edit_config(lora_alpha=1e-320), "positive"),
    "OLoRA, whose case PEFT ignores": (edit_config(init_lora_weights="OLoRA"), "olora"),
    "PiSSA": (edit_config(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "LoHa": (edit_config(peft_type="LOHA"), "LOHA"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_folder_gives_one_clear_error(kind: str, tmp_path: Path) -> None:
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"])
    damage, message = DAMAGES[kind]
    damage(tmp_path / "lora")
    paths = sorted(tmp_path.rglob("*"))
    with pytest.raises(MatryoshkaError, match=message) as caught:
        ml.open(tmp_path / "lora")
    assert len(str(caught.value)) < 500
    assert sorted(tmp_path.rglob("*")) == paths


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e160, 1e200])
def test_failure_leaves_no_output(value: float, tmp_path: Path) -> None:
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"])
    wide = torch.full((64, 8), value, dtype=torch.float64)
    edit_tensors(lambda tensors: tensors.update({max(tensors): wide}))(tmp_path / "lora")
    lora = ml.open(tmp_path / "lora")
    with pytest.raises(NotFiniteError, match="learning rate"):
        lora.truncate(2).save(tmp_path / "output")
    with pytest.raises(NotFiniteError):
        info(tmp_path / "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize("path", ["missing", "missing.safetensors", "missing/lora.safetensors"])
def test_missing_path(path: str, tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match="missing"):
        ml.open(tmp_path / path)


def test_other_folders_are_rejected_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(MatryoshkaError, match=CONFIG_NAME):
        ml.open(tmp_path)
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(MatryoshkaError, match=r"b\.safetensors"):
        ml.open(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / CONFIG_NAME).touch()
    with pytest.raises(MatryoshkaError, match=f"{tmp_path.name}/a"):
        ml.open(tmp_path)
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert find_loras(tmp_path) == []
    with pytest.raises(MatryoshkaError, match="full model"):
        ml.open(tmp_path)


def test_find_loras(tmp_path: Path) -> None:
    for name in ("b", "a", "neither", ".unfinished"):
        (tmp_path / name).mkdir()
    for name in (f".unfinished/{CONFIG_NAME}", "._c.safetensors"):
        (tmp_path / name).touch()
    for name in (f"b/{CONFIG_NAME}", f"a/{CONFIG_NAME}", "c.safetensors", "D.SAFETENSORS", "x.txt"):
        (tmp_path / name).touch()
    names = [path.name for path in find_loras(tmp_path)]
    assert names == ["D.SAFETENSORS", "a", "b", "c.safetensors"]
    assert find_loras(tmp_path / "a") == []  # it is a LoRA itself
    assert find_loras(tmp_path / "c.safetensors") == []
    assert find_loras(tmp_path / "missing") == []
