"""`NestedAdapter`: control a nested adapter of a PEFT model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

from peft import LoraConfig, PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor

from matryoshka_lora.atomic import PathLike
from matryoshka_lora.bundled_model import resolve_model_path
from matryoshka_lora.formats.peft_folder import find_layers
from matryoshka_lora.linalg.factors import relative_errors, squared_tails
from matryoshka_lora.lora.layer import StoredTensor
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.lora.results import ReorderResult, TrainRanksResult
from matryoshka_lora.nesting import Deploy, Nesting, Order
from matryoshka_lora.peft.arrays import to_numpy, to_numpy_dtype
from matryoshka_lora.peft.nested_layers import FactorParameters, NestedLayers
from matryoshka_lora.rules import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from matryoshka_lora.training.callback import NestingCallback


class NestedAdapter:
    """A nested adapter of a PEFT model. `nest` and `load` create it.

    All settings are stored in the model's layers. Not thread-safe.

    Args:
        model: A PEFT model with an adapter that is nested already.
        name: PEFT's name of the adapter.

    Raises:
        MatryoshkaError: The adapter is not nested.
    """

    def __init__(self, model: PeftModel, name: str = "default") -> None:
        self.layers = NestedLayers(model, name)

    @property
    def model(self) -> PeftModel:
        """The PEFT model."""
        return self.layers.model

    @property
    def name(self) -> str:
        """PEFT's name of the adapter."""
        return self.layers.name

    @property
    def nesting(self) -> Nesting:
        """The nested ranks and their scales."""
        return self.layers.nesting

    @property
    def rule(self) -> Rule:
        """The training rule; ``lora`` once the factors are ordered."""
        return self.layers.rule

    @property
    def deploy(self) -> Deploy:
        """``"reordered"``, or ``"paper"`` if P is dropped after training."""
        return self.layers.deploy

    @property
    def order(self) -> Order | None:
        """How the factors are ordered: ``"svd"`` or ``"trained"``.

        None if never ordered, or changed since.
        """
        return self.layers.order

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that may be chosen, increasing; the last one is R."""
        return self.layers.ranks

    @property
    def rank(self) -> int:
        """The rank in eval mode."""
        return self.layers.rank

    def set_rank(self, rank: int) -> None:
        """Set the rank in eval mode and for merging, and put the model into eval mode.

        Args:
            rank: From 1 to R, or 0 for the base model without the update.

        Raises:
            MatryoshkaError: The rank is not available, or the adapter is merged.
        """
        self.layers.set_rank(rank)

    def rows(self, ranks: Sequence[int]) -> AbstractContextManager[None]:
        """Return a context in which row j of every batch has the rank ``ranks[j]``.

        It applies in forward, backward and ``generate``. The layers must get inputs of shape
        (rows, length, features), or (rows, channels, ...) in a convolution. ``generate``
        repeats each row in place for beams and for several sequences: repeat its rank, too.

        Args:
            ranks: One for each row, from 0 to R; 0 switches the update off.

        Raises:
            MatryoshkaError: A rank is not available, the adapter is merged or not active, or (from
                the forward) a batch has another number of rows.
        """
        return self.layers.rows(ranks)

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
        self.layers.draw(step, batch_size, process_index, num_processes)

    def callback(self, output: PathLike | None = None) -> NestingCallback:
        """Return the Trainer callback that draws the diagonal of each step.

        Args:
            output: Where the adapter will be saved. If this path exists, that is an error when the
                training begins, instead of at its end. Omit it if `save` will overwrite the path.
        """
        # transformers' Trainer is slow to import.
        from matryoshka_lora.training.callback import NestingCallback

        return NestingCallback(self.layers, output)

    def layer_factors(self) -> FactorParameters:
        """Return the parameters A and B of each layer, in PEFT's own layout.

        The keys are the layers' names in the base model. The parameters are the live ones: whatever
        changes them invalidates the order.
        """
        return self.layers.layer_factors()

    def reorder(self) -> ReorderResult:
        """Reorder the columns of each layer by SVD, so that every rank is available.

        The first r columns are then the closest matrix of rank r (Eckart-Young), and the function
        of rank R in eval mode is unchanged up to rounding: with ``deploy="paper"``, P is dropped,
        and `deploy` becomes ``"reordered"``. Further training is plain LoRA and invalidates the
        order.

        Returns:
            The errors of the nested ranks, and the singular values of each layer's update.

        Raises:
            MatryoshkaError: The adapter is merged, or sharded over processes.
            NotFiniteError: A factor is NaN or infinite. The adapter is unchanged.
        """
        singular_values = self.layers.reorder()
        squared_errors = {name: squared_tails(values) for name, values in singular_values.items()}
        errors = relative_errors(squared_errors, self.nesting.ranks)
        return ReorderResult(None, self.nesting.ranks, errors, singular_values)

    def train_ranks(
        self,
        data: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        eval_data: Any = None,
        max_examples: int | None = None,
        seed: int = 0,
    ) -> TrainRanksResult:
        """Train every rank from the smallest nested rank to R; rank R changes a little.

        Factors without an order are reordered first. Then there are four outcomes:

        * The trained factors are kept.
        * They are not better, so the factors are those from before training, with a warning.
        * No rank is behind rank R, so nothing is trained.
        * The Trainer cannot compute the loss of its examples alone, as in GRPO, or streams them, so
          nothing is trained, with a warning.

        Validation examples decide, and show which ranks need the most steps. Without an evaluation
        set, they are training examples.

        Under ``accelerate launch`` every process must call this method.

        Args:
            data: The Trainer that has trained the adapter; a dataset or a list of examples with
                ``prompt`` and ``completion``; or the path of a file of them.
            tokenizer: The base model's tokenizer. A Trainer and tokenized examples need none.
            eval_data: Examples to validate on: a dataset, a list or a file. Defaults to the
                Trainer's ``eval_dataset``.
            max_examples: The number of examples to train on. Defaults to half the examples that the
                Trainer has seen, or 3200 if unknown.
            seed: Seed of the order of examples and ranks.

        Raises:
            MatryoshkaError: The data cannot be used, max_examples is not positive, or the adapter
                is merged, sharded or not active. It is unchanged.
            NotFiniteError: The loss or a gradient is NaN or infinite. The factors are as before
                training.
        """
        # These modules are slow to import.
        from matryoshka_lora.training.data import NoExamplesError, read_training_data
        from matryoshka_lora.training.train_ranks import train_ranks

        try:
            training_data = read_training_data(self.model, data, tokenizer, eval_data)
            return train_ranks(self.layers, training_data, max_examples, seed)
        except NoExamplesError as error:  # must not stop a script between training and saving
            warnings.warn(f"The ranks are reordered, but not trained. {error}", stacklevel=2)
            if self.order is None:
                self.layers.reorder()
            return TrainRanksResult(None, "no examples", {}, {}, None)

    def save(self, path: PathLike, force: bool = False) -> None:
        """Save a folder that serves every rank, and that PEFT alone loads at rank R.

        Factors without an order are reordered on the way; the adapter in memory is unchanged.

        Args:
            path: The folder to write.
            force: Whether to overwrite an existing folder with all its content.

        Raises:
            MatryoshkaError: The path already exists or cannot be written.
            NotFiniteError: A factor is NaN or infinite.
        """
        lora = self._to_lora(_read_later)
        lora.nested().save(path, force=force)

    def export(self, path: PathLike, rank: int, force: bool = False) -> None:
        """Export one rank as an ordinary LoRA adapter.

        Args:
            path: The folder to write.
            rank: From 1 to R.
            force: Whether to overwrite an existing folder with all its content.

        Raises:
            MatryoshkaError: The rank is not available, or the path already exists or cannot be
                written.
            NotFiniteError: A factor is NaN or infinite.
        """
        lora = self._to_lora(_read_later)
        lora.truncate(rank).save(path, force=force)

    def to_lora(self) -> Lora:
        """Return a copy of the adapter in memory as a `Lora`."""
        return self._to_lora(_copy)

    def _to_lora(self, store: Callable[[Tensor], StoredTensor]) -> Lora:
        name = f"adapter {self.name!r}"
        config = self._config()
        state_dict: dict[str, Tensor] = get_peft_model_state_dict(
            self.model,
            adapter_name=self.name,
            save_embedding_layers=self._save_embedding_layers(config["base_model_name_or_path"]),
        )
        tensors = {key: store(tensor) for key, tensor in state_dict.items()}
        layers, other_tensors = find_layers(tensors, config, name)
        order = self.layers.verify_order()
        if order is None and self.layers.state.order == "trained":
            warnings.warn(
                f"Adapter {self.name!r} has changed since its ranks were trained, so it is "
                "reordered. Train them again.",
                stacklevel=3,
            )
        return Lora(
            name,
            layers,
            other_tensors,
            nesting=self.nesting,
            order=order,
            deploy=self.deploy,
            config=config,
        )

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
        """Return whether the embeddings are saved: if the vocabulary differs from the base model's.

        If that is unknown, PEFT decides: ``"auto"`` saves them if they are adapted.
        """
        # Not every model has a vocabulary, and not every base model has files.
        with suppress(AttributeError, OSError, TypeError, ValueError):
            base_config = self.model.config.from_pretrained(resolve_model_path(str(base_model)))
            base_vocab_size = base_config.get_text_config().vocab_size
            vocab_size = self.model.config.get_text_config().vocab_size
            return bool(base_vocab_size != vocab_size)
        return "auto"


def _read_later(tensor: Tensor) -> StoredTensor:
    """Return a tensor that is not copied, to be written before it can change."""
    dtype = to_numpy_dtype(tensor.dtype)
    return StoredTensor(dtype, tuple(tensor.shape), lambda: to_numpy(tensor))


def _copy(tensor: Tensor) -> StoredTensor:
    return StoredTensor.from_array(to_numpy(tensor.detach().clone()))
