"""`load`: load an adapter onto its base model, at any rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from matryoshka_lora.atomic import PathLike
from matryoshka_lora.errors import MatryoshkaError, wrap_errors
from matryoshka_lora.formats.open import open_lora
from matryoshka_lora.lora.keys import PEFT_PREFIX
from matryoshka_lora.lora.lora import Lora
from matryoshka_lora.peft.adapter import NestedAdapter
from matryoshka_lora.peft.nest import nest
from matryoshka_lora.tensors import restored_modes, to_torch


def load(
    base_model: nn.Module,
    path: PathLike,
    rank: int | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    revision: str | None = None,
) -> NestedAdapter:
    """Load a LoRA adapter onto its base model, at any rank.

    An adapter that is not nested, such as a Trainer's checkpoint, is reordered by SVD first.

    Args:
        base_model: The adapter's base model, or a `PeftModel` of it, on which you activate it with
            ``set_adapter``.
        path: A folder that `NestedAdapter.save` or PEFT has saved, or its Hub id ``owner/name``.
        rank: The rank in eval mode, from 0 to R. Defaults to R.
        adapter_name: PEFT's name of the adapter.
        is_trainable: Whether the factors get gradients. Training continues as plain LoRA of rank R.
        revision: Branch, tag or commit of the adapter on the Hugging Face Hub.

    Raises:
        MatryoshkaError: A file is damaged, the adapter does not fit the model, the rank is not
            available, both rank and is_trainable are passed, or the base model has adapters but is
            no `PeftModel`. The base model is unchanged.
    """
    if is_trainable and rank is not None:
        raise MatryoshkaError(
            "Training is at rank R. Pass `rank` or `is_trainable=True`, not both."
        )
    if isinstance(base_model, PeftModel):
        if adapter_name in base_model.peft_config:
            raise MatryoshkaError(
                f"The model already has adapter {adapter_name!r}. Pass another `adapter_name`."
            )
    elif any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        # PEFT would mix its layers with the new ones.
        raise MatryoshkaError(
            "`base_model` already has PEFT layers, but is no PeftModel. Pass the PeftModel, or "
            "unload its adapters first."
        )
    lora = open_lora(path, revision=revision)
    if lora.container == "single":
        name = f"adapter_name={adapter_name!r}"
        raise MatryoshkaError(
            f"{path} is a single file, which diffusers loads: call pipeline.load_lora_weights("
            f"{str(path)!r}, {name}), then adapter = nest(pipeline.unet, {name}), or "
            "pipeline.transformer, and adapter.reorder()."
        )
    check_base_model(base_model, lora)
    with _remove_after_failure(base_model, adapter_name):
        enlarge_vocabulary(base_model, lora)
        model = load_with_peft(base_model, lora, adapter_name, is_trainable)
        nested_adapter = _nest_like_file(model, lora, adapter_name)
        if rank is not None:
            nested_adapter.set_rank(rank)
    model.train(is_trainable)
    return nested_adapter


def load_with_peft(
    base_model: nn.Module,
    lora: Lora,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """Load an adapter of a folder with PEFT: all layers of the file, whatever its config selects.

    Raises:
        MatryoshkaError: PEFT cannot load it.
    """
    folder = str(lora.files[0].parent)
    action = f"Cannot load {lora.name} onto {type(base_model).__name__}"
    with wrap_errors(action, _base_model_hint(lora)):
        config = _literal_config(lora)
        if not isinstance(base_model, PeftModel):
            with warnings.catch_warnings():
                # PEFT reads an attribute that transformers renames.
                warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                return PeftModel.from_pretrained(
                    base_model, folder, adapter_name, is_trainable=is_trainable, config=config
                )
        config.inference_mode = not is_trainable
        base_model.add_adapter(adapter_name, config)
        base_model.set_requires_grad(adapter_name, is_trainable)
        base_model.load_adapter(folder, adapter_name, is_trainable=is_trainable)
    return base_model


def _literal_config(lora: Lora) -> LoraConfig:
    """Return PEFT's config of an adapter, with the names of its layers as ``target_modules``.

    The file's ``target_modules`` may leave out layers that the file has, and may be a regular
    expression that never ends.
    """
    config: LoraConfig = LoraConfig.from_pretrained(str(lora.files[0].parent))
    parameters = config.target_parameters or ()
    modules_of_parameters = tuple(f".{name}".rpartition(".")[0] for name in parameters)
    names = [layer.name.replace(".base_layer", "") for layer in lora.layers]
    if modules_of_parameters:
        names = [name for name in names if not f".{name}".endswith(modules_of_parameters)]
    config.target_modules = set(names) or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


@contextmanager
def _remove_after_failure(base_model: nn.Module, adapter_name: str) -> Iterator[None]:
    """After an exception, remove an adapter that PEFT may have loaded in part.

    The size of the vocabulary, the modes and ``requires_grad`` are restored.
    """
    vocabulary_size = _vocabulary_size(base_model)
    # By name, because another size of the vocabulary has other parameters.
    requires_grad = {name: p.requires_grad for name, p in base_model.named_parameters()}
    try:
        with restored_modes(base_model):
            yield
    except BaseException:  # including KeyboardInterrupt
        if not isinstance(base_model, PeftModel):
            _remove_peft_layers(base_model)
        elif adapter_name in base_model.peft_config:
            base_model.delete_adapter(adapter_name)
        if _vocabulary_size(base_model) != vocabulary_size:
            cast(Any, base_model).resize_token_embeddings(vocabulary_size, mean_resizing=False)
        for name, parameter in base_model.named_parameters():
            parameter.requires_grad_(requires_grad[name])
        raise


def _vocabulary_size(base_model: Any) -> int | None:
    """Return the number of embeddings, or None for a model without a vocabulary."""
    with suppress(AttributeError, NotImplementedError):
        return int(base_model.get_input_embeddings().num_embeddings)
    return None


def _remove_peft_layers(base_model: nn.Module) -> None:
    """Remove PEFT's layers from a model, as `PeftModel.unload` does."""
    # Backwards, because a layer may be wrapped several times.
    for name, module in reversed(list(base_model.named_modules())):
        if isinstance(module, BaseTunerLayer):
            base_model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            base_model.set_submodule(name, module.original_module)
    if hasattr(base_model, "peft_config"):
        del base_model.peft_config


