"""Two processes under `accelerate launch`, with the configs that are shipped, on CPUs with gloo.

The reference is one process with the same global batch. Each launch is killed in one process and started again, so
that the losses below are those of a run that was interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_second_process import complaints, distance, read_in_second_process, read_nested
from tiny_chat import save_tiny_chat
from transformers import AutoModelForCausalLM

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.formats.opened import open_adapter
from matryoshka_lora.training import load_config, train
from matryoshka_lora.training.resume import plan

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs" / "accelerate"

# An epoch is 5 batches of 8 rows, which make 3 optimizer steps: 2 batches, 2 and 1. The kill falls into the third
# epoch, and the last checkpoint before it into the middle of the second.
CONFIG = """
model: {model}
dtype: fp32
data: {{task: chain_sum, size: 40}}
output_dir: {output}
max_steps: 9
save_steps: 4
per_device_train_batch_size: {rows}
gradient_accumulation_steps: 2
learning_rate: 1e-2
lr_scheduler_type: cosine
logging_steps: 1
disable_tqdm: true
lora: {{r: 8}}
nesting: {{rule: stratified, reorder: {order}}}
train_sampling_strategy: {sampling}
"""
WEIGHTS, TRAINED = "adapter_model.safetensors", "trained.safetensors"


@dataclass(frozen=True)
class Engine:
    """One way to launch.

    Attributes:
        overrides: What the command needs on CPUs.
        mark: A file of its checkpoints that no other way writes.
        sampling: How the rows are ordered.
        order: What the adapter is reordered by.
        victim: The process that is killed.
    """

    overrides: tuple[str, ...]
    mark: str
    sampling: str
    order: str
    victim: int


ENGINES = {
    "ddp": Engine(("use_cpu=true",), "optimizer.pt", "group_by_length", "trained", victim=0),
    "fsdp2": Engine((), "pytorch_model_fsdp.bin", "random", "trained", victim=1),
    "zero1": Engine(("ddp_backend=gloo",), "latest", "random", "learned", victim=1),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("model"))


def write_config(folder: Path, model: Path, rows: int, sampling: str, order: str = "svd") -> Path:
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(model=model, output=folder / "run", rows=rows, sampling=sampling, order=order))
    return path


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The finished runs of one process, by the order of their rows and by what they are reordered by."""
    runs = {}
    for key in {(engine.sampling, engine.order) for engine in ENGINES.values()}:
        folder = tmp_path_factory.mktemp("-".join(key))
        train(load_config(write_config(folder, model, 8, *key)))
        runs[key] = folder / "run"
    return runs


