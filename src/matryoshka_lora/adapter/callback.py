"""The nesting's part in a Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DataCollatorWithFlattening, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from matryoshka_lora.adapter.factors import get_parameters
from matryoshka_lora.adapter.in_model import InModel, lora_layers, nest_copies
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.rules import is_named


class NestingCallback(TrainerCallback):
    """Draws the ranks of each optimizer step.

    The draw depends on the seed and on ``state.global_step``, which the Trainer restores: nothing else has to be saved
    for a resumed run to go on as it would have. What cannot be right is refused before the first step.
    """

    def __init__(self, adapter: InModel) -> None:
        self.adapter = adapter

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _check_precomputed(self.adapter, args)  # which TRL's Trainers do next

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        _check_trained(self.adapter, model)
        _check_precomputed(self.adapter, args)
        _check_given_away(self.adapter, args)
        _check_saved(self.adapter, args)
        if self.adapter.state.draws:
            _check_samples(self.adapter, args)
        if self.adapter.state.per_row:
            _check_rows(self.adapter, args, getattr(train_dataloader, "collate_fn", None))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A state that was read from a checkpoint has the batch size of that run.
        rows = state.train_batch_size if args.auto_find_batch_size else args.train_batch_size
        if args.accelerator_config.split_batches:
            rows //= args.world_size
        self.adapter.draw(state.global_step, rows=rows, share=(args.process_index, args.world_size))


def _check_trained(adapter: InModel, model: Any) -> None:
    """Else another model or adapter would be trained, without its ranks or its P."""
    layers = [module for _, module in lora_layers(adapter.model, adapter.name)]
    if isinstance(model, nn.Module) and not any(module is layers[0] for module in model.modules()):
        raise MatryoshkaError("the Trainer has another model than this callback's adapter: give it adapter.model")
    if adapter.name not in adapter.model.active_adapters:
        raise MatryoshkaError(
            f"adapter {adapter.name!r} is not active, {', '.join(adapter.model.active_adapters)} is and would be "
            f"trained: call adapter.model.set_adapter({adapter.name!r}) first"
        )


def _check_precomputed(adapter: InModel, args: TrainingArguments) -> None:
    """TRL computes such a reference before the first draw, and keeps it by a hash of its weights, without p."""
    if not getattr(args, "precompute_ref_log_probs", False):
        return
    state, reason = adapter.state, None
    scale = state.nesting.scale
    is_plain = not state.draws and bool((state.trained_diagonal() == scale).all())
    for copy in nest_copies(adapter.model, adapter.name):
        if state.draws:
            reason = f"rule {state.rule.name!r} draws the rank of both at each step"
        for _, module in lora_layers(adapter.model, copy):
            A, B = get_parameters(module, copy)
            alike = module.get_base_layer().weight.dtype == A.dtype  # else eval and training mode round otherwise
            if bool(torch.count_nonzero(B)) and not (is_plain and alike):
                reason = "what an adapter computes that was trained before is not in its weights alone"
    if reason is not None:
        raise MatryoshkaError(
            "precompute_ref_log_probs=True would compare the adapter with a reference of another time and nesting: "
            f"{reason}. Set precompute_ref_log_probs=False"
        )


def _check_given_away(adapter: InModel, args: TrainingArguments) -> None:
    """vLLM and A2PO's reference get the adapter as eval mode has it, and training is compared with what they say."""
    if getattr(args, "use_vllm", hasattr(args, "vllm_server_base_url")):
        taker, instead = "vLLM", "set use_vllm=False, or "
    elif "A2POConfig" in _trl_names(args):
        taker, instead = "A2PO's reference", ""
    else:
        return
    if adapter.state.draws:
        raise MatryoshkaError(
            f"rule {adapter.state.rule.name!r} trains another rank at each step, and {taker} gets the adapter at its "
            f"largest: {instead}take rule 'matryoshka' or 'lora'"
        )
    if not adapter.state.deploys_what_is_trained or adapter.rank != adapter.state.nesting.max_rank:
        raise MatryoshkaError(
            f"{taker} gets the adapter as eval mode has it, rank {adapter.rank} with deploy={adapter.state.deploy!r}, "
            "and training has another function: leave deploy out in nest(), and call "
            f"adapter.set_rank({adapter.state.nesting.max_rank})"
        )


def _check_saved(adapter: InModel, args: TrainingArguments) -> None:
    """Else the first checkpoint would be refused, after all the steps before it."""
    state = adapter.state
    if args.save_strategy != "no" and not state.reordered and not is_named(state.rule):
        raise MatryoshkaError(
            f"rule {state.rule.name!r} is none of this package's, so that no training could go on from a checkpoint: "
            "set save_strategy='no'"
        )


def _check_samples(adapter: InModel, args: TrainingArguments) -> None:
    """GRPO, RLOO and their kin compare a text's probability with that at its sampling: both must have one draw."""
    every = getattr(args, "steps_per_generation", None)
    if every is not None and args.gradient_accumulation_steps % (every * getattr(args, "num_iterations", 1)):
        raise MatryoshkaError(
            f"rule {adapter.state.rule.name!r} trains another rank at each step, and these texts are sampled for "
            "several steps: set steps_per_generation to gradient_accumulation_steps and num_iterations to 1, or take "
            "rule 'matryoshka' or 'lora'"
        )


def _check_rows(adapter: InModel, args: TrainingArguments, collator: Any) -> None:
    """Every row of what the model gets must be a row of the batch, with a loss of its own."""
    rule = adapter.state.rule.name
    names = _trl_names(args)
    if names and names[0] != "SFTConfig":
        raise MatryoshkaError(
            f"rule {rule!r} gives each row a rank of its own, and the Trainer of {names[0]} compares rows or makes new "
            "ones: take another rule, or TRL's SFTTrainer"
        )
    for option in ("packing", "padding_free"):
        if getattr(args, option, False):
            raise MatryoshkaError(
                f"{option}=True joins the rows of a batch, and rule {rule!r} gives each row a rank of its own: set "
                f"{option}=False or take another rule"
            )
    if isinstance(getattr(collator, "data_collator", collator), DataCollatorWithFlattening):
        raise MatryoshkaError(
            f"DataCollatorWithFlattening joins the rows of a batch, and rule {rule!r} gives each row a rank of its "
            "own: take a data collator that pads, or another rule"
        )
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        raise MatryoshkaError(
            f"train_sampling_strategy 'batch_rebalance' gives batches different numbers of rows, and rule {rule!r} "
            "draws the ranks of all rows of a step: take 'group_by_length'"
        )
    if args.n_gpu > 1:
        raise MatryoshkaError("nn.DataParallel splits the rows of a batch over devices: start with `accelerate launch`")
    if args.parallelism_config is not None and args.parallelism_config.non_data_parallel_size > 1:
        raise MatryoshkaError(
            f"under tensor, context or sequence parallelism several processes have the same rows, and rule {rule!r} "
            "gives the rows of each process ranks of their own: take data parallelism, or another rule"
        )


def _trl_names(args: TrainingArguments) -> list[str]:
    """TRL's classes among those of a Trainer's arguments, the most special one first."""
    return [kind.__name__ for kind in type(args).__mro__ if kind.__module__.partition(".")[0] == "trl"]
