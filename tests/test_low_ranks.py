"""Whatever writes an adapter: its low ranks are the SVD's, as after `reorder`, unless the paper's deployment was said.

The expected numbers are those of numpy's SVD of ``B diag(P) A``, or the paper's formula. What was written is read as
plain files.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import oracle
import pytest
import torch
from conftest import randomize
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_chat import save_tiny_chat
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from matryoshka_lora import NestedAdapter, export, load, nest, reorder
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.training import make_config, train

RANKS = [1, 2, 4]
R, SCALE = 4, 0.75
SCALING: Literal["rank"] = "rank"
WEIGHTS, TRAINED = "adapter_model.safetensors", "trained.safetensors"
# Of no layer does llama.cpp turn the rows of these.
TARGETS = ["v_proj", "down_proj"]

Factors = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("base") / "model")


def trained_adapter(base: Path, deploy: Any = "reordered", name: str = "default", **changes: Any) -> NestedAdapter:
    """An adapter in training, which was not reordered after training."""
    config = LoraConfig(r=R, lora_alpha=SCALE * R, target_modules=TARGETS, **changes)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter_name=name)
    randomize(model)
    return nest(model.train(), RANKS, SCALING, deploy=deploy, adapter=name)


def pairs(tensors: Mapping[str, Tensor]) -> Factors:
    """A and B by the layer's name."""
    found = {key.partition(".lora_A")[0]: key for key in tensors if ".lora_A" in key}
    return {
        name.removeprefix("base_model.model."): (
            tensors[key].double(),
            tensors[key.replace("lora_A", "lora_B")].double(),
        )
        for name, key in found.items()
    }


def in_memory(adapter: NestedAdapter) -> Factors:
    own = f".{adapter.name}."
    found = {key.replace(own, "."): value for key, value in adapter.model.state_dict().items() if own in key}
    return pairs({key: value.detach().clone() for key, value in found.items()})


def wanted(factors: Factors, rank: int, deploy: str = "reordered") -> dict[str, Tensor]:
    """The update of each layer at a rank, of factors as they are trained."""
    found = {}
    for name, (A, B) in factors.items():
        if deploy == "paper":
            found[name] = oracle.scale(SCALING, SCALE, R, rank) * B[:, :rank] @ A[:rank]
        else:
            u, s, vh = np.linalg.svd((B @ torch.diag(oracle.trained_p(RANKS, SCALING, SCALE)) @ A).numpy())
            found[name] = torch.from_numpy(u[:, :rank] * s[:rank] @ vh[:rank])
    return found


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) == 4
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=1e-4 * float(delta.abs().max()))


def prefix(folder: Path, rank: int) -> dict[str, Tensor]:
    """The update of each layer at a rank, of an adapter's files: its first columns, as PEFT scales them."""
    config = json.loads((folder / "adapter_config.json").read_text())
    whole = (folder / WEIGHTS).exists()
    found = pairs(load_file(folder / WEIGHTS) if whole else open_adapter(folder).tensors())
    scale = config["lora_alpha"] / config["r"]
    own = {key.strip("^").replace("\\", ""): rank for key, rank in config["rank_pattern"].items()}
    assert not config["use_rslora"]
    assert all(config["alpha_pattern"][key] == scale * rank for key, rank in config["rank_pattern"].items())
    assert all(len(A) == own.get(name, config["r"]) for name, (A, _) in found.items())
    return {name: scale * B[:, :rank] @ A[:rank] for name, (A, B) in found.items()}


def check_folder(folder: Path, factors: Factors, deploy: str = "reordered") -> None:
    """Every rank of a nested adapter."""
    for rank in RANKS if deploy == "paper" else range(1, R + 1):
        own = oracle.scale(SCALING, SCALE, R, rank) / SCALE if deploy == "paper" else 1.0
        same({name: own * delta for name, delta in prefix(folder, rank).items()}, wanted(factors, rank, deploy))
    assert json.loads((folder / "nesting.json").read_text())["reordered"] == (None if deploy == "paper" else "svd")


# Out of memory


def frozen(adapter: NestedAdapter, out: Path) -> Path:
    adapter.model.requires_grad_(False)
    adapter.model.save_pretrained(out)
    return out


