"""PEFT's folders: each rank is the best one, plain PEFT reads it, and nothing else is touched."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import nested_llama, tiny_llama, tiny_mixtral
from interrupted import killed
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strangers import Mixed, best, by_peft, distance, logits, plain_adapter, updates
from torch._subclasses.fake_tensor import FakeTensorMode

from matryoshka_lora import MatryoshkaError, Nesting, export, reorder
from matryoshka_lora.files.output import new_file, new_folder
from matryoshka_lora.files.peft import WEIGHTS_NAME, open_adapter, write_nested, write_rank
from matryoshka_lora.files.tensors import Stored

R = 8
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (tiny_llama, {"lora_alpha": 20}),
    "rslora": (tiny_llama, {"use_rslora": True, "lora_alpha": 3}),
    "a pattern of targets": (tiny_llama, {"target_modules": r".*\.(q_proj|down_proj)"}),
    "ranks by layer": (
        tiny_llama,
        {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"v_proj": 2}},
    ),
    "experts": (tiny_mixtral, EXPERTS),
    "embedding and convolution": (Mixed, {"target_modules": ["embedding", "convolution", "head"]}),
    "saved modules": (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[], Any]]:
    """An adapter that PEFT has written, and its base model."""
    base, options = KINDS[request.param]
    plain_adapter(tmp_path / "plain", base(), **{"r": R, **options})
    return tmp_path / "plain", base


def test_plain_peft_reads_each_rank_as_numpys_best(
    kind: tuple[Path, Callable[[], Any]], tmp_path: Path
) -> None:
    """From the plain folder, and from the nested one, which at R computes the same."""
    source, base = kind
    given = updates(source, base)
    reorder(source, tmp_path / "nested")
    assert distance(by_peft(tmp_path / "nested", base), by_peft(source, base)) < 1e-5
    assert open_adapter(tmp_path / "nested").order == "svd"
    wishes: list[dict[str, Any]] = [{"rank": 1}, {"rank": 3}, {"rank": R}]
    if base != tiny_mixtral:  # experts have one rank
        wishes.append({"keep": "50%"})
    for number, wish in enumerate(wishes):
        for name in ("plain", "nested"):
            out = tmp_path / f"{name}-{number}"
            ranks: Any = export(tmp_path / name, out, **wish).ranks
            found = updates(out, base)
            assert found.keys() == given.keys()
            for key in given:
                if key == "lm_head.weight":  # saved whole
                    np.testing.assert_array_equal(found[key], given[key])
                    continue
                rank = wish.get("rank") or ranks[key.removesuffix(".weight")]
                wanted = best(given[key], rank)
                assert np.abs(found[key] - wanted).max() < 1e-5 * np.abs(given[key]).max(), key


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_layer_of_a_small_rank_keeps_its_bias(tmp_path: Path, bias: str) -> None:
    def base() -> Any:
        return tiny_llama(attention_bias=True)

    model = plain_adapter(tmp_path / "x", base(), target_modules=["q_proj", "o_proj"], bias=bias)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        if "layers.0.self_attn.q_proj.lora_B" in name:
            parameter.data *= 1e-3  # next to nothing, so that a small size leaves it out
    model.save_pretrained(tmp_path / "plain")
    small = (tmp_path / "plain" / WEIGHTS_NAME).stat().st_size // 2
    made: Any = export(tmp_path / "plain", tmp_path / "small", max_bytes=small)
    assert made.ranks["model.layers.0.self_attn.q_proj"] == 1 < max(made.ranks.values())
    assert made.after <= small
    wanted, saved = base(), load_file(tmp_path / "plain" / WEIGHTS_NAME)
    state = wanted.state_dict()
    for name, update in updates(tmp_path / "plain", base).items():
        rank = made.ranks[name.removesuffix(".weight")]
        state[name] += torch.from_numpy(best(update, rank)).float()
    for key, tensor in saved.items():
        if key.endswith("bias"):
            state[key.removeprefix("base_model.model.").replace(".base_layer", "")] = tensor
    wanted.load_state_dict(state)
    found = by_peft(tmp_path / "small", base)
    torch.testing.assert_close(found, logits(wanted), atol=1e-5, rtol=1e-5)
    assert (found - by_peft(tmp_path / "plain", base)).abs().max() > 0.01


def edited(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    next(iter(tensors.values()))[0, 0] += 1e-3
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        save_file(tensors, folder / WEIGHTS_NAME, file.metadata())


def saved_by_peft(folder: Path) -> None:
    PeftModel.from_pretrained(tiny_llama(), folder).save_pretrained(folder)


def damaged(folder: Path) -> None:
    note = {"matryoshka_lora": '{"ranks": 4}'}
    save_file(load_file(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME, note)


@pytest.mark.parametrize("change", [edited, saved_by_peft, damaged])
def test_an_order_ends_with_its_factors(tmp_path: Path, change: Callable[[Path], None]) -> None:
    plain_adapter(tmp_path / "plain")
    reorder(tmp_path / "plain", tmp_path / "nested")
    assert open_adapter(tmp_path / "nested").order == "svd"
    change(tmp_path / "nested")
    opened = open_adapter(tmp_path / "nested")
    assert (opened.nesting, opened.order) == (None, None)
    given = updates(tmp_path / "nested")
    export(tmp_path / "nested", tmp_path / "out", 2)
    for name, update in updates(tmp_path / "out").items():
        assert np.abs(update - best(given[name], 2)).max() < 1e-5 * np.abs(update).max()


@pytest.mark.parametrize("scaling", ["none", "rank", "sqrt"])
def test_the_papers_deployment_has_its_nested_ranks_and_their_scales(
    tmp_path: Path, scaling: Any
) -> None:
    nesting = Nesting((1, 2, R), scaling, 0.5)
    adapter = nested_llama(nesting, deploy="paper")
    adapter.save(tmp_path / "nested")
    opened = open_adapter(tmp_path / "nested")
    assert (opened.order, opened.nesting) == ("paper", nesting)
    factors = adapter.factors()
    for rank in (1, 2, R):
        made = export(tmp_path / "nested", tmp_path / f"rank-{rank}", rank)
        lost = whole = 0.0
        for name, update in updates(tmp_path / f"rank-{rank}").items():
            A, B = (factor.double() for factor in factors[name.removesuffix(".weight")])
            wanted = nesting.scale_at(rank) * B[:, :rank] @ A[:rank]
            np.testing.assert_allclose(update, wanted, atol=1e-5)
            lost += float((nesting.scale * B @ A - wanted).square().sum())
            whole += float((nesting.scale * B @ A).square().sum())
        assert made.error == pytest.approx((lost / whole) ** 0.5, rel=1e-6, abs=1e-9)
    with pytest.raises(MatryoshkaError, match="has no rank 3: choose one of 1, 2, 8"):
        export(tmp_path / "nested", tmp_path / "out", 3)
    with pytest.raises(MatryoshkaError, match="singular values do not say"):
        export(tmp_path / "nested", tmp_path / "out", keep="90%")


def test_an_adapter_in_memory_is_written_as_the_one_on_the_disk(tmp_path: Path) -> None:
    adapter = nested_llama(Nesting((1, 2, R), scale=2.0), rule="matryoshka")
    adapter.save(tmp_path / "nested")
    adapter.model.save_pretrained(tmp_path / "plain")  # PEFT's own code, with P folded into B
    write_nested(open_adapter(tmp_path / "plain"), tmp_path / "again")
    for rank in (1, 5):
        adapter.export(tmp_path / f"memory-{rank}", rank)
        for source in ("nested", "plain", "again"):
            write_rank(open_adapter(tmp_path / source), tmp_path / f"{source}-{rank}", rank)
            found = updates(tmp_path / f"{source}-{rank}")
            for name, update in updates(tmp_path / f"memory-{rank}").items():
                np.testing.assert_allclose(found[name], update, atol=1e-4)


PRIVATE = "/home/somebody/secret-project"


@pytest.mark.parametrize("base", [f"{PRIVATE}/my-base", "org/name", "smollm2-135m"])
def test_the_card_names_the_base_model_and_no_path(tmp_path: Path, base: str) -> None:
    model = plain_adapter(tmp_path / "plain")
    model.peft_config["default"].base_model_name_or_path = base
    model.peft_config["default"].task_type = PRIVATE  # a field that no card shows
    model.save_pretrained(tmp_path / "plain")
    reorder(tmp_path / "plain", tmp_path / "nested")
    export(tmp_path / "nested", tmp_path / "rank", 4)
    for name in ("nested", "rank"):
        card = (tmp_path / name / "README.md").read_text()
        shown = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}.get(base, base)
        assert f" for {Path(shown).name if shown.startswith('/') else shown}\n" in card
        assert ("base_model: " in card) == (not base.startswith("/"))
        assert PRIVATE not in card
        assert str(tmp_path) not in card
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base  # PEFT and vLLM read it
        with safe_open(tmp_path / name / WEIGHTS_NAME, "pt") as file:
            assert str(tmp_path) not in json.dumps(file.metadata())


def test_what_somebody_else_wrote_is_never_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_adapter(tmp_path / "lora")
    (tmp_path / "lora" / WEIGHTS_NAME).rename(tmp_path / "blob")  # as the hub's cache has it
    (tmp_path / "lora" / WEIGHTS_NAME).symlink_to(tmp_path / "blob")
    work = tmp_path / "work"
    work.mkdir()
    for name in ("examples.jsonl", "tokenizer.json", "vocab.txt", "merges.txt", "report.html"):
        (work / name).write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.chdir(work)
    for force in (False, True):
        for target in (".", "..", "../lora", tmp_path, "../work", "../lora/"):
            with pytest.raises(MatryoshkaError, match="name another place"):
                export("../lora", target, 4, force=force)
    monkeypatch.chdir(tmp_path)
    for target in ("work", "work/vocab.txt"):
        with pytest.raises(MatryoshkaError, match=r"exists already.*--force"):
            export("lora", target, 4)
    with pytest.raises(MatryoshkaError, match="name another place"):
        export("lora", "", 4)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_forced_folder_is_replaced_whole_and_a_failure_leaves_the_old_one(tmp_path: Path) -> None:
    place = tmp_path / "a" / "out"
    with new_folder(place) as folder:
        (folder / "old").write_text("old")

    def fail(error: Exception) -> None:
        with new_folder(place, force=True) as folder:
            (folder / "new").write_text("new")
            raise error

    with pytest.raises(KeyError):
        fail(KeyError())
    with pytest.raises(MatryoshkaError, match=r"cannot write.*No space"):
        fail(OSError(28, os.strerror(28)))
    assert [file.name for file in place.iterdir()] == ["old"]
    with new_folder(place, force=True) as folder:
        (folder / "new").write_text("new")
    assert [file.name for file in place.iterdir()] == ["new"]
    assert [file.name for file in place.parent.iterdir()] == ["out"]


def test_a_place_that_is_taken_meanwhile_and_the_end_of_a_link_stay(tmp_path: Path) -> None:

    def overtaken() -> None:
        with new_file(tmp_path / "x") as file:
            file.write_text("ours")
            (tmp_path / "x").write_text("theirs")

    with pytest.raises(MatryoshkaError, match="exists already"):
        overtaken()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x", "theirs")]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis").write_text("mine")
    (tmp_path / "out").symlink_to(tmp_path / "theirs")
    with new_folder(tmp_path / "out", force=True) as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "theirs" / "thesis").read_text() == "mine"
    assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("ending", ["", ".safetensors"])
def test_a_kill_leaves_the_old_adapter_or_the_new_one(
    tmp_path: Path, ending: str, force: bool
) -> None:
    """At every operation on the disk."""
    plain_adapter(tmp_path / "plain")
    pair = {"a.lora_down.weight": torch.randn(4, 6), "a.lora_up.weight": torch.randn(5, 4)}
    save_file(pair, tmp_path / "plain.safetensors")
    source, place = tmp_path / f"plain{ending}", tmp_path / "there" / f"out{ending}"
    for number in itertools.count(1):
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.mkdir()
        if force:
            export(source, place, 4)
        if not killed(lambda: export(source, place, 2, force=force), place.parent, number):
            break
        if place.exists():
            assert open_adapter(place).max_rank in ((2, 4) if force else (2,))
        elif force:  # between the two renames both are whole beside the place
            assert not ending
            assert sorted(open_adapter(x).max_rank for x in place.parent.iterdir()) == [2, 4]
    assert number > 2
    assert open_adapter(place).max_rank == 2


MEMORY = """
import resource, sys
from matryoshka_lora import export
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
export(sys.argv[1], sys.argv[2] + "/rank", 1)
export(sys.argv[1], sys.argv[2] + "/keep", keep="50%")
print(peak() - before)
"""


def test_a_tensor_on_a_gpu_is_read_onto_the_cpu() -> None:
    with FakeTensorMode():  # of torch: a device that this machine may lack
        assert Stored.of(torch.empty(2, 3, device="cuda")).read().device.type == "cpu"


@pytest.mark.slow
def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Of 120 layers with 0.5 MB each, less than half is needed, work space included."""
    config, tensors = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q"]}, {}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "adapter_config.json").write_text(json.dumps(config))
    for number in range(120):
        tensors[f"base_model.model.{number}.q.lora_A.weight"] = torch.randn(16, 4096)
        tensors[f"base_model.model.{number}.q.lora_B.weight"] = torch.randn(4096, 16)
    save_file(tensors, tmp_path / "plain" / WEIGHTS_NAME)
    size = (tmp_path / "plain" / WEIGHTS_NAME).stat().st_size
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "plain"), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < size / 2


def test_a_file_of_ours_is_aligned_and_reads_as_safetensors_writes_it(tmp_path: Path) -> None:
    """Readers that map a file into memory need each tensor at a multiple of its own width."""
    plain_adapter(tmp_path / "plain", target_modules=["q_proj"])
    tensors = load_file(tmp_path / "plain" / WEIGHTS_NAME)
    for key in [key for key in tensors if "layers.0" in key]:
        tensors[key] = tensors[key].bfloat16()
    save_file(tensors, tmp_path / "plain" / WEIGHTS_NAME)
    export(tmp_path / "plain", tmp_path / "out", 3)
    found = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert {key: found[key].dtype for key in found} == {key: x.dtype for key, x in tensors.items()}
    data = (tmp_path / "out" / WEIGHTS_NAME).read_bytes()
    length = int.from_bytes(data[:8], "little")
    for key, entry in json.loads(data[8 : 8 + length]).items():
        assert key == "__metadata__" or entry["data_offsets"][0] % found[key].element_size() == 0
