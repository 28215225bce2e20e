"""Train an adapter of a study, and measure it."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from typing import Any, Literal

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import MatryoshkaError, NestedAdapter, NotFiniteError, Rule, nest
from matryoshka_lora.peft.base_model import load_model, load_tokenizer
from research import facts, tasks
from research.rules import RULES, TRUNCATED_LORA, LastColumn, dylora_in_parts
from research.runs import Job
from research.study import RECIPES, Study

Factors = dict[str, tuple[Tensor, Tensor]]
"""A, shape (R, in), and B, shape (out, R), of each layer."""


class AnswerTrainer(SFTTrainer):
    """Computes logits only for tokens with a label, which makes a step much faster."""

    num_tokens = 0
    """The tokens of all gradient steps of this process, without padding."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss of the tokens with a label."""
        is_before_target, targets, model_inputs = _answers(inputs)
        if torch.is_grad_enabled():
            AnswerTrainer.num_tokens += int(inputs["attention_mask"].sum())
        labels = targets[None]
        with _logits_only_at(model, is_before_target):
            return model(
                **model_inputs,
                use_cache=False,
                labels=labels,
                shift_labels=labels,
                num_items_in_batch=num_items_in_batch,
            ).loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: only the numbers of a run are kept."""


def _answers(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return where the next token has a label, these next tokens, and the other inputs."""
    labels = inputs["labels"]
    is_before_target = torch.zeros_like(labels, dtype=torch.bool)
    is_before_target[:, :-1] = labels[:, 1:] != -100
    model_inputs = {key: value for key, value in inputs.items() if key != "labels"}
    return is_before_target, labels[:, 1:][is_before_target[:, :-1]], model_inputs


@contextmanager
def _logits_only_at(model: Any, mask: Tensor) -> Iterator[None]:
    """Compute the logits only where a mask is true, as a single row: row after row."""

    def select(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][mask][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


class Trained:
    """A trained adapter, and what a deployment may use.

    Args:
        study: The study of the job.
        job: The training run.
        factors: A and B of each layer after training.
        trainer: The Trainer that has trained them. Its ``eval_dataset`` has the examples that
            decide whether trained ranks are kept; it is None for facts.
        measured: The tokenized examples to measure on, which no deployment uses.

    Attributes:
        details: More values to record next to the cost of a deployment, by its name.

    Raises:
        NotFiniteError: A factor is not finite.
    """

    def __init__(
        self, study: Study, job: Job, factors: Factors, trainer: AnswerTrainer, measured: Any
    ) -> None:
        self.study = study
        self.job = job
        self.factors = factors
        self.trainer = trainer
        self.measured = measured
        self.details: dict[str, dict[str, Any]] = {}
        self.ranks = study.nested_ranks(job.rank)
        self.num_parameters = sum(A.numel() + B.numel() for A, B in factors.values())
        for A, B in factors.values():
            if not (A.isfinite().all() and B.isfinite().all()):
                raise NotFiniteError("Training diverged: a factor is not finite.")

    def new_adapter(self, deploy: Literal["reordered", "paper"] = "reordered") -> NestedAdapter:
        """Return a new model with the trained factors, in eval mode, for a deployment to change.

        A copy of the Trainer's model would not do, because TRL replaces the forward of that.

        Args:
            deploy: ``"paper"`` drops P in eval mode, and when the factors are reordered.
        """
        adapter, _ = nested_adapter(self.study, self.job, deploy)
        adapter.factors.write(self.factors)
        adapter.model.eval()
        return adapter


@cache
def _base_model(name: str, layers: int | None, dtype: str) -> tuple[Any, Any]:
    model = load_model(name, dtype, device="cpu")
    tokenizer = load_tokenizer(name)
    if layers is None:
        return model, tokenizer
    return facts.truncate_model(model, tokenizer, layers)


def nested_adapter(
    study: Study, job: Job, deploy: Literal["reordered", "paper"] = "paper"
) -> tuple[NestedAdapter, Any]:
    """Return a new nested adapter on a base model that shares its weights, and the tokenizer."""
    recipe = RECIPES[job.recipe]
    base_model, tokenizer = _base_model(study.model, study.layers, study.dtype)
    # The weights stay the same objects: deepcopy looks up what it has copied by id.
    shared_weights = {id(weight): weight for weight in base_model.parameters()}
    base_model = copy.deepcopy(base_model, shared_weights)
    modules: Any = list(study.modules) or "all-linear"
    config = LoraConfig(**recipe.lora(job.rank), target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(base_model, config, autocast_adapter_dtype=not recipe.authors)
    if recipe.authors:
        bound = job.rank**-0.5
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                nn.init.uniform_(parameter, -bound, bound)
    last_column = LastColumn()
    rule = RULES.get(recipe.rule, recipe.rule)
    if recipe.rule == "lora" and deploy == "paper":
        rule = TRUNCATED_LORA
    elif recipe.rule == "dylora-frozen":
        rule = Rule("dylora-frozen", last_column.draw)
    elif recipe.parts > 1:
        rule = dylora_in_parts(recipe.parts)
    adapter = nest(
        model,
        study.nested_ranks(job.rank),
        scaling=recipe.scaling,
        rule=rule,
        deploy=deploy,
        seed=job.seed,
    )
    if recipe.rule == "dylora-frozen":
        last_column.train_alone(adapter)
    return adapter, tokenizer


@contextmanager
def trainer_of(study: Study, job: Job) -> Iterator[tuple[NestedAdapter, AnswerTrainer, Any]]:
    """Yield the nested adapter of a job, its Trainer before training, and the measured examples.

    Raises:
        MatryoshkaError: The job cannot be run, or TRL would drop a question.
    """
    examples = {
        "train": tasks.training_examples(study, job.task, job.recipe, job.seed),
        "judge": tasks.held_out_examples(study, job.task, job.recipe, job.seed),
        "measured": tasks.measured_examples(study, job.task, job.split, job.seed),
    }
    with tempfile.TemporaryDirectory() as folder, _quiet():
        set_seed(job.seed)
        adapter, tokenizer = nested_adapter(study, job)
        trainer = AnswerTrainer(
            model=adapter.model,
            args=arguments(study, job, folder),
            train_dataset=Dataset.from_list(examples["train"]),
            eval_dataset={
                name: Dataset.from_list(examples[name])
                for name in ("judge", "measured")
                if examples[name]
            },
            processing_class=tokenizer,
            callbacks=[adapter.callback()],
        )
        tokenized = {"train": trainer.train_dataset, **trainer.eval_dataset}
        for name, dataset in tokenized.items():
            if num_dropped := len(examples[name]) - len(dataset):
                raise MatryoshkaError(
                    f"{num_dropped} examples of {name} have no token of their answer within "
                    f"max_length {trainer.args.max_length}. Set training.max_length."
                )
        # Measured examples must not decide anything, so the Trainer does not keep them.
        trainer.eval_dataset = tokenized.get("judge")
        yield adapter, trainer, tokenized["measured"]


def arguments(study: Study, job: Job, folder: str) -> SFTConfig:
    """Return TRL's arguments; those that are not the study's are the same in every study."""
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
            "max_steps": study.steps(job.recipe),
            "learning_rate": job.learning_rate,
            "seed": job.seed,
            "output_dir": folder,
        }
    )