def peft_save(adapter: NestedAdapter, out: Path) -> Path:
    adapter.model.save_pretrained(out)
    return out


def selected(adapter: NestedAdapter, out: Path) -> Path:
    adapter.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.model.save_pretrained(out, selected_adapters=["default"])
    assert not (out / "other").exists()
    return out


def of_a_state_dict(adapter: NestedAdapter, out: Path) -> Path:
    """As a Trainer saves."""
    adapter.model.save_pretrained(out, state_dict=adapter.model.state_dict())
    return out


def of_a_copy(adapter: NestedAdapter, out: Path) -> Path:
    copied = copy.deepcopy(adapter.model)
    copied.save_pretrained(out / "peft")
    check_folder(out / "peft", in_memory(adapter), adapter.state.deploy)
    NestedAdapter(copied).save(out / "ours")
    return out / "ours"


def of_a_pickle(adapter: NestedAdapter, out: Path) -> Path:
    pickle.loads(pickle.dumps(adapter.model)).save_pretrained(out)
    return out


def saved(adapter: NestedAdapter, out: Path) -> Path:
    adapter.save(out)
    return out


def in_eval_mode(adapter: NestedAdapter, out: Path) -> Path:
    adapter.model.eval()
    adapter.set_rank(2)
    return saved(adapter, out)


def loaded_again(adapter: NestedAdapter, out: Path) -> Path:
    """As training would go on from a checkpoint, which is saved before the next step."""
    adapter.model.save_pretrained(out / "checkpoint")
    model: Any = copy.deepcopy(adapter.model)
    again = load(model.unload(), out / "checkpoint", trainable=True)
    return saved(again, out / "again")


def into_another(adapter: NestedAdapter, out: Path) -> Path:
    """As a Trainer takes its best checkpoint."""
    adapter.model.save_pretrained(out / "checkpoint")
    other = NestedAdapter(copy.deepcopy(adapter.model))
    randomize(other.model, seed=9)
    other.model.load_adapter(str(out / "checkpoint"), "default", is_trainable=True)
    return peft_save(other, out / "again")


WAYS: dict[str, Callable[[NestedAdapter, Path], Path]] = {
    "save": saved,
    "save in eval mode": in_eval_mode,
    "PEFT's save": peft_save,
    "PEFT's save of what is frozen": frozen,
    "PEFT's save of one of two": selected,
    "PEFT's save of a state dict": of_a_state_dict,
    "a copy": of_a_copy,
    "a pickle": of_a_pickle,
    "load, then save": loaded_again,
    "load into another, then save": into_another,
}


