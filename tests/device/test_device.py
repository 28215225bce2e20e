"""Training, ranks and evaluation on a device, compared with the CPU in float32.

``MATRYOSHKA_TEST_DEVICE`` names the device, and without it nothing runs:

    make test-device    # xla: torch_xla on a CPU, in an environment of its own
    make gpu            # cuda

With ``cpu``, everything runs that needs no CUDA, as a check of the tests themselves.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.examples import Example, RecordingTrainer, collate, lookup_examples, make_trainer
from helpers.models import lora_config, nest_as, randomize, tiny_llama
from helpers.plain_peft import IDS, best, distance, logits, updates
from helpers.rules import RANK_PER_ROW
from helpers.tiny_chat import tiny_tokenizer
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import (
    NestedAdapter,
    Nesting,
    Rule,
    TrainRanksResult,
    evaluate,
    extract,
    load,
)
from matryoshka_lora.evaluation.engine import Engine, Scores

DEVICE_TYPE = os.environ.get("MATRYOSHKA_TEST_DEVICE")
if DEVICE_TYPE is None:
    pytest.skip("MATRYOSHKA_TEST_DEVICE is not set", allow_module_level=True)
if DEVICE_TYPE == "xla":
    importlib.import_module("torch_xla")  # adds the device to torch

pytestmark = pytest.mark.timeout(1800)  # XLA compiles most steps

# autograd counts the devices at its first backward, so one of XLA must exist before.
DEVICE = torch.ones(1, device=DEVICE_TYPE).device
CPU = torch.device("cpu")
NESTING = Nesting((1, 2, 4, 8), "none", 0.7)
TARGETS = ["q_proj", "o_proj", "down_proj"]
RANKS = range(1, 9)
RULES: dict[str, str | Rule] = {
    "lora": "lora",
    "matryoshka": "matryoshka",
    "dylora": "dylora",
    "rank per row": RANK_PER_ROW,
}
RecordProperty = Callable[[str, object], None]
EXAMPLES = lookup_examples(400)
VALIDATION = lookup_examples(16, seed=1)
ROUNDING = 1e-4
"""By how much results in float32 may differ between devices, relative to their norm."""

not_xla = pytest.mark.skipif(DEVICE_TYPE == "xla", reason="not for XLA")
only_cuda = pytest.mark.skipif(DEVICE_TYPE != "cuda", reason="needs CUDA")


def new_base(device: torch.device, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a Llama of one layer. It is small because XLA takes long to compile."""
    return tiny_llama(num_hidden_layers=1, **changes).to(device, dtype)


def new_peft_model(base: Any, **changes: Any) -> PeftModel:
    """Return a model with the same random factors on every device, not nested."""
    config = lora_config(NESTING, target_modules=TARGETS, **changes)
    model = get_peft_model(base, config)
    randomize(model)
    return model.eval()


def new_adapter(
    device: torch.device, rule: str | Rule = "lora", dtype: torch.dtype = torch.float32
) -> NestedAdapter:
    model = get_peft_model(new_base(device, dtype), lora_config(NESTING, target_modules=TARGETS))
    adapter = nest_as(model.eval(), NESTING, rule)
    randomize(model)  # the rule "matryoshka" rejects factors that are trained already
    return adapter


def ordered_adapter(device: torch.device, dtype: torch.dtype = torch.float32) -> NestedAdapter:
    adapter = new_adapter(device, dtype=dtype)
    adapter.reorder()
    return adapter


def logits_by_rank(adapter: NestedAdapter) -> Tensor:
    outputs: list[Tensor] = []
    for rank in RANKS:
        adapter.set_rank(rank)
        outputs.append(logits(adapter.model))
    return torch.stack(outputs)


@cache
def expected_logits() -> Tensor:
    """The logits of every rank on the CPU."""
    return logits_by_rank(ordered_adapter(CPU))


