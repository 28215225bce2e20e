"""Second moments of the inputs and the output gradients of a model's LoRA layers."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
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


def second_moments(
    factors: ModelFactors, data: TrainingData, max_examples: int, seed: int = 0
) -> dict[str, Moments]:
    """Return the second moments of each layer, with the whole adapter active.

    For a language model, a random direction of the logits is backpropagated for each position that
    counts in the loss. Its second moment is the Fisher information matrix of the softmax, so the
    labels do not matter. For other models, the loss is backpropagated.

    Layers that get no gradient are left out, and so are layers whose A is no module, such as
    embeddings.

    Args:
        factors: The factors.
        data: The examples.
        max_examples: The number of examples to use, at random.
        seed: The seed of the examples and of the directions.

    Raises:
        NotFiniteError: A moment is NaN or infinite.
    """
    modules = {id(getattr(module, "weight", None)): module for module in factors.model.modules()}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    num_positions: Counter[str] = Counter()

    def record(name: str, module: nn.Module, args: Any, hidden: Any) -> None:
        def accumulate(gradient: Tensor) -> None:
            # Of a convolution, the components are dim 1.
            dim = 1 if factors.parameters[name][0].ndim > 2 else -1
            h, b = [x.detach().movedim(dim, -1).flatten(0, -2) for x in (hidden, gradient)]
            has_gradient = b.ne(0).any(dim=-1)  # padding has none
            h, b = [at_least_float32(x[has_gradient]) for x in (h, b)]
            # On the CPU, because some devices have no float64.
            inputs[name] = inputs.get(name, 0) + (h.T @ h).cpu().double()
            outputs[name] = outputs.get(name, 0) + (b.T @ b).cpu().double()
            num_positions[name] += len(h)

        if hidden.requires_grad:  # not in the first forward of a checkpointed layer
            hidden.register_hook(accumulate)

    logits: list[Tensor] = []
    num_terms_seen = 0
    generator = torch.Generator().manual_seed(seed)
    with trainable_factors(factors), ExitStack() as hooks:
        for name, (A, _) in factors.parameters.items():
            module = modules.get(id(A))
            if module is not None:
                hooks.callback(module.register_forward_hook(partial(record, name)).remove)
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
    moments: dict[str, Moments] = {}
    for name, count in num_positions.items():
        if count > 0:
            layer = inputs[name] / count, outputs[name] / num_terms_seen
            if not all(moment.isfinite().all() for moment in layer):
                raise NotFiniteError(
                    f"The gradients of layer {name} are NaN or infinite. Load the base model in "
                    "bfloat16 or float32. Or reorder the adapter without data."
                )
            moments[name] = Moments(layer[0].numpy(), layer[1].numpy())
    return moments


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
