"""What is saved, exported or checkpointed is an ordinary LoRA adapter to PEFT in a process that has not our package."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lora_config, nest_as, nested_llama, randomize, tiny_llama
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from matryoshka_lora import NestedAdapter, Nesting, export, load
from matryoshka_lora.state import Deploy

READER = Path(__file__).with_name("plain_peft_reader.py")
NEW_TOKENS = 8

# R = 6 with "sqrt": the scale is no power of two, so one rounding more or less would be seen.
NESTINGS = {
    "none": Nesting([1, 2, 4, 8]),
    "sqrt": Nesting([1, 3, 6], scaling="sqrt", scale=1.7 / math.sqrt(6)),
    "rank": Nesting([2, 3, 5], scaling="rank", scale=0.6),
}
# What is saved, and the nesting. "trained" is reordered on the way to the file, "reordered" was reordered in memory.
ADAPTERS = {
    "paper-none": ("paper", "none"),
    "paper-sqrt": ("paper", "sqrt"),
    "trained-none": ("trained", "none"),
    "trained-rank": ("trained", "rank"),
    "trained-sqrt": ("trained", "sqrt"),
    "reordered-none": ("reordered", "none"),
    "reordered-sqrt": ("reordered", "sqrt"),
}
CHECKPOINTS: dict[str, Deploy] = {"checkpoint-paper": "paper", "checkpoint-trained": "reordered"}


@dataclass
class Answers:
    """What a process made of adapter directories, by ``DTYPE/NAME``; slices are named ``NAME@RANK``."""

    logits: dict[str, Tensor]
    text: dict[str, Tensor]

    def add(self, key: str, model: Any, ids: Tensor) -> None:
        with torch.no_grad():
            self.logits[key] = model(input_ids=ids).logits
            generated = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        self.text[key] = generated[:, ids.shape[1] :]


@dataclass
class Reading:
    """The same files in two processes.

    Attributes:
        folder: Where they lie.
        ids: The input.
        memory: This process, with the nested adapters before they were saved.
        nested: This process, with the nested adapters as `load` gives them.
        plain: The second process, with PEFT alone.
        warnings: What PEFT said there.
    """

    folder: Path
    ids: Tensor
    memory: Answers
    nested: Answers
    plain: Answers
    warnings: dict[str, list[str]]

    def slices(self, name: str, dtype: str = "float32") -> list[str]:
        found = [key for key in self.plain.logits if key.startswith(f"{dtype}/{name}@")]
        assert found
        return found


def write_all(adapter: NestedAdapter, folder: Path, name: str, ranks: Sequence[int]) -> list[str]:
    """Save an adapter and export some of its ranks: the even ones from memory, the odd ones from the file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was not reordered after training")
        return _write_all(adapter, folder, name, ranks)


def _write_all(adapter: NestedAdapter, folder: Path, name: str, ranks: Sequence[int]) -> list[str]:
    adapter.save(folder / name)
    names = [name]
    for rank in ranks:
        names.append(f"{name}@{rank}")
        if rank % 2:
            export(folder / name, folder / names[-1], rank)
        else:
            adapter.export(folder / names[-1], rank)
    return names


def read_in_second_process(
    folder: Path, base: Any, dtypes: Sequence[str], ids: Tensor, names: Sequence[str]
) -> tuple[Answers, dict[str, list[str]]]:
    base.save_pretrained(folder / "base")
    save_file({"input_ids": ids}, folder / "input_ids.safetensors")
    job = {
        "base": str(folder / "base"),
        "dtypes": dtypes,
        "input_ids": str(folder / "input_ids.safetensors"),
        "adapters": {name: str(folder / name) for name in names},
        "new_tokens": NEW_TOKENS,
        "out": str(folder),
    }
    (folder / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(READER), str(folder / "job.json")], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    answers: dict[str, dict[str, Tensor]] = {"logits": {}, "text": {}}
    for key, tensor in load_file(folder / "answers.safetensors").items():
        name, _, what = key.rpartition("/")
        answers[what][name] = tensor
    return Answers(**answers), json.loads((folder / "warnings.json").read_text())


def read_memory(adapter: NestedAdapter, names: Sequence[str], ids: Tensor, answers: Answers) -> None:
    for name in names:
        _, _, rank = name.partition("@")
        adapter.set_rank(int(rank) if rank else adapter.nesting.max_rank)
        answers.add(f"float32/{name}", adapter.model, ids)


