"""What is written of an adapter in memory: always something that serves every rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel, peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from matryoshka_lora.adapter.factors import gathered, get_parameters
from matryoshka_lora.adapter.in_model import (
    COPIES,
    begin,
    check_names,
    check_prompts,
    checked_layers,
    lora_layers,
    nest_copies,
    nested_layers,
)
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files import output_directory, output_path, replace_directory
from matryoshka_lora.formats.config import check_config
from matryoshka_lora.formats.opened import WEIGHTS_NAME, OpenedAdapter, from_memory, open_adapter
from matryoshka_lora.formats.sidecar import has_sidecar
from matryoshka_lora.formats.write import cut, write_adapter, write_weights
from matryoshka_lora.models import load_config
from matryoshka_lora.reordering.checkpoint import is_first_process
from matryoshka_lora.reordering.files import deployed
from matryoshka_lora.rules import get_rule, is_named
from matryoshka_lora.state import State


def _state_of(model: Any, adapter: str) -> State | None:
    """The nesting of an adapter in a model, or None if it is not nested."""
    return next((variant.state for _, _, variant in nested_layers(model, adapter)), None)


def opened_from(model: PeftModel, adapter: str, state_dict: Mapping[str, Tensor] | None = None) -> OpenedAdapter:
    """A nested adapter in memory as an opened one, gathered where FSDP2 has sharded it.

    Args:
        model: A PEFT model.
        adapter: The name of a nested adapter.
        state_dict: The model's, where it was gathered already.

    Raises:
        MatryoshkaError: A weight is not finite, PEFT has made the adapter anew in a layer, or the name of an adapter
            makes PEFT lose layers.
    """
    layers = checked_layers(model, adapter)
    state = layers[0][2].state
    check_names(model, model.peft_config)
    # The base model's embeddings are not part of the adapter, though PEFT would add them when they are a target.
    found = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=adapter, save_embedding_layers=False)
    tensors = {key: gathered(tensor.detach()).cpu() for key, tensor in found.items()}
    config = {key: _plain(value) for key, value in model.peft_config[adapter].to_dict().items()}
    named = config["base_model_name_or_path"] or getattr(model.get_base_model(), "name_or_path", None)
    config |= {"base_model_name_or_path": named or None, "inference_mode": True}
    opened = from_memory(f"adapter {adapter!r}", check_config(config, f"adapter {adapter!r}"), state, tensors)
    if len(opened.layers) != len(layers):
        raise MatryoshkaError(
            f"PEFT has read {len(opened.layers)} of the {len(layers)} layers of adapter {adapter!r}, and the others "
            "would be lost: give each adapter a name that is no part of a layer's name"
        )
    opened.tensors()  # raises where a number is not finite
    _warn_of_new_tokens(model, named)
    return opened


def _warn_of_new_tokens(model: PeftModel, base: str | None) -> None:
    """Tokens that were added to the base model are in no adapter, unless their embeddings are trained with it."""
    if not base:
        return
    try:
        embeddings: Any = model.get_base_model().get_input_embeddings()
        known = load_config(base, local_files_only=True).get_text_config().vocab_size
    except (MatryoshkaError, AttributeError, NotImplementedError):  # not on this machine, or no language model
        return
    # PEFT wraps those that are trained.
    if type(embeddings) is nn.Embedding and embeddings.num_embeddings > known:
        warnings.warn(
            f"{embeddings.num_embeddings - known} tokens were added to the base model, and their embeddings are not in "
            "the adapter: save the base model too, or train them with modules_to_save or trainable_token_indices",
            stacklevel=4,
        )


def save_adapter(opened: OpenedAdapter, path: str | os.PathLike[str], keep_trained: bool = False) -> None:
    """Write a nested adapter so that every rank is good: factors that were not reordered are written reordered by SVD.

    Args:
        opened: What to write.
        path: The directory to write.
        keep_trained: Write the factors as they are trained too, to go on from.

    Raises:
        MatryoshkaError: The path cannot be written, or what is written could not be read again.
    """
    if keep_trained and not opened.nested.deployed and not is_named(opened.nested.rule):
        raise MatryoshkaError(
            f"rule {opened.nested.rule.name!r} is none of this package's, so that no training could go on from a file: "
            "set save_strategy='no' while training, and save it with adapter.save()"
        )
    ready, spectra = deployed(opened)
    trained = opened if keep_trained and not opened.nested.deployed else None
    with replace_directory(path) as folder:
        write_adapter(folder, ready, spectra, Path(path), keeps_files=True, trained=trained)


def export_rank(opened: OpenedAdapter, path: str | os.PathLike[str], rank: int, overwrite: bool = False) -> None:
    """Write one rank of a nested adapter as an ordinary LoRA adapter; see `matryoshka_lora.NestedAdapter.export`."""
    small = cut(deployed(opened)[0], rank)
    with output_directory(path, overwrite) as folder:
        write_adapter(folder, small, home=Path(path))


def writes(is_main_process: bool | None) -> bool:
    """Whether this process writes: None is yes for the first of torch.distributed, or the only one."""
    if is_main_process is not None:
        return is_main_process
    return is_first_process()


def _plain(value: Any) -> Any:
    """A value of PEFT's config as JSON has it."""
    if isinstance(value, (set, tuple)):
        return sorted(value) if isinstance(value, set) else list(value)
    return getattr(value, "value", value) if not isinstance(value, (str, int, float)) else value


