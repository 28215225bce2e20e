"""Draw the ranks of a rule inside a Hugging Face Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.variant import factor_parameters, lora_layers

if TYPE_CHECKING:
    from matryoshka_lora.adapter import NestedAdapter


class NestingCallback(TrainerCallback):
    """Draw the ranks of each optimizer step.

    A draw depends on the seed and on ``state.global_step``, which the Trainer restores, and a
    checkpoint holds plain LoRA: resuming needs no further state.
    """

    def __init__(self, adapter: NestedAdapter) -> None:
        self.adapter = adapter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse settings that would fail late, or silently train or save another function."""
        if args.n_gpu > 1:
            raise MatryoshkaError(
                "one process cannot train nested layers on several GPUs: start the script with "
                "`accelerate launch`, or let it see one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        packs = getattr(args, "packing", False) and args.packing_strategy != "wrapped"
        if (packs or getattr(args, "padding_free", False)) and self.adapter.rule.per_row:
            raise MatryoshkaError("packed rows cannot have a rank each: take another rule")
        name, model = self.adapter.name, self.adapter.model
        ours, trained = ({*dict(lora_layers(x, name)).values()} for x in (model, kwargs["model"]))
        if ours != trained or name not in model.active_adapters:
            raise MatryoshkaError(
                f"the Trainer does not train this adapter: {name!r} is not active, or the Trainer "
                "has made a model of its own, as with model_init. Nest the model that it trains"
            )
        self.adapter.set_rank(self.adapter.nesting.max_rank)  # smaller ones lose their order
        if not self.adapter.holds_p:
            return
        copies = (factor_parameters(layer, "ref") for _, layer in lora_layers(model, "ref"))
        if any(bool(A.any() and B.any()) for A, B in copies):
            raise MatryoshkaError(
                "TRL's reference model is a copy of the factors without P: call adapter.reorder() "
                "before you make this trainer"
            )
        # Accelerate's config may enable sharding without the Trainer's arguments.
        sharding = AcceleratorState()
        fsdp, zero = getattr(sharding, "fsdp_plugin", None), sharding.deepspeed_plugin
        if (fsdp and fsdp.fsdp_version == 1) or (zero and zero.zero_stage == 3):
            raise MatryoshkaError(
                "ZeRO-3 and FSDP 1 save the factors without P: take ZeRO-1, ZeRO-2 or FSDP 2 "
                "(fsdp_config version 2), or rule 'lora'"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply the rule's draw for this step."""
        # A state from a checkpoint holds the batch size of the earlier run.
        rows = state.train_batch_size if args.auto_find_batch_size else args.train_batch_size
        if args.accelerator_config.split_batches:
            rows //= args.world_size
        share = (args.process_index, args.world_size)
        self.adapter.draw(state.global_step, rows=rows, share=share)
