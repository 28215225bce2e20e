"""Make one training run, and measure an adapter."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import MatryoshkaError, NestedAdapter, NotFiniteError, nest
from matryoshka_lora.models import load_model, load_tokenizer
from research import facts, tasks
from research.runs import Job
from research.study import RECIPES, Study

Factors = dict[str, tuple[Tensor, Tensor]]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class AnswerTrainer(SFTTrainer):
    """Computes logits only before tokens with a label, which saves much of a step."""

    tokens = 0
    """The tokens of all gradient steps of this process, without padding."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss of the tokens that have a label."""
        wanted, targets, others = _answers(inputs)
        if torch.is_grad_enabled():
            AnswerTrainer.tokens += int(inputs["attention_mask"].sum())
        labels = targets[None]
        options = {
            "labels": labels,
            "shift_labels": labels,
            "num_items_in_batch": num_items_in_batch,
        }
        with _logits_only_at(model, wanted):
            return model(**others, use_cache=False, **options).loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: nothing of a run stays but its numbers."""


def _answers(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return where a token with a label is next, these tokens, and the other inputs."""
    labels = inputs["labels"]
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != -100
    others = {key: value for key, value in inputs.items() if key != "labels"}
    return wanted, labels[:, 1:][wanted[:, :-1]], others


