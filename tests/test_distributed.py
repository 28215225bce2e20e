"""Two processes on CPUs with gloo end as one process with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lora_config, nest_as, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from matryoshka_lora import NestedAdapter, Nesting, load
from matryoshka_lora.files.peft import open_adapter

NESTING = Nesting((1, 2, 4), "sqrt", 1.5)
HERE = Path(__file__).parent
LAUNCH = """
import os, sys
sys.path.insert(0, {here!r})
import torch
if "ACCELERATE_USE_FSDP" in os.environ:
    # accelerate offers FSDP on accelerators only, though all of it runs on CPUs.
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
if "ACCELERATE_USE_DEEPSPEED" in os.environ:
    # Else it compiles a shared-memory all-reduce for a minute.
    import deepspeed
    deepspeed.ops.__compatible_ops__ = {{}}
from test_distributed import main
main(sys.argv[1], sys.argv[2], rows=2, backend=sys.argv[3] or None)
# Without the interpreter's teardown, in which FSDP2 on CPUs was seen to abort.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_state_dict_type", "FULL_STATE_DICT"]
FSDP += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
ENGINES: dict[str, tuple[list[str], str, str]] = {
    # What the launcher gets, the backend, and a file of its checkpoints that no other way writes.
    "ddp": (["--multi_gpu"], "", "optimizer.pt"),
    "fsdp2": (FSDP, "", "pytorch_model_fsdp.bin"),
    "zero1": (["--use_deepspeed", "--zero_stage", "1"], "gloo", "latest"),
}


def build(rule: str) -> NestedAdapter:
    torch.manual_seed(4)
    model = get_peft_model(tiny_llama(), lora_config(NESTING, task_type="CAUSAL_LM"))
    return nest_as(model, NESTING, rule, seed=11)


def main(folder: str, rule: str, rows: int, backend: str | None) -> None:
    """Train four steps, and then again from the checkpoint after two; write the losses."""
    losses = []
    for name, checkpoint in (("whole", None), ("resumed", f"{folder}/whole/checkpoint-2")):
        arguments = TrainingArguments(
            f"{folder}/{name}",
            max_steps=4,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            save_steps=2,
            logging_steps=1,
            use_cpu=backend is None and "ACCELERATE_USE_FSDP" not in os.environ,
            ddp_backend=backend,
            report_to="none",
            disable_tqdm=True,
        )
        ids = torch.randint(3, 90, (20, 7), generator=torch.Generator().manual_seed(0))
        data = [{"input_ids": row, "labels": row} for row in ids]
        adapter = build(rule)
        trainer = Trainer(
            adapter.model, arguments, train_dataset=data, callbacks=[adapter.callback()]
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    if trainer.is_world_process_zero():
        Path(folder, "losses.json").write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the folder of a run of one process, by the rule."""
    done: dict[str, Path] = {}

    def run(rule: str) -> Path:
        if rule not in done:
            done[rule] = tmp_path_factory.mktemp(rule)
            main(str(done[rule]), rule, rows=4, backend=None)
        return done[rule]

    return run


def factors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key: tensors[key.replace("lora_A", "lora_B")] @ value
        for key, value in tensors.items()
        if "lora_A" in key
    }


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["stratified", "matryoshka"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(engine: str, rule: str, alone: Any, tmp_path: Path) -> None:
    if engine == "zero1":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    options, backend, mark = ENGINES[engine]
    script = tmp_path / "launched.py"
    script.write_text(LAUNCH.format(here=str(HERE)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", *options, str(script), str(tmp_path), rule, backend]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"}
    if engine == "fsdp2":
        environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    one = alone(rule)
    expected = json.loads((one / "losses.json").read_text())
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses[0] == pytest.approx(expected[0], abs=1e-4)
    # A resumed run logs the steps before it, too.
    assert losses[1][-2:] == pytest.approx(losses[0][-2:], abs=1e-4)
    assert (tmp_path / "whole/checkpoint-2" / mark).exists()
    wanted = factors(one / "whole/checkpoint-4")
    for name in ("whole", "resumed"):
        checkpoint = tmp_path / name / "checkpoint-4"
        assert open_adapter(checkpoint).nesting is None
        for key, delta in factors(checkpoint).items():
            assert (delta - wanted[key]).norm() < 1e-3 * wanted[key].norm(), key
    # It is the plain function, as the handle in a process of its own has it.
    ids = torch.arange(3, 27).reshape(2, 12)
    plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "whole/checkpoint-4")).eval()
    nested = load(tiny_llama(), tmp_path / "whole/checkpoint-4")
    adapter = build(rule)
    adapter.model.load_adapter(str(one / "whole/checkpoint-4"), "default")
    adapter.model.eval()
    with torch.no_grad():
        found = [model(ids).logits for model in (plain, nested.model, adapter.model)]
        base = tiny_llama()(ids).logits
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[0], found[2], rtol=1e-2, atol=1e-2)
    assert (found[0] - base).abs().max() > 0.05
