"""Damaged, foreign and contradictory adapters: an error that says what to do, and nothing is changed by it.

Every case goes through `refused`, which compares all files, and all of the base model, with what they were before.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lora_config, nest_as, nested_llama, randomize, tiny_llama, tiny_mixtral
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from strangers import forget_weights
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, export, load
from matryoshka_lora.cli.main import main as command

IDS = torch.arange(3, 27).reshape(2, 12)
NESTING = Nesting([1, 3, 6], scaling="sqrt", scale=1.7 / math.sqrt(6))
TARGETS = ["q_proj", "down_proj"]
WEIGHTS, CONFIG, SIDECAR = "adapter_model.safetensors", "adapter_config.json", "nesting.json"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"

# A message names the way out: what to do, or that the adapter is for another model.
WAY_OUT = re.compile(
    r"\b(copy|make|write|save|train|choose|use|give|upgrade|remove|set|load|call|install|take|turn|unmerge|leave)\b"
    r"|another base model|regular expression|smallest rank is|trained ranks are|rules are|are named like|not one of",
    re.IGNORECASE,
)

Damage = Callable[[Path], None]


# What must not change


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes, and every folder."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in paths
    }


class Snapshot:
    """All of a model that a failed load could disturb."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.kinds = {name: type(module) for name, module in model.named_modules()}
        self.learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.training = {name: module.training for name, module in model.named_modules()}
        self.attributes = set(vars(model))
        self.adapters = (list(getattr(model, "peft_config", {})), getattr(model, "active_adapter", None))
        self.config = repr(getattr(model, "config", None))
        self.output = output(model)

    def assert_unchanged(self, model: nn.Module) -> None:
        now = Snapshot(model)
        assert now.weights.keys() == self.weights.keys()
        assert [name for name, tensor in self.weights.items() if not torch.equal(tensor, now.weights[name])] == []
        assert now.kinds == self.kinds
        assert now.training == self.training
        assert now.attributes == self.attributes
        assert now.adapters == self.adapters
        assert now.config == self.config
        assert torch.equal(now.output, self.output)
        changed = [name for name, learning in self.learning.items() if learning != now.learning[name]]
        assert changed == [], "requires_grad was changed"


def output(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


@contextmanager
def refused(message: str, folder: Path, model: nn.Module | None = None) -> Iterator[None]:
    """The block raises a MatryoshkaError whose text matches, and changes neither a file nor the model."""
    files, before = fingerprint(folder), None if model is None else Snapshot(model)
    with pytest.raises(MatryoshkaError) as caught:
        yield
    assert fingerprint(folder) == files
    if before is not None and model is not None:
        before.assert_unchanged(model)
    assert re.search(message, str(caught.value), re.IGNORECASE | re.DOTALL), str(caught.value)
    assert WAY_OUT.search(str(caught.value)), f"no way out: {caught.value}"
    assert len(str(caught.value)) < 1500


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    nested_llama(NESTING, target_modules=TARGETS).save(folder)
    # PEFT keeps the targets as a set: without an order of their own, random damage would be another in every process.
    config(target_modules=TARGETS)(folder)
    forget_weights(folder)  # else any other weights are refused for being others
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A fresh copy of a good adapter."""
    shutil.copytree(saved, tmp_path / "adapter")
    return tmp_path / "adapter"


BASE = tiny_llama()


def plain_base() -> Any:
    return copy.deepcopy(BASE)


def base_with_an_adapter() -> Any:
    model = get_peft_model(plain_base(), LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"]))
    randomize(model, seed=8)
    return model.eval()


BASES = {"plain": plain_base, "beside-another": base_with_an_adapter}


# Ways to damage a file


def write_bytes(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def make_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def link_to_nothing(name: str) -> Damage:
    """As a download that was stopped leaves it."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("nowhere")

    return damage


def cut(name: str, size: Callable[[int], int]) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: size(len(content))])

    return damage


def change_json(name: str, **changes: Any) -> Damage:
    """Set keys; a value of ``...`` removes one, and a dict is merged into the dict that is there."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        for key, value in changes.items():
            if value is ...:
                del data[key]
            elif isinstance(value, dict) and isinstance(data.get(key), dict):
                data[key] = {**data[key], **value}
            else:
                data[key] = value
        (folder / name).write_text(json.dumps(data))

    return damage


def change_tensors(file: str = WEIGHTS, /, **changes: Any) -> Damage:
    """By key; None removes one and a function is called with it."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        for key, value in changes.items():
            if value is None:
                del tensors[key]
            else:
                tensors[key] = value(tensors[key].clone()) if callable(value) else value
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file)

    return damage


