"""The adapters that vLLM's server reads, and the memory that it reserves for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.formats.peft_folder import base_model_of
from matryoshka_lora.formats.runtimes import name_in_block
from matryoshka_lora.lora.lora import Lora

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for ``--max-lora-rank``."""

MAX_LORAS = 8
"""The largest ``--max-loras`` that `serve` asks for: a slot for each adapter, up to this number."""

# The modules that have the same names in vLLM's models, or are fused there. Others, such as the
# ones of experts, have other names there, and a name that vLLM does not find is not an error.
_FUSED_MODULES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
_MODULES = {"self_attn.o_proj", "mlp.down_proj"}.union(*_FUSED_MODULES)


def round_up_to_vllm(rank: int) -> int:
    """Return the smallest ``--max-lora-rank`` of vLLM that a rank fits, or the rank itself."""
    return next((allowed for allowed in MAX_LORA_RANKS if allowed >= rank), rank)


def check_for_vllm(lora: Lora) -> None:
    """Raise MatryoshkaError if vLLM cannot read an adapter."""
    hint = "Serve a merged model: export it with `format='merged'`."
    if lora.other_tensors:
        raise MatryoshkaError(
            f"{lora.name} has {min(lora.other_tensors)}, which vLLM cannot read. {hint}"
        )
    if lora.config.get("target_parameters"):
        raise MatryoshkaError(
            f"{lora.name} has target_parameters, with which vLLM fails or answers as the base "
            f"model. {hint}"
        )


def select_for_vllm(
    loras: Mapping[str, Lora], base_model: str | None = None, base_revision: str | None = None
) -> tuple[dict[str, Lora], dict[str, str]]:
    """Return the adapters that one server can serve, and why it cannot serve the others, by name.

    A server has one base model: the one that most adapters name, or of several the first one's.
    """
    base_models: dict[str, tuple[str, str | None]] = {}
    problems: dict[str, str] = {}
    for name, lora in loras.items():
        try:
            check_for_vllm(lora)
            base_models[name] = base_model_of(lora, base_model, base_revision)
        except MatryoshkaError as error:
            problems[name] = str(error)
    if base_models:
        counts = Counter(base_models.values())
        expected = counts.most_common(1)[0][0]  # of several, the first one
        for name, actual in base_models.items():
            if actual != expected:
                models = [" at ".join(filter(None, model)) for model in (actual, expected)]
                problems[name] = f"Its base model is {models[0]}, and the server's is {models[1]}."
                if counts[actual] == counts[expected]:
                    first = next(other for other in base_models if base_models[other] == expected)
                    problems[name] += (
                        f" As many adapters name each, so {first} decides. Serve a folder for each "
                        "base model."
                    )
    return {name: lora for name, lora in loras.items() if name not in problems}, problems


def target_modules(loras: Iterable[Lora]) -> list[str]:
    """Return the modules for ``--lora-target-modules``, so that vLLM reserves memory for no others.

    The list is empty if an adapter has a module whose name in vLLM's model is not known. vLLM
    ignores modules of an adapter that are not in its list, without an error.
    """
    modules = {name_in_block(layer.name) for lora in loras for layer in lora.layers}
    return sorted(name.rpartition(".")[2] for name in modules) if modules <= _MODULES else []


def slot_size(loras: Iterable[Lora], max_rank: int) -> int | None:
    """Return the size in bytes of a slot of a server in bf16, or None if it is not known.

    It assumes the option `target_modules`, and that one of the adapters has a layer in each block
    of the base model. vLLM fuses queries, keys and values: if no adapter has one of them, it counts
    as the smallest of the others.
    """
    loras = list(loras)
    if not target_modules(loras):
        return None
    layers = {layer.name: layer.parameters_per_rank for lora in loras for layer in lora.layers}
    num_blocks = max(Counter(map(name_in_block, layers)).values())
    sizes = {name_in_block(name): size for name, size in layers.items()}
    if any(sizes[name_in_block(name)] != size for name, size in layers.items()):
        return None  # the blocks differ
    parameters = sum(sizes.values())
    for modules in _FUSED_MODULES:
        known = [sizes[name] for name in modules if name in sizes]
        if known:
            parameters += (len(modules) - len(known)) * min(known)
    return 2 * max_rank * num_blocks * parameters
