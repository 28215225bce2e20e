"""Make adapters nested: `nest` in a model, `load` from a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn

from matryoshka_lora.adapter import NestedAdapter
from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.files.hub import local
from matryoshka_lora.files.layers import AdapterFile, Layer
from matryoshka_lora.files.output import PathLike
from matryoshka_lora.files.peft import check_config, open_adapter
from matryoshka_lora.nesting import Nesting, Rule, Scaling, get_rule
from matryoshka_lora.variant import NestedVariant, Shared, attach, factor_parameters, lora_layers


def nest(
    peft_model: PeftModel,
    ranks: Iterable[int] | None = None,
    scaling: Scaling = "none",
    rule: str = "lora",
    deploy: Literal["reordered", "paper"] = "reordered",
    adapter: str = "default",
    seed: int = 0,
) -> NestedAdapter:
    """Make a LoRA adapter of a PEFT model nested: one training run then serves every rank.

    Example::

        adapter = nest(get_peft_model(base, LoraConfig(r=32)))
        trainer.add_callback(adapter.callback())
        trainer.train()
        adapter.reorder()
        adapter.save("my-adapter")

    Args:
        peft_model: A model from ``get_peft_model`` with a LoRA adapter that is not trained yet.
        ranks: The ranks to train, increasing; the last one is R, the config's ``r``.
            None: the powers of two up to R.
        scaling: The scale of a rank below R in training; see `Nesting`.
        rule: One of `matryoshka_lora.nesting.RULES`. ``"lora"`` is plain LoRA, and accepts an
            already trained adapter. ``"matryoshka"`` has the paper's fixed P (arXiv 2605.07850).
        deploy: ``"reordered"``: whatever is saved serves every rank. ``"paper"``: P is dropped
            after training and nothing is reordered, as the paper does; low ranks are poor then.
        adapter: PEFT's name of the adapter.
        seed: The seed of the ranks that the rule draws.

    Raises:
        MatryoshkaError: The model, the config or a layer cannot be nested. The model is unchanged.
    """
    if not isinstance(peft_model, PeftModel):
        raise MatryoshkaError(
            f"nest() takes a PEFT model, not {type(peft_model).__name__}: "
            "call peft.get_peft_model(model, LoraConfig(...)) first, or give trainer.model"
        )
    layers = dict(lora_layers(peft_model, adapter))
    if not layers:
        names = ", ".join(peft_model.peft_config)
        raise MatryoshkaError(f"there is no LoRA adapter {adapter!r}; the adapters are {names}")
    check_config(peft_model.peft_config[adapter].to_dict(), f"adapter {adapter!r}")
    chosen = get_rule(rule)
    if deploy not in ("reordered", "paper"):
        raise MatryoshkaError(f"deploy is {deploy!r}; write 'reordered' or 'paper'")
    first = next(iter(layers.values()))
    for name, module in layers.items():
        if reason := next(_reasons(module, adapter, first, chosen), None):
            raise MatryoshkaError(f"layer {name} cannot be nested: {reason}")
    R = first.r[adapter]
    ranks = Nesting.powers_of_two(R).ranks if ranks is None else tuple(ranks)
    nesting = Nesting(ranks, scaling, first.scaling[adapter])
    if nesting.max_rank != R:
        raise MatryoshkaError(
            f"LoraConfig has r={R}, and the largest nested rank is {nesting.max_rank}: "
            f"end the ranks with {R}, or write LoraConfig(r={nesting.max_rank}, ...)"
        )
    shared = Shared(nesting, chosen, seed, deploy)
    for module in layers.values():
        attach(module, adapter, shared)
        if chosen.one_column:
            _learn_one_column(module, adapter, shared)
    return NestedAdapter(peft_model, adapter)


def load(
    base_model: nn.Module,
    path: PathLike,
    rank: int | None = None,
    adapter: str = "default",
    trainable: bool = False,
) -> NestedAdapter:
    """Load a LoRA adapter onto its base model, at any rank.

    An adapter that is not nested, such as a Trainer's checkpoint, is reordered by SVD first.

    Args:
        base_model: The adapter's base model, or a `PeftModel`; its ``set_adapter`` activates it.
        path: A folder that `NestedAdapter.save` or PEFT has written, or ``owner/name`` on the hub.
        rank: The rank in eval mode, from 0 to R; None is R.
        adapter: The adapter's name in PEFT.
        trainable: Whether the factors get gradients. Training continues as plain LoRA of rank R.

    Raises:
        MatryoshkaError: A file is damaged, the adapter does not fit the model, there is no such
            rank, or it would be trained at a smaller one.
    """
    if isinstance(base_model, PeftModel) and adapter in base_model.peft_config:
        raise MatryoshkaError(f"the model has an adapter {adapter!r}: give adapter= a new name")
    if trainable and rank is not None:
        raise MatryoshkaError("training is at rank R: give rank= or trainable=, and not both")
    path = local(path)
    file = open_adapter(path)
    base = base_model.get_base_model() if isinstance(base_model, PeftModel) else base_model
    fit(base, file)
    options = {"adapter_name": adapter, "is_trainable": trainable}
    if isinstance(base_model, PeftModel):
        model, undo = base_model, partial(base_model.delete_adapter, adapter)
        model.load_adapter(str(path), **options)
    else:
        model = PeftModel.from_pretrained(base_model, str(path), **options)
        undo = model.unload
    try:
        if file.nesting is None or file.order is None:
            nested = nest(model, adapter=adapter)
            nested.reorder()
        else:
            deploy: Any = "paper" if file.order == "paper" else "reordered"
            nested = nest(model, file.nesting.ranks, file.nesting.scaling, "lora", deploy, adapter)
            if deploy == "reordered":
                nested.mark_ordered(file.order)
        if rank is not None:
            nested.set_rank(rank)
    except MatryoshkaError:
        undo()
        raise
    model.train(trainable)
    return nested


# By exact class, because PEFT's other layers ignore a variant in forward (AWQ, AQLM, EETQ) or in
# merge (torchao, INC). By name, because importing PEFT's bitsandbytes layers imports bitsandbytes.
_SUPPORTED = {
    *(f"layer.{name}" for name in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")),
    *(f"bnb.{name}" for name in ("Linear4bit", "Linear8bitLt")),
}


def _reasons(module: Any, adapter: str, first: Any, rule: Rule) -> Iterator[str]:
    """Yield why a layer cannot be nested correctly; the first reason counts."""
    if isinstance(module.lora_variant.get(adapter), NestedVariant):
        yield "it is nested already: NestedAdapter(model, adapter) is its handle"
    kind = f"{type(module).__module__}.{type(module).__name__}".removeprefix("peft.tuners.lora.")
    if kind not in _SUPPORTED:
        yield (
            f"PEFT's {kind} cannot be nested. Leave it out of the targets; or train "
            "with PEFT alone, and then run `matryoshka export FOLDER --rank 4 -o small`"
        )
    if module.r[adapter] != first.r[adapter] or module.scaling[adapter] != first.scaling[adapter]:
        yield (
            "rank_pattern or alpha_pattern give it another rank or scale. Leave them out; or run "
            "`matryoshka reorder FOLDER -o nested` on the saved adapter"
        )
    if getattr(module.get_base_layer(), "groups", 1) > 1:
        yield "a grouped convolution ties columns of B to groups. Leave it out of target_modules"
    if module.merged:
        yield "an adapter is merged into it. Call unmerge_adapter() first"
    # PEFT begins with B at zero, and in embeddings with A at zero.
    factors = factor_parameters(module, adapter)
    if rule.name != "lora" and all(bool(factor.count_nonzero()) for factor in factors):
        yield (
            f"its B A is not zero, so rule {rule.name!r} would change what it computes. Use "
            "rule='lora' for an adapter that is trained already"
        )


def _learn_one_column(module: Any, adapter: str, shared: Shared) -> None:
    """Let only the last row of A and column of B under the drawn p have gradients."""

    def only(dimension: int, gradient: Any) -> Any:
        if not shared.rule.one_column:  # the adapter was reordered since, and is plain LoRA
            return gradient
        assert shared.training is not None  # forward raised otherwise
        q = shared.training.on(gradient.device)
        last = torch.arange(len(q), device=q.device) == q.count_nonzero() - 1
        shape = [-1 if d == dimension else 1 for d in range(gradient.ndim)]
        return gradient * last.view(shape)

    for dimension, parameter in enumerate(factor_parameters(module, adapter)):
        parameter.register_hook(partial(only, dimension))  # type: ignore[no-untyped-call]


def fit(base: nn.Module, file: AdapterFile) -> None:
    """Give a base model the vocabulary of an adapter that holds its embeddings whole.

    Raises:
        MatryoshkaError: The model lacks a layer of the adapter, or has it in another size.
    """
    modules: Any = {n.replace(".base_layer", ""): m for n, m in base.named_modules()}
    grown = {x.shape[0] for x in file.others.values() if x.shape}  # a head may grow, too

    def fits(layer: Layer) -> bool:
        module, out = modules.get(layer.name.replace(".base_layer", "")), layer.B.shape[0]
        if not hasattr(module, "in_features"):
            return module is not None
        return module.in_features == layer.A.shape[-1] and out in {module.out_features, *grown}

    made = file.config.get("layer_replication")  # PEFT makes these layers
    missing = [layer.name for layer in file.layers if not (made or fits(layer))]
    if missing:
        named = file.config.get("base_model_name_or_path")
        raise MatryoshkaError(
            f"this model lacks layer {missing[0]} of {file.name}, or has it in another size: take "
            f"the model that it was trained on{f', {named}' if named else ''}"
        )
    for name, module in [*base.named_modules()]:
        for inside in ("", ".base_layer", ".token_adapter.base_layer"):
            rows = file.others.get(f"base_model.model.{name}{inside}.weight")
            if rows and isinstance(module, nn.Embedding) and rows.shape[0] != module.num_embeddings:
                base.resize_token_embeddings(rows.shape[0], mean_resizing=False)  # type: ignore[operator]
