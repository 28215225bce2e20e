"""TRL's and transformers' Trainers on a nested adapter.

Their logs are compared with plain PEFT: the same Trainer, where a hook multiplies the output of A
by p.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from helpers import oracle
from helpers.models import lora_config, nest_as, randomize
from helpers.rules import ANY_RANK, RANK_PER_ROW
from helpers.trl_trainers import NESTING, make_peft_model, make_trainer
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from trl import SFTConfig

from matryoshka_lora import MatryoshkaError, NestedAdapter, Rule
from matryoshka_lora.rules import RULES

P = oracle.trained_p(list(NESTING.ranks), NESTING.scaling, NESTING.scale)


def make_adapter(rule: str | Rule = "matryoshka") -> NestedAdapter:
    return nest_as(make_peft_model(), NESTING, rule)


def multiply_by_p(model: PeftModel, p: Tensor) -> None:
    """Multiply after A, before PEFT multiplies by the scale of rank R."""

    def hook(module: Any, inputs: Any, hidden: Tensor) -> Tensor:
        return hidden * (p / NESTING.scale).to(hidden.dtype)

    for name, module in model.named_modules():
        if name.endswith((".lora_A.default", ".lora_A.ref")):
            module.register_forward_hook(hook)


def logged_metrics(trainer: Any) -> list[dict[str, float]]:
    """Return the metrics that a Trainer has logged at each step, without times."""
    names = ("loss", "eval_loss", "grad_norm", "entropy", "mean_token_accuracy", "kl", "reward")
    return [
        {k: v for k, v in entry.items() if k in names or k.startswith(("logps/", "rewards/"))}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]


# Trainers.

ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "neftune": {"neftune_noise_alpha": 5.0},
    "best model": {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "greater_is_better": True,  # the highest loss, which is not the last one
    },
}
CASES = [
    ("dpo", "defaults"),
    ("grpo", "defaults"),
    *(("sft", arguments) for arguments in ARGUMENTS),
]


@pytest.mark.parametrize("rule", ["lora", "matryoshka"])
@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_a_trainer_logs_what_it_logs_for_plain_peft(
    kind: str, arguments: str, rule: str, tmp_path: Path
) -> None:
    def train(model: Any, adapter: NestedAdapter | None, folder: Path) -> list[dict[str, float]]:
        trainer = make_trainer(kind, model, folder, adapter, **ARGUMENTS[arguments])
        if adapter is None and rule == "matryoshka":
            multiply_by_p(model, P)  # here, as TRL has created its reference
        set_seed(1)
        trainer.train()
        metrics = logged_metrics(trainer)
        if arguments == "best model":
            eval_loss = trainer.evaluate()["eval_loss"]
            assert eval_loss == pytest.approx(trainer.state.best_metric, abs=1e-6)
            assert eval_loss > metrics[-1]["eval_loss"] + 0.01
            metrics.append({"eval_loss": eval_loss})
        return metrics

    plain_model = make_peft_model()
    expected = train(plain_model, None, tmp_path / "plain")
    adapter = make_adapter(rule)
    actual = train(adapter.model, adapter, tmp_path / "nested")
    assert len(expected) >= 3
    assert expected[0] != expected[2]
    if rule == "lora":  # the first step, to the last digit
        for key in expected[0].keys() & {"loss", "eval_loss"}:
            assert actual[0][key] == expected[0][key]
    for actual_step, expected_step in zip(actual, expected, strict=True):
        assert actual_step == pytest.approx(expected_step, rel=1e-4, abs=1e-5)
    parameters = dict(adapter.model.named_parameters())
    for name, parameter in plain_model.named_parameters():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-3, atol=1e-4, msg=name)


METRICS_AT_REFERENCE: dict[str, dict[str, float]] = {
    "dpo": {"loss": math.log(2), "rewards/margins": 0, "rewards/chosen": 0},
    "grpo": {"kl": 0},
}
"""The metrics of a policy that equals its reference."""


@pytest.mark.parametrize(
    "rule", [RULES["matryoshka"], RULES["dylora"], ANY_RANK], ids=lambda rule: rule.name
)
@pytest.mark.parametrize("kind", METRICS_AT_REFERENCE)
@pytest.mark.parametrize("half", [False, True])
def test_a_policy_that_does_not_learn_is_its_reference(
    kind: str, rule: Rule, half: bool, tmp_path: Path
) -> None:
    adapter = make_adapter(rule)
    arguments = {"learning_rate": 0.0, "bf16": half, "gradient_checkpointing": half}
    trainer = make_trainer(kind, adapter.model, tmp_path, adapter, **arguments)
    trainer.train()
    expected = METRICS_AT_REFERENCE[kind]
    for metrics in logged_metrics(trainer):
        assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-6)


def test_the_reference_of_a_reordered_adapter_is_the_adapter(tmp_path: Path) -> None:
    """TRL copies factors that are trained into an adapter of its own."""
    adapter = make_adapter()
    randomize(adapter.model, size=0.1)
    adapter.reorder()
    trainer = make_trainer("dpo", adapter.model, tmp_path, adapter)
    trainer.train()
    metrics = logged_metrics(trainer)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[2]["loss"] < math.log(2) - 0.001


def test_a_reference_without_p_is_rejected(tmp_path: Path) -> None:
    adapter = make_adapter()
    randomize(adapter.model, size=0.1)
    with pytest.raises(MatryoshkaError, match="reference"):
        make_trainer("dpo", adapter.model, tmp_path, adapter).train()


@pytest.mark.parametrize("case", ["inactive", "another model"])
def test_a_trainer_that_trains_something_else_is_rejected(case: str, tmp_path: Path) -> None:
    adapter = make_adapter()
    model = adapter.model
    if case == "inactive":
        model.add_adapter("other", lora_config(NESTING))
        model.set_adapter("other")
    else:
        model = make_adapter().model
    with pytest.raises(MatryoshkaError, match="default"):
        make_trainer("sft", model, tmp_path, adapter).train()


@pytest.mark.filterwarnings("ignore:Ranks whose")
@pytest.mark.parametrize(
    ("kind", "max_steps", "learning_rate"),
    [("sft", 60, 1e-2), ("dpo", 60, 1e-2), ("kto", 60, 1e-2), ("reward", 20, 3e-3)],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ranks_are_trained_with_the_loss_of_the_trainer(
    kind: str, max_steps: int, learning_rate: float, checkpointing: bool, tmp_path: Path
) -> None:
    """At step 0 that is the loss of plain PEFT, and rank 1 gets a lower one."""
    plain = make_trainer(kind, make_peft_model(kind), tmp_path, max_steps=1, learning_rate=0.0)
    plain.train()
    adapter = nest_as(make_peft_model(kind), NESTING, "lora")
    trainer = make_trainer(
        kind,
        adapter.model,
        tmp_path,
        adapter,
        max_steps=max_steps,
        learning_rate=learning_rate,
        gradient_checkpointing=checkpointing,
    )
    trainer.train()
    first_losses = [logged_metrics(t)[0]["loss"] for t in (plain, trainer)]
    assert first_losses[0] == pytest.approx(first_losses[1], rel=1e-5)
    result = adapter.train_ranks(trainer)
    assert result.outcome == "kept"
    assert result.losses_after[1] < result.losses_before[1]


def test_a_trainer_that_generates_leaves_the_ranks_reordered(tmp_path: Path) -> None:
    adapter = make_adapter()
    trainer = make_trainer("grpo", adapter.model, tmp_path, adapter)
    trainer.train()
    with pytest.warns(UserWarning, match="GRPOTrainer"):
        result = adapter.train_ranks(trainer)
    assert (result.outcome, adapter.order) == ("no examples", "svd")


# Rules with a diagonal per row.


class DrawRecorder(TrainerCallback):
    """Record the diagonal of each step."""

    def __init__(self, adapter: NestedAdapter) -> None:
        self.adapter = adapter
        self.draws: list[Tensor] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        diagonal = self.adapter.state.train_diagonal
        assert diagonal is not None
        self.draws.append(diagonal.q)


def expected_draw(step: int, batch_size: int) -> Tensor:
    p = RANK_PER_ROW.sample(NESTING, seed=0, step=step, batch_size=batch_size)
    return torch.from_numpy(p / NESTING.scale)


@pytest.mark.parametrize(
    "find_batch_size", [False, pytest.param(True, marks=pytest.mark.slow)], ids=str
)
def test_every_row_gets_its_rank(find_batch_size: bool, tmp_path: Path) -> None:
    adapter = make_adapter(RANK_PER_ROW)
    batch_sizes: list[int] = []

    def record_batch_size(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        batch_size = len(kwargs["input_ids"])
        if find_batch_size and batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        batch_sizes.append(batch_size)

    adapter.model.register_forward_pre_hook(record_batch_size, with_kwargs=True)
    trainer = make_trainer(
        "sft", adapter.model, tmp_path, adapter, auto_find_batch_size=find_batch_size
    )
    recorder = DrawRecorder(adapter)
    trainer.add_callback(recorder)
    trainer.train()
    batch_size = 2 if find_batch_size else 4
    assert batch_sizes[-3:] == [batch_size] * 3
    for step, q in enumerate(recorder.draws[-3:]):
        torch.testing.assert_close(q, expected_draw(step, batch_size))


def test_the_batch_size_of_a_resumed_run_is_that_of_its_arguments(tmp_path: Path) -> None:
    adapter = make_adapter(RANK_PER_ROW)
    recorder = DrawRecorder(adapter)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=6)
    state: Any = SimpleNamespace(train_batch_size=3, global_step=5)
    for batch_size in (6, 3):
        # With auto_find_batch_size, the Trainer restores the number.
        arguments.auto_find_batch_size = batch_size == 3
        adapter.callback().on_step_begin(arguments, state, TrainerControl())
        recorder.on_step_begin()
        torch.testing.assert_close(recorder.draws[-1], expected_draw(5, batch_size))


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_other_rows_than_those_of_the_batch(kind: str, tmp_path: Path) -> None:
    """DPO passes chosen and rejected rows together, twice as many."""
    adapter = make_adapter(RANK_PER_ROW)
    trainer = make_trainer(kind, adapter.model, tmp_path, adapter)
    if kind == "dpo":
        with pytest.raises(MatryoshkaError, match="4 rows"):
            trainer.train()
    else:
        trainer.train()


# Settings that are rejected before training.


def begin_training(adapter: NestedAdapter, arguments: Any) -> None:
    adapter.callback().on_train_begin(
        arguments, TrainerState(), TrainerControl(), model=adapter.model
    )


@pytest.mark.parametrize("option", [{"packing": True}, {"padding_free": True}], ids=str)
def test_packing_is_rejected_for_a_diagonal_per_row(option: dict[str, Any], tmp_path: Path) -> None:
    arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **option)
    begin_training(make_adapter("dylora"), arguments)
    with pytest.raises(MatryoshkaError, match="packs"):
        begin_training(make_adapter(RANK_PER_ROW), arguments)


@pytest.mark.parametrize(
    "state",
    [
        {"fsdp_plugin": SimpleNamespace(fsdp_version=1)},
        {
            "deepspeed_plugins": {"a": SimpleNamespace(zero_stage=3, selected=True)},
            "distributed_type": DistributedType.DEEPSPEED,
        },
    ],
    ids=["FSDP 1", "ZeRO-3"],
)
def test_sharding_that_saves_without_p_is_rejected(
    state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    Accelerator(cpu=True)  # by then, a Trainer has created one
    begin_training(make_adapter("matryoshka"), arguments)
    for name, value in state.items():
        for shared_state in (PartialState(), AcceleratorState()):
            monkeypatch.setitem(vars(shared_state), name, value)
    with pytest.raises(MatryoshkaError, match="ZeRO-3"):
        begin_training(make_adapter("matryoshka"), arguments)
    begin_training(make_adapter("lora"), arguments)


def test_several_gpus_in_one_process_are_rejected(tmp_path: Path) -> None:
    arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    begin_training(make_adapter("lora"), arguments)
    arguments._n_gpu = 2
    with pytest.raises(MatryoshkaError, match="accelerate launch"):
        begin_training(make_adapter("lora"), arguments)
