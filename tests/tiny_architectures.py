"""Tiny causal language models of any architecture of transformers, with random weights and without network.

The sizes of a config are found by the names of its fields: transformers' configs have few names for the same thing. A
family for which that does not give a model that runs, or not one with all of its kinds of layers, has a line of its own
in `_EXCEPTIONS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

VOCABULARY = 96
CONTEXT = 128
WINDOW = 8
"""Of local attention: shorter than the sequences of every test."""

_NAMES: tuple[tuple[Any, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        32,
        "hidden_size d_model n_embd embedding_size emb_dim embed_dim embedding_dim word_embed_proj_dim "
        "input_embedding_size output_embedding_size backbone_hidden_size hidden_size_global adapter_in_dim "
        "adapter_input_size adapter_out_dim "
        "out_hidden_size ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels output_channels",
    ),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks depth "
        "num_encoder_layers num_decoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads "
        "num_experts_per_tok moe_topk moe_k linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads "
        "global_num_key_value_heads num_global_key_value_heads kv_n_heads moe_top_k top_k_experts "
        "num_layers_per_stack index_topk_blocks",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
        "num_experts n_routed_experts num_local_experts mamba_n_heads mamba_num_heads rotary_dim index_topk "
        "index_block_size",
    ),
    (
        8,
        "head_dim swa_head_dim global_head_dim d_head dim_head attention_head_size qk_rope_head_dim qk_nope_head_dim "
        "v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state ssm_state_size state_size "
        "mamba_chunk_size chunk_size index_head_dim hidden_size_per_layer_input time_step_rank laurel_rank",
    ),
    (12, "q_lora_rank kv_lora_rank o_lora_rank"),
    (
        16,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size moe_latent_size mamba_d_head mamba_head_dim "
        "qk_head_dim router_hidden_size",
    ),
    (
        48,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner dff d_inner dim_ff feed_forward_size "
        "ffn_hidden_size shared_intermediate_size dense_intermediate_size",
    ),
    (
        1,
        "n_group topk_group n_shared_experts num_shared_experts mamba_n_groups mamba_ngroups n_groups "
        "max_window_layers num_codebooks first_k_dense_replace num_dense_layers",
    ),
    (
        WINDOW,
        "sliding_window sliding_window_size window_size attention_window_size local_attention attention_chunk_size "
        "keep_window_size",
    ),
    (
        CONTEXT,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
        "max_source_positions original_max_position_embeddings",
    ),
    (0.2, "initializer_range init_std"),  # large enough for the tokens to depend on the adapter
    (5.0, "attn_logit_softcapping final_logit_softcapping"),
    (True, "use_sliding_window is_decoder"),
    (0.0, "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout activation_dropout"),
)
_SIZES = {name: value for value, names in _NAMES for name in names.split()}

# None leaves the part of the model out that such a field describes.
_OFF_WHEN_NONE = (
    "q_lora_rank",
    "softcapping",
    "moe_latent_size",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "softcapping",
)
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_BOTH = {"layer_types": ["full_attention", "sliding_attention"]}
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 16}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _BOTH,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "mellum": _BOTH,
    "ministral": _BOTH,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
    },
    "roc_bert": {
        "shape_embed_dim": 16,
        "shape_vocab_size": VOCABULARY,
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": VOCABULARY,
    },
    "smollm3": _BOTH,
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    # Two occurrences, so that they share one block.
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
}
_SWA = ("num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
_EXCEPTIONS["dots3_note_text"] = {"head_dim": 16, "swa_head_dim": 16, "swa_num_key_value_heads": 4}
_EXCEPTIONS["dots3_note_text"] |= {f"swa_{name}": _SIZES[name] for name in _SWA if name != "num_key_value_heads"}
_EXCEPTIONS["dots3_note"] = {"text_config": _EXCEPTIONS["dots3_note_text"]}
_EXCEPTIONS["qwen4_exp"] = {"text_config": _EXCEPTIONS["qwen4_exp_text"]}


_PARTS = ("musicgen", "musicgen_melody")


# What a config can turn on that the defaults leave off.
_LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3, queries of full rank": ("deepseek_v3", {"q_lora_rank": None}),
    "doge, experts": ("doge", {"is_moe": True}),
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "falcon, grouped queries": ("falcon", {"new_decoder_architecture": True}),
    "falcon, sequential layers": ("falcon", {"parallel_attn": False, "multi_query": False, "num_kv_heads": 4}),
    "gemma2, eager attention": ("gemma2", {"attn_implementation": "eager"}),
    "gemma3_text, both directions": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4_text, experts": ("gemma4_text", {"enable_moe_block": True}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt_bigcode, heads of their own": ("gpt_bigcode", {"multi_query": False}),
    "granite, multipliers": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    ),
    "llama, tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "llama, yarn": ("llama", {"rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0}}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.3}),
    "opt, norms after and narrow embeddings": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "phi3, long RoPE": ("phi3", {"original_max_position_embeddings": 16, "rope_parameters": _LONG_ROPE}),
    "stablelm, parallel with norms": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}


def tiny_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    """The config of a tiny model of an architecture, named as in ``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES``."""
    # Some of the names are of models of several parts, of which one writes text and has a config of its own.
    kind = _class(architecture).config_class if architecture in _PARTS else CONFIG_MAPPING[architecture]
    return kind(**{**_small(kind, _EXCEPTIONS.get(architecture, {})), **changes})


def tiny_causal_lm(
    architecture: str, seed: int = 0, attn_implementation: str | None = None, **changes: Any
) -> PreTrainedModel:
    """A tiny model of an architecture or a variant, with random weights, the same ones for the same seed.

    It is in fp32 and in eval mode.
    """
    if architecture in VARIANTS:
        architecture, more = VARIANTS[architecture]
        return tiny_causal_lm(architecture, seed, **{**more, **changes})
    torch.manual_seed(seed)
    config = tiny_config(architecture, **changes)
    build = _class(architecture)._from_config if architecture in _PARTS else AutoModelForCausalLM.from_config
    return build(config, attn_implementation=attn_implementation).eval()


def _class(architecture: str) -> Any:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture])


def _small(kind: type[PreTrainedConfig], changes: Mapping[str, Any]) -> dict[str, Any]:
    fields = _fields(kind)
    found: dict[str, Any] = {
        name: value
        for name, value in _SIZES.items()
        if name in fields
        and not (fields[name] is None and name.endswith(_OFF_WHEN_NONE))
        and (fields[name] != 0 or type(fields[name]) is bool or value is WINDOW)
    }
    for name, value in fields.items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            found[name] = 3
    found |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if "kv_lora_rank" in fields:
        found["num_key_value_heads"] = found["num_attention_heads"]
    kinds = {name: list(dict.fromkeys(fields[name])) for name in _KINDS if fields.get(name)}
    if "max_window_layers" in fields:  # it makes the list
        kinds.pop("layer_types", None)
    if kinds:  # one layer of each kind
        layers = max(2, *map(len, kinds.values()))
        found["num_hidden_layers"] = layers
        found |= {name: [several[i % len(several)] for i in range(layers)] for name, several in kinds.items()}
    for name, part in (kind.sub_configs or {}).items():
        if isinstance(fields.get(name), dict):
            own = fields[name].get("model_type")
            if own in CONFIG_MAPPING:
                part = CONFIG_MAPPING[own]
            found[name] = _small(part, changes.get(name, {}))
            if own:
                found[name]["model_type"] = own
    parts = [name for name in found if isinstance(found[name], dict)]
    return {**found, **{name: value for name, value in changes.items() if name not in parts}}


def _fields(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """What a config says by default; None where it has no default."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = {field.name for field in dataclasses.fields(kind)} - common
    try:
        default = kind()
    except StrictDataclassError:
        return dict.fromkeys(names)
    held = vars(default)
    own = {name: held.get(name) for name in names if not isinstance(held.get(name), PreTrainedConfig)}
    return {**own, **default.to_dict()}


# It has no default.
_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_EXCEPTIONS["gemma4_assistant"] = {
    "text_config": {**_small(CONFIG_MAPPING["gemma4_text"], _ASSISTANT), "model_type": "gemma4_text"}
}
