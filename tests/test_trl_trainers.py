"""TRL's Trainers on a nested adapter, from factors that are not zero.

What they must log is computed by plain PEFT: the same Trainer on an adapter between whose factors a hook puts p.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from accelerate import ParallelismConfig
from conftest import lora_config, nest_as, randomize, tiny_llama
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_chat import tiny_tokenizer
from torch import Tensor
from transformers import (
    DataCollatorWithFlattening,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.a2po import A2POConfig
from trl.experimental.sdpo.teacher_sync import PEFTAdapterEMACallback
from trl.trainer.utils import use_adapter

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, load
from matryoshka_lora.rules import RULES

S_R = 1.5
NESTING = Nesting([1, 2, 4], "sqrt", S_R)
P = oracle.trained_p([1, 2, 4], "sqrt", S_R)
TOKENIZER = tiny_tokenizer()
ROWS: dict[str, list[Any]] = {
    "prompt": [f"{a}+1=" for a in range(8)],
    "chosen": [f"{a + 1}" for a in range(8)],
    "rejected": [f"{a + 3}!" for a in range(8)],
    "completion": [f"{a + 1}" for a in range(8)],
    "label": [a % 2 == 0 for a in range(8)],
}


def variety(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward of many different letters."""
    return [float(len(set(completion))) for completion in completions]


SAMPLING = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
TRAINERS: dict[str, tuple[Any, Any, list[str], dict[str, Any]]] = {
    "sft": (SFTTrainer, SFTConfig, ["prompt", "completion"], {}),
    "dpo": (DPOTrainer, DPOConfig, ["prompt", "chosen", "rejected"], {}),
    "kto": (KTOTrainer, KTOConfig, ["prompt", "completion", "label"], {}),
    "reward": (RewardTrainer, RewardConfig, ["prompt", "chosen", "rejected"], {}),
    "grpo": (GRPOTrainer, GRPOConfig, ["prompt"], SAMPLING),
    "rloo": (RLOOTrainer, RLOOConfig, ["prompt"], SAMPLING),
}


