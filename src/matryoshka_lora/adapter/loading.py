"""`load`: a saved adapter onto its base model, checked before the model is touched."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from matryoshka_lora.adapter.handle import NestedAdapter
from matryoshka_lora.adapter.in_model import check_names
from matryoshka_lora.adapter.nest import attach
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.config import CONFIG_NAME, AdapterConfig
from matryoshka_lora.formats.layout import factor_keys, foreign, layer_name
from matryoshka_lora.formats.opened import OpenedAdapter, open_adapter


def load(
    base_model: nn.Module,
    path: str | PathLike[str],
    rank: int | Mapping[str, int] | None = None,
    adapter: str = "default",
    trainable: bool = False,
    max_rank: int | None = None,
) -> NestedAdapter:
    """Load a nested adapter onto its base model.

    Args:
        base_model: The model that it was trained on, or a `PeftModel` of it that gets one more adapter.
        path: A directory written by `NestedAdapter.save`, or a training checkpoint.
        rank: The rank in eval mode, see `NestedAdapter.set_rank`; None means the largest.
        adapter: The name it gets in PEFT.
        trainable: Whether its weights will be trained on: the model is put into training mode, else into eval mode. A
            reordered adapter goes on as plain LoRA of rank R, at its nested ranks, until it is reordered again.
        max_rank: Take only so many directions of a reordered adapter into memory: a larger rank then does not exist.
            Of a file written by ``matryoshka export --format directions``, no more than those are read.

    Warns:
        UserWarning: Another adapter of the `PeftModel` is still the active one, as after PEFT's ``load_adapter``.

    Raises:
        MatryoshkaError: A file is damaged or incomplete, the adapter does not fit the model, or the rank was not
            trained. The model is unchanged then.
    """
    if not isinstance(base_model, nn.Module):
        raise MatryoshkaError(
            f"load() takes the base model, not {type(base_model).__name__}: load it with transformers first"
        )
    opened = open_adapter(path, max_rank, trained=trainable)
    if trainable:
        opened.nested.end_order()
    return load_opened(base_model, opened, rank, adapter, trainable)


def load_opened(
    base_model: nn.Module,
    opened: OpenedAdapter,
    rank: int | Mapping[str, int] | None = None,
    adapter: str = "default",
    trainable: bool = False,
) -> NestedAdapter:
    """As `load`, of an adapter that is opened already."""
    path = opened.name
    state, config, tensors = opened.nested, _peft_config(opened.config, path), opened.tensors()
    for value in rank.values() if isinstance(rank, Mapping) else () if rank is None else (rank,):
        state.check_rank(value)
    existing = base_model if isinstance(base_model, PeftModel) else None
    _check_name(adapter)
    check_names(base_model, (adapter, *(existing.peft_config if existing is not None else ())))
    if existing is not None and adapter in existing.peft_config:
        raise MatryoshkaError(f"the model already has an adapter {adapter!r}: load this one under another name")
    if existing is None and any(isinstance(module, LoraLayer) for module in base_model.modules()):
        raise MatryoshkaError(
            "the model's layers already hold an adapter, though it is no PeftModel: give the PeftModel (the first "
            "adapter's .model) and another adapter name, or load the base model anew"
        )
    config.inference_mode = not trainable
    try:
        with _undone_on_error(base_model):
            _check_fits(existing.get_base_model() if existing is not None else base_model, config, tensors, path)
            if existing is not None:
                existing.add_adapter(adapter, config)
            model = existing if existing is not None else get_peft_model(base_model, config, adapter_name=adapter)
            tensors = _check_tensors(model, adapter, tensors, path)
            set_peft_model_state_dict(model, tensors, adapter_name=adapter)
            attach(model, state, adapter)
            nested = NestedAdapter(model, adapter)
            if rank is not None:
                nested.set_rank(rank)
    except MatryoshkaError:
        raise
    except Exception as error:  # whatever PEFT says to a config that it cannot build
        raise MatryoshkaError(
            f"{path} could not be loaded: {error} (from its {CONFIG_NAME}). Copy the adapter again, or load the model "
            "that it was trained on"
        ) from error
    model.train(trainable)
    if adapter not in model.active_adapters:
        warnings.warn(
            f"adapter {adapter!r} is loaded, and {', '.join(model.active_adapters)} is still the active one: call "
            f"adapter.model.set_adapter({adapter!r}) to compute with it",
            stacklevel=3,
        )
    return nested


def _peft_config(config: AdapterConfig, path: str) -> LoraConfig:
    try:
        made: LoraConfig = LoraConfig.from_peft_type(**config.data)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise MatryoshkaError(
            f"PEFT does not take the {CONFIG_NAME} of {path}: {error}. Copy the adapter again, or upgrade PEFT"
        ) from error
    return made


def _check_name(adapter: Any) -> None:
    try:
        nn.ModuleDict({adapter: nn.Identity()})
    except (KeyError, TypeError) as error:
        raise MatryoshkaError(f"{adapter!r} is no adapter name: use letters, digits, - and _") from error


def _check_tensors(model: PeftModel, adapter: str, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors that the adapter in the model wants, no more and no fewer, in their shapes."""
    expected = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    for key in sorted(expected.keys() - tensors.keys()):
        raise MatryoshkaError(f"{path} lacks tensor {key}: the file is incomplete, copy the adapter again")
    base = model.state_dict()
    for key in sorted(tensors.keys() - expected.keys()):
        # PEFT's own checkpoints carry an embedding that is a target along.
        if not (key.endswith(".base_layer.weight") and key in base and torch.equal(base[key].cpu(), tensors[key])):
            raise foreign(key, path)
    for key, tensor in expected.items():
        if tensor.shape != tensors[key].shape:
            raise MatryoshkaError(
                f"{path} does not fit this model: {key} has shape {list(tensors[key].shape)}, and the model needs "
                f"{list(tensor.shape)}. It was trained on another base model"
            )
    return {key: tensors[key] for key in expected}


