"""`matryoshka train`: its config, TRL's losses, a killed run that goes on, several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_chat import save_tiny_chat
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import MatryoshkaError, NestedAdapter, load
from matryoshka_lora.callback import NestingCallback
from matryoshka_lora.files.peft import open_adapter
from matryoshka_lora.train import _prepare, read_config, train

ROOT = Path(__file__).parents[1]
ROWS = [{"prompt": f"{n} plus 1 is", "completion": f" {n + 1}."} for n in range(40)]
STEPS = 6


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("base"))


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    """Return a config whose run is in the folder ``run`` beside it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    values = {
        "model": str(base),
        "dtype": "bf16",
        "model_init_kwargs": {"torch_dtype": "float32"},  # TRL's own word counts, the older too
        "data": [str(rows)],
        "output_dir": str(tmp_path / "run"),
        "max_steps": STEPS,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "lora": {"r": 4},
        "nesting": {"reorder": "svd"},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def losses(run: Path) -> list[float]:
    """Return the losses of a run's last checkpoint."""
    state = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


# The config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1", "'learning_rate'"),
        ("r=8", r"'lora\.r'"),
        ("resume_from_checkpoint=here", "no key 'resume_from_checkpoint'"),
        ("lora.peft_type=IA3", "no key 'peft_type'"),
        ("rule=lora", r"'nesting\.rule'"),
        ("lora.ranks=[1]", r"'nesting\.ranks'"),
        ("nesting.rulee=lora", "'rule'"),
        ("nesting.reorder=best", "svd or trained"),
        ("nesting.rule=papers", "papers"),
        ("nesting.ranks=[2,1]", "increase"),
        ("nesting=4", "nesting is '4': write keys with values"),
        ("max_steps", "has no value: write max_steps=VALUE"),
        ("dtype=float32", "bf16, fp32 or fp16"),
        ("data=", "names no data"),
        ("data.x.y=1", "no key .data.x."),
        ("data.x=1", "cannot read the config"),
    ],
)
def test_what_is_no_key_or_value_is_refused_with_a_hint(
    override: str, message: str, config: Path
) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        read_config(config, [override])


@pytest.mark.parametrize(
    ("overrides", "r", "alpha"),
    [
        (["lora={}"], 32, 32),
        (["lora={}", "nesting.ranks=[2, 8]"], 8, 8),
        (["lora.r=16", "lora.use_rslora=true"], 16, 4),
        (["lora.r=16", "lora.lora_alpha=64"], 16, 64),
    ],
)
def test_what_is_left_out_makes_the_scale_1(
    overrides: list[str], r: int, alpha: float, config: Path
) -> None:
    lora = read_config(config, overrides)["lora"]
    assert (lora["r"], lora["lora_alpha"], lora["target_modules"]) == (r, alpha, "all-linear")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=fast", "invalid float value"),
        ("chat_template_path=org/name", r"name a \.jinja file"),
        ("lora.r=0", "positive integer"),
        ("lora.target_modules=[nothing]", "not found in the base model"),
        ("nesting.ranks=[1, 2]", "ranks"),
        ("eval_strategy=steps", "eval"),
        ("data=nothing.jsonl", "the data nothing.jsonl cannot be read"),
        ("data=[5]", "cannot be read: .*not int"),
        ("model=nothing", "cannot load the model"),
    ],
)
def test_what_the_libraries_refuse_is_one_clear_error(
    override: str, message: str, config: Path
) -> None:
    with pytest.raises(MatryoshkaError, match=message):
        train(read_config(config, [override]))
    assert not (config.parent / "run").exists()


def test_rows_without_an_answer_within_max_length_are_no_traceback(config: Path) -> None:
    with pytest.raises(MatryoshkaError, match=r"cannot train: .* Look at data, max_length"):
        train(read_config(config, ["max_length=2"]))


@pytest.mark.parametrize("answer", ["", ', "completion": 9', ', "completion": null'])
def test_rows_that_trl_would_fail_at_are_refused(answer: str, config: Path) -> None:
    file = config.with_name("bad.jsonl")
    file.write_text(f'{{"prompt": "a"{answer}}}')
    with pytest.raises(MatryoshkaError, match=r"completion of .*bad\.jsonl|bad\.jsonl has the col"):
        train(read_config(config, [f"data={file}"]))


# A run


