"""How many rows a model is called with, so that nothing else is taken for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from matryoshka_lora.errors import MatryoshkaError

PLACES = ("position_ids", "seq_idx", "cu_seq_lens_q")
"""The inputs of a model that say where in a row a sequence begins."""


def check_rows_apart(inputs: Mapping[str, Any], rule: str) -> None:
    """Raises MatryoshkaError where the inputs of a model show that several rows were joined into one.

    What does not show: sequences that were joined without telling the model, for which they are one.
    """
    positions, index, ends = (inputs.get(name) for name in PLACES)
    mask = inputs.get("attention_mask")
    padded = isinstance(mask, Tensor) and not bool(mask.bool().all())  # positions of padding may begin anywhere
    joined = isinstance(ends, Tensor) and len(ends) > 2
    for places in (positions, index):
        if isinstance(places, Tensor) and places.ndim == 2 and len(places) == 1 and not padded:
            steps = places.diff()
            joined = joined or bool((steps < 0).any() if places is positions else (steps != 0).any())
    if joined:
        raise MatryoshkaError(
            f"this batch holds several sequences in one row, and rule {rule!r} gives each row a rank of its own: take "
            "a data collator that pads, set packing and padding_free to False, or take another rule"
        )


class RowCount:
    """Knows the number of rows while a model computes; all nested layers of the model share it.

    A rank per row goes by the first dimension of a layer's input. Some models put tokens, windows or images there.
    Hooks on the model and on the models that are its parts, which `generate` may call by themselves, see the input.
    They stay from the first `nest` on: new ones for each context would make a compiled model compile again.

    Attributes:
        rows: Of the outermost call that is going on; None where it is not known.
        exact: The call is one of the whole model. `generate` calls the base model, maybe with several beams for a row.
        unproven: How many layers have not yet shown that they take rows first.
        contexts: How many are open in which rows have ranks of their own.
        in_training: Whether rows have ranks of their own in training.
    """

    def __init__(self, model: PeftModel) -> None:
        self.rows: int | None = None
        self.exact = False
        self.unproven = 0
        self.contexts = 0
        self.in_training = False
        self._caller: nn.Module | None = None
        self._handles: list[RemovableHandle] = []
        for part in (model, *_models(model.get_base_model())):
            self._handles.append(part.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(part.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if self._caller is not None and self._caller is not module:  # itself, where an interrupt left it there
            return
        name, found = _main_input(module, args, kwargs)
        self._caller, self.exact = module, isinstance(module, PeftModel)
        self.rows = None if found is None else found.shape[0]
        wanted = self.contexts > 0 or (self.in_training and module.training)
        if found is not None and wanted and self.unproven and _is_square(found):
            self._see(module, name, found)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and module is self._caller:
            self._caller = self.rows = None

    def _see(self, module: nn.Module, name: str | None, ids: Tensor) -> None:
        """As many rows as tokens prove nothing: a call with one token less lets the layers see which is which."""
        if distributed.is_available() and distributed.is_initialized():
            return  # the other processes would not take part
        with torch.no_grad(), torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
            try:
                module.forward(ids[:, :-1]) if name is None else module.forward(**{name: ids[:, :-1]})
            except MatryoshkaError:
                raise
            except Exception:  # it takes more than this input; the layers will refuse
                return


def _models(model: nn.Module) -> Iterator[nn.Module]:
    yield model
    for part in model.children():
        if isinstance(part, PreTrainedModel):
            yield from _models(part)


def _main_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str | None, Tensor | None]:
    """The input whose first dimension is the rows, and its name where it was given by name."""
    main = getattr(module, "main_input_name", "input_ids")
    names = (main, "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", *kwargs)
    given = [(None, value) for value in args[:1]] + [(name, kwargs.get(name)) for name in names]
    return next(((name, value) for name, value in given if isinstance(value, Tensor) and value.ndim), (None, None))


def _is_square(ids: Tensor) -> bool:
    return ids.ndim == 2 and not ids.is_floating_point() and ids.shape[0] == ids.shape[1] > 1