@pytest.mark.filterwarnings("ignore:adapter 'default' was not reordered after training")
@pytest.mark.parametrize("deploy", ["reordered", "paper"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_of_an_adapter_in_memory(base: Path, tmp_path: Path, way: str, deploy: str) -> None:
    adapter = trained_adapter(base, deploy)
    factors = in_memory(adapter)
    check_folder(WAYS[way](adapter, tmp_path / "out"), factors, deploy)
    same(wanted(in_memory(adapter), R, "paper"), wanted(factors, R, "paper"))  # memory goes on as it is trained
    assert not adapter.reordered


@pytest.mark.parametrize("deploy", ["reordered", "paper"])
def test_an_adapter_of_another_name(base: Path, tmp_path: Path, deploy: str) -> None:
    adapter = trained_adapter(base, deploy, "mine")
    adapter.model.save_pretrained(tmp_path)
    check_folder(tmp_path / "mine", in_memory(adapter), deploy)


@pytest.mark.filterwarnings("ignore:adapter 'default' was not reordered after training")
@pytest.mark.parametrize("deploy", ["reordered", "paper"])
def test_what_is_exported_of_an_adapter_in_memory(base: Path, tmp_path: Path, deploy: str) -> None:
    adapter = trained_adapter(base, deploy)
    for rank in RANKS:
        adapter.export(tmp_path / str(rank), rank)
        same(prefix(tmp_path / str(rank), rank), wanted(in_memory(adapter), rank, deploy))


def test_who_saves_what_is_still_trained_is_told(base: Path, tmp_path: Path) -> None:
    """Not in training, at each checkpoint; and not where the paper's deployment was said."""
    adapter = trained_adapter(base)
    for write in (saved, frozen, lambda adapter, out: adapter.export(out, 2)):
        with pytest.warns(UserWarning, match="was not reordered after training: what is written is reordered by SVD"):
            write(adapter, tmp_path / write.__name__)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "adapter .* was not reordered after training")
        peft_save(trained_adapter(base), tmp_path / "checkpoint")
        for number, write in enumerate((saved, frozen, lambda adapter, out: adapter.export(out, 2))):
            write(trained_adapter(base, "paper"), tmp_path / f"paper-{number}")


# Out of files


def checkpoint(base: Path, out: Path) -> tuple[Factors, str]:
    adapter = trained_adapter(base)
    peft_save(adapter, out)
    assert (out / TRAINED).exists()
    return in_memory(adapter), "reordered"


def paper(base: Path, out: Path) -> tuple[Factors, str]:
    adapter = trained_adapter(base, "paper")
    saved(adapter, out)
    assert not (out / TRAINED).exists()
    return in_memory(adapter), "paper"


def of_version_1(base: Path, out: Path, inference: str, form: str) -> tuple[Factors, str]:
    """As version 0.1 has written it; folded is with P in B."""
    adapter = trained_adapter(base)
    factors = in_memory(adapter)
    peft_save(adapter, out)
    tensors = load_file(out / TRAINED)
    (out / TRAINED).unlink()
    (out / "spectra.safetensors").unlink()
    if form == "folded":
        share = oracle.trained_p(RANKS, SCALING, SCALE) / SCALE
        tensors = {key: tensor * share.float() if "lora_B" in key else tensor for key, tensor in tensors.items()}
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    nesting = {"ranks": RANKS, "scaling": SCALING, "alpha": SCALE * R}
    sidecar = {"format_version": 1, "nesting": nesting, "rule": "matryoshka", "inference": inference, "seed": 0}
    (out / "nesting.json").write_text(json.dumps({**sidecar, "form": form, "trained_ranks": RANKS}))
    return factors, "paper" if inference == "prefix" else "reordered"


def stranger(base: Path, out: Path) -> tuple[Factors, str]:
    """Plain PEFT's, whose function has no P in it."""
    adapter = trained_adapter(base)
    A_B = in_memory(adapter)
    config = LoraConfig(r=R, lora_alpha=SCALE * R, target_modules=TARGETS)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomize(model)
    model.save_pretrained(out)
    same(prefix(out, R), wanted(A_B, R, "paper"))
    share = oracle.trained_p(RANKS, SCALING, SCALE) / SCALE
    return {name: (A, B / share) for name, (A, B) in A_B.items()}, "reordered"


SOURCES: dict[str, Callable[[Path, Path], tuple[Factors, str]]] = {
    "checkpoint": checkpoint,
    "paper": paper,
    "version 0.1, P kept": lambda base, out: of_version_1(base, out, "keep", "raw"),
    "version 0.1, P folded in": lambda base, out: of_version_1(base, out, "keep", "folded"),
    "version 0.1, P dropped": lambda base, out: of_version_1(base, out, "prefix", "raw"),
    "stranger": stranger,
}


@pytest.mark.filterwarnings("ignore:.* was not reordered after training")
@pytest.mark.parametrize("source", SOURCES)
def test_what_is_made_of_files(base: Path, tmp_path: Path, source: str) -> None:
    folder = tmp_path / "source"
    factors, deploy = SOURCES[source](base, folder)
    some: dict[str, Any] = {"model": str(base), "verify": False}
    for rank in RANKS:
        expected = wanted(factors, rank, deploy)
        export(folder, tmp_path / "peft", rank, overwrite=True, **some)
        same(prefix(tmp_path / "peft", rank), expected)
        export(folder, tmp_path / "merged", rank, "merged", overwrite=True, **some)
        same(merged_updates(base, tmp_path / "merged"), expected)
        export(folder, tmp_path / "rank.gguf", rank, "gguf", overwrite=True, **some)
        same(gguf_updates(tmp_path / "rank.gguf"), expected)
    export(folder, tmp_path / "ladder", format="ladder", **some)
    for rank in RANKS:
        same(prefix(tmp_path / "ladder" / f"rank-{rank}", rank), wanted(factors, rank, deploy))
    reorder(folder, tmp_path / "nested")
    check_folder(tmp_path / "nested", factors)
    if deploy == "reordered":  # the paper's has no such formats
        export(folder, tmp_path / "directions", format="directions")
        check_folder(tmp_path / "directions", factors)
        made = export(folder, tmp_path / "budget", budget=0.5, **some)
        assert isinstance(made.ranks, dict)
        found = prefix(tmp_path / "budget", R)
        for rank in set(made.ranks.values()) - {0}:
            names = [name for name, own in made.ranks.items() if own == rank]
            torch.testing.assert_close(
                [found[name] for name in names], [wanted(factors, rank)[name] for name in names], rtol=0, atol=1e-4
            )
    if source != "stranger":
        adapter = load(AutoModelForCausalLM.from_pretrained(base), folder)
        check_folder(saved(adapter, tmp_path / "saved"), factors, deploy)
        adapter.export(tmp_path / "exported", 2)
        same(prefix(tmp_path / "exported", 2), wanted(factors, 2, deploy))


def merged_updates(base: Path, folder: Path) -> dict[str, Tensor]:
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    return {
        key.removesuffix(".weight"): after[key].double() - before[key].double()
        for key in before
        if any(f"{target}.weight" in key for target in TARGETS)
    }


def gguf_updates(file: Path) -> dict[str, Tensor]:
    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: torch.tensor(np.array(tensor.data)).double() for tensor in reader.tensors}
    places = {"attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj"}
    found = {}
    for name, A in tensors.items():
        if name.endswith(".lora_a"):
            _, number, place, *_ = name.split(".")
            B = tensors[name.removesuffix("a") + "b"]
            found[f"model.layers.{number}.{places[place]}"] = B @ A * alpha / len(A)
    return found