def both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def set_entry(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[0, 1] = value
        return tensor

    return change


def header(length: int, content: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + content


def sidecar(**changes: Any) -> Damage:
    return change_json(SIDECAR, **changes)


def config(**changes: Any) -> Damage:
    return change_json(CONFIG, **changes)


DEEP = b"[" * 200_000 + b"]" * 200_000
NO_WEIGHTS = rf"{WEIGHTS}.*(damaged|cut short)"

# How the weights can be damaged, and what the message says about it.
WEIGHT_DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (remove(WEIGHTS), rf"holds no {WEIGHTS}"),
    "a folder": (make_folder(WEIGHTS), WEIGHTS),
    "only a pickle": (only_a_pickle, r"adapter_model\.bin is a pickle"),
    "0 bytes": (cut(WEIGHTS, lambda size: 0), NO_WEIGHTS),
    "7 bytes": (cut(WEIGHTS, lambda size: 7), NO_WEIGHTS),
    "8 bytes": (cut(WEIGHTS, lambda size: 8), NO_WEIGHTS),
    "200 bytes": (cut(WEIGHTS, lambda size: 200), NO_WEIGHTS),
    "half": (cut(WEIGHTS, lambda size: size // 2), NO_WEIGHTS),
    "all but one byte": (cut(WEIGHTS, lambda size: size - 1), NO_WEIGHTS),
    "too long": (lambda folder: write_bytes(WEIGHTS, (folder / WEIGHTS).read_bytes() + b"x")(folder), NO_WEIGHTS),
    "git-lfs pointer": (
        write_bytes(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        NO_WEIGHTS,
    ),
    "header of garbage": (write_bytes(WEIGHTS, header(8, b"\xff\x00garbage" * 9)), NO_WEIGHTS),
    "header of absurd length": (write_bytes(WEIGHTS, header(2**62, b"{}")), NO_WEIGHTS),
    "header of 1 TB": (write_bytes(WEIGHTS, header(2**40, b"{}")), NO_WEIGHTS),
    "header of length 0": (write_bytes(WEIGHTS, header(0)), NO_WEIGHTS),
    "header is a list": (write_bytes(WEIGHTS, header(2, b"[]")), NO_WEIGHTS),
    "header is deep": (write_bytes(WEIGHTS, header(len(DEEP), DEEP)), NO_WEIGHTS),
    "no tensors": (write_bytes(WEIGHTS, header(2, b"{}")), "no factors|no tensor|lacks|holds no"),
    "A is missing": (change_tensors(**{A: None}), "lora_[AB]|no factors"),
    "B is missing": (change_tensors(**{B: None}), "lora_B"),
    "a stray tensor": (change_tensors(stray=torch.ones(2)), "stray"),
    "a stray factor": (change_tensors(**{f"{LAYER}.lora_C.weight": torch.ones(2)}), "lora_C"),
    "a name from DoRA": (change_tensors(**{f"{LAYER}.lora_magnitude_vector": torch.ones(64)}), "lora_magnitude_vector"),
    "NaN": (change_tensors(**{A: set_entry(math.nan)}), r"q_proj.*(NaN|finite)"),
    "infinity": (change_tensors(**{B: set_entry(math.inf)}), r"q_proj.*infinity"),
    "minus infinity": (change_tensors(**{B: set_entry(-math.inf)}), r"q_proj.*infinity"),
    "infinite in fp32": (
        change_tensors(**{A: torch.full((6, 64), 1e300, dtype=torch.float64)}),
        "q_proj.*(infinity|finite|float64|dtype)",
    ),
    "A of fewer rows": (change_tensors(**{A: torch.ones(5, 64)}), r"q_proj.*shape"),
    "A of more rows": (change_tensors(**{A: torch.ones(7, 64)}), r"q_proj.*shape"),
    "A of two experts": (change_tensors(**{A: torch.ones(12, 64)}), r"q_proj.*shape"),
    "A of no rows": (change_tensors(**{A: torch.ones(0, 64)}), r"q_proj.*shape"),
    "A of one dimension": (change_tensors(**{A: torch.ones(384)}), r"q_proj.*shape"),
    "A a number": (change_tensors(**{A: torch.ones(())}), r"q_proj.*shape"),
    "B of fewer columns": (change_tensors(**{B: torch.ones(64, 5)}), r"q_proj.*shape"),
    "B of one column": (change_tensors(**{B: torch.ones(64, 1)}), r"q_proj.*shape"),
    "B of more columns": (change_tensors(**{B: torch.ones(64, 12)}), r"q_proj.*shape"),
    "B of one dimension": (change_tensors(**{B: torch.ones(384)}), r"q_proj.*shape"),
    "B a number": (change_tensors(**{B: torch.ones(())}), r"q_proj.*shape"),
    "integers": (change_tensors(**{A: torch.ones(6, 64, dtype=torch.int32)}), "q_proj.*(int32|dtype|floating)"),
    "booleans": (change_tensors(**{B: torch.ones(64, 6, dtype=torch.bool)}), "q_proj.*(bool|dtype|floating)"),
    "complex numbers": (
        change_tensors(**{A: torch.full((6, 64), complex(math.nan, 1))}),
        "q_proj.*(complex|dtype|floating)",
    ),
    "8-bit floats": (
        change_tensors(**{A: lambda tensor: tensor.to(torch.float8_e4m3fn)}),
        "q_proj.*(float8|dtype|floating)",
    ),
}

NOT_READABLE = rf"{CONFIG}.*(missing|damaged)"
CONTRADICTS = rf"{CONFIG}.*(sidecar|lora_alpha|r=)"
CONFIG_DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (remove(CONFIG), rf"{CONFIG}.*missing"),
    "a folder": (make_folder(CONFIG), CONFIG),
    "empty": (write_bytes(CONFIG, b""), NOT_READABLE),
    "cut": (cut(CONFIG, lambda size: size // 2), NOT_READABLE),
    "not JSON": (write_bytes(CONFIG, b"r: 6\n"), NOT_READABLE),
    "not text": (write_bytes(CONFIG, b"\xff\xfe\x00\x01"), NOT_READABLE),
    "a list": (write_bytes(CONFIG, b"[1]"), NOT_READABLE),
    "a string": (write_bytes(CONFIG, b'"LORA"'), NOT_READABLE),
    "a number": (write_bytes(CONFIG, b"6"), NOT_READABLE),
    "null": (write_bytes(CONFIG, b"null"), NOT_READABLE),
    "an empty object": (write_bytes(CONFIG, b"{}"), CONFIG),
    "deep": (write_bytes(CONFIG, DEEP), NOT_READABLE),
    "peft_type IA3": (config(peft_type="IA3"), r"IA3.*only LoRA"),
    "peft_type unknown": (config(peft_type="LORAX"), "LORAX"),
    "peft_type missing": (config(peft_type=...), "LoRA|peft_type"),
    "peft_type a list": (config(peft_type=["LORA"]), CONFIG),
    "r contradicts": (config(r=8), r"r=8.*6"),
    "r missing": (config(r=...), r"r=8.*6"),  # PEFT's default is 8
    "r is 0": (config(r=0), CONFIG),
    "r is negative": (config(r=-6), CONFIG),
    "r is text": (config(r="6"), CONFIG),
    "r is a fraction": (config(r=6.0), CONFIG),
    "r is null": (config(r=None), CONFIG),
    "lora_alpha is text": (config(lora_alpha="16"), CONFIG),
    "lora_alpha is null": (config(lora_alpha=None), CONFIG),
    "lora_alpha is NaN": (config(lora_alpha=math.nan), CONFIG),
    "lora_alpha is infinite": (config(lora_alpha=math.inf), CONFIG),
    "lora_alpha is beyond all floats": (config(lora_alpha=10**400), "lora_alpha 1000"),
    "r is beyond all integers": (both(config(r=10**400), sidecar(ranks=[10**400])), "rank 1000"),
    "rank_pattern": (config(rank_pattern={"q_proj": 3}), "rank_pattern"),
    "alpha_pattern": (config(alpha_pattern={"q_proj": 3}), "alpha_pattern"),
    "lora_bias": (config(lora_bias=True), "lora_bias"),
    "init olora": (config(init_lora_weights="olora"), "olora"),
    "task unknown": (config(task_type="POETRY"), "POETRY"),
}

UNREADABLE = rf"{SIDECAR} cannot be read as a sidecar"
SIDECAR_DAMAGES: dict[str, tuple[Damage, str]] = {
    "a folder": (make_folder(SIDECAR), SIDECAR),
    "a link to nothing": (link_to_nothing(SIDECAR), SIDECAR),
    "empty": (write_bytes(SIDECAR, b""), UNREADABLE),
    "cut": (cut(SIDECAR, lambda size: size // 2), UNREADABLE),
    "not JSON": (write_bytes(SIDECAR, b"ranks: [1]"), UNREADABLE),
    "not text": (write_bytes(SIDECAR, b"\xff\xfe\x00"), UNREADABLE),
    "a list": (write_bytes(SIDECAR, b"[1, 2]"), UNREADABLE),
    "deep": (write_bytes(SIDECAR, DEEP), UNREADABLE),
    "5 MB": (write_bytes(SIDECAR, b" " * 5_000_000), UNREADABLE),
    "future version": (sidecar(format_version=3), r"version 3.*up to 2.*upgrade"),
    "far future, other keys": (sidecar(format_version=99, ranks=..., sparkle=1), r"version 99.*upgrade"),
    "version 0": (sidecar(format_version=0), "no format version"),
    "version negative": (sidecar(format_version=-1), "no format version"),
    "version missing": (sidecar(format_version=...), "no format version"),
    "version is text": (sidecar(format_version="1"), "no format version"),
    "version is true": (sidecar(format_version=True), "version"),
    "version is a fraction": (sidecar(format_version=1.5), "no format version"),
    "version 1, keys of 2": (sidecar(format_version=1), "missing or unknown.*deploy"),
    "unknown key": (sidecar(sparkle=1), "unknown.*sparkle"),
    "missing key": (sidecar(seed=...), "missing.*seed"),
    "unknown rule": (sidecar(rule="matryoska"), r"no rule 'matryoska'.*did you mean 'matryoshka'"),
    "rule is a list": (sidecar(rule=["matryoshka"]), "rule"),
    "rule is an object": (sidecar(rule={}), "rule"),
    "rule is null": (sidecar(rule=None), "rule"),
    "deploy unknown": (sidecar(deploy="suffix"), "deploy.*suffix"),
    "deploy is a list": (sidecar(deploy=["paper"]), "deploy"),
    "reordered unknown": (sidecar(reordered="cooked"), "reordered.*cooked"),
    "reordered is true": (sidecar(reordered=True), "reordered.*True"),
    "reordered is a list": (sidecar(reordered=["svd"]), "reordered"),
    "seed is text": (sidecar(seed="7"), "seed"),
    "seed is true": (sidecar(seed=True), "seed"),
    "ranks are an object": (sidecar(ranks={}), "ranks"),
    "ranks unsorted": (sidecar(ranks=[3, 1, 6]), r"\[1, 3, 6\] instead of \[3, 1, 6\]"),
    "ranks repeated": (sidecar(ranks=[1, 3, 3, 6]), r"\[1, 3, 6\] instead of \[1, 3, 3, 6\]"),
    "ranks empty": (sidecar(ranks=[]), "ranks is empty"),
    "ranks text": (sidecar(ranks="1,3,6"), "ranks is '1,3,6'"),
    "ranks null": (sidecar(ranks=None), "ranks is None"),
    "rank 0": (sidecar(ranks=[0, 3, 6]), "rank 0 is not positive"),
    "rank a fraction": (sidecar(ranks=[1.5, 3, 6]), r"rank 1\.5 is not an integer"),
    "rank true": (sidecar(ranks=[True, 3, 6]), "rank True is not an integer"),
    "ranks end elsewhere": (sidecar(ranks=[1, 3, 5]), r"r=6.*largest nested rank is 5"),
    "a rank beyond all memory": (
        both(sidecar(ranks=[1, 10**15], scaling="none"), config(r=10**15, lora_alpha=10**15)),
        "proj.*shape",
    ),
    "scaling unknown": (sidecar(scaling="cube"), "scaling is 'cube'"),
    "scaling is a list": (sidecar(scaling=["sqrt"]), "scaling"),
}


def version_1(**changes: Any) -> Damage:
    """The sidecar of version 0.1 that says what the new one does, but for the changes."""
    good = {
        "format_version": 1,
        "nesting": {"ranks": [1, 3, 6], "scaling": "sqrt", "alpha": 1.7},
        "rule": "matryoshka",
        "inference": "prefix",
        "seed": 0,
        "form": "raw",
        "trained_ranks": [1, 3, 6],
    }
    return both(write_bytes(SIDECAR, json.dumps(good).encode()), sidecar(**changes))


# What only a sidecar of version 0.1 can say wrong: it had the scale too, and the trained ranks.
SIDECAR_1_DAMAGES: dict[str, tuple[Damage, str]] = {
    "keys of 2": (version_1(deploy="paper"), "unknown.*deploy"),
    "missing key": (version_1(seed=...), "missing.*seed"),
    "unknown rule": (version_1(rule="matryoska"), r"no rule 'matryoska'.*did you mean 'matryoshka'"),
    "rule is a list": (version_1(rule=["matryoshka"]), "rule"),
    "other rule, other trained ranks": (version_1(rule="dylora-all"), "trained_ranks"),
    "rule that keeps nothing": (version_1(rule="dylora", inference="keep"), "dylora.*keep"),
    "inference unknown": (version_1(inference="suffix"), "inference.*suffix"),
    "inference is a list": (version_1(inference=["prefix"]), "inference"),
    "form unknown": (version_1(form="cooked"), "form.*cooked"),
    "seed is text": (version_1(seed="7"), "seed"),
    "nesting is a list": (version_1(nesting=[1, 3, 6]), "nesting"),
    "nesting lacks ranks": (version_1(nesting=[]), "nesting"),
    "nesting has an unknown key": (version_1(nesting={"beta": 1}), "nesting.*beta"),
    "ranks unsorted": (version_1(nesting={"ranks": [3, 1, 6]}), r"\[1, 3, 6\] instead of \[3, 1, 6\]"),
    "ranks end elsewhere": (
        version_1(nesting={"ranks": [1, 3, 5], "scaling": "none"}, trained_ranks=[1, 3, 5]),
        r"scales|r=6.*largest nested rank is 5",
    ),
    "scaling unknown": (version_1(nesting={"scaling": "cube"}), "scaling is 'cube'"),
    "scaling is a list": (version_1(nesting={"scaling": ["sqrt"]}), "scaling"),
    "scaling contradicts": (version_1(nesting={"scaling": "rank"}), "lora_alpha"),
    "alpha contradicts": (version_1(nesting={"alpha": 2.0}), "lora_alpha"),
    "lora_alpha contradicts": (both(version_1(), config(lora_alpha=16)), r"lora_alpha=16"),
    "use_rslora contradicts": (both(version_1(), config(use_rslora=True)), "use_rslora"),
    "alpha 0": (version_1(nesting={"alpha": 0}), "alpha is 0"),
    "alpha NaN": (version_1(nesting={"alpha": math.nan}), "alpha is nan"),
    "alpha text": (version_1(nesting={"alpha": "1"}), "alpha is '1'"),
    "alpha beyond all floats": (version_1(nesting={"alpha": 10**400}), "alpha"),
    "trained_ranks contradict": (version_1(trained_ranks=[1, 2, 3, 6]), "trained_ranks"),
    "trained_ranks null": (version_1(trained_ranks=None), "trained_ranks"),
}

FILE_DAMAGES = {
    f"{file}: {name}": damage
    for file, damages in (
        ("weights", WEIGHT_DAMAGES),
        ("config", CONFIG_DAMAGES),
        ("sidecar", SIDECAR_DAMAGES),
        ("sidecar of 0.1", SIDECAR_1_DAMAGES),
    )
    for name, damage in damages.items()
}


@pytest.mark.parametrize("case", FILE_DAMAGES)
def test_a_damaged_adapter_is_not_loaded(folder: Path, case: str) -> None:
    damage, message = FILE_DAMAGES[case]
    damage(folder)
    model = plain_base()
    with refused(message, folder, model):
        load(model, folder)


# PEFT alone knows the kinds of tasks, and export does not ask it.
@pytest.mark.parametrize("case", sorted(FILE_DAMAGES.keys() - {"config: task unknown"}))
def test_a_damaged_adapter_is_not_exported(folder: Path, tmp_path: Path, case: str) -> None:
    damage, message = FILE_DAMAGES[case]
    damage(folder)
    with refused(message, tmp_path):
        export(folder, tmp_path / "out", 3)


def test_the_undamaged_adapter_is_loaded_and_exported(folder: Path, tmp_path: Path) -> None:
    """Else all of the above would show nothing."""
    load(plain_base(), folder)
    load(base_with_an_adapter(), folder, adapter="second")
    export(folder, tmp_path / "out", 3)


def test_a_whole_model_is_not_taken_for_an_adapter(tmp_path: Path) -> None:
    BASE.save_pretrained(tmp_path / "model")
    with pytest.raises(MatryoshkaError, match=rf"is a whole model: {CONFIG} is missing"):
        export(tmp_path / "model", tmp_path / "out", 1)


def test_a_config_that_is_not_there_is_not_looked_for_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`org/adapter` is a folder here: what lies under that name on the hub is another adapter."""
    asked: list[Any] = []

    def download(*arguments: Any, **options: Any) -> str:
        asked.append(arguments)
        raise OSError("no network in a test")

    monkeypatch.setattr("peft.config.hf_hub_download", download)
    (folder.parent / "org").mkdir()
    folder.rename(folder.parent / "org" / "adapter")
    (folder.parent / "org" / "adapter" / CONFIG).unlink()
    monkeypatch.chdir(folder.parent)
    with refused(rf"{CONFIG}.*missing", folder.parent):
        load(plain_base(), "org/adapter")
    assert asked == []


TRAINED = "trained.safetensors"
TRAINED_DAMAGES: dict[str, tuple[Damage, str]] = {
    "a folder": (make_folder(TRAINED), rf"{TRAINED}.*(damaged|cut short)"),
    "a link to nothing": (link_to_nothing(TRAINED), rf"{TRAINED}.*(damaged|cut short)"),
    "cut": (cut(TRAINED, lambda size: size // 2), rf"{TRAINED}.*(damaged|cut short)"),
    "NaN": (change_tensors(TRAINED, **{A: set_entry(math.nan)}), r"q_proj.*NaN"),
    "B is missing": (change_tensors(TRAINED, **{B: None}), "lora_B"),
    "A of fewer rows": (change_tensors(TRAINED, **{A: torch.ones(5, 64)}), r"q_proj.*shape"),
    "a layer is missing": (change_tensors(TRAINED, **{A: None, B: None}), "no factors for layer"),
}


def save_to_train_on(folder: Path) -> None:
    """The factors as they are trained stand beside those that are deployed, as in a checkpoint."""
    nested_llama(NESTING, deploy="reordered", target_modules=TARGETS).model.save_pretrained(str(folder))
    assert (folder / TRAINED).is_file()
    forget_weights(folder)


@pytest.mark.parametrize("case", TRAINED_DAMAGES)
def test_damaged_factors_as_they_are_trained_are_not_loaded(folder: Path, case: str) -> None:
    save_to_train_on(folder)
    load(plain_base(), folder, trainable=True)
    damage, message = TRAINED_DAMAGES[case]
    damage(folder)
    model = plain_base()
    with refused(message, folder, model):
        load(model, folder, trainable=True)


@pytest.mark.parametrize("how", ["save", "export", "export_files"])
def test_no_trained_factors_of_an_older_adapter_are_left_beside_a_new_one(
    folder: Path, tmp_path: Path, how: str
) -> None:
    """Else training would go on from those."""
    save_to_train_on(tmp_path / "old")
    writers(folder)[how](tmp_path / "old")
    assert not (tmp_path / "old" / TRAINED).exists()


# Contents that only a model shows to be wrong


def with_modules(**extra: Any) -> Callable[[Path], None]:
    """Write an adapter that carries more than factors."""

    def write(folder: Path) -> None:
        model = get_peft_model(biased(), lora_config(NESTING, target_modules=TARGETS, **extra))
        randomize(model)
        nest_as(model.eval(), NESTING, deploy="paper").save(folder)

    return write


def biased() -> Any:
    return tiny_llama(attention_bias=True)


def drop(fragment: str) -> Damage:
    def damage(folder: Path) -> None:
        key = next(key for key in load_file(folder / WEIGHTS) if fragment in key)
        change_tensors(**{key: None})(folder)

    return damage


def reshape(fragment: str) -> Damage:
    def damage(folder: Path) -> None:
        key = next(key for key in load_file(folder / WEIGHTS) if fragment in key)
        change_tensors(**{key: torch.zeros(3, 5)})(folder)

    return damage


def poison(fragment: str) -> Damage:
    def damage(folder: Path) -> None:
        key = next(key for key in load_file(folder / WEIGHTS) if fragment in key)
        change_tensors(**{key: lambda tensor: tensor.fill_(math.nan)})(folder)

    return damage


NORM = "base_model.model.model.norm.weight"
# What is wrong, and what the message says. The base has biases in its attention.
MODEL_DAMAGES: dict[str, tuple[Damage, str]] = {
    "a layer is missing": (
        change_tensors(**{A: None, B: None}),
        r"no factors for layer model\.layers\.0\.self_attn\.q_proj",
    ),
    "a layer too many": (
        change_tensors(
            **{A.replace("q_proj", "k_proj"): torch.ones(6, 64), B.replace("q_proj", "k_proj"): torch.ones(32, 6)}
        ),
        r"layer model\.layers\.0\.self_attn\.k_proj",
    ),
    "A is too wide": (change_tensors(**{A: torch.ones(6, 65)}), r"q_proj.*\[6, 65\].*\[6, 64\]"),
    "B is too long": (change_tensors(**{B: torch.ones(65, 6)}), r"q_proj.*\[65, 6\].*\[64, 6\]"),
    "targets missing": (config(target_modules=None), rf"target_modules|no target|factors|{CONFIG}"),
    "targets another layer": (config(target_modules=["k_proj"]), "k_proj|no target"),
    "targets nothing here": (config(target_modules=["nothing"]), "no target|target_modules"),
    "targets empty": (config(target_modules=[]), "no target|target_modules"),
    "targets a number": (config(target_modules=5), rf"target_modules|{CONFIG}"),
    "targets a broken pattern": (config(target_modules="(q_proj"), rf"target_modules|{CONFIG}"),
    "targets a whole block": (config(target_modules=r"model\.layers\.\d\.self_attn"), "self_attn"),
    "exclude_modules a number": (config(exclude_modules=5), rf"exclude_modules|{CONFIG}"),
    "layers_to_transform another": (config(layers_to_transform=[7]), "no target|layers_to_transform"),
    "layers_to_transform text": (config(layers_to_transform="a"), CONFIG),
    "layer_replication": (config(layer_replication=[[0, 2], [0, 2]]), "layer_replication"),
    "layer_replication beyond the model": (config(layer_replication=[[0, 20]]), "layer_replication"),
    "dropout of 5": (config(lora_dropout=5), rf"dropout|{CONFIG}"),
    "dropout of text": (config(lora_dropout="much"), rf"dropout|{CONFIG}"),
    "bias unknown": (config(bias="some"), "bias"),
    "init unknown": (config(init_lora_weights="hope"), "hope"),
    "DoRA": (config(use_dora=True), "dora|magnitude"),
    "KaSA": (config(kasa_config={}), "kasa|variant|lora_diag"),
    "VeLoRA": (config(velora_config={}), "velora"),
    "aLoRA": (config(alora_invocation_tokens=[1]), "alora"),
    "BD-LoRA": (config(use_bdlora={"target_modules_bd_a": ["o_proj"]}), "bd_?lora"),
    "Megatron": (config(megatron_config={"a": 1}), "megatron"),
    "target_parameters of a linear layer": (config(target_parameters=["q_proj.weight"]), "target_parameters|q_proj"),
    "modules_to_save a number": (config(modules_to_save=5), rf"modules_to_save|{CONFIG}"),
    "modules_to_save a word": (config(modules_to_save="lm_head"), rf"modules_to_save|{CONFIG}"),
    "modules_to_save not in the file": (config(modules_to_save=["lm_head"]), "lm_head"),
    "tokens not in the file": (config(trainable_token_indices=[1]), "token"),
    "tokens beyond the vocabulary": (config(trainable_token_indices=[10**6]), rf"token|{CONFIG}"),
    "biases not in the file": (config(bias="all"), "bias"),
    "a saved module is missing": (both(with_modules(modules_to_save=["lm_head"]), drop("lm_head")), "lm_head"),
    "a saved module has another shape": (
        both(with_modules(modules_to_save=["lm_head"]), reshape("lm_head")),
        "lm_head",
    ),
    "a saved module holds NaN": (both(with_modules(modules_to_save=["lm_head"]), poison("lm_head")), "lm_head.*NaN"),
    "a module too many": (
        both(with_modules(modules_to_save=["lm_head"]), change_tensors(**{NORM: torch.zeros(64)})),
        r"model\.norm",
    ),
    "a bias is missing": (both(with_modules(bias="all"), drop("k_proj.bias")), r"k_proj.*bias"),
    "a bias of a target is missing": (
        both(with_modules(bias="lora_only"), drop("q_proj.base_layer.bias")),
        r"q_proj.*bias",
    ),
    "a bias has another shape": (both(with_modules(bias="all"), reshape("k_proj.bias")), r"k_proj.*bias"),
    # A load that took these would overwrite weights of the base model.
    "a base weight beside biases": (
        both(with_modules(bias="all"), change_tensors(**{NORM: torch.zeros(64)})),
        r"model\.norm",
    ),
    "a base layer beside biases": (
        both(
            with_modules(bias="all"),
            change_tensors(**{f"{LAYER.replace('q_proj', 'k_proj')}.weight": torch.zeros(32, 64)}),
        ),
        r"k_proj\.weight",
    ),
    "a base weight beside tokens": (
        both(with_modules(trainable_token_indices=[3, 5]), change_tensors(**{NORM: torch.zeros(64)})),
        r"model\.norm",
    ),
    "token rows are missing": (both(with_modules(trainable_token_indices=[3, 5]), drop("token")), "token"),
    "token rows have another shape": (both(with_modules(trainable_token_indices=[3, 5]), reshape("token")), "token"),
}


def biased_with_an_adapter() -> Any:
    model = get_peft_model(biased(), LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj"]))
    randomize(model, seed=8)
    return model.eval()


BIASED_BASES = {"plain": biased, "beside-another": biased_with_an_adapter}


@pytest.mark.parametrize("where", BIASED_BASES)
@pytest.mark.parametrize("case", MODEL_DAMAGES)
def test_an_adapter_that_does_not_fit_its_base_is_refused(folder: Path, case: str, where: str) -> None:
    damage, message = MODEL_DAMAGES[case]
    damage(folder)
    model = BIASED_BASES[where]()
    with refused(message, folder, model):
        load(model, folder, adapter="second")


def other_llama(**changes: Any) -> Callable[[], nn.Module]:
    return lambda: tiny_llama(**changes)


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4)).eval()


OTHER_BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "wider": (other_llama(hidden_size=128), r"q_proj.*\[6, 64\].*\[6, 128\]|down_proj.*\[64, 6\].*\[128, 6\]"),
    "narrower inside": (other_llama(intermediate_size=80), r"down_proj.*\[6, 96\].*\[6, 80\]"),
    "more layers": (other_llama(num_hidden_layers=3), r"no factors for layer model\.layers\.2\."),
    "fewer layers": (other_llama(num_hidden_layers=1), r"layer model\.layers\.1\."),
    "other names": (tiny_gpt2, r"layer model\.layers\.0\."),
}


@pytest.mark.parametrize("case", OTHER_BASES)
def test_an_adapter_for_another_base_is_refused(folder: Path, case: str) -> None:
    build, message = OTHER_BASES[case]
    model = build()
    with refused(f"({message}).*another base model", folder, model):
        load(model, folder)


@pytest.mark.parametrize("case", OTHER_BASES)
def test_an_adapter_for_another_base_is_refused_beside_one_that_fits(folder: Path, case: str) -> None:
    build, message = OTHER_BASES[case]
    model = get_peft_model(
        build(), LoraConfig(r=2, target_modules=["c_attn"] if case == "other names" else ["q_proj", "v_proj"])
    )
    with refused(f"({message}).*another base model", folder, model.eval()):
        load(model, folder, adapter="second")


def test_the_base_that_it_was_trained_on_is_named(folder: Path) -> None:
    config(base_model_name_or_path="org/the-right-one")(folder)
    model = tiny_llama(hidden_size=128)
    with refused("another base model.*org/the-right-one", folder, model):
        load(model, folder)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    nested_llama(NESTING, target_modules=["embed_tokens", "q_proj"]).save(tmp_path)
    model = tiny_llama(vocab_size=100)
    with refused(r"embed_tokens.*\[6, 96\].*\[6, 100\]", tmp_path, model):
        load(model, tmp_path)


@pytest.mark.parametrize(("experts", "width"), [(4, 24), (2, 24), (3, 40)])
def test_other_experts_are_refused(tmp_path: Path, experts: int, width: int) -> None:
    targets = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = get_peft_model(tiny_mixtral(), lora_config(NESTING, **targets))
    nest_as(model.eval(), NESTING, deploy="paper").save(tmp_path)
    model = tiny_mixtral(num_local_experts=experts, intermediate_size=width)
    with refused("experts.*(shape|size)", tmp_path, model):
        load(model, tmp_path)


def test_a_layer_that_cannot_be_nested_is_found_before_it_is_wrapped(folder: Path) -> None:
    """The file fits, but this base's layer is a kind that no rank can be set on."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Conv1d(12, 12, 3, groups=2)

        def forward(self, input_ids: Tensor) -> Any:
            return type("Output", (), {"logits": self.q_proj(torch.ones(1, 12, 5))})

    torch.manual_seed(0)
    tensors = {
        "base_model.model.q_proj.lora_A.weight": torch.ones(6, 12, 3),
        "base_model.model.q_proj.lora_B.weight": torch.ones(12, 3, 1),  # PEFT's shape for two groups
    }
    save_file(tensors, folder / WEIGHTS)
    config(target_modules=["q_proj"])(folder)
    model = Grouped().eval()
    with refused("q_proj", folder, model):
        load(model, folder)


# What the caller asks for

ASKED_RANKS: dict[str, tuple[Any, str]] = {
    "untrained": (2, "rank 2 was not trained; the trained ranks are 1, 3, 6"),
    "zero": (0, "rank 0 is not positive"),
    "negative": (-3, "rank -3 is not positive"),
    "above R": (7, "rank 7 is above the largest rank 6"),
    "true": (True, "rank True is not an integer"),
    "a fraction": (3.0, r"rank 3\.0 is not an integer"),
    "text": ("3", "rank '3' is not an integer"),
    "a list": ([3], r"rank \[3\] is not an integer"),
    "a tensor": (torch.tensor(3), "rank tensor.* is not an integer"),
}
ASKED_PATTERNS: dict[str, tuple[Any, str]] = {
    "untrained for a layer": ({"q_proj": 2}, "rank 2 was not trained"),
    "null for a layer": ({"q_proj": None}, "rank None is not an integer"),
    "no such layer": ({"k_proj": 3}, r"no layer.*k_proj.*named like"),
    "a broken pattern": ({"(q_proj": 3}, r"\(q_proj"),
    "a number for a pattern": ({5: 3}, "5"),
}


@pytest.mark.parametrize("where", BASES)
@pytest.mark.parametrize("case", [*ASKED_RANKS, *ASKED_PATTERNS])
def test_a_rank_that_cannot_be_had_is_refused_before_loading(folder: Path, case: str, where: str) -> None:
    rank, message = {**ASKED_RANKS, **ASKED_PATTERNS}[case]
    model = BASES[where]()
    with refused(message, folder, model):
        load(model, folder, rank=rank, adapter="second")


@pytest.mark.parametrize("case", ASKED_RANKS)
def test_a_rank_that_cannot_be_had_is_not_exported(folder: Path, tmp_path: Path, case: str) -> None:
    rank, message = ASKED_RANKS[case]
    with refused(message, tmp_path):
        export(folder, tmp_path / "out", rank)
    adapter = load(plain_base(), folder)
    with refused(message, tmp_path, adapter.model):
        adapter.export(tmp_path / "out", rank)


def test_a_rank_may_be_an_integer_of_numpy(folder: Path, tmp_path: Path) -> None:
    """It is one for torch, and JSON does not know it."""
    rank: Any = np.int64(3)
    adapter = load(plain_base(), folder, rank=rank)
    adapter.export(tmp_path / "memory", rank)
    export(folder, tmp_path / "files", rank)
    adapter.reorder()
    adapter.save(tmp_path / "reordered")
    for form in ("ladder", "directions"):
        export(tmp_path / "reordered", tmp_path / form, rank, form)
    load(plain_base(), tmp_path / "reordered", max_rank=rank).save(tmp_path / "shorter")
    for name in ("memory", "files", "ladder/rank-3", "directions", "shorter"):
        assert json.loads((tmp_path / name / CONFIG).read_text())["r"] == 3


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", 5, None])
@pytest.mark.parametrize("where", BASES)
def test_a_name_that_torch_cannot_take_is_refused(folder: Path, name: Any, where: str) -> None:
    model = BASES[where]()
    with refused("name", folder, model):
        load(model, folder, adapter=name)


def test_a_name_that_is_taken_is_refused(folder: Path) -> None:
    model = base_with_an_adapter()
    with refused("already has an adapter 'default'", folder, model):
        load(model, folder)


def test_a_second_adapter_with_biases_is_refused(folder: Path) -> None:
    """PEFT gives the base's biases to one adapter only."""
    with_modules(bias="all")(folder)
    model = load(biased(), folder).model
    with refused("bias", folder, model):
        load(model, folder, adapter="second")


def test_loading_twice_onto_the_same_base_disturbs_no_one(folder: Path) -> None:
    """The base is wrapped in place, which is easily forgotten."""
    base = plain_base()
    first = load(base, folder)
    before = Snapshot(first.model)
    with pytest.raises(MatryoshkaError, match="give the PeftModel"):
        load(base, folder)
    before.assert_unchanged(first.model)


@pytest.mark.parametrize("base", [None, "smollm2-135m", {}, LoraConfig()])
def test_what_is_no_model_is_refused(folder: Path, base: Any) -> None:
    with refused("model", folder):
        load(base, folder)


@pytest.mark.parametrize("path", ["absent", "absent/below", "org/name", "adapter/nesting.json", "", "\0", "hf://a/b"])
def test_a_path_that_is_no_adapter_is_refused(
    folder: Path, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What looks like an id on the hub too: this package reads adapters from folders only."""
    monkeypatch.chdir(tmp_path)
    model = plain_base()
    with refused("director|folder|path|nesting.json", tmp_path, model):
        load(model, path)
    with refused("director|folder|path|nesting.json", tmp_path):
        export(path, tmp_path / "out", 3)


def test_an_ordinary_adapter_is_told_how_to_become_nested(folder: Path, tmp_path: Path) -> None:
    nested_llama(NESTING).export(tmp_path / "slice", 3)
    remove(SIDECAR)(folder)
    for path in (folder, tmp_path / "slice"):
        model = plain_base()
        with refused(rf"not a nested adapter.*no {SIDECAR}.*matryoshka reorder", tmp_path, model):
            load(model, path)


# What cannot be written


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_adapter_is_not_written_over_a_good_one(folder: Path, tmp_path: Path, value: float) -> None:
    adapter = load(plain_base(), folder)
    adapter.model.get_parameter(f"{LAYER}.lora_B.default.weight").data[0, 0] = value
    for write in (adapter.save, lambda path: adapter.export(path, 3)):
        for target in (folder, tmp_path / "new"):
            files = fingerprint(tmp_path)
            with pytest.raises(MatryoshkaError, match=r"q_proj.*NaN or infinity.*lower learning rate"):
                write(target)
            assert fingerprint(tmp_path) == files


def writers(folder: Path) -> Mapping[str, Callable[[Path], object]]:
    adapter = load(plain_base(), folder)
    return {
        "save": adapter.save,
        "export": lambda path: adapter.export(path, 3, overwrite=True),
        "export_files": lambda path: export(folder, path, 3, overwrite=True),
    }


@pytest.mark.parametrize("how", ["save", "export", "export_files"])
def test_a_file_in_the_way(folder: Path, tmp_path: Path, how: str) -> None:
    write = writers(folder)[how]
    (tmp_path / "taken").write_text("precious")
    for target in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with refused(r"cannot write .*taken.*file stands where a folder is needed", tmp_path):
            write(target)


@pytest.mark.parametrize("how", ["save", "export", "export_files"])
def test_a_folder_in_the_way_of_a_file(folder: Path, tmp_path: Path, how: str) -> None:
    write = writers(folder)[how]
    (tmp_path / "out" / WEIGHTS).mkdir(parents=True)
    with refused(rf"cannot write .*{WEIGHTS} is a folder", tmp_path):
        write(tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("how", ["save", "export", "export_files"])
def test_a_parent_that_may_not_be_written(folder: Path, tmp_path: Path, how: str) -> None:
    write = writers(folder)[how]
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with refused(r"cannot write .*locked.*permission", tmp_path):
        write(locked / "out")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody may write")
@pytest.mark.parametrize("how", ["save", "export", "export_files"])
def test_a_place_where_nobody_may_write(folder: Path, tmp_path: Path, how: str) -> None:
    write = writers(folder)[how]
    with refused(r"cannot write /proc/adapter.*choose", tmp_path):
        write(Path("/proc/adapter"))


def run_script(script: str, *arguments: str) -> str:
    """Run Python in the tests' folder and give back what it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from test_bad_adapters import MatryoshkaError, fingerprint, plain_base, load, writers

folder = Path(sys.argv[1])
write = writers(folder / "adapter")
found = []
for limit in (0, 100, 3000):
    for how in ("save", "export", "export_files"):
        for target in ("adapter-old", "new"):
            before = fingerprint(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                write[how](folder / target)
                said = None
            except MatryoshkaError as error:
                said = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            found.append([limit, how, target, said, fingerprint(folder) == before])
            load(plain_base(), folder / "adapter-old")
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_destroys_nothing_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "adapter-old")
    found = json.loads(run_script(FULL_DISK, str(tmp_path)).splitlines()[-1])
    assert len(found) == 18
    for limit, how, target, said, unchanged in found:
        assert said is not None, (limit, how, target)
        assert re.search(rf"cannot write .*{target}.*File too large; free some space", said), said
        assert unchanged, (limit, how, target)


KILLED = """
import os, shutil, signal, sys, time
from pathlib import Path
from test_bad_adapters import NESTING, TARGETS, nested_llama, randomize

folder = Path(sys.argv[1])
old = nested_llama(NESTING, target_modules=TARGETS)
old.save(folder / "old")
new = nested_llama(NESTING, target_modules=TARGETS)
randomize(new.model, seed=5)
new.reorder()
new.save(folder / "new")
new.export(folder / "slice", 3)


def in_child(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def killed_at(call, write, target):
    # Kills itself just before that call to the file system.
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event == "open" or event.startswith(("os.", "shutil.")):
            seen += 1
            if seen == call:
                os.kill(os.getpid(), signal.SIGKILL)

    def work():
        sys.addaudithook(watch)
        write(target)

    return os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])


for name, write, exists in (
    ("save-over", new.save, True),
    ("export-over", lambda path: new.export(path, 3, overwrite=True), True),
    ("save-new", new.save, False),
):
    call, status = 0, -signal.SIGKILL
    while status:
        call += 3
        target = folder / f"{name}-{call:03}"
        if exists:
            shutil.copytree(folder / "old", target)
        status = killed_at(call, write, target)
        assert status in (0, -signal.SIGKILL), status

for wait in (0.001, 0.003, 0.007, 0.013, 0.021, 0.034):
    target = folder / f"any-time-{wait}"
    shutil.copytree(folder / "old", target)

    def work():
        while True:
            new.save(target)
            old.save(target)

    child = in_child(work)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def factors(adapter: NestedAdapter) -> dict[str, Tensor]:
    return {
        name.replace(".default", ""): parameter.data
        for name, parameter in adapter.model.named_parameters()
        if "lora_" in name
    }


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_while_writing_leaves_the_old_the_new_or_an_error(tmp_path: Path) -> None:
    """Old and new have the same shapes and the same config; only the sidecar says which factors they are."""
    run_script(KILLED, str(tmp_path))
    tensors = {name: load_file(tmp_path / name / WEIGHTS) for name in ("old", "new", "slice")}
    outcomes: dict[str, list[str]] = {}
    said: list[str] = []
    for target in sorted(tmp_path.iterdir()):
        kind, _, _ = target.name.rpartition("-")
        if target.name.startswith(".") or not kind:
            continue
        try:
            adapter = load(plain_base(), target)
        except MatryoshkaError as error:
            outcome = "error"
            said.append(str(error))
        else:
            outcome = "new" if adapter.reordered else "old"
            assert same_tensors(factors(adapter), tensors[outcome]), target
        plain = read_plainly(target)
        if plain is not None:
            assert any(
                plain[0] == rank and same_tensors(plain[1], tensors[name])
                for name, rank in (("old", 6), ("new", 6), ("slice", 3))
            ), target
        outcomes.setdefault(kind, []).append(outcome)
    assert [message for message in said if not WAY_OUT.search(message)] == []
    # It was killed early and late, and each time in between.
    assert outcomes["save-over"][0] == outcomes["export-over"][0] == "old"
    assert outcomes["save-over"][-1] == "new"
    assert outcomes["export-over"][-1] == "error"  # a slice is no nested adapter
    assert min(len(outcomes["save-over"]), len(outcomes["export-over"])) > 10
    assert set(outcomes["save-new"]) == {"new"}  # where nothing was, there is nothing or all
    # Once the old one was given up, nothing but the new one comes back.
    for kind in ("save-over", "export-over"):
        assert sorted(outcomes[kind], key=["old", "error", "new"].index) == outcomes[kind]


def read_plainly(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    """What PEFT alone would take for the adapter: its rank and tensors, or None where it finds no config."""
    if not (folder / CONFIG).exists():
        return None
    return json.loads((folder / CONFIG).read_text())["r"], load_file(folder / WEIGHTS)


def test_an_interrupted_write_does_not_hinder_the_next(folder: Path) -> None:
    """What a killed process leaves behind is neither taken for an adapter nor in the way."""
    leftover = folder / ".adapter.0123abcd.writing"
    shutil.copytree(folder, leftover)
    (folder / CONFIG).unlink()
    (folder / SIDECAR).unlink()
    adapter = nested_llama(NESTING, target_modules=TARGETS)
    adapter.reorder()
    adapter.save(folder)
    assert same_tensors(factors(load(plain_base(), folder)), factors(adapter))


# Random damage

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "flip", "set", "cut", "drop", "double"]),
        st.integers(0, 2**32),
        st.integers(1, 255),
        st.booleans(),
    ),
    min_size=1,
    max_size=3,
)


def edited(content: bytes, edits: list[tuple[str, int, int, bool]], head: int) -> bytes:
    """Damage bytes at random; every second time in the first ``head`` of them, where a file describes itself."""
    data = bytearray(content)
    for kind, position, value, early in edits:
        if not data:
            break
        at = position % (min(head, len(data)) if early else len(data))
        if kind == "flip":
            data[at] ^= value
        elif kind == "set":
            data[at] = b'0123456789-.,:"{}[] eE'[value % 22]
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + 1 + value % 8]
        else:
            data[at:at] = data[at : at + 1 + value % 8]
    return bytes(data)


@pytest.mark.parametrize(("file", "head"), [(WEIGHTS, 1200), (CONFIG, 10**9), (SIDECAR, 10**9)])
def test_random_damage_is_refused_or_harmless(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, file: str, head: int
) -> None:
    folder = tmp_path_factory.mktemp("random") / "adapter"
    shutil.copytree(saved, folder)
    content, out = (saved / file).read_bytes(), folder.parent / "out"
    before = Snapshot(plain_base())

    @settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(edits=EDITS)
    def run(edits: list[tuple[str, int, int, bool]]) -> None:
        (folder / file).write_bytes(edited(content, edits, head))
        files, model = fingerprint(folder), plain_base()
        try:
            adapter = load(model, folder)
        except MatryoshkaError:
            before.assert_unchanged(model)
        else:
            assert all(bool(tensor.isfinite().all()) for tensor in factors(adapter).values())
        with contextlib.suppress(MatryoshkaError):
            export(folder, out, 3, overwrite=True)
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(out / WEIGHTS).values())
        assert fingerprint(folder) == files

    run()


# The command line


@pytest.fixture
def matryoshka(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command in this process; gives its exit status and what it wrote to stderr."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the command sets it, and here the process lives on

    def run(*arguments: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["matryoshka", *map(str, arguments)])
        status = 0
        try:
            command()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capsys.readouterr().err

    return run


COMMAND_CASES = [
    "weights: 7 bytes",
    "weights: NaN",
    "weights: B is missing",
    "config: missing",
    "config: r contradicts",
    "sidecar: unknown rule",
    "sidecar: future version",
    "sidecar: ranks unsorted",
    "sidecar: deep",
]


@pytest.mark.parametrize("case", COMMAND_CASES)
def test_the_command_says_what_is_wrong(
    folder: Path, tmp_path: Path, matryoshka: Callable[..., tuple[int, str]], case: str
) -> None:
    damage, message = FILE_DAMAGES[case]
    damage(folder)
    before = fingerprint(tmp_path)
    status, said = matryoshka("export", folder, "--rank", 3, "-o", tmp_path / "out")
    assert status == 1
    assert said.startswith("error: ")
    assert re.search(message, " ".join(said.split()), re.IGNORECASE), said
    assert "Traceback" not in said
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("rank", [0, 2, 7])
def test_the_command_refuses_a_rank(
    folder: Path, tmp_path: Path, matryoshka: Callable[..., tuple[int, str]], rank: int
) -> None:
    before = fingerprint(tmp_path)
    status, said = matryoshka("export", folder, "--rank", rank, "-o", tmp_path / "out")
    assert status == 1
    assert said.startswith(f"error: rank {rank} ")
    assert fingerprint(tmp_path) == before


def test_the_command_exits_with_1_and_no_traceback(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("precious")
    before = fingerprint(tmp_path)
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from matryoshka_lora.cli.main import main; main()",
            *("export", str(folder), "--rank", "3", "-o", str(tmp_path / "taken")),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert re.search(r"^error: cannot write .*taken", run.stderr, re.MULTILINE)
    assert "Traceback" not in run.stderr
    assert fingerprint(tmp_path) == before


def test_the_command_exports_what_is_good(
    folder: Path, tmp_path: Path, matryoshka: Callable[..., tuple[int, str]]
) -> None:
    status, _ = matryoshka("export", folder, "--rank", 3, "-o", tmp_path / "out")
    assert status == 0
    export(folder, tmp_path / "expected", 3)
    assert same_tensors(load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "expected" / WEIGHTS))
    assert PeftModel.from_pretrained(plain_base(), tmp_path / "out").peft_config["default"].r == 3