@torch.no_grad()
def score(model: Any, trainer: AnswerTrainer, examples: Any) -> tuple[float, float]:
    """Return the loss in nats per token of the answers, and the share of right answers.

    An answer is right if greedy decoding would write all of it.

    Args:
        model: A model in eval mode.
        trainer: Its collator makes the batches.
        examples: Tokenized examples.
    """
    total_loss = 0.0
    num_tokens = 0
    num_right = 0
    num_examples = 0
    for logits, targets, rows, count in _batches_of_logits(model, trainer, examples):
        log_probabilities = logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
        total_loss -= float(log_probabilities.double().sum())
        num_tokens += len(targets)
        wrong_rows = rows[logits.argmax(dim=-1) != targets]
        num_right += count - len({*wrong_rows.tolist()})
        num_examples += count
    return round(total_loss / num_tokens, 6), round(num_right / num_examples, 6)


@torch.no_grad()
def label_log_probabilities(model: Any, trainer: AnswerTrainer, examples: Any) -> Tensor:
    """Return the log-probabilities of all tokens wherever a token has a label, (labels, tokens)."""
    batches = _batches_of_logits(model, trainer, examples)
    return torch.cat([logits.log_softmax(dim=-1) for logits, *_ in batches])


def _batches_of_logits(
    model: Any, trainer: AnswerTrainer, examples: Any
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Yield, for each batch, logits, targets and row of each label, and the number of rows."""
    for batch in trainer.get_eval_dataloader(examples):
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        is_before_target, targets, model_inputs = _answers(inputs)
        with _logits_only_at(model, is_before_target):
            logits = model(**model_inputs, use_cache=False).logits[0].float()
        yield logits, targets, is_before_target.nonzero()[:, 0], len(is_before_target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the Trainer's output and the progress bars of the libraries."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # libraries warn about each other
        yield
