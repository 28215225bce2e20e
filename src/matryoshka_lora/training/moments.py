"""Second moments of the inputs and the output gradients of a model's LoRA layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.state import PartialState
from torch import Tensor, nn

from matryoshka_lora.errors import NotFiniteError
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.progress import training_bar
from matryoshka_lora.tensors import at_least_float32
from matryoshka_lora.training.data import TrainingData, num_terms
from matryoshka_lora.training.factors import ModelFactors
from matryoshka_lora.training.train_ranks import trainable_factors


class Moments(NamedTuple):
    """The second moments of a layer, in the coordinates of its factors.

    Attributes:
        inputs: The mean of ``h h^T`` over the positions with a gradient, where ``h = A x``, shape
            (R, R).
        outputs: The sum of ``b b^T`` over these positions, by the number of terms of the loss,
            shape (R, R). ``b`` is the gradient with respect to h, which is ``s B^T g``.
    """

    inputs: Float64Array
    outputs: Float64Array


class MomentRecorder:
    """Accumulates the second moments of LoRA layers over backwards.

    Layers that get no gradient have none, and neither have layers whose A is no module, such as
    embeddings.
    """

    def __init__(self, factors: ModelFactors) -> None:
        self._factors = factors
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._num_positions: Counter[str] = Counter()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Return a context in which each backward counts, and only the factors are trainable."""
        model = self._factors.model
        modules = {id(getattr(module, "weight", None)): module for module in model.modules()}
        with trainable_factors(self._factors), ExitStack() as hooks:
            for name, (A, _) in self._factors.parameters.items():
                module = modules.get(id(A))
                if module is not None:
                    hook = module.register_forward_hook(partial(self._record, name))
                    hooks.callback(hook.remove)
            yield

    def _record(self, name: str, module: nn.Module, args: Any, hidden: Any) -> None:
        values = hidden.detach()  # a hook that refers to its tensor would keep the graph in memory

        def accumulate(gradient: Tensor) -> None:
            # Of a convolution, the components are dim 1.
            dim = 1 if self._factors.parameters[name][0].ndim > 2 else -1
            h, b = [x.detach().movedim(dim, -1).flatten(0, -2) for x in (values, gradient)]
            has_gradient = b.ne(0).any(dim=-1)  # padding has none
            h, b = [at_least_float32(x[has_gradient]) for x in (h, b)]
            # On the CPU, because some devices have no float64.
            self._inputs[name] = self._inputs.get(name, 0) + (h.T @ h).cpu().double()
            self._outputs[name] = self._outputs.get(name, 0) + (b.T @ b).cpu().double()
            self._num_positions[name] += len(h)

        if hidden.requires_grad:  # not in the first forward of a checkpointed layer
            hidden.register_hook(accumulate)

    def moments(self, num_terms: int) -> dict[str, Moments]:
        """Return the second moments of each layer with a gradient.

        Args:
            num_terms: The number of terms of what was backpropagated: positions, examples or steps.

        Raises:
            NotFiniteError: A moment is NaN or infinite.
        """
        moments: dict[str, Moments] = {}
        for name, count in self._num_positions.items():
            if count > 0:
                layer = self._inputs[name] / count, self._outputs[name] / num_terms
                if not all(moment.isfinite().all() for moment in layer):
                    raise NotFiniteError(
                        f"The gradients of layer {name} are NaN or infinite. Load the model in "
                        "bfloat16 or float32. Or reorder without it."
                    )
                moments[name] = Moments(layer[0].numpy(), layer[1].numpy())
        return moments


def second_moments(
    factors: ModelFactors, data: TrainingData, max_examples: int, seed: int = 0
) -> dict[str, Moments]:
    """Return the second moments of each layer, with the whole adapter active.

    For a language model, a random direction of the logits is backpropagated for each position that
    counts in the loss. Its second moment is the Fisher information matrix of the softmax, so the
    labels do not matter. For other models, the loss is backpropagated.

    Args:
        seed: The seed of the examples and of the directions.

    Raises:
        NotFiniteError: A moment is NaN or infinite.
    """
    recorder = MomentRecorder(factors)
    logits: list[Tensor] = []
    num_terms_seen = 0
    generator = torch.Generator().manual_seed(seed)
    with recorder.recording(), ExitStack() as hooks:
        head = getattr(factors.model, "get_output_embeddings", lambda: None)()
        if head is not None:
            hook = head.register_forward_hook(lambda _, args, output: logits.append(output))
            hooks.callback(hook.remove)
        batches = data.batches(data.sample(max_examples, seed))
        is_shown = data.show_progress and PartialState().is_main_process
        for batch in training_bar(batches, "second moments", is_shown=is_shown, leave=False):
            logits.clear()
            loss = data.loss(batch)
            if len(logits) == 1:
                num_terms_seen += _backward_of_directions(loss, logits[0], generator)
            else:
                (loss * num_terms(batch)).backward()  # type: ignore[no-untyped-call]
                num_terms_seen += num_terms(batch)
    return recorder.moments(num_terms_seen)


def _backward_of_directions(loss: Tensor, logits: Tensor, generator: torch.Generator) -> int:
    """Compute the gradients of random directions of the logits; return the number of positions.

    With p the softmax and v normal numbers, ``sqrt(p) v - p (sqrt(p) . v)`` has the second moment
    ``diag(p) - p p^T``, the Fisher information of the logits.
    """
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    counts = gradient.ne(0).any(dim=-1)
    p = logits.detach()[counts].float().softmax(dim=-1)
    v = torch.randn(p.shape, generator=generator).to(p.device) * p.sqrt()
    directions = torch.zeros_like(logits)
    directions[counts] = (v - p * v.sum(dim=-1, keepdim=True)).to(logits)
    logits.backward(directions)  # type: ignore[no-untyped-call]
    return int(counts.sum())
