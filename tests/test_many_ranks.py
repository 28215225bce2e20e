"""All ranks at once, against the harness' own backend on a model that is set to each rank."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import randomize
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
)

from matryoshka_lora import MatryoshkaError, NestedAdapter, nest
from matryoshka_lora.evaluation.batch import GrowingLayer, shared_prefix
from matryoshka_lora.evaluation.many_ranks import ManyRanks
from matryoshka_lora.models import load_tokenizer

RANKS = (0, 1, 2, 4)
CONTEXT = 80
WORDS = (
    *("the", "cat", "sat", "on", "a", "red", "mat"),
    *("and", "saw", "seven", "green", "birds", "fly"),
)

SIZES = {
    "vocab_size": 49152,  # that of the embedded model's tokenizer
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,  # large enough for the tokens to depend on the adapter
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 5.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
}
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama, eager": lambda: LlamaConfig(**SIZES, attn_implementation="eager"),
    "mistral, sliding": lambda: MistralConfig(**SIZES, sliding_window=7),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, sliding_window=7, **BOTH),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gpt2": lambda: GPT2Config(**SIZES, tie_word_embeddings=False),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
    "phi3, longrope": lambda: Phi3Config(**SIZES, **LONGROPE),
    "mamba": lambda: MambaConfig(**SIZES, state_size=8, time_step_rank=4),
}
ONE_BY_ONE = {"mamba", "phi3, longrope"}
TARGETS = {"mixtral": ["q_proj", "v_proj"], "mamba": ["in_proj", "x_proj"]}


def build(architecture: str = "llama", **changes: Any) -> NestedAdapter:
    """Return a nested adapter of random factors, in order, on a tiny model."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval()
    base.generation_config.update(eos_token_id=2, pad_token_id=2, **changes)
    targets = TARGETS.get(architecture, "all-linear")
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    randomize(model, size=0.4)
    adapter = nest(model.eval(), rule="lora")
    adapter.reorder()
    return adapter


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


@pytest.fixture(scope="module")
def llama() -> NestedAdapter:
    return build()


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, 0) for each in arguments]


def likelihoods() -> list[tuple[str, str]]:
    shots = text(40, 0)
    pairs = []
    for n in range(6):
        context = (shots + "\n" if n % 3 else "") + text(n * 4 + 1, n) + " " * (n % 2)
        pairs += [(context, f" the cat {text(1 + (n + i) % 4, i)}") for i in range(1 + n % 4)]
    pairs += [("Say", " A"), ("Say", " B"), ("Say", " Bob is"), ("", "the cat sat"), ("", "dog")]
    return [*pairs, (text(150, 1), " and so on"), (text(80, 2), " so " + text(70, 3))]


def prompts(**settings: Any) -> list[tuple[str, dict[str, Any]]]:
    given = {"until": ["\n", " mat"], "max_gen_toks": 12, "do_sample": False, **settings}
    shots = text(40, 0)
    found = [((shots + "\n" if n % 3 else "") + text(3 * n + 1, n), dict(given)) for n in range(6)]
    return [*found, (text(120, 9), {"until": [], "max_gen_toks": 7}), found[1]]


ASKED: dict[str, list[tuple[Any, ...]]] = {
    "loglikelihood": likelihoods(),
    "loglikelihood_rolling": [(text(n, n),) for n in (1, 30, 150)],
    "generate_until": prompts(),
}


KNOWN: dict[tuple[int, int, str], list[Any]] = {}


def expected(adapter: NestedAdapter, tokenizer: Any, rank: int, kind: str, asked: Any) -> list[Any]:
    """Return what the harness' own backend says."""
    key = (id(adapter), rank, kind)
    if asked is ASKED[kind] and key in KNOWN:
        return KNOWN[key]
    before = adapter.rank
    size = 1 if kind == "generate_until" or "longrope" in str(adapter.model.config) else 4
    adapter.set_rank(rank)
    backend = HFLM(adapter.model, tokenizer=tokenizer, batch_size=size)
    found = list(getattr(backend, kind)(requests(kind, asked), disable_tqdm=True))
    adapter.set_rank(before)
    if asked is ASKED[kind]:
        KNOWN[key] = found
    return found


