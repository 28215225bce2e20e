"""Small real models, built in code, with nested adapters of random factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from helpers import oracle
from matryoshka_lora import NestedAdapter, Nesting, Rule, nest

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Return a Llama of two layers, the same weights for the same seed; fp32, eval mode."""
    config = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # large enough for the tokens to depend on the adapter
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def tiny_mixtral(seed: int = 0, **changes: Any) -> MixtralForCausalLM:
    """Return a Mixtral of two layers and three experts; fp32, eval mode."""
    config = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**{**config, **changes})).eval()


def randomize(model: nn.Module, seed: int = 1, size: float = 0.3) -> None:
    """Fill the factors of every adapter with normal numbers, so that B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size
            parameter.data.copy_(values)


def lora_config(nesting: Nesting, **changes: Any) -> LoraConfig:
    """Return the LoraConfig of a nesting, on all linear layers of a Llama."""
    alpha = nesting.scale * nesting.max_rank
    return LoraConfig(
        **{"r": nesting.max_rank, "lora_alpha": alpha, "target_modules": LINEAR_LAYERS, **changes}
    )


def nest_as(
    model: PeftModel, nesting: Nesting, rule: str | Rule = "matryoshka", **options: Any
) -> NestedAdapter:
    """Nest with the ranks and the scaling of a nesting, whose scale is the config's."""
    return nest(model, nesting.ranks, scaling=nesting.scaling, rule=rule, **options)


def nested_llama(
    nesting: Nesting,
    rule: str | Rule = "matryoshka",
    deploy: Any = "reordered",
    seed: int = 0,
    layers: int = 2,
    **lora: Any,
) -> NestedAdapter:
    """Return a tiny Llama with a nested adapter of random factors, in eval mode."""
    model = get_peft_model(tiny_llama(seed, num_hidden_layers=layers), lora_config(nesting, **lora))
    adapter = nest_as(model.eval(), nesting, rule, deploy=deploy)
    randomize(model)
    return adapter


@dataclass
class NestedLayer:
    """A single nested layer and its oracle.

    Attributes:
        kind: The oracle.
        adapter: The nested adapter.
        layer: PEFT's LoRA layer.
    """

    kind: oracle.Kind
    adapter: NestedAdapter
    layer: Any

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The parameters A and B."""
        if "default" in self.layer.lora_embedding_A:
            return self.layer.lora_embedding_A["default"], self.layer.lora_embedding_B["default"]
        return self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight

    def expected(self, p: Tensor, x: Tensor) -> Tensor:
        """Return the oracle's output, with the layer's factors in its graph."""
        return self.kind.forward(self.layer.get_base_layer(), *self.factors, p, x)


class OneLayer(nn.Module):
    """The smallest model that PEFT accepts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


def nested_layer(
    kind: str,
    nesting: Nesting,
    rule: str | Rule = "matryoshka",
    deploy: Any = "reordered",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **lora: Any,
) -> NestedLayer:
    """Return a single nested layer with random factors, in train mode."""
    torch.manual_seed(seed)
    options = {"target_modules": ["layer"], "fan_in_fan_out": kind == "Conv1D", **lora}
    base_model = OneLayer(oracle.KINDS[kind].build()).to(dtype)
    model = get_peft_model(base_model, lora_config(nesting, **options))
    adapter = nest_as(model, nesting, rule, deploy=deploy, seed=seed)
    randomize(model, seed)
    return NestedLayer(oracle.KINDS[kind], adapter, adapter.model.base_model.model.layer)
