"""`train`: load, nest, train with TRL, reorder, save; go on where a killed run stopped."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.adapter.loading import load
from matryoshka_lora.adapter.nest import nest
from matryoshka_lora.data.sources import load_data
from matryoshka_lora.errors import MatryoshkaError, NotFiniteError, one_line
from matryoshka_lora.files import check_writable, checkpoint_file, write_text
from matryoshka_lora.models import DTYPES, EMBEDDED, load_model, load_tokenizer
from matryoshka_lora.reordering.checkpoint import check_checkpoint
from matryoshka_lora.training.config import TrainConfig
from matryoshka_lora.training.processes import check_joined, on_main, one_voice
from matryoshka_lora.training.resume import (
    CONFIG_NAME,
    FINISHED_NAME,
    Plan,
    PrivateCheckpoints,
    ProcessCount,
    plan,
    write_state,
)
from matryoshka_lora.unofficial import load_best_model

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer


def train(config: TrainConfig) -> NestedAdapter:
    """Train a nested adapter and save it in ``config.output_dir``.

    The folder then holds the adapter, ``train.yaml`` (the config with everything filled in, without tokens and folders)
    and the checkpoints. If it already holds checkpoints of the same run, training goes on from the newest complete one,
    exactly as if it had never stopped: weights, optimizer, scheduler, random numbers and drawn ranks. A finished run is
    not trained again.

    Under ``accelerate launch`` every process calls it. They train on shares of each batch, the first one writes, and
    the folder is that of one process.

    Args:
        config: From `load_config` or `make_config`.

    Returns:
        The adapter at its largest rank, reordered unless the config says otherwise.

    Raises:
        MatryoshkaError: The folder holds another run, cannot be written, or model, data and config do not fit. Nothing
            has been overwritten then.
    """
    arguments = config.sft_config()
    check_joined(arguments)
    with one_voice(arguments):
        return _train(config, arguments)


def _train(config: TrainConfig, arguments: SFTConfig) -> NestedAdapter:
    output = config.output_dir
    found = on_main(lambda: _look(config, arguments))
    if found.finished:
        _say(arguments, f"{output} holds the finished adapter of this config: nothing to train")
        return load(load_model_of(config), output)
    data = load_data(config.data)
    eval_data = None if config.eval_data is None else load_data(config.eval_data)
    with _quiet(config.model):
        set_seed(config.seed)
        peft_model = _peft_model_of(config)
        adapter = nest(
            peft_model, config.nesting.ranks, config.nesting.scaling, config.rule, config.deploy, seed=config.rank_seed
        )
        trainer = _trainer(adapter, config, arguments, data, eval_data)
        _run(trainer, config, found)
        # Without autocast around it, which the Trainer adds for bf16 and fp16, the model is the caller's again.
        trainer.accelerator.unwrap_model(peft_model, keep_fp32_wrapper=False).eval()
        checkpoint = checkpoint_file(output) if config.reorder == "trained" else None
        if checkpoint is not None:
            _say(arguments, "Each rank below R is trained now, in turn. With nesting.reorder=svd, no rank is")
            if arguments.save_strategy == SaveStrategy.NO:  # then nothing else holds what was trained
                adapter.reorder()
                adapter.save(output)
        if config.reorder:
            try:
                seen = None if config.reorder == "svd" else trainer
                adapter.reorder(config.reorder, seen, seed=config.seed, checkpoint=checkpoint)
            except (MatryoshkaError, RuntimeError) as error:  # what was trained is not lost for that
                # Where one process alone has failed, the others wait for it: its end is the end of all.
                alone = arguments.world_size > 1 and not isinstance(error, NotFiniteError)
                if alone or not adapter.reordered:
                    raise
                _say(arguments, f"The adapter is reordered by its SVD, and not by {config.reorder}: {one_line(error)}")
        adapter.save(output)
        on_main(lambda: _end(trainer.state, output, checkpoint))
    _say(arguments, f"The adapter is in {output}")
    return adapter


def _look(config: TrainConfig, arguments: SFTConfig) -> Plan:
    check_writable(config.output_dir)
    if config.reorder == "trained":
        check_checkpoint(checkpoint_file(config.output_dir))
    return plan(config, arguments.world_size)


def _end(state: TrainerState, output: Path, checkpoint: Path | None) -> None:
    write_state(state, output)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


def load_model_of(config: TrainConfig) -> PreTrainedModel:
    """The base model of a config, as `train` loads it.

    Raises:
        MatryoshkaError: It cannot be loaded.
    """
    more = {**config.model_options, "revision": config.revision}
    return load_model(config.model, DTYPES[config.dtype], config.quantization, config.trust_remote_code, **more)


def _peft_model_of(config: TrainConfig) -> PeftModel:
    base = load_model_of(config)
    try:
        model: PeftModel = get_peft_model(base, config.lora_config())
    except (ValueError, TypeError) as error:
        raise MatryoshkaError(f"PEFT refuses the section lora: {one_line(error)}") from error
    for name, parameter in model.named_parameters():
        # The factors are float32 in any case.
        if parameter.requires_grad and ".lora_" not in name and parameter.dtype in (torch.bfloat16, torch.float16):
            raise MatryoshkaError(
                f"{name} would be trained whole in {config.dtype}, in which most small updates are lost: write "
                "dtype: fp32, or leave modules_to_save and bias out of the section lora"
            )
    return model


def load_tokenizer_of(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a config's base model, of the same revision.

    Raises:
        MatryoshkaError: It cannot be loaded.
    """
    more = {key: value for key, value in config.model_options.items() if key in ("token", "cache_dir")}
    return load_tokenizer(config.model, config.trust_remote_code, config.revision, **more)