def check(lm: ManyRanks, tokenizer: Any, kind: str, asked: Any = None, ranks: Any = RANKS) -> None:
    asked = asked or ASKED[kind]
    for rank in ranks:
        lm.lora_rank = rank
        found = getattr(lm, kind)(requests(kind, asked))
        wanted = expected(lm.adapter, tokenizer, rank, kind, asked)
        if kind == "generate_until":
            assert found == wanted
            assert len({*found}) > 3
        elif kind == "loglikelihood":
            assert [logprob for logprob, _ in found] == pytest.approx(
                [x for x, _ in wanted], abs=2e-4
            )
            assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
        else:
            assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=[pytest.mark.slow] * (each != "llama")) for each in CONFIGS],
)
def test_every_answer_is_the_harness_own(
    architecture: str, tokenizer: Any, llama: NestedAdapter
) -> None:
    adapter = llama if architecture == "llama" else build(architecture)
    lm = ManyRanks(adapter, tokenizer, RANKS)
    assert lm.together == (architecture not in ONE_BY_ONE)
    if lm.together:  # the harness' own forwards are not used
        lm._model_call = lm._model_generate = None
    for kind in ASKED:
        check(lm, tokenizer, kind, ranks=(0, 2) if architecture == "llama" else (1, 4))
    assert adapter.rank == 4


@pytest.mark.parametrize("batch_tokens", [pytest.param(1, marks=pytest.mark.slow), 150])
def test_small_batches_change_nothing(
    batch_tokens: int, llama: NestedAdapter, tokenizer: Any
) -> None:
    """Rows leave, waiting prompts join, and forwards are cut into chunks."""
    lm = ManyRanks(llama, tokenizer, RANKS, batch_tokens)
    for kind in ASKED:
        check(lm, tokenizer, kind, ranks=(2,))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizer_stays_and_its_side_changes_nothing(side: str, llama: NestedAdapter) -> None:
    tokenizer = load_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = side, None
    lm = ManyRanks(llama, tokenizer, RANKS)
    check(lm, load_tokenizer(), "loglikelihood", ranks=(2,))
    check(lm, load_tokenizer(), "generate_until", ranks=(2,))
    assert (tokenizer.padding_side, tokenizer.pad_token) == (side, None)


def test_greedy_continuations_are_seen(llama: NestedAdapter, tokenizer: Any) -> None:
    """What the model writes itself is greedy at its rank."""
    lm = ManyRanks(llama, tokenizer, (1, 4))
    written = lm._generated(requests("generate_until", prompts(until=[])[:3]))
    for rank in (1, 4):
        asked = [
            (prompt, answer) for (prompt, _), answer in zip(prompts(), written[rank], strict=False)
        ]
        lm.lora_rank = rank
        found = lm.loglikelihood(requests("loglikelihood", asked))
        assert found == [
            (pytest.approx(logprob, abs=2e-4), greedy)
            for logprob, greedy in expected(llama, tokenizer, rank, "loglikelihood", asked)
        ]
        assert any(greedy for _, greedy in found)


