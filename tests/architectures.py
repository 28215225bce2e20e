"""Tiny models of many architectures, with a nested adapter of random factors."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from matryoshka_lora import NestedAdapter, nest

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}


def tiny_adapter(
    config: PreTrainedConfig, attention: str = "eager", dtype: torch.dtype = torch.float32, part: str = "att"
) -> NestedAdapter:
    """A model of this config, its linear layers with this in their names nested at the ranks 1, 2 and 4."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = 2
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and part in name]
    peft = get_peft_model(model.to(dtype), LoraConfig(r=4, lora_alpha=4, target_modules=layers))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return nest(peft.eval(), deploy="paper")
