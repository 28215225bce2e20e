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

Harm = Callable[[Path], object]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Trace:
    """A pickle that leaves a trace where it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.place),))


def pickled(folder: Path, name: str = "adapter_model.bin") -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Trace(folder.parent / "owned")))


def a_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def weights(edit: Callable[[bytes], bytes]) -> Harm:
    return lambda folder: (folder / WEIGHTS).write_bytes(edit((folder / WEIGHTS).read_bytes()))


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    def harm(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        edit(found)
        save_file(found, folder / WEIGHTS)

    return harm


def config(**fields: Any) -> Harm:
    def harm(folder: Path) -> None:
        given = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**given, **fields}))

    return harm


HARMS: dict[str, tuple[Harm, str]] = {
    "a pickle": (pickled, "holds no adapter_model.safetensors.* is a pickle"),
    "another dtype": (
        tensors(lambda x: x.update({min(x): torch.ones(3).to(torch.float8_e8m0fnu)})),
        "has tensors of type 'F8_E8M0'",
    ),
    "a pickle by another name": (lambda folder: pickled(folder, WEIGHTS), "damaged"),
    "a header bomb": (weights(lambda _: struct.pack("<Q", 2**40) + b'{"a":' * 10_000), "damaged"),
    "a file cut short": (weights(lambda data: data[: len(data) // 2]), "damaged"),
    "a pipe": (a_pipe, "there is no file"),
    "a factor without partner": (tensors(lambda x: x.pop(max(x))), "is not of rank"),
    "other shapes": (tensors(lambda x: x.update({min(x): torch.ones(3)})), "is not of rank"),
    "factors that diverged": (tensors(lambda x: x[min(x)].fill_(torch.nan)), "learning rate"),
    "DoRA": (config(use_dora=True), "with use_dora its layers are more .* use it whole"),
    "PiSSA": (config(init_lora_weights="pissa"), "path_initial_model"),
    "endless JSON": (lambda folder: (folder / CONFIG).write_text("[" * 200_000), "damaged"),
    "a config of lists": (config(r=[8]), "is no positive number"),
    "an infinite alpha": (config(lora_alpha=1e999), "is no positive number"),
    "no rank": (config(r=None), "is no positive number"),
    "a rank of 8.0": (config(r=8.0), "is no positive number"),
    "alphas of experts": (
        config(target_parameters=["experts.up"], alpha_pattern={"experts.up": 9}),
        "target_parameters have ranks by layer",
    ),
    "a broken pattern": (config(rank_pattern={"(": 4}), "pattern .*damaged"),
    "another method": (config(peft_type="LOHA"), "'LOHA' and not LoRA"),
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


def test_weights_without_their_scale_are_refused(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "lora", target_modules=["q_proj"])
    (tmp_path / "lora" / CONFIG).unlink()
    for source in (tmp_path / "lora", tmp_path / "lora" / WEIGHTS):
        with pytest.raises(MatryoshkaError, match=r"(its|the) scale stands in"):
            export(source, tmp_path / "out.safetensors", 2)
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras/one.safetensors").touch()
    with pytest.raises(MatryoshkaError, match=r"name one in it, such as .*loras/one\.safetensors"):
        describe(tmp_path / "loras")
    (tmp_path / "loras/config.json").touch()
    with pytest.raises(MatryoshkaError, match="it is a whole model, and `matryoshka extract`"):
        describe(tmp_path / "loras")
    for missing in (tmp_path / "nothing", tmp_path / "nothing.safetensors"):
        with pytest.raises(MatryoshkaError, match=r"does not exist|there is no file"):
            describe(missing)