# Out of training


def test_what_a_trainer_leaves(base: Path, tmp_path: Path) -> None:
    adapter = trained_adapter(base)
    rows = [{"input_ids": [5, 6, 7, 8 + n], "labels": [5, 6, 7, 8 + n]} for n in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, save_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    trainer = Trainer(
        model=adapter.model, args=arguments, train_dataset=Dataset.from_list(rows), callbacks=[adapter.callback()]
    )
    before = in_memory(adapter)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    after = in_memory(adapter)
    assert not any(torch.allclose(before[name][0], after[name][0]) for name in after)
    for folder in ("saved", "run/checkpoint-2"):
        check_folder(tmp_path / folder, after)
    first = pairs(load_file(tmp_path / "run" / "checkpoint-1" / TRAINED))
    check_folder(tmp_path / "run" / "checkpoint-1", first)
    assert all(
        f.equal(g) for f, g in zip(*(sum(each.values(), ()) for each in (after, in_memory(adapter))), strict=True)
    )


@pytest.mark.parametrize("nesting", [{"reorder": "svd"}, {"reorder": "learned"}, {"deploy": "paper"}], ids=str)
def test_what_train_leaves(base: Path, tmp_path: Path, nesting: dict[str, Any]) -> None:
    rows = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        **{"model": str(base), "dtype": "fp32", "data": {"path": str(tmp_path / "rows.jsonl")}},
        **{"output_dir": str(tmp_path / "run"), "max_steps": 2, "save_steps": 1, "learning_rate": 1e-2},
        "lora": {"r": R, "lora_alpha": SCALE * R, "target_modules": TARGETS},
        "nesting": {"ranks": RANKS, "scaling": SCALING, **nesting},
        "disable_tqdm": True,
    }
    train(make_config(given))
    last = tmp_path / "run" / "checkpoint-2"
    deploy = nesting.get("deploy", "reordered")
    trained = pairs(load_file(last / (WEIGHTS if deploy == "paper" else TRAINED)))
    check_folder(last, trained, deploy)
    if nesting.get("reorder") == "learned":  # another order of the same function
        same(prefix(tmp_path / "run", R), wanted(trained, R))
        assert json.loads((tmp_path / "run" / "nesting.json").read_text())["reordered"] == "learned"
    else:
        check_folder(tmp_path / "run", trained, deploy)
    shutil.rmtree(last)
