"""What is checked of an adapter on a model of any kind: all it does, against formulas, plain PEFT and the model itself.

Nothing here compares the package with itself. A part is right, or it is refused: by a `MatryoshkaError`, or by PEFT
before the package is reached. Anything else, another exception included, is wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import torch
from conftest import randomize
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from matryoshka_lora import MatryoshkaError, NestedAdapter, Nesting, load, nest

RANKS = (1, 2, 4)
NESTING = Nesting(list(RANKS))
LENGTH = 24
"""Of sequences, in tokens."""

APART = 1e-2
"""What ranks must differ by at least, as a share of the largest number, or nothing would be shown."""

Inputs = Callable[[int, int], Mapping[str, Tensor]]
"""A model's inputs: of so many rows, which are so long where rows have a length; the same ones each time."""


class WrongError(AssertionError):
    """Something is not as the formulas, PEFT or transformers have it."""


class NothingToCheckError(Exception):
    """The model has no such part, or plain PEFT or transformers fails in it."""


@dataclass
class Verdict:
    """What was found of one part.

    Attributes:
        state: ``"right"``, ``"refused"``, ``"wrong"``, or ``"none"`` where there is nothing to check.
        why: The refusal's message, what is wrong, or why there is nothing to check.
    """

    state: str
    why: str = ""


@dataclass
class Report:
    """What was found of one case.

    Attributes:
        layers: How many have an adapter.
        unused: Those that the model does not call, so that they never learn.
        parts: In the order they were checked.
    """

    layers: int = 0
    unused: list[str] = field(default_factory=list)
    parts: dict[str, Verdict] = field(default_factory=dict)


PARTS = ("ranks", "rows", "merge", "reorder", "save")


def check(case: Case, parts: Sequence[str] = PARTS) -> Report:
    """Check parts of a case, which are its methods; the last two take the adapter to another form."""
    report = Report()

    def is_right(name: str) -> bool:
        try:
            getattr(case, name)()
            verdict = Verdict("right")
        except MatryoshkaError as refusal:
            verdict = Verdict("refused", str(refusal))
        except NothingToCheckError as reason:
            verdict = Verdict("none", str(reason))
        except WrongError as wrong:
            verdict = Verdict("wrong", str(wrong))
        except Exception as error:
            verdict = Verdict("wrong", f"{type(error).__name__}: {error}")
        report.parts[name] = verdict
        return verdict.state == "right"

    if is_right("nest") and is_right("train"):
        for name in parts:
            is_right(name)
        report.layers, report.unused = len(case.layers), case.unused
    return report