def base_model(kind: str = "sft") -> Any:
    changes: dict[str, Any] = {"vocab_size": len(TOKENIZER), "num_hidden_layers": 1, "initializer_range": 0.1}
    ids = {"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    model = tiny_llama(**changes, **ids)
    if kind != "reward":
        return model
    torch.manual_seed(0)
    model.config.num_labels = 1
    return LlamaForSequenceClassification(model.config).eval()


def peft_model(kind: str = "sft", zero: bool = False) -> PeftModel:
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    model = get_peft_model(base_model(kind), lora_config(NESTING, task_type=task))
    if not zero:
        randomize(model, size=0.1)
    return model


def nested(kind: str = "sft", rule: str = "matryoshka", zero: bool = False, **options: Any) -> NestedAdapter:
    return nest_as(peft_model(kind, zero), NESTING, rule, **options)


def trainer_for(kind: str, model: Any, folder: Path, adapter: NestedAdapter | None = None, **changes: Any) -> Any:
    trainer_class, config_class, columns, options = TRAINERS[kind]
    rows = Dataset.from_dict({column: ROWS[column] for column in columns})
    arguments = {
        "output_dir": str(folder / "run"),
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
    evaluated = {"eval_dataset": rows} if "eval_strategy" in changes else {}
    return trainer_class(
        model,
        args=config_class(**{**arguments, **options, **changes}),
        train_dataset=rows,
        processing_class=TOKENIZER,
        callbacks=[] if adapter is None else [adapter.callback()],
        **({"reward_funcs": variety} if options else {}),
        **evaluated,
    )


def put_p_between(model: PeftModel, p: Tensor) -> None:
    """By a hook on A, before PEFT multiplies by s_R."""
    for name, module in model.named_modules():
        if name.endswith((".lora_A.default", ".lora_A.ref")):
            module.register_forward_hook(lambda _, __, hidden: hidden * (p / S_R).to(hidden.dtype))


def logged(trainer: Any) -> list[dict[str, float]]:
    """What a Trainer has logged of each step, without times."""
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "kl", "reward", "margin", "mean_reward")
    return [
        {key: value for key, value in entry.items() if key in names or key.startswith(("logps/", "rewards/"))}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.mark.parametrize("rule", ["lora", "matryoshka"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_each_trainer_logs_what_plain_peft_logs_with_p(kind: str, rule: str, tmp_path: Path) -> None:
    plain = peft_model(kind)
    theirs = trainer_for(kind, plain, tmp_path / "plain")
    if rule == "matryoshka":
        put_p_between(plain, P)
    set_seed(1)
    theirs.train()

    adapter = nested(kind, rule)
    ours = trainer_for(kind, adapter.model, tmp_path / "nested", adapter)
    set_seed(1)
    ours.train()

    expected = logged(theirs)
    assert len(expected) == 3
    assert expected[2]["loss"] != expected[0]["loss"] or kind == "rloo"
    for entry, right in zip(logged(ours), expected, strict=True):
        assert entry == pytest.approx(right, rel=1e-4, abs=1e-5)
    for (name, mine), (_, wanted) in zip(adapter.model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4, msg=name)


AT_REST: dict[str, dict[str, float]] = {
    "dpo": {"loss": math.log(2), "rewards/margins": 0, "rewards/chosen": 0},
    "kto": {"loss": 0.5, "kl": 0, "rewards/chosen": 0},
    "grpo": {"kl": 0},
    "rloo": {"kl": 0},
}
"""What is logged while the policy is its reference."""


@pytest.mark.parametrize(
    ("rule", "autocast"), [("matryoshka", False), ("matryoshka", True), ("dylora", False), ("dylora-frozen", False)]
)
@pytest.mark.parametrize("kind", AT_REST)
def test_a_policy_that_does_not_move_is_its_reference(kind: str, rule: str, autocast: bool, tmp_path: Path) -> None:
    """Where ranks are drawn, the reference has the rank of the step."""
    adapter = nested(kind, rule)
    options = {"learning_rate": 0.0, "bf16": autocast, "gradient_checkpointing": autocast}  # both are TRL's defaults
    trainer = trainer_for(kind, adapter.model, tmp_path, adapter, **options)
    trainer.train()
    for entry in logged(trainer):
        assert {key: entry[key] for key in AT_REST[kind]} == pytest.approx(AT_REST[kind], abs=1e-6)


def completion_loss(model: Any, tokenizer: Any) -> float:
    """The mean over the tokens of the answers to the first four rows."""
    losses = []
    for prompt, completion in zip(ROWS["prompt"][:4], ROWS["completion"][:4], strict=True):
        start, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + completion).input_ids
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        losses += (-log_probs.gather(1, ids[0, start:, None])).flatten().tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("rule", ["matryoshka", "lora", "dylora"])
def test_the_first_step_sees_the_function_that_eval_mode_has(rule: str, tmp_path: Path) -> None:
    """Without a word about it, before anything is reordered: the adapter at its largest rank."""
    adapter = nested(rule=rule)
    wanted = {"matryoshka": P, "lora": torch.full((4,), S_R), "dylora": torch.full((4,), S_R)}[rule]
    tensors = {k: v.clone() for k, v in plain_state(adapter).items()}
    expected = completion_loss(oracle.fold(base_model(), tensors, wanted), TOKENIZER)
    assert completion_loss(adapter.model.eval(), TOKENIZER) == pytest.approx(expected, abs=1e-5)
    if rule == "dylora":
        return
    rows = {"shuffle_dataset": False, "train_sampling_strategy": "sequential"}
    trainer = trainer_for("sft", adapter.model, tmp_path, adapter, max_steps=1, **rows)
    trainer.train()
    assert logged(trainer)[0]["loss"] == pytest.approx(expected, abs=1e-5)


def plain_state(adapter: NestedAdapter) -> dict[str, Tensor]:
    """PEFT's state dict of the adapter, with the names of its files."""
    found = {}
    for name, parameter in adapter.model.named_parameters():
        if ".default." in name:
            found[name.replace(".default.", ".")] = parameter.detach()
    return found


@pytest.mark.parametrize("rule", ["matryoshka", "lora", "dylora"])
def test_merging_gives_the_function_that_is_trained(rule: str) -> None:
    """As TRL does for vLLM."""
    adapter = nested(rule=rule)
    ids = torch.arange(4, 24).reshape(2, 10)
    trained = P if rule == "matryoshka" else torch.full((4,), S_R)
    expected = oracle.fold(base_model(), plain_state(adapter), trained)(ids).logits
    before = adapter.model.eval()(ids).logits
    adapter.model.merge_adapter()
    torch.testing.assert_close(adapter.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    adapter.model.unmerge_adapter()
    torch.testing.assert_close(adapter.model(ids).logits, before, rtol=1e-4, atol=1e-4)
    if rule == "matryoshka":
        adapter.model.train()
        torch.testing.assert_close(adapter.model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("late", [True, False])
def test_the_reference_needs_no_callback(late: bool, tmp_path: Path) -> None:
    adapter = nested("dpo")
    trainer = trainer_for("dpo", adapter.model, tmp_path, learning_rate=0.0)
    if late:
        trainer.add_callback(adapter.callback())
    trainer.train()
    assert [entry["loss"] for entry in logged(trainer)] == pytest.approx([math.log(2)] * 3, abs=1e-6)


def test_evaluation_between_the_steps_has_the_function_that_is_trained(tmp_path: Path) -> None:
    adapter = nested("dpo")
    trainer = trainer_for("dpo", adapter.model, tmp_path, adapter, learning_rate=5e-3)
    data = trainer.train_dataset
    before = trainer.evaluate(data)
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    after = trainer.evaluate(data)
    assert after["eval_loss"] < before["eval_loss"] - 0.02
    adapter.model.train()
    with torch.no_grad():
        batch = trainer._prepare_inputs(trainer.data_collator(list(data)))
        trained = trainer.compute_loss(adapter.model, batch).item()
    assert after["eval_loss"] == pytest.approx(trained, abs=1e-5)


def test_after_reordering_the_reference_is_still_what_training_began_from(tmp_path: Path) -> None:
    adapter = nested("dpo")
    trainer = trainer_for("dpo", adapter.model, tmp_path, adapter)
    adapter.reorder()  # before the reference was used for the first time
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    trainer.train()
    assert logged(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(trainer)[2]["loss"] < math.log(2) - 0.01


def test_a_resumed_run_has_the_reference_of_the_run_that_was_stopped(tmp_path: Path) -> None:
    def run(checkpoint: Path | None, steps: int) -> list[float]:
        adapter = nested("dpo")
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": steps, "lr_scheduler_type": "constant"}
        trainer = trainer_for("dpo", adapter.model, tmp_path, adapter, **options)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return [entry["loss"] for entry in logged(trainer)]

    whole = run(None, 4)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert run(checkpoint, 4) == pytest.approx(whole, abs=1e-6)
    assert whole[3] < whole[0] - 0.01
    # The reference in the checkpoint is a nested adapter as well.
    reference = load(base_model(), checkpoint / "ref")
    assert (reference.rule.name, reference.nesting, reference.state.reordered) == ("matryoshka", NESTING, "svd")
    began, kept = plain_state(nested("dpo")), load_file(checkpoint / "ref" / "trained.safetensors")
    assert all(torch.equal(kept[key], began[key]) for key in began)
    trained = load_file(checkpoint / "trained.safetensors")
    assert not any(torch.equal(trained[key], kept[key]) for key in trained)


def test_the_moving_average_of_self_distillation_has_p_too() -> None:
    """SDFT and SDPO keep it as adapter "teacher"; at rate 1 it is the student."""
    adapter = nested()
    callback = PEFTAdapterEMACallback(adapter.model, update_rate=1.0)
    nothing = SimpleNamespace(global_step=1)
    callback.on_train_begin(nothing, nothing, nothing)
    ids = torch.arange(4, 24).reshape(2, 10)
    for training in (True, False):
        adapter.model.train(training)
        callback.on_step_end(nothing, nothing, nothing)
        with torch.no_grad():
            student = adapter.model(ids).logits
            with use_adapter(adapter.model, "teacher"):
                assert torch.equal(adapter.model(ids).logits, student)
            with adapter.model.disable_adapter():
                assert not torch.equal(adapter.model(ids).logits, student)


def test_an_adapter_of_another_name_or_config_stays_plain() -> None:
    adapter = nested()
    ids = torch.arange(4, 24).reshape(2, 10)
    for name, config in (
        ("other", adapter.model.peft_config["default"]),
        ("ref", lora_config(NESTING, task_type="CAUSAL_LM", init_lora_weights="gaussian")),
    ):
        adapter.model.add_adapter(name, config)
        adapter.model.set_adapter(name)
        randomize(adapter.model, size=0.1)
        tensors = {k.replace(f".{name}.", "."): v for k, v in adapter.model.named_parameters() if f".{name}." in k}
        expected = oracle.fold(base_model(), tensors, torch.full((4,), S_R))(ids).logits
        torch.testing.assert_close(adapter.model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def logits_of(model: Any, adapter: str) -> Tensor:
    """Of one adapter; "default" is active before and after."""
    model.set_adapter(adapter)
    with torch.no_grad():
        found: Tensor = model(torch.arange(4, 24).reshape(2, 10)).logits
    model.set_adapter("default")
    return found


def add_copy(model: Any, name: str) -> None:
    model.add_adapter(name, model.peft_config["default"])
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.data.copy_(model.get_parameter(key.replace(f".{name}.", ".default.")).data)


@pytest.mark.parametrize("name", ["ref", "teacher"])
def test_an_adapter_that_was_there_before_is_no_copy(name: str) -> None:
    model: Any = peft_model().eval()
    model.add_adapter(name, model.peft_config["default"])
    randomize(model, seed=5, size=0.1)
    before = logits_of(model, name)
    adapter = nest_as(model, NESTING)
    for _ in range(2):
        assert torch.equal(logits_of(model, name), before)
        adapter.draw(0)
        adapter.reorder()
    model.delete_adapter(name)
    add_copy(model, name)  # as TRL does
    assert torch.equal(logits_of(model, name), logits_of(model, "default"))
    assert NestedAdapter(model, name).reordered


@pytest.mark.parametrize("name", ["ref", "teacher"])
@pytest.mark.parametrize("loaded", [True, False])
def test_an_adapter_with_factors_of_its_own_is_no_copy(name: str, loaded: bool, tmp_path: Path) -> None:
    """It may have the nested one's config, as a teacher of one's own has."""
    plain: Any = peft_model().eval()
    randomize(plain, seed=5, size=0.1)
    plain.save_pretrained(tmp_path)
    expected = logits_of(plain, "default")
    adapter = nested()
    model: Any = adapter.model.eval()
    if loaded:
        model.load_adapter(tmp_path, name)
    else:
        model.add_adapter(name, model.peft_config["default"])
        set_peft_model_state_dict(model, get_peft_model_state_dict(plain), adapter_name=name)
    for _ in range(2):
        torch.testing.assert_close(logits_of(model, name), expected, rtol=1e-4, atol=1e-4)
        adapter.draw(0)
        adapter.reorder()


@pytest.mark.parametrize("name", ["ref", "teacher"])
def test_a_copy_that_was_there_before_is_one(name: str) -> None:
    model: Any = peft_model().eval()
    add_copy(model, name)
    nest_as(model, NESTING)
    assert torch.equal(logits_of(model, name), logits_of(model, "default"))
    assert NestedAdapter(model, name).rule.name == "matryoshka"


@pytest.mark.parametrize(
    "options",
    [
        {"neftune_noise_alpha": 5.0},
        {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1},
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "greater_is_better": True,  # the highest loss, which is not the last one
        },
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_else_a_trainer_does_is_what_it_does_with_plain_peft(options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for adapter in (nested(), None):
        model = peft_model() if adapter is None else adapter.model
        trainer = trainer_for("sft", model, tmp_path / str(adapter is None), adapter, **options)
        if adapter is None:
            put_p_between(model, P)
        set_seed(1)
        trainer.train()
        losses = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]
        if "eval_strategy" in options:
            losses.append(trainer.evaluate()["eval_loss"])
        if "load_best_model_at_end" in options:
            assert losses[-1] == pytest.approx(trainer.state.best_metric, abs=1e-6)
            assert losses[-1] > losses[-2] + 0.01
        found.append(losses)
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_batch_that_was_halved_for_memory(tmp_path: Path) -> None:
    adapter = nested(rule="stratified")

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows = len(kwargs["input_ids"])
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert all(len(variant.gate(True).diagonal) == rows for _, _, variant in adapter.layers())

    adapter.model.register_forward_pre_hook(refuse, with_kwargs=True)
    trainer = trainer_for("sft", adapter.model, tmp_path, adapter, auto_find_batch_size=True)
    trainer.train()
    assert trainer.state.train_batch_size == 2


# What is refused.


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_precomputed_reference(kind: str, tmp_path: Path) -> None:
    """Right while B is zero, where every p gives the base model."""
    options: dict[str, Any] = {"precompute_ref_log_probs": True, "learning_rate": 0.0}
    adapter = nested(kind, zero=True)
    trainer = trainer_for(kind, adapter.model, tmp_path, adapter, **options)
    trainer.train()
    for entry in logged(trainer):
        assert entry["loss"] == pytest.approx(AT_REST[kind]["loss"], abs=1e-6)
    refused = pytest.raises(MatryoshkaError, match=r"not in its weights alone\. Set precompute_ref_log_probs=False")
    again = nested(kind)
    with refused:
        trainer_for(kind, again.model, tmp_path, again, **options)
    late = trainer_for(kind, nested(kind).model, tmp_path, **options)
    late.add_callback(NestedAdapter(late.model).callback())
    with refused:
        late.train()
    drawn = nested(kind, "dylora", zero=True)
    with pytest.raises(MatryoshkaError, match=r"'dylora' draws .*\. Set precompute_ref_log_probs=False"):
        trainer_for(kind, drawn.model, tmp_path, drawn, **options)


def test_a_precomputed_reference_of_plain_lora(tmp_path: Path) -> None:
    """Its weights alone say what it computes."""
    adapter = nested("dpo", "lora")
    trainer = trainer_for("dpo", adapter.model, tmp_path, adapter, precompute_ref_log_probs=True, learning_rate=0.0)
    trainer.train()
    assert [entry["loss"] for entry in logged(trainer)] == pytest.approx([math.log(2)] * 3, abs=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize(("option", "value"), [("num_iterations", 2), ("steps_per_generation", 2)])
def test_texts_that_are_sampled_for_several_draws(kind: str, option: str, value: int, tmp_path: Path) -> None:
    for rule in ("dylora", "matryoshka"):
        adapter = nested(kind, rule)
        trainer = trainer_for(kind, adapter.model, tmp_path, adapter, **{option: value})
        if rule == "matryoshka":
            trainer.train()
            continue
        with pytest.raises(MatryoshkaError, match="set steps_per_generation to gradient_accumulation_steps"):
            trainer.train()


def test_a_ratio_to_old_log_probabilities_is_one_before_the_first_step(tmp_path: Path) -> None:
    """A bf16 model without autocast, where training has a path of its own: TRL takes old ones without gradients."""
    ratios = []

    class Recording(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            ratios.append((torch.is_grad_enabled(), found[0].detach()))
            return found

    adapter = nested("grpo")
    for name, parameter in adapter.model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    TRAINERS["recording"] = (Recording, *TRAINERS["grpo"][1:])
    options = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.0, "beta": 0.0}
    trainer_for("recording", adapter.model, tmp_path, adapter, **options).train()
    assert [grad for grad, _ in ratios] == [False, True, True]
    old, first, second = ({tuple(row) for row in found.tolist()} for _, found in ratios)  # TRL shuffles the rows
    assert old == first == second
    assert len(old) == 4


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_order_is_learned_from_labels(kind: str, tmp_path: Path) -> None:
    adapter = nested(kind)
    trainer = trainer_for(kind, adapter.model, tmp_path, adapter, max_steps=1)
    trainer.train()
    if kind == "sft":
        adapter.reorder("learned", trainer, rows=12)
        assert adapter.state.reordered == "learned"
        return
    with pytest.raises(MatryoshkaError, match=r"have no labels .*adapter\.reorder\(\)"):
        adapter.reorder("learned", trainer)
    assert not adapter.reordered


def begin(adapter: NestedAdapter, arguments: Any, **kwargs: Any) -> None:
    adapter.callback().on_train_begin(arguments, SimpleNamespace(), SimpleNamespace(), **kwargs)


def test_vllm_gets_the_function_that_is_trained(tmp_path: Path) -> None:
    options = {"output_dir": str(tmp_path), "use_cpu": True, "use_vllm": True, "num_generations": 2, "bf16": False}
    arguments = GRPOConfig(**options, per_device_train_batch_size=2)
    adapter = nested()
    begin(adapter, arguments)
    adapter.set_rank(2)
    with pytest.raises(MatryoshkaError, match=r"rank 2 .*adapter.set_rank\(4\)"):
        begin(adapter, arguments)
    with pytest.raises(MatryoshkaError, match=r"vLLM gets .* with deploy='paper', .* leave deploy out in nest\(\)"):
        begin(nested(deploy="paper"), arguments)
    with pytest.raises(MatryoshkaError, match=r"rule 'dylora' .* set use_vllm=False"):
        begin(nested(rule="dylora"), arguments)
    arguments.use_vllm = False
    begin(nested(deploy="paper"), arguments)


def test_a2po_compares_with_a_copy_in_eval_mode(tmp_path: Path) -> None:
    arguments = A2POConfig(str(tmp_path), use_cpu=True, bf16=False)
    begin(nested(), arguments)
    with pytest.raises(MatryoshkaError, match=r"A2PO's reference gets .* leave deploy out in nest\(\)"):
        begin(nested(deploy="paper"), arguments)
    with pytest.raises(MatryoshkaError, match="A2PO's reference gets the adapter at its largest: take rule"):
        begin(nested(rule="dylora"), arguments)


def test_a_callback_of_what_is_not_trained(tmp_path: Path) -> None:
    adapter = nested()
    other = trainer_for("sft", nested().model, tmp_path, adapter)
    with pytest.raises(MatryoshkaError, match=r"give it adapter\.model"):
        other.train()
    adapter.model.add_adapter("second", lora_config(NESTING, task_type="CAUSAL_LM"))
    second = nest_as(adapter.model, NESTING, adapter="second")
    with pytest.raises(MatryoshkaError, match=r"'second' is not active, default is and would be trained"):
        trainer_for("sft", adapter.model, tmp_path, second).train()
    adapter.model.set_adapter("second")
    trainer_for("sft", adapter.model, tmp_path, second).train()


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_rank_for_each_row(kind: str, tmp_path: Path) -> None:
    """Elsewhere than in SFT, the rows of the batch are not the rows of the loss."""
    adapter = nested(kind, "stratified")
    trainer = trainer_for(kind, adapter.model, tmp_path, adapter)
    if kind == "sft":
        trainer.train()
        return
    with pytest.raises(MatryoshkaError, match="'stratified' gives each row a rank of its own"):
        trainer.train()
    adapter.reorder()  # plain LoRA from now on
    trainer.train()
    assert len(logged(trainer)) == 3


def rows_of_tokens() -> Dataset:
    return Dataset.from_dict({"input_ids": [[4 + a, 5, 6 + a] for a in range(8)]}).map(
        lambda row: {"labels": row["input_ids"]}
    )


def plain_trainer(adapter: NestedAdapter, folder: Path, collator: Any, **changes: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), use_cpu=True, max_steps=1, per_device_train_batch_size=4, report_to="none", **changes
    )
    return Trainer(
        adapter.model,
        arguments,
        train_dataset=rows_of_tokens(),
        data_collator=collator,
        callbacks=[adapter.callback()],
    )


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}], ids=str)
def test_flattened_batches(options: dict[str, bool], tmp_path: Path) -> None:
    flatten = DataCollatorWithFlattening(**options)
    with pytest.raises(MatryoshkaError, match="DataCollatorWithFlattening joins the rows"):
        plain_trainer(nested(rule="stratified"), tmp_path, flatten).train()
    # One of somebody's own is known by what it tells the model.
    with pytest.raises(MatryoshkaError, match="several sequences in one row"):
        plain_trainer(nested(rule="stratified"), tmp_path, lambda rows: flatten(rows)).train()
    plain_trainer(nested(rule="dylora"), tmp_path, flatten).train()
    plain_trainer(nested(rule="stratified"), tmp_path, lambda rows: flatten(rows[:1])).train()


@pytest.mark.parametrize(
    ("inputs", "refused"),
    [
        ({"position_ids": [[0, 1, 2, 0, 1, 2]]}, True),
        ({"position_ids": [[0, 1, 2, 3, 4, 5]]}, False),
        ({"position_ids": [[1, 1, 0, 1, 2, 3]], "attention_mask": [[0, 0, 1, 1, 1, 1]]}, False),
        ({"position_ids": [[0, 1, 2, 0, 1, 2]], "attention_mask": [[1, 1, 1, 1, 1, 1]]}, True),
        ({"position_ids": [[0, 1, 2, 0, 1, 2]] * 3}, False),
    ],
    ids=str,
)
def test_what_shows_that_rows_were_joined(inputs: dict[str, Any], refused: bool) -> None:
    adapter = nested(rule="stratified")
    adapter.draw(0, rows=3)
    adapter.model.train()
    given: dict[str, Tensor] = {name: torch.tensor(value) for name, value in inputs.items()}
    ids = torch.arange(4, 10).expand(len(given["position_ids"]), 6)

    def forward() -> Any:
        return adapter.model(ids, **given)

    if refused:
        with pytest.raises(MatryoshkaError, match=r"'stratified' .* take a data collator that pads"):
            forward()
        adapter.model.eval()
    forward()


def test_processes_that_share_rows(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    begin(nested(rule="stratified"), arguments)
    arguments.parallelism_config = ParallelismConfig(cp_size=2)
    with pytest.raises(MatryoshkaError, match="several processes have the same rows"):
        begin(nested(rule="stratified"), arguments)
    begin(nested(rule="dylora"), arguments)


def test_the_rows_of_a_resumed_run_are_those_of_its_arguments(tmp_path: Path) -> None:
    """Not those of the run that wrote the checkpoint, of which there would be too few."""
    adapter = nested(rule="stratified")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=6)
    state: Any = SimpleNamespace(train_batch_size=3, global_step=5)
    adapter.callback().on_step_begin(arguments, state, SimpleNamespace())
    variant = next(variant for _, _, variant in adapter.layers())
    assert torch.equal(variant.gate(True).diagonal, RULES["stratified"].draw(NESTING, 0, 5, 6).diagonal)
    arguments.auto_find_batch_size = True  # then the Trainer restores it
    adapter.callback().on_step_begin(arguments, state, SimpleNamespace())
    assert torch.equal(variant.gate(True).diagonal, RULES["stratified"].draw(NESTING, 0, 5, 3).diagonal)