def _nest_like_file(model: PeftModel, lora: Lora, adapter_name: str) -> NestedAdapter:
    """Nest an adapter with the settings of its file; reorder it if the file has none."""
    nesting = lora.nesting
    if nesting is None:
        nested_adapter = nest(model, adapter_name=adapter_name)
        nested_adapter.reorder()
        return nested_adapter
    nested_adapter = nest(model, nesting.ranks, scaling=nesting.scaling, adapter_name=adapter_name)
    nested_adapter.state.deploy = lora.deploy
    nested_adapter.state.reset()
    if lora.order is not None:
        values = {layer.name: layer.weighted_values for layer in lora.layers}
        nested_adapter.mark_ordered(
            lora.order, {name: value for name, value in values.items() if value is not None}
        )
    if lora.small is not None:
        factors = {layer.name: layer.read() for layer in lora.small.layers}
        nested_adapter.set_small_factors(
            {name: (to_torch(A), to_torch(B)) for name, (A, B, *_) in factors.items()}
        )
    return nested_adapter


def check_base_model(base_model: nn.Module, lora: Lora) -> None:
    """Raise MatryoshkaError unless a base model has all layers of an adapter.

    PEFT would ignore the others, and is the one that compares their dimensions.
    """
    if isinstance(base_model, PeftModel):
        base_model = base_model.get_base_model()
    names = {name.replace(".base_layer", "") for name, _ in base_model.named_modules()}
    # PEFT creates the layers of a replication.
    required_layers = () if lora.config.get("layer_replication") else lora.layers
    for layer in required_layers:
        if layer.name.replace(".base_layer", "") not in names:
            raise MatryoshkaError(
                f"This model has no layer {layer.name}, which {lora.name} adapts. "
                f"{_base_model_hint(lora)}"
            )


def _base_model_hint(lora: Lora) -> str:
    base_name = lora.config.get("base_model_name_or_path") or "not named in its config"
    return f"Use the model that the adapter was trained on ({base_name})."


def enlarge_vocabulary(base_model: Any, lora: Lora) -> None:
    """Enlarge the embeddings of a model, or of a `PeftModel` of it, to the size of an adapter's.

    Raises:
        MatryoshkaError: The adapter holds fewer embeddings than the model has.
    """
    if isinstance(base_model, PeftModel):
        base_model = base_model.get_base_model()
    for name, module in list(base_model.named_modules()):
        if not isinstance(module, nn.Embedding):
            continue
        for wrapper in ("", ".base_layer", ".token_adapter.base_layer"):
            saved = lora.other_tensors.get(f"{PEFT_PREFIX}{name}{wrapper}.weight")
            if saved is None:
                continue
            if saved.shape[0] < module.num_embeddings:
                raise MatryoshkaError(
                    f"{lora.name} has {saved.shape[0]} embeddings in {name}, but this model has "
                    f"{module.num_embeddings}. Use the model that the adapter was trained on, or "
                    f"call model.resize_token_embeddings({saved.shape[0]}) first."
                )
            if saved.shape[0] > module.num_embeddings:
                base_model.resize_token_embeddings(saved.shape[0], mean_resizing=False)