def test_a_run_makes_an_adapter_of_every_rank_and_touches_nothing_else(
    config: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config.parent / "run"
    run.mkdir()
    (run / "README.md").write_text("mine")
    checked = read_config(config, [f"eval_data={config.parent}/rows.jsonl", "eval_strategy=epoch"])
    folder = train(checked)
    assert folder == run / "adapter"
    assert (run / "README.md").read_text() == "mine"
    assert AutoTokenizer.from_pretrained(folder).chat_template
    file = open_adapter(folder)
    assert (file.order, file.nesting and file.nesting.ranks) == ("svd", (1, 2, 4))
    model = AutoModelForCausalLM.from_pretrained(base)
    tokens = torch.arange(3, 23).reshape(1, 20)
    with torch.no_grad():
        adapter = load(model, folder, rank=3)
        found = [adapter.model(input_ids=tokens).logits]
        adapter.export(run / "rank-3", rank=3)
        plain = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), run / "rank-3"
        )
        found.append(plain.eval()(input_ids=tokens).logits)
    torch.testing.assert_close(*found)
    # The same command again trains nothing.
    capsys.readouterr()
    assert train(checked) == folder
    assert "adapter is finished. To train with other settings" in capsys.readouterr().out


def test_rule_lora_has_the_losses_of_plain_trl(config: Path, base: Path) -> None:
    train(read_config(config, ["nesting.rule=lora"]))
    plain = SFTConfig(
        str(config.parent / "plain"), max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True,
        learning_rate=1e-2, logging_steps=1, bf16=False, report_to="none", save_steps=STEPS,
        gradient_checkpointing=False,
    )  # fmt: skip
    set_seed(plain.seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    from datasets import Dataset

    SFTTrainer(
        model=get_peft_model(model, lora),
        args=plain,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(base),
    ).train()
    assert losses(config.parent / "run") == losses(config.parent / "plain")


def test_the_factors_of_a_4_bit_base_stay_in_float32(config: Path) -> None:
    """TRL's Trainer rounds them to bfloat16."""
    pytest.importorskip("bitsandbytes")
    base = {"quantization_config": {"load_in_4bit": True}, "device_map": "cpu"}
    values = yaml.safe_load(config.read_text()) | {"model_init_kwargs": base}
    config.write_text(yaml.safe_dump(values))
    adapter, _ = _prepare(read_config(config, []))
    assert {x.dtype for pair in adapter.parameters().values() for x in pair} == {torch.float32}


class Killed(BaseException):
    """Stands for a signal that nobody catches."""


def kill(where: Any, name: str, at: Callable[..., bool], patch: pytest.MonkeyPatch) -> None:
    """Let a method raise `Killed` when its arguments are such."""
    before = getattr(where, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        if at(*args):
            raise Killed
        return before(*args, **kwargs)

    patch.setattr(where, name, method)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["lora", "matryoshka", "stratified"])
def test_a_killed_run_ends_as_an_unbroken_one(
    rule: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {name: config.parent / name for name in ("whole", "broken")}
    checked = {
        name: read_config(config, [f"output_dir={run}", f"nesting.rule={rule}"])
        for name, run in runs.items()
    }
    train(checked["whole"])
    with monkeypatch.context() as patch:
        late = lambda _, args, state, *more: state.global_step == 5  # noqa: E731
        kill(NestingCallback, "on_step_begin", late, patch)
        with pytest.raises(Killed):
            train(checked["broken"])
    assert sorted(p.name for p in runs["broken"].glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    train(checked["broken"])
    whole, broken = (load_file(run / "adapter/adapter_model.safetensors") for run in runs.values())
    same = {"rtol": 0, "atol": 0} if rule == "lora" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(broken, whole, **same)
    assert losses(runs["broken"]) == pytest.approx(losses(runs["whole"]), abs=2e-4)


@pytest.mark.slow
def test_a_run_killed_while_it_is_reordered_trains_no_further_step(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = read_config(config, ["nesting.reorder=trained", "nesting.rule=lora"])
    with monkeypatch.context() as patch:
        kill(NestedAdapter, "reorder", lambda *args: True, patch)
        with pytest.raises(Killed):
            train(checked)
    last = config.parent / "run" / f"checkpoint-{STEPS}" / "trainer_state.json"
    before = last.read_bytes()
    assert open_adapter(train(checked)).order == "trained"
    assert last.read_bytes() == before
    assert not (config.parent / "run/reorder.safetensors").exists()


def test_what_cannot_be_reordered_by_data_is_saved_by_svd(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(read_config(config, ["nesting.reorder=trained", "max_steps=1", "lora.r=1"]))
    assert open_adapter(folder).order == "svd"
    assert "not trained, and their order is svd: 1 is the only nested" in capsys.readouterr().out


def test_the_papers_deployment_is_saved_as_it_was_trained(config: Path) -> None:
    overrides = ["nesting={deploy: paper, scaling: rank}", "max_steps=2"]
    file = open_adapter(train(read_config(config, overrides)))
    assert (file.order, file.nesting and file.nesting.ranks) == ("paper", (1, 2, 4))


@pytest.mark.slow
def test_after_its_last_step_a_run_goes_on_with_what_it_would_have_saved(config: Path) -> None:
    run = config.parent / "run"
    best = [f"eval_data={config.parent}/rows.jsonl", "eval_strategy=steps", "eval_steps=2"]
    best += ["load_best_model_at_end=true", "metric_for_best_model=loss", "greater_is_better=true"]
    train(read_config(config, best))  # the best is the first, since the loss falls
    (run / "adapter").rename(run / "whole")
    train(read_config(config, best))
    (run / "adapter").rename(run / "again")
    whole, again = (
        load_file(run / name / "adapter_model.safetensors") for name in ("whole", "again")
    )
    torch.testing.assert_close(again, whole)
    for other in ("lora_alpha=9", "r=2", "target_modules=[q_proj]"):
        with pytest.raises(MatryoshkaError, match=f"another lora.{other.split('=')[0]}: name"):
            train(read_config(config, [*best, f"lora.{other}"]))
    train(read_config(config, [f"max_steps={STEPS + 2}"]))
    assert (run / f"checkpoint-{STEPS + 2}").is_dir()


# Several processes


ENGINES = {  # what the command gets, the order of the adapter, a file of this way's checkpoints
    "ddp": ([], "svd", "optimizer.pt"),
    "fsdp2": (["use_cpu=false"], None, "pytorch_model_fsdp.bin"),
    "zero1": (["ddp_backend=gloo"], None, "latest"),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["lora", "matryoshka", "stratified"])
@pytest.mark.parametrize("name", ENGINES)
def test_two_processes_train_as_one(name: str, rule: str, config: Path) -> None:
    """And again from the checkpoint before the last."""
    if name == "zero1":
        pytest.importorskip("deepspeed")
    (overrides, order, mark), alone = ENGINES[name], config.parent / "alone"
    train(read_config(config, [f"output_dir={alone}", f"nesting.rule={rule}"]))
    file = ROOT / "configs/accelerate" / f"{name}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["--num_processes", "2", "--main_process_port", "0", str(ROOT / "tests/launched.py")]
    words = ["train", str(config), "per_device_train_batch_size=2", f"nesting.rule={rule}"]
    words += ["nesting.reorder=trained", *overrides]
    settings = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    settings |= {"ACCELERATE_TORCH_DEVICE": "cpu"} if name == "fsdp2" else {}
    run, tokens = config.parent / "run", torch.arange(3, 23).reshape(1, 20)
    comes_next = "adapter -o NEW --by trained" if order else f"reorder {run / 'adapter'} -o"
    for _ in range(2):
        result = subprocess.run(
            [*command, *words], env={**os.environ, **settings}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert comes_next in result.stdout
        assert result.stdout.count("Next:") == 1
        assert losses(run) == pytest.approx(losses(alone), abs=2e-3)
        assert open_adapter(run / "adapter").order == order
        # PEFT reads what the single process has trained.
        found = []
        for folder in (run / "adapter", alone / "adapter"):
            model = AutoModelForCausalLM.from_pretrained(read_config(config)["model"])
            model = PeftModel.from_pretrained(model, folder).eval()
            with torch.no_grad():
                found.append(model(input_ids=tokens).logits)
        torch.testing.assert_close(*found, rtol=0.02, atol=0.02)
        shutil.rmtree(run / "adapter")
        assert (run / f"checkpoint-{STEPS}" / mark).exists()
        shutil.rmtree(run / f"checkpoint-{STEPS}")
    assert "Going on from" in result.stdout
