"""Broken, hostile and pickled files: one clear error, and nothing is run or written."""

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
from safetensors.torch import load_file, save_file
from strangers import plain_adapter

from matryoshka_lora import MatryoshkaError, export, reorder
from matryoshka_lora.info import describe

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Trace:
    """A pickle that leaves a trace where it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.place),))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trace(folder.parent / "owned")))


def pickled_by_another_name(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Trace(folder.parent / "owned")))


def bomb(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**40) + b'{"a":' * 10_000)


def cut_short(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def a_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def shard_elsewhere(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def without_partner(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[max(tensors)]
    save_file(tensors, folder / WEIGHTS)


def other_shapes(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[min(tensors)] = torch.ones(3)
    save_file(tensors, folder / WEIGHTS)


def dora(folder: Path) -> None:
    change(folder, use_dora=True)


def endless_json(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 200_000)


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle": (pickled, "holds a pickle"),
    "a pickle by another name": (pickled_by_another_name, "damaged"),
    "a header that would fill the memory": (bomb, "damaged"),
    "a file cut short": (cut_short, "damaged"),
    "a pipe": (a_pipe, "there is no such file"),
    "a shard elsewhere": (shard_elsewhere, "names no files beside it"),
    "a factor without partner": (without_partner, "no LoRA of rank"),
    "other shapes": (other_shapes, "no LoRA of rank"),
    "DoRA": (dora, "use_dora adds .* use it whole"),
    "PiSSA": (lambda folder: change(folder, init_lora_weights="pissa"), "path_initial_model"),
    "endless JSON": (endless_json, "damaged"),
    "a config of lists": (
        lambda folder: change(folder, r=[8], rank_pattern=[1]),
        "positive number",
    ),
    "an infinite alpha": (
        lambda folder: change(folder, lora_alpha=float("inf")),
        "positive number",
    ),
    "a broken pattern": (
        lambda folder: change(folder, rank_pattern={"(": 4}),
        "a pattern of .*damaged",
    ),
    "another method": (lambda folder: change(folder, peft_type="LOHA"), "'LOHA' and not LoRA"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmful_folder_gets_one_clear_error(tmp_path: Path, harm: str) -> None:
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"])
    make, message = HARMS[harm]
    make(tmp_path / "lora")
    before = sorted(tmp_path.rglob("*"))
    for action in (
        lambda: describe(tmp_path / "lora"),
        lambda: export(tmp_path / "lora", tmp_path / "out", 2),
        lambda: reorder(tmp_path / "lora", tmp_path / "out"),
    ):
        with pytest.raises(MatryoshkaError, match=message) as caught:
            action()
        assert len(str(caught.value)) < 700
    assert sorted(tmp_path.rglob("*")) == before


def test_whole_models_and_lonely_weights_are_told_apart(tmp_path: Path) -> None:
    """PEFT's weights without their config are refused: their scale is not 1 without a word."""
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"])
    (tmp_path / "lora" / CONFIG).unlink()
    for source in (tmp_path / "lora", tmp_path / "lora" / WEIGHTS):
        with pytest.raises(MatryoshkaError, match=r"(its|the) scale stands in"):
            export(source, tmp_path / "out.safetensors", 2)
    save_file({"a": torch.ones(1)}, tmp_path / "lora" / "mine.safetensors")
    (tmp_path / "lora" / WEIGHTS).unlink()
    with pytest.raises(MatryoshkaError, match=r"name one, such as .*mine\.safetensors"):
        describe(tmp_path / "lora")
    (tmp_path / "lora" / "config.json").write_text("{}")
    with pytest.raises(MatryoshkaError, match="it is a whole model"):
        describe(tmp_path / "lora")
    for missing in (tmp_path / "nothing", tmp_path / "nothing.safetensors"):
        with pytest.raises(MatryoshkaError, match=r"does not exist|no such file"):
            describe(missing)
