"""Draw the diagonals of a rule inside a Hugging Face Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from matryoshka_lora.errors import MatryoshkaError, short
from matryoshka_lora.peft.lora_layers import factor_parameters, lora_layers

if TYPE_CHECKING:
    from matryoshka_lora.peft.adapter import NestedAdapter


class NestingCallback(TrainerCallback):
    """Draw the diagonal of each optimizer step.

    A draw depends on the seed and on ``state.global_step``, which the Trainer restores, and a
    checkpoint holds plain LoRA: resuming needs no further state. Its ``trainer_state.json`` names
    the nesting, so that a run is not resumed with another one.
    """

    def __init__(self, adapter: NestedAdapter) -> None:
        self.adapter = adapter
        # A checkpoint has states of callbacks, by their names.
        self._state_key = f"matryoshka_lora/{adapter.name}"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reject settings that would fail late, or silently train or save something else.

        Raises:
            MatryoshkaError: There is such a setting.
        """
        adapter = self.adapter
        if args.n_gpu > 1:
            raise MatryoshkaError(
                "One process cannot train nested layers on several GPUs. Start the script with "
                "`accelerate launch`, or set CUDA_VISIBLE_DEVICES=0."
            )
        trained_layers = {layer for _, layer in lora_layers(kwargs["model"], adapter.name)}
        is_active = adapter.name in adapter.active_adapters
        if trained_layers != set(adapter.layers.values()) or not is_active:
            raise MatryoshkaError(
                f"The Trainer does not train adapter {adapter.name!r}: the adapter is not active, "
                "or the Trainer created its own model, as with model_init. Nest the model that the "
                "Trainer trains."
            )
        settings = self._settings()
        for key, value in state.stateful_callbacks.get(self._state_key, settings).items():
            if value != settings.get(key):
                raise MatryoshkaError(
                    f"The checkpoint is from a run with another nesting: {key} was {short(value)}, "
                    f"not {short(settings.get(key))}. Set another output_dir, or nest as in that "
                    "run."
                )
        state.stateful_callbacks[self._state_key] = settings  # saved in checkpoints
        p = adapter.rule.sample(adapter.nesting, adapter.state.seed, step=0, batch_size=2)
        if p.ndim > 1 and _packs_rows(args):
            raise MatryoshkaError(
                f"Rule {adapter.rule.name!r} draws one diagonal per row, but this Trainer "
                "packs several examples into a row. Disable packing and padding_free, or use "
                "another rule."
            )
        # A smaller rank is not available once training ends the order.
        adapter.set_rank(adapter.nesting.max_rank)
        if adapter.state.state_dict_q() is not None:
            self._check_reference()
            _check_sharding()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Draw the diagonal of this step."""
        # A state from a checkpoint holds the batch size of the earlier run.
        batch_size = args.train_batch_size
        if args.auto_find_batch_size:
            batch_size = state.train_batch_size
        if args.accelerator_config.split_batches:
            batch_size //= args.world_size
        self.adapter.draw(state.global_step, batch_size, args.process_index, args.world_size)

    def _settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share, as JSON-serializable values."""
        state = self.adapter.state
        return {
            "ranks": list(state.nesting.ranks),
            "scaling": state.nesting.scaling,
            "rule": state.rule.name,
            "seed": None if state.rule.fixed else state.seed,
            "deploy": state.deploy,
        }

    def _check_reference(self) -> None:
        """Reject TRL's reference adapter, if it is a copy of trained factors without P."""
        for _, layer in lora_layers(self.adapter.model, "ref"):
            A, B = factor_parameters(layer, "ref")
            if bool(A.any()) and bool(B.any()):
                raise MatryoshkaError(
                    "TRL's reference model is a copy of the factors without P. Call "
                    "adapter.reorder() before creating this Trainer."
                )


def _packs_rows(args: TrainingArguments) -> bool:
    """Return whether TRL packs several examples per row, with attention restricted to each."""
    if getattr(args, "padding_free", False):
        return True
    return getattr(args, "packing", False) and args.packing_strategy != "wrapped"


def _check_sharding() -> None:
    # Accelerate's config may enable sharding without the Trainer's arguments.
    accelerator_state = AcceleratorState()
    fsdp_plugin = getattr(accelerator_state, "fsdp_plugin", None)
    deepspeed_plugin = accelerator_state.deepspeed_plugin
    is_fsdp_1 = fsdp_plugin is not None and fsdp_plugin.fsdp_version == 1
    is_zero_3 = deepspeed_plugin is not None and deepspeed_plugin.zero_stage == 3
    if is_fsdp_1 or is_zero_3:
        raise MatryoshkaError(
            "ZeRO-3 and FSDP 1 save the factors without P. Use ZeRO-1, ZeRO-2 or FSDP 2 "
            "(fsdp_config version 2), or `rule='lora'`."
        )
