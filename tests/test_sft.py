"""Supervised fine-tuning: the config, TRL's losses, resumed runs, and several processes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from helpers.tiny_chat import save_tiny_chat
from helpers.two_processes import run_in_two_processes
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import MatryoshkaError, NestedAdapter, TrainRanksResult, load
from matryoshka_lora.formats import peft_folder
from matryoshka_lora.peft.callback import NestingCallback
from matryoshka_lora.sft import TrainResult, build_trainer, read_config, train

ROOT = Path(__file__).parents[1]
EXAMPLES = [{"prompt": f"{n} plus 1 is", "completion": f" {n + 1}."} for n in range(40)]
NUM_STEPS = 6
TOKENS = torch.arange(3, 23).reshape(1, 20)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("base"))


@pytest.fixture
def config_file(base_folder: Path, tmp_path: Path) -> Path:
    """A config whose run is in the folder ``run`` next to it."""
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(f"{json.dumps(example)}\n" for example in EXAMPLES))
    config = {
        "base_model": str(base_folder),
        "dtype": "bf16",
        # TRL's keywords take precedence over dtype, also under their former names.
        "model_init_kwargs": {"torch_dtype": "float32"},
        "data": [str(examples)],
        "output_dir": str(tmp_path / "run"),
        "max_steps": NUM_STEPS,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "lora": {"r": 4},
        "nesting": {"train_ranks": False},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def losses(run: Path) -> list[float]:
    """Return the training losses of a finished run."""
    state = json.loads((run / f"checkpoint-{NUM_STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


# The config


@pytest.mark.parametrize(
    ("override", "keyword"),
    [
        ("learning_rat=1", "'learning_rat'"),
        ("model=x", "'model'"),
        ("r=8", r"'r'.* lora\.r"),
        ("lora.ranks=[1]", "lora .*'ranks'"),
        ("nesting.rulee=lora", "nesting .*'rulee'"),
        ("resume_from_checkpoint=here", "resume_from_checkpoint"),
        ("lora.peft_type=IA3", "peft_type"),
        ("data.x.y=1", "data"),
        ("data.x=1", "data"),
        ("nesting=4", "nesting"),
        ("nesting.train_ranks=svd", "train_ranks"),
        ("nesting.rule=papers", "papers"),
        ("nesting.ranks=[2,1]", "increasing"),
        ("nesting.ranks=2,x", "'x'"),
        ("nesting.ranks=[]", "ranks"),
        ("nesting.ranks=[2,8]", r"lora\.r"),
        ("nesting.scaling=rslora", "scaling"),
        ("nesting.deploy=papers", "deploy"),
        ("nesting.deploy=paper", "rule"),  # the default rule is lora
        ("lora.r=0", r"lora\.r"),
        ("lora.r=eight", r"lora\.r"),
        ("lora.lora_alpha=eight", r"lora\.lora_alpha"),
        ("lora.lora_dropout=1e-1x", r"lora\.lora_dropout"),
        ("max_steps", "max_steps"),
        ("max_steps=[", "max_steps"),
        ("dtype=float32", "bf16"),
        ("dtype=[bf16]", "dtype"),
        ("data=", "data"),
    ],
)
def test_an_unknown_key_or_value_is_an_error(
    override: str, keyword: str, config_file: Path
) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        read_config(config_file, [override])


@pytest.mark.parametrize("content", [None, b"- 1", b"a: [", b"\xff", b"[" * 9999, b"a: 2001-99-99"])
def test_a_file_that_is_no_config_is_an_error(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(MatryoshkaError, match=r"config\.yaml"):
        read_config(file)


@pytest.mark.parametrize(
    ("overrides", "rank", "alpha"),
    [
        (["lora={}"], 32, 32),
        (["lora={}", "nesting.ranks=[2, 8]"], 8, 8),
        (["lora=", "nesting.ranks=2,8"], 8, 8),
        (["lora={}", "nesting.ranks=8"], 8, 8),
        (["lora.r=16", "lora.use_rslora=true"], 16, 4),
        (["lora.r=16", "lora.lora_alpha=64"], 16, 64),
        (["lora.r=16", "lora.lora_alpha=1e1", "lora.lora_dropout=1e-1"], 16, 10),
    ],
)
def test_the_default_scale_is_1(
    overrides: list[str], rank: int, alpha: float, config_file: Path
) -> None:
    lora = read_config(config_file, overrides)["lora"]
    assert (lora["r"], lora["lora_alpha"], lora["target_modules"]) == (rank, alpha, "all-linear")


def test_an_output_dir_without_a_value_is_the_default(config_file: Path) -> None:
    assert read_config(config_file, ["output_dir="])["output_dir"] == "runs/train"
    # Other fields of TRL's may be None: here, examples of any length.
    assert read_config(config_file, ["max_length="])["max_length"] is None


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem
)
def test_the_example_configs_are_valid(file: Path) -> None:
    read_config(file)


@pytest.mark.parametrize(
    ("override", "keyword"),
    [
        ("learning_rate=fast", "float"),
        ("chat_template_path=org/name", "chat_template_path"),
        ("lora.target_modules=[nothing]", "not found"),
        ("eval_strategy=steps", "eval"),
        ("data=nothing.jsonl", r"nothing\.jsonl"),
        ("data=[5]", "int"),
        ("base_model=nothing", "nothing"),
    ],
)
def test_what_other_libraries_reject_is_an_error(
    override: str, keyword: str, config_file: Path
) -> None:
    with pytest.raises(MatryoshkaError, match=keyword):
        train(read_config(config_file, [override]))
    assert not (config_file.parent / "run").exists()


def test_examples_without_a_completion_within_max_length_are_an_error(config_file: Path) -> None:
    with pytest.raises(MatryoshkaError, match="max_length"):
        train(read_config(config_file, ["max_length=2"]))


@pytest.mark.parametrize("completion", ["", ', "completion": 9', ', "completion": null'])
def test_examples_at_which_trl_would_fail_are_an_error(completion: str, config_file: Path) -> None:
    file = config_file.with_name("bad.jsonl")
    file.write_text(f'{{"prompt": "a"{completion}}}')
    with pytest.raises(MatryoshkaError, match=r"bad\.jsonl"):
        train(read_config(config_file, [f"data={file}"]))


def test_strategies_may_be_no_which_yaml_reads_as_false(config_file: Path) -> None:
    config = read_config(config_file, ["save_strategy=no", "max_steps=1"])
    assert config["save_strategy"] is False
    train(config)
    assert not list((config_file.parent / "run").glob("checkpoint-*"))


# A run


def test_a_run_trains_an_adapter_of_every_rank(
    config_file: Path, base_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = config_file.parent / "run"
    run.mkdir()
    (run / "README.md").write_text("mine")
    overrides = [f"eval_data={config_file.parent}/examples.jsonl", "eval_strategy=epoch"]
    config = read_config(config_file, overrides)
    result = train(config)
    assert (result.path, result.order, result.train_ranks) == (run / "adapter", "svd", None)
    assert (run / "README.md").read_text() == "mine"
    assert AutoTokenizer.from_pretrained(result.path).chat_template
    lora = peft_folder.read(result.path)
    assert (lora.order, lora.nested_ranks) == ("svd", (1, 2, 4))

    adapter = load(AutoModelForCausalLM.from_pretrained(base_folder), result.path, rank=3)
    adapter.export(run / "rank-3", rank=3)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    plain = PeftModel.from_pretrained(base, run / "rank-3").eval()
    with torch.no_grad():
        actual = adapter.model(input_ids=TOKENS).logits
        torch.testing.assert_close(actual, plain(input_ids=TOKENS).logits)

    # The same config again trains nothing.
    weights = result.path / "adapter_model.safetensors"
    time_before = weights.stat().st_mtime_ns
    with caplog.at_level(logging.INFO, "matryoshka_lora"):
        assert train(config) == result
    assert "finished" in caplog.text
    assert weights.stat().st_mtime_ns == time_before


def test_a_finished_run_with_other_settings_is_an_error(config_file: Path) -> None:
    """The message names all settings that differ. No value is stored: it may be a token."""
    run = config_file.parent / "run"
    overrides = ["max_steps=1", "hub_token=hf_secret"]
    result = train(read_config(config_file, overrides))
    for override in ("learning_rate=3e-4", "lora.lora_alpha=9", "nesting.rule=dylora", "seed=7"):
        with pytest.raises(MatryoshkaError, match=rf"other settings: {override.split('=')[0]}\."):
            train(read_config(config_file, [*overrides, override]))
    with pytest.raises(MatryoshkaError, match=r"hub_token, max_steps\."):
        train(read_config(config_file))
    assert train(read_config(config_file, [*overrides, f"output_dir={run}/"])) == result
    (stored,) = run.glob("*.json")
    for value in ("hf_secret", str(config_file.parent)):
        assert value not in stored.read_text()
    stored.unlink()  # version 0.4 has stored none
    assert train(read_config(config_file)) == result


@pytest.mark.parametrize(
    ("order", "deploy", "expected"),
    [("svd", "reordered", "svd"), (None, "paper", "paper")],
)
def test_a_result_says_which_ranks_the_adapter_has(order: Any, deploy: Any, expected: str) -> None:
    ranks_result = TrainRanksResult(None, "kept", 1, {1: 8}, {1: 2.0}, {1: 1.0})
    text = repr(TrainResult(Path("run/adapter"), order, deploy, ranks_result))
    assert "run/adapter" in text
    assert expected in text
    assert str(ranks_result) in text


def test_rule_lora_has_the_losses_of_plain_trl(config_file: Path, base_folder: Path) -> None:
    train(read_config(config_file, ["nesting.rule=lora"]))
    arguments = SFTConfig(
        str(config_file.parent / "plain"),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=4,
        use_cpu=True,
        learning_rate=1e-2,
        logging_steps=1,
        bf16=False,
        report_to="none",
        save_steps=NUM_STEPS,
        gradient_checkpointing=False,
    )
    set_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=Dataset.from_list(EXAMPLES),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
    )
    trainer.train()
    assert losses(config_file.parent / "run") == losses(config_file.parent / "plain")


def test_the_factors_of_a_4_bit_base_model_stay_in_float32(config_file: Path) -> None:
    """TRL's Trainer casts them to bfloat16."""
    pytest.importorskip("bitsandbytes")
    config = yaml.safe_load(config_file.read_text())
    config["model_init_kwargs"] = {
        "quantization_config": {"load_in_4bit": True},
        "device_map": "cpu",
    }
    config_file.write_text(yaml.safe_dump(config))
    adapter, _ = build_trainer(read_config(config_file))
    for A, B in adapter.layer_factors().values():
        assert (A.dtype, B.dtype) == (torch.float32, torch.float32)


