"""TRL's and transformers' Trainers on a nested adapter.

What they must log is computed by plain PEFT: the same Trainer on an adapter between whose factors a
hook puts p.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import lora_config, nest_as, randomize, tiny_llama
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny_chat import tiny_tokenizer
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting
from matryoshka_lora.nesting import RULES

S_R = 1.5
NESTING = Nesting((1, 2, 4), "sqrt", S_R)
P = oracle.trained_p([1, 2, 4], "sqrt", S_R)
TOKENIZER = tiny_tokenizer()
ROWS: dict[str, list[Any]] = {
    "prompt": [f"{a}+1=" for a in range(8)],
    "chosen": [f"{a + 1}" for a in range(8)],
    "rejected": [f"{a + 3}!" for a in range(8)],
    "completion": [f"{a + 1}" for a in range(8)],
}


def variety(completions: list[str], **kwargs: Any) -> list[float]:
    """Reward many different letters."""
    return [float(len(set(completion))) for completion in completions]


SAMPLING = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
TRAINERS: dict[str, tuple[Any, Any, list[str], dict[str, Any]]] = {
    "sft": (SFTTrainer, SFTConfig, ["prompt", "completion"], {}),
    "dpo": (DPOTrainer, DPOConfig, ["prompt", "chosen", "rejected"], {}),
    "grpo": (GRPOTrainer, GRPOConfig, ["prompt"], SAMPLING),
}
AT_REST: dict[str, dict[str, float]] = {
    "dpo": {"loss": math.log(2), "rewards/margins": 0, "rewards/chosen": 0},
    "grpo": {"kl": 0},
}
"""What is logged while the policy is its reference."""


def peft_model(zero: bool = True, **lora: Any) -> PeftModel:
    changes = {"vocab_size": len(TOKENIZER), "num_hidden_layers": 1, "initializer_range": 0.1}
    ids = {"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    config = lora_config(NESTING, task_type="CAUSAL_LM", **lora)
    torch.manual_seed(3)  # of A
    model = get_peft_model(tiny_llama(**changes, **ids), config)
    if not zero:
        randomize(model, size=0.1)
    return model


def nested(rule: str = "matryoshka", zero: bool = True, **options: Any) -> NestedAdapter:
    adapter = nest_as(peft_model(**options), NESTING, rule)
    if not zero:
        randomize(adapter.model, size=0.1)
    return adapter


def trainer_for(
    kind: str, model: Any, folder: Path, adapter: NestedAdapter | None = None, **changes: Any
) -> Any:
    trainer_class, config_class, columns, options = TRAINERS[kind]
    rows = Dataset.from_dict({column: ROWS[column] for column in columns})
    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    set_seed(0)
    return trainer_class(
        model,
        args=config_class(**{**arguments, **options, **changes}),
        train_dataset=rows,
        processing_class=TOKENIZER,
        callbacks=[] if adapter is None else [adapter.callback()],
        **({"reward_funcs": variety} if options else {}),
        **({"eval_dataset": rows} if "eval_strategy" in changes else {}),
    )


def put_p_between(model: PeftModel, p: Tensor) -> None:
    """Multiply after A, before PEFT multiplies by s_R."""
    for name, module in model.named_modules():
        if name.endswith((".lora_A.default", ".lora_A.ref")):
            module.register_forward_hook(lambda _, __, hidden: hidden * (p / S_R).to(hidden.dtype))


def logged(trainer: Any) -> list[dict[str, float]]:
    """Return what a Trainer has logged of each step, without times."""
    names = ("loss", "eval_loss", "grad_norm", "entropy", "mean_token_accuracy", "kl", "reward")
    return [
        {k: v for k, v in entry.items() if k in names or k.startswith(("logps/", "rewards/"))}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "plainly": {},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "neftune": {"neftune_noise_alpha": 5.0},
    "best": {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "greater_is_better": True,  # the highest loss, which is not the last one
    },
}
CASES = [(kind, "plainly") for kind in TRAINERS] + [("sft", option) for option in OPTIONS]


@pytest.mark.parametrize("rule", ["lora", "matryoshka"])
@pytest.mark.parametrize(("kind", "option"), dict.fromkeys(CASES))
def test_a_trainer_logs_what_it_logs_for_plain_peft(
    kind: str, option: str, rule: str, tmp_path: Path
) -> None:
    found: list[Any] = []
    for adapter in (None, nested(rule)):
        model = peft_model() if adapter is None else adapter.model
        folder = tmp_path / str(adapter is None)
        trainer = trainer_for(kind, model, folder, adapter, **OPTIONS[option])
        if adapter is None and rule == "matryoshka":
            put_p_between(model, P)
        set_seed(1)
        trainer.train()
        entries = logged(trainer)
        if option == "best":
            entries.append(trainer.evaluate())
            assert entries[-1]["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
            assert entries[-1]["eval_loss"] > entries[-2]["eval_loss"] + 0.01
            entries[-1] = {"eval_loss": entries[-1]["eval_loss"]}
        found.append((entries, dict(model.named_parameters())))
    (expected, theirs), (entries, ours) = found
    assert len(expected) >= 3
    assert expected[0] != expected[2]
    first = expected[0].keys() & {"loss", "eval_loss"}
    if rule == "lora":  # step 0 to the last digit
        assert [entries[0][key] for key in first] == [expected[0][key] for key in first]
    for entry, right in zip(entries, expected, strict=True):
        assert entry == pytest.approx(right, rel=1e-4, abs=1e-5)
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("rule", ["matryoshka", "dylora", "dylora-frozen"])
@pytest.mark.parametrize("kind", AT_REST)
@pytest.mark.parametrize("half", [False, True])
def test_a_policy_that_does_not_move_is_its_reference(
    kind: str, rule: str, half: bool, tmp_path: Path
) -> None:
    adapter = nested(rule)
    options = {"learning_rate": 0.0, "bf16": half, "gradient_checkpointing": half}
    trainer = trainer_for(kind, adapter.model, tmp_path, adapter, **options)
    trainer.train()
    for entry in logged(trainer):
        assert {key: entry[key] for key in AT_REST[kind]} == pytest.approx(AT_REST[kind], abs=1e-6)


def test_the_reference_of_a_reordered_adapter_is_the_adapter(tmp_path: Path) -> None:
    """TRL copies factors that are trained into an adapter of its own."""
    adapter = nested(zero=False)
    adapter.reorder()
    trainer = trainer_for("dpo", adapter.model, tmp_path, adapter)
    trainer.train()
    assert logged(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(trainer)[2]["loss"] < math.log(2) - 0.001


def test_a_reference_without_p_is_refused(tmp_path: Path) -> None:
    adapter = nested(zero=False)
    with pytest.raises(MatryoshkaError, match="is a copy of the factors without P"):
        trainer_for("dpo", adapter.model, tmp_path, adapter).train()


@pytest.mark.parametrize("why", ["inactive", "model_init"])
def test_a_trainer_that_trains_something_else_is_refused(why: str, tmp_path: Path) -> None:
    adapter, other = nested(), nested().model
    trained = other if why == "model_init" else adapter.model
    if why == "inactive":
        trained.add_adapter("other", lora_config(NESTING))
        trained.set_adapter("other")
    with pytest.raises(MatryoshkaError, match="the Trainer does not train this adapter"):
        trainer_for("sft", trained, tmp_path, adapter).train()


@pytest.mark.parametrize(
    "batch", [{}, pytest.param({"auto_find_batch_size": True}, marks=pytest.mark.slow)], ids=str
)
def test_stratified_gives_every_row_its_rank(batch: dict[str, Any], tmp_path: Path) -> None:
    adapter = nested("stratified")
    seen = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows = len(kwargs["input_ids"])
        if batch and rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.append(rows)

    adapter.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer = trainer_for("sft", adapter.model, tmp_path, adapter, **batch)
    draws: list[Tensor] = []
    trainer.add_callback(recorder(adapter, draws))
    trainer.train()
    size = 2 if batch else 4
    assert seen[-3:] == [size] * 3
    for step, q in enumerate(draws[-3:]):
        torch.testing.assert_close(q, RULES["stratified"].draw(NESTING, 0, step, size) / S_R)


def recorder(adapter: NestedAdapter, seen: list[Tensor]) -> Any:
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            layer = next(m for m in adapter.model.modules() if hasattr(m, "lora_variant"))
            seen.append(layer.lora_variant["default"].shared.training.q)

    return Recorder()


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_rows_of_another_trainer_are_not_taken_for_those_of_the_batch(
    kind: str, tmp_path: Path
) -> None:
    """DPO passes chosen and rejected rows together, twice as many."""
    adapter = nested("stratified")
    trainer = trainer_for(kind, adapter.model, tmp_path, adapter)
    if kind == "dpo":
        with pytest.raises(MatryoshkaError, match="4 rows have a rank each"):
            trainer.train()
    else:
        trainer.train()


def begin(adapter: NestedAdapter, arguments: Any) -> None:
    model = adapter.model
    adapter.callback().on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)


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
def test_sharding_that_saves_without_p_is_refused(
    state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    Accelerator(cpu=True)  # a Trainer has made one by then
    begin(nested("matryoshka"), arguments)
    for name, value in state.items():
        for shared in (PartialState(), AcceleratorState()):
            monkeypatch.setitem(vars(shared), name, value)
    with pytest.raises(MatryoshkaError, match="ZeRO-3 and FSDP 1 save the factors without P"):
        begin(nested("matryoshka"), arguments)
    begin(nested("lora"), arguments)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    begin(nested("lora"), arguments)
    packed: Any = SFTConfig(str(tmp_path), use_cpu=True, packing=True)
    with pytest.raises(MatryoshkaError, match="packed rows cannot have a rank each"):
        begin(nested("stratified"), packed)
    arguments._n_gpu = 2
    with pytest.raises(MatryoshkaError, match="accelerate launch"):
        begin(nested("lora"), arguments)


def test_the_rows_of_a_resumed_run_are_those_of_its_arguments(tmp_path: Path) -> None:
    adapter = nested("stratified")
    seen: list[Tensor] = []
    look = recorder(adapter, seen)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=6)
    state: Any = SimpleNamespace(train_batch_size=3, global_step=5)
    for rows in (6, 3):
        arguments.auto_find_batch_size = rows == 3  # then the Trainer restores the number
        adapter.callback().on_step_begin(arguments, state, TrainerControl())
        look.on_step_begin()
        torch.testing.assert_close(seen[-1], RULES["stratified"].draw(NESTING, 0, 5, rows) / S_R)
