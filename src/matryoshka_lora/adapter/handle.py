"""`nest` and the handle that it returns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from matryoshka_lora.adapter.attach import attach, nest_copies, nested_layers, trained_besides
from matryoshka_lora.adapter.factors import as_parameters, assign, get_factors, get_parameters
from matryoshka_lora.adapter.state import Inference, NestedState
from matryoshka_lora.adapter.storage import export_rank, save_adapter
from matryoshka_lora.adapter.variant import Gate, NestedVariant
from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.nesting import Nesting
from matryoshka_lora.reordering.factors import reorder_factors
from matryoshka_lora.rules import Rule, get_rule

if TYPE_CHECKING:
    from transformers import TrainerCallback


def nest(
    peft_model: PeftModel,
    nesting: Nesting,
    rule: str | Rule = "matryoshka",
    inference: Inference | None = None,
    adapter: str = "default",
    seed: int = 0,
) -> NestedAdapter:
    """Nest a LoRA adapter: train it by a rule, use it at any rank.

    The model stays an ordinary PEFT model with an ordinary ``LoraConfig``; everything else that PEFT does with an
    adapter goes on working. In training mode the rule's diagonal stands between the factors. In eval mode the adapter
    has the rank of `NestedAdapter.set_rank`, at first the largest.

    Args:
        peft_model: From ``peft.get_peft_model`` or ``PeftModel.from_pretrained``. ``LoraConfig`` must say
            ``r=nesting.max_rank`` and ``lora_alpha=nesting.lora_alpha``.
        nesting: The ranks and their scales.
        rule: One of `matryoshka_lora.rules.RULES`, or its name.
        inference: What eval mode computes before `NestedAdapter.reorder`. ``"keep"`` keeps the fixed diagonal of
            training; ``"prefix"`` makes rank r ``s_r B[:, :r] A[:r]``, as the paper does. None keeps it where the
            rule has one, so that the largest rank is the function that is trained.
        adapter: PEFT's name of the adapter.
        seed: Of the ranks that the rule draws.

    Raises:
        MatryoshkaError: The model, the config or a layer cannot be nested; the message gives the reason and the way
            out, and the model is unchanged.
    """
    if not isinstance(nesting, Nesting):
        raise MatryoshkaError(f"nesting is {nesting!r}; write Nesting([1, 2, 4, 8]) or Nesting.powers_of_two(8)")
    chosen = rule if isinstance(rule, Rule) else get_rule(rule)
    config = getattr(peft_model, "peft_config", {}).get(adapter)
    if getattr(config, "init_lora_weights", None) == "orthogonal" and chosen.name != "lora":
        raise MatryoshkaError(
            "init_lora_weights='orthogonal' starts from columns that cancel out under one scale only: use True or "
            f"'gaussian'. An adapter that is trained already is nested by rule 'lora', not {chosen.name!r}"
        )
    attach(peft_model, NestedState(nesting, chosen, inference or chosen.default_inference, seed), adapter)
    nested = NestedAdapter(peft_model, adapter)
    nested._begin()
    return nested


class NestedAdapter:
    """One adapter of a PEFT model, at every rank.

    Made by `nest` or `load`. It holds no state of its own: what it knows is kept in the model's layers, so
    ``NestedAdapter(copy.deepcopy(adapter.model))`` is the handle of a copy.

    Args:
        model: A PEFT model with a nested adapter.
        adapter: Its name.

    Attributes:
        model: The PEFT model.
        name: PEFT's name of the adapter.
    """

    def __init__(self, model: PeftModel, adapter: str = "default") -> None:
        self.model = model
        self.name = adapter
        self._variants()

    def _layers(self) -> list[tuple[str, Any, NestedVariant]]:
        found = [
            (name, module, module.lora_variant.get(self.name)) for name, module in nested_layers(self.model, self.name)
        ]
        nested = [layer for layer in found if isinstance(layer[2], NestedVariant)]
        if not nested:
            raise MatryoshkaError(f"the model has no nested adapter {self.name!r}: call nest() or load() first")
        if len(nested) < len(found):
            plain = next(name for name, _, variant in found if not isinstance(variant, NestedVariant))
            raise MatryoshkaError(
                f"PEFT has made adapter {self.name!r} anew in layer {plain} after it was nested: call nest() again"
            )
        return nested

    def _variants(self) -> list[NestedVariant]:
        return [variant for _, _, variant in self._layers()]

    @property
    def state(self) -> NestedState:
        """What all layers share: nesting, rule, inference, seed and form."""
        return self._variants()[0].state

    @property
    def nesting(self) -> Nesting:
        """The ranks and scales."""
        return self.state.nesting

    @property
    def rule(self) -> Rule:
        """The training rule."""
        return self.state.rule

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that may be chosen: those that were trained, or all from 1 to R after `reorder`."""
        return self.state.ranks

    @property
    def has_base(self) -> bool:
        """Whether rank 0 is the base model. Not where parts of it were trained whole, such as ``modules_to_save``."""
        return not trained_besides(self._config)

    @property
    def _config(self) -> LoraConfig:
        config: LoraConfig = self.model.peft_config[self.name]
        return config

    @property
    def reordered(self) -> bool:
        """Whether the factors are ordered by `reorder`."""
        return self.state.form == "reordered"

    @property
    def inference(self) -> Inference:
        """``"prefix"`` or ``"keep"``; may be set while the factors are as they were trained."""
        return self.state.inference

    @inference.setter
    def inference(self, value: Inference) -> None:
        state = self.state
        if value not in ("prefix", "keep"):
            raise MatryoshkaError(f"inference is {value!r}; write 'prefix' or 'keep'")
        if value == "keep" and not state.rule.fixed:
            raise MatryoshkaError(f"rule {state.rule.name!r} has no fixed diagonal to keep: write 'prefix'")
        if value != state.inference and state.form == "folded":
            raise MatryoshkaError(
                "this adapter was saved with its diagonal folded in: load a training checkpoint instead"
            )
        self._check_unmerged("change its inference")
        state.inference = value
        for variant in self._variants():
            variant.set_rank(variant.rank)

    @property
    def rank(self) -> int | dict[str, int]:
        """The rank in eval mode: one number, or one for each layer where they differ."""
        ranks = {name: variant.rank for name, _, variant in self._layers()}
        return ranks if len(set(ranks.values())) > 1 else next(iter(ranks.values()))

    def set_rank(self, rank: int | Mapping[str, int]) -> None:
        """Choose the rank in eval mode; costs nothing and may be changed between any two calls.

        Args:
            rank: One rank, or a mapping from a pattern to a rank. A pattern is a regular expression that matches the
                end of a module's name from a dot on, as in PEFT's ``rank_pattern``; the first that matches counts,
                and layers that none matches keep their rank.

        Raises:
            MatryoshkaError: A rank was not trained, a pattern matches no layer, or the adapter is merged.
        """
        state = self.state
        patterns = dict(rank) if isinstance(rank, Mapping) else {".*": rank}
        for value in patterns.values():
            state.check_rank(value)
        self._check_unmerged("change its rank")
        layers = list(self._layers())
        for pattern in patterns:
            if not any(_matches(pattern, name) for name, _, _ in layers):
                raise MatryoshkaError(f"no layer's name ends in {pattern!r}; layers are named like {layers[0][0]}")
        chosen: list[tuple[NestedVariant, int]] = []
        for name, _, variant in layers:
            match = next((pattern for pattern in patterns if _matches(pattern, name)), None)
            if match is not None:
                chosen.append((variant, patterns[match]))
        for variant, value in chosen:
            variant.set_rank(value)

    @contextmanager
    def rows(self, ranks: Sequence[int], exact: bool = True) -> Iterator[None]:
        """A context in which row j of every batch has rank ``ranks[j]``: in forward, in backward and in ``generate``.

        In ``generate``, beams and several returned sequences of a row share its rank. A backward pass belongs inside
        the context: with gradient checkpointing it runs the forward again.

        Args:
            ranks: One for each row. Rank 0 is the base model without the adapter, see `has_base`.
            exact: Whether eval mode computes as PEFT does, in the dtype of the factors. False computes the update of
                plain linear layers in the dtype of the activations, which beside a bfloat16 base is much faster and
                rounds otherwise; it makes no difference where both dtypes are the same.

        Raises:
            MatryoshkaError: A rank was not trained, the adapter is merged or not the active one, or (from the forward)
                the batch has another number of rows.
        """
        state = self.state
        ranks = list(ranks)
        for rank in ranks:
            if rank != 0 or isinstance(rank, bool):
                state.check_rank(rank)
        if not ranks:
            raise MatryoshkaError("rows() needs one rank for each row of the batch; the list is empty")
        if 0 in ranks and not self.has_base:
            raise MatryoshkaError(
                f"rank 0 is not the base model here: {' and '.join(trained_besides(self._config))} changed parts of it "
                "that no rank takes out. Load the base model by itself"
            )
        self._check_unmerged("give each row a rank")
        self._check_routing()
        diagonals = {rank: state.mask(rank) * (state.scale(rank) if rank else 0.0) for rank in set(ranks)}
        with self._standing(torch.stack([diagonals[rank] for rank in ranks]), exact):
            yield

    @contextmanager
    def _standing(self, diagonal: Tensor, exact: bool) -> Iterator[None]:
        """A context in which this diagonal, (R,) or (rows, R), stands in every layer, in training and in eval mode."""
        if self.name not in self.model.active_adapters:
            raise MatryoshkaError(
                f"adapter {self.name!r} is not active, {', '.join(self.model.active_adapters)} is: call "
                f"adapter.model.set_adapter({self.name!r}) first"
            )
        gated = self._gated(diagonal, exact=exact)
        before = [variant.override for variant, _ in gated]
        for variant, gate in gated:
            variant.stand_before(gate)
        rows = gated[0][0].rows
        rows.contexts += not gated[0][1].uniform
        try:
            yield
        finally:
            rows.contexts -= not gated[0][1].uniform
            for (variant, _), override in zip(gated, before, strict=True):
                variant.stand_before(override)

    def draw(self, step: int, rows: int | None = None, share: tuple[int, int] = (0, 1)) -> None:
        """Apply the rule's draw for an optimizer step. `callback` does it in a Hugging Face Trainer.

        A pure function of the adapter's seed and ``step``. Call it once before each optimizer step, not for each
        micro-batch.

        Args:
            step: The number of optimizer steps done so far.
            rows: The rows of one batch of this process, for a rule with a rank per row.
            share: ``(index, count)`` of the processes: each gets its own part of one draw over all their rows.
        """
        self._draw(step, rows, share)
        for name in nest_copies(self.model, self.name):
            NestedAdapter(self.model, name)._draw(step, rows, share)

    def _draw(self, step: int, rows: int | None = None, share: tuple[int, int] = (0, 1)) -> None:
        index, count = share
        drawn = self.state.draw(step, None if rows is None else rows * count)
        diagonal = drawn.diagonal
        if diagonal.ndim > 1 and rows is not None:
            diagonal = diagonal[index * rows : (index + 1) * rows]
        for variant, gate in self._gated(diagonal, allow_fewer=True, learn=drawn.learn):
            variant.begin_step(gate)

    def callback(self) -> TrainerCallback:
        """For ``Trainer(callbacks=[...])``: draws the ranks of each step and completes every checkpoint."""
        from matryoshka_lora.adapter.callback import NestingCallback  # transformers' Trainer is slow to import

        return NestingCallback(self)

    def reorder(self) -> dict[str, Tensor]:
        """Replace each layer's factors by the SVD of what was trained, ``B diag(p) A``.

        The full-rank function of training is unchanged, and every prefix becomes the closest matrix of its rank. From
        then on any rank from 1 to R may be chosen, ``inference`` makes no difference, and training would go on as
        plain LoRA. Under torch.distributed every process calls it.

        Returns:
            Each layer's singular values, decreasing, shape (R,) or (experts, R), float64.

        Raises:
            MatryoshkaError: A factor is not finite, or the adapter is merged. Nothing has been changed then.
        """
        self._check_unmerged("reorder it")
        nest_copies(self.model, self.name)  # while the factors are what they are copies of
        state = self.state
        p, scale = state.trained_diagonal(), state.nesting.scale(state.nesting.max_rank)
        for name, module, _ in self._layers():
            if not all(bool(f.isfinite().all()) for f in get_factors(module, self.name)):
                raise NotFiniteError(f"layer {name} holds NaN or infinity: training diverged; lower the learning rate")
        spectra = {}
        with torch.no_grad():
            for name, module, _ in self._layers():
                parameters = get_parameters(module, self.name)
                A, B, spectra[name] = reorder_factors(*get_factors(module, self.name), p, scale)
                new = as_parameters(A, B, parameters[0].shape, parameters[1].shape)
                for parameter, value in zip(parameters, new, strict=True):
                    assign(parameter, value)
        state.form = "reordered"
        for variant in self._variants():
            variant.set_rank(variant.rank)
        self._draw(step=0)
        return spectra

    def merge(self, rank: int) -> None:
        """Add the adapter at a rank to the base weights, in place. `unmerge` takes it out again.

        ``model.merge_and_unload()`` after `set_rank` gives a plain model instead.
        """
        self._check_mergeable()
        self.set_rank(rank)
        self.model.merge_adapter(adapter_names=[self.name])

    def unmerge(self) -> None:
        """Undo `merge`. Other adapters that are merged stay so.

        Raises:
            MatryoshkaError: An adapter of another kind was merged on top of it.
        """
        self._check_mergeable()
        layers = [module for _, module, _ in self._layers() if self.name in module.merged_adapters]
        for module in layers:
            for other in module.merged_adapters[module.merged_adapters.index(self.name) :]:
                if not isinstance(module.lora_variant.get(other), NestedVariant | None):
                    raise MatryoshkaError(
                        f"adapter {other!r} is of another kind and was merged on top of {self.name!r}: take both out "
                        "with adapter.model.unmerge_adapter()"
                    )
        for module in layers:
            others = [name for name in module.merged_adapters if name != self.name]
            module.merged_adapters = [self.name]
            module.unmerge()
            module.merged_adapters = others

    def save(self, path: str | PathLike[str], is_main_process: bool | None = None) -> None:
        """Write the adapter: PEFT's files and a sidecar with the nesting.

        PEFT without this package reads it as the full-rank adapter in the chosen inference mode; `load` reads every
        rank. An adapter that is there is replaced, all or nothing. PEFT's own ``save_pretrained`` writes the factors as
        they are trained, without the sidecar: with ``inference="keep"`` that is another function, until `reorder`.

        Args:
            path: The directory to write.
            is_main_process: Whether this process writes; None is yes for the first of torch.distributed, or the only
                one. Where FSDP2 has sharded the adapter, every process must call.

        Raises:
            MatryoshkaError: The path cannot be written, or a weight is not finite.
        """
        save_adapter(self.model, self.name, self.state, path, is_main_process)

    def export(
        self, path: str | PathLike[str], rank: int, is_main_process: bool | None = None, *, overwrite: bool = False
    ) -> None:
        """Write one rank as an ordinary LoRA adapter, for PEFT or any engine that serves PEFT's files.

        Args:
            path: The directory to write.
            rank: One of `ranks`.
            is_main_process: As for `save`.
            overwrite: Whether the directory may hold an adapter, a model or an evaluation, of which nothing is left
                then. Without it they are refused.

        Raises:
            MatryoshkaError: The rank was not trained, the path cannot be written or holds something that may not be
                overwritten, or a weight is not finite.
        """
        export_rank(self.model, self.name, self.state, path, rank, is_main_process, overwrite)

    def _begin(self) -> None:
        if not self.state.draws:
            self._draw(step=0)

    def _gated(
        self, diagonal: Tensor, allow_fewer: bool = False, exact: bool = True, learn: Tensor | None = None
    ) -> list[tuple[NestedVariant, Gate]]:
        """Every layer's variant with a gate where its factors are now: a Trainer moves the model after `nest`."""
        made: dict[torch.device, Gate] = {}
        found = []
        for _, module, variant in self._layers():
            device = get_parameters(module, self.name)[0].device
            if device not in made:
                made[device] = Gate.on(device, diagonal, None, allow_fewer, exact, learn)
            found.append((variant, made[device]))
        return found

    def _check_unmerged(self, what: str) -> None:
        if any(self.name in module.merged_adapters for _, module, _ in self._layers()):
            raise MatryoshkaError(f"adapter {self.name!r} is merged into the base weights: unmerge it to {what}")

    def _check_mergeable(self) -> None:
        for _, module, variant in self._layers():
            variant.check_mergeable(module)

    def _check_routing(self) -> None:
        for name, _, _ in self._layers():
            if ".experts." in f".{name}.":
                raise MatryoshkaError(
                    f"tokens of {name} are routed to experts and have left their rows: use set_rank. To evaluate, "
                    "export the ranks and run lm-evaluation-harness on each"
                )


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise MatryoshkaError(f"{pattern!r} is no regular expression: {error}") from error
