"""Whether an adapter's tensors fit a base model, decided before the model is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.layout import factor_keys

_PREFIX = "base_model.model."


def check_fits(base_model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], path: str) -> None:
    """Every target of the config has its two factors in the file, of the right shapes, and the file has no others.

    Raises:
        MatryoshkaError: A tensor is missing, is too many, or has another shape than the layer that it is for.
    """
    modules = {name.removeprefix(_PREFIX): (key_A, key_B) for name, key_A, key_B in factor_keys(tensors)}
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
    return f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
