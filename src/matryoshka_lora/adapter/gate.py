"""The diagonal that stands in a layer, of all rows or of each, and how many rows there are."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.ops import full_precision
from matryoshka_lora.unofficial import backward_node

PLACES = ("position_ids", "seq_idx", "cu_seq_lens_q")
"""The inputs of a model that say where in a row a sequence begins."""

_MEDIA = ("pixel", "image", "video", "audio", "speech", "input_features", "input_values")
"""Parts of the names of inputs that are no text."""

_numbers = count()
_opened_here: ContextVar[frozenset[int]] = ContextVar("matryoshka_lora_opened_here", default=frozenset())
"""The numbers of the contexts of rows that this thread or task has open. One that begins within them knows them too."""


@dataclass(eq=False)
class Gate:
    """A diagonal on the device of its layer.

    ``diagonal`` has shape (R,) or (rows, R). ``scale`` is a tensor of no dimensions that multiplies the output, where
    PEFT multiplies it too, so that a deployed prefix is PEFT's result to the last bit. Both are tensors, so that
    compiled code needs no recompilation when they change; they are replaced and never written in place, so that a
    backward pass still finds the values of its forward. With ``allow_fewer``, a batch may have fewer rows than the
    diagonal, as the last one of an epoch does. Without ``exact``, eval mode may compute in the activations' dtype.
    ``learn`` says which columns of B and rows of A receive a gradient; None means all.
    ``uniform`` says that all rows have the same diagonal, so that it does not matter which is which.
    """

    diagonal: Tensor
    scale: Tensor | None = None
    allow_fewer: bool = False
    exact: bool = True
    learn: Tensor | None = None
    uniform: bool = False
    _moved: Gate | None = field(default=None, init=False, repr=False)

    @classmethod
    def on(
        cls,
        device: torch.device,
        diagonal: Tensor,
        scale: Tensor | float | None = None,
        allow_fewer: bool = False,
        exact: bool = True,
        learn: Tensor | None = None,
    ) -> Gate:
        """One whose tensors are on ``device``; the arguments are its attributes."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        scaled = None if scale is None else torch.as_tensor(scale, dtype=dtype, device=device)
        learning = None if learn is None else learn.to(device)
        uniform = diagonal.ndim == 1 or bool((diagonal == diagonal[:1]).all())
        return cls(diagonal.to(device, dtype), scaled, allow_fewer, exact, learning, uniform)

    def at(self, device: torch.device) -> Gate:
        """Itself, or its one copy on the device that a layer was moved to after the gate was made."""
        if self.diagonal.device == device:
            return self
        if self._moved is None or self._moved.diagonal.device != device:
            self._moved = Gate.on(device, self.diagonal, self.scale, self.allow_fewer, self.exact, self.learn)
        return self._moved

    def apply(self, hidden: Tensor, spatial: int = 0) -> Tensor:
        """``hidden`` times the diagonal on its rank dimension, which ``spatial`` dimensions follow."""
        rank, nested_rank = hidden.shape[-1 - spatial], self.diagonal.shape[-1]
        if rank != nested_rank:
            raise MatryoshkaError(
                f"an adapter was nested at rank {nested_rank} and has rank {rank} now: PEFT has put another one in its "
                "place (hotswap_adapter). Load that one under a name of its own"
            )
        p = full_precision(self.for_rows(hidden.shape, spatial), hidden.dtype)
        rows = () if p.ndim == 1 else (hidden.shape[0], *(1,) * (hidden.ndim - 2 - spatial))
        return (hidden * p.view(*rows, -1, *(1,) * spatial)).to(hidden.dtype)

    def learning(self, weight: Tensor, dim: int) -> Tensor | None:
        """The weight with gradient in the learning rows or columns only; None where all of it learns."""
        if self.learn is None or not torch.is_grad_enabled():
            return None
        shape = [-1 if d == dim else 1 for d in range(weight.ndim)]
        return torch.where(self.learn.view(shape), weight, weight.detach())

    def for_rows(self, shape: torch.Size, spatial: int = 0) -> Tensor:
        """The one diagonal of all rows, or one for each row of a batch of this shape.

        Beam search and several returned sequences repeat each row in place. Rows that were packed, or routed to
        experts, are no longer rows: they must not be served by accident.
        """
        diagonal, given = self.diagonal, self.diagonal.shape[0]
        rows = shape[0] if len(shape) >= 2 + spatial else 1  # else the input has no batch dimension
        if diagonal.ndim == 1 or rows == given == shape[0]:
            return diagonal
        if self.allow_fewer and rows < given and len(shape) >= 2 + spatial:
            return diagonal[:rows]
        has_tokens = len(shape) > 2 or spatial > 0
        # Without gradients only, as in `generate`: a wrong number of rows in a training batch must not pass for beams.
        if has_tokens and not torch.is_grad_enabled() and rows % given == 0:
            return diagonal.repeat_interleave(rows // given, dim=0)
        raise wrong_number(given, rows)


def wrong_number(given: int, rows: int) -> MatryoshkaError:
    """The error for a batch that has not as many rows as there are ranks."""
    return MatryoshkaError(
        f"{given} rows have a rank, but a layer got {rows} rows: give one rank for each row of the batch. "
        "Packed, padding-free or flattened batches have no rows left; turn packing and padding_free off"
    )


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
        self._text_only: frozenset[int] | None = None  # in a call
        self._text_only_in_generate: frozenset[int] | None = None
        self.unproven = 0
        self.contexts = 0
        self.in_training = False
        self._open: dict[int, int] = {}  # the threads of the contexts that are open, by their numbers
        self._caller: nn.Module | None = None
        self._handles: list[RemovableHandle] = []
        for part in (model, *_models(model.get_base_model())):
            self._handles.append(part.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(part.register_forward_hook(self._leave, always_call=True))

    def forget(self) -> None:
        """Forget a call that an interrupt has ended, after which PyTorch calls no hooks."""
        self._caller = self.rows = self._text_only = None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """A context that may be open several times in one flow of control, and not in two.

        A flow is a thread or an asyncio task, with what copies its context variables: `asyncio.to_thread`, or a task
        that begins within the context. No other may call the model meanwhile.

        Raises:
            MatryoshkaError: It is open in another thread or task.
        """
        number = next(_numbers)
        self._open[number] = threading.get_ident()  # first, so that of two threads at once not both find nobody
        try:
            _opened_here.set(_opened_here.get() | {number})
            self._check_opened_here()
            yield
        finally:
            del self._open[number]
            _opened_here.set(_opened_here.get() - {number})

    @property
    def text_only(self) -> frozenset[int] | None:
        """The modules that get rows of text, by id, where images are not known to be one for each row.

        None where all layers may have a rank per row.
        """
        return self._text_only if self._text_only is not None else self._text_only_in_generate

    @contextmanager
    def generating(self, model: PeftModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """A context for `generate`, which may call a model's parts for images by themselves, without the text."""
        before = self._text_only_in_generate
        if self.contexts > 0:
            given = {"input_ids" if name == "inputs" else name: value for name, value in kwargs.items()}
            _, prompts = main_input(model, args, kwargs)
            self._text_only_in_generate = _text_only(model, args, given, prompts, as_many=True)
        try:
            yield
        finally:
            self._text_only_in_generate = before

    def _check_opened_here(self) -> None:
        here, thread = _opened_here.get(), threading.get_ident()
        others = [opener for number, opener in list(self._open.items()) if number not in here]
        if others:
            in_thread = any(opener != thread for opener in others)
            who, lock = ("thread", "a threading.Lock") if in_thread else ("task", "an asyncio.Lock")
            raise MatryoshkaError(
                f"another {who} has a `with adapter.rows(...)` open on this model, and would compute at these "
                f"ranks: let one {who} wait for the other, for example by {lock}. A call that is to have the ranks of "
                "a context belongs in the thread and the task that opened it, or in asyncio.to_thread"
            )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if self._open and backward_node() is None:  # a backward pass that computes again may have threads of its own
            self._check_opened_here()
        whole = isinstance(module, PeftModel)  # which no other calls; it is still there where an interrupt left it
        if self._caller is not None and self._caller is not module and not whole:
            return
        name, found = main_input(module, args, kwargs)
        self._caller, self.exact = module, whole
        self.rows = None if found is None else found.shape[0]
        wanted = self.contexts > 0 or (self.in_training and module.training)
        self._text_only = _text_only(module, args, kwargs, found) if wanted else None
        if found is not None and wanted and self.unproven and _is_square(found):
            self._see(module, name, found)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and module is self._caller:
            self.forget()

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


def main_input(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str | None, Tensor | None]:
    """The input whose first dimension is the rows, and its name where it was given by name."""
    main = getattr(module, "main_input_name", "input_ids")
    names = (main, "inputs", "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", *kwargs)
    given = [(None, value) for value in args[:1]] + [(name, kwargs.get(name)) for name in names]
    return next(((name, value) for name, value in given if isinstance(value, Tensor) and value.ndim), (None, None))


def _text_only(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], main: Tensor | None, as_many: bool = False
) -> frozenset[int] | None:
    """See `RowCount.text_only`. With ``as_many``, images must also be as many as the rows."""
    base = module.get_base_model() if isinstance(module, PeftModel) else module
    taken = _parameters(module)
    names = _parameters(base) if "args" in taken else taken
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    inputs = {name: value for name, value in given.items() if isinstance(value, (Tensor, list, tuple))}
    known = main is None or _media_are_rows(base, inputs, main, as_many)
    return None if known else frozenset(_text_modules(base))


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _takes_media(names: Iterable[str]) -> bool:
    return any(part in name for name in names for part in _MEDIA)


def _media_are_rows(base: nn.Module, inputs: Mapping[str, Tensor | Sequence[Any]], main: Tensor, as_many: bool) -> bool:
    """Whether what a model gets beside a text is known to be one for each row, where it is as many as the rows.

    A text says by tokens of their own where images belong. With one in each row, n images of n rows are one for each.
    A model without such tokens, as CLIP, has nothing but their order.
    """
    media = [value for name, value in inputs.items() if _takes_media([name])]
    if not media or not any(name in inputs for name in ("input_ids", "inputs_embeds")):
        return True
    config = getattr(base, "config", None)
    fields = vars(config) if isinstance(config, PreTrainedConfig) else {}
    marks = [name for name in fields if _takes_media([name]) and name.endswith(("_token_id", "_token_index"))]
    tokens = {fields[name] for name in marks if isinstance(fields[name], int)}
    alike = all(len(value) == len(main) for value in media if not isinstance(value, Tensor) or value.ndim)
    if not tokens or (as_many and not alike):
        return alike
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return False
    in_rows = [(ids == token).any(dim=1) for token in sorted(tokens)]
    there = [rows for rows in in_rows if bool(rows.any())]
    return bool(there) and all(bool(rows.all()) for rows in there)


def _text_modules(base: nn.Module) -> Iterator[int]:
    """The ids of the modules that can get nothing but a model's text: those of its language model, and its head."""
    parts = [part for part in base.modules() if isinstance(part, PreTrainedModel)]
    try:
        embedding, head = parts[0].get_input_embeddings(), parts[0].get_output_embeddings()
    except (IndexError, NotImplementedError, AttributeError):
        return
    inside = [part for part in parts if any(module is embedding for module in part.modules())]
    if inside and not _takes_media(_parameters(inside[-1])):
        for part in (inside[-1], head):
            yield from map(id, part.modules() if part is not None else ())


def _is_square(ids: Tensor) -> bool:
    return ids.ndim == 2 and not ids.is_floating_point() and ids.shape[0] == ids.shape[1] > 1
