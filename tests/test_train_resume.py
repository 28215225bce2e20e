"""Killed with SIGKILL in mid-training and started again: the adapter is the one of a run that was never stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_chat import save_tiny_chat

from matryoshka_lora.training import load_config, train

# 22 rows in batches of 4: an epoch is 6 batches, the last of 2 rows, which make 3 optimizer steps of 2 batches. So the
# kill falls into the third epoch and the checkpoint before it into the second.
CONFIG = """
model: {model}
dtype: fp32
data: {{task: chain_sum, size: 22}}
output_dir: {output}
max_steps: 11
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
learning_rate: 1e-2
lr_scheduler_type: cosine
save_steps: 5
logging_steps: 1
disable_tqdm: true
lora: {{r: 8, lora_dropout: 0.1}}
nesting: {{rule: {rule}, reorder: learned}}
train_sampling_strategy: {sampling}
"""

# SIGKILL comes between the two batches of an optimizer step.
PROGRAM = """
import os, signal, sys
import torch
torch.set_num_threads(1)  # as conftest.py does
from matryoshka_lora.adapter.callback import NestingCallback
from matryoshka_lora.training import load_config, train

def on_substep_end(self, args, state, control, **kwargs):
    if state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)

NestingCallback.on_substep_end = on_substep_end
train(load_config(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("model"))


def write_config(folder: Path, model: Path, rule: str, sampling: str, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.format(model=model, output=folder / name, rule=rule, sampling=sampling))
    return path


# The other rule that draws, `stratified`, is killed in test_distributed.py.
@pytest.mark.parametrize(("rule", "sampling"), [("matryoshka", "random"), ("dylora", "group_by_length")])
def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, model: Path, rule: str, sampling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is killed in a process of its own, and goes on in this one."""
    whole, cut = (write_config(tmp_path, model, rule, sampling, name) for name in ("whole", "cut"))

    killed = subprocess.run([sys.executable, "-c", PROGRAM, str(cut)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-5"]
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    train(load_config(cut))
    assert f"Going on from {tmp_path / 'cut' / 'checkpoint-5'}, after 5 steps" in capsys.readouterr().out
    train(load_config(whole))

    for file in ("adapter_model.safetensors", "nesting.json", "checkpoint-11/trained.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    # Not because nothing was learnt, nor because every run ends in the same place.
    trained = (tmp_path / "whole" / "checkpoint-10" / "trained.safetensors").read_bytes()
    assert trained != (tmp_path / "whole" / "checkpoint-11" / "trained.safetensors").read_bytes()