def test_an_adapter_whose_ranks_cannot_be_trained_is_saved(
    config_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "matryoshka_lora")
    overrides = ["nesting.train_ranks=true", "max_steps=1", "lora.r=1"]
    result = train(read_config(config_file, overrides))
    assert result.train_ranks is not None
    assert (result.order, result.train_ranks.outcome) == ("svd", "nothing to train")
    assert peft_folder.read(result.path).order == "svd"
    assert "nothing to train" in caplog.text


@pytest.mark.parametrize("train_ranks", ["true", "false"])
def test_the_deployment_of_the_paper_is_saved_as_it_was_trained(
    config_file: Path, train_ranks: str
) -> None:
    nesting = f"nesting={{deploy: paper, scaling: rank, train_ranks: {train_ranks}}}"
    overrides = [nesting, "nesting.rule=matryoshka", "max_steps=2"]
    result = train(read_config(config_file, overrides))
    lora = peft_folder.read(result.path)
    assert (lora.order, lora.deploy, lora.nested_ranks) == (None, "paper", (1, 2, 4))
    assert (result.order, result.deploy, result.train_ranks) == (None, "paper", None)


# Resuming


@pytest.mark.parametrize("steps", [2, 4], ids=["finished", "unfinished"])
@pytest.mark.parametrize(
    ("override", "keyword"),
    [
        ("nesting.rule=matryoshka", "rule"),
        ("base_model=other", "base_model"),
        ("base_revision=v2", "revision"),
    ],
)
def test_resuming_with_another_nesting_or_base_model_is_an_error(
    override: str,
    keyword: str,
    steps: int,
    config_file: Path,
    base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = config_file.parent / "run"
    shutil.copytree(base_folder, config_file.parent / "other")
    monkeypatch.chdir(config_file.parent)
    train(read_config(config_file, ["max_steps=2"]))
    shutil.rmtree(run / "adapter")
    config = read_config(config_file, [f"max_steps={steps}", override])
    with pytest.raises(MatryoshkaError, match=keyword):
        train(config)
    assert not (run / "adapter").exists()


class Killed(BaseException):
    """Stands for a signal that nothing catches."""


def kill_in(patch: pytest.MonkeyPatch, owner: Any, name: str, is_time: Callable[..., bool]) -> None:
    """Let a method raise `Killed` at a call with certain arguments."""
    method = getattr(owner, name)

    def killed_method(*args: Any, **kwargs: Any) -> Any:
        if is_time(*args):
            raise Killed
        return method(*args, **kwargs)

    patch.setattr(owner, name, killed_method)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["lora", "matryoshka", "dylora"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    rule: str, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = config_file.parent / "uninterrupted"
    resumed = config_file.parent / "resumed"
    train(read_config(config_file, [f"output_dir={uninterrupted}", f"nesting.rule={rule}"]))
    config = read_config(config_file, [f"output_dir={resumed}", f"nesting.rule={rule}"])
    with monkeypatch.context() as patch:
        kill_in(patch, NestingCallback, "on_step_begin", lambda *args: args[2].global_step == 5)
        with pytest.raises(Killed):
            train(config)
    checkpoints = sorted(path.name for path in resumed.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    train(config)
    expected = load_file(uninterrupted / "adapter/adapter_model.safetensors")
    actual = load_file(resumed / "adapter/adapter_model.safetensors")
    # A checkpoint holds B diag(p), which is divided by p again.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if rule == "matryoshka" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(actual, expected, **tolerance)
    assert losses(resumed) == pytest.approx(losses(uninterrupted), abs=2e-4)


@pytest.mark.slow
def test_a_run_killed_while_its_ranks_are_trained_takes_no_further_step(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "matryoshka_lora")
    config = read_config(config_file, ["nesting.train_ranks=true", "nesting.rule=lora"])
    with monkeypatch.context() as patch:
        kill_in(patch, NestedAdapter, "train_ranks", lambda *args: True)
        with pytest.raises(Killed):
            train(config)
    state = config_file.parent / "run" / f"checkpoint-{NUM_STEPS}" / "trainer_state.json"
    before = state.read_bytes()
    result = train(config)
    assert result.train_ranks is not None
    assert (result.order, result.train_ranks.outcome) == ("svd", "kept")
    assert peft_folder.read(result.path).small_rank == result.train_ranks.small_rank > 0
    assert str(result.path / "small") in caplog.text
    assert state.read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_ends_with_its_best_checkpoint(config_file: Path) -> None:
    run = config_file.parent / "run"
    overrides = [
        f"eval_data={config_file.parent}/examples.jsonl",
        "eval_strategy=steps",
        "eval_steps=2",
        "load_best_model_at_end=true",
        "metric_for_best_model=loss",
        "greater_is_better=true",  # so that it is the first checkpoint, as the loss falls
    ]
    train(read_config(config_file, overrides))
    (run / "adapter").rename(run / "first")
    train(read_config(config_file, overrides))
    first = load_file(run / "first/adapter_model.safetensors")
    second = load_file(run / "adapter/adapter_model.safetensors")
    torch.testing.assert_close(second, first)


@pytest.mark.slow
def test_a_finished_run_can_be_continued_but_not_with_another_adapter(config_file: Path) -> None:
    run = config_file.parent / "run"
    train(read_config(config_file))
    shutil.rmtree(run / "adapter")
    for override in (
        "lora_alpha=9",
        "r=2",
        "target_modules=[q_proj]",
        "lora_dropout=0.5",
        "bias=lora_only",
    ):
        with pytest.raises(MatryoshkaError, match=override.partition("=")[0]):
            train(read_config(config_file, [f"lora.{override}"]))
    train(read_config(config_file, [f"max_steps={NUM_STEPS + 2}"]))
    assert (run / f"checkpoint-{NUM_STEPS + 2}").is_dir()


# Several processes


def logits_of_plain_peft(base_folder: Path, adapter_folder: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = PeftModel.from_pretrained(base, adapter_folder).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits


STRATEGIES = {  # overrides, and a file of this strategy's checkpoints
    "ddp": ([], "optimizer.pt"),
    "fsdp2": (["use_cpu=false"], "pytorch_model_fsdp.bin"),
    "zero1": (["ddp_backend=gloo"], "latest"),
    "zero3": (["ddp_backend=gloo"], "latest"),
}


@pytest.mark.slow
# ZeRO-3 rejects P. The draws of dylora do not depend on the sharding.
@pytest.mark.parametrize(
    ("strategy", "rule"),
    [
        *[("ddp", rule) for rule in ("lora", "matryoshka", "dylora")],
        *[("fsdp2", rule) for rule in ("lora", "matryoshka")],
        *[("zero1", rule) for rule in ("lora", "matryoshka")],
        ("zero3", "lora"),
    ],
)
def test_two_processes_train_as_one(
    strategy: str, rule: str, config_file: Path, base_folder: Path
) -> None:
    """Also if they resume from the checkpoint before the last."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    overrides, checkpoint_file = STRATEGIES[strategy]
    single = config_file.parent / "single"
    run = config_file.parent / "run"
    nesting = [f"nesting.rule={rule}", "nesting.train_ranks=true"]
    result = train(read_config(config_file, [f"output_dir={single}", *nesting]))
    arguments = [str(config_file), "per_device_train_batch_size=2", *nesting, *overrides]
    expected_logits = logits_of_plain_peft(base_folder, single / "adapter")
    output = ""
    for _ in range(2):
        output = run_in_two_processes(strategy, "launch.py", ["train", *arguments])
        assert losses(run) == pytest.approx(losses(single), abs=2e-3)
        assert peft_folder.read(run / "adapter").order == result.order
        for rank in (1, 4):
            updates: list[Any] = []
            for folder in (single / "adapter", run / "adapter"):
                pairs = [layer.read() for layer in peft_folder.read(folder).at_rank(rank).layers]
                updates.append(np.concatenate([(pair.B @ pair.A).ravel() for pair in pairs]))
            assert np.linalg.norm(updates[0] - updates[1]) < 0.05 * np.linalg.norm(updates[0])
        assert not (run / "adapter" / "training_args.bin").exists()  # it may hold a token
        logits = logits_of_plain_peft(base_folder, run / "adapter")
        torch.testing.assert_close(logits, expected_logits, rtol=0.02, atol=0.02)
        shutil.rmtree(run / "adapter")
        assert (run / f"checkpoint-{NUM_STEPS}" / checkpoint_file).exists()
        shutil.rmtree(run / f"checkpoint-{NUM_STEPS}")
    assert "Resuming from" in output
