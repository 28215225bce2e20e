"""Take a change of a model's tree of modules back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
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