@contextmanager
def _logits_only_at(model: Any, wanted: Tensor) -> Iterator[None]:
    """Make the model's logits one row: those at the wanted tokens, row after row."""

    def choose(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][wanted][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()


class Trained:
    """A trained adapter, and what a cut may use.

    Args:
        study: The study of the job.
        job: What was trained.
        factors: A and B of each layer, as training has left them.
        trainer: The Trainer that has trained them. Its ``eval_dataset`` holds the rows that judge.
        measured: The tokenised rows that are measured. No cut sees them.

    Raises:
        NotFiniteError: A factor is not finite.
    """

    def __init__(
        self, study: Study, job: Job, factors: Factors, trainer: AnswerTrainer, measured: Any
    ) -> None:
        self.study, self.job, self.factors = study, job, factors
        self.trainer, self.measured = trainer, measured
        self.ranks = study.nesting(job.rank)
        if not all(bool(one.isfinite().all()) for pair in factors.values() for one in pair):
            raise NotFiniteError("training diverged: a factor is not finite")
        self.parameters = sum(A.numel() + B.numel() for A, B in factors.values())

    def adapter(self) -> NestedAdapter:
        """Return a new model with the trained factors, in eval mode, for a cut to change.

        TRL has put a forward of its own into the Trainer's model, so a copy of that would not do.
        """
        adapter, _ = nested(self.study, self.job)
        adapter.put_factors(self.factors)
        adapter.model.eval()
        return adapter


@cache
def _base(model: str, layers: int | None, dtype: str) -> tuple[Any, Any]:
    found, tokenizer = load_model(model, DTYPES[dtype], device="cpu"), load_tokenizer(model)
    return (found, tokenizer) if layers is None else facts.cut(found, tokenizer, layers)


def nested(study: Study, job: Job) -> tuple[NestedAdapter, Any]:
    """Return a new nested adapter on a base model that shares its weights, and the tokenizer."""
    recipe = RECIPES[job.recipe]
    base, tokenizer = _base(study.model, study.layers, study.dtype)
    base = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
    modules: Any = list(study.modules) or "all-linear"
    config = LoraConfig(**recipe.lora(job.rank), target_modules=modules, task_type="CAUSAL_LM")
    ranks, rule = study.nesting(job.rank), recipe.rule or "lora"
    model = get_peft_model(base, config, autocast_adapter_dtype=not recipe.authors)
    if recipe.authors:
        for name, A in model.named_parameters():
            if "lora_A" in name:
                nn.init.uniform_(A, -(job.rank**-0.5), job.rank**-0.5)
    made = nest(model, ranks, recipe.scaling, rule, deploy="paper", seed=job.seed)
    return made, tokenizer


class _Parts(TrainerCallback):
    """Draws a rank for each micro-batch of a step. The first one has the draw of the step."""

    def __init__(self, adapter: NestedAdapter) -> None:
        self.adapter, self.part = adapter, 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.part = 0

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.part += 1
        self.adapter.draw(state.global_step + self.part * args.max_steps)


@contextmanager
def trainer_of(study: Study, job: Job) -> Iterator[tuple[NestedAdapter, AnswerTrainer, Any]]:
    """Give a job's nested adapter, its Trainer, ready to train, and the rows that are measured.

    Raises:
        MatryoshkaError: The job cannot be done, or TRL would leave a question out.
    """
    rows = {
        "train": tasks.train_rows(study, job.task, job.recipe, job.seed),
        "judge": tasks.judge_rows(study, job.task, job.recipe, job.seed),
        "measured": tasks.measured_rows(study, job.task, job.split, job.seed),
    }
    with tempfile.TemporaryDirectory() as folder, _silent():
        set_seed(job.seed)
        adapter, tokenizer = nested(study, job)
        held_out = {key: Dataset.from_list(rows[key]) for key in ("judge", "measured") if rows[key]}
        trainer = AnswerTrainer(
            model=adapter.model,
            args=arguments(study, job, folder),
            train_dataset=Dataset.from_list(rows["train"]),
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[adapter.callback(), *[_Parts(adapter)] * (RECIPES[job.recipe].parts > 1)],
        )
        kept = {"train": trainer.train_dataset, **trainer.eval_dataset}
        for name, data in kept.items():
            if len(data) < len(rows[name]):
                raise MatryoshkaError(
                    f"{len(rows[name]) - len(data)} rows of {name} have no token of their answer "
                    f"within max_length {trainer.args.max_length}: give training.max_length"
                )
        # Rows that are measured may decide nothing, so no cut finds them in the Trainer.
        trainer.eval_dataset = kept.get("judge")
        yield adapter, trainer, kept["measured"]


def arguments(study: Study, job: Job, folder: str) -> SFTConfig:
    """Return TRL's arguments; what is not the study's is as for every study."""
    parts = RECIPES[job.recipe].parts
    return SFTConfig(
        **{
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
            "bf16": False,  # autocast would round the float32 adapter too
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "use_cpu": True,
            **study.training,
            "per_device_train_batch_size": study.training["per_device_train_batch_size"] // parts,
            "gradient_accumulation_steps": parts,
            "max_steps": study.steps(job.recipe),
            "learning_rate": job.learning_rate,
            "seed": job.seed,
            "output_dir": folder,
        }
    )


@torch.no_grad()
def score(model: Any, trainer: AnswerTrainer, data: Any) -> tuple[float, float]:
    """Return the loss in nats per token of the answers, and the share of questions that are right.

    A question is right if greedy decoding would write all of its answer.

    Args:
        model: In eval mode.
        trainer: Its collator makes the batches.
        data: Tokenised rows.
    """
    nats, tokens, right, rows = 0.0, 0, 0, 0
    for batch in trainer.get_eval_dataloader(data):
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        wanted, targets, others = _answers(inputs)
        with _logits_only_at(model, wanted):
            logits = model(**others, use_cache=False).logits[0].float()
        each = logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
        row = wanted.nonzero()[:, 0]
        misses = torch.bincount(row[logits.argmax(dim=-1) != targets], minlength=len(wanted))
        nats, tokens = nats - float(each.double().sum()), tokens + len(targets)
        right, rows = right + int((misses == 0).sum()), rows + len(misses)
    return round(nats / tokens, 6), round(right / rows, 6)


@contextmanager
def _silent() -> Iterator[None]:
    """Hide the Trainer's lines and the libraries' bars."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # libraries warn about each other
        yield