class Case:
    """A model in eval mode, the targets of its adapter, and what plain PEFT makes of the exported ranks.

    Args:
        base: Is not changed. In float64 the comparisons are closer.
        targets: Of ``LoraConfig``.
        folder: For files; empty.
        inputs: Of the model.
        output: The field of the model's output that is compared; dimension 0 is rows.
    """

    def __init__(
        self, base: Any, targets: Mapping[str, Any], folder: Path, inputs: Inputs, output: str = "logits"
    ) -> None:
        self.base, self.targets, self.folder = base, targets, folder
        self.inputs, self.output = inputs, output
        # Rounding goes through the whole model.
        self.close = 1e-5 if next(base.parameters()).dtype == torch.float64 else 1e-4
        self.adapter: NestedAdapter
        self.layers: dict[str, Any] = {}
        self.unused: list[str] = []
        self._plain: dict[int, Any] = {0: base}

    def answer(self, model: Any, rows: int = 2, length: int = LENGTH, first: int | None = None) -> Tensor:
        """What a model says to the inputs, or to the first rows of them alone."""
        inputs = {
            name: each[:first] if isinstance(each, Tensor) else each for name, each in self.inputs(rows, length).items()
        }
        with torch.set_grad_enabled(model.training):
            found: Tensor = getattr(model(**inputs), self.output)
        return found

    def plain(self, rank: int) -> Any:
        """What plain PEFT makes of the exported rank; 0 is the base model."""
        if rank not in self._plain:
            folder = self.folder / f"{'reordered' if self.adapter.reordered else 'trained'}-rank-{rank}"
            self.adapter.export(folder, rank)
            self._plain[rank] = PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval()
        return self._plain[rank]

    def nest(self) -> None:
        """Every layer that PEFT targets is nested; "all-linear" leaves none out but the output layer."""
        config = LoraConfig(r=NESTING.max_rank, lora_alpha=NESTING.max_rank, **copy.deepcopy(dict(self.targets)))
        model = copy.deepcopy(self.base)
        try:
            model = get_peft_model(model, config)
        except Exception as error:
            raise NothingToCheckError(f"PEFT: {error}") from error
        self.adapter = nest(model, RANKS, deploy="paper")
        randomize(model)
        self.layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
        if self.targets["target_modules"] == "all-linear":
            output = self.base.get_output_embeddings()
            for name, module in self.base.named_modules():
                if isinstance(module, (nn.Linear, Conv1D)) and module is not output and name not in self.layers:
                    raise WrongError(f"linear layer {name} was left out")

    def train(self) -> None:
        """Gradients are those of the formula, in the first and the last linear layer; a step changes every factor."""
        model = self.adapter.model.train()
        # The input of each call, and the gradients of its output: of what the layer has said, whatever the model then
        # does to it in place.
        calls: dict[str, list[tuple[Tensor, list[Tensor]]]] = {}

        def kept(name: str) -> Any:
            def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
                if out.requires_grad:
                    gradients: list[Tensor] = []
                    out.register_hook(gradients.append)
                    calls.setdefault(name, []).append((given[0].detach().clone(), gradients))

            return hook

        handles = [
            module.register_forward_hook(kept(name))
            for name, module in self.layers.items()
            if isinstance(module, LoraLinear)
        ]
        loss = self.answer(model).square().mean()
        if not loss.requires_grad:  # as PEFT's manual says of reversible layers and of gradient checkpointing
            model.enable_input_require_grads()
            loss = self.answer(model).square().mean()
        if not bool(loss.isfinite()):
            raise WrongError(f"the loss is {loss.item()}")
        loss.backward()
        for handle in handles:
            handle.remove()
        learning = [name for name, module in self.layers.items() if all(map(_has_gradient, parameters(module)))]
        if not learning:
            raise WrongError("no layer got a gradient")
        linear = [name for name in learning if name in calls]
        for name in {*linear[:1], *linear[-1:]}:
            self._check_gradient(name, calls[name])
        before = {name: factors(self.layers[name]) for name in learning}
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
        for name, then in before.items():
            if any(map(torch.equal, then, factors(self.layers[name]))):
                raise WrongError(f"a factor of {name} did not change in a step")
        self.unused = sorted(set(self.layers) - set(learning))
        for name in self.unused:  # as training leaves it
            parameters(self.layers[name])[1].data.zero_()
        model.zero_grad()
        model.eval()

    def _check_gradient(self, name: str, calls: list[tuple[Tensor, list[Tensor]]]) -> None:
        A, B = parameters(self.layers[name])
        p = oracle.trained_p(RANKS)
        expected_A, expected_B = torch.zeros_like(A).double(), torch.zeros_like(B).double()
        for x, gradients in calls:
            for gradient in gradients:
                tokens, g = (part.reshape(-1, part.shape[-1]).double() for part in (x, gradient))
                expected_B += g.T @ (tokens @ A.detach().double().T * p)
                expected_A += (g @ B.detach().double() * p).T @ tokens
        for parameter, expected, which in ((A, expected_A, "A"), (B, expected_B, "B")):
            self._same(parameter.grad, expected, f"the gradient of {which} in {name}")

    def ranks(self) -> None:
        """At every rank, and under ``disable_adapter``, the model says what plain PEFT says, and each another thing."""
        found = {0: self.answer(self.base)}
        if difference(self.answer(self.base), found[0]) > 0:
            raise NothingToCheckError("the model itself gives another answer each time")
        for rank in RANKS:
            self.adapter.set_rank(rank)
            found[rank] = self.answer(self.adapter.model)
            self._same(found[rank], self.answer(self.plain(rank)), f"rank {rank}")
            for other in set(found) - {rank}:
                if difference(found[rank], found[other]) < APART:
                    raise WrongError(f"ranks {rank} and {other} hardly differ, so that nothing is shown")
        with self.adapter.model.disable_adapter():
            self._same(self.answer(self.adapter.model), found[0], "the base model under the adapter")

    def rows(self) -> None:
        """Each row of a batch has its own rank, or the batch is refused."""
        if difference(self.answer(self.base, 3, first=1), self.answer(self.base, 3)[:1]) > self.close:
            raise NothingToCheckError("the model itself mixes rows: what it says to one depends on the others")
        # Few tokens as well: where a layer flattens its input, rows and tokens must not be taken for each other.
        for length in (LENGTH, 1, 2):
            for ranks in ((4, 1, 0, 2), (2, 4)):
                with self.adapter.rows(ranks):
                    found = self.answer(self.adapter.model, len(ranks), length)
                for row, rank in enumerate(ranks):
                    expected = self.answer(self.plain(rank), len(ranks), length)[row]
                    self._same(found[row], expected, f"row {row} of ranks {ranks} at length {length}")

    def merge(self) -> None:
        """A merged rank computes the same, and can be taken out again."""
        for rank in (1, 4):
            expected = self.answer(self.plain(rank))
            self.adapter.merge(rank)
            try:
                self._same(self.answer(self.adapter.model), expected, f"merged rank {rank}")
            finally:
                self.adapter.unmerge()
            self._same(self.answer(self.adapter.model), expected, f"rank {rank} after unmerging")

    def reorder(self) -> None:
        """Full rank stays what was trained, ``W + B P A`` in every layer, and lower ranks are the closest ones."""
        dense, deltas = copy.deepcopy(self.base), {}
        for name, module in self.layers.items():
            deltas[name] = self._delta(module, oracle.trained_p(RANKS))
            owner = dense.get_submodule(name.replace(".base_layer", ""))
            leaf = getattr(module, "parameter_name", "weight")
            weight = getattr(owner, leaf).data
            # A new one for each layer: some share theirs.
            setattr(owner, leaf, nn.Parameter(weight + deltas[name].to(weight.dtype).reshape(weight.shape)))
        self.adapter.reorder()
        self._plain = {0: self.base}
        self.adapter.set_rank(NESTING.max_rank)
        self._same(self.answer(self.adapter.model), self.answer(dense), "full rank after reordering")
        for name in (next(iter(deltas)), list(deltas)[-1]):
            wanted = deltas[name].flatten(0, -3) if deltas[name].ndim > 2 else deltas[name][None]
            errors = oracle.best_errors(wanted[0])
            for rank in range(1, NESTING.max_rank + 1):
                prefix = self._delta(self.layers[name], (torch.arange(4) < rank).double()).reshape(wanted.shape)
                off = (wanted[0] - prefix[0]).norm()
                if abs(off - errors[min(rank, len(errors) - 1)]) > self.close * wanted[0].norm():
                    raise WrongError(f"{name} at rank {rank} is {off:.5f} off, the closest one {errors[rank]:.5f}")

    def _delta(self, module: Any, p: Tensor) -> Tensor:
        """``B diag(p) A`` in the layout of a layer's weight, by the oracle; experts are dimension 0."""
        A, B = factors(module)
        if isinstance(module, ParamWrapper):
            return oracle.expert_delta(A, B, p, module.num_experts, not module._did_swap_in_out_features)
        product = torch.einsum("or,r,ri->oi", B.flatten(1).double(), p, A.flatten(1).double())
        return product.T if isinstance(module.get_base_layer(), Conv1D) else product

    def save(self) -> None:
        """The saved folder is the full rank to plain PEFT and every rank to `load`, and so are exports of it."""
        self.adapter.save(self.folder / "saved")
        loaded = load(copy.deepcopy(self.base), self.folder / "saved")
        plain = PeftModel.from_pretrained(copy.deepcopy(self.base), self.folder / "saved").eval()
        self._same(self.answer(loaded.model), self.answer(plain), "the saved folder at full rank")
        for rank in range(1, NESTING.max_rank + 1):
            self.adapter.set_rank(rank)
            loaded.set_rank(rank)
            expected = self.answer(self.plain(rank))
            self._same(self.answer(self.adapter.model), expected, f"rank {rank} after reordering")
            self._same(self.answer(loaded.model), expected, f"rank {rank} after loading")

    def _same(self, found: Tensor | None, expected: Tensor, what: str) -> None:
        if found is None or found.shape != expected.shape:
            raise WrongError(f"{what}: {None if found is None else tuple(found.shape)} for {tuple(expected.shape)}")
        off = difference(found, expected)
        if not off <= self.close:
            raise WrongError(f"{what} is off by {off:.2g} of the largest number")


def parameters(module: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B as PEFT has them."""
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def factors(module: Any) -> tuple[Tensor, ...]:
    """Copies of A and B."""
    return tuple(parameter.detach().clone() for parameter in parameters(module))


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest expected number."""
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12)).item()


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())
