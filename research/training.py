"""One training run: base model, adapter, Trainer, and what may be used to cut the adapter afterwards."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import set_seed
from transformers.utils import logging

from matryoshka_lora import MatryoshkaError, NestedAdapter, NotFiniteError, nest
from matryoshka_lora.models import load_model, load_tokenizer
from research.adalora import Allocate, adalora_config, as_lora
from research.recipes import RECIPES, Recipe
from research.records import Job
from research.rules import rule_of
from research.study import Study
from research.tasks import Row
from research.trainers import TRAINERS, AnswerTrainer, factors_of


@dataclass
class Trained:
    """A trained adapter, and what may be used to cut it.

    Attributes:
        model: PEFT's, in eval mode.
        trainer: That has trained it; it knows the training rows and the held-out ones.
        recipe: How it was trained.
        ranks: The nested ones.
        seed: Of training.
    """

    model: PeftModel
    trainer: AnswerTrainer
    recipe: Recipe
    ranks: Sequence[int]
    seed: int

    def __post_init__(self) -> None:
        self._raw = [factor.detach().clone() for pair in factors_of(self.model).values() for factor in pair]
        if not all(bool(factor.isfinite().all()) for factor in self._raw):
            raise NotFiniteError("training diverged: a factor is not finite")

    def adapter(self, deploy: Any = "reordered") -> NestedAdapter:
        """The adapter as it was trained, whatever a cut has made of it."""
        with torch.no_grad():
            factors = [factor for pair in factors_of(self.model).values() for factor in pair]
            for factor, raw in zip(factors, self._raw, strict=True):
                factor.requires_grad_().copy_(raw)
        return nest(self.model, self.ranks, self.recipe.scaling, rule_of(self.recipe.rule), deploy, seed=self.seed)

    @property
    def parameters(self) -> int:
        """How many numbers the factors have, without rows and columns that are zero."""
        pairs = factors_of(self.model).values()
        return sum(int(A.any(dim=1).sum()) * (A.shape[1] + B.shape[0]) for A, B in pairs)


@contextmanager
def training(
    study: Study,
    job: Job,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    trainer_class: type[AnswerTrainer] | None = None,
) -> Iterator[AnswerTrainer]:
    """A context with a job's Trainer, ready to train. Its adapter is nested, but for AdaLoRA's.

    Args:
        study: Of the job.
        job: What to do; its split is not looked at.
        rows: `Study.train_set`'s.
        held_out: What is measured.
        trainer_class: What trains, where it is not the recipe's own.

    Raises:
        MatryoshkaError: It cannot be done, or TRL would leave a question out.
    """
    recipe = RECIPES[job.recipe]
    with tempfile.TemporaryDirectory() as folder, _silent():
        config = study.train_config(job.recipe, job.rank, job.learning_rate, job.seed, str(Path(folder) / "run"))
        set_seed(config.seed)
        base = load_model(config.model, getattr(torch, _DTYPES[config.dtype]))
        if recipe.objective == "adalora":
            model = get_peft_model(base, adalora_config(config))
            callback: Any = Allocate(model)
        else:
            model = get_peft_model(base, config.lora_config())
            ranks = study.nesting(job.rank)
            adapter = nest(model, ranks, recipe.scaling, rule_of(recipe.rule), "paper", seed=config.seed)
            callback = adapter.callback()
        trainer = (trainer_class or TRAINERS.get(recipe.objective or "", AnswerTrainer))(
            model=model,
            args=config.sft_config(),
            train_dataset=Dataset.from_list(list(rows)),
            eval_dataset=Dataset.from_list(list(held_out)),
            processing_class=load_tokenizer(config.model),
            callbacks=[callback],
        )
        for name, given, kept in (("train", rows, trainer.train_dataset), (job.split, held_out, trainer.eval_dataset)):
            if len(kept) < len(given):
                raise MatryoshkaError(
                    f"{len(given) - len(kept)} of the {len(given)} rows of {name} have no token of their answer within "
                    f"max_length {trainer.args.max_length}: give training.max_length"
                )
        yield trainer


_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}


def train(trainer: AnswerTrainer, study: Study, job: Job) -> Trained:
    """Train to the end.

    Raises:
        NotFiniteError: It diverged.
    """
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    recipe, ranks = RECIPES[job.recipe], study.nesting(job.rank)
    if recipe.objective == "adalora":
        model = as_lora(model)
        ranks = (model.peft_config["default"].r,)
    return Trained(model, trainer, recipe, ranks, job.seed)


def token_count(data: Any, rows: int) -> int:
    """How many tokens so many rows of a Trainer's data have on average, without padding."""
    lengths = [len(ids) for ids in data["input_ids"]]
    return round(sum(lengths) / len(lengths) * rows)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the Trainer's lines and the libraries' bars."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other
        yield