def launch(engine: str, config: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{engine}.yaml")]
    command += ["--num_processes", "2", "--main_process_port", "0", str(HERE / "launched.py"), str(config)]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    given["PYTHONFAULTHANDLER"] = "1"  # so that a process that aborts says where it was
    if engine == "fsdp2":
        given["ACCELERATE_TORCH_DEVICE"] = "cpu"
    return subprocess.run(
        [*command, *overrides], env={**given, **environment}, capture_output=True, text=True, timeout=300
    )


def losses(run: Path) -> list[float]:
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def files(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


@pytest.mark.parametrize("name", ENGINES)
def test_two_processes_train_as_one_though_one_of_them_was_killed(
    name: str, model: Path, alone: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    if name == "zero1":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    engine = ENGINES[name]
    config, run = write_config(tmp_path, model, 4, engine.sampling, engine.order), tmp_path / "run"

    before = time.monotonic()
    killed = launch(name, config, *engine.overrides, KILL=f"7@{engine.victim}")
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr
    assert time.monotonic() - before < 120, "the other process must not wait for the dead one"
    checkpoint = run / "checkpoint-4"
    assert [path.name for path in run.glob("checkpoint-*")] == [checkpoint.name]
    assert (checkpoint / engine.mark).exists()
    assert not (run / WEIGHTS).exists()
    settings = load_config(config, [override for override in engine.overrides if "backend" not in override])
    with pytest.raises(MatryoshkaError, match=r"2 process\(es\) trained .*checkpoint-4, and now there are 1"):
        plan(settings, num_processes=1)
    assert plan(settings, num_processes=2).checkpoint == checkpoint

    resumed = launch(name, config, *engine.overrides)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    for said in (f"Going on from {checkpoint}, after 4 steps", f"The adapter is in {run}", "Next: matryoshka eval"):
        assert resumed.stdout.count(said) == 1, resumed.stdout

    one = alone[engine.sampling, engine.order]
    assert losses(run) == pytest.approx(losses(one), abs=1e-5)
    assert files(run) == files(one)
    expected, trained = load_file(one / "checkpoint-9" / TRAINED), load_file(run / "checkpoint-9" / TRAINED)
    assert trained.keys() == expected.keys()
    for key, tensor in trained.items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, expected[key], atol=1e-4), key
    # Adam divides by what rounding has left of a small gradient, so the learned order agrees as a function only.
    expected, trained = load_file(one / WEIGHTS), load_file(run / WEIGHTS)
    for key in (key for key in trained if "lora_A" in key):
        for rank, tolerance in ((1, 0.1), (4, 0.1), (8, 1e-3)):
            mine, wanted = (
                tensors[key.replace("lora_A", "lora_B")][:, :rank] @ tensors[key][:rank]
                for tensors in (trained, expected)
            )
            assert (mine - wanted).norm() < tolerance * wanted.norm(), (key, rank)
    for folder in (".", "checkpoint-9"):
        assert open_adapter(run / folder).nested == open_adapter(one / folder).nested
    # Not because nothing was learnt.
    assert losses(one)[-1] < losses(one)[0] - 0.2
    if name == "fsdp2":
        reads_in_plain_peft(model, tmp_path, ["run", "run/checkpoint-9"])


def test_two_processes_that_split_each_batch(model: Path, alone: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """``per_device_train_batch_size`` then counts the rows of all processes together."""
    config = write_config(tmp_path, model, 8, "group_by_length")
    done = launch("ddp", config, "use_cpu=true", "accelerator_config={split_batches: true}")
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = alone["group_by_length", "trained"] / "checkpoint-9", tmp_path / "run" / "checkpoint-9"
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    expected, trained = load_file(one / TRAINED), load_file(two / TRAINED)
    for key, tensor in trained.items():
        assert torch.allclose(tensor, expected[key], atol=1e-4), key


def reads_in_plain_peft(model: Path, folder: Path, names: list[str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.arange(3, 51).reshape(4, 12)
    plain, said = read_in_second_process(folder, base, ["float32"], ids, names)
    nested = read_nested(folder, {"float32": base}, ids, names)
    for key in (f"float32/{adapter}" for adapter in names):
        assert torch.equal(plain.logits[key], nested.logits[key]), key
        assert distance(plain.logits[key], plain.logits["float32/base"]) > 1e-2, key
        assert complaints(said[key]) == [], key


def test_a_checkpoint_without_the_random_numbers_of_each_process_is_incomplete(model: Path, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, model, 8, "random"))
    train(config)
    checkpoint, earlier = tmp_path / "run" / "checkpoint-9", tmp_path / "run" / "checkpoint-8"
    (tmp_path / "run" / "trainer_state.json").unlink()
    for path in (checkpoint, earlier):
        state = json.loads((path / "trainer_state.json").read_text())
        state["stateful_callbacks"]["ProcessCount"]["args"]["num_processes"] = 2
        (path / "trainer_state.json").write_text(json.dumps(state))
        for index in range(2):
            shutil.copy(path / "rng_state.pth", path / f"rng_state_{index}.pth")
    assert plan(config, num_processes=2).checkpoint == checkpoint
    (checkpoint / "rng_state_1.pth").unlink()
    assert plan(config, num_processes=2).checkpoint == earlier


def test_an_error_of_the_first_process_ends_all(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    config = write_config(tmp_path, model, 4, "random")
    failed = launch("ddp", config, "use_cpu=true")
    assert failed.returncode != 0
    assert "error: cannot write" in failed.stderr
    assert "ChildFailedError" in failed.stderr
    assert "Loading weights" not in failed.stderr
    assert (tmp_path / "run").read_text() == "mine"


def test_processes_that_do_not_find_each_other(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_config(tmp_path, model, 4, "random"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MatryoshkaError, match=r"2 processes were launched, .* write use_cpu: true"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_zero_3_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_config(tmp_path, model, 4, "random"))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")  # as `accelerate launch` sets it
    with pytest.raises(MatryoshkaError, match="write zero_stage: 2, or launch with FSDP2"):
        train(config)
    assert not (tmp_path / "run").exists()
