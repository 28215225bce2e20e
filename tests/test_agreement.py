"""A model is refused before it is evaluated where the engine's answers are not those of its own forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import EXPERTS, GROUPED, LONGROPE, SIZES, WIDE, tiny_adapter
from conftest import tiny_llama
from tiny_chat import tiny_tokenizer
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertGenerationConfig,
    DiffLlamaConfig,
    DogeConfig,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    HrmTextConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2MoeConfig,
    RobertaConfig,
)

from matryoshka_lora import MatryoshkaError
from matryoshka_lora.engine import agreement, runner
from matryoshka_lora.engine import engine as engine_module
from matryoshka_lora.engine.engine import Engine

TOKENIZER = tiny_tokenizer()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFUSED = "cannot be evaluated at several ranks at once: where .*export the ranks"


@pytest.fixture
def attention() -> Iterator[Callable[..., Any]]:
    """The engine's attention, which the test may register anew."""
    yield runner._attention
    AttentionInterface.register(runner.NAME, runner._attention)
    AttentionMaskInterface.register(runner.NAME, runner._mask)


def without(real: Callable[..., Any], name: str) -> None:
    """Register an attention that does not hear of an argument."""

    def deaf(module: Any, q: Any, k: Any, v: Any, attention_mask: Any, **kwargs: Any) -> Any:
        return real(module, q, k, v, **{**kwargs, "attention_mask": attention_mask, name: None})

    AttentionInterface.register(runner.NAME, deaf)


DOGE = DogeConfig(**GROUPED, keep_window_size=6)
PHIMOE = PhimoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=64)
DIFFLLAMA = DiffLlamaConfig(**GROUPED)
CYCLES = {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 2}
HRM = HrmTextConfig(**{**SIZES, "initializer_range": 0.05, "num_hidden_layers": 3}, **CYCLES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(**SIZES, is_decoder=True),
        BertGenerationConfig(**SIZES, is_decoder=False),
        LlamaConfig(**GROUPED, is_causal=False),
    ],
    ids=["positions-that-begin-at-the-padding-token", "tokens-that-see-what-comes-after", "a-causal-model-made-not"],
)
def test_what_differs_is_refused(config: Any, dtype: torch.dtype) -> None:
    with pytest.raises(MatryoshkaError, match=REFUSED):
        Engine(tiny_adapter(config, "sdpa", dtype), TOKENIZER)


def test_what_does_not_run_is_refused_with_its_reason() -> None:
    with pytest.raises(
        MatryoshkaError, match=r"DogeForCausalLM cannot be evaluated at several ranks at once: a forward .*'Mask'"
    ):
        Engine(tiny_adapter(DOGE), TOKENIZER)
    opt = OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)
    with pytest.raises(MatryoshkaError, match=r"OPTForCausalLM cannot .* a layer got \d+ rows.*export the ranks"):
        Engine(tiny_adapter(opt, part="fc"), TOKENIZER)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [DIFFLLAMA, HRM])
