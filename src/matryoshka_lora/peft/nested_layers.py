"""The nested layers of an adapter: their rank, their diagonals and their factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from matryoshka_lora.errors import MatryoshkaError, NotFiniteError
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.linalg.factors import Checksum, reorder_factors
from matryoshka_lora.nesting import Deploy, Nesting, Order, check_rank
from matryoshka_lora.peft.arrays import to_numpy, to_torch
from matryoshka_lora.peft.state import Diagonal, Fingerprint, NestingState
from matryoshka_lora.peft.variant import LoraModule, NestedVariant, factor_parameters, lora_layers
from matryoshka_lora.progress import single_threaded
from matryoshka_lora.rules import RULES, Rule

FactorParameters = dict[str, tuple[Tensor, Tensor]]
"""The parameters A and B of each layer, by the layer's name in the base model."""
FactorMatrices = dict[str, tuple[Tensor, Tensor]]
"""A, shape (R, in), and B, shape (out, R), of each layer, by the layer's name."""

# The model types of transformers whose layers get inputs of shape (length, rows, features). With as
# many rows as tokens, the shape does not show it.
_TIME_MAJOR_MODELS = ("fsmt", "led", "longformer", "xlnet")


class NestedLayers:
    """The layers of a nested adapter.

    `NestedAdapter` is the user's interface to them. All settings are stored in the model's layers,
    so several handles of one adapter share its state.

    Args:
        model: The PEFT model.
        name: PEFT's name of the adapter.

    Raises:
        MatryoshkaError: The adapter is not nested.
    """

    def __init__(self, model: PeftModel, name: str = "default") -> None:
        self.model = model
        self.name = name
        self._modules = dict(lora_layers(model, name))  # walking through the model takes time
        self.check_nested()

    def check_nested(self) -> None:
        """Raise MatryoshkaError unless every layer of the adapter is nested."""
        variants = [module.lora_variant.get(self.name) for module in self._modules.values()]
        if not variants or not all(isinstance(variant, NestedVariant) for variant in variants):
            raise MatryoshkaError(
                f"Adapter {self.name!r} is not nested in every layer. Call nest() or load() "
                "(again, if PEFT re-created the adapter)."
            )

    @property
    def modules(self) -> dict[str, LoraModule]:
        """PEFT's LoRA layers by their names in the base model."""
        self.check_nested()
        return self._modules

    @property
    def state(self) -> NestingState:
        """The settings that the layers share."""
        self.check_nested()
        state: NestingState = self.first_module.lora_variant[self.name].state
        return state

    @property
    def first_module(self) -> LoraModule:
        """The first LoRA layer; all of them have the same state."""
        return next(iter(self._modules.values()))

    def is_unloaded(self) -> bool:
        """Return whether PEFT has replaced the LoRA layers by the base model's own."""
        name, module = next(iter(self._modules.items()))
        return self.model.base_model.model.get_submodule(name) is not module

    @property
    def nesting(self) -> Nesting:
        """The nested ranks and their scales."""
        return self.state.nesting

    @property
    def rule(self) -> Rule:
        """The training rule; ``lora`` once the factors are ordered."""
        return self.state.rule

    @property
    def deploy(self) -> Deploy:
        """``"reordered"``, or ``"paper"`` if P is dropped after training."""
        return self.state.deploy

    @property
    def order(self) -> Order | None:
        """How the factors are ordered; None if they never were, or have changed since.

        This compares a fingerprint of the factors, and reads all of them only if it differs. See
        `verify_order` for a check that is certain.
        """
        state = self.state
        if state.order is None:
            return None
        if state.fingerprint != self._fingerprint():
            return self.verify_order()
        return state.order if state.is_order_valid else None

    def verify_order(self) -> Order | None:
        """Return `order` after comparing a checksum of the factors, which reads all of them."""
        state = self.state
        if state.order is None:
            return None
        state.is_order_valid = self._checksum() in state.checksums
        state.fingerprint = self._fingerprint()
        return state.order if state.is_order_valid else None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that may be chosen, increasing; the last one is R."""
        state = self.state
        if self.order is not None:
            return tuple(range(1, state.nesting.max_rank + 1))
        if state.deploy == "paper" or not state.rule.fixed:
            return state.nesting.ranks
        return (state.nesting.max_rank,)

    @property
    def rank(self) -> int:
        """The rank in eval mode."""
        return self.state.rank

    def set_rank(self, rank: int) -> None:
        """Set the rank in eval mode; see `NestedAdapter.set_rank`."""
        self._check_ranks([rank])
        self.check_not_merged("change its rank")
        self.state.set_rank(int(rank))
        self.model.eval()  # a Trainer leaves the model in train mode, where the rank is R

    @contextmanager
    def rows(self, ranks: Sequence[int]) -> Iterator[None]:
        """Give row j of every batch the rank ``ranks[j]``; see `NestedAdapter.rows`."""
        if not isinstance(ranks, (Sequence, np.ndarray, Tensor)) or not len(ranks):
            raise MatryoshkaError(
                f"`ranks` must be a list with one rank for each row, got {ranks!r:.80}."
            )
        self._check_ranks(ranks)
        q_by_rank = {rank: self.state.deployed_q(rank) for rank in set(ranks)}
        with self.use_diagonal(torch.stack([q_by_rank[rank] for rank in ranks])):
            yield

    @contextmanager
    def use_diagonal(self, q: Tensor) -> Iterator[None]:
        """Compute ``W x + s B diag(q) A x`` in all layers, in train and eval mode.

        Args:
            q: Shape (R,), or (rows, R) for one diagonal per row, any floating dtype.

        Raises:
            MatryoshkaError: The adapter is merged or not active; or (from the forward) q has rows,
                and gradient checkpointing is in use.
        """
        self.check_not_merged("use another diagonal")
        self.check_active()
        if q.ndim > 1:
            self._check_rows_first()
        state = self.state
        diagonal = Diagonal(q.to(torch.float64))
        state.overrides.append(diagonal)
        try:
            yield
        finally:
            state.overrides.remove(diagonal)

    def _check_rows_first(self) -> None:
        """Raise MatryoshkaError if the model's layers get tokens before rows."""
        config = getattr(self.model.get_base_model(), "config", None)
        model_type = getattr(config, "model_type", None)
        if model_type in _TIME_MAJOR_MODELS:
            raise MatryoshkaError(
                f"Rows of a {model_type} model cannot have a rank each, because its layers get "
                "inputs of shape (length, rows, features). Use set_rank(), or a rule with one "
                "diagonal for the whole batch."
            )

    def draw(
        self,
        step: int,
        batch_size: int | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Draw the diagonal of an optimizer step; see `NestedAdapter.draw`."""
        self.check_not_merged("train it")
        state = self.state
        if state.rank != state.nesting.max_rank:
            # A smaller rank is not available once training invalidates the order.
            self.set_rank(state.nesting.max_rank)
        self.model.train()
        if state.rule.fixed:
            return
        rows = 1 if batch_size is None else batch_size
        q = state.sample_q(step, rows * num_processes)
        if q.ndim > 1:
            self._check_rows_first()
            if batch_size is None:
                raise MatryoshkaError(
                    f"Rule {state.rule.name!r} draws one diagonal per row: pass `batch_size`."
                )
            q = q[process_index * rows : (process_index + 1) * rows]
        state.train_diagonal = Diagonal(q, allow_fewer_rows=True)

    def layer_factors(self) -> FactorParameters:
        """Return the parameters A and B of each layer, in PEFT's own layout."""
        return {name: factor_parameters(m, self.name) for name, m in self.modules.items()}

    def copy_factors(self) -> FactorMatrices:
        """Return copies of A, shape (R, in), and B, shape (out, R), of each layer."""
        return {
            name: (A.detach().flatten(1).clone(), B.detach().flatten(1).clone())
            for name, (A, B) in self.layer_factors().items()
        }

    @torch.no_grad()
    def write_factors(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Overwrite the factors of some layers.

        Args:
            factors: By layer, A of shape (R, in) and B of shape (out, R), any dtype and device.
        """
        parameters = self.layer_factors()
        for name, (new_A, new_B) in factors.items():
            A, B = parameters[name]
            A.copy_(new_A.reshape(A.shape))
            B.copy_(new_B.reshape(B.shape))

    def reorder(self) -> dict[str, Float64Array]:
        """Reorder the factors by SVD, with the function of rank R in eval mode.

        See `NestedAdapter.reorder`.

        Returns:
            The singular values of each layer's update, decreasing, shape (R,).

        Raises:
            MatryoshkaError: The adapter is merged, or sharded over processes.
            NotFiniteError: A factor is NaN or infinite. The adapter is unchanged.
        """
        self.check_not_merged("reorder it")
        self.check_not_sharded()
        state = self.state
        q = state.deployed_q(state.nesting.max_rank).numpy()
        new_factors: FactorMatrices = {}
        singular_values: dict[str, Float64Array] = {}
        with single_threaded():
            for name, (A_parameter, B_parameter) in self.layer_factors().items():
                A = to_numpy(A_parameter.flatten(1))
                B = to_numpy(B_parameter.flatten(1))
                if not (np.isfinite(A).all() and np.isfinite(B).all()):
                    raise NotFiniteError(
                        f"The factors of layer {name} are NaN or infinite: training diverged. "
                        "Train again with a lower learning rate."
                    )
                A, B, values = reorder_factors(A, B, q)
                new_factors[name] = to_torch(A), to_torch(B)
                singular_values[name] = values * state.nesting.scale
        old_factors = self.copy_factors()
        try:
            self.write_factors(new_factors)
            self.mark_ordered("svd")
        except BaseException:  # KeyboardInterrupt, too
            self.write_factors(old_factors)
            raise
        return singular_values

    def mark_ordered(self, order: Order) -> None:
        """Record that the current factors are ordered, and continue with rule ``lora``."""
        state = self.state
        rank = state.rank
        # An interrupt of these, which take time, leaves the state as it is.
        checksums = {self._checksum(dtype) for dtype in (None, torch.bfloat16, torch.float16)}
        fingerprint = self._fingerprint()
        state.order = order
        state.checksums = checksums
        state.fingerprint = fingerprint
        state.is_order_valid = True
        state.rule = RULES["lora"]
        state.deploy = "reordered"
        state.reset()
        state.set_rank(rank)

    def set_deploy(self, deploy: Deploy) -> None:
        """Set how a trained adapter is deployed, and rank R in eval mode."""
        self.state.deploy = deploy
        self.state.reset()

    def check_not_merged(self, action: str) -> None:
        """Raise MatryoshkaError if the adapter is merged, so that an action is not possible."""
        if any(self.name in module.merged_adapters for module in self.modules.values()):
            raise MatryoshkaError(
                f"Adapter {self.name!r} is merged. Call unmerge_adapter() to {action}."
            )

    def check_only_active(self) -> None:
        """Raise MatryoshkaError unless the adapter is the only active one."""
        self.check_active()
        if len(self.model.active_adapters) > 1:
            raise MatryoshkaError(
                f"The adapters {', '.join(self.model.active_adapters):.200} are active. Call "
                f"model.set_adapter({self.name!r}) first."
            )

    def check_active(self) -> None:
        """Raise MatryoshkaError unless the adapter takes part in the model's forward."""
        is_disabled = any(module.disable_adapters for module in self.modules.values())
        if is_disabled or self.name not in self.model.active_adapters:
            raise MatryoshkaError(
                f"Adapter {self.name!r} is not active. Call model.set_adapter({self.name!r}), or "
                "enable adapters."
            )

    def check_not_sharded(self) -> None:
        """Raise MatryoshkaError if this process has only a part of the factors."""
        for A, _ in self.layer_factors().values():
            if hasattr(A, "device_mesh"):
                raise MatryoshkaError(
                    "The factors are sharded over processes. Let the Trainer save the adapter, "
                    "then reorder its folder in one process."
                )

    def _check_ranks(self, ranks: Iterable[int]) -> None:
        max_rank = self.nesting.max_rank
        positive_ranks = {check_rank(rank, max_rank, min_rank=0) for rank in ranks} - {0}
        if positive_ranks <= {max_rank}:
            return  # rank R is available without an order
        available_ranks = self.ranks
        for rank in positive_ranks:
            if rank not in available_ranks:
                raise MatryoshkaError(
                    f"`rank` must be one of {', '.join(map(str, available_ranks))} until the "
                    f"factors are reordered, got {rank}. Call adapter.reorder() after training."
                )

    def _checksum(self, cast_to: torch.dtype | None = None) -> str:
        """Return the checksum of the factors, or of what a cast would make of them, in float32."""
        checksum = Checksum()
        for _, factors in sorted(self.layer_factors().items()):
            A, B = [to_numpy(factor.to(cast_to).float()) for factor in factors]
            checksum.update(A, B)
        return checksum.hexdigest()

    def has_quick_fingerprint(self) -> bool:
        """Return whether what is quickly read of the factors is as when they had an order.

        PEFT's hotswap, which no counter shows, changes all layers, so this samples the first one
        alone. It is cheap enough for every forward.
        """
        fingerprint = self.state.fingerprint
        return fingerprint is not None and fingerprint[:3] == self._quick_fingerprint()

    def _quick_fingerprint(self) -> tuple[int, list[int], bytes]:
        # Tensors that were created in inference mode have no counter.
        versions = [0 if factor.is_inference() else factor._version for factor in self._parameters]
        _, B = factor_parameters(self.first_module, self.name)
        return _OptimizerSteps.count, versions, to_numpy(_sample(B)).tobytes()

    @cached_property
    def _parameters(self) -> list[Tensor]:
        """All factors, since looking them up in the modules takes longer than a comparison."""
        return [factor for pair in self.layer_factors().values() for factor in pair]

    def _fingerprint(self) -> Fingerprint:
        """Return a value that almost certainly changes when the factors change.

        PyTorch counts in-place operations on a tensor, except those of fused optimizers, whose
        steps are counted here, and those on ``tensor.data``. These change many values, so a sample
        of each factor shows them. There is one transfer from each device.
        """
        samples: dict[torch.device, list[Tensor]] = {}
        for pair in self.layer_factors().values():
            for factor in pair:
                samples.setdefault(factor.device, []).append(_sample(factor))
        sampled_bytes = [to_numpy(torch.cat(tensors)).tobytes() for tensors in samples.values()]
        return *self._quick_fingerprint(), tuple(sampled_bytes)


class _OptimizerSteps:
    """The number of steps of all optimizers of this process."""

    count = 0

    @classmethod
    def increment(cls, *_: object) -> None:
        """Count a step."""
        cls.count += 1


register_optimizer_step_post_hook(_OptimizerSteps.increment)


def _sample(factor: Tensor, count: int = 32) -> Tensor:
    """Return evenly spaced values of a factor (of the local shard of a DTensor)."""
    if hasattr(factor, "to_local"):
        factor = factor.to_local()
    values = factor.detach().flatten()
    return values[:: max(1, len(values) // count)]