def _check_fits(base_model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], path: str) -> None:
    """Every target of the config has its two factors in the file, of the right shapes, and the file has no others.

    Raises:
        MatryoshkaError: A tensor is missing, is too many, or has another shape than the layer that it is for.
    """
    modules = {layer_name(name): (key_A, key_B) for name, key_A, key_B in factor_keys(tensors)}
    parameters = {_owner(target) for target in config.target_parameters or ()}
    by_parameter = {name for name in modules if any(_ends_in(name.replace(".base_layer", ""), p) for p in parameters)}
    inside = {
        f"{name}." for name, module in base_model.named_modules() if isinstance(module, BaseTunerLayer)
    }  # what PEFT has put into a layer is no target
    targets = {
        name
        for name, _ in base_model.named_modules()
        if name and not any(name.startswith(prefix) for prefix in inside) and check_target_module_exists(config, name)
    }
    missing = sorted(targets - set(modules))
    if missing:
        raise MatryoshkaError(
            f"{path} has no factors for layer {missing[0]} ({len(missing)} of {len(targets)} target layers lack them): "
            "the file is incomplete, or it was trained on another base model"
        )
    foreign = sorted(set(modules) - targets - by_parameter)
    if foreign:
        raise MatryoshkaError(
            f"{path} has factors for layer {foreign[0]}, which is no target in this model ({len(foreign)} such): "
            f"it was trained on another base model{_named(config)}"
        )
    for name, (key_A, key_B) in modules.items():
        if name not in by_parameter:
            module = base_model.get_submodule(name)
            if isinstance(module, BaseTunerLayer):
                module = module.get_base_layer()
            _check_shapes(name, module, config, tensors[key_A], tensors[key_B], path)


def _check_shapes(name: str, module: Any, config: LoraConfig, A: Tensor, B: Tensor, path: str) -> None:
    inside, outside = _widths(module)
    kernel = tuple(getattr(module, "kernel_size", ()))
    expected = ((config.r, inside, *kernel), (outside, config.r, *(1 for _ in kernel)))
    if (tuple(A.shape), tuple(B.shape)) != expected:
        raise MatryoshkaError(
            f"{path} does not fit layer {name}: A and B have shapes {list(A.shape)} and {list(B.shape)}, and the layer "
            f"needs {list(expected[0])} and {list(expected[1])}. It was trained on another base model{_named(config)}"
        )


def _widths(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if hasattr(module, "in_channels"):
        return module.in_channels, module.out_channels
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    inside, outside = module.weight.shape  # transformers' Conv1D
    return inside, outside


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _named(config: LoraConfig) -> str:
    return f": load {config.base_model_name_or_path}" if config.base_model_name_or_path else ""


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    """When the block raises, the model has the modules, attributes and trainable parameters that it had before.

    PEFT wraps layers in place and cannot take all of it back: `unload` knows the layers, not what requires a gradient,
    and `delete_adapter` leaves layers wrapped. Weights that are written in place are not restored.
    """
    before = [
        (module, type(module), {name: (value, _content(value)) for name, value in vars(module).items()})
        for module in model.modules()
    ]
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, attributes in before:
            module.__class__ = kind
            vars(module).clear()
            for name, (value, content) in attributes.items():
                if content is not None:
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)
                vars(module)[name] = value
        for parameter, learns in learning:
            parameter.requires_grad_(learns)
        raise


def _content(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else None