class _AllStepsDoneError(Exception):
    pass


class _Begin(TrainerCallback):
    """The last word before the first step."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        output = self.config.output_dir
        if state.global_step > state.max_steps:
            raise MatryoshkaError(
                f"{output} holds a run of {state.global_step} steps, and the config asks for {state.max_steps}: "
                "choose another output_dir"
            )
        on_main(self._write)
        # The Trainer would go on past the last step when it resumes from there within an epoch.
        if state.global_step == state.max_steps:
            raise _AllStepsDoneError

    def _write(self) -> None:
        output = self.config.output_dir
        (output / FINISHED_NAME).unlink(missing_ok=True)
        write_text(output / CONFIG_NAME, f"# {_versions()}\n{self.config.to_yaml()}")


def _run(trainer: SFTTrainer, config: TrainConfig, found: Plan) -> None:
    if found.checkpoint is not None:
        _say(trainer.args, f"Going on from {found.checkpoint}, after {found.step} steps")
    # Before what may end the run at its beginning.
    trainer.add_callback(PrivateCheckpoints(found.checkpoint.parent if found.checkpoint else config.output_dir))
    trainer.add_callback(_Begin(config))
    trainer.add_callback(ProcessCount(trainer.args.world_size))
    try:
        trainer.train(resume_from_checkpoint=None if found.checkpoint is None else str(found.checkpoint))
    except _AllStepsDoneError:
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            load_best_model(trainer)  # as the Trainer does after its last step


def _trainer(
    adapter: NestedAdapter,
    config: TrainConfig,
    arguments: SFTConfig,
    data: Dataset,
    eval_data: Dataset | None,
) -> SFTTrainer:
    from matryoshka_lora.training.trainer import CompletionTrainer  # TRL is slow to import

    tokenizer = load_tokenizer_of(config)
    _check_template(data, tokenizer, arguments)
    try:
        trainer = CompletionTrainer(
            model=adapter.model,
            args=arguments,
            train_dataset=data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
            callbacks=[adapter.callback()],
        )
    except (ValueError, ImportError) as error:
        raise MatryoshkaError(f"TRL refuses the config: {one_line(error)}") from error
    # TRL rounds the adapters of a quantized model to bfloat16, in which most small updates are lost.
    for name, parameter in adapter.model.named_parameters():
        if parameter.requires_grad and ".lora_" in name:
            parameter.data = parameter.data.float()
    if not arguments.packing:
        kept = len(trainer.train_dataset)
        if kept == 0:
            raise MatryoshkaError(
                f"no row leaves a token to train on within max_length {arguments.max_length}: make max_length larger"
            )
        if kept < len(data):
            _say(
                arguments,
                f"{len(data) - kept} of {len(data)} rows have no token to train on within max_length "
                f"{arguments.max_length} and are left out",
            )
    return trainer


def _check_template(data: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: SFTConfig) -> None:
    is_chat = "messages" in data.column_names or not isinstance(data[0].get("prompt", ""), str)
    if is_chat and not tokenizer.chat_template and not arguments.chat_template_path:
        raise MatryoshkaError(
            f"the data is chat, and the tokenizer of {tokenizer.name_or_path!r} has no chat template: take an "
            "instruction-tuned model, write chat_template_path, or give prompt and completion as text (questions in a "
            "file or a dataset become text by data.template)"
        )


@contextmanager
def _quiet(model: str) -> Iterator[None]:
    """Without what no user can act on: libraries' warnings about each other, and PEFT's look-ups on the hub.

    PEFT asks the hub for the base model's config at each save; the embedded model is not there.
    """
    before = os.environ.get("HF_HUB_OFFLINE")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if model == EMBEDDED:
            warnings.filterwarnings("ignore", message=f"Could not find a config file in {EMBEDDED}")
            os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("HF_HUB_OFFLINE", None)
            else:
                os.environ["HF_HUB_OFFLINE"] = before


def _versions() -> str:
    packages = ("matryoshka-lora", "torch", "transformers", "peft", "trl")
    return "Written by " + ", ".join(f"{name} {version(name)}" for name in packages)


def _say(arguments: SFTConfig, text: str) -> None:
    if arguments.process_index == 0:
        print(text, flush=True)