def read_nested(folder: Path, bases: Mapping[str, Any], ids: Tensor, names: Sequence[str]) -> Answers:
    answers = Answers({}, {})
    for dtype, base in bases.items():
        adapters: dict[str, NestedAdapter] = {}
        for name in names:
            source, _, rank = name.partition("@")
            if source not in adapters:
                adapters[source] = load(copy.deepcopy(base), folder / source)
            adapter = adapters[source]
            adapter.set_rank(int(rank) if rank else adapter.nesting.max_rank)
            answers.add(f"{dtype}/{name}", adapter.model, ids)
    return answers


def write_checkpoint(folder: Path, name: str, deploy: Deploy, ids: Tensor) -> None:
    """Train two steps under the Trainer, and keep the checkpoint that it wrote."""
    from transformers import Trainer, TrainingArguments

    adapter = nested_llama(NESTINGS["sqrt"], deploy=deploy, task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        str(folder / "training" / name),
        max_steps=2,
        save_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(adapter.model, arguments, train_dataset=rows, callbacks=[adapter.callback()]).train()
    (folder / "training" / name / "checkpoint-2").rename(folder / name)
    adapter.model.eval()
    save_file(trained_factors(adapter), folder / name / "expected.safetensors")


def trained_factors(adapter: NestedAdapter) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in adapter.model.named_parameters() if "lora_" in name}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Reading:
    folder = tmp_path_factory.mktemp("tiny")
    ids = torch.arange(3, 27).reshape(2, 12)
    names, memory = [], Answers({}, {})
    for seed, (name, (how, nesting)) in enumerate(ADAPTERS.items()):
        deploy: Deploy = "paper" if how == "paper" else "reordered"
        adapter = nested_llama(NESTINGS[nesting], deploy=deploy, task_type="CAUSAL_LM")
        randomize(adapter.model, seed, size=0.2)
        if how == "reordered":
            adapter.reorder()
        # What is reordered on the way has every rank, of which memory knows the largest.
        ranks = range(1, adapter.nesting.max_rank + 1) if how == "trained" else adapter.ranks
        written = write_all(adapter, folder, name, ranks)
        read_memory(adapter, [name] if how == "trained" else written, ids, memory)
        names += written
    for name, deploy in CHECKPOINTS.items():
        write_checkpoint(folder, name, deploy, ids)
        export(folder / name, folder / f"{name}@3", 3)
        names += [name, f"{name}@3"]
    bases = {"float32": tiny_llama(), "float64": tiny_llama().double()}
    plain, said = read_in_second_process(folder, bases["float32"], list(bases), ids, names)
    return Reading(folder, ids, memory, read_nested(folder, bases, ids, names), plain, said)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_saved_adapter_is_the_full_rank_adapter_to_the_last_bit(tiny: Reading, name: str, dtype: str) -> None:
    key = f"{dtype}/{name}"
    assert torch.equal(tiny.plain.logits[key], tiny.nested.logits[key])
    assert torch.equal(tiny.plain.text[key], tiny.nested.text[key])


@pytest.mark.parametrize("name", ADAPTERS)
def test_saving_changed_nothing_that_the_adapter_computes(tiny: Reading, name: str) -> None:
    before, after = tiny.memory.logits[f"float32/{name}"], tiny.nested.logits[f"float32/{name}"]
    if name.startswith("trained"):  # the SVD rounds
        assert distance(after, before) < 1e-5
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("name", [*ADAPTERS, *CHECKPOINTS])
def test_every_slice_answers_as_the_nested_adapter_at_that_rank(tiny: Reading, name: str) -> None:
    for key in tiny.slices(name, "float64"):
        assert (tiny.plain.logits[key] - tiny.nested.logits[key]).abs().max() <= 1e-6
        assert torch.equal(tiny.plain.text[key], tiny.nested.text[key])
    for key in tiny.slices(name):
        # The model's own rounding is of this size: a sum of r terms has another order than of R.
        assert distance(tiny.plain.logits[key], tiny.nested.logits[key]) < 1e-5
        assert torch.equal(tiny.plain.text[key], tiny.nested.text[key])
        if key in tiny.memory.logits:
            assert distance(tiny.plain.logits[key], tiny.memory.logits[key]) < 1e-5


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_slice_of_the_largest_rank_is_the_saved_adapter(tiny: Reading, name: str) -> None:
    largest = f"float32/{name}@{NESTINGS[ADAPTERS[name][1]].max_rank}"
    assert torch.equal(tiny.plain.logits[largest], tiny.plain.logits[f"float32/{name}"])