class _Nested:
    """Mixed into a `PeftModel` by `nest`: its files serve every rank, and training goes on from them."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's.

        Raises:
            MatryoshkaError: Rows have ranks of their own, and there is another number of them.
        """
        model: Any = self
        check_prompts(model, args, kwargs)
        with model.base_model.row_count.generating(model, args, kwargs):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """As PEFT's, but for nested adapters, which are written as `NestedAdapter.save` writes them.

        An adapter that can still be trained has the factors as they are trained in a second file beside them.

        Raises:
            MatryoshkaError: As `NestedAdapter.save`, or a nested adapter is to be written as a pickle, or with the
                embeddings of the base model.
        """
        model: Any = self
        names = list(model.peft_config) if selected_adapters is None else list(selected_adapters)
        nested = [name for name in names if name in model.peft_config and _state_of(model, name)]
        others = [name for name in names if name not in nested]
        if nested and save_embedding_layers is True:
            raise MatryoshkaError(
                f"adapter {nested[0]!r} is nested, and the base model's embeddings are no part of its files: leave "
                "save_embedding_layers out, and save the base model for itself"
            )
        if nested and not safe_serialization:
            raise MatryoshkaError(
                f"adapter {nested[0]!r} is nested, and is written as safetensors only: leave safe_serialization out"
            )
        if others:
            super().save_pretrained(  # type: ignore[misc]
                save_directory, safe_serialization, others, save_embedding_layers, is_main_process, **kwargs
            )
        for name in nested:
            opened = opened_from(model, name, kwargs.get("state_dict"))
            if is_main_process:
                target = output_path(save_directory)
                folder = target if name == "default" else target / name
                # Copies that TRL keeps are compared with what is trained, to the last bit.
                trainable = name in COPIES or any(
                    get_parameters(m, name)[0].requires_grad for _, m, _ in nested_layers(model, name)
                )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore" if trainable else "default")
                    save_adapter(opened, folder, keep_trained=trainable)

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's. Into a nested adapter it takes the factors as they are trained, where they were written.

        Those of an ordinary adapter have no order: the nested one is as after `nest` then.

        Raises:
            MatryoshkaError: The folder holds an adapter with another nesting, or one without, which would be another
                function under P; or the adapter in the model is merged.
        """
        model: Any = self
        for name in list(model.peft_config):  # while the factors are what they are copies of
            nest_copies(model, name)
        state = _state_of(model, adapter_name) if adapter_name in model.peft_config else None
        folder = Path(model_id, kwargs.get("subfolder") or "")
        if state is None:
            return super().load_adapter(model_id, adapter_name, *args, **kwargs)  # type: ignore[misc]
        if any(adapter_name in module.merged_adapters for _, module in lora_layers(model, adapter_name)):
            raise MatryoshkaError(f"adapter {adapter_name!r} is merged into the base weights: unmerge it first")
        if not has_sidecar(folder):
            if not replace(state, reordered=None).is_plain_at_full_rank:
                raise MatryoshkaError(
                    f"{folder} is no folder of a nested adapter, and P of adapter {adapter_name!r} would stand between "
                    "its factors: load it under another name. If it is on the hub, download it first"
                )
            result = super().load_adapter(model_id, adapter_name, *args, **kwargs)  # type: ignore[misc]
            state.reordered = state.spectra = None
            begin(model, adapter_name)
            return result
        opened = open_adapter(folder, trained=True)
        found = opened.nested
        # A reordered adapter that is trained on has become plain LoRA in its checkpoints.
        rules = (state.rule, get_rule("lora")) if state.reordered else (state.rule,)
        if not found.nesting.is_like(state.nesting) or (not found.reordered and found.rule not in rules):
            raise MatryoshkaError(
                f"{folder} holds an adapter with another nesting or rule than adapter {adapter_name!r}: load it "
                "under another name"
            )
        with TemporaryDirectory() as scratch:  # where PEFT finds the factors by the name that it knows
            write_weights(Path(scratch) / WEIGHTS_NAME, opened)
            options = {**kwargs, "subfolder": None}
            result = super().load_adapter(scratch, adapter_name, *args, **options)  # type: ignore[misc]
        state.reordered, state.spectra = found.reordered, None
        state.rule = state.rule if found.reordered else found.rule
        begin(model, adapter_name)
        return result


def with_our_files(kind: type[PeftModel]) -> type[PeftModel]:
    """The subclass of a kind of PEFT model whose files serve every rank."""
    return kind if issubclass(kind, _Nested) else _KINDS.get(kind) or _make(kind)


def _make(kind: type[PeftModel]) -> type[PeftModel]:
    # Found by its name in this module, so that a model can be pickled.
    made: type[PeftModel] = type(f"Nested{kind.__name__}", (_Nested, kind), {"__module__": __name__})
    globals()[made.__name__] = made
    return made


_KINDS = {
    kind: _make(kind) for kind in vars(peft_model).values() if isinstance(kind, type) and issubclass(kind, PeftModel)
}