def test_answers_of_all_ranks_are_computed_once(
    llama: NestedAdapter, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = ManyRanks(llama, tokenizer, RANKS)
    forward, calls = lm._forward, []
    monkeypatch.setattr(lm, "_forward", lambda *args: calls.append(args) or forward(*args))
    for rank in (4, 1, 0):
        lm.lora_rank = rank
        for kind, asked in ASKED.items():
            getattr(lm, kind)(requests(kind, asked))
        calls.append("end of a rank")
    assert calls.index("end of a rank") == len(calls) - 3


@pytest.mark.parametrize("where", ["the task", "the model"])
def test_what_is_not_plain_greedy_decoding_is_the_harness_business(
    where: str, llama: NestedAdapter, tokenizer: Any
) -> None:
    settings = {"repetition_penalty": 1.7}
    adapter = build("llama", **settings) if where == "the model" else llama
    asked = prompts(**settings) if where == "the task" else prompts()
    lm = ManyRanks(adapter, tokenizer, (1, 4))
    check(lm, tokenizer, "generate_until", asked, ranks=(1, 4))
    plain = ManyRanks(llama, tokenizer, (1, 4))
    plain.lora_rank = lm.lora_rank
    assert plain.generate_until(requests("generate_until", prompts())) != lm.generate_until(
        requests("generate_until", asked)
    )


def test_a_task_that_samples_gets_several_answers(llama: NestedAdapter, tokenizer: Any) -> None:
    lm = ManyRanks(llama, tokenizer, (1,))
    settings = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8}
    found = lm.generate_until(requests("generate_until", [("the cat", settings)] * 4))
    assert len(set(found)) > 1
    assert lm.generate_until(requests("generate_until", [("the cat", settings)] * 4)) == found


@pytest.mark.parametrize(
    ("kind", "asked", "said"),
    [
        ("loglikelihood", [("the cat", "")], "a continuation of 0 tokens"),
        ("loglikelihood", [("the cat", text(CONTEXT + 1, 0))], f"it takes 1 to {CONTEXT}"),
        ("generate_until", [("the cat", {"max_gen_toks": CONTEXT})], "a smaller max_gen_toks"),
    ],
)
def test_what_cannot_be_answered(
    kind: str, asked: Any, said: str, llama: NestedAdapter, tokenizer: Any
) -> None:
    with pytest.raises(MatryoshkaError, match=said):
        getattr(ManyRanks(llama, tokenizer, RANKS), kind)(requests(kind, asked))


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple), min_size=1))
def test_what_all_begin_with(sequences: list[tuple[int, ...]]) -> None:
    prefix = shared_prefix(sequences)
    assert all(each[: len(prefix)] == prefix and len(each) > len(prefix) for each in sequences)
    longer = {each[: len(prefix) + 1] for each in sequences}
    assert len(longer) > 1 or len(prefix) + 1 == min(map(len, sequences))


def test_each_task_has_a_prefix_of_its_own(llama: NestedAdapter, tokenizer: Any) -> None:
    """Read once at each rank, so that a question reads but its own tokens."""
    asked = [(f"{text(30, n % 2)} {text(3, n)}", " cat") for n in range(8)]
    several = requests("loglikelihood", asked)
    for n, request in enumerate(several):
        request.task_name = f"task {n % 2}"
    lm = ManyRanks(llama, tokenizer, (1, 4))
    read, new = lm._read, []
    lm._read = lambda rows, inputs, keep: (
        new.append([len(inputs), len(inputs[0])]) or read(rows, inputs, keep)
    )
    lm.lora_rank = 4
    found = lm.loglikelihood(several)
    assert [rows for rows, _ in new] == [2, 8, 2, 8]
    assert new[0][1] >= 30
    assert new[1][1] < 10
    wanted = expected(llama, tokenizer, 4, "loglikelihood", asked)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in wanted], abs=2e-4)


def test_a_growing_layer_is_transformers_layer() -> None:
    grown, plain = DynamicCache(), DynamicCache()
    grown.layer_class_to_replicate = GrowingLayer
    for n, columns in enumerate((5, 1, 1, 90, 1)):
        states = torch.randn(2, 3, columns, 4), torch.randn(2, 3, columns, 5)
        for layer in (0, 1):
            found, wanted = grown.update(*states, layer), plain.update(*states, layer)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), n
    assert grown.get_seq_length() == plain.get_seq_length() == 98