def test_a_reordered_adapter_has_a_slice_of_every_rank(tiny: Reading) -> None:
    assert len(tiny.slices("reordered-sqrt")) == 6
    assert len(tiny.slices("paper-sqrt")) == 3


def test_the_comparison_can_fail(tiny: Reading) -> None:
    """Ranks, forms and scalings differ by far more than the tolerances above, in logits and in text."""
    smallest = [f"{name}@{NESTINGS[nesting].ranks[0]}" for name, (_, nesting) in ADAPTERS.items()]
    keys = [f"float32/{name}" for name in (*ADAPTERS, *smallest, "base")]
    distances = [
        distance(tiny.plain.logits[a], tiny.plain.logits[b]) for i, a in enumerate(keys) for b in keys[i + 1 :]
    ]
    assert min(distances) > 1e-2
    texts = {tuple(tiny.plain.text[key].flatten().tolist()) for key in keys}
    assert len(texts) == len(keys)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_training_checkpoint_is_readable(tiny: Reading, name: str) -> None:
    """To plain PEFT, it is what is deployed: of the paper's, rank R without P; of the other, what is trained."""
    key = f"float32/{name}"
    assert torch.equal(tiny.plain.logits[key], tiny.nested.logits[key])
    deployed, trained = (load(tiny_llama(), tiny.folder / name, trainable=trainable) for trainable in (False, True))
    assert deployed.reordered == (CHECKPOINTS[name] == "reordered")
    assert not trained.reordered
    # Training goes on from the very factors, with P between them, and the file that is deployed is their function.
    expected = load_file(tiny.folder / name / "expected.safetensors")
    found = trained_factors(trained)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with torch.no_grad():
        training = trained.model(input_ids=tiny.ids).logits
    assert (distance(tiny.plain.logits[key], training) < 1e-5) == (CHECKPOINTS[name] == "reordered")


def complaints(said: Sequence[str]) -> list[str]:
    """PEFT's warnings, without those by which one library tells another that a name will change."""
    return [line for line in said if not line.startswith(("FutureWarning", "DeprecationWarning"))]


def test_peft_has_nothing_to_complain_about(tiny: Reading) -> None:
    assert set(tiny.warnings) == set(tiny.plain.logits)
    assert {key: said for key, said in tiny.warnings.items() if complaints(said)} == {}


@pytest.mark.slow
def test_smollm2_in_bf16_reads_the_same_in_both_processes(tmp_path: Path) -> None:
    from matryoshka_lora.models import load_model

    whole = load_model("smollm2-135m", dtype=torch.bfloat16)
    whole.model.layers, whole.config.num_hidden_layers = whole.model.layers[:8], 8
    whole.save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    nesting = NESTINGS["sqrt"]
    ids = torch.randint(1000, 20000, (2, 16), generator=torch.Generator().manual_seed(0))
    config = lora_config(nesting, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    names = []
    for name, deploy in (("paper", "paper"), ("trained", "reordered")):
        peft_model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
        randomize(peft_model, size=0.04)
        adapter = nest_as(peft_model.eval(), nesting, deploy=deploy)
        names += write_all(adapter, tmp_path, name, [1, 3])
    adapter.reorder()
    names += write_all(adapter, tmp_path, "reordered", [2, 5])
    plain, said = read_in_second_process(tmp_path, base, ["bfloat16"], ids, names)
    nested = read_nested(tmp_path, {"bfloat16": base}, ids, names)
    for name in names:
        key = f"bfloat16/{name}"
        assert plain.logits[key].dtype == torch.bfloat16
        if "@" in name:  # some roundings of bfloat16, at the size of the largest logit
            assert distance(plain.logits[key].float(), nested.logits[key].float()) < 2**-6, name
        else:
            assert torch.equal(plain.logits[key], nested.logits[key]), name
        assert torch.equal(plain.text[key], nested.text[key]), name
        assert distance(plain.logits[key].float(), plain.logits["bfloat16/base"].float()) > 2**-5, name
        assert complaints(said[key]) == [], name