def is_close(actual: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> bool:
    return distance(actual.cpu().double(), expected.double()) <= tolerance


def largest_difference(actual: Iterable[float], expected: Iterable[float]) -> float:
    """Return the largest difference of two lists of losses, relative to the loss."""
    return max(abs(a - e) / e for a, e in zip(actual, expected, strict=True))


def gradients(model: Any) -> Tensor:
    """Return all gradients in a vector."""
    tensors = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(tensors).cpu().double()


def disable_fused_operation(adapter: NestedAdapter) -> None:
    """Add a hook to each layer, which the fused operation would not call."""
    for module in adapter.layers.values():
        module.lora_A[adapter.name].register_forward_hook(lambda *_: None)


# Training


def train(adapter: NestedAdapter, num_steps: int = 3) -> tuple[list[float], Tensor]:
    """Return the loss of each step, and the gradients of the first."""
    ids = IDS.to(adapter.model.device)
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses: list[float] = []
    for step in range(num_steps):
        adapter.draw(step, batch_size=len(ids))
        loss = adapter.model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 0:
            first_gradients = gradients(adapter.model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first_gradients


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_training_steps(rule: str, fused: bool, record_property: RecordProperty) -> None:
    losses: dict[torch.device, list[float]] = {}
    first_gradients: dict[torch.device, Tensor] = {}
    for device in (CPU, DEVICE):
        adapter = new_adapter(device, RULES[rule])
        if not fused:
            disable_fused_operation(adapter)
        losses[device], first_gradients[device] = train(adapter)
    difference = largest_difference(losses[DEVICE], losses[CPU])
    record_property("difference of losses", difference)
    assert difference <= ROUNDING
    assert losses[CPU][-1] < losses[CPU][0]
    assert is_close(first_gradients[DEVICE], first_gradients[CPU])


def test_a_step_ends_the_order() -> None:
    adapter = ordered_adapter(DEVICE)
    assert adapter.order == "svd"
    train(adapter, num_steps=1)
    assert adapter.order is None


@not_xla
def test_a_step_of_a_fused_optimizer_ends_the_order() -> None:
    """It changes no version counter of the factors."""
    adapter = ordered_adapter(DEVICE)
    ids = IDS.to(DEVICE)
    adapter.model(input_ids=ids, labels=ids).loss.backward()
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    torch.optim.AdamW(parameters, lr=1e-5, fused=True).step()
    assert adapter.order is None


class GradientRecorder(TrainerCallback):
    """Records the gradients of the last step of a Trainer."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.gradients = gradients(kwargs["model"])


def gradients_in_trl(model: Any, folder: Path, **arguments: Any) -> Tensor:
    """Return the gradients of a step with TRL's defaults: bf16 autocast and checkpointing."""
    rows = [{"prompt": f"{a} + {a} =", "completion": f" {2 * a}"} for a in range(8)]
    config = SFTConfig(
        str(folder),
        max_steps=1,
        max_grad_norm=0,  # no clipping
        use_cpu=DEVICE_TYPE == "cpu",
        save_strategy="no",
        report_to="none",
        **arguments,
    )
    recorder = GradientRecorder()
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        callbacks=[recorder],
    )
    trainer.train()
    return recorder.gradients


@not_xla
def test_a_step_as_trl_runs_it(tmp_path: Path) -> None:
    """The gradients are as close to those in float32 as PEFT's are."""
    results: dict[str, Tensor] = {}
    for name in ("float32", "PEFT", "nested, fused", "nested, PEFT's forward"):
        base = new_base(DEVICE, vocab_size=len(tiny_tokenizer()), initializer_range=0.05)
        model = new_peft_model(base, task_type="CAUSAL_LM")
        if name.startswith("nested"):
            adapter = nest_as(model, NESTING, "lora")
            if name != "nested, fused":
                disable_fused_operation(adapter)
        arguments = {"bf16": False, "gradient_checkpointing": False} if name == "float32" else {}
        results[name] = gradients_in_trl(model, tmp_path, **arguments)
    expected = results.pop("float32")
    errors = {name: distance(result, expected) for name, result in results.items()}
    assert 1e-4 < errors["PEFT"] < 0.05
    assert max(errors.values()) <= 1.5 * errors["PEFT"]


@only_cuda
def test_a_step_needs_less_memory_than_with_peft() -> None:
    """Of a model in bf16, without checkpointing."""
    peaks: dict[str, int] = {}
    ids = torch.arange(8 * 1024, device=DEVICE).reshape(8, 1024) % 96
    for name in ("warm-up", "PEFT", "nested"):
        base = new_base(DEVICE, torch.bfloat16, max_position_embeddings=1024)
        model = new_peft_model(base)
        if name == "nested":
            nest_as(model, NESTING, "lora")
        model.train()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(input_ids=ids, labels=ids).loss.backward()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        del base, model
    assert peaks["nested"] < peaks["PEFT"]


@cache
def trained_factors() -> dict[str, tuple[Tensor, Tensor]]:
    """Factors that have learned a part of the completions at rank R."""
    adapter = new_adapter(CPU)
    randomize(adapter.model, size=0.05)
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    adapter.model.train()
    for step in range(60):
        batch = [EXAMPLES[(step * 80 + i) % len(EXAMPLES)] for i in range(80)]
        adapter.model(**collate(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter.factors.copy()


def test_train_ranks_of_examples(record_property: RecordProperty) -> None:
    results: dict[torch.device, TrainRanksResult] = {}
    for device in (CPU, DEVICE):
        adapter = new_adapter(device)
        adapter.factors.write(trained_factors())
        result = adapter.train_ranks(EXAMPLES, eval_data=VALIDATION, max_examples=48)
        assert result.outcome == "kept"
        assert adapter.small_rank > 0
        results[device] = result
    actual, expected = results[DEVICE], results[CPU]
    assert actual.examples_by_rank == expected.examples_by_rank
    for name in ("losses_before", "losses_after"):
        losses = getattr(actual, name).values()
        difference = largest_difference(losses, getattr(expected, name).values())
        record_property(f"difference of {name}", difference)
        assert difference <= ROUNDING


def losses_without_trainer(adapter: NestedAdapter, batches: list[list[Example]]) -> list[float]:
    """Return the loss of each step of a plain loop on the CPU."""
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0)
    losses: list[float] = []
    for step, batch in enumerate(batches):
        adapter.draw(step, batch_size=len(batch))
        loss = adapter.model(**collate(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trainer_of(adapter: NestedAdapter, folder: Path) -> RecordingTrainer:
    """Return a Trainer of three steps, which moves the model to the device."""
    trainer = make_trainer(
        adapter.model,
        folder,
        EXAMPLES,
        VALIDATION,
        use_cpu=DEVICE_TYPE == "cpu",
        max_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0,  # no clipping
        logging_steps=1,
        # The default is a fused optimizer, which XLA lacks.
        optim="adamw_torch" if DEVICE_TYPE == "xla" else "adamw_torch_fused",
        dataloader_pin_memory=False,
    )
    trainer.add_callback(adapter.callback())
    return trainer


@pytest.mark.parametrize("rule", ["lora", "dylora"])
def test_trainer(rule: str, tmp_path: Path, record_property: RecordProperty) -> None:
    """With the callback. With torch_xla, a Trainer never uses the CPU, so a loop is compared."""
    adapter = new_adapter(CPU, rule)
    trainer = trainer_of(adapter, tmp_path)
    trainer.train()
    assert adapter.model.device.type == DEVICE_TYPE
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    examples_by_tokens = {tuple(example["input_ids"]): example for example in EXAMPLES}
    examples = [examples_by_tokens[tokens] for tokens in trainer.trained_on]
    batches = [examples[start : start + 8] for start in range(0, len(examples), 8)]
    expected = losses_without_trainer(new_adapter(CPU, rule), batches)
    difference = largest_difference(losses, expected)
    record_property("difference of losses", difference)
    assert len(losses) == 3
    assert difference <= ROUNDING


@pytest.mark.filterwarnings("ignore:The trained ranks")
def test_train_ranks_of_a_trainer(tmp_path: Path) -> None:
    """The Trainer's own batches and loss."""
    adapter = new_adapter(CPU)
    adapter.factors.write(trained_factors())
    trainer = trainer_of(adapter, tmp_path)
    result = adapter.train_ranks(trainer, max_examples=8)
    cpu_adapter = new_adapter(CPU)
    cpu_adapter.factors.write(trained_factors())
    expected = cpu_adapter.train_ranks(EXAMPLES, eval_data=VALIDATION, max_examples=8)
    assert result.losses_before == pytest.approx(expected.losses_before, rel=ROUNDING)
    assert result.losses_after == pytest.approx(expected.losses_after, rel=ROUNDING)


# Ranks


def test_reorder() -> None:
    results = {device: new_adapter(device).reorder() for device in (CPU, DEVICE)}
    assert results[DEVICE].errors == pytest.approx(results[CPU].errors, rel=ROUNDING)
    for name, values in results[CPU].singular_values.items():
        np.testing.assert_allclose(results[DEVICE].singular_values[name], values, rtol=ROUNDING)
    adapter = ordered_adapter(DEVICE)
    assert adapter.order == "svd"
    assert is_close(logits_by_rank(adapter), expected_logits())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_ranks_in_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    adapter = ordered_adapter(DEVICE, dtype)
    assert is_close(logits_by_rank(adapter), expected_logits(), tolerance)


def test_an_adapter_that_is_moved_keeps_its_order() -> None:
    adapter = ordered_adapter(CPU)
    adapter.model.to(DEVICE)
    assert adapter.order == "svd"
    assert is_close(logits_by_rank(adapter), expected_logits())
    train(adapter, num_steps=1)
    assert adapter.order is None


def test_rows() -> None:
    adapter = ordered_adapter(DEVICE)
    with adapter.rows([2, 5]):
        output = logits(adapter.model)
    assert is_close(output, torch.stack([expected_logits()[1, 0], expected_logits()[4, 1]]))


@not_xla
def test_compiled_model() -> None:
    """All ranks run in the same compiled graph."""
    adapter = ordered_adapter(DEVICE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled_model = torch.compile(adapter.model, dynamic=False)
        for rank in (2, 8):
            adapter.set_rank(rank)
            assert is_close(logits(compiled_model), expected_logits()[rank - 1])
    torch.compiler.reset()


def generate(adapter: NestedAdapter) -> Tensor:
    output: Tensor = adapter.model.generate(
        input_ids=IDS.to(adapter.model.device), max_new_tokens=4, do_sample=False
    )
    return output.cpu()


def test_generate() -> None:
    """At one rank, and at a rank for each row."""
    expected: dict[int, Tensor] = {}
    cpu_adapter = ordered_adapter(CPU)
    adapter = ordered_adapter(DEVICE)
    for rank in (1, 4, 8):
        cpu_adapter.set_rank(rank)
        adapter.set_rank(rank)
        expected[rank] = generate(cpu_adapter)
        assert torch.equal(generate(adapter), expected[rank])
    assert not torch.equal(expected[1], expected[8])
    with cpu_adapter.rows([1, 8]):
        expected_rows = generate(cpu_adapter)
    with adapter.rows([1, 8]):
        assert torch.equal(generate(adapter), expected_rows)


def test_merge_and_unmerge() -> None:
    adapter = ordered_adapter(DEVICE)
    adapter.set_rank(3)
    adapter.model.merge_adapter()
    assert is_close(logits(adapter.model), expected_logits()[2])
    adapter.model.unmerge_adapter()
    assert is_close(logits_by_rank(adapter), expected_logits())
    adapter.set_rank(3)
    assert is_close(logits(adapter.model.merge_and_unload()), expected_logits()[2])


# Files


@pytest.mark.parametrize("rule", ["lora", "matryoshka"])
def test_save_and_load(rule: str, tmp_path: Path) -> None:
    """Factors without an order are reordered on the way."""
    for device in (CPU, DEVICE):
        new_adapter(device, rule).save(tmp_path / device.type, force=True)
    cpu_adapter = load(new_base(CPU), tmp_path / "cpu")
    expected = logits_by_rank(cpu_adapter)
    adapter = load(new_base(DEVICE), tmp_path / DEVICE.type)
    assert adapter.order == "svd"
    assert is_close(logits_by_rank(adapter), expected)
    loaded_at_rank = load(new_base(DEVICE), tmp_path / "cpu", rank=4)
    assert is_close(logits(loaded_at_rank.model), expected[3])


def test_peft_reads_an_export(tmp_path: Path) -> None:
    ordered_adapter(DEVICE).export(tmp_path / "rank-4", 4)
    model = PeftModel.from_pretrained(new_base(DEVICE), str(tmp_path / "rank-4"))
    assert is_close(logits(model), expected_logits()[3])


@not_xla
def test_extract(tmp_path: Path) -> None:
    """It computes on a CUDA device if there is one, and otherwise on the CPU."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    tuned = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "down_proj" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    tuned.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", rank=4)
    old = load_file(tmp_path / "base/model.safetensors")
    new = load_file(tmp_path / "tuned/model.safetensors")
    extracted = updates(tmp_path / "lora")
    assert len(extracted) == 2
    for name, update in extracted.items():
        change = (new[name].double() - old[name].double()).numpy()
        expected = torch.from_numpy(best(change, 4))
        assert is_close(torch.from_numpy(update), expected)


# Evaluation


def test_evaluate_at_all_ranks() -> None:
    tokenizer = tiny_tokenizer()
    data = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(3) for b in (1, 2)]
    answers = {}
    for device in (CPU, DEVICE):
        model = new_peft_model(new_base(device, vocab_size=len(tokenizer)))
        adapter = nest_as(model, NESTING, "lora")
        adapter.reorder()
        evaluation = evaluate(
            adapter, data=data, ranks="all", tokenizer=tokenizer, base_model="tiny", progress=False
        )
        assert evaluation.ranks == tuple(RANKS)
        answers[device] = [example.answers for example in evaluation.examples]
    assert len(answers[CPU]) == len(data)
    assert answers[DEVICE] == answers[CPU]


def score(adapter: NestedAdapter) -> Scores:
    """Return the log-likelihoods of continuations at all ranks."""
    engine = Engine(adapter, [0, *RANKS])
    assert engine.is_supported(tuple(range(3, 16)))
    requests = [
        ((3, 4, 5, 6), (7,)),
        ((3, 4, 5, 6), (8, 9, 10)),
        ((3, 4, 5, 11, 12), (13, 14)),
        ((3, 4), (15, 16)),
    ]
    return engine.score(requests, lambda _: None)


def test_log_likelihoods_at_all_ranks() -> None:
    scores = score(ordered_adapter(DEVICE))
    expected = score(ordered_adapter(CPU))
    np.testing.assert_allclose(scores.logprobs, expected.logprobs, rtol=ROUNDING)
    assert np.array_equal(scores.is_greedy, expected.is_greedy)
