"""`NestedAdapter`: control a nested adapter of a PEFT model."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from huggingface_hub import HfApi
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from matryoshka_lora.atomic import (
    MANIFEST_NAME,
    PathLike,
    check_output,
    free_folder,
    is_occupied,
)
from matryoshka_lora.bundled_model import resolve_model_path
from matryoshka_lora.errors import MatryoshkaError, check_integer, short
from matryoshka_lora.formats.peft_folder import find_layers
from matryoshka_lora.linalg.arrays import Float64Array
from matryoshka_lora.linalg.factors import (
    relative_errors,
    reorder_by_moments,
    squared_tails,
    truncation_errors,
)
from matryoshka_lora.lora.convert import pipeline_key_format
from matryoshka_lora.lora.keys import PEFT_PREFIX
from matryoshka_lora.lora.layer import StoredTensor
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.results import ReorderResult, TrainRanksResult
from matryoshka_lora.lora.truncate import with_small
from matryoshka_lora.nesting import Deploy, Nesting, Order, check_rank
from matryoshka_lora.peft.lora_layers import (
    factor_parameters,
    lora_layers,
    model_factors,
    set_small_factors,
    small_factors,
)
from matryoshka_lora.peft.sharded_factors import ShardedFactors
from matryoshka_lora.peft.state import NestingState
from matryoshka_lora.peft.variant import NestedVariant
from matryoshka_lora.rules import RULES, Rule
from matryoshka_lora.sharding import gather_parameter, is_sharded, reshard
from matryoshka_lora.tensors import to_numpy, to_numpy_dtype, to_torch
from matryoshka_lora.training.factors import (
    FactorMatrices,
    FactorParameters,
    ModelFactors,
    without_wrapper,
)
from matryoshka_lora.units import pluralize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from matryoshka_lora.evaluation.results import Evaluation
    from matryoshka_lora.peft.callback import NestingCallback
    from matryoshka_lora.training.data import Collate, Loss, TrainingData

# The model types of transformers whose layers get inputs of shape (length, rows, features). With
# the same number of tokens and rows, the shape does not show it.
_TIME_MAJOR_MODELS = ("fsmt", "led", "longformer", "mask2former", "oneformer", "xlnet")

logger = logging.getLogger(__name__)


class NestedAdapter:
    """A nested adapter of a model with PEFT's layers. `nest` and `load` create it.

    All settings are stored in the model's layers, so several handles of an adapter share them. Not
    thread-safe.

    Args:
        model: A model with an adapter that is nested already: a `PeftModel`, or a model of
            diffusers or transformers with PEFT's layers in it.
        name: PEFT's name of the adapter.

    Raises:
        MatryoshkaError: The adapter is not nested.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        self.model: Any = model
        self.name = name
        self._layers = dict(lora_layers(model, name))  # walking through the model takes time
        self._check_nested()

    def _check_nested(self) -> None:
        variants = [layer.lora_variant.get(self.name) for layer in self._layers.values()]
        if not variants or not all(isinstance(variant, NestedVariant) for variant in variants):
            raise MatryoshkaError(
                f"Adapter {self.name!r} is not nested in every layer. Call nest() or load() "
                "(again, if PEFT re-created the adapter)."
            )

    def __repr__(self) -> str:
        """Return the ranks and settings, a line each."""
        nesting = self.nesting
        scales = "" if nesting.scaling == "none" else f", scaling: {nesting.scaling}"
        trained = f", ranks up to {self.small_rank} trained" if self.small_rank else ""
        return (
            f"Nested adapter {self.name!r} of {pluralize(len(self.layers), 'layer')}\n"
            f"  nested ranks  {', '.join(map(str, nesting.ranks))}\n"
            f"  order         {self.order or 'none yet, so call reorder()'}{trained}\n"
            f"  rank          {self.rank} of {nesting.max_rank} in eval mode\n"
            f"  rule          {self.rule.name}{scales}, deploy: {self.deploy}"
        )

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """PEFT's LoRA layers by their names in the base model."""
        self._check_nested()
        return self._layers

    @property
    def base_model(self) -> nn.Module:
        """The model that has the layers, without PEFT's wrapper."""
        base_model: nn.Module = without_wrapper(self.model)
        return base_model

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that take part in the forward; none if they are disabled."""
        layer = next(iter(self.layers.values()))
        return [] if layer.disable_adapters else list(layer.active_adapters)

    @property
    def state(self) -> NestingState:
        """The settings that the layers share."""
        state: NestingState = next(iter(self.layers.values())).lora_variant[self.name].state
        return state

    @property
    def factors(self) -> ModelFactors:
        """The parameters A and B, to read and write all of them.

        If they are sharded over processes, every process must use them.
        """
        factors = model_factors(self.model, self.layers, self.name)
        if factors.are_sharded:
            return ShardedFactors(self.model, self.layers, self.name, self.use_diagonal)
        return factors

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
        """How the factors are ordered: ``"svd"``, or ``"weighted"`` if `reorder` had data.

        None if never ordered, or changed since.
        """
        return self.state.order.current()

    @property
    def small_rank(self) -> int:
        """The rank of the small adapter, whose prefixes are the ranks up to it; 0 without one.

        `train_ranks` creates it.
        """
        return 0 if self.order is None else self.state.small_rank

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
        """Set the rank in eval mode and for merging, and put the model into eval mode.

        Args:
            rank: From 1 to R, or 0 for the base model without the update.

        Raises:
            MatryoshkaError: The rank is not available, or the adapter is merged.
        """
        self._check_ranks([rank])
        self._check_not_merged("change its rank")
        self.state.set_rank(int(rank))
        self.model.eval()  # a Trainer leaves the model in train mode, where the rank is R

    @contextmanager
    def rows(self, ranks: Sequence[int]) -> Iterator[None]:
        """Return a context in which row j of every batch has the rank ``ranks[j]``.

        It applies in forward, backward and ``generate``. The layers must get inputs of shape
        (rows, length, features), or (rows, channels, ...) in a convolution. ``generate``
        repeats each row in place for beams and for several sequences: repeat its rank as often.

        Args:
            ranks: One for each row, from 0 to R; 0 switches the update off.

        Raises:
            MatryoshkaError: A rank is not available, the adapter is merged or not active, or (from
                the forward) a batch has another number of rows.
        """
        if not isinstance(ranks, (Sequence, np.ndarray, Tensor)) or not len(ranks):
            raise MatryoshkaError(
                f"`ranks` must be a list with one rank for each row, got {short(ranks)}."
            )
        self._check_ranks(ranks)
        q_by_rank = {rank: self.state.deployed_q(rank) for rank in set(ranks)}
        q = pad_sequence([q_by_rank[rank] for rank in ranks], batch_first=True)
        with self.use_diagonal(q):
            yield

    @contextmanager
    def use_diagonal(self, q: Tensor) -> Iterator[None]:
        """Return a context in which all layers compute ``W x + s B diag(q) A x``.

        It applies in train and eval mode. ``s`` is the scale of rank R.

        Args:
            q: Shape (R,), or (rows, R) for one diagonal per row, any floating dtype. With a small
                adapter of rank k, it may have k more entries, for the components of that adapter.

        Raises:
            MatryoshkaError: The adapter is merged or not active; or (from the forward) q has rows,
                and gradient checkpointing is in use.
        """
        self._check_not_merged("use another diagonal")
        self._check_active()
        if q.ndim > 1:
            self._check_rows_first()
        overrides = self.state.overrides
        diagonal = self.state.diagonal(q.to(torch.float64))
        overrides.append(diagonal)
        try:
            yield
        finally:
            overrides.remove(diagonal)

    def draw(
        self,
        step: int,
        batch_size: int | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Draw the diagonal of an optimizer step; `callback` does it in a Trainer.

        Call it before each optimizer step, not for each micro-batch. It puts the model into train
        mode, where the rank is R.

        Args:
            step: The number of optimizer steps completed so far.
            batch_size: The rows of a batch of this process, for rules with one diagonal per row.
            process_index: The index of this process.
            num_processes: The number of processes. Each takes its slice of one shared draw.

        Raises:
            MatryoshkaError: The adapter is merged, or the rule needs the batch size.
        """
        self._check_not_merged("train it")
        state = self.state
        diagonal = state.train_diagonal
        if not state.rule.fixed:
            rows = 1 if batch_size is None else batch_size
            q = state.sample_q(step, rows * num_processes)
            if q.ndim > 1:
                self._check_rows_first()
                if batch_size is None:
                    raise MatryoshkaError(
                        f"Rule {state.rule.name!r} draws one diagonal per row: pass `batch_size`."
                    )
                q = q[process_index * rows : (process_index + 1) * rows]
            diagonal = state.diagonal(q)
        if state.rank != state.nesting.max_rank:
            # A smaller rank is not available once training ends the order.
            self.set_rank(state.nesting.max_rank)
        self.model.train()
        state.order.may_have_changed = True  # a compiled forward does not show
        state.train_diagonal = diagonal

    def callback(self) -> NestingCallback:
        """Return the Trainer callback that draws the diagonal of each step.

        A rule that draws, such as ``"dylora"``, needs it. With another rule, it only checks the
        settings of the Trainer.
        """
        # transformers' Trainer is slow to import.
        from matryoshka_lora.peft.callback import NestingCallback

        return NestingCallback(self)

    def layer_factors(self) -> FactorParameters:
        """Return the parameters A and B of each layer, in PEFT's own layout.

        The keys are the layers' names in the base model. These are the model's own tensors:
        changing them ends the order.
        """
        return {name: factor_parameters(layer, self.name) for name, layer in self.layers.items()}

    def reorder(
        self,
        data: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        loss: Loss | None = None,
        collate: Collate | None = None,
        max_examples: int = 64,
        seed: int = 0,
    ) -> ReorderResult:
        """Reorder the columns of each layer by SVD, so that every rank is available.

        The first r columns are then the closest matrix of rank r (Eckart-Young), and the function
        of rank R in eval mode is unchanged up to rounding: with ``deploy="paper"``, P is dropped,
        and `deploy` becomes ``"reordered"``. Further training is plain LoRA and ends the order. A
        small adapter is left out.

        With examples, the first r columns change the model's outputs least instead: the SVD is
        weighted by the second moments of each layer's inputs and output gradients, see
        `matryoshka_lora.linalg.factors.reorder_by_moments`. Nothing is trained. Pass examples of
        the adapter's own task: with others, low ranks may be worse than without.

        Args:
            data: The Trainer that has trained the adapter, a dataset, a list of examples or a file,
                as in `train_ranks`. Defaults to the unweighted SVD.
            tokenizer: The base model's tokenizer. A Trainer and tokenized examples need none.
            loss: As in `train_ranks`.
            collate: As in `train_ranks`.
            max_examples: The number of examples to use.
            seed: The seed of the choice of examples, and of random directions of the outputs.

        Returns:
            The errors of the nested ranks, and the singular values of each layer's update.

        Raises:
            MatryoshkaError: The adapter is merged, or the data cannot be used, and the adapter is
                unchanged. Or no example uses one of its layers, and it is reordered without the
                data.
            NotFiniteError: A factor is NaN or infinite, and the adapter is unchanged. Or a gradient
                is, and the adapter is reordered without the data.
        """
        self._check_not_merged("reorder it")
        factors, nesting = self.factors, self.nesting
        examples = None
        if data is not None:
            if factors.are_sharded:
                raise MatryoshkaError(
                    "Sharded factors can be reordered without examples only. Omit `data`; or save "
                    "the adapter, and reorder its folder in one process: `matryoshka reorder "
                    "FOLDER --data FILE -o OUTPUT`."
                )
            # This module is slow to import.
            from matryoshka_lora.training.data import read_training_data

            check_integer("max_examples", max_examples)
            self._check_active()
            with self.use_diagonal(self.state.deployed_q(nesting.max_rank)):
                examples = read_training_data(
                    self.model, data, tokenizer, loss=loss, collate=collate
                )
        with factors.restored(after_errors_only=True):
            singular_values = factors.reorder(self.state.deployed_q(nesting.max_rank).numpy())
            self.mark_ordered("svd")
        singular_values = {name: v * nesting.scale for name, v in singular_values.items()}
        squared_errors = {name: squared_tails(values) for name, values in singular_values.items()}
        if examples is not None:
            squared_errors = self._weight_order(examples, max_examples, seed)
        weighted_errors = {
            name: squared_tails(values) for name, values in self.state.weighted_values.items()
        }
        return ReorderResult(
            None,
            nesting.ranks,
            relative_errors(squared_errors, nesting.ranks),
            singular_values,
            relative_errors(weighted_errors, nesting.ranks if weighted_errors else ()),
        )

    def _weight_order(
        self, data: TrainingData, max_examples: int, seed: int
    ) -> dict[str, Float64Array]:
        """Reorder the columns by what changes the outputs; return the squared errors by layer."""
        from matryoshka_lora.training.moments import second_moments

        factors, nesting = self.factors, self.nesting
        scales = [nesting.scale] * nesting.max_rank
        with self.use_diagonal(torch.ones(nesting.max_rank)):
            moments = second_moments(factors, data, max_examples, seed)
        matrices: FactorMatrices = {}
        squared_errors: dict[str, Float64Array] = {}
        weighted_values: dict[str, Float64Array] = {}
        for name, (A, B) in factors.copy().items():
            new_A, new_B = to_numpy(A), to_numpy(B)
            weighted_values[name] = np.zeros(nesting.max_rank)
            if new_B.any():
                if name not in moments:
                    raise MatryoshkaError(
                        f"Layer {name} has no gradient on the examples. Pass examples that use "
                        "every layer, or reorder without data, as embeddings and target_parameters "
                        "require."
                    )
                new_A, new_B, weighted_values[name] = reorder_by_moments(
                    new_A, new_B, *moments[name]
                )
            matrices[name] = to_torch(new_A), to_torch(new_B)
            squared_errors[name] = truncation_errors(new_A, new_B, scales)
        with factors.restored(after_errors_only=True):
            factors.write(matrices)
            self.mark_ordered("weighted", weighted_values)
        return squared_errors

    def mark_ordered(
        self, order: Order, weighted_values: Mapping[str, Float64Array] | None = None
    ) -> None:
        """Record that the factors are ordered as they are, and continue with rule ``lora``.

        A small adapter is left out.

        Args:
            order: How they are ordered.
            weighted_values: For the order ``"weighted"``, the weighted singular values of each
                layer.
        """
        state = self.state
        rank = state.rank
        state.order.mark(order)
        state.weighted_values = dict(weighted_values or {})
        state.small_rank = 0
        state.rule = RULES["lora"]
        state.deploy = "reordered"
        state.reset()
        state.set_rank(rank)

    def set_small_factors(self, factors: FactorMatrices) -> None:
        """Set the small adapter, whose prefixes are the ranks up to its own.

        Args:
            factors: By layer, A of shape (k, in) and B of shape (out, k), any dtype and device.
        """
        small_rank = len(next(iter(factors.values()))[0])
        own_factors = self.factors
        for name, layer in self.layers.items():
            A, B = factor_parameters(layer, self.name)
            small_A, small_B = own_factors.from_matrices(name, *factors[name])
            small_A = small_A.detach().to(A.device, A.dtype, copy=True)
            small_B = small_B.detach().to(B.device, B.dtype, copy=True)
            set_small_factors(layer, self.name, small_A, small_B)
        self.state.small_rank = small_rank
        self.state.set_rank(self.rank)

    def train_ranks(
        self,
        data: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        loss: Loss | None = None,
        collate: Collate | None = None,
        eval_data: Any = None,
        max_examples: int | float | None = None,
        seed: int = 0,
    ) -> TrainRanksResult:
        """Train the low ranks, in a small adapter of their own.

        Rank R and every rank above the small adapter's rank k stay as they are, bit for bit.
        Factors without an order are reordered first. Then there are four outcomes:

        * The small adapter is kept. Its prefixes are the ranks up to k. An earlier one is replaced.
        * It is not better than the reordered factors, so it is not kept, with a warning.
        * No rank is behind rank R, so nothing is trained.
        * The Trainer generates its examples, as in GRPO, or streams them, or they have no labels,
          so nothing is trained, with a warning.

        Validation examples decide. Without an evaluation set, they are training examples.

        Under ``accelerate launch`` every process must call this method.

        Args:
            data: The Trainer that has trained the adapter; a dataset or a list of examples with
                ``prompt`` and ``completion``; or the path of a file of them. With ``loss``, a
                dataset or a list of any examples.
            tokenizer: The base model's tokenizer. A Trainer and tokenized examples need none.
            loss: Returns the mean loss of a batch, as in ``loss(model, batch)``: a scalar in any
                unit. Defaults to the Trainer's loss, or to the cross-entropy of a causal language
                model. Its random
                numbers, such as the noise and the timestep of a diffusion model, must be part of
                an example, so that the losses of two ranks can be compared.
            collate: With ``loss``, makes a batch of a list of examples. Defaults to the
                ``collate_fn`` of a ``DataLoader``, or to ``default_collate``. Batches have the
                ``batch_size`` of a ``DataLoader``, and are moved to the model's device.
            eval_data: Examples to validate on: a dataset, a list or a file. Defaults to the
                Trainer's ``eval_dataset``.
            max_examples: The number of examples to train on; or, as a float such as ``1.0``, their
                number relative to the examples that the Trainer has seen. Defaults to ``0.5``, or
                to 3200 if that number is unknown.
            seed: Seed of the order of examples and ranks.

        Raises:
            MatryoshkaError: The data cannot be used, max_examples is not positive, or the adapter
                is merged or not active. The adapter is unchanged.
            NotFiniteError: The loss or a gradient is NaN or infinite.
            RuntimeError: Another process has failed.

        An error of the Trainer's loss passes unchanged.
        """
        # These modules are slow to import.
        from matryoshka_lora.training.data import (
            NoExamplesError,
            read_training_data,
            same_outcome,
        )
        from matryoshka_lora.training.train_ranks import train_ranks

        if isinstance(max_examples, float) and not 0 < max_examples < math.inf:
            raise MatryoshkaError(f"`max_examples` must be positive, got {max_examples}.")
        if max_examples is not None and not isinstance(max_examples, float):
            check_integer("max_examples", max_examples)
        self._check_not_merged("train its ranks")
        self._check_active()
        if len(self.active_adapters) > 1:
            raise MatryoshkaError(
                f"The adapters {', '.join(self.active_adapters)} are active. Call "
                f"model.set_adapter({self.name!r}) first."
            )
        factors, nesting = self.factors, self.nesting
        # Rank R in every forward, whatever rank is set: training writes a rank's prefix to B.
        with self.use_diagonal(torch.ones(nesting.max_rank)):
            try:
                with same_outcome():
                    training_data = read_training_data(
                        self.model, data, tokenizer, eval_data, loss, collate
                    )
                if self.order is None:
                    self.reorder()
                if len(nesting.ranks) == 1:
                    logger.info("There is only one nested rank: nothing to train.")
                    return TrainRanksResult(None, "nothing to train")
                result, small = train_ranks(
                    factors, nesting.ranks, training_data, max_examples, seed
                )
            except NoExamplesError as error:  # must not stop a script between training and saving
                warnings.warn(f"The ranks are reordered, but not trained. {error}", stacklevel=2)
                if self.order is None:
                    self.reorder()
                return TrainRanksResult(None, "no examples")
        if small is not None:
            self.set_small_factors(small)
        return result

    def save(
        self, path: PathLike, force: bool = False, *, evaluation: Evaluation | None = None
    ) -> Path:
        """Save a folder that serves every rank, and that PEFT alone loads at rank R.

        Factors without an order are reordered on the way; the adapter in memory is unchanged. Rank
        R keeps its function. A smaller rank that a rule such as ``"dylora"`` has trained does not,
        which is a warning: see `nest` for ``deploy="paper"``, which saves the trained factors.

        Of several processes, the first one writes. If the factors are sharded over them, every
        process must call this method.

        Args:
            path: The folder to write. If it already exists and is not replaced, the adapter is
                written next to it, with a warning: it may have been trained for hours.
            force: Whether to replace an earlier output of this package. Nothing else is replaced.
            evaluation: Its scores by rank go into the model card.

        Returns:
            The folder that was written. Other processes than the first return `path`.

        Raises:
            MatryoshkaError: The path cannot be written.
            NotFiniteError: A factor is NaN or infinite.
        """
        lora = self._to_lora(_read_later)
        if not _is_main_process():
            return Path(path)
        if not self.rule.fixed and self.deploy != "paper":
            warnings.warn(
                f"The saved factors are reordered, so a rank below R computes something else than "
                f"the rank that rule {self.rule.name!r} has trained. Call reorder() before you "
                "evaluate the ranks, or pass `deploy='paper'` to nest() to save the trained "
                "factors.",
                stacklevel=2,
            )
        reason = ""
        try:
            check_output(path, force)
        except MatryoshkaError as error:
            is_parent = Path(path).resolve() in (Path.cwd(), *Path.cwd().parents)
            if is_parent or not is_occupied(Path(path)):
                raise
            path, reason = free_folder(Path(path)), str(error)
        nested = lora.nested()
        if evaluation is not None:
            nested = replace(nested, scores=evaluation.scores())
        folder = nested.save(path, "peft", force=force).path
        if reason:  # last, after the progress, and even where warnings are errors
            warnings.warn(f"The adapter is saved to {folder} instead. {reason}", stacklevel=2)
        return folder

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: PathLike, rank: int | None = None, **options: Any
    ) -> NestedAdapter:
        """Do the same as `matryoshka_lora.load`, by the name that PEFT has for it."""
        from matryoshka_lora.peft.load import load  # it imports this module

        return load(model, model_id, rank, **options)

    def save_pretrained(
        self, save_directory: PathLike, *, evaluation: Evaluation | None = None
    ) -> Path:
        """Do the same as `save`, by the name that PEFT has for it."""
        return self.save(save_directory, evaluation=evaluation)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        evaluation: Evaluation | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload nested LoRA adapter",
    ) -> str | None:
        """Upload the folder that `save` writes to the Hugging Face Hub.

        Its users load any rank by ``load(base_model, repo_id, rank)``, and PEFT alone loads rank R.
        Several processes call it as `save`.

        Args:
            repo_id: ``owner/name``. The repository is created if it does not exist.
            evaluation: Its scores by rank go into the model card.
            private: Whether a new repository is private.
            token: A token of the Hub. Defaults to the one of ``hf auth login``.
            revision: The branch. Defaults to the main one.
            commit_message: The message of the commit.

        Returns:
            The address of the commit; None in other processes than the first.

        Raises:
            NotFiniteError: A factor is NaN or infinite.
            huggingface_hub.errors.HfHubHTTPError: The Hub refuses the upload.
        """
        with TemporaryDirectory() as temporary:
            folder = self.save(Path(temporary, "adapter"), evaluation=evaluation)
            if not _is_main_process():
                return None
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                ignore_patterns=[MANIFEST_NAME],
            )
        return str(commit.commit_url)

    def export(self, path: PathLike, rank: int, force: bool = False) -> Path:
        """Export one rank as an ordinary LoRA adapter, which computes the same as `set_rank`.

        A rank that `set_rank` offers only after `reorder` is computed by reordering on the way.
        Several processes call it as `save`.

        Args:
            path: The folder to write; or, for an image model of diffusers, a ``.safetensors`` file
                that diffusers and ComfyUI load.
            rank: From 1 to R.
            force: Whether to replace an earlier output of this package. Nothing else is replaced.

        Returns:
            The folder or file that was written.

        Raises:
            MatryoshkaError: The rank is not available, or the path already exists or cannot be
                written.
            NotFiniteError: A factor is NaN or infinite.
        """
        lora = self._to_lora(_read_later)
        if not _is_main_process():
            return Path(path)
        if not self.rule.fixed and rank in self.nesting.ranks:
            lora = replace(lora, deploy="paper")  # the trained prefix, as set_rank() uses it
        lora = lora.truncate(rank)
        if Path(path).suffix == ".safetensors":
            lora = lora.convert(pipeline_key_format(lora) or "diffusers")
        return lora.save(path, lora.container, force=force).path

    def to_lora(self) -> Lora:
        """Return a copy of the adapter in memory as a `Lora`."""
        return self._to_lora(
            lambda tensor: StoredTensor.from_array(to_numpy(tensor.detach().clone()))
        )

    def _to_lora(self, store: Callable[[Tensor], StoredTensor]) -> Lora:
        name = f"adapter {self.name!r}"
        reshard(self.model)
        order = self.state.order.verify()
        config = self._config()
        state_dict: dict[str, Tensor] = get_peft_model_state_dict(
            self.model,
            # Parameters, because the tensors of ZeRO-3 do not know where their shards are.
            state_dict=self.model.state_dict(keep_vars=True),
            adapter_name=self.name,
            save_embedding_layers=self._save_embedding_layers(config["base_model_name_or_path"]),
        )
        tensors: dict[str, StoredTensor] = {}
        for key, tensor in state_dict.items():
            full_tensor = gather_parameter(tensor)
            if is_sharded(tensor):
                # Only the first process writes the adapter.
                full_tensor = full_tensor.to("cpu" if _is_main_process() else "meta")
            # Without PEFT's wrapper, the keys have no prefix.
            tensors[PEFT_PREFIX + key.removeprefix(PEFT_PREFIX)] = store(full_tensor)
        layers, other_tensors = find_layers(tensors, config, name)
        values = self.state.weighted_values if order == "weighted" else {}
        lora = Lora(
            name,
            tuple(replace(layer, weighted_values=values.get(layer.name)) for layer in layers),
            other_tensors,
            nesting=self.nesting,
            order=order,
            deploy=self.deploy,
            config=config,
        )
        small_rank = self.state.small_rank
        if small_rank == 0:
            return lora
        if order is None:
            warnings.warn(
                f"Adapter {self.name!r} has changed since its ranks were trained, so it is "
                "reordered. Train them again.",
                stacklevel=3,
            )
            return lora
        for layer in layers:
            A, B = small_factors(self.layers[layer.name], self.name)
            tensors[layer.keys.A], tensors[layer.keys.B] = store(A), store(B)
        scale = self.nesting.scale
        config = {**config, "r": small_rank, "lora_alpha": scale * small_rank, "use_rslora": False}
        small_layers, _ = find_layers(tensors, config, name)
        return with_small(lora, Lora(name, small_layers, other_tensors, config=config))

    def _config(self) -> dict[str, Any]:
        """Return PEFT's config as JSON-serializable values."""

        def to_json(value: object) -> object:
            return sorted(value) if isinstance(value, set) else str(value)

        peft_config = self.model.peft_config[self.name].to_dict()
        # A trainer's subclass may have fields that PEFT would warn about, such as ms-swift's.
        names = {field.name for field in fields(LoraConfig)}
        known_fields = {name: value for name, value in peft_config.items() if name in names}
        config: dict[str, Any] = json.loads(json.dumps(known_fields, default=to_json))
        if not config.get("base_model_name_or_path"):
            config["base_model_name_or_path"] = getattr(self.model, "name_or_path", None)
        return config

    def _save_embedding_layers(self, base_model: str | None) -> bool | Literal["auto"]:
        """Return whether to save the embeddings: if the vocabulary differs from the base model's.

        If the base model's config is not available, ``"auto"`` lets PEFT decide.
        """
        # Not every model has a vocabulary, and not every base model has files.
        with suppress(AttributeError, OSError, TypeError, ValueError):
            base_config = self.model.config.from_pretrained(resolve_model_path(str(base_model)))
            base_vocab_size = base_config.get_text_config().vocab_size
            vocab_size = self.model.config.get_text_config().vocab_size
            return bool(base_vocab_size != vocab_size)
        return "auto"

    def _check_active(self) -> None:
        """Raise MatryoshkaError unless the adapter takes part in the model's forward."""
        if self.name not in self.active_adapters:
            raise MatryoshkaError(
                f"Adapter {self.name!r} is not active. Call model.set_adapter({self.name!r}), or "
                "enable adapters."
            )

    def _check_not_merged(self, action: str) -> None:
        """Raise MatryoshkaError if the adapter is merged. `action` completes the message."""
        if any(self.name in layer.merged_adapters for layer in self.layers.values()):
            raise MatryoshkaError(
                f"Adapter {self.name!r} is merged. Call unmerge_adapter() to {action}."
            )

    def _check_ranks(self, ranks: Iterable[int]) -> None:
        max_rank = self.nesting.max_rank
        positive_ranks = {check_rank(rank, max_rank, min_rank=0) for rank in ranks} - {0}
        if positive_ranks <= {max_rank}:
            return  # rank R is available without an order
        available_ranks = self.ranks
        for rank in positive_ranks:
            if rank not in available_ranks:
                choices = ", ".join(map(str, available_ranks))
                raise MatryoshkaError(
                    f"Only rank {choices} can be used until the factors are reordered, got {rank}. "
                    "Call adapter.reorder() after training."
                )

    def _check_rows_first(self) -> None:
        """Raise MatryoshkaError if dim 0 of the inputs of the model's layers is not the rows."""
        config = getattr(self.base_model, "config", None)
        model_type = getattr(config, "model_type", None)
        if model_type in _TIME_MAJOR_MODELS:
            raise MatryoshkaError(
                f"Rows of a {model_type} model cannot have a rank each, because its layers get "
                "inputs of shape (length, rows, features). Use set_rank(), or a rule with one "
                "diagonal for the whole batch."
            )


def _is_main_process() -> bool:
    """Return whether this is the only process, or the first of torch.distributed."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _read_later(tensor: Tensor) -> StoredTensor:
    """Return a tensor that is not copied, to be written before it can change."""
    dtype = to_numpy_dtype(tensor.dtype)
    return StoredTensor(dtype, tuple(tensor.shape), lambda: to_numpy(tensor))