def test_an_engine_that_knows_one_attention_for_each_layer_is_caught(
    config: Any, dtype: torch.dtype, attention: Callable[..., Any]
) -> None:
    adapter = tiny_adapter(config, dtype=dtype)
    Engine(adapter, TOKENIZER)

    def by_layer(module: Any, *args: Any, **kwargs: Any) -> Any:
        runner._PASS.get()._calls = module.layer_idx  # type: ignore[attr-defined]
        return attention(module, *args, **kwargs)

    AttentionInterface.register(runner.NAME, by_layer)
    with pytest.raises(MatryoshkaError, match=REFUSED):
        Engine(tiny_adapter(config, dtype=dtype), TOKENIZER)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config",
    [
        DOGE,
        PHIMOE,
        Qwen2MoeConfig(**GROUPED, **EXPERTS, use_sliding_window=True, moe_intermediate_size=16, sliding_window=4096),
        Gemma2Config(**{**WIDE, "initializer_range": 0.01}, sliding_window=64),
    ],
    ids=["doge", "phimoe", "qwen2-moe", "flat-logits"],
)
def test_an_engine_that_does_not_heed_masks_is_caught(
    config: Any, dtype: torch.dtype, attention: Callable[..., Any]
) -> None:
    if config is not DOGE:
        Engine(tiny_adapter(config, dtype=dtype), TOKENIZER)
    without(attention, "attention_mask")
    AttentionMaskInterface.register(runner.NAME, lambda **_: None)
    with pytest.raises(MatryoshkaError, match=REFUSED):
        Engine(tiny_adapter(config, dtype=dtype), TOKENIZER)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("config", "argument"),
    [
        (GptOssConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2), "s_aux"),
        (Gemma2Config(**WIDE, attn_logit_softcapping=0.1), "softcap"),
        (GraniteConfig(**GROUPED, attention_multiplier=2.0), "scaling"),
    ],
    ids=["sinks", "softcap", "scale"],
)
def test_an_engine_that_does_not_heed_an_argument_is_caught(
    config: Any, argument: str, dtype: torch.dtype, attention: Callable[..., Any]
) -> None:
    adapter = tiny_adapter(config, dtype=dtype)
    if argument == "s_aux":
        for name, parameter in adapter.model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.constant_(parameter, 3.0)
    Engine(adapter, TOKENIZER)
    agreement._agreed.clear()
    without(attention, argument)
    with pytest.raises(MatryoshkaError, match=REFUSED):
        Engine(adapter, TOKENIZER)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_engine_that_knows_nothing_of_longrope_is_caught(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Phi3Config(**GROUPED, rope_parameters=dict(LONGROPE), original_max_position_embeddings=11)
    adapter = tiny_adapter(config, dtype=dtype)
    assert Engine(adapter, TOKENIZER).max_length == 11
    agreement._agreed.clear()
    monkeypatch.setattr(engine_module, "rotation_limit", lambda model: None)
    with pytest.raises(MatryoshkaError, match=REFUSED):
        Engine(adapter, TOKENIZER)


def test_a_dtype_in_which_nothing_can_be_told_is_refused() -> None:
    config = HrmTextConfig(**{**SIZES, "initializer_range": 0.5, "num_hidden_layers": 3}, **CYCLES)
    Engine(tiny_adapter(config, dtype=torch.float32), TOKENIZER)
    with pytest.raises(MatryoshkaError, match="rounding to bfloat16 alone changes its log-probabilities"):
        Engine(tiny_adapter(config, dtype=torch.bfloat16), TOKENIZER)


def test_a_model_is_asked_once_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tiny_adapter(PHIMOE)
    model: Any = adapter.model.get_base_model()
    adapter.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked: list[int] = []
    real = agreement._compared
    monkeypatch.setattr(agreement, "_compared", lambda *given: asked.append(1) or real(*given))
    for _ in range(3):
        Engine(adapter, TOKENIZER)
    assert asked == [1]
    assert model.config.sliding_window == 64
    assert model.config._attn_implementation == "eager"
    assert adapter.model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.get_input_embeddings()._forward_hooks
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_diverged_weights_are_left_to_who_asks_for_a_loss() -> None:
    adapter = tiny_adapter(LlamaConfig(**GROUPED))
    with torch.no_grad():
        next(p for n, p in adapter.model.named_parameters() if "o_proj.lora_B" in n).fill_(float("nan"))
    found = Engine(adapter, TOKENIZER).loglikelihood([([5, 6], [7])] * 2, [0, 4])
    assert math.isnan(found[1].logprob)
    assert not agreement._agreed[adapter.model.get_base_model()]


def test_the_sizes_of_keys_are_those_of_the_model() -> None:
    adapter = tiny_adapter(LlamaConfig(**GROUPED))
    assert agreement.check_agreement(adapter, TOKENIZER, None) == 2 * 2 * (2 * 8) * 4  # layers, k and v, heads, fp32
    assert tiny_llama().config.head_dim == 16  # the negative control of what is not shared with other tests
